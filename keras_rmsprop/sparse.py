"""Sparse gradients: the rows of a table that a batch used, and nothing else.

A `tf.IndexedSlices` gradient becomes the gradients of its distinct rows, repeats
summed: a small dense tensor, which Keras unscales and clips like any other, to the same
result as the whole dense gradient, whose other rows are 0.

A row without gradient keeps its weights, and its averages only shrink: v <- rho * v.
So a row that was silent for n updates needs v <- rho^n * v before its turn, and nothing
in between. The `Clock` of a table knows n. Whoever reads the averages of a whole table
brings all rows up to date first (`catch_up`), so nobody outside sees a clock.

Imported only on the TensorFlow backend.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rmsprop.codecs import Draw, encoded, of
from keras_rmsprop.rule import Slots, cast, wide


class Ticks(tf.Module):
    """Up to which update each row of a table is up to date.

    Attributes:
        updates: int32 scalar, the updates since all rows were last up to date.
        last: int32, one for each row: the update up to which the row is up to date.
    """

    def __init__(self, table: Any) -> None:
        super().__init__()
        with _beside(table):
            self.updates = tf.Variable(0, dtype=tf.int32, trainable=False)
            self.last = tf.Variable(
                tf.zeros(table.shape[:1], tf.int32), trainable=False
            )

    def is_behind(self) -> bool:
        """Whether there were updates since all rows were up to date."""
        # A variable of several replicas is no number, but reads as one.
        return bool(tf.convert_to_tensor(self.updates) > 0)

    def tick(self, ids: Any, count: Any) -> Any:
        """Count an update of some rows, `count` of them; return its number."""
        now = tf.convert_to_tensor(self.updates.assign_add(1))
        write(self.last, tf.fill(tf.reshape(count, [1]), now), ids)
        return now

    def reset(self) -> None:
        """Begin anew: all rows are up to date."""
        self.updates.assign(0)
        self.last.assign(tf.zeros_like(self.last))


class AverageTicks(Ticks):
    """When the average of each row of a table last followed the row's weights.

    Updates of the average are counted, which happen at each step, also in one without
    a gradient for the table.

    Attributes:
        first: int64 scalar, the optimizer's iterations at the first of these updates.
    """

    def __init__(self, table: Any) -> None:
        super().__init__(table)
        with _beside(table):
            self.first = tf.Variable(0, dtype=tf.int64, trainable=False)

    def iterations(self, updates: Any) -> Any:
        """Return the optimizer's iterations after so many updates."""
        return self.first + tf.cast(updates, tf.int64)


class Clock(Ticks):
    """When each row of a table was last updated, counted in updates of that table.

    Attributes:
        average: The clock of the average of the weights, or None.
        sum: float32 scalar, the running sum of `estimate.py`; valid once there were
            updates.
        summed: bool, one for each row: whether `gradient_accumulation_steps` may have
            summed gradients of the row; or None.
    """

    def __init__(
        self, table: Any, *, has_average: bool = False, has_sums: bool = False
    ) -> None:
        super().__init__(table)
        with _beside(table):
            self.sum = tf.Variable(0.0, trainable=False)
            all_rows = tf.ones(table.shape[:1], tf.bool)
            self.summed = tf.Variable(all_rows, trainable=False) if has_sums else None
        self.average = AverageTicks(table) if has_average else None

    def reset(self) -> None:
        """Begin anew: the averages of all rows, of all kinds, are up to date."""
        super().reset()
        if self.average is not None:
            self.average.reset()
        self.mark_sums(True)

    def mark_sums(self, whether: bool, ids: Any = None) -> None:
        """Say whether gradients of some rows may have been summed.

        Args:
            whether: Whether they may.
            ids: The rows; None: all.
        """
        if self.summed is not None:
            shape = tf.shape(self.summed if ids is None else ids)
            write(self.summed, tf.fill(shape, whether), ids)


@contextlib.contextmanager
def _beside(table: Any) -> Iterator[None]:
    """Make variables where a table is, wherever this is called from.

    A checkpoint may be restored anywhere.
    """
    strategy = getattr(native(table), "distribute_strategy", None)
    strategy = strategy or tf.distribute.get_strategy()
    beside = strategy.extended.colocate_vars_with
    with tf.init_scope(), strategy.scope(), beside(native(table)):
        yield


