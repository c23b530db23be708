"""A whole step - unscale, clip, decay, update, average - as one XLA program.

The program is the plain step, traced: there is no second way to do a step.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

Step = Callable[[list[Any], Sequence[Any]], None]
"""Takes a step, given the gradients and the variables."""


class Programs:
    """The traced steps of one optimizer: one for each set of gradients."""

    def __init__(self) -> None:
        self._programs: dict[Any, _Program] = {}

    def run(
        self, optimizer: Any, step: Step, grads: list[Any], variables: Sequence[Any]
    ) -> None:
        """Take the step as one program; trace it first where it is a new one.

        Args:
            optimizer: The optimizer.
            step: Its plain step.
            grads: A tensor, slices or None for each variable.
            variables: Variables that the optimizer was built with.
        """
        learning_rate = optimizer.learning_rate
        tensors = []
        for g in grads:
            if isinstance(g, tf.IndexedSlices):
                tensors += [g.values, g.indices]
            elif g is not None:
                tensors.append(g)
        # A variable is read inside the program. A schedule or callable may do
        # anything in Python: its value of the moment goes in as an argument.
        if not isinstance(learning_rate, keras.Variable):
            tensors.append(tf.convert_to_tensor(learning_rate, dtype_hint=tf.float32))
            learning_rate = None
        key = (
            _baked_in(optimizer),
            id(learning_rate),
            *map(id, variables),
            *(
                (g.values.shape[1:], g.dtype, g.indices.dtype)
                if isinstance(g, tf.IndexedSlices)
                else (g.shape, g.dtype)
                for g in grads
                if g is not None
            ),
            *(i for i, g in enumerate(grads) if g is None),
        )
        if key not in self._programs:
            self._programs[key] = _trace(
                optimizer, step, grads, variables, learning_rate, tensors
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
    "nesterov",
    "sparse_update",
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
        inner: Any = getattr(self.concrete, "inference_fn", None)
        if not hasattr(inner, "call_preflattened") or not tf.executing_eagerly():
            return False
        inner.call_preflattened(tensors + self.captured)
        return True


def _trace(
    optimizer: Any,
    step: Step,
    grads: list[Any],
    variables: Sequence[Any],
    learning_rate: Any,
    tensors: list[Any],
) -> _Program:
    """Return the step as a program that takes tensors like these.

    It is compiled with XLA, but not where it updates rows, as XLA would compile anew
    for each number of them, nor where the variables are on several devices.
    """
    sparse = any(isinstance(g, tf.IndexedSlices) for g in grads)
    devices = {v.handle.device for v in variables}

    def body(*tensors: Any) -> None:
        arguments = iter(tensors)
        traced = []
        for g in grads:
            if isinstance(g, tf.IndexedSlices):
                traced.append(tf.IndexedSlices(next(arguments), next(arguments)))
            else:
                traced.append(g if g is None else next(arguments))
        with optimizer.fixed_learning_rate(next(arguments, None)):
            step(traced, variables)

    def spec(tensor: Any) -> tf.TensorSpec:
        rows_vary = sparse and tensor.shape.rank
        shape = [None, *tensor.shape[1:]] if rows_vary else tensor.shape
        return tf.TensorSpec(shape, tensor.dtype)

    with tf.init_scope():
        concrete = tf.function(
            body, autograph=False, jit_compile=not sparse and len(devices) == 1
        ).get_concrete_function(*map(spec, tensors))
    return _Program(concrete, concrete.captured_inputs, (variables, learning_rate))
