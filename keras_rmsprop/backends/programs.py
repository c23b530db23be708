"""A whole step - unscale, clip, decay, update, average - as one traced program.

The program is the plain step, traced: there is no second way to do a step. Whatever a
trace holds as a constant is in its key: the attributes of the optimizer, all of them,
as `Settings` numbers them, and what the step is given.
"""

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rmsprop.backends.short import Short, short

MOST_PROGRAMS = 64
"""How many programs an optimizer keeps: an option that changes at every step would
otherwise fill the memory with traces."""
EAGER_TRACES = 4
"""How many sets of gradients and settings an optimizer traces when it first sees them.
Later ones are traced when they are seen again: what never repeats is not worth it."""
XLA_PROGRAMS = 16
"""How many programs of a process XLA compiles unless it is told to. TensorFlow never
frees what XLA compiled, some 3 to 5 MB each; what comes later runs without XLA."""

Step = Callable[[Sequence[Any], Sequence[Any], Any, bool], None]
"""Takes a step, given the gradients, the variables, the learning rate, and whether it
is traced for a program."""


class Settings:
    """The attributes of an object, as a number: equal where all of them are equal.

    An attribute that is no plain value (a list, a layer, a function) is compared by
    identity, so what changes inside it goes unseen. None is kept alive.

    Example:
        >>> settings = Settings()
        >>> [settings.number({"rho": rho}) for rho in (0.9, 0.5, 0.9)]
        [0, 1, 0]
    """

    def __init__(self) -> None:
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._count = itertools.count()
        self._objects = Identities()

    def number(self, attributes: Mapping[str, Any]) -> int:
        """Return the number of these attributes.

        Args:
            attributes: As of `vars`.
        """
        key = tuple(
            (name, *self._objects.comparable(x))
            for name, x in attributes.items()
            if not name.startswith("_self_")  # TensorFlow's notes for checkpoints
        )
        if key not in self._numbers:
            self._numbers[key] = next(self._count)
        self._numbers.move_to_end(key)
        if len(self._numbers) > MOST_PROGRAMS:
            self._numbers.popitem(last=False)
        return self._numbers[key]


