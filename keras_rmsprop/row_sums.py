"""Sums of gradients over several calls, of the rows of a table that have one.

Imported only on the TensorFlow backend.
"""

from typing import Any

import tensorflow as tf

from keras_rmsprop.access import inside_xla, read, subtract, write
from keras_rmsprop.clocks import Clock


def accumulate(gradients: Any, ids: Any, clock: Clock, sums: Any) -> None:
    """Add the gradients of some rows to the sums, in place.

    Args:
        gradients: The gradients, a row each.
        ids: The rows' indices, distinct.
        clock: The table's clock, which knows the rows that have sums.
        sums: The variable that keeps the sums.
    """
    subtract(sums, -gradients, ids)
    if inside_xla():  # which wants to know how many rows there are
        clock.mark_all_pending()
        return
    known = tf.convert_to_tensor(clock.pending)
    clock.pending.assign(tf.unique(tf.concat([known, tf.cast(ids, tf.int64)], 0)).y)


def mean_of_sums(
    gradients: Any, ids: Any, clock: Clock, sums: Any, steps: Any
) -> tuple[Any, Any]:
    """Return the mean gradients of all rows that have sums, and these rows.

    Args:
        gradients: The last gradients, a row each; they are added to the sums.
        ids: Their rows' indices, distinct.
        clock: The table's clock, which knows the rows that have sums.
        sums: The variable that keeps the sums.
        steps: The number of steps that were summed up.
    """
    accumulate(gradients, ids, clock, sums)
    rows = tf.cast(_pending(clock, sums), ids.dtype)
    found = read(sums, rows)
    if inside_xla():  # which reads the last row instead of one outside
        inside = tf.reshape(rows < clock.shape[0], [-1] + [1] * (len(found.shape) - 1))
        found = tf.where(inside, found, tf.zeros_like(found))
    return found / steps, rows


def _pending(clock: Clock, sums: Any) -> Any:
    """Return the rows that have sums; who wrote them may be unknown.

    Under XLA, which wants to know how many there are, there is an index for each row of
    the table: for a row without sums, one just outside, where XLA writes nothing.
    """

    def looked_for() -> Any:
        found = tf.not_equal(read(sums, None), 0)
        found = tf.reduce_any(found, range(1, len(found.shape)))
        if not inside_xla():
            return tf.where(found)[:, 0]
        n = clock.shape[0]
        return tf.where(found, tf.range(n, dtype=tf.int64), n)

    if inside_xla():
        return looked_for()
    known = tf.convert_to_tensor(clock.pending)
    return tf.cond(tf.convert_to_tensor(clock.all_pending), looked_for, lambda: known)


def reset(ids: Any, clock: Clock, sums: Any) -> None:
    """Begin new sums.

    Args:
        ids: The rows that have sums, as of `mean_of_sums`; None: all.
        clock: The table's clock.
        sums: The variable that keeps the sums.
    """
    write(sums, tf.zeros_like(read(sums, ids)), ids)
    if not inside_xla():
        clock.pending.assign(tf.zeros([0], tf.int64))
        clock.all_pending.assign(False)
