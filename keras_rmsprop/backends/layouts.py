"""Variables updated in another layout than their own, as that is faster on CPUs.

**End to end.** Where each operation is run on its own, an operation on a bias costs
more than what it computes. So small variables are laid end to end, and the formula runs
once for all of them.

**On one axis.** XLA vectorises along the last axis alone, and three elements are no
vector: variables such as (256, 256, 3, 3) took 2.5 times as long as the same numbers on
one axis. XLA moves a plain reshape past elementwise operations until it cancels with
the one at the other end. But it moves none into a branch of a condition that it cannot
decide, so such variables are updated inside one. This is for programs that hold a step
and nothing else: where gradients are computed in the same program, a small
convolutional net took 6 times as long with such a condition.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop.rule import Slots

END_TO_END_ELEMENTS = 2**10
"""Up to this size copying a variable costs less than the operations it saves."""
SHORT_AXIS_ELEMENTS, VECTOR_ELEMENTS = 128, 32
"""A last axis is short if it has fewer elements and is no multiple of a vector's."""
ONE_AXIS_ELEMENTS = 2**14
"""From this size on the time that a short axis costs is worth saving."""

Step = Callable[[Any, Any, Slots], tuple[Any, Slots]]
"""From gradient, weights and slots to what is taken and the new slots; elementwise."""


def is_small(variable: Any) -> bool:
    """Whether a variable should be updated end to end with others."""
    return math.prod(variable.shape) <= END_TO_END_ELEMENTS


def has_short_axis(variable: Any) -> bool:
    """Whether XLA should update a variable on one axis."""
    shape = variable.shape
    if len(shape) < 2 or math.prod(shape) < ONE_AXIS_ELEMENTS:
        return False
    return 1 < shape[-1] < SHORT_AXIS_ELEMENTS and shape[-1] % VECTOR_ELEMENTS != 0


def update_end_to_end(
    gradients: Sequence[Any],
    variables: Sequence[Any],
    slots: Sequence[Slots],
    step: Step,
) -> None:
    """Update variables whose steps are the same, elementwise and of one dtype.

    Args:
        gradients: One for each variable.
        variables: The `tf.Variable`s.
        slots: The `tf.Variable`s of each.
        step: The step of them all.
    """
    shapes = [variable.shape for variable in variables]
    sizes = [math.prod(shape) for shape in shapes]

    def shaped(x: Any, shape: Sequence[int]) -> Any:
        # Most are vectors: an operation that does nothing would cost as much as others.
        return x if len(x.shape) == len(shape) == 1 else tf.reshape(x, shape)

    def end_to_end(parts: Sequence[Any]) -> Any:
        return tf.concat([shaped(x, [-1]) for x in parts], 0)

    def parted(x: Any) -> list[Any]:
        return list(map(shaped, tf.split(x, sizes), shapes))

    kinds = list(zip(*slots, strict=True))
    old = Slots(*(None if kind[0] is None else end_to_end(kind) for kind in kinds))
    taken, new = step(end_to_end(gradients), end_to_end(variables), old)
    for kind, values in zip(kinds, new, strict=True):
        if values is not None:
            for slot, value in zip(kind, parted(values), strict=True):
                slot.assign(value)
    taken = tf.cast(taken, variables[0].dtype)
    for variable, value in zip(variables, parted(taken), strict=True):
        variable.assign_sub(value)


def update_on_one_axis(
    gradient: Any, variable: Any, slots: Slots, step: Step, undecided: Any
) -> None:
    """Update a variable and its slots on one axis.

    Args:
        gradient: Its gradient.
        variable: The `tf.Variable`.
        slots: Its slots, `tf.Variable`s.
        step: Its step; the slots after it are as they are kept.
        undecided: A bool that is true, which XLA must not know.
    """
    g, w, old = _flat(gradient), _flat(variable), slots.map(_flat)

    def stepped() -> tuple[Any, Slots]:
        taken, new = step(g, w, old)
        return w - tf.cast(taken, w.dtype), new

    weights, new = tf.cond(undecided, stepped, lambda: (w, old))
    for place, value in zip((variable, *slots), (weights, *new), strict=True):
        if place is not None:
            place.assign(tf.reshape(value, place.shape))


def _flat(x: Any) -> Any:
    return tf.reshape(x, [-1])
