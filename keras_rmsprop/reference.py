"""RMSprop as the documents give it, in NumPy float64.

The oracle of the tests and the first half of `examples/linear_regression.py`. It
shares no code with the optimizer, and the optimizer never imports it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def step(
    theta: ArrayLike,
    gradient: ArrayLike,
    state: dict[str, Any],
    *,
    alpha: float = 0.001,
    beta: float = 0.9,
    epsilon: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    nesterov: bool = False,
) -> Array:
    """Return theta after one RMSprop step; `state` starts as `{}` and is updated.

        v     <- beta v + (1 - beta) g^2
        theta <- theta - alpha g / sqrt(v + epsilon)

    Args:
        theta: The parameters, any shape.
        gradient: Gradient of the loss at theta, of theta's shape.
        state: The moving averages between steps, by name.
        alpha: Learning rate.
        beta: Decay rate of the averages.
        epsilon: Keeps the root away from zero.
        momentum: Decay rate of the sum of past updates.
        centered: Divide by the root of the variance, v - (average gradient)^2.
        nesterov: Take the step that the sum of updates would take next.

    Example:
        >>> state = {}
        >>> theta = step([1.0, 2.0], [0.5, -0.5], state, alpha=0.1, beta=0.75)
        >>> theta.round(4)
        array([0.8, 2.2])
        >>> state["v"]
        array([0.0625, 0.0625])
    """
    w, g = np.asarray(theta, np.float64), np.asarray(gradient, np.float64)
    state["v"] = beta * state.get("v", 0.0) + (1 - beta) * g**2
    state["mean"] = beta * state.get("mean", 0.0) + (1 - beta) * g
    spread = state["v"] - state["mean"] ** 2 if centered else state["v"]
    update = alpha * g / np.sqrt(spread + epsilon)
    state["m"] = momentum * state.get("m", 0.0) + update
    return np.asarray(w - (momentum * state["m"] + update if nesterov else state["m"]))


def minimize(
    gradient: Callable[[Array], Array],
    theta: ArrayLike,
    iterations: int,
    **hyperparameters: Any,
) -> Array:
    """Return theta after that many steps, each along `gradient(theta)`.

    Args:
        gradient: Function from theta to the gradient of the loss there.
        theta: Where to start.
        iterations: Number of steps.
        **hyperparameters: Passed on to `step`.

    Example:
        >>> minimize(lambda theta: 2 * theta, [3.0], 500, alpha=0.01).round(1) + 0.0
        array([0.])
    """
    state: dict[str, Any] = {}
    w = np.asarray(theta, np.float64)
    for _ in range(iterations):
        w = step(w, gradient(w), state, **hyperparameters)
    return w
