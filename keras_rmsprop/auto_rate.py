"""How to find a learning rate while training: the options of the search."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_rmsprop import checks
from keras_rmsprop.backends import current as backend
from keras_rmsprop.sampling import Sample
from keras_rmsprop.slots import RATE_FACTOR

INITIAL = checks.Range(lambda x: 1e-12 <= x <= 1, "in [1e-12, 1]")
FIRST, FIRST_OF_SHORT = 1e-5, 1e-3
"""The rate of the first step by default, and if there are weights in 16 bits."""
COEFFICIENT = checks.Range(lambda x: 0 < x <= 1000, "in (0, 1000]")


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class AutoLearningRate:
    r"""How to find a learning rate while training.

    `RMSprop(learning_rate="auto")` is short for
    `RMSprop(learning_rate=AutoLearningRate())`. Few need more.

    Args:
        initial: $d_0$ in [1e-12, 1], the rate of the first step, in units of the
            weights. It should be smaller than any rate that could be right. Defaults
            to `1e-5`, and to `1e-3` if weights are in float16 or bfloat16: rounding
            loses smaller steps.
        coefficient: $c$ in (0, 1000]; the distance found is multiplied by it.
            Defaults to `1`.
        growth: The factor > 1 by which the rate may grow in a step: 1.02 is a slow
            warm-up. Defaults to infinity.
        sample_every: In each variable with 4096 elements or more, the estimate looks at
            one row, or line of memory, in so many; if it is not 1 and there are at most
            65,536 rows, at less than two million elements. It needs memory and time for
            these alone: two numbers each. Defaults to `4`.
        factor: The rate found is multiplied by it: a number or anything else that may
            be a learning rate, such as a
            `keras.optimizers.schedules.LearningRateSchedule`. It becomes
            `optimizer.learning_rate`. Defaults to `1`.
        restarts: Whether the search begins again when its past is about another
            problem: when layers are frozen or unfrozen, when `fit` follows a new
            `compile`, and when weights were replaced between two `fit`. Defaults to
            `True`.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not of its type.

    Example:
        >>> import keras
        >>> from keras_rmsprop import AutoLearningRate, RMSprop
        >>> decay = keras.optimizers.schedules.CosineDecay(1.0, 400)
        >>> optimizer = RMSprop(AutoLearningRate(growth=1.1, factor=decay))
        >>> weight = keras.Variable(1.0)
        >>> for _ in range(400):
        ...     optimizer.apply([weight.numpy()], [weight])  # of weight^2 / 2
        >>> bool(abs(weight.numpy()) < 1e-6)
        True

    Reference:
        - [Mishchenko and Defazio, 2023](https://arxiv.org/abs/2306.06101), Prodigy.
          There $d$ never shrinks, and $v$ and $\epsilon$ are scaled by it.
    """

    def __init__(
        self,
        initial: float | None = None,
        coefficient: float = 1.0,
        growth: float = math.inf,
        sample_every: int = 4,
        factor: Any = 1.0,
        restarts: bool = True,
    ) -> None:
        self.initial: Any = checks.optional("initial", initial, INITIAL)
        self.coefficient = checks.number("coefficient", coefficient, COEFFICIENT)
        self.growth = checks.number("growth", growth, checks.ABOVE_ONE)
        self.sample_every = checks.integer("sample_every", sample_every, 1)
        self.factor = checks.learning_rate(factor)
        self.restarts = checks.flag("restarts", restarts)

    def for_weights(self, variables: Sequence[Any]) -> "AutoLearningRate":
        """Return the same, with the `initial` that is the default for these weights."""
        found = copy.copy(self)
        if self.initial is None:
            are_short = any(
                keras.backend.standardize_dtype(v.dtype) in ("float16", "bfloat16")
                for v in variables
            )
            found.initial = FIRST_OF_SHORT if are_short else FIRST
        return found

    def sample(self, shape: Sequence[int]) -> Sample:
        """Return which elements of a variable with this shape are looked at."""
        return Sample(shape, self.sample_every)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments to make an equal one with."""
        return {
            "initial": self.initial,
            "coefficient": self.coefficient,
            # JSON knows no infinity.
            "growth": None if math.isinf(self.growth) else self.growth,
            "sample_every": self.sample_every,
            "factor": keras.saving.serialize_keras_object(self.factor),
            "restarts": self.restarts,
        }

    def __repr__(self) -> str:
        """Return the call that makes an equal one."""
        names = "initial", "coefficient", "growth", "sample_every", "restarts"
        arguments = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"AutoLearningRate({arguments})"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AutoLearningRate":
        """Return one made from what `get_config` returned."""
        given = {**config}
        if given.get("growth", 0) is None:
            given["growth"] = math.inf
        if "factor" in given:
            given["factor"] = keras.saving.deserialize_keras_object(given["factor"])
        return cls(**given)

    def looks_like(self, other: "AutoLearningRate") -> bool:
        """Whether another one is the same except for the factor."""
        same = "initial", "coefficient", "growth", "sample_every", "restarts"
        return all(getattr(self, name) == getattr(other, name) for name in same)


def asked_for(learning_rate: Any) -> AutoLearningRate | None:
    """Return how to find a learning rate; None if it is given."""
    if isinstance(learning_rate, str) and learning_rate == "auto":
        return AutoLearningRate()
    return learning_rate if isinstance(learning_rate, AutoLearningRate) else None


def check_same(auto: AutoLearningRate, mine: AutoLearningRate | None) -> None:
    """Fail if a way to find a learning rate is not the one of an optimizer.

    Raises:
        ValueError: It is another one.
    """
    if mine is None or not mine.looks_like(auto):
        raise ValueError(
            "How a learning rate is found must be said when the optimizer is made. "
            f"Received: learning_rate={auto!r}"
        )


def form_of_factor(factor: float) -> dict[str, Any]:
    """Return the arguments of `add_variable` for a factor on a learning rate.

    Rates do not have its dtype: `tf.train.Checkpoint` compares no names, but refuses to
    load one dtype into another.
    """
    rates = str(keras.config.floatx())
    other = "float32" if rates == "float64" else "float64"
    return {
        "initializer": keras.initializers.Constant(factor),
        "dtype": other if backend.has_rows else rates,
        "name": RATE_FACTOR,
    }
