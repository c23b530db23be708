"""A Keras optimizer whose steps are compiled and whose sparse gradients stay sparse."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rmsprop.tensorflow import compiled, rows

LARGE = 2**20
"""Elements from which a variable gains from XLA in a graph that is not compiled."""


class TensorFlowOptimizer(keras.optimizers.Optimizer):
    """Keras' optimizer on the TensorFlow backend, without a formula.

    A subclass has the attributes `jit_compile` and `sparse_update`, says in
    `silent_rows_stay` where its formula leaves rows alone, and in its `update_step`
    calls `rows.update` for the variables in `_clocks`.
    """

    _fixed_learning_rate: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._programs = compiled.Programs()
        self._clocks = rows.ByVariable()
        self._ids = rows.ByVariable()

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Update the variables, one step down their gradients.

        Args:
            grads: One gradient for each variable, of its shape; `None` leaves the
                variable as it is. A `tf.IndexedSlices` counts as the dense gradient
                that it stands for: the slices of a row are summed first.
            trainable_variables: The variables. Not needed once the optimizer is
                built; then they are those it was built with, in that order.

        Raises:
            ValueError: The gradients do not fit the variables, or all are `None`.
        """
        variables = trainable_variables
        if not grads or (variables is None and not self.built):
            return super().apply(grads, variables)  # no step, or Keras' own error
        variables = self._trainable_variables if variables is None else list(variables)
        if not self.built:
            self.build(variables)
        if len(grads) != len(variables):
            raise ValueError(
                "There must be one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        self._check_variables_are_known(variables)
        grads = [_tensor(g, v) for g, v in zip(grads, variables, strict=True)]
        for gradient, variable in zip(grads, variables, strict=True):
            if isinstance(gradient, tf.IndexedSlices) and self._rows_suffice(variable):
                self._add_clock(self._get_variable_index(variable))
        if self._has_program(grads, variables):
            self._programs.run(self, self._step, grads, variables)
        else:
            self._step(grads, variables)

    def _has_program(self, grads: list[Any], variables: Sequence[Any]) -> bool:
        """Whether a step taken here and now should be a program of its own."""
        if (
            self.jit_compile is False
            or tf.distribute.has_strategy()
            or tf.config.functions_run_eagerly()
        ):
            return False
        if tf.executing_eagerly():
            return True
        # In a graph only XLA gains, and XLA would compile for each number of rows.
        return not any(isinstance(g, tf.IndexedSlices) for g in grads) and (
            self.jit_compile is True
            or any(math.prod(v.shape) >= LARGE for v in variables)
        )

    def _step(self, grads: list[Any], variables: Sequence[Any]) -> None:
        """Take the step as Keras does, sparse gradients as those of their rows."""
        grads, checks = list(grads), []
        for i, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
            _check_shape(gradient, variable)
            if isinstance(gradient, tf.IndexedSlices):
                checks.append(rows.check(gradient, variable))
                if self._rows_suffice(variable):
                    grads[i], ids = rows.distinct(gradient, variable)
                    self._ids[self._get_variable_index(variable)] = ids
                else:
                    grads[i] = rows.dense(gradient, variable)
        try:
            # Nothing is written before all indices are known to be good.
            with tf.control_dependencies(checks):
                super().apply(grads, variables)
        finally:
            self._ids.clear()

    def _rows_suffice(self, variable: Any) -> bool:
        """Whether a step may pass by the rows of a table that have no gradient."""
        if self.gradient_accumulation_steps or tf.distribute.has_strategy():
            return False
        return self.sparse_update == "lazy" or not (
            self.momentum
            or self.use_ema
            or (self.weight_decay and self._use_weight_decay(variable))
        )

    def _add_clock(self, index: int) -> None:
        """Give a variable a clock unless it has one."""
        if index in self._clocks:
            return
        variable = self._trainable_variables[index]
        name = getattr(variable, "path", variable.name).replace("/", "_")
        with tf.init_scope():
            self._clocks[index] = rows.Clock(
                self.add_variable((), dtype="int32", name=f"{name}_updates"),
                self.add_variable(
                    variable.shape[:1], dtype="int32", name=f"{name}_last_update"
                ),
            )

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the moment; in a traced step, its argument."""
        if self._fixed_learning_rate is not None:
            return self._fixed_learning_rate
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        keras.optimizers.Optimizer.learning_rate.fset(self, learning_rate)

    @contextlib.contextmanager
    def fixed_learning_rate(self, value: Any) -> Iterator[None]:
        """Within this context `learning_rate` is `value`, unless that is `None`."""
        self._fixed_learning_rate = value
        try:
            yield
        finally:
            self._fixed_learning_rate = None

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        whole = [v for v in variables if self._get_variable_index(v) not in self._ids]
        super()._apply_weight_decay(whole)
        for index, ids in self._ids.items():
            variable = self._trainable_variables[index]
            if self.weight_decay and self._use_weight_decay(variable):
                rate = tf.cast(self.learning_rate * self.weight_decay, variable.dtype)
                rows.subtract(variable, rate * rows.read(variable, ids), ids)

    def _update_model_variables_moving_average(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        averages = self._model_variables_moving_average
        tables = {index: averages[index] for index in self._ids}
        for index in tables:
            averages[index] = None  # Keras passes these by
        super()._update_model_variables_moving_average(trainable_variables)
        for index, average in tables.items():
            averages[index] = average
            variable, ids = trainable_variables[index], self._ids[index]
            # The first step starts the average of all rows; see Keras' formula.
            tf.cond(
                tf.equal(self.iterations, 0),
                functools.partial(rows.write, average, variable, None),
                functools.partial(rows.mix, average, variable, ids, self.ema_momentum),
            )

    def save_own_variables(self, store: Any) -> None:
        """Save the state, and which variables the clocks belong to."""
        super().save_own_variables(store)
        if self._clocks:
            store["clocks"] = np.array(list(self._clocks))

    def load_own_variables(self, store: Any) -> None:
        """Load the state, creating the clocks that it has."""
        state = {key: store[key] for key in store.keys()}  # noqa: SIM118
        saved = [int(index) for index in state.pop("clocks", [])]
        for index in saved if self.built else []:
            self._add_clock(index)
        # The clocks come last, two variables each, in the order they were made in.
        first = len(state) - 2 * len(saved)
        values = {str(i): state[str(i)] for i in range(first)}
        for index, clock in self._clocks.items():
            for j, variable in enumerate(clock):
                place = first + 2 * saved.index(index) + j if index in saved else None
                values[str(len(values))] = (
                    np.zeros(variable.shape) if place is None else state[str(place)]
                )
        super().load_own_variables(values)


def _tensor(gradient: Any, variable: Any) -> Any:
    """Return a gradient as a tensor or as slices of tensors, None as it is."""
    if isinstance(gradient, tf.Tensor) or gradient is None:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        values = _tensor(gradient.values, variable)
        return tf.IndexedSlices(values, tf.convert_to_tensor(gradient.indices))
    return keras.ops.convert_to_tensor(gradient, variable.dtype)


def _check_shape(gradient: Any, variable: Any) -> None:
    expected = variable.shape
    if isinstance(gradient, tf.IndexedSlices):
        gradient, expected = gradient.values, [None, *expected[1:]]
    if gradient is not None and not gradient.shape.is_compatible_with(expected):
        raise ValueError(
            "A gradient must have the shape of its variable. Received: "
            f"shape {tuple(gradient.shape)} for variable {variable.name!r} "
            f"of shape {tuple(variable.shape)}"
        )