class Identities:
    """A number for each object, like its id, but never used again for another."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}
        self._count = itertools.count()

    def comparable(self, x: Any) -> tuple[type, Hashable]:
        """Return something equal for equal plain values and for the same objects."""
        if x is None or isinstance(x, bool | int | float | str):
            return type(x), x
        if isinstance(x, tuple):
            return type(x), tuple(map(self.comparable, x))
        return type(x), self._number(x)

    def _number(self, x: Any) -> int:
        key = id(x)
        if key not in self._known or self._known[key][0]() is not x:
            try:
                reference = weakref.ref(x, lambda _: self._known.pop(key, None))
            except TypeError:  # a plain list, say: it is kept
                reference = functools.partial(_itself, x)  # type: ignore[assignment]
            self._known[key] = reference, next(self._count)
        return self._known[key][1]


def _itself(x: Any) -> Any:
    return x


class Programs:
    """The traced steps of one optimizer: one for each set of gradients."""

    compiled = 0
    """How many of a process XLA has compiled."""

    def __init__(self) -> None:
        self._programs: OrderedDict[Hashable, _Program | None] = OrderedDict()

    def run(
        self,
        step: Step,
        grads: list[Any],
        variables: Sequence[Any],
        *,
        settings: Callable[[], Hashable],
        learning_rate: Any,
        prepare: Callable[[], Sequence[Any]],
        xla: Callable[[], bool],
    ) -> None:
        """Take the step as one program; trace it first where it is worth it.

        Args:
            step: The plain step.
            grads: A tensor, slices or None for each variable.
            variables: The model's variables.
            settings: Returns something that is equal where all is equal that a trace
                of `step` holds as constants, besides what is given here.
            learning_rate: A Keras variable, which is read inside the program; or
                the value of the moment of anything else, which goes in as an argument.
            prepare: Called before a trace; returns the optimizer's variables.
            xla: Returns whether XLA should compile it.
        """
        tensors, kinds = flattened(grads)
        constraints = [v.constraint for v in variables]
        is_variable = isinstance(learning_rate, keras.Variable)
        if not is_variable:
            tensors.append(tf.convert_to_tensor(learning_rate, dtype_hint=tf.float32))
        given = (
            id(learning_rate) if is_variable else getattr(learning_rate, "dtype", None),
            *map(id, variables),
            *[c if c is None else _key_of(c) for c in constraints],
            *kinds,
        )
        key = (settings(), *given)
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) >= EAGER_TRACES and key not in self._programs:
                self._keep(key, None)
                step(grads, variables, learning_rate, False)
                return
            traced = _trace(
                step,
                learning_rate if is_variable else None,
                grads,
                variables,
                tensors,
                prepare(),
                xla=xla(),
            )
            Programs.compiled += traced.xla
            program, key = traced, (settings(), *given)  # tracing may set attributes
        self._keep(key, program)
        program(tensors)

    def _keep(self, key: Hashable, program: "_Program | None") -> None:
        """Note a program, or that it was asked for, as the most recent one."""
        self._programs[key] = program
        self._programs.move_to_end(key)
        if len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)


def is_xla_left() -> bool:
    """Whether XLA may compile one more program without being told to."""
    return Programs.compiled < XLA_PROGRAMS


def flattened(grads: Sequence[Any]) -> tuple[list[Any], list[Hashable]]:
    """Return the tensors in gradients, and what a trace holds of each as constants."""
    tensors: list[Any] = []
    kinds: list[Hashable] = []
    for g in grads:
        if isinstance(g, tf.Tensor):
            tensors.append(g)
            kinds += quick_kind(g)
        elif g is None:
            kinds.append(g)
        else:
            tensors += [g.values, g.indices]
            kinds.append((g.values.shape[1:], g.dtype, g.indices.dtype))
    return tensors, kinds


def quick_kind(tensor: Any) -> tuple[Hashable, Hashable]:
    """Return a tensor's shape and dtype, to be compared with others of this function.

    The public ones take 2 us for every new gradient, ten times as long as these, which
    are not documented.
    """
    try:
        return tensor._shape_tuple(), tensor._datatype_enum()
    except AttributeError:
        return tensor.shape, tensor.dtype


def _key_of(constraint: Any) -> Hashable:
    """Return something that changes as a constraint does."""
    attributes = getattr(constraint, "__dict__", {}).values()
    plain = (x for x in attributes if isinstance(x, bool | int | float | str))
    return id(constraint), *plain


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
    xla: bool
    """Whether XLA compiles it."""
    short: Short | None
    """Its operations, if they are so few that they are faster alone."""

    def __call__(self, tensors: list[Any]) -> None:
        """Run the step on the gradients (and the learning rate)."""
        with tf.device(self.device):
            if self.short is not None and tf.executing_eagerly():
                self.short(tensors)
            elif not self._call_inner(tensors):
                self.concrete(*tensors)

    def _call_inner(self, tensors: list[Any]) -> bool:
        """Call the traced function directly, or return False if that is not possible.

        `tf.function` spends some 10 us a tensor on checking arguments that the key
        has checked already. This way in is not documented, so it stands here alone.
        """
        inner: Any = getattr(self.concrete, "inference_fn", None)
        if not hasattr(inner, "call_flat") or not tf.executing_eagerly():
            return False
        inner.call_flat(*tensors, *self.captured)
        return True


def _trace(
    step: Step,
    rate_variable: Any,
    grads: Sequence[Any],
    variables: Sequence[Any],
    tensors: Sequence[Any],
    state: Sequence[Any],
    *,
    xla: bool,
) -> _Program:
    """Return the step as a program that takes tensors like these.

    XLA does not compile it where it updates rows, as it would compile anew for each
    number of them, nor where the variables are on several devices.
    """
    devices = {v.handle.device for v in [*variables, *state]}
    xla = xla and len(devices) == 1 and not has_slices(grads)
    specs = []
    for g in grads:
        if is_slices(g):
            specs.append(tf.TensorSpec([None, *g.values.shape[1:]], g.dtype))
            specs.append(tf.TensorSpec([None], g.indices.dtype))
        elif g is not None:
            specs.append(tf.TensorSpec(g.shape, g.dtype))
    specs += [tf.TensorSpec(t.shape, t.dtype) for t in tensors[len(specs) :]]

    def body(*tensors: Any) -> None:
        arguments = iter(tensors)
        traced = []
        for g in grads:
            if is_slices(g):
                traced.append(tf.IndexedSlices(next(arguments), next(arguments)))
            else:
                traced.append(g if g is None else next(arguments))
        step(traced, variables, next(arguments, rate_variable), True)

    with tf.init_scope():
        function = tf.function(body, autograph=False, jit_compile=xla)
        concrete = function.get_concrete_function(*specs)
        few = None if xla else short(concrete)
    return _Program(
        concrete,
        concrete.captured_inputs,
        devices.pop() if len(devices) == 1 else None,
        (variables, [v.constraint for v in variables], rate_variable),
        xla,
        few,
    )


def has_slices(grads: Sequence[Any]) -> bool:
    """Whether a gradient is a sparse one."""
    return any([is_slices(g) for g in grads if not isinstance(g, tf.Tensor)])


def is_slices(gradient: Any) -> bool:
    """Whether this gradient is a sparse one."""
    # To ask whether it is slices takes four times as long.
    return not (gradient is None or isinstance(gradient, tf.Tensor))
