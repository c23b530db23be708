"""How a step is taken on TensorFlow: by the kernel, by rows, concatenated, or alone."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import keras
import numpy as np
import tensorflow as tf

from keras_rmsprop import skipping, sparse
from keras_rmsprop.access import CONVERTIBLE, outside_functions, without_autograph
from keras_rmsprop.backends import programs, updating
from keras_rmsprop.backends.base import (
    Backend,
    Context,
    Function,
    Gradients,
    Stepper,
    check_fits,
)
from keras_rmsprop.backends.programs import (
    Programs,
    is_watched,
)
from keras_rmsprop.folding import folded
from keras_rmsprop.kernel import rows as kernel_rows
from keras_rmsprop.kernel import tensorflow as kernel
from keras_rmsprop.sparse import inside_xla, unwrapped, widened
from keras_rmsprop.update import Constants, Update, Way


@final
class TensorFlow(Backend):
    """Takes steps as programs, and updates tables by rows."""

    has_rows: ClassVar[bool] = True
    searches_in_update: ClassVar[bool] = True

    def outside_functions(self) -> Context:
        """See `Backend`."""
        return outside_functions()

    def beside(self, variable: Any, optimizer: Any) -> Context:
        """See `Backend`."""
        strategy = optimizer._distribution_strategy
        return strategy.extended.colocate_vars_with(unwrapped(variable))

    @contextlib.contextmanager
    def scope(self, name: str, *, convertible: bool) -> Iterator[None]:
        """See `Backend`. In names TensorFlow takes some characters only."""
        token = CONVERTIBLE.set(convertible)
        name = re.sub(r"^[^A-Za-z0-9.]+|[^A-Za-z0-9_.\\/>-]", "_", name)
        try:
            with tf.name_scope(name):
                yield
        finally:
            CONVERTIBLE.reset(token)

    def without_autograph(self, function: Function) -> Function:
        """See `Backend`."""
        return without_autograph(function)

    def is_eager(self) -> bool:
        """See `Backend`."""
        return bool(tf.executing_eagerly())

    def inside_xla(self) -> bool:
        """See `Backend`."""
        return inside_xla()

    def folds(self) -> bool:
        """See `Backend`."""
        return inside_xla()

    # Gradients.

    def as_gradients(self, grads: Gradients, variables: Sequence[Any]) -> list[Any]:
        """Return gradients as tensors or as slices of tensors, None as it is."""
        return [
            g if isinstance(g, tf.Tensor) else self.as_gradient(g, v)
            for g, v in zip(grads, variables, strict=True)
        ]

    def as_gradient(self, gradient: Any, variable: Any) -> Any:
        """Return one gradient, as `as_gradients` does."""
        if isinstance(gradient, tf.Tensor) or gradient is None:
            return gradient
        if isinstance(gradient, tf.IndexedSlices):
            values = self.as_gradient(gradient.values, variable)
            others = (gradient.indices, gradient.dense_shape)
            return tf.IndexedSlices(
                values,
                *(None if x is None else tf.convert_to_tensor(x) for x in others),
            )
        if isinstance(gradient, np.ndarray) and np.iscomplexobj(gradient):
            return tf.constant(gradient)  # to be refused; a cast takes the real part
        return tf.convert_to_tensor(
            keras.ops.convert_to_tensor(gradient, variable.dtype)
        )

    def check(self, gradient: Any, variable: Any) -> None:
        """See `Backend`."""
        if gradient is None:
            return
        if not isinstance(variable, keras.Variable | tf.Variable):
            raise TypeError(
                "Gradients must come with variables. "
                f"Received: {type(variable).__name__}"
            )
        name, shape, dtype = variable.name, tuple(variable.shape), gradient.dtype
        fits = gradient.shape.is_compatible_with(shape)
        check_fits(gradient, variable, dtype.name, dtype.is_floating, fits)
        if not isinstance(gradient, tf.IndexedSlices):
            return
        values, ids = gradient.values, gradient.indices
        if (
            ids.dtype not in (tf.int32, tf.int64)
            or not ids.shape.is_compatible_with([None])
            or not values.shape.is_compatible_with([*ids.shape[:1], *shape[1:]])
            or not shape
        ):
            raise ValueError(
                "A sparse gradient must have int32 or int64 indices, and for each a "
                f"row as wide as the variable's. Received: {ids.dtype.name} indices of "
                f"shape {tuple(ids.shape)} and values of shape {tuple(values.shape)} "
                f"for variable {name!r} of shape {shape}"
            )

    def has_slices(self, grads: Gradients) -> bool:
        """See `Backend`."""
        return programs.has_slices(grads)

    def is_slices(self, gradient: Any) -> bool:
        """See `Backend`."""
        return programs.is_slices(gradient)

    def widened(
        self,
        grads: Gradients,
        variables: Sequence[Any],
        clocks: Mapping[int, Any],
        *,
        kernel: bool,
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """See `Backend`."""
        tensors: list[Any] = []
        rows: list[Any] = []
        checks = []
        for position, (gradient, variable) in enumerate(
            zip(grads, variables, strict=True)
        ):
            ids = None
            if isinstance(gradient, tf.IndexedSlices):
                gradient, of_shape = sparse.with_known_shape(gradient, variable)
                checks += [*of_shape, sparse.check_ids(gradient, variable)]
                if position not in clocks:
                    gradient = sparse.dense(gradient, variable)
                else:
                    gradient, ids = _distinct(gradient, clocks[position], may=kernel)
            elif gradient is not None:
                if not gradient.shape.is_fully_defined():
                    gradient = tf.ensure_shape(gradient, variable.shape)
                    checks.append(gradient.op)
                gradient = widened(gradient)
            tensors.append(gradient)
            rows.append(ids)
        return tensors, rows, checks

    # Stages of a step.

    def programs(self) -> Programs:
        """See `Backend`."""
        return Programs()

    def run(self, stepper: Stepper, grads: list[Any], variables: Sequence[Any]) -> None:
        """Take a step: directly, as a program, or on all replicas."""
        tables: set[int] = set()
        if self.has_slices(grads) or not tf.executing_eagerly():
            tables = stepper.new_tables(grads, variables)
        if tf.distribute.has_strategy():
            programs.on_all_replicas(stepper, grads, variables, tables)
            return
        stepper.make_clocks(tables)
        stepper.programs.run(stepper, grads, variables)

    def after(self, checks: Sequence[Any]) -> Context:
        """See `Backend`."""
        return tf.control_dependencies(checks)

    def count(self, counter: Any) -> None:
        """See `Backend`. Keras' `assign_add` is three operations."""
        unwrapped(counter).assign_add(1)

    def for_update_step(self, variable: Any) -> Any:
        """See `Backend`. Not of Keras: a function of the user's takes it as it is."""
        return unwrapped(variable)

    def has_kernel(self, variables: Sequence[Any]) -> bool:
        """See `Backend`."""
        return not (is_watched() or inside_xla()) and kernel.is_for(variables)

    def all_finite(self, grads: Gradients, *, kernel: bool) -> Any:
        """See `Backend`."""
        if kernel and _kernel.takes(grads) and grads[0].dtype == tf.float32:
            return tf.math.is_finite(_kernel.scale(grads, 1))
        return skipping.all_finite(grads, fold=inside_xla())

    def logs(self, gradient: Any, *, kernel: bool) -> tuple[Any, Any]:
        """See `Backend`. In TensorFlow's operations it takes longer than the update."""
        if kernel and _kernel.takes([gradient]):
            return _kernel.logs(gradient)
        return super().logs(gradient, kernel=kernel)

    def clipped_by_norm(
        self, grads: Gradients, norm: float | None, global_norm: float | None
    ) -> list[Any] | None:
        """See `Backend`. Under XLA, Keras' norms take one thread."""
        if not (inside_xla() or tf.is_tensor(norm) or tf.is_tensor(global_norm)):
            return None  # but if a tensor is an option, Keras asks whether it is > 0
        squares = [
            [tf.reduce_sum(part) for part in folded(tf.square(g), tf.add)]
            for g in grads
        ]
        if norm:
            norms = [tf.sqrt(tf.add_n(sums)) for sums in squares]
            return [
                g * (norm / tf.maximum(x, norm))
                for g, x in zip(grads, norms, strict=True)
            ]
        of_all = tf.sqrt(tf.add_n([s for sums in squares for s in sums]))
        # infinite: NaN
        scale = global_norm / tf.maximum(of_all, global_norm) + (of_all - of_all)
        return [g * scale for g in grads]

    def scale_of_global_norm(
        self, grads: Gradients, most: float, *, kernel: bool
    ) -> Any:
        """See `Backend`."""
        return _kernel.scale(grads, most) if kernel and _kernel.takes(grads) else None

    def search_kernel(self, variables: Sequence[Any], *, kernel: bool) -> Any:
        """See `Backend`."""
        return _kernel if kernel else None

    def update(
        self, updates: Sequence[Update], constants: Constants, *, in_program: bool
    ) -> list[Any]:
        """See `Backend`."""
        return updating.update(updates, constants, in_program=in_program)

    def assign_everywhere(self, variable: Any, value: Any) -> None:
        """See `Backend`."""
        copies = getattr(unwrapped(variable), "values", (unwrapped(variable),))
        value = tf.convert_to_tensor(value)
        for copy in copies:
            copy.assign(tf.cast(value, copy.dtype))

    def decay(self, optimizer: Any, variables: Sequence[Any]) -> bool:
        """See `Backend`. A step is on one replica, where Keras asks for all."""
        if not tf.distribute.has_strategy() or optimizer.weight_decay is None:
            return False
        for variable in filter(optimizer._use_weight_decay, variables):
            rate = tf.cast(optimizer.learning_rate, variable.dtype)
            share = tf.cast(optimizer.weight_decay, variable.dtype)
            variable.assign_sub(variable * share * rate)
        return True

    def clocks(self, optimizer: Any) -> Any:
        """See `Backend`."""
        return sparse.Clocks(optimizer)

    # What `explain` says.

    def why_no_kernel(self) -> str:
        """See `Backend`."""
        return _kernel.why_not()

    def is_for_kernel(self, updates: Sequence[Update], constants: Constants) -> bool:
        """See `Backend`."""
        return not is_watched() and not any(
            kernel.why_not_for(update, constants)
            or (update.average is not None and not kernel.averages(update, constants))
            for update in updates
            if update.rows is None
        )

    def way(
        self, update: Update, constants: Constants, *, xla: bool | None = None
    ) -> Way:
        """See `Backend`."""
        return updating.way(update, constants, xla=xla)

    def kinds_of_steps(
        self, stepper: Stepper, variables: Sequence[Any]
    ) -> dict[str, bool]:
        """See `Backend`."""
        return updating.kinds_of_steps(stepper, variables)


_kernel = kernel  # where an argument has its name


def _distinct(gradient: tf.IndexedSlices, clock: Any, *, may: bool) -> Any:
    wide = tf.IndexedSlices(widened(gradient.values), gradient.indices)
    if may and kernel.takes([wide.values]):
        return kernel_rows.distinct(wide)
    return sparse.distinct(wide, clock)
