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
    from keras_rmsprop import sparse


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
        """Return nothing: a table's rows that have sums are known."""
        return ""

    def catch_up(self, i: int) -> None:
        """Take all rows of a table for ones that have sums: others may write them."""
        self._optimizer._clocks[i].mark_sums(True)

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

    def _sums(self, i: int) -> Any:
        return self._optimizer._accumulated_gradients[i]

    def _mean(self, part: Part, n: int) -> Part:
        """Return the mean gradient: (g + G) / n; of a table, for all rows with sums."""
        gradient, sums = part.gradient, self._sums(part.place)
        if part.ids is None:
            return part._replace(gradient=(gradient + sums) / n)
        clock = self._optimizer._clocks[part.place]
        gradient, ids = sparse.with_sums(gradient, part.ids, clock, sums)
        return part._replace(gradient=gradient / n, ids=ids)

    def _add(self, part: Part) -> None:
        """Let G <- G + g."""
        clocks, sums = self._optimizer._clocks, self._sums(part.place)
        if part.ids is not None:
            sparse.add_to_sums(part.gradient, part.ids, clocks[part.place], sums)
            return
        sums.assign_add(part.gradient)
        if part.place in clocks:
            clocks[part.place].mark_sums(True)

    def _reset(self, parts: Sequence[Part]) -> None:
        """Let G <- 0, of all variables; on JAX, as in Keras, of those with a part."""
        clocks, rows = self._optimizer._clocks, {part.place: part.ids for part in parts}
        for i, sums in enumerate(self._optimizer._accumulated_gradients):
            if sums is None or not (i in rows or backend.resets_all_sums):
                continue
            if (ids := rows.get(i)) is None:
                sums.assign(ops.zeros(sums.shape, sums.dtype))
            else:
                sparse.write(sums, ops.zeros_like(sparse.read(sums, ids)), ids)
            if i in clocks:
                clocks[i].mark_sums(False, ids)
