"""Keras' `ScheduleFreeAdamW` as its paper has it: for `tuning.py`.

Keras 3.15's differs in two points, both to its disadvantage. On TensorFlow it reads z
after it has changed, so that x goes the wrong way; and it never sets the weights to x,
with which the paper tests.
"""

from typing import Any

import keras
from keras import ops


class ScheduleFree(keras.optimizers.ScheduleFreeAdamW):
    """Keras' own, with x computed of the z that was; after `fit` the weights are x."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move z as Keras does, then x and y by the old z."""
        z = self._momentums[self._get_variable_index(variable)]
        z_old, y_old = ops.copy(z), ops.copy(variable)
        super().update_step(gradient, variable, learning_rate)
        weight = 1 / ops.cast(self.iterations + 1, variable.dtype)
        x = (y_old - (1 - self.beta_1) * z_old) / self.beta_1
        x = (1 - weight) * x + weight * z
        self.assign(variable, (1 - self.beta_1) * z + self.beta_1 * x)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Set the weights to x."""
        super().finalize_variable_values(var_list)
        for y, z in zip(self._trainable_variables, self._momentums, strict=True):
            y.assign((y - (1 - self.beta_1) * z) / self.beta_1)
