"""Variables that are not updated on their own: small ones, and those with 8-bit state.

Where each operation is run on its own, an operation on a bias costs more than what it
computes. So small variables are concatenated, and the formula runs once for all. Those
with 8-bit state are updated one after the other.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop.backends.programs import (
    XLA_IN_GRAPH_ELEMENTS,
    Programs,
    is_xla_left,
)
from keras_rmsprop.rule import Slots
from keras_rmsprop.sparse import inside_xla
from keras_rmsprop.update import Constants, Update, same, update_one
from keras_rmsprop.update import update_in_turn as in_turn

SMALL_ELEMENTS = 2**10
"""Up to this size copying a variable costs less than the operations it saves."""

Rule = Callable[[Any, Any, Slots], tuple[Any, Slots]]
"""From gradient, weights and slots to their change and the new slots; elementwise."""


def is_small(variable: Any) -> bool:
    """Whether a variable should be concatenated with others."""
    return math.prod(variable.shape) <= SMALL_ELEMENTS


def update_concatenated(
    gradients: Sequence[Any],
    variables: Sequence[Any],
    slots: Sequence[Slots],
    rule: Rule,
) -> None:
    """Update variables that change by one rule, elementwise and of one dtype.

    Args:
        gradients: One for each variable.
        variables: The `tf.Variable`s.
        slots: The `tf.Variable`s of each.
        rule: What changes them all.
    """
    shapes = [variable.shape for variable in variables]
    sizes = [math.prod(shape) for shape in shapes]

    def shaped(x: Any, shape: Sequence[int]) -> Any:
        # Most are vectors: an operation that does nothing would cost as much as others.
        return x if len(x.shape) == len(shape) == 1 else tf.reshape(x, shape)

    def concatenated(parts: Sequence[Any]) -> Any:
        return tf.concat([shaped(x, [-1]) for x in parts], 0)

    def split(x: Any) -> list[Any]:
        return list(map(shaped, tf.split(x, sizes), shapes))

    kinds = list(zip(*slots, strict=True))
    old = Slots(*(None if kind[0] is None else concatenated(kind) for kind in kinds))
    change, new = rule(concatenated(gradients), concatenated(variables), old)
    for kind, values in zip(kinds, new, strict=True):
        if values is not None:
            for slot, value in zip(kind, split(values), strict=True):
                slot.assign(value)
    change = tf.cast(change, variables[0].dtype)
    for variable, value in zip(variables, split(change), strict=True):
        variable.assign_sub(value)


def update_in_turn(
    updates: Sequence[Update], constants: Constants, *, in_program: bool
) -> None:
    """Update variables one after the other, so that only one is decoded at a time.

    Where XLA may be used, each is an XLA program of its own, the same for the same
    shapes: in one program XLA decodes all slots first.
    """
    if inside_xla():
        in_turn(updates, constants, in_one_program=True)
        return
    updaters: dict[Hashable, Any] = {}
    done: list[Any] = []
    may_nest = constants.kernel and not (
        tf.executing_eagerly() or tf.distribute.has_strategy()
    )
    for update in updates:
        places = update.variable, *update.slots
        kinds = (x if x is None else (x.shape, x.dtype) for x in places)
        key = *kinds, update.gradient.dtype, same(update.decay)
        is_worth_it = (
            in_program or math.prod(update.variable.shape) >= XLA_IN_GRAPH_ELEMENTS
        )
        with tf.control_dependencies(done):
            if may_nest and is_worth_it and (key in updaters or is_xla_left()):
                if key not in updaters:
                    updaters[key] = _program_of(update, constants)
                    Programs.compiled += 1
                gradient, variable = update.gradient, update.variable
                done = [updaters[key](gradient, variable, tuple(update.slots))]
            else:
                update_one(update, constants)
                done = [] if tf.executing_eagerly() else [update.variable.read_value()]


def _program_of(like: Update, constants: Constants) -> Callable[..., Any]:
    """Return an XLA program that updates a variable like this one."""

    def update(gradient: Any, variable: Any, slots: Sequence[Any]) -> Any:
        places = {"variable": variable, "slots": Slots(*slots)}
        update_one(like._replace(gradient=gradient, **places), constants)
        return tf.constant(True)

    return tf.function(update, autograph=False, jit_compile=True)
