"""Averages of the weights, `use_ema`: how they follow, and how they replace."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_rmsprop import sparse


def follow(
    variables: Sequence[Any],
    averages: Sequence[Any],
    rows: Mapping[int, Any],
    iterations: Any,
    momentum: float,
) -> None:
    """Let averages follow their variables: avg <- m avg + (1 - m) w; first avg <- w.

    Args:
        variables: The variables.
        averages: Of each its average, or None.
        rows: By their index, the tables of which only some rows follow, and these.
        iterations: How many updates there were.
        momentum: m, in [0, 1].
    """
    for i, (variable, average) in enumerate(zip(variables, averages, strict=True)):
        if average is None:
            continue
        if i in rows:
            tf.cond(
                tf.equal(iterations, 0),
                functools.partial(sparse.write, average, variable, None),
                functools.partial(sparse.mix, average, variable, rows[i], momentum),
            )
        else:
            not_first = ops.cast(ops.not_equal(iterations, 0), variable.dtype)
            m = not_first * momentum
            average.assign(m * average + (1 - m) * variable)


def replace(variables: Sequence[Any], averages: Sequence[Any]) -> None:
    """Give variables the values of their averages, where they have one."""
    for variable, average in zip(variables, averages, strict=True):
        if average is not None:
            # A copy: on JAX both would share one buffer, and give it away twice.
            variable.assign(ops.copy(average))
