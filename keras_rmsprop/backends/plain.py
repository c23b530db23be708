"""A step as data, and how it is taken on any backend of Keras, variable by variable."""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rmsprop import codecs, rule, skipping
from keras_rmsprop.rule import Slots

Taken = tuple[Any, Slots]
"""What a step takes from the weights, and the new slots: tensors, before encoding."""


class Update(NamedTuple):
    """What a step does to one variable."""

    variable: Any
    gradient: Any
    """A tensor of the variable's shape, or of its rows'."""
    slots: Slots
    """The variables that keep them."""
    decay: Any = None
    """The weight decay of this variable; None: none."""
    rows: Any = None
    """The rows of a table (`sparse.Rows`); None: it has no clock."""
    average: Any = None
    """Keeps the average of the weights; it may follow in the same pass. None: not."""

    @property
    def dtype(self) -> str:
        """The dtype in which it is computed."""
        return rule.wide(self.variable.dtype, self.slots.velocity.dtype)


class Step(NamedTuple):
    """What is the same for all variables of a step."""

    options: rule.Options
    learning_rate: Any
    draw: codecs.Draw
    """The number of steps so far, and what else random rounding depends on."""
    decoupled_weight_decay: bool = True
    scale: Any = None
    """What gradients are to be multiplied by; None: 1."""
    native: bool = False
    """Whether a native kernel may take it."""
    share: Callable[[Any], Any] | None = None
    """Returns how much of an average stays when it follows, in a dtype.

    None: the averages do not follow now."""

    def taken(
        self,
        gradient: Any,
        weights: Any,
        slots: Slots,
        *,
        dtype: str,
        decay: Any = None,
        mean: Callable[[Any], Any] = rule.mean_of_all,
        accumulate: Callable[[Any, Any, Any], Any] = rule.accumulate,
    ) -> Taken:
        """Return what the step takes from the weights, and the new slots.

        Args:
            gradient: A tensor.
            weights: A tensor of the same shape; read with weight decay only.
            slots: Tensors or variables of the same shape.
            dtype: The dtype in which to compute.
            decay: The weight decay, or None.
            mean: See `rule.step`.
            accumulate: See `rule.step`.
        """
        rate = ops.cast(self.learning_rate, dtype)
        weights = None if decay is None else ops.cast(weights, dtype)
        l2 = decay is not None and not self.decoupled_weight_decay
        corrects = self.options.bias_correction
        gradient = ops.cast(gradient, dtype)
        if self.scale is not None:
            gradient = gradient * ops.cast(self.scale, dtype)
        taken, new = rule.step(
            gradient,
            codecs.decoded(slots, dtype, gradient.shape),
            rate,
            self.options.cast(dtype),
            # Traced for each variable, so only where it is read.
            t=ops.cast(self.draw.step + 1, dtype) if corrects else None,
            penalty=rule.cast(decay, dtype) * weights if l2 else None,
            mean=mean,
            accumulate=accumulate,
        )
        if decay is not None and not l2:
            # The constant in float32 first, as in Keras.
            taken = taken + rate * ops.cast(decay, dtype) * weights
        return taken, new


class Request(NamedTuple):
    """What a runner needs to know about an optimizer's step."""

    jit_compile: bool | str
    attributes: Mapping[str, Any]
    """The optimizer's, all of them."""
    also: Callable[[], tuple[Any, ...]]
    """Returns what else a trace holds as constants; something hashable."""
    learning_rate: Callable[[], Any]
    """Returns a variable, or the value of the moment of what is none."""
    make_clocks: Callable[[], None]
    """Makes the clocks of tables that get one with this step."""
    prepare: Callable[[], Sequence[Any]]
    """Checks the gradients, builds; returns the optimizer's variables."""
    is_for_kernel: Callable[[], bool]
    """Returns whether a native kernel takes nearly all of it."""
    in_blocks: Callable[[], bool] = lambda: False
    """Returns whether slots are kept in blocks, to be decoded one after the other."""


