"""The data of a step: what happens to each variable, and what is the same for all."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_rmsprop import codecs, rule
from keras_rmsprop.ema_share import Share
from keras_rmsprop.rule import Slots

Change = tuple[Any, Slots]
"""What to subtract from the weights, and the new slots: tensors, before encoding."""


class Part(NamedTuple):
    """A variable of the model with its gradient, on its way through a step."""

    variable_index: int
    """Its index among the variables that the optimizer was built with."""
    variable: Any
    gradient: Any
    """A tensor of the variable's shape, or of its rows' with `ids`."""
    ids: Any = None
    """The distinct rows of a table that have a gradient; None: all."""


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
    """The rows of a table (`sparse.Rows`); None: it has no last-update counter."""
    average: Any = None
    """Keeps the EMA of the weights, which may be updated in the same pass, or None."""

    @property
    def dtype(self) -> str:
        """The dtype in which it is computed."""
        return rule.wide(self.variable.dtype, self.slots.velocity.dtype)


class Sought(NamedTuple):
    """A learning rate that is yet to be found: by the update itself, or before it."""

    parts: Sequence[Any]
    """All variables of the search (`estimate.Sampled`)."""
    estimate: Any
    """The variable that keeps the `estimate.Estimate`."""
    factor: Any
    numbers: tuple[float, ...]
    """See `estimate.numbers`."""
    find: Callable[[], Any]
    """Finds it before the update; returns it."""


class Constants(NamedTuple):
    """What is the same for all variables of a step."""

    options: rule.Options
    learning_rate: Any
    """A scalar; or a `Sought`, if there is a kernel."""
    draw: codecs.Draw
    """The number of updates so far, and what else stochastic rounding depends on."""
    decoupled_weight_decay: bool = True
    scale: Any = None
    """What gradients are multiplied by; None: 1."""
    kernel: bool = False
    """Whether the native kernel may run the update."""
    share: Share | None = None
    """The decay rate of the EMA of the weights; None: it is not updated with them."""
    count: Any = None
    """A counter that the update may increment, as it is the last stage; or None."""

    def change(
        self,
        gradient: Any,
        weights: Any,
        slots: Slots,
        *,
        dtype: str,
        decay: Any = None,
        mean: Callable[[Any], Any] = rule.mean_of_all,
        accumulate: Callable[[Any, Any, Any], Any] = rule.accumulate,
    ) -> Change:
        """Return what to subtract from the weights, and the new slots.

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
        change, new = rule.step(
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
            # `ops.cast`, not `rule.cast`: to float32 first, as Keras does.
            change = change + rate * ops.cast(decay, dtype) * weights
        return change, new


class Way(NamedTuple):
    """How a variable is updated, in words, and why."""

    name: str
    why: str


def same(x: Any) -> Hashable:
    """Return something equal for equal numbers; a variable or array is itself only."""
    return x if x is None or isinstance(x, int | float) else id(x)


def update_one(
    update: Update,
    constants: Constants,
    assign: Callable[[Any, Any], None] | None = None,
    assign_sub: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Update one variable; return its new velocity, as it is stored.

    Args:
        update: What to do to it.
        constants: What is the same for all variables.
        assign: Sets a slot to a value; None: by its own `assign`.
        assign_sub: Subtracts from the variable; None: by its own `assign_sub`.
    """
    variable, gradient, slots, decay, *_ = update
    given, weights, mean = gradient, variable, rule.mean_of_all
    if codecs.of(slots.velocity).in_blocks:
        # All in the layout of the slots: XLA vectorises nothing across a reshape.
        given = codecs.as_blocks(gradient)
        weights = weights if decay is None else codecs.as_blocks(variable)
        mean = functools.partial(rule.mean_of_all, size=math.prod(variable.shape))
    change, new = constants.change(
        given, weights, slots, dtype=update.dtype, decay=decay, mean=mean
    )
    if given is not gradient:
        change = codecs.from_blocks(change, variable.shape)
    new = codecs.encoded(slots, new, constants.draw)
    for slot, value in zip(slots, new, strict=True):
        if slot is not None:
            slot.assign(value) if assign is None else assign(slot, value)
    change = ops.cast(change, variable.dtype)
    if assign_sub is None:
        variable.assign_sub(change)
    else:
        assign_sub(variable, change)
    return new.velocity


def update_in_turn(
    updates: Sequence[Update], constants: Constants, *, in_one_program: bool
) -> None:
    """Update some variables, one after the other.

    In one program, XLA would decode all 8-bit slots before it updates any. So a
    gradient waits for what the variable before it leaves behind.
    """
    done = None
    for update in updates:
        waits = in_one_program and codecs.are_in_blocks(update.slots)
        if waits and done is not None:
            zero = ops.cast(0.0 * done, update.gradient.dtype)
            update = update._replace(gradient=update.gradient + zero)
        velocity = update_one(update, constants)
        if waits:
            done = ops.cast(velocity[0, 0], "float32")  # a code, and so finite
