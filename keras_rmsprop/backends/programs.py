"""A whole step as one traced program, and when it is one.

The program is `Steps.take`, traced: there is no second way to do a step. Whatever a
trace holds as a constant is in its key: the attributes of the optimizer, all of them,
as `Settings` numbers them, and what the step is given.
"""

import functools
import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rmsprop.access import without_autograph
from keras_rmsprop.backends.base import Stepper
from keras_rmsprop.backends.replay import Replay, replayed
from keras_rmsprop.sparse import unwrapped

MOST_PROGRAMS = 64
"""How many programs an optimizer keeps: an option that changes at every step would
otherwise fill the memory with traces."""
EAGER_TRACES = 4
"""How many sets of gradients and settings an optimizer traces when it first sees them.
Later ones are traced when they are seen again: what never repeats is not worth it."""
XLA_PROGRAMS = 16
"""How many programs of a process XLA compiles unless it is told to. TensorFlow never
frees what XLA compiled, some 3 to 5 MB each; what comes later runs without XLA."""

XLA_IN_GRAPH_ELEMENTS = 2**20
"""From this size on, XLA makes a variable's update faster in a graph without XLA."""
XLA_EAGER_ELEMENTS = 2**12
"""If no variable is larger, launching XLA takes as long as the step does."""


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
        self._settings = Settings()
        self._number: int | None = None

    def forget_attributes(self) -> None:
        """Say that an attribute of the optimizer was assigned."""
        self._number = None

    def run(self, stepper: Stepper, grads: list[Any], variables: Sequence[Any]) -> None:
        """Take the step as one program, where that is faster; else stage by stage.

        Args:
            stepper: Takes the step.
            grads: A tensor, slices or None for each variable.
            variables: The model's variables.
        """
        if not self.has_program(stepper, grads, variables):
            stepper.take(grads, variables)
            return
        # A variable is read inside the program. The value of anything else goes in.
        rate = stepper.learning_rate
        is_variable = isinstance(rate, keras.Variable)
        tensors, kinds = flattened(grads)
        if not is_variable:
            tensors.append(tf.convert_to_tensor(rate, dtype_hint=tf.float32))
        constraints = [v.constraint for v in variables]
        given = (
            id(rate) if is_variable else getattr(rate, "dtype", None),
            *map(id, variables),
            *[c if c is None else _key_of(c) for c in constraints],
            *kinds,
        )
        key = (*self._key(stepper), *given)
        program = self._programs.get(key)
        if program is None:
            if stepper.calls_users_python(variables):
                stepper.take(grads, variables, rate)
                return
            if len(self._programs) >= EAGER_TRACES and key not in self._programs:
                self._keep(key, None)
                stepper.take(grads, variables, rate)
                return
            state = stepper.prepare(grads, variables)
            program = _trace(
                stepper,
                rate if is_variable else None,
                grads,
                variables,
                tensors,
                state,
                xla=self._is_for_xla(stepper, variables),
            )
            Programs.compiled += program.xla
            key = (*self._key(stepper), *given)  # tracing may set attributes
        self._keep(key, program)
        program(tensors)

    def has_program(
        self, stepper: Stepper, grads: Sequence[Any], variables: Sequence[Any]
    ) -> bool:
        """Whether a step taken now should be a program of its own."""
        compiled = stepper.jit_compile
        if compiled is False or tf.config.functions_run_eagerly() or is_watched():
            return False
        if tf.executing_eagerly():
            return True
        # In a graph only XLA gains, and XLA would compile for each number of rows.
        return not (has_slices(grads) or stepper.has_blocks()) and (
            compiled is True
            or (is_large(variables) and not stepper.is_for_kernel(variables))
        )

    def _is_for_xla(self, stepper: Stepper, variables: Sequence[Any]) -> bool:
        """Whether XLA should compile a program."""
        if stepper.has_blocks():
            return False
        return stepper.jit_compile is True or (
            is_worth_xla(variables)
            and is_xla_left()
            and not stepper.is_for_kernel(variables)
        )

    def _key(self, stepper: Stepper) -> tuple[Hashable, ...]:
        """Return something equal where all is equal that a trace holds as constants."""
        if self._number is None:
            self._number = self._settings.number(stepper.attributes())
        return self._number, *stepper.also_constant()

    def _keep(self, key: Hashable, program: "_Program | None") -> None:
        """Note a program, or that it was asked for, as the most recent one."""
        self._programs[key] = program
        self._programs.move_to_end(key)
        if len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)


def is_worth_xla(variables: Sequence[Any]) -> bool:
    """Whether XLA is faster for an eager step of these variables."""
    return any(math.prod(v.shape) > XLA_EAGER_ELEMENTS for v in variables)


def is_large(variables: Sequence[Any]) -> bool:
    """Whether XLA is faster for the step of these variables in another's graph."""
    return any(math.prod(v.shape) >= XLA_IN_GRAPH_ELEMENTS for v in variables)


def is_watched() -> bool:
    """Whether TensorFlow's debugging tools look at each operation, which XLA hides.

    There is no public way to know. Without the private one the answer is no.
    """
    try:
        from tensorflow.python.eager import context

        return bool(context.context().op_callbacks)
    except (ImportError, AttributeError):
        return False


def on_all_replicas(
    stepper: Stepper,
    grads: Sequence[Any],
    variables: Sequence[Any],
    tables: Iterable[int],
) -> None:
    """Sum the gradients over the replicas; then each steps with its own copies.

    For sparse gradients only the rows travel. Every replica then has the same sums, and
    applies them to its own copies: no further communication.
    """
    distribute = tf.__internal__.distribute
    strategy = tf.distribute.get_strategy()
    replica = tf.distribute.get_replica_context()
    given = [g for g in grads if g is not None]
    if replica and given:
        summed = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, given))
        grads = [g if g is None else next(summed) for g in grads]
    if not replica:
        stepper.make_clocks(tables)
    # Replicas that cannot meet, as XLA compiles them apart, make no counter: then the
    # sum of slices becomes dense.
    elif has_slices(grads) and not distribute.strategy_supports_no_merge_call():
        replica.merge_call(without_autograph(lambda _: stepper.make_clocks(tables)))
    strategy.extended.update(
        unwrapped(variables[0]),
        without_autograph(lambda _, *grads: stepper.take(grads, variables)),
        args=tuple(grads),
        group=False,
    )


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
    """The device of these variables, if they share one: XLA runs only there."""
    owners: Any
    """The objects whose ids are its key: while it lives, no other gets these ids."""
    xla: bool
    """Whether XLA compiles it."""
    replay: Replay | None
    """Its operations, if they are so few that they are faster alone."""

    def __call__(self, tensors: list[Any]) -> None:
        """Run the step on the gradients (and the learning rate)."""
        with tf.device(self.device):
            if self.replay is not None and tf.executing_eagerly():
                self.replay(tensors)
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
    stepper: Stepper,
    rate_variable: Any,
    grads: Sequence[Any],
    variables: Sequence[Any],
    tensors: Sequence[Any],
    state: Sequence[Any],
    *,
    xla: bool,
) -> _Program:
    """Return the step as a program that takes tensors like these.

    XLA does not compile it where it updates rows, as it would compile again for each
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
        rate = next(arguments, rate_variable)
        stepper.take(traced, variables, rate, in_program=True)

    with tf.init_scope():
        function = tf.function(body, autograph=False, jit_compile=xla)
        concrete = function.get_concrete_function(*specs)
        few = None if xla else replayed(concrete)
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
