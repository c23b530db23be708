"""A learning rate that is found while training: its options, and what goes wrong."""

import copy
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rmsprop import batch_norm, checks
from keras_rmsprop.backends import current as backend
from keras_rmsprop.complaints import complaint
from keras_rmsprop.estimate import Estimate, Sampled, farthest, find, numbers
from keras_rmsprop.fitting import Trained, fit_that_ends
from keras_rmsprop.options import has_value
from keras_rmsprop.sampling import Sample
from keras_rmsprop.slots import FIRST_WEIGHT, GRADIENT_SUM, RATE_ESTIMATE, RATE_FACTOR
from keras_rmsprop.state import as_array
from keras_rmsprop.tables import Tables
from keras_rmsprop.update import Sought

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
            one element in so many. It needs memory and time for these alone: two
            numbers each. Defaults to `4`.
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


class Search:
    """The search for a learning rate: how it goes, and the variables that it needs.

    Args:
        optimizer: The optimizer; `_auto` says how to look, None: not at all.

    Attributes:
        options: The same, once built with a number as `initial`.
        firsts: For each of the model's variables, what keeps its first weights.
        sums: For each, what keeps s.
        estimate: Keeps the `Estimate`.
        trained: What was trained when this was last asked; None: it never was.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.options: AutoLearningRate = optimizer._auto
        self.firsts: list[Any] = []
        self.sums: list[Any] = []
        self.estimate: Any = None
        self.trained: Trained | None = None

    def is_on(self) -> bool:
        """Whether the optimizer was made with it."""
        return self.options is not None

    def build(self, variables: Sequence[Any]) -> None:
        """Make the variables."""
        if not self.is_on():
            return
        optimizer = self._optimizer
        self.options = optimizer._auto.for_weights(variables)
        self.firsts = optimizer.add_optimizer_variables(variables, FIRST_WEIGHT)
        self.sums = optimizer.add_optimizer_variables(variables, GRADIENT_SUM)
        at_first = Estimate.at_first(self.options.initial)
        begin = keras.initializers.Constant([*at_first])
        self.estimate = optimizer.add_variable(
            (len(at_first),), begin, "float32", name=RATE_ESTIMATE
        )
        # A checkpoint that was restored before finds variables by their attributes.
        made = [*self.firsts, *self.sums, self.estimate]
        optimizer._search_variables = [v for v in made if v is not None]

    def why_all_rows(self, variable: Any) -> str:
        """Return nothing: rows suffice."""
        return ""

    # When it begins again.

    def restart(self) -> None:
        """Begin again: the next step takes the weights as they are for the first.

        `estimate.find` does that, as it sees that no step was taken. It forgets the
        sums, and the momentum buffers. The other slots stay.
        """
        self.trained = None  # whatever is trained from now on
        if self.options.restarts and self.known().steps:
            at_first = [*Estimate.at_first(self.options.initial, again=True)]
            backend.assign_everywhere(self.estimate, np.array(at_first, "float32"))

    def restart_if_changed(self, variables: Sequence[Any]) -> None:
        """Begin again if layers were frozen or unfrozen, or `compile` was called.

        This is to be called whenever Python runs at the start of `fit` or in a step:
        for a graph, when it is traced.

        Args:
            variables: The model's variables.
        """
        if self.estimate is None:  # the optimizer is being built
            return
        now = Trained.now(variables, self.trained)
        if self.trained is None or not now.differs_from(self.trained):
            self.trained = now
            return
        with backend.outside_functions():
            if has_value(self.estimate[0]):  # else a state that somebody else has
                self.restart()
                self.trained = now

    def end_fit(self, variables: Sequence[Any], steps: Any) -> str:
        """Note how far the weights are, so that the next step sees if they are others.

        If they are averages now, the statistics of `BatchNormalization` are computed
        for them.

        Args:
            variables: The model's variables.
            steps: How many steps `fit` took, if it is `fit` that ends.

        Returns:
            What a user should know about the estimate, or nothing.
        """
        if not self.is_known():
            return ""
        message = self.complaint()
        self.restart_if_changed(variables)  # it may be the first that is seen of `fit`
        known, fit = self.known(), fit_that_ends()
        if self.options.restarts and known.steps and fit:
            reach = farthest(self._parts(variables))
            known = known._replace(reach=float(reach))
            backend.assign_everywhere(self.estimate, np.array(known, "float32"))
        if self._optimizer.use_ema and fit:
            message = batch_norm.recompute_after(fit, int(as_array(steps))) or message
        return message

    def _parts(
        self,
        variables: Sequence[Any],
        grads: Mapping[int, Any] = types.MappingProxyType({}),
        ids: Mapping[int, Any] = types.MappingProxyType({}),
    ) -> list[Sampled]:
        slots = zip(variables, self.firsts, self.sums, strict=True)
        sample, tables = self.options.sample, Tables(self._optimizer)
        return [
            Sampled(
                *(v, grads.get(i), first, sums, sample(v.shape)),
                tables.rows_of(i, ids.get(i)),
                self._momentum(i),
            )
            for i, (v, first, sums) in enumerate(slots)
            if first is not None
        ]

    def _momentum(self, i: int) -> Any:
        """Return the momentum buffer of a variable, unless it is in fewer bits."""
        momentum = self._optimizer._steps.slots_of(i).momentum
        same = momentum is not None and momentum.dtype == self.sums[i].dtype
        return momentum if same else None

    def rate(
        self,
        parts: Sequence[Any],
        factor: Any,
        scale: Any = None,
        *,
        kernel: bool,
        fuse: bool = False,
    ) -> Any:
        """Update the estimate of how far the weights must travel; return the rate.

        Args:
            parts: The variables that have a gradient in this step, an `update.Part`
                each.
            factor: The factor on the distance; see `find`.
            scale: See `find`.
            kernel: Whether a native kernel may follow most variables.
            fuse: Whether the update may do so: then an `update.Sought` is returned.
        """
        optimizer, grads = self._optimizer, dict[int, Any]()
        for part in parts:
            i, g = part.variable_index, part.gradient
            grads[i] = g + grads[i] if i in grads else g
        variables = optimizer._trainable_variables
        momentums = [m for m in optimizer._momentums if m is not None]
        ids = {part.variable_index: part.ids for part in parts}
        sampled = self._parts(variables, grads, ids)

        def found() -> Any:
            distance = find(
                sampled,
                self.estimate,
                factor,
                self.options,
                sign=-1 if optimizer.maximize else 1,
                fold=backend.folds(),
                scale=scale,
                kernel=backend.search_kernel(variables, kernel=kernel),
                momentums=momentums if optimizer.lr_in_momentum else [],
            )
            return self.rate_of(distance, factor)

        if fuse and kernel and backend.searches_in_update:
            how = numbers(self.options)
            return Sought(sampled, self.estimate, factor, how, found)
        return found()

    def rate_of(self, distance: Any, factor: Any) -> Any:
        """Return the learning rate of a distance: with momentum, steps add up."""
        return ops.cast(factor, "float32") * distance * (1 - self._optimizer.momentum)

    def lead_of_tables(self) -> Any:
        """Return the largest distance so far, as a multiple of the one of this step.

        A row of a table is in few steps, so its rate must not fade with all of them.
        """
        known = Estimate.of(self.estimate)
        return known.longest / (known.distance * known.brake)

    def current_rate(self, factor: Any) -> Any:
        """Return the learning rate of the last step; None before the first.

        Args:
            factor: The factor on the distance.
        """
        if not self.is_known():
            now = Estimate.of(self.estimate)
            return self.rate_of(now.distance * now.brake, factor)
        known = self.known()
        distance = known.distance * known.brake
        return float(self.rate_of(distance, factor)) if known.steps else None

    def is_known(self) -> bool:
        """Whether the estimate is known now, and not in a function being traced."""
        if self.estimate is None:
            return True
        return backend.is_eager() and has_value(self.estimate[0])

    def known(self) -> Estimate:
        """Return the estimate, as numbers."""
        if self.estimate is None:
            return Estimate.at_first(0.0)
        return Estimate(*as_array(self.estimate).tolist())

    def complaint(self) -> str:
        """Return what a user should know about the estimate; see `complaint`."""
        if not self.is_known():
            return ""
        return complaint(self.known(), self.options.initial)
