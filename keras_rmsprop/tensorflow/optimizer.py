"""A Keras optimizer whose steps are compiled and whose sparse gradients stay sparse."""

import contextlib
import functools
import math
from collections import UserDict
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop import checks
from keras_rmsprop.folding import folded
from keras_rmsprop.skipping import SkippingOptimizer
from keras_rmsprop.tensorflow import compiled, gradients, joined, rows

LARGE = 2**20
"""Elements from which a variable gains from XLA in a graph that is not compiled."""


outside_functions = tf.init_scope
"""Context in which variables are made at once, not when a function has been traced."""


class TensorFlowOptimizer(SkippingOptimizer):
    """What RMSprop adds to Keras' optimizer on the TensorFlow backend.

    `update_step`, the subclass', calls `rows.update` for the variables in `_clocks`.
    Its `_joint_step` says which variables may be updated together.
    """

    _tracing = False
    _traced_learning_rate: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._programs = compiled.Programs()
        self._clocks = rows.Clocks(lambda: self._trainable_variables)
        self._ids = ByVariable()
        self._dense_elsewhere = ByVariable()

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
            TypeError: A gradient is not of floating point numbers.
        """
        variables = trainable_variables
        if len(grads) == 0 or (variables is None and not self.built):
            return super().apply(grads, variables)  # no step, or Keras' own error
        variables = self._trainable_variables if variables is None else list(variables)
        if len(grads) != len(variables):
            raise ValueError(
                "There must be one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        grads = [gradients.tensor(g, v) for g, v in zip(grads, variables, strict=True)]
        sparse = [
            (g, v)
            for g, v in zip(grads, variables, strict=True)
            # Slices; but to ask whether it is a tensor takes a quarter of the time.
            if not (g is None or isinstance(g, tf.Tensor))
        ]
        if sparse or not self.built:
            self._prepare(grads, variables)
        tables = []
        for gradient, variable in sparse:
            index = self._get_variable_index(variable)
            if index not in self._clocks and self._rows_suffice(variable):
                rows.check(gradient, variable)
                tables.append(index)
        if tf.distribute.has_strategy():
            self._step_on_all_copies(grads, variables, tables)
            return
        self._make_clocks(tables)
        if self._has_program(grads, variables):
            self._programs.run(self, self._step, grads, variables)
        else:
            self._step(grads, variables)

    def _step_on_all_copies(
        self, grads: Sequence[Any], variables: Sequence[Any], tables: Sequence[int]
    ) -> None:
        """Sum the gradients over the replicas; then each steps with its own copies.

        Of sparse gradients the rows travel. After the sum all replicas know the same,
        so nothing else has to travel, and a step is the plain one.
        """
        distribute = tf.__internal__.distribute
        strategy = tf.distribute.get_strategy()
        replica = tf.distribute.get_replica_context()
        given = [g for g in grads if g is not None]
        if replica and given:
            summed = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, given))
            grads = [g if g is None else next(summed) for g in grads]
        if not replica:
            self._make_clocks(tables)
        # Replicas that cannot meet, as XLA compiles them apart, make no clock: then the
        # sum of slices becomes dense.
        elif tables and not distribute.strategy_supports_no_merge_call():
            replica.merge_call(lambda _: self._make_clocks(tables))
        strategy.extended.update(
            rows.native(variables[0]),
            lambda _, *grads: self._step(grads, variables),
            args=grads,
            group=False,
        )

    def _make_clocks(self, tables: Sequence[int]) -> None:
        for index in tables:
            self._clocks.make(index)

    def _prepare(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Check gradients; only then make slots for variables that have none."""
        for gradient, variable in zip(grads, variables, strict=True):
            gradients.check(gradient, variable)
        if not self.built:
            self.build(variables)
        self._check_variables_are_known(variables)

    def _has_program(self, grads: list[Any], variables: Sequence[Any]) -> bool:
        """Whether a step taken here and now should be a program of its own."""
        if self.jit_compile is False or tf.config.functions_run_eagerly():
            return False
        if tf.executing_eagerly():
            return True
        # In a graph only XLA gains, and XLA would compile for each number of rows.
        return not any(isinstance(g, tf.IndexedSlices) for g in grads) and (
            self.jit_compile is True
            or any(math.prod(v.shape) >= LARGE for v in variables)
        )

    def _step(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Take the step as Keras does, sparse gradients as those of their rows."""
        self._prepare(grads, variables)
        grads, asserts = list(grads), []
        indices = [self._get_variable_index(v) for v in variables]
        try:
            for i, (gradient, index) in enumerate(zip(grads, indices, strict=True)):
                variable = variables[i]
                if gradient is None:
                    continue
                if not isinstance(gradient, tf.IndexedSlices):
                    if not self._own_graph():
                        self._dense_elsewhere[index] = True
                    # In float16 norms overflow, and what was scaled up underflows.
                    grads[i] = rows.widened(gradient)
                    continue
                asserts.append(rows.check(gradient, variable))
                has_clock = index in self._clocks and self._rows_suffice(variable)
                if has_clock and indices.count(index) == 1:
                    grads[i], self._ids[index] = rows.distinct(gradient, variable)
                else:
                    grads[i] = rows.dense(gradient, variable)
                    if index not in self._clocks and not self._own_graph():
                        self._dense_elsewhere[index] = True
            # Nothing is written before all indices are known to be good.
            with tf.control_dependencies(asserts):
                super().apply(grads, variables)
        finally:
            self._ids.clear()

    def _inside_xla(self) -> bool:
        return rows.inside_xla()

    def _own_graph(self) -> bool:
        """Whether the graph being traced, if any, is a program of this optimizer."""
        return tf.executing_eagerly() or self._tracing

    def _rows_suffice(self, variable: Any) -> bool:
        """Whether a step may pass by the rows of a table that have no gradient."""
        if (
            self.gradient_accumulation_steps
            # A graph that updates all rows without a clock would not know of ours.
            or self._get_variable_index(variable) in self._dense_elsewhere
        ):
            return False
        return self.sparse_update == "lazy" or not (
            self.momentum
            or self.use_ema
            or (self.weight_decay and self._use_weight_decay(variable))
        )

    def _get_current_learning_rate(self) -> Any:
        if self._traced_learning_rate is not None:
            return self._traced_learning_rate
        return checks.learning_rate(super()._get_current_learning_rate())

    @contextlib.contextmanager
    def _traced_with(self, learning_rate: Any) -> Iterator[None]:
        """Within this context a program is traced, with this as its learning rate."""
        self._tracing, self._traced_learning_rate = True, learning_rate
        try:
            yield
        finally:
            self._tracing, self._traced_learning_rate = False, None

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        """See `keras.optimizers.Optimizer`; programs traced before are dropped."""
        super().exclude_from_weight_decay(*args, **kwargs)
        self._programs = compiled.Programs()

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        most = self.clipnorm or self.global_clipnorm
        if not (most and self._inside_xla()):
            return super()._clip_gradients(grads)
        # As in Keras, but with norms that XLA need not take on one thread.
        squares = [
            [tf.reduce_sum(part) for part in folded(tf.square(g), tf.add)]
            for g in grads
            if g is not None
        ]
        if self.clipnorm:
            norms = iter([tf.sqrt(tf.add_n(sums)) for sums in squares])
            return [
                g if g is None else g * (most / tf.maximum(next(norms), most))
                for g in grads
            ]
        norm = tf.sqrt(tf.add_n([s for sums in squares for s in sums]))
        scale = most / tf.maximum(norm, most) + (norm - norm)  # infinite: NaN
        return [g if g is None else g * scale for g in grads]

    # Keras' own below would go through `tf.distribute` again, and know no rows.

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], rate: Any
    ) -> None:
        together: dict[Any, list[Any]] = {}
        one_each = len({*map(id, trainable_variables)}) == len(trainable_variables)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            joins = one_each and self._joins(variable)
            joint = self._joint_step(variable, rate) if joins else None
            if joint:
                key, step = joint
                together.setdefault(key, []).append((gradient, variable, step))
            else:
                self.update_step(gradient, variable, rate)
        for several in together.values():
            of_each, variables, steps = zip(*several, strict=True)
            if len(several) == 1:
                self.update_step(of_each[0], variables[0], rate)
            else:
                slots = [self._slots_of(self._get_variable_index(v)) for v in variables]
                joined.update(of_each, variables, slots, steps[0])

    def _joins(self, variable: Any) -> bool:
        """Whether to update a variable together with others, and not on its own."""
        return (
            joined.is_small(variable)
            and self._get_variable_index(variable) not in self._clocks
            and not self._inside_xla()
            and not tf.distribute.has_strategy()
        )

    def _backend_increment_gradient_accumulators(
        self, grads: Sequence[Any], acc_grads: Sequence[Any]
    ) -> None:
        for gradient, accumulator in zip(grads, acc_grads, strict=True):
            accumulator.assign_add(gradient)

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        averages = self._model_variables_moving_average
        for variable, average in zip(trainable_variables, averages, strict=True):
            variable.assign(average)

    def _update_model_variables_moving_average(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        averages = self._model_variables_moving_average
        others = [None if i in self._ids else a for i, a in enumerate(averages)]
        # Past the trackers of Keras and TensorFlow, which would take it for state.
        object.__setattr__(self, "_model_variables_moving_average", others)
        try:
            super()._update_model_variables_moving_average(trainable_variables)
        finally:
            object.__setattr__(self, "_model_variables_moving_average", averages)
        for index, ids in self._ids.items():
            average, variable = averages[index], trainable_variables[index]
            # The first step starts the average of all rows; see Keras' formula.
            tf.cond(
                tf.equal(self.iterations, 0),
                functools.partial(rows.write, average, variable, None),
                functools.partial(rows.mix, average, variable, ids, self.ema_momentum),
            )


class ByVariable(UserDict[int, Any]):
    """Something for some of an optimizer's variables, by their index.

    Keras and TensorFlow would track a dict, and write what it holds to checkpoints.
    """
