"""Gradient accumulation: the mean gradient of n calls makes one update.

A call adds its gradient to the sum G; each n-th one updates with (g + G) / n, and sets
all sums to 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_rmsprop.backends import current as backend
from keras_rmsprop.update import Part

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop import row_sums


class Accumulation:
    """Wraps the update: it happens at each n-th call, with the mean gradient.

    Args:
        optimizer: The optimizer. Keras makes its accumulators.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def is_on(self) -> bool:
        """Whether the option is given."""
        return bool(self._optimizer.gradient_accumulation_steps)

    def build(self, variables: Sequence[Any]) -> None:
        """Do nothing: Keras makes the accumulators."""

    def why_all_rows(self, variable: Any) -> str:
        """Return "": a table's counter knows the rows that have sums."""
        return ""

    def take(
        self,
        parts: Sequence[Part],
        update: Callable[[Sequence[Part]], Any],
        state: Sequence[Any],
    ) -> list[Any]:
        """Add gradients to the sums, or update with the mean and reset the sums.

        Args:
            parts: The parts of a step.
            update: Clips, decays and updates.
            state: The variables that this may change.

        Returns:
            What else was updated with the weights: nothing.
        """
        n = self._optimizer.gradient_accumulation_steps
        is_update = (self._optimizer._iterations + 1) % n == 0

        def mean_and_reset() -> None:
            means = [self._mean(part, n) for part in parts]
            update(means)
            self._reset(means)

        def add() -> None:
            for part in parts:
                self._add(part)

        backend.either(is_update, mean_and_reset, add, state)
        return []

    def _of(self, part: Part) -> tuple[Any, Any]:
        """Return the sums of a variable, and its last-update counter or None."""
        optimizer, clock = self._optimizer, None
        if part.variable_index in optimizer._clocks:
            clock = optimizer._clocks[part.variable_index]
        return optimizer._accumulated_gradients[part.variable_index], clock

    def _mean(self, part: Part, n: int) -> Part:
        """Return the mean gradient: (g + G) / n; of a table, for all rows with sums."""
        sums, clock = self._of(part)
        if part.ids is None:
            return part._replace(gradient=(part.gradient + sums) / n)
        gradient, ids = row_sums.mean_of_sums(part.gradient, part.ids, clock, sums, n)
        return part._replace(gradient=gradient, ids=ids)

    def _add(self, part: Part) -> None:
        """Let G <- G + g."""
        sums, clock = self._of(part)
        if part.ids is not None:
            row_sums.accumulate(part.gradient, part.ids, clock, sums)
            return
        sums.assign_add(part.gradient)
        if clock is not None:
            clock.mark_all_pending()

    def _reset(self, parts: Sequence[Part]) -> None:
        """Let G <- 0, of all variables; on JAX, as in Keras, of those with a part."""
        optimizer, rows = (
            self._optimizer,
            {part.variable_index: part.ids for part in parts},
        )
        for i, sums in enumerate(optimizer._accumulated_gradients):
            if sums is None or not (i in rows or backend.resets_all_sums):
                continue
            if i in optimizer._clocks:
                row_sums.reset(rows.get(i), optimizer._clocks[i], sums)
            else:
                sums.assign(ops.zeros(sums.shape, sums.dtype))
