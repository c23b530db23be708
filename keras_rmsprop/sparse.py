"""Sparse gradients: the rows of a table that a batch used, and nothing else.

A `tf.IndexedSlices` gradient becomes the gradients of its distinct rows, repeats
summed: a small dense tensor, which Keras unscales and clips like any other, to the same
result as the whole dense gradient, whose other rows are 0.

A row without gradient keeps its weights, and its averages only shrink: v <- rho * v.
So a row without a gradient in n updates needs v <- rho^n * v before its turn, and
nothing in between. The `Clock` of a table knows n. Whoever reads the averages of a
whole table brings all rows up to date first (`catch_up`), so nobody outside sees a
clock.

Imported only on the TensorFlow backend.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rmsprop.access import after as after
from keras_rmsprop.access import copy as copy
from keras_rmsprop.access import inside_xla as inside_xla
from keras_rmsprop.access import mix as mix
from keras_rmsprop.access import read as read
from keras_rmsprop.access import subtract as subtract
from keras_rmsprop.access import unwrapped as unwrapped
from keras_rmsprop.access import write as write
from keras_rmsprop.clocks import AverageTicks as AverageTicks
from keras_rmsprop.clocks import Clock as Clock
from keras_rmsprop.clocks import Clocks as Clocks
from keras_rmsprop.clocks import Ticks as Ticks
from keras_rmsprop.codecs import Draw, of
from keras_rmsprop.rule import Slots, cast, wide


class Rows(NamedTuple):
    """Which rows of a table a step updates."""

    clock: Clock
    ids: Any = None
    """The distinct indices of the rows, or None: all rows."""


def check_ids(gradient: tf.IndexedSlices, variable: Any) -> Any:
    """Fail if an index is outside the table. XLA drops this check, and such rows."""
    ids = gradient.indices
    good = tf.reduce_all((ids >= 0) & (ids < variable.shape[0]))
    message = f"An index of a sparse gradient is not in [0, {variable.shape[0]})"
    return tf.raw_ops.Assert(condition=good, data=[message, ids], summarize=10)


def with_known_shape(
    gradient: tf.IndexedSlices, variable: Any
) -> tuple[tf.IndexedSlices, list[Any]]:
    """Return slices of which as much is known as can be, and operations that fail.

    They fail if the slices have not the shape of rows, or there is not one for each
    index, and that was not known before.
    """
    values, ids, asserts = gradient.values, gradient.indices, []
    if ids.shape.rank is None:
        ids = tf.ensure_shape(ids, [None])
        asserts.append(ids.op)
    if values.shape.rank is None or not values.shape[1:].is_fully_defined():
        values = tf.ensure_shape(values, [None, *variable.shape[1:]])
        asserts.append(values.op)
    if None in (values.shape[0], ids.shape[0]) and not inside_xla():
        same = tf.equal(tf.shape(values)[0], tf.size(ids))
        message = "A sparse gradient must have a row for each index"
        asserts.append(tf.raw_ops.Assert(condition=same, data=[message]))
    return tf.IndexedSlices(values, ids, gradient.dense_shape), asserts


def dense(gradient: tf.IndexedSlices, variable: Any) -> Any:
    """Return the dense gradient that the slices stand for, in float32 at least."""
    return tf.math.unsorted_segment_sum(
        widened(gradient.values), gradient.indices, variable.shape[0]
    )


def widened(values: Any) -> Any:
    """Return values in float32, or in float64 if that is their dtype."""
    return tf.cast(values, wide(values.dtype))


def distinct(gradient: tf.IndexedSlices, clock: Clock) -> tuple[Any, Any]:
    """Return the gradients of the rows that have one, and these rows' indices.

    The slices of a row are summed, in float32 at least. Under XLA, which wants to know
    every shape, there are as many rows as slices: those left over are 0, and their
    index is just outside the table, where XLA writes nothing.

    Args:
        gradient: The slices.
        clock: The table's clock. It is as it was when this ends.
    """
    values, ids = widened(gradient.values), gradient.indices
    if not inside_xla():
        # Who gathers these rows while the forward pass holds the table would copy it.
        with tf.control_dependencies([values]):
            ids, positions = tf.unique(ids)
        return tf.math.unsorted_segment_sum(values, positions, tf.size(ids)), ids
    n, rows = tf.size(ids), tf.cast(clock.shape[0], ids.dtype)
    positions = tf.range(n)
    is_inside = (ids >= 0) & (ids < rows)
    met = tf.where(is_inside, _shared_positions(positions, ids, clock), n)
    sums = tf.math.unsorted_segment_sum(values, met, n)
    return sums, tf.where(met == positions, ids, rows)


def _shared_positions(positions: Any, ids: Any, clock: Clock) -> Any:
    """Return a position for each index: one that its repeats share.

    XLA sorts on one thread, so that repeats do not find each other by sorting. Each
    writes its position into the row's number in the clock and reads what is there then:
    the position of one of them, no matter which. Then the number is put back.
    """
    last = read(clock.last, ids)
    write(clock.last, positions, after(ids, last))
    found = read(clock.last, ids)
    write(clock.last, last, after(ids, found))
    return found


def update(
    variable: Any,
    slots: Slots,
    rows: Rows,
    rho: Any,
    draw: Draw,
    step: Callable[[Any, Slots], tuple[Any, Slots]],
    *,
    reads_weights: bool,
) -> None:
    """Bring some rows of a table up to date, then update them.

    Args:
        variable: The table.
        slots: Its slots.
        rows: The rows, and the table's clock, which counts this update, or is reset if
            it is one of all rows.
        rho: Decay rate of the averages.
        draw: What random rounding depends on.
        step: Function from the weights of the rows and their slots before the update
            to what it takes from the weights, and the slots after it.
        reads_weights: Whether `step` uses the weights.
    """
    clock, ids = rows
    # The average was read with the weights. So XLA must see that they are older than
    # what is written, or it copies the table.
    reads_weights |= inside_xla() and clock.average is not None
    weights = read(variable, ids) if reads_weights else None
    taken, new = step(weights, caught_up(slots, rows, rho))
    _write_slots(slots, new, rows, draw)
    subtract(variable, taken, ids, weights)
    if ids is None:
        Ticks.reset(clock)  # the average of the weights has its own
    else:
        clock.tick(ids, tf.shape(new.velocity)[0])


def catch_up(slots: Slots, clock: Clock, rho: Any, draw: Draw) -> None:
    """Bring the slots of all rows of a table up to date, and reset its clock.

    Args:
        slots: The slots of the table.
        clock: Its clock.
        rho: Decay rate of the averages.
        draw: What random rounding depends on.
    """
    new = caught_up(slots, Rows(clock), rho)
    _write_slots(slots, new._replace(momentum=None), Rows(clock), draw)
    Ticks.reset(clock)  # the average of the weights has its own


def caught_up(slots: Slots, rows: Rows, rho: Any) -> Slots:
    """Return the numbers that some rows of slots keep, brought up to date.

    Args:
        slots: The slots of a table.
        rows: The rows, and the table's clock.
        rho: Decay rate of the averages.
    """
    dtype = wide(slots.velocity.dtype)

    def numbers(slot: Any, number: int) -> Any:
        if not of(slot).in_blocks:
            return of(slot).decode(read(slot, rows.ids), dtype)
        found = _of_blocks(slot, number, rows)
        return found if rows.ids is None else tf.gather(found, rows.ids)

    v, m, a = slots.map_numbered(numbers)
    return Slots(faded(v, rows, rho), m, a if a is None else faded(a, rows, rho))


def _of_blocks(slot: Any, number: int, rows: Rows) -> Any:
    """Return the numbers of all rows of a slot that keeps them in blocks."""
    shape = tuple(rows.clock.shape)
    return of(slot).decode(read(slot, None), "float32", shape, number)


def faded(values: Any, rows: Rows, rate: Any) -> Any:
    """Return values of some rows times a decay rate for each update they are behind.

    Args:
        values: One row each.
        rows: The rows, and the table's clock.
        rate: The decay rate.
    """
    clock, ids = rows
    behind = tf.convert_to_tensor(clock.updates) - read(clock.last, ids)
    # The power of the rate that dense arithmetic would multiply by, again and again.
    dtype = values.dtype
    base = tf.cast(tf.convert_to_tensor(cast(rate, dtype), dtype), tf.float64)
    # XLA computes this in a third of the time of `base**behind`. For a rate of 0, too.
    logs = tf.math.multiply_no_nan(tf.math.log(base), tf.cast(behind, tf.float64))
    factor = tf.cast(tf.exp(logs), dtype)
    return values * tf.reshape(factor, [-1] + [1] * (len(values.shape) - 1))


def _write_slots(slots: Slots, values: Slots, rows: Rows, draw: Draw) -> None:
    """Set some rows of slots to numbers, in the form in which they are kept."""
    for number, (slot, new) in enumerate(zip(slots, values, strict=True)):
        if slot is None or new is None:
            continue
        codec, ids = of(slot), rows.ids
        if codec.in_blocks and ids is not None:
            old = _of_blocks(slot, number, rows)
            new = tf.tensor_scatter_nd_update(old, ids[:, None], new)
            ids = None
        dtype = keras.backend.standardize_dtype(slot.dtype)
        write(slot, codec.encode(new, dtype, draw, number), ids)


def mean(values: Any, *, ids: Any, variable: Any) -> Any:
    """Return the mean over rows of a table, without those that `distinct` added.

    Args:
        values: Something for each element of the rows.
        ids: The rows' indices.
        variable: The table.
    """
    real = tf.cast(ids < variable.shape[0], values.dtype)
    of_rows = tf.reduce_mean(values, range(1, len(values.shape)))
    return tf.math.divide_no_nan(tf.reduce_sum(real * of_rows), tf.reduce_sum(real))
