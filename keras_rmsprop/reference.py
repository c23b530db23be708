"""RMSprop as most textbooks give it, with every option, in NumPy float64.

The tests compare the optimizer with it. It is also the first half of
`examples/linear_regression.py`. It shares no code with the optimizer, and the
optimizer never imports it.
"""

from collections.abc import Callable, Sequence
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
    epsilon_inside_sqrt: bool = True,
    initial_accumulator_value: float = 0.0,
    bias_correction: bool = False,
    lr_in_momentum: bool = True,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    cautious: bool = False,
) -> Array:
    """Return theta after one RMSprop step; `state` starts as `{}` and is updated.

    By default, as most textbooks have it (the arguments add the other variants):

        v     <- beta v + (1 - beta) g^2
        theta <- theta - alpha g / sqrt(v + epsilon)

    Args:
        theta: The parameters, any shape.
        gradient: Gradient of the loss at theta, of theta's shape.
        state: The moving averages between steps, by name.
        alpha: Learning rate.
        beta: Decay rate of the averages.
        epsilon: Keeps the root away from zero.
        momentum: Decay rate of the momentum buffer.
        centered: Divide by the root of the variance, v - (average gradient)^2.
        nesterov: Take the step that the momentum buffer would make next.
        epsilon_inside_sqrt: Add epsilon inside the root; else add it to the root.
        initial_accumulator_value: Where v starts.
        bias_correction: Divide both averages by 1 - beta^t.
        lr_in_momentum: Multiply each update by alpha before it is summed; else the sum.
        weight_decay: How much theta shrinks, as a share of alpha.
        decoupled_weight_decay: Shrink theta directly; else add weight_decay times theta
            to the gradient.
        maximize: Go up the gradient.
        cautious: With momentum, skip elements of the update that go up, and enlarge the
            others to make up for them.

    Example:
        >>> state = {}
        >>> theta = step([1.0, 2.0], [0.5, -0.5], state, alpha=0.1, beta=0.75)
        >>> theta.round(4)
        array([0.8, 2.2])
        >>> state["v"]
        array([0.0625, 0.0625])
    """
    w, g = np.asarray(theta, np.float64), np.asarray(gradient, np.float64)
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = w - alpha * weight_decay * w
    else:
        g = g + weight_decay * w
    state["t"] = state.get("t", 0) + 1
    state["v"] = beta * state.get("v", initial_accumulator_value) + (1 - beta) * g**2
    state["mean"] = beta * state.get("mean", 0.0) + (1 - beta) * g
    share = 1 - beta ** state["t"] if bias_correction else 1.0
    spread = state["v"] / share - ((state["mean"] / share) ** 2 if centered else 0.0)
    root = (
        np.sqrt(spread + epsilon) if epsilon_inside_sqrt else np.sqrt(spread) + epsilon
    )
    update = (alpha if lr_in_momentum else 1.0) * g / root
    state["m"] = momentum * state.get("m", 0.0) + update
    update = momentum * state["m"] + update if nesterov else state["m"]
    if cautious and momentum and update.size:
        down = update * g > 0
        update = update * down / max(down.mean(), 0.001)
    return np.asarray(w - (1.0 if lr_in_momentum else alpha) * update)