class Clocks(tf.Module):
    """The clocks of an optimizer's tables, by the index of the variable.

    Checkpoints find a clock by that index. Keras does not count it among the
    optimizer's variables, which thus stay those of the built-in.

    Attributes:
        refused: Something that stands for each table that must not get a clock.
    """

    def __init__(
        self,
        tables: Callable[[], Sequence[Any]],
        catch_up_all: Callable[[], None],
        have_averages: Callable[[], bool] = lambda: False,
        have_sums: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.refused: set[Any] = set()
        self._tables = tables
        self._catch_up_all = catch_up_all
        self._have_averages = have_averages
        self._have_sums = have_sums
        self._being_made = False

    def __contains__(self, index: int) -> bool:
        return f"table_{index}" in vars(self)

    def __getitem__(self, index: int) -> Clock:
        return getattr(self, f"table_{index}")

    def make(self, index: int) -> Clock:
        """Return the clock of this table; make one if it has none."""
        if index not in self:
            clock = Clock(
                self._tables()[index],
                has_average=self._have_averages(),
                has_sums=self._have_sums(),
            )
            self._put(index, clock)
        return self[index]

    def _put(self, index: int, clock: Clock) -> None:
        # While it is put there, TensorFlow asks what is there, which makes a clock.
        self._being_made = True
        try:
            setattr(self, f"table_{index}", clock)
        finally:
            self._being_made = False

    def __iter__(self) -> Iterator[int]:
        names = [name for name in vars(self) if name.startswith("table_")]
        return (int(name.removeprefix("table_")) for name in names)

    def move(self, places: Mapping[int, int]) -> None:
        """Give the clocks the new indices of their variables."""
        clocks = {places[i]: self[i] for i in self}
        for i in self:
            delattr(self, f"table_{i}")
        for i, clock in clocks.items():
            self._put(i, clock)

    def _trackable_children(self, save_type: Any = None, **kwargs: Any) -> Any:
        # A checkpoint that is written asks for what to write, and says that it does.
        if save_type == "checkpoint" and tf.executing_eagerly():
            self._catch_up_all()
        given = () if save_type is None else (save_type,)
        return super()._trackable_children(*given, **kwargs)

    def _lookup_dependency(self, name: str, *args: Any) -> Any:
        # This is how a checkpoint finds what to restore; it finds new clocks, too.
        is_clock = name.startswith("table_") and not self._being_made
        if is_clock and self._tables():
            return self.make(int(name.removeprefix("table_")))
        return super()._lookup_dependency(name, *args)


class Rows(NamedTuple):
    """Which rows of a table a step updates."""

    clock: Clock
    ids: Any = None
    """The distinct indices of the rows, or None: all rows."""


class Summand:
    """The gradients of some rows of a table, as a part of sums over several steps.

    Keras divides it, and at last adds the sums so far: that gives the sums of all rows
    that have one.

    Args:
        values: The gradients, a row each.
        ids: The rows' indices, distinct.
        clock: The table's clock, which knows the rows that have sums.
        on_sum: Function that is told the indices of these rows.
    """

    def __init__(
        self, values: Any, ids: Any, clock: Clock, on_sum: Callable[[Any], None]
    ) -> None:
        self.values = values
        self._rest = ids, clock, on_sum

    def __truediv__(self, divisor: Any) -> "Summand":
        return Summand(self.values / divisor, *self._rest)

    def __mul__(self, factor: Any) -> "Summand":
        return Summand(self.values * factor, *self._rest)

    __rmul__ = __mul__

    def __add__(self, sums: Any) -> Any:
        ids, clock, on_sum = self._rest
        self.add_to(sums)
        rows = tf.cast(tf.where(tf.convert_to_tensor(clock.summed))[:, 0], ids.dtype)
        on_sum(rows)
        return read(sums, rows)

    def add_to(self, sums: Any) -> None:
        """Add the gradients to the sums, in place."""
        ids, clock, _ = self._rest
        clock.mark_sums(True, ids)
        subtract(sums, -self.values, ids)


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


def distinct(gradient: tf.IndexedSlices, variable: Any) -> tuple[Any, Any]:
    """Return the gradients of the rows that have one, and these rows' indices.

    The slices of a row are summed, in float32 at least. Under XLA, which wants to know
    every shape, there are as many rows as slices: those left over are 0, and their
    index is just outside the table, where XLA writes nothing.
    """
    values, ids = widened(gradient.values), gradient.indices
    n = tf.size(ids)
    if not inside_xla():
        ids, places = tf.unique(ids)
        return tf.math.unsorted_segment_sum(values, places, tf.size(ids)), ids
    order = tf.argsort(ids)
    ids = tf.gather(ids, order)
    is_new = tf.concat([tf.zeros([1], tf.bool), ids[1:] != ids[:-1]], 0)[:n]
    places = tf.cumsum(tf.cast(is_new, tf.int32))
    sums = tf.math.unsorted_segment_sum(tf.gather(values, order), places, n)
    outside = tf.fill([n], tf.cast(variable.shape[0], ids.dtype))
    return sums, tf.tensor_scatter_nd_update(outside, places[:, None], ids)


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
        rows: The rows, and the table's clock, which counts this update.
        rho: Decay rate of the averages.
        draw: What random rounding depends on.
        step: Function from the weights of the rows and their slots before the update
            to what it takes from the weights, and the slots after it.
        reads_weights: Whether `step` uses the weights.
    """
    clock, ids = rows
    weights = read(variable, ids) if reads_weights else None
    taken, new = step(weights, caught_up(slots, rows, rho))
    _write_slots(slots, new, ids, draw)
    subtract(variable, taken, ids)
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
    _write_slots(slots, new._replace(momentum=None), None, draw)
    Ticks.reset(clock)  # the average of the weights has its own


def caught_up(slots: Slots, rows: Rows, rho: Any) -> Slots:
    """Return some rows of slots, brought up to date.

    Args:
        slots: The slots of a table.
        rows: The rows, and the table's clock.
        rho: Decay rate of the averages.
    """
    ids = rows.ids
    dtype = wide(slots.velocity.dtype)
    v, m, a = slots.map(lambda slot: of(slot).decode(read(slot, ids), dtype))
    return Slots(faded(v, rows, rho), m, a if a is None else faded(a, rows, rho))


def faded(values: Any, rows: Rows, rate: Any) -> Any:
    """Return values of some rows times a decay rate for each silent update so far.

    Args:
        values: One row each.
        rows: The rows, and the table's clock.
        rate: The decay rate.
    """
    clock, ids = rows
    silence = tf.convert_to_tensor(clock.updates) - read(clock.last, ids)
    # The power of the rate that dense arithmetic would multiply by, again and again.
    dtype = values.dtype
    base = tf.cast(tf.convert_to_tensor(cast(rate, dtype), dtype), tf.float64)
    factor = tf.cast(base ** tf.cast(silence, tf.float64), dtype)
    return values * tf.reshape(factor, [-1] + [1] * (len(values.shape) - 1))


def _write_slots(slots: Slots, values: Slots, ids: Any, draw: Draw) -> None:
    for slot, value in zip(slots, encoded(slots, values, draw), strict=True):
        if value is not None:
            write(slot, value, ids)


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


def read(variable: Any, ids: Any) -> Any:
    """Return some rows of a variable without reading the others; None: all."""
    variable = native(variable)
    return tf.convert_to_tensor(variable) if ids is None else tf.gather(variable, ids)


def write(variable: Any, values: Any, ids: Any) -> None:
    """Set some rows of a variable in place; None: all. See `share_reads`."""
    variable = native(variable)
    if ids is None:
        variable.assign(values)
    else:
        variable.scatter_update(tf.IndexedSlices(values, ids))


def subtract(variable: Any, values: Any, ids: Any) -> None:
    """Subtract from some rows of a variable in place; None: from all."""
    # Not `scatter_sub`: on CPU that takes twice as long as to read and to write.
    old = read(variable, ids)
    write(variable, old - tf.cast(values, old.dtype), ids)


def native(variable: Any) -> Any:
    """Return the TensorFlow variable inside a Keras variable, or the one given."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def mix(average: Any, variable: Any, ids: Any, momentum: Any) -> None:
    """Let some rows of a moving average follow those of its variable."""
    old, new = read(average, ids), read(variable, ids)
    write(average, momentum * old + (1 - momentum) * new, ids)


def share_reads(variables: Iterable[Any]) -> None:
    """Let the reads after `write` share the variables instead of copying them.

    This is safe: the next scatter copies if someone still holds what was read. TFLite
    does not know the operation, so steps with `jit_compile=False` do without.

    Args:
        variables: Variables of which rows were written, or None.
    """
    for variable in variables:
        if variable is not None and not inside_xla():
            tf.raw_ops.DisableCopyOnRead(resource=native(variable).handle)


def inside_xla() -> bool:
    """Whether this is being traced for XLA, which writes in place by itself.

    There is no public way to know. Without the private one the answer is yes: right
    everywhere, but then reads of a table copy it.
    """
    try:
        from tensorflow.python.framework import ops
        from tensorflow.python.ops import control_flow_util

        return bool(
            control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())
        )
    except (ImportError, AttributeError):
        return True
