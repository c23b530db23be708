"""Steps that change nothing where a gradient is not finite."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
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


def unless_bad(step: Callable[[], None], finite: Any, state: Sequence[Any]) -> None:
    """Take a step if `finite` is true.

    Args:
        step: Takes the step.
        finite: A bool scalar.
        state: The variables that the step may change.
    """
    if keras.backend.backend() != "jax":
        ops.cond(finite, step, lambda: None)
        return
    # There a branch has no side effects: take the step, and undo it.
    before = [ops.copy(variable) for variable in state]
    step()
    after = [ops.copy(variable) for variable in state]
    for variable, old, new in zip(state, before, after, strict=True):
        variable.assign(ops.where(finite, new, old))
