"""Small variables, updated together where each operation is run on its own.

Of a bias an operation costs more than what it computes. So the small ones are laid end
to end: the formula runs once for all of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop.rule import Slots
from keras_rmsprop.tensorflow.rows import native

SMALL = 2**12
"""Elements up to which copying a variable costs less than the operations it saves."""


def is_small(variable: Any) -> bool:
    """Whether a variable should be updated together with others."""
    return math.prod(variable.shape) <= SMALL


def update(
    gradients: Sequence[Any],
    variables: Sequence[Any],
    slots: Sequence[Slots],
    step: Callable[[Any, Any, Slots], tuple[Any, Slots]],
) -> None:
    """Update variables whose steps are the same, elementwise and of one dtype.

    Args:
        gradients: One for each variable.
        variables: The variables.
        slots: Those of each variable.
        step: Function from the gradient, the weights and the slots before the update
            to what it takes from the weights, and the slots after it.
    """
    shapes = [variable.shape for variable in variables]
    sizes = [math.prod(shape) for shape in shapes]

    def shaped(x: Any, shape: Sequence[int]) -> Any:
        # Most are vectors: an operation that does nothing would cost as much as others.
        return x if len(x.shape) == len(shape) == 1 else tf.reshape(x, shape)

    def joined(parts: Sequence[Any]) -> Any:
        return tf.concat([shaped(native(x), [-1]) for x in parts], 0)

    def parted(x: Any) -> list[Any]:
        return list(map(shaped, tf.split(x, sizes), shapes))

    kinds = list(zip(*slots, strict=True))
    old = Slots(*(None if kind[0] is None else joined(kind) for kind in kinds))
    taken, new = step(joined(gradients), joined(variables), old)
    for kind, values in zip(kinds, new, strict=True):
        if values is not None:
            for slot, value in zip(kind, parted(values), strict=True):
                native(slot).assign(value)
    taken = tf.cast(taken, variables[0].dtype)
    for variable, value in zip(variables, parted(taken), strict=True):
        native(variable).assign_sub(value)