def automatic_step(
    thetas: Sequence[ArrayLike],
    gradients: Sequence[ArrayLike],
    state: dict[str, Any],
    *,
    initial: float = 1e-5,
    coefficient: float = 1.0,
    growth: float = np.inf,
    sample_every: int = 4,
    factor: float = 1.0,
    tables: Sequence[int] = (),
    **hyperparameters: Any,
) -> list[Array]:
    """Return several parameters after a step whose learning rate is estimated.

    As Prodigy has it, with b^2 = 0.999 and d the distance, before the step:

        r <- b r + factor d^2 / initial * sum of g (theta_0 - theta)
        s <- b s + factor d^2 / initial * g
        d <- max(initial, d sqrt((t + 99) / (t + 100)), coefficient r / sum of |s|)
        q <- 0.9 q - 0.1 sum of g m / sum of |g m|, with the momentum buffers m
        k <- k (1 - 0.005 max(0, 4 q - 3) + 0.02 max(0, -q)), in [initial / d, 1]

    Steps have the learning rate factor k d, times 1 - momentum. A table steps without
    momentum, with the largest d so far, times k. Its epsilon is larger by ten times the
    geometric mean of g^2, over all g but 0, if there is a 0.

    Args:
        thetas: The parameters.
        gradients: The gradient of the loss at each.
        state: What is kept between steps; starts as `{}` and is updated.
        initial: The first distance.
        coefficient: What the distance is multiplied by.
        growth: The largest factor by which the distance may grow in a step.
        sample_every: Of a large parameter, one line of memory in so many is looked at,
            and stands for the others; see `keras_rmsprop.sampling`.
        factor: What multiplies the distance to the learning rate.
        tables: Which of the parameters are tables.
        **hyperparameters: Arguments of `step`.

    Example:
        >>> state = {}
        >>> theta = [np.array([1.0])]
        >>> for _ in range(100):
        ...     theta = automatic_step(theta, [2 * theta[0]], state)
        >>> bool(0.1 < state["d"] < 1)
        True
    """

    def seen(x: ArrayLike) -> Array:
        x = np.asarray(x, np.float64)
        if x.size < 4096 or sample_every == 1:
            return x
        axes: list[int] = []
        for axis, lines in enumerate(x.shape):
            around = np.prod(x.shape[:axis]), np.prod(x.shape[axis + 1 :])
            is_even = lines % sample_every == 0 or 1 in around
            if lines >= sample_every and is_even:
                axes = [axis] if around[1] >= 16 or not axes else axes
        axis = axes[0] if axes else x.ndim - 1
        return x[(slice(None),) * axis + (slice(None, None, sample_every),)]

    xs, gs = list(map(seen, thetas)), list(map(seen, gradients))
    n = [np.size(theta) / max(x.size, 1) for theta, x in zip(thetas, xs, strict=True)]
    if not state:
        state |= {
            "d": initial,
            "most": initial,
            "r": 0.0,
            "q": 0.0,
            "k": 1.0,
            "t": 0,
            "x0": xs,
            "each": [{} for _ in xs],
        }
        state["s"] = [np.zeros_like(x) for x in xs]
    sign = -1 if hyperparameters.get("maximize") else 1
    weight, b = factor * state["d"] ** 2 / initial, 0.999**0.5
    gain = sum(
        k * (g * (x0 - x)).sum()
        for k, g, x0, x in zip(n, gs, state["x0"], xs, strict=True)
    )
    moves = (
        []
        if not hyperparameters.get("momentum")
        else [
            k * seen(g) * seen(each["m"])
            for i, (k, g, each) in enumerate(
                zip(n, gradients, state["each"], strict=True)
            )
            if i not in tables and "m" in each
        ]
    )
    ahead, both = (sum(f(x).sum() for x in moves) for f in (np.asarray, np.abs))
    state["q"] = 0.9 * state["q"] - 0.1 * sign * ahead / (both + 1e-30)
    state["r"] = b * state["r"] + sign * weight * gain
    state["s"] = [b * s + weight * g for s, g in zip(state["s"], gs, strict=True)]
    state["t"] += 1
    sums = sum(k * np.abs(s).sum() for k, s in zip(n, state["s"], strict=True))
    found = state["r"] / (sums + 1e-30)
    fading = state["d"] * np.sqrt((state["t"] + 99) / (state["t"] + 100))
    distance = max(initial, fading, coefficient * found)
    state["d"] = min(distance, growth * state["d"], 1e4)
    state["most"] = max(state["most"], state["d"])
    q = state["q"]
    brake = state["k"] * (1 - 0.005 * max(0.0, 4 * q - 3) + 0.02 * max(0.0, -q))
    state["k"] = min(max(brake, initial / state["d"]), 1.0)
    alpha, lead = factor * state["k"] * state["d"], state["most"] / state["d"]
    rest = 1 - hyperparameters.get("momentum", 0.0)
    dense = hyperparameters | {"alpha": rest * alpha}

    def like_a_table(gradient: ArrayLike) -> dict[str, Any]:
        size = np.abs(np.asarray(gradient, np.float64))
        is_rare = size.any() and not size.all()
        typical = np.exp(2 * np.log(size[size > 0]).mean()) if is_rare else 0.0
        epsilon = hyperparameters.get("epsilon", 0.0) + 10 * typical
        given = {"alpha": lead * alpha, "momentum": 0.0, "epsilon": epsilon}
        if hyperparameters.get("decoupled_weight_decay", True):  # as of the others
            given["weight_decay"] = (
                rest / lead * hyperparameters.get("weight_decay", 0.0)
            )
        return hyperparameters | given

    return [
        step(theta, g, each, **(like_a_table(g) if i in tables else dense))
        for i, (theta, g, each) in enumerate(
            zip(thetas, gradients, state["each"], strict=True)
        )
    ]


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
