"""The RMSprop formula, once, with all its dialects.

Every way a step can go - eager, graph, XLA, any Keras backend - calls `step`.
It is pure and elementwise: tensors in, new tensors out. Nothing here knows
variables, devices or frameworks beyond `keras.ops`.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

Tensor = Any
"""A tensor of whichever backend Keras runs on."""


class Slots(NamedTuple):
    """What RMSprop remembers of one variable: numbers, or where they are kept.

    In a step each has the variable's shape. `codecs.py` says how they are kept.
    """

    velocity: Tensor
    """v, the moving average of the squared gradient."""
    momentum: Tensor | None = None
    """m, the moving sum of the updates; None without momentum."""
    average_gradient: Tensor | None = None
    """a, the moving average of the gradient; None unless centered."""

    def map(self, function: Callable[[Any], Any]) -> "Slots":
        """Return the slots with a function applied to each one that exists."""
        return Slots(*(slot if slot is None else function(slot) for slot in self))

    def map_numbered(self, function: Callable[[Any, int], Any]) -> "Slots":
        """Return the same for a function that is told which slot it is, too."""
        numbered = enumerate(self)
        return Slots(*(x if x is None else function(x, i) for i, x in numbered))

    def with_momentum_times(self, factor: Any) -> "Slots":
        """Return the slots with m, if there is one, times a factor."""
        m = self.momentum
        return self if m is None else self._replace(momentum=m * factor)


class Options(NamedTuple):
    """The constants of the formula, named as the arguments of `RMSprop` are.

    A number may also be a scalar tensor of the slots' dtype.
    """

    rho: float = 0.9
    momentum: float = 0.0
    epsilon: float = 1e-7
    epsilon_inside_sqrt: bool = True
    bias_correction: bool = False
    nesterov: bool = False
    lr_in_momentum: bool = True
    maximize: bool = False
    cautious: bool = False

    def cast(self, dtype: str) -> "Options":
        """Return the constants, with tensors among them cast to a dtype."""
        return Options(*(cast(x, dtype) for x in self))


def wide(*dtypes: Any) -> str:
    """Return the dtype to compute in for floating dtypes: float32, or float64.

    `keras.backend.result_type` knows float64 on TensorFlow only.
    """
    given = map(keras.backend.standardize_dtype, dtypes)
    return "float64" if "float64" in given else "float32"


def cast(x: Any, dtype: str) -> Any:
    """Return a number as it is, and a tensor cast to a dtype."""
    return x if _is_number(x) else ops.cast(x, dtype)


# Keras' own of these compute float64 in float32 on other backends than TensorFlow.


def at_most(x: Tensor, most: Any) -> Tensor:
    """Return the smaller one of each element and a bound."""
    narrow = _would_be_narrowed(x)
    return within(x, -math.inf, most) if narrow else ops.minimum(x, most)


def at_least(x: Tensor, least: Any) -> Tensor:
    """Return the larger one of each element and a bound."""
    narrow = _would_be_narrowed(x)
    return within(x, least, math.inf) if narrow else ops.maximum(x, least)


def within(x: Tensor, least: Any, most: Any) -> Tensor:
    """Return elements that are moved to the nearer bound if they lie outside."""
    if not _would_be_narrowed(x):
        return ops.clip(x, least, most)
    return ops.clip(x, *(np.asarray(b) if _is_number(b) else b for b in (least, most)))


def _would_be_narrowed(x: Tensor) -> bool:
    return wide(x.dtype) == "float64" and keras.backend.backend() != "tensorflow"


def mean_of_all(x: Tensor, size: int | None = None) -> Tensor:
    """Return the mean of the elements; of so many, if others are there as zeros."""
    if size is None and not _would_be_narrowed(x):
        return ops.mean(x)
    return ops.sum(x) / max(math.prod(x.shape) if size is None else size, 1)


def accumulate(old: Tensor, share: Any, new: Tensor) -> Tensor:
    """Return a share of an old value, plus what is new."""
    return share * old + new


def step(
    g: Tensor,
    slots: Slots,
    lr: Tensor,
    options: Options,
    *,
    t: Tensor = None,
    penalty: Tensor = None,
    mean: Callable[[Tensor], Tensor] = mean_of_all,
    accumulate: Callable[[Tensor, Any, Tensor], Tensor] = accumulate,
) -> tuple[Tensor, Slots]:
    """Return what to take from the weights w for gradient g, and the new slots.

    With the default options, and with the slots and options that change it:

    v <- rho * v + (1 - rho) * g^2
    a <- rho * a + (1 - rho) * g                        (with a slot for a)
    u  = lr * g / sqrt(v [- a^2] + epsilon)
    m <- momentum * m + u                               (with a slot for m)
    w <- w - u, with momentum w - m, with Nesterov's w - (momentum * m + u):
                                                        done by the caller

    Args:
        g: Gradient, of the slots' shape and dtype.
        slots: The slots before the step.
        lr: Learning rate, a scalar of the slots' dtype.
        options: The constants.
        t: The number of this step, from 1; read for the bias correction alone.
        penalty: Gradient of a penalty on w, of g's shape: w times the L2 decay.
        mean: Function from a tensor of g's shape to the mean of its elements.
        accumulate: Does what `accumulate` does. It may write into the old value.
    """
    rho, mu, epsilon = options.rho, options.momentum, options.epsilon
    v, m, a = slots

    def corrected(average: Tensor) -> Tensor:
        if not options.bias_correction or is_zero(rho):
            return average
        return average / correction(rho, t)

    g = -g if options.maximize else g
    g = g if penalty is None else g + penalty
    # Bounded, as an infinite average would stay so. (And before they are added: after a
    # bound XLA would compute v twice, the second time from a copy.)
    most = float(np.finfo(keras.backend.standardize_dtype(g.dtype)).max) / 4
    v = accumulate(v, rho, (1 - rho) * at_most(ops.square(g), most))
    spread = corrected(v)
    if a is not None:
        a = accumulate(a, rho, (1 - rho) * within(g, -(most**0.5), most**0.5))
        # Mathematically >= 0; rounding takes it below, and the root to NaN.
        spread = at_least(spread - ops.square(corrected(a)), 0)
    if options.epsilon_inside_sqrt:
        root = ops.sqrt(spread + epsilon)
    else:
        root = ops.sqrt(spread) + epsilon
    u = (lr * g if options.lr_in_momentum else g) / root
    if m is not None:
        m = accumulate(m, mu, u)
        u = mu * m + u if options.nesterov else m
        if options.cautious:
            agrees = ops.cast(u * g > 0, u.dtype)
            u = u * agrees / at_least(mean(agrees), 1e-3)
    return u if options.lr_in_momentum else lr * u, Slots(v, m, a)


def correction(rho: Any, t: Tensor) -> Tensor:
    """Return 1 - rho^t, to the last digit; rho must not be 0."""
    return -ops.expm1(t * (math.log(rho) if _is_number(rho) else ops.log(rho)))


def is_zero(x: Any) -> bool:
    """Whether this is a number, not a tensor, and 0."""
    return _is_number(x) and x == 0


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real)
