"""The kernel for TensorFlow: ops of its own, of rows of one table."""

from typing import Any

import tensorflow as tf

from keras_rmsprop.kernel.tensorflow import follows, is_for, numbers, ops
from keras_rmsprop.sparse import unwrapped
from keras_rmsprop.update import Constants, Update


def update_rows(update: Update, constants: Constants) -> None:
    """Bring some rows of a table up to date and take their step, in one call.

    Args:
        update: What to do to the table.
        constants: What is the same for all variables.
    """
    clock, ids = update.rows
    velocity, momentum, average_gradient = update.slots
    ops().keras_rmsprop_rows(
        gradient=tf.cast(update.gradient, update.dtype),
        ids=ids,
        weights=update.variable.handle,
        velocity=velocity.handle,
        updates=clock.updates.handle,
        last=clock.last.handle,
        momenta=[] if momentum is None else [momentum.handle],
        average_gradients=[] if average_gradient is None else [average_gradient.handle],
        **numbers([update], constants),
    )


def distinct(gradient: tf.IndexedSlices) -> tuple[Any, Any]:
    """Return the sums of the slices of each row, and the rows; see `sparse.distinct`.

    Args:
        gradient: In float32 or float64.
    """
    found = ops().keras_rmsprop_distinct(slices=gradient.values, ids=gradient.indices)
    return found.sums, found.distinct


def follow_rows(part: Any, weight: Any, forgetting: float) -> Any:
    """Do what `tensorflow.follow` does, from some rows of a table, in one call.

    Args:
        part: An `estimate.Sampled` with rows.
        weight: See `tensorflow.follow`.
        forgetting: See `tensorflow.follow`.

    Returns:
        Two doubles: the sum of <g, x0 - x>, and by how much that of |s| is larger than
        if no row had a gradient. None: the kernel does not take this table.
    """
    if not follows(part):
        return None
    clock, ids = part.rows
    variable, first, sums = map(unwrapped, (part.variable, part.first, part.sums))
    found = ops().keras_rmsprop_follow_rows(
        gradient=part.gradient,
        ids=ids,
        weights=variable.handle,
        first_weights=first.handle,
        gradient_sums=sums.handle,
        updates=clock.updates.handle,
        last=clock.last.handle,
        forgetting=tf.constant(forgetting, part.gradient.dtype),
        weight=tf.cast(weight, part.gradient.dtype),
        W=variable.dtype.base_dtype,
        sample=part.sample.row_runs,
        row_step=part.sample.row_step,
    )
    return found.gain, found.length


def averages_rows(table: Any, average: Any) -> bool:
    """Whether `average_rows` takes this table."""
    weights, average = unwrapped(table), unwrapped(average)
    dtypes = {weights.dtype.name, average.dtype.name}
    is_wide = dtypes in ({"float32"}, {"float64"})
    return is_for([weights, average]) and is_wide and weights.device == average.device


def average_rows(table: Any, average: Any, ids: Any, shares: Any) -> None:
    """Let avg <- m avg + (1 - m) w, for some rows of a table, in one call.

    Args:
        table: w, a variable.
        average: avg, a variable.
        ids: The rows, distinct.
        shares: m, for each row or for all.
    """
    weights = unwrapped(table)
    ops().keras_rmsprop_average_rows(
        ids=ids,
        shares=tf.cast(shares, "float64"),
        weights=weights.handle,
        average=unwrapped(average).handle,
        T=weights.dtype.base_dtype,
    )
