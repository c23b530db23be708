"""The search for a learning rate while training: its variables, and its restarts."""

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rmsprop import batch_norm
from keras_rmsprop.auto_rate import AutoLearningRate
from keras_rmsprop.backends import current as backend
from keras_rmsprop.complaints import complaint
from keras_rmsprop.estimate import Estimate, Sampled, farthest, find, numbers
from keras_rmsprop.fitting import Trained, fit_that_ends
from keras_rmsprop.options import has_value
from keras_rmsprop.slots import FIRST_WEIGHT, GRADIENT_SUM, RATE_ESTIMATE
from keras_rmsprop.state import as_array
from keras_rmsprop.tables import Tables
from keras_rmsprop.update import Sought


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
        fit, factor = fit_that_ends(), self._optimizer._get_current_learning_rate()
        stopped = bool(fit and fit["self"].stop_training)
        message = self.complaint(factor, stopped=stopped)
        self.restart_if_changed(variables)  # it may be the first that is seen of `fit`
        known = self.known()
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
        The brake is for tables, too.
        """
        known = Estimate.of(self.estimate)
        return known.longest / known.distance

    def current_rate(self, factor: Any) -> Any:
        """Return the learning rate of the last step; None before the first.

        Args:
            factor: The factor on the distance.
        """
        if not self.is_known():
            return self.rate_of(Estimate.of(self.estimate).braked, factor)
        known = self.known()
        return float(self.rate_of(known.braked, factor)) if known.steps else None

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

    def complaint(self, factor: Any, *, stopped: bool = False) -> str:
        """Return what a user should know about the estimate; see `complaint`."""
        if not self.is_known():
            return ""
        factor = float(factor) if has_value(factor) else math.nan
        known, initial = self.known(), self.options.initial
        return complaint(known, initial, factor, stopped=stopped)
