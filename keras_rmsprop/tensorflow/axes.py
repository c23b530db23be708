"""Variables with a short last axis, such as (256, 256, 3, 3), under XLA.

On CPU, XLA vectorises along the last axis alone, and three elements are no vector: the
update took 2.5 times as long as that of the same numbers on one axis. A reshape there
XLA moves past elementwise operations until it cancels with the one at the other end;
but it moves none into a branch of a condition that it cannot decide.

This is for programs that hold a step and nothing else: where gradients are computed in
the same program, a small convolutional net took 6 times as long with such a condition.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop.rule import Slots
from keras_rmsprop.tensorflow.rows import inside_xla

LONG, VECTOR, SMALL = 128, 32, 2**14
"""Elements of a last axis that is long; of which one has a multiple that is short but
even; of a variable that takes no time anyway."""


def is_short(shape: Sequence[int]) -> bool:
    """Whether a variable of this shape should be updated on one axis."""
    if len(shape) < 2 or math.prod(shape) < SMALL or not inside_xla():
        return False
    return 1 < shape[-1] < LONG and shape[-1] % VECTOR != 0


def update(
    variable: Any,
    slots: Slots,
    gradient: Any,
    step: Callable[[Any, Any, Slots], tuple[Any, Slots]],
    undecided: Any,
) -> None:
    """Update a variable and its slots on one axis.

    Args:
        variable: The variable.
        slots: Its slots.
        gradient: Its gradient.
        step: Function from the gradient, the weights and the slots before the update
            to what it takes from the weights, and the slots after it.
        undecided: A bool that is true, which XLA must not know.
    """
    g, w, old = (_flat(gradient), _flat(variable), slots.map(_flat))

    def stepped() -> tuple[Any, Slots]:
        taken, new = step(g, w, old)
        return w - tf.cast(taken, w.dtype), new

    weights, new = tf.cond(undecided, stepped, lambda: (w, old))
    for place, value in zip((variable, *slots), (weights, *new), strict=True):
        if place is not None:
            place.assign(tf.reshape(value, place.shape))


def _flat(x: Any) -> Any:
    return tf.reshape(x, [-1])
