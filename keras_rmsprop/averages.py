"""Averages of the weights, `use_ema`: how they follow, and how they replace."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_rmsprop import sparse


class Momentum(NamedTuple):
    """Which share of an average an update keeps."""

    most: Any
    """`ema_momentum`."""
    warms_up: bool = False
    """Whether it is (1 + t) / (10 + t) as long as that is less."""

    def at(self, t: Any, dtype: Any) -> Any:
        """Return the share after t updates: 0 at first, which copies the weights."""
        most = self.most
        if self.warms_up:
            dtype = keras.backend.standardize_dtype(dtype)
            n = ops.cast(t, keras.backend.result_type(dtype, "float32"))
            most = ops.minimum(ops.cast(most, n.dtype), (1 + n) / (10 + n))
            most = ops.cast(most, dtype)
        return ops.cast(ops.not_equal(t, 0), dtype) * most


def follow(
    variables: Sequence[Any],
    averages: Sequence[Any],
    rows: Mapping[int, Any],
    iterations: Any,
    momentum: Momentum,
) -> None:
    """Let averages follow their variables: avg <- m avg + (1 - m) w; first avg <- w.

    Args:
        variables: The variables.
        averages: Of each its average, or None.
        rows: By their index, the tables of which only some rows follow, and these.
        iterations: How many updates there were.
        momentum: Says m.
    """
    for i, (variable, average) in enumerate(zip(variables, averages, strict=True)):
        if average is None:
            continue
        m = momentum.at(iterations, variable.dtype)
        if i in rows:
            tf.cond(
                tf.equal(iterations, 0),
                functools.partial(sparse.write, average, variable, None),
                functools.partial(sparse.mix, average, variable, rows[i], m),
            )
        else:
            average.assign(m * average + (1 - m) * variable)


def replace(variables: Sequence[Any], averages: Sequence[Any]) -> None:
    """Give variables the values of their averages, where they have one."""
    for variable, average in zip(variables, averages, strict=True):
        if average is not None:
            # A copy: on JAX both would share one buffer, and give it away twice.
            variable.assign(ops.copy(average))
