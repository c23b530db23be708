"""Steps that change nothing where a gradient is not finite (`skip_nonfinite`)."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_rmsprop.folding import folded


def all_finite(gradients: Sequence[Any], *, fold: bool = False) -> Any:
    """Return whether all elements of all gradients are finite, a bool tensor.

    Args:
        gradients: Tensors.
        fold: Whether XLA compiles this, which reduces on one thread.
    """
    parts = [ops.isfinite(ops.convert_to_tensor(g)) for g in gradients]
    if fold:
        parts = [part for g in parts for part in folded(g, ops.logical_and)]
    return ops.all(ops.stack([ops.all(part) for part in parts]))


class Skipping:
    """Wraps a step: it happens only if all gradients are finite.

    Args:
        optimizer: The optimizer, which has the counter `skipped_steps`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def is_on(self) -> bool:
        """Whether the option is on."""
        return bool(self._optimizer.skip_nonfinite)

    def build(self, variables: Sequence[Any]) -> None:
        """Make the counter."""
        if self._optimizer.skip_nonfinite:
            self._optimizer.skipped_steps = self._optimizer.add_variable(
                (), "zeros", "int32", name="skipped_steps"
            )

    def why_all_rows(self, variable: Any) -> str:
        """Return "": skipping never needs all rows."""
        return ""

    def take(
        self,
        step: Callable[[], None],
        finite: Any,
        either: Callable[..., None],
        state: Sequence[Any],
    ) -> None:
        """Take the step if all is finite, else count it as skipped.

        Args:
            step: Takes it.
            finite: A bool scalar.
            either: `Backend.either`.
            state: The variables that the step may change.
        """
        either(finite, step, lambda: None, state)
        # Not in a branch: XLA leaves a condition alone only if one is empty.
        self._optimizer.skipped_steps.assign_add(1 - ops.cast(finite, "int32"))
