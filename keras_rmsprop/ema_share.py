"""The decay rate of the EMA of the weights: the share of it that an update keeps."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rmsprop import rule

TINY = 1e-300
"""In place of a share of 0, which has no logarithm."""


def begin_of(optimizer: Any) -> Any:
    """Return the variable with the update at which the EMA's warm-up began, or None."""
    return vars(optimizer).get("_ema_begin")


class Momentum(NamedTuple):
    """The share of an average that an update keeps."""

    most: Any
    """`ema_momentum`."""
    warms_up: bool = False
    """Whether the share is (1 + t) / (10 + t) as long as that is less."""
    begin: Any = 0
    """How many updates there were before t counts: up to the end of the last `fit`."""

    @classmethod
    def of(cls, optimizer: Any) -> "Momentum":
        """Return that of a Keras optimizer with `use_ema`."""
        begin = begin_of(optimizer)
        warms_up = bool(getattr(optimizer, "ema_warmup", False))
        return cls(optimizer.ema_momentum, warms_up, 0 if begin is None else begin)

    def at(self, t: Any, dtype: Any) -> Any:
        """Return the share after t updates: 0 at first, which copies the weights."""
        most = self.most
        if self.warms_up:
            dtype = keras.backend.standardize_dtype(dtype)
            n = ops.cast(t, rule.wide(dtype)) - ops.cast(self.begin, rule.wide(dtype))
            most = rule.at_most((1 + n) / (10 + n), rule.cast(most, n.dtype))
            most = ops.cast(most, dtype)
        return ops.cast(ops.not_equal(t, 0), dtype) * most

    def over(self, start: Any, end: Any, dtype: Any) -> Any:
        """Return the product of the shares after start, ..., end - 1 updates.

        Args:
            start: Tensor of integers >= 1.
            end: Likewise.
            dtype: The dtype of the numbers that dense arithmetic would multiply.
        """
        a, b = ops.cast(start, "float64"), ops.cast(end, "float64")
        m = ops.cast(ops.convert_to_tensor(self.most, dtype), "float64")
        if not self.warms_up:
            return _power(m, b - a)
        # Not below 0, as counts of a clock without updates may be.
        a, b = (ops.maximum(x - ops.cast(self.begin, "float64"), 0) for x in (a, b))
        # From this t on (1 + t) / (10 + t) is not less than m.
        c = ops.minimum(ops.maximum(ops.ceil((10 * m - 1) / (1 - m)), a), b)
        # All other factors of numerator and denominator cancel.
        return _power(m, b - c) * _of_nine(a) / _of_nine(c)


def _power(m: Any, n: Any) -> Any:
    """Return m^n, in a tenth of the time that `m**n` takes on a CPU."""
    return ops.exp(n * ops.log(ops.maximum(m, TINY)))


def _of_nine(t: Any) -> Any:
    """Return (t + 1) (t + 2) ... (t + 9); in pairs: (t + 1) (t + 9) ..."""
    x = t * (t + 10)
    return (t + 5) * (x + 9) * (x + 16) * (x + 21) * (x + 24)


class Share(NamedTuple):
    """The share of an average that stays in the update after so many others."""

    momentum: Momentum
    iterations: Any

    def __call__(self, dtype: Any) -> Any:
        """Return it, in a dtype."""
        return self.momentum.at(self.iterations, dtype)
