"""The RMSprop formula, once.

Every way a step can go - eager, graph, XLA, any Keras backend - calls `step`.
It is pure and elementwise: tensors in, new tensors out. Nothing here knows
variables, devices or frameworks beyond `keras.ops`.
"""

from typing import Any, NamedTuple

from keras import ops

Tensor = Any
"""A tensor of whichever backend Keras runs on."""


class Slots(NamedTuple):
    """What RMSprop remembers of one variable; each has that variable's shape.

    The dtype is the variable's, but never less than float32.
    """

    velocity: Tensor
    """v, the moving average of the squared gradient."""
    momentum: Tensor | None = None
    """m, the moving sum of the updates; None without momentum."""
    average_gradient: Tensor | None = None
    """a, the moving average of the gradient; None unless centered."""


def step(
    g: Tensor,
    slots: Slots,
    lr: Tensor,
    *,
    rho: float,
    momentum: float,
    epsilon: float,
    nesterov: bool,
) -> tuple[Tensor, Slots]:
    """Return what to take from the weights w for gradient g, and the new slots.

    v <- rho * v + (1 - rho) * g^2
    a <- rho * a + (1 - rho) * g                        (centered)
    u  = lr * g / sqrt(v [- a^2] + epsilon)
    m <- momentum * m + u                               (with momentum)
    w <- w - u, with momentum w - m, with Nesterov's w - (momentum * m + u):
                                                        done by the caller

    Args:
        g: Gradient, of the slots' shape and dtype.
        slots: The slots before the step.
        lr: Learning rate, a scalar of the slots' dtype.
        rho: Decay rate of v and a.
        momentum: Decay rate of m.
        epsilon: Keeps the root away from zero.
        nesterov: Whether momentum looks one step ahead.
    """
    v, m, a = slots
    v = rho * v + (1 - rho) * ops.square(g)
    variance = v
    if a is not None:
        a = rho * a + (1 - rho) * g
        # Mathematically >= 0; rounding takes it below, and the root to NaN.
        variance = ops.maximum(v - ops.square(a), 0)
    u = lr * g / ops.sqrt(variance + epsilon)
    if m is not None:
        m = momentum * m + u
        u = momentum * m + u if nesterov else m
    return u, Slots(v, m, a)