def same(x: Any) -> Hashable:
    """Return something equal for equal numbers; a variable or array is itself only."""
    return x if x is None or isinstance(x, int | float) else id(x)


class Way(NamedTuple):
    """How a variable is updated, in words, and why."""

    name: str
    why: str


HAS_ROWS = False
"""Whether a step may update only some rows of a table, with a clock."""

outside_functions = contextlib.nullcontext
"""Context in which variables are made at once, even while a function is traced."""


def as_gradient(gradient: Any, variable: Any) -> Any:
    """Return one gradient, as `as_gradients` does."""
    if hasattr(gradient, "todense"):
        return gradient.todense()
    if gradient is None or ops.is_tensor(gradient):
        return gradient
    if isinstance(gradient, np.ndarray) and np.iscomplexobj(gradient):
        return gradient  # to be refused; a cast would take the real part
    return ops.convert_to_tensor(gradient, variable.dtype)


def as_gradients(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Return gradients as tensors, None as it is; a sparse one of JAX is dense."""
    return list(map(as_gradient, grads, variables))


class NoClocks(tuple[int, ...]):
    """The clocks of tables: here there are none."""

    refused: frozenset[Any] = frozenset()


def clocks(*_: Any) -> NoClocks:
    """Return the clocks of an optimizer's tables; see `sparse.Clocks`."""
    return NoClocks()


def widened(gradient: Any) -> Any:
    """Return a gradient in float32 at least.

    In float16 norms overflow, and what was scaled up underflows.
    """
    wide = _wider(gradient.dtype)
    return gradient if wide is None else ops.cast(gradient, wide)


@functools.cache  # Keras takes longer to name a dtype than many operations do
def _wider(dtype: Any) -> str | None:
    """Return the dtype to widen this one to; None if it is wide."""
    name = keras.backend.standardize_dtype(dtype)
    return None if rule.wide(name) == name else rule.wide(name)


def check(gradient: Any, variable: Any) -> None:
    """Fail if a gradient does not fit its variable by its shape or dtype."""
    if gradient is None:
        return
    if not isinstance(variable, keras.Variable):
        raise TypeError(
            f"Gradients must come with variables. Received: {type(variable).__name__}"
        )
    dtype = keras.backend.standardize_dtype(gradient.dtype)
    if "float" not in dtype:
        raise TypeError(
            "A gradient must be of floating point numbers. "
            f"Received: {dtype} for variable {variable.name!r}"
        )
    expected, received = tuple(variable.shape), tuple(gradient.shape)
    if received != expected:
        raise ValueError(
            "A gradient must have the shape of its variable. Received: "
            f"shape {received} for variable {variable.name!r} of shape {expected}"
        )


def update(
    updates: Sequence[Update], step: Step, *, in_program: bool = False
) -> list[Any]:
    """Take the step, one variable after the other; see `tensorflow.update`."""
    update_in_turn(updates, step, in_one_program=inside_xla())
    return []


def update_in_turn(
    updates: Sequence[Update], step: Step, *, in_one_program: bool
) -> None:
    """Take the step of some variables, one after the other.

    In one program, XLA would decode all slots in blocks before it updates any. So a
    gradient waits for what the variable before it leaves behind.
    """
    done = None
    for one in updates:
        is_to_wait = in_one_program and codecs.are_in_blocks(one.slots)
        if is_to_wait and done is not None:
            zero = ops.cast(0.0 * done, one.gradient.dtype)
            one = one._replace(gradient=one.gradient + zero)
        velocity = update_one(one, step)
        if is_to_wait:
            done = ops.cast(velocity[0, 0], "float32")  # a code, and so finite


def update_one(
    one: Update,
    step: Step,
    assign: Callable[[Any, Any], None] | None = None,
    assign_sub: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Take the step of one variable; return its new velocity, as it is kept.

    Args:
        one: The update.
        step: The step.
        assign: Sets a slot to a value; None: by its own `assign`.
        assign_sub: Subtracts from the variable; None: by its own `assign_sub`.
    """
    variable, gradient, slots, decay, *_ = one
    given, weights, mean = gradient, variable, rule.mean_of_all
    if codecs.of(slots.velocity).in_blocks:
        # All in the layout of the slots: XLA vectorises nothing across a reshape.
        given = codecs.as_blocks(gradient)
        weights = weights if decay is None else codecs.as_blocks(variable)
        mean = functools.partial(rule.mean_of_all, size=math.prod(variable.shape))
    taken, new = step.taken(
        given, weights, slots, dtype=one.dtype, decay=decay, mean=mean
    )
    if given is not gradient:
        taken = codecs.from_blocks(taken, variable.shape)
    new = codecs.encoded(slots, new, step.draw)
    for slot, value in zip(slots, new, strict=True):
        if slot is not None:
            slot.assign(value) if assign is None else assign(slot, value)
    taken = ops.cast(taken, variable.dtype)
    if assign_sub is None:
        variable.assign_sub(taken)
    else:
        assign_sub(variable, taken)
    return new.velocity


def way(one: Update, step: Step, *, in_program: bool = False) -> Way:
    """Say how `update` updates a variable, and why."""
    return Way("on its own", "operation by operation")


def kinds_of_steps(
    variables: Sequence[Any],
    jit_compile: bool | str,
    is_for_kernel: bool,
    in_blocks: bool = False,
) -> dict[str, dict[str, bool]]:
    """Return the kinds of steps, in words, and the arguments of `way` for each."""
    return {"A step is part of what Keras' backend makes of it:": {}}


class Runner:
    """Takes an optimizer's steps, here and now."""

    def forget_settings(self) -> None:
        """Say that an attribute of the optimizer was assigned."""

    def run(
        self,
        step: Callable[..., None],
        grads: list[Any],
        variables: Sequence[Any],
        request: Request,
    ) -> None:
        """Take a step; see `tensorflow.Runner`."""
        step(grads, variables)


def as_taken(
    grads: Sequence[Any],
    variables: Sequence[Any],
    clocks: Sequence[Any],
    native: Sequence[Any] = (),
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return gradients in float32 at least; see `tensorflow.as_taken`."""
    if any(map(_wider, {g.dtype for g in grads if g is not None})):
        grads = [g if g is None else widened(g) for g in grads]
    return list(grads), [None] * len(grads), []


def after(operations: Sequence[Any]) -> Any:
    """Return the context in which all waits for operations: here it always does."""
    return contextlib.nullcontext()


def assign_everywhere(variable: Any, value: Any) -> None:
    """Set a variable; see `tensorflow.assign_everywhere`."""
    variable.assign(value)


def is_for_kernel(updates: Sequence[Update], step: Step) -> bool:
    """Whether a native kernel takes all of these updates: here there is none."""
    return False


def why_no_kernel() -> str:
    """Return why there is none although the backend can have one; else nothing."""
    return ""


def searching_kernel(variables: Sequence[Any]) -> Any:
    """Return the kernel that may follow variables of a search: here there is none."""
    return None


def scale_of_global_norm(
    grads: Sequence[Any], most: float, native: Sequence[Any]
) -> Any:
    """Return what clips the global norm; see `tensorflow.scale_of_global_norm`."""
    return None


def all_finite(grads: Sequence[Any], native: Sequence[Any]) -> Any:
    """Return whether all elements of all gradients are finite, a bool tensor."""
    return skipping.all_finite(grads, fold=folds())


def folds() -> bool:
    """Whether to reduce in parts, see `folding`: they must not be on other devices."""
    return inside_xla() and keras.distribution.distribution() is None


def inside_xla() -> bool:
    """Whether the step is a part of what XLA compiles."""
    return keras.backend.backend() == "jax"


def has_slices(grads: Sequence[Any]) -> bool:
    """Whether a gradient is a sparse one that the backend treats as such."""
    return False


def is_slices(gradient: Any) -> bool:
    """Whether this gradient is a sparse one that the backend treats as such."""
    return False


def is_eager() -> bool:
    """Whether this runs now, and is not being traced."""
    return True
