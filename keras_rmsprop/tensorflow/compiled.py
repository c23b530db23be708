"""A whole step - unscale, clip, decay, update, average - as one XLA program.

The program is Keras' own `apply`, traced: there is no second way to do a step.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

Apply = Callable[[Sequence[Any], Sequence[Any] | None], None]

LARGE = 2**20
"""Elements from which a variable gains from XLA in a graph that is not compiled."""


def apply(
    optimizer: Any, plain: Apply, grads: Sequence[Any], variables: Sequence[Any] | None
) -> None:
    """Apply gradients, as an XLA program where that is possible and faster.

    Args:
        optimizer: The optimizer, with a `Programs` as its `_programs`.
        plain: Keras' own `apply` of that optimizer.
        grads: A gradient or None for each variable.
        variables: The variables, or None: those that the optimizer was built with.
    """
    if not grads or (variables is None and not optimizer.built):
        return plain(grads, variables)  # nothing to do, or Keras' own error
    if variables is None:
        variables = optimizer._trainable_variables
    if not optimizer.built:
        optimizer.build(list(variables))
    if len(grads) != len(variables):
        raise ValueError(
            "There must be one gradient, or None, for each variable. "
            f"Received: {len(grads)} gradients for {len(variables)} variables"
        )
    grads = [_dense(g, v) for g, v in zip(grads, variables, strict=True)]
    if _compiles_here(optimizer.jit_compile, variables):
        optimizer._programs.run(optimizer, plain, grads, variables)
    else:
        _check_shapes(grads, variables)
        plain(grads, variables)


def _dense(gradient: Any, variable: Any) -> Any:
    """Return the gradient as a dense tensor, None as it is."""
    if isinstance(gradient, tf.Tensor) or gradient is None:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(
            gradient.values, gradient.indices, variable.shape[0]
        )
    return keras.ops.convert_to_tensor(gradient, variable.dtype)


def _check_shapes(grads: Sequence[Any], variables: Sequence[Any]) -> None:
    for gradient, variable in zip(grads, variables, strict=True):
        if gradient is not None and not gradient.shape.is_compatible_with(
            variable.shape
        ):
            raise ValueError(
                "A gradient must have the shape of its variable. Received: "
                f"shape {tuple(gradient.shape)} for variable {variable.name!r} "
                f"of shape {tuple(variable.shape)}"
            )


def _compiles_here(jit_compile: bool | str, variables: Sequence[Any]) -> bool:
    """Whether a step taken here and now should be an XLA program of its own."""
    if (
        jit_compile is False
        or tf.distribute.has_strategy()
        or tf.config.functions_run_eagerly()
    ):
        return False
    return (
        tf.executing_eagerly()
        or jit_compile is True
        or any(math.prod(v.shape) >= LARGE for v in variables)
    )


class Programs:
    """The XLA programs of one optimizer, each traced once for a set of gradients."""

    def __init__(self) -> None:
        self._programs: dict[Any, _Program] = {}

    def run(
        self, optimizer: Any, plain: Apply, grads: list[Any], variables: Sequence[Any]
    ) -> None:
        """Take the step as one program; trace it first where it is a new one."""
        learning_rate = optimizer.learning_rate
        tensors = [g for g in grads if g is not None]
        # A variable is read inside the program. A schedule or callable may do
        # anything in Python: its value of the moment goes in as an argument.
        if not isinstance(learning_rate, keras.Variable):
            tensors.append(tf.convert_to_tensor(learning_rate, dtype_hint=tf.float32))
            learning_rate = None
        key = (
            _baked_in(optimizer),
            id(learning_rate),
            *map(id, variables),
            *(g if g is None else (g.shape, g.dtype) for g in grads),
        )
        if key not in self._programs:
            _check_shapes(grads, variables)
            self._programs[key] = _trace(
                optimizer, plain, grads, variables, learning_rate, tensors
            )
        self._programs[key](tensors)


_baked_in = operator.attrgetter(
    "rho",
    "momentum",
    "epsilon",
    "centered",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)
"""What a trace holds as constants; the learning rate is not among them."""


class _Program(NamedTuple):
    """A traced step."""

    concrete: Any
    """The `tf.types.experimental.ConcreteFunction`."""
    captured: list[Any]
    """The handles of the variables that it reads and writes."""
    owners: Any
    """The objects whose ids are its key: while it lives, no other gets these ids."""

    def __call__(self, tensors: list[Any]) -> None:
        """Run the step on the gradients (and the learning rate)."""
        if not self._call_inner(tensors):
            self.concrete(*tensors)

    def _call_inner(self, tensors: list[Any]) -> bool:
        """Call the traced function directly, or return False where that cannot be.

        `tf.function` spends some 10 us a tensor on checking arguments that the key
        has checked already. This way in is not documented, so it stands here alone.
        """
        inner = getattr(self.concrete, "inference_fn", None)
        if not hasattr(inner, "call_preflattened") or not tf.executing_eagerly():
            return False
        inner.call_preflattened(tensors + self.captured)
        return True


def _trace(
    optimizer: Any,
    plain: Apply,
    grads: list[Any],
    variables: Sequence[Any],
    learning_rate: Any,
    tensors: list[Any],
) -> _Program:
    """Return `plain(grads, variables)` as a program that takes `tensors`."""

    def step(*tensors: Any) -> None:
        arguments = iter(tensors)
        traced = [g if g is None else next(arguments) for g in grads]
        with optimizer.fixed_learning_rate(next(arguments, None)):
            plain(traced, variables)

    devices = {v.handle.device for v in variables}
    with tf.init_scope():
        concrete = tf.function(
            step, autograph=False, jit_compile=len(devices) == 1
        ).get_concrete_function(*(tf.TensorSpec(t.shape, t.dtype) for t in tensors))
    return _Program(concrete, concrete.captured_inputs, (variables, learning_rate))
