"""optax' Prodigy as an optimizer of Keras, on JAX: for `tuning.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import optax.contrib


class Prodigy(keras.optimizers.Optimizer):
    """Calls `optax.contrib.prodigy` and keeps its state in Keras' variables."""

    def __init__(self, learning_rate: float = 1.0, **options: Any) -> None:
        super().__init__(learning_rate, **options)
        self._prodigy = optax.contrib.prodigy(learning_rate)

    def build(self, variables: list[Any]) -> None:
        """Make a variable of everything in optax' state."""
        if self.built:
            return
        super().build(variables)
        state = self._prodigy.init([variable.value for variable in variables])
        leaves, self._tree = jax.tree.flatten(state)
        self._state = []
        for number, leaf in enumerate(leaves):
            kept = self.add_variable(
                leaf.shape, name=f"state_{number}", dtype=leaf.dtype
            )
            kept.assign(jnp.copy(leaf))  # or it would be the weights' own
            self._state.append(kept)

    def _backend_update_step(self, grads: Any, variables: Any, rate: Any) -> None:
        weights = [variable.value for variable in variables]
        state = self._tree.unflatten([kept.value for kept in self._state])
        updates, state = self._prodigy.update(grads, state, weights)
        for variable, weight, update in zip(variables, weights, updates, strict=True):
            variable.assign(weight + update)
        for kept, leaf in zip(self._state, jax.tree.leaves(state), strict=True):
            kept.assign(leaf)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keras wants it; all is done at once, above."""
        raise NotImplementedError
