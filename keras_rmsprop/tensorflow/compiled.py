"""A whole step - unscale, clip, decay, update, average - as one XLA program.

The program is the plain step, traced: there is no second way to do a step.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rmsprop.rule import Options
from keras_rmsprop.tensorflow import joined

Step = Callable[[list[Any], Sequence[Any]], None]
"""Takes a step, given the gradients and the variables."""

MOST_PROGRAMS = 64
"""How many programs an optimizer keeps: an option that changes at every step would
otherwise fill the memory with traces. What comes later XLA does not compile: that takes
long, and TensorFlow never frees it."""


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
        tensors: list[Any] = []
        kinds: list[Any] = []
        for g in grads:
            if isinstance(g, tf.Tensor):
                tensors.append(g)
                kinds += quick_shape(g), id(g.dtype)
            elif g is None:
                kinds.append(g)
            else:
                tensors += [g.values, g.indices]
                kinds.append((g.values.shape[1:], g.dtype, g.indices.dtype))
        # A variable is read inside the program. A schedule or callable may do
        # anything in Python: its value of the moment goes in as an argument.
        if not isinstance(learning_rate, keras.Variable):
            tensors.append(tf.convert_to_tensor(learning_rate, dtype_hint=tf.float32))
        # All that a trace holds as constants. (A dtype by its id, as dtypes are slow to
        # compare.)
        key = (
            _baked_in(optimizer),
            id(learning_rate)
            if isinstance(learning_rate, keras.Variable)
            else getattr(learning_rate, "dtype", None),
            *optimizer._clocks,
            *map(id, variables),
            *map(id, map(_constraint_of, variables)),
            *kinds,
        )
        program = self._programs.pop(key, None)
        if program is None:
            optimizer._prepare(grads, variables)
            full = len(self._programs) == MOST_PROGRAMS
            if full:
                del self._programs[next(iter(self._programs))]
            program = _trace(
                optimizer, step, learning_rate, grads, variables, tensors, xla=not full
            )
        self._programs[key] = program  # as the last one to be dropped
        program(tensors)


def quick_shape(tensor: Any) -> Any:
    """Return a tensor's shape, to be compared with others of this function.

    The public one takes 2 us for every new gradient, ten times as long as this, which
    is not documented.
    """
    shape_of = getattr(tensor, "_shape_tuple", None)
    return tensor.shape if shape_of is None else shape_of()


_constraint_of = operator.attrgetter("constraint")
_baked_in = operator.attrgetter(
    *Options._fields,
    "centered",
    "decoupled_weight_decay",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "skip_nonfinite",
    "sparse_update",
)


class _Program(NamedTuple):
    """A traced step."""

    concrete: Any
    """The `tf.types.experimental.ConcreteFunction`."""
    captured: list[Any]
    """The handles of the variables that it reads and writes."""
    device: str | None
    """Where these variables are, if in one place: XLA runs there and nowhere else."""
    owners: Any
    """The objects whose ids are its key: while it lives, no other gets these ids."""

    def __call__(self, tensors: list[Any]) -> None:
        """Run the step on the gradients (and the learning rate)."""
        with tf.device(self.device):
            if not self._call_inner(tensors):
                self.concrete(*tensors)

    def _call_inner(self, tensors: list[Any]) -> bool:
        """Call the traced function directly, or return False where that cannot be.

        `tf.function` spends some 10 us a tensor on checking arguments that the key
        has checked already. This way in is not documented, so it stands here alone.
        """
        inner: Any = getattr(self.concrete, "inference_fn", None)
        if not hasattr(inner, "call_flat") or not tf.executing_eagerly():
            return False
        inner.call_flat(*tensors, *self.captured)
        return True


def _trace(
    optimizer: Any,
    step: Step,
    learning_rate: Any,
    grads: list[Any],
    variables: Sequence[Any],
    tensors: list[Any],
    *,
    xla: bool,
) -> _Program:
    """Return the step as a program that takes tensors like these.

    If `xla`, XLA compiles it, but not where it updates rows, as XLA would compile anew
    for each number of them, nor where the variables are on several devices, nor, unless
    told to, where all are small: then it takes as long to launch as the step does.
    """
    xla = xla and not any(isinstance(g, tf.IndexedSlices) for g in grads)
    if optimizer.jit_compile is not True:
        xla = xla and not all(map(joined.is_small, variables))
    devices = {v.handle.device for v in [*variables, *optimizer.variables]}
    specs = []
    for g in grads:
        if isinstance(g, tf.IndexedSlices):
            specs.append(tf.TensorSpec([None, *g.values.shape[1:]], g.dtype))
            specs.append(tf.TensorSpec([None], g.indices.dtype))
        elif g is not None:
            specs.append(tf.TensorSpec(g.shape, g.dtype))
    specs += [tf.TensorSpec(t.shape, t.dtype) for t in tensors[len(specs) :]]

    def body(*tensors: Any) -> None:
        arguments = iter(tensors)
        traced = []
        for g in grads:
            if isinstance(g, tf.IndexedSlices):
                traced.append(tf.IndexedSlices(next(arguments), next(arguments)))
            else:
                traced.append(g if g is None else next(arguments))
        with optimizer._traced_with(next(arguments, learning_rate)):
            step(traced, variables)

    with tf.init_scope():
        concrete = tf.function(
            body, autograph=False, jit_compile=xla and len(devices) == 1
        ).get_concrete_function(*specs)
    return _Program(
        concrete,
        concrete.captured_inputs,
        devices.pop() if len(devices) == 1 else None,
        (variables, [v.constraint for v in variables], learning_rate),
    )
