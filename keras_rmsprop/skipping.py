"""Steps that change nothing where a gradient is not finite."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_rmsprop.folding import folded


class SkippingOptimizer(keras.optimizers.Optimizer):
    """An optimizer that can pass by a NaN: the subclass' `skip_nonfinite` says whether.

    Such a step leaves every variable as it was and is counted in `skipped_steps`, a
    variable that the subclass makes when it is built.
    """

    skipped_steps: Any = 0

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Update the variables, unless a gradient is not finite and that is to be seen.

        Args:
            grads: One gradient, or None, for each variable.
            trainable_variables: The variables; by default those it was built with.
        """
        given = [g for g in grads if g is not None]
        if not self.skip_nonfinite or not given:
            super().apply(grads, trainable_variables)
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
            self._check_variables_are_known(trainable_variables)
        if isinstance(self.skipped_steps, int):
            raise ValueError(
                "`skip_nonfinite` must be given when the optimizer is made, or before "
                "it is built. Received: skip_nonfinite=True later"
            )
        step = functools.partial(super().apply, grads, trainable_variables)
        parts = [ops.isfinite(ops.convert_to_tensor(g)) for g in given]
        if self._inside_xla():
            parts = [part for g in parts for part in folded(g, ops.logical_and)]
        finite = ops.all(ops.stack([ops.all(part) for part in parts]))
        if keras.backend.backend() == "jax":  # where a branch has no side effects
            self._step_and_undo(step, finite)
        else:
            ops.cond(finite, step, lambda: None)
        # Not in a branch: XLA leaves a condition alone only if one branch is empty.
        self.skipped_steps.assign_add(1 - ops.cast(finite, "int32"))

    def _inside_xla(self) -> bool:
        """Whether the step is a part of what XLA compiles."""
        return keras.backend.backend() == "jax"

    def _step_and_undo(self, step: Callable[[], None], finite: Any) -> None:
        state = [*self._trainable_variables, *self.variables]
        before = [ops.copy(variable) for variable in state]
        step()
        after = [ops.copy(variable) for variable in state]
        for variable, old, new in zip(state, before, after, strict=True):
            variable.assign(ops.where(finite, new, old))
