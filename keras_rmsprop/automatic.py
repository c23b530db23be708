"""A learning rate that is found while training: its options, and what goes wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_rmsprop import checks
from keras_rmsprop.estimate import Estimate, Part, find
from keras_rmsprop.sampling import Sample
from keras_rmsprop.slots import FIRST_WEIGHT, GRADIENT_SUM, RATE_ESTIMATE
from keras_rmsprop.state import as_array

STUCK_STEPS, RUNAWAY_DISTANCE = 100, 10.0
"""The rate must have grown after so many steps; a larger distance is too large."""
LARGE_INITIAL = 1e-3
"""A larger initial rate may exceed the right one, which is then not found."""
INITIAL = checks.Range(lambda x: 1e-12 <= x <= 1, "in [1e-12, 1]")
COEFFICIENT = checks.Range(lambda x: 0 < x <= 1000, "in (0, 1000]")
LONGEST_STEP = 100.0
"""No step moves a weight farther than so many learning rates."""


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class AutoLearningRate:
    r"""How to find a learning rate while training.

    `RMSprop(learning_rate="auto")` is short for
    `RMSprop(learning_rate=AutoLearningRate())`. Few need more.

    Args:
        initial: $d_0$ in [1e-12, 1], the rate of the first step, in units of the
            weights. It should be smaller than any rate that could be right. Defaults
            to `1e-5`.
        coefficient: $c$ in (0, 1000]; the distance found is multiplied by it.
            Defaults to `1`.
        growth: The factor > 1 by which the rate may grow in a step: 1.02 is a slow
            warm-up. Defaults to infinity.
        sample_every: In each variable with 4096 elements or more, the estimate looks at one
            element in so many. It needs memory and time for these alone: two numbers
            each. Defaults to `4`.
        factor: The rate found is multiplied by it: a number or anything else that may
            be a learning rate, such as a
            `keras.optimizers.schedules.LearningRateSchedule`. It becomes
            `optimizer.learning_rate`. Defaults to `1`.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is not of its type.

    Example:
        >>> import keras
        >>> from keras_rmsprop import AutoLearningRate, RMSprop
        >>> decay = keras.optimizers.schedules.CosineDecay(1.0, 200)
        >>> optimizer = RMSprop(AutoLearningRate(growth=1.1, factor=decay))
        >>> weight = keras.Variable(1.0)
        >>> for _ in range(200):
        ...     optimizer.apply([weight.numpy()], [weight])  # of weight^2 / 2
        >>> bool(abs(weight.numpy()) < 1e-6)
        True

    Reference:
        - [Mishchenko and Defazio, 2023](https://arxiv.org/abs/2306.06101), Prodigy.
          There $d$ never shrinks, and $v$ and $\epsilon$ are scaled by it.
    """

    def __init__(
        self,
        initial: float = 1e-5,
        coefficient: float = 1.0,
        growth: float = math.inf,
        sample_every: int = 4,
        factor: Any = 1.0,
    ) -> None:
        self.initial = checks.number("initial", initial, INITIAL)
        self.coefficient = checks.number("coefficient", coefficient, COEFFICIENT)
        self.growth = checks.number("growth", growth, checks.ABOVE_ONE)
        self.sample_every = checks.integer("sample_every", sample_every, 1)
        self.factor = checks.learning_rate(factor)

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
        }

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
        same = "initial", "coefficient", "growth", "sample_every"
        return all(getattr(self, name) == getattr(other, name) for name in same)


def asked_for(learning_rate: Any) -> AutoLearningRate | None:
    """Return how to find a learning rate; None if it is given."""
    if isinstance(learning_rate, str) and learning_rate == "auto":
        return AutoLearningRate()
    return learning_rate if isinstance(learning_rate, AutoLearningRate) else None


class Search:
    """The search for a learning rate: how it goes, and the variables that it needs.

    Args:
        options: How to look.

    Attributes:
        options: The same.
        firsts: For each of the model's variables, what keeps its first weights.
        sums: For each, what keeps s.
        estimate: Keeps the `Estimate`.
    """

    def __init__(self, options: AutoLearningRate) -> None:
        self.options = options
        self.firsts: list[Any] = []
        self.sums: list[Any] = []
        self.estimate: Any = None

    def build(
        self, add_slots: Callable[[str], list[Any]], add: Callable[..., Any]
    ) -> None:
        """Make the variables.

        Args:
            add_slots: Makes a slot of a kind for each of the model's variables.
            add: Keras' `add_variable`.
        """
        self.firsts, self.sums = add_slots(FIRST_WEIGHT), add_slots(GRADIENT_SUM)
        begin = keras.initializers.Constant([self.options.initial, 0.0, 0.0, 0.0])
        self.estimate = add((4,), begin, "float32", name=RATE_ESTIMATE)

    def distance(
        self,
        variables: Sequence[Any],
        gradients: Sequence[tuple[int, Any]],
        rows: Callable[[int], Any],
        factor: Any,
        *,
        sign: int,
        fold: bool,
        scale: Any = None,
        kernel: Any = None,
    ) -> Any:
        """Update the estimate of how far the weights must travel; see `find`.

        Args:
            variables: The model's variables.
            gradients: The indices of those that have one in this step, and these.
            rows: Returns the rows of a table that the step takes, by its index.
            factor: See `find`.
            sign: See `find`.
            fold: See `find`.
            scale: See `find`.
            kernel: See `find`.
        """
        given: dict[int, Any] = {}
        for i, gradient in gradients:
            given[i] = gradient + given[i] if i in given else gradient
        quads = zip(
            range(len(variables)), variables, self.firsts, self.sums, strict=True
        )
        options = self.options
        parts = [
            Part(v, given.get(i), first, sums, options.sample(v.shape), rows(i))
            for i, v, first, sums in quads
            if first is not None
        ]
        kept = self.estimate
        return find(
            parts,
            kept,
            factor,
            options,
            sign=sign,
            fold=fold,
            scale=scale,
            kernel=kernel,
        )

    def known(self) -> Estimate:
        """Return the estimate, as numbers."""
        if self.estimate is None:
            return Estimate(self.options.initial, 0.0, 0.0, 0.0)
        return Estimate(*as_array(self.estimate).tolist())

    def complaint(self, variables: Sequence[Any] = ()) -> str:
        """Return what a user should know about the estimate; see `complaint`.

        Args:
            variables: The model's variables, to see how far they have come; or none.
        """
        way = None
        if variables:
            pairs = zip(variables, self.firsts, strict=True)
            free = [(v, x) for v, x in pairs if x is not None and v.constraint is None]
            way = farthest(free, self.options)
        return complaint(self.known(), self.options, way)


def farthest(pairs: Sequence[tuple[Any, Any]], options: AutoLearningRate) -> float:
    """Return how far the farthest weight is from where it began.

    Args:
        pairs: Variables, and what keeps their first weights.
        options: How these are looked at.
    """
    ways = [
        ops.stop_gradient(options.sample(x.shape).of(ops.convert_to_tensor(x)) - first)
        for x, first in pairs
        if math.prod(first.shape)
    ]
    return max((float(ops.max(ops.absolute(way))) for way in ways), default=0.0)


def complaint(
    estimate: Estimate, options: AutoLearningRate, farthest: float | None = None
) -> str:
    """Return what a user should know about an estimate, with the remedy; or nothing.

    Args:
        estimate: The estimate, as numbers.
        options: How it was looked for.
        farthest: How far the farthest weight is from where it began, if known.
    """
    distance, _, steps, path = estimate
    if steps >= STUCK_STEPS and distance <= options.initial:
        is_large = options.initial > LARGE_INITIAL
        why = "it may be too large" if is_large else "the gradients do not agree"
        other = 1e-5 if is_large else 100 * options.initial
        return (
            f"The learning rate is still at its initial value of {options.initial:g} "
            f"after {steps:.0f} steps: {why}. If the loss does not fall, use "
            f"`AutoLearningRate(initial={other:g})`"
        )
    if not distance <= RUNAWAY_DISTANCE:  # NaN, too
        return (
            f"The learning rate found, {distance:.3g}, is larger than weights should "
            "move in a step. If the loss does not fall, use "
            "`AutoLearningRate(coefficient=0.5, growth=1.02)`, or clip gradients"
        )
    if farthest is not None and farthest > LONGEST_STEP * path:
        return (
            f"A weight is {farthest:.3g} from where it began, farther than steps have "
            "taken it. If weights were replaced while training, make a new optimizer, "
            "which begins from them"
        )
    return ""
