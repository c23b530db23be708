"""RMSprop as other frameworks have it.

Each function takes the arguments of its framework, with their names and defaults, and
returns the `RMSprop` that does the same arithmetic. `docs/dialects.md` compares them.
The model's parameters are not an argument: a Keras optimizer gets them from the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from keras.optimizers import schedules

from keras_rmsprop import checks
from keras_rmsprop.optimizer import RMSprop


def textbook(
    learning_rate: Any = 0.001, rho: float = 0.9, epsilon: float = 1e-8
) -> RMSprop:
    """Return an `RMSprop` with the three arguments that most textbooks have.

    Args:
        learning_rate: See `RMSprop`.
        rho: See `RMSprop`.
        epsilon: See `RMSprop`; smaller here.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument that must be a number is not one.

    Example:
        >>> textbook(rho=0.95).epsilon
        1e-08
    """
    return RMSprop(learning_rate=learning_rate, rho=rho, epsilon=epsilon)


def keras(*args: Any, **kwargs: Any) -> RMSprop:
    """Return the `RMSprop` that does what `keras.optimizers.RMSprop` does.

    Args:
        *args: The arguments of `keras.optimizers.RMSprop`. `RMSprop` has all of them.
        **kwargs: See `args`.

    Raises:
        ValueError: An argument is out of its range, or unknown.
        TypeError: An argument is not of its type.

    Example:
        >>> keras(0.01, momentum=0.9).epsilon
        1e-07
    """
    return RMSprop(*args, **kwargs)


def tensorflow_v1(
    learning_rate: Any,
    decay: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-10,
    use_locking: bool = False,
    centered: bool = False,
    name: str = "RMSProp",
) -> RMSprop:
    r"""Return an `RMSprop` like `tf.compat.v1.train.RMSPropOptimizer`.

    $v$ starts at 1 and epsilon stands inside the root. Dense gradients give the same
    results. (For sparse ones the original updates rows as `sparse_update="lazy"` does,
    but without the decay of rows without a gradient.)

    Args:
        learning_rate: $\eta$.
        decay: $\rho$.
        momentum: $\mu$.
        epsilon: $\epsilon$.
        use_locking: Must be False: there are no locks here.
        centered: Whether to divide by the root of the variance.
        name: Name of the optimizer.

    Raises:
        ValueError: An argument is out of its range, or `use_locking` is set.
        TypeError: An argument is not of its type.

    Example:
        >>> tensorflow_v1(0.256, momentum=0.9, epsilon=0.001).initial_accumulator_value
        1.0
    """
    if use_locking:
        given = {"use_locking": use_locking}
        _refuse("tf.compat.v1.train.RMSPropOptimizer", ["use_locking"], given)
    return RMSprop(
        learning_rate,
        rho=decay,
        momentum=momentum,
        epsilon=epsilon,
        centered=centered,
        name=name,
        initial_accumulator_value=1.0,
    )


def tf_keras_legacy(
    learning_rate: Any = 0.001,
    rho: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-7,
    centered: bool = False,
    name: str = "RMSprop",
    *,
    decay: float = 0.0,
    **kwargs: Any,
) -> RMSprop:
    r"""Return an `RMSprop` like that of `tf.keras` until TensorFlow 2.10.

    Today that is `tf_keras.optimizers.legacy.RMSprop`. Its epsilon stands outside the
    root without momentum, and inside with it.

    Args:
        learning_rate: $\eta$.
        rho: $\rho$.
        momentum: $\mu$.
        epsilon: $\epsilon$.
        centered: Whether to divide by the root of the variance.
        name: Name of the optimizer.
        decay: $\delta$ >= 0: in the step after $t$ others the learning rate is
            $\eta / (1 + \delta t)$.
        **kwargs: `clipnorm`, `clipvalue` and `global_clipnorm`, see `RMSprop`.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not of its type, or not one of that framework.

    Example:
        >>> [tf_keras_legacy(momentum=m).epsilon_inside_sqrt for m in (0.0, 0.9)]
        [False, True]
    """
    clips = ("clipnorm", "clipvalue", "global_clipnorm")
    others = {name: value for name, value in kwargs.items() if name not in clips}
    _refuse("tf_keras.optimizers.legacy.RMSprop", [], others)
    learning_rate = checks.learning_rate(learning_rate)
    decay = checks.number("decay", decay, checks.NOT_NEGATIVE)
    if decay:
        learning_rate = schedules.InverseTimeDecay(learning_rate, 1, decay)
    return RMSprop(
        learning_rate,
        rho=rho,
        momentum=momentum,
        epsilon=epsilon,
        centered=centered,
        name=name,
        epsilon_inside_sqrt=bool(momentum),
        **kwargs,
    )


def torch(
    lr: Any = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0,
    momentum: float = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    **kwargs: Any,
) -> RMSprop:
    r"""Return an `RMSprop` like `torch.optim.RMSprop`.

    Epsilon stands outside the root, the learning rate outside the momentum buffer, and
    weight decay is the L2 penalty.

    Args:
        lr: $\eta$.
        alpha: $\rho$.
        eps: $\epsilon$.
        weight_decay: $\lambda$.
        momentum: $\mu$.
        centered: Whether to divide by the root of the variance.
        maximize: Whether to go up the gradient.
        **kwargs: `foreach`, `capturable` and `differentiable` say how PyTorch
            computes. They have no counterpart here and are refused.

    Raises:
        ValueError: An argument is out of its range, or has no counterpart.
        TypeError: An argument is not of its type, or not one of that framework.

    Example:
        >>> torch(7e-4, eps=1e-5).epsilon_inside_sqrt
        False
        >>> torch(foreach=True)
        Traceback (most recent call last):
        ValueError: `foreach` of torch.optim.RMSprop has no counterpart here. ...
    """
    known = ("foreach", "capturable", "differentiable")
    _refuse("torch.optim.RMSprop", known, kwargs)
    return RMSprop(
        lr,
        rho=alpha,
        momentum=momentum,
        epsilon=eps,
        centered=centered,
        weight_decay=weight_decay or None,
        epsilon_inside_sqrt=False,
        lr_in_momentum=False,
        decoupled_weight_decay=False,
        maximize=maximize,
    )


def optax(
    learning_rate: Any,
    decay: float = 0.9,
    eps: float = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> RMSprop:
    r"""Return an `RMSprop` like `optax.rmsprop`.

    Args:
        learning_rate: $\eta$, a number or one of Keras' schedules.
        decay: $\rho$.
        eps: $\epsilon$.
        initial_scale: $v_0$.
        eps_in_sqrt: Whether epsilon stands inside the root.
        centered: Whether to divide by the root of the variance.
        momentum: $\mu$, or None.
        nesterov: Whether momentum looks one step ahead.
        bias_correction: Whether the averages are divided by $1 - \rho^t$.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not of its type.

    Example:
        >>> optax(0.01, decay=0.99, bias_correction=True).rho
        0.99
    """
    return RMSprop(
        learning_rate,
        rho=decay,
        momentum=momentum or 0.0,
        epsilon=eps,
        centered=centered,
        epsilon_inside_sqrt=eps_in_sqrt,
        initial_accumulator_value=initial_scale,
        bias_correction=bias_correction,
        nesterov=nesterov,
    )


def timm(
    lr: Any = 1e-2,
    alpha: float = 0.9,
    eps: float = 1e-10,
    weight_decay: float = 0,
    momentum: float = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    *,
    lr_in_momentum: bool = True,
    caution: bool = False,
    **kwargs: Any,
) -> RMSprop:
    r"""Return an `RMSprop` like `timm.optim.RMSpropTF`.

    It follows TensorFlow 1: $v$ starts at 1 and epsilon stands inside the root.

    Args:
        lr: $\eta$.
        alpha: $\rho$.
        eps: $\epsilon$.
        weight_decay: $\omega$ or $\lambda$.
        momentum: $\mu$.
        centered: Whether to divide by the root of the variance.
        decoupled_decay: Whether weight decay is decoupled; else it is the L2 penalty.
        lr_in_momentum: Whether the learning rate enters the momentum buffer.
        caution: Whether elements of updates against the gradient are skipped.
        **kwargs: `corrected_weight_decay` and `foreach` have no counterpart here and
            are refused.

    Raises:
        ValueError: An argument is out of its range, or has no counterpart.
        TypeError: An argument is not of its type, or not one of that framework.

    Example:
        >>> timm(0.1, momentum=0.9, weight_decay=1e-5).decoupled_weight_decay
        False
    """
    _refuse("timm.optim.RMSpropTF", ("corrected_weight_decay", "foreach"), kwargs)
    return RMSprop(
        lr,
        rho=alpha,
        momentum=momentum,
        epsilon=eps,
        centered=centered,
        weight_decay=weight_decay or None,
        initial_accumulator_value=1.0,
        lr_in_momentum=lr_in_momentum,
        decoupled_weight_decay=decoupled_decay,
        cautious=caution,
    )


def stable_baselines3(
    lr: Any = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0,
    momentum: float = 0,
    centered: bool = False,
) -> RMSprop:
    r"""Return an `RMSprop` like `RMSpropTFLike` of Stable-Baselines3.

    It is PyTorch's RMSprop, but $v$ starts at 1 and epsilon stands inside the root, so
    that A2C trains as it did with TensorFlow. By default A2C takes PyTorch's own.

    Args:
        lr: $\eta$.
        alpha: $\rho$.
        eps: $\epsilon$.
        weight_decay: $\lambda$.
        momentum: $\mu$.
        centered: Whether to divide by the root of the variance.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not of its type.

    Example:
        >>> stable_baselines3(7e-4, eps=1e-5).initial_accumulator_value
        1.0
    """
    return RMSprop(
        lr,
        rho=alpha,
        momentum=momentum,
        epsilon=eps,
        centered=centered,
        weight_decay=weight_decay or None,
        initial_accumulator_value=1.0,
        lr_in_momentum=False,
        decoupled_weight_decay=False,
    )


def deepmind_dqn(
    learning_rate: Any = 0.00025,
    gradient_momentum: float = 0.95,
    squared_gradient_momentum: float = 0.95,
    min_squared_gradient: float = 0.01,
) -> RMSprop:
    r"""Return the optimizer of DeepMind's DQN, named as in the table of their paper.

    It is centered. What the table calls momentum is the decay rate of an average.

    Args:
        learning_rate: $\eta$.
        gradient_momentum: $\rho$ of the average gradient; both must be the same.
        squared_gradient_momentum: $\rho$ of the average squared gradient.
        min_squared_gradient: $\epsilon$, inside the root.

    Raises:
        ValueError: An argument is out of its range, or the decay rates differ.
        TypeError: An argument is not of its type.

    Example:
        >>> deepmind_dqn().centered
        True

    Reference:
        - [Mnih et al., 2015](https://doi.org/10.1038/nature14236), extended data
          table 1.
    """
    if gradient_momentum != squared_gradient_momentum:
        raise ValueError(
            "`gradient_momentum` and `squared_gradient_momentum` must be the same. "
            f"Received: gradient_momentum={gradient_momentum}, "
            f"squared_gradient_momentum={squared_gradient_momentum}"
        )
    return RMSprop(
        learning_rate,
        rho=squared_gradient_momentum,
        epsilon=min_squared_gradient,
        centered=True,
    )


def _refuse(framework: str, known: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise an error if there are arguments without a counterpart."""
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{framework} has no argument `{name}`")
        raise ValueError(
            f"`{name}` of {framework} has no counterpart here. "
            f"Received: {name}={value!r}"
        )
