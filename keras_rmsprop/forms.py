"""What a variable of the optimizer looks like that belongs to one of the model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rmsprop import codecs, rule
from keras_rmsprop.sampling import Sample
from keras_rmsprop.slots import ACCUMULATOR, FIRST_WEIGHT, GRADIENT_SUM, WEIGHT_AVERAGE
from keras_rmsprop.state import copied


class Form(NamedTuple):
    """Its dtype, shape, start and layout."""

    dtype: str
    shape: Sequence[int]
    initializer: Any
    """A Keras initializer, which makes what it starts with."""
    start: Callable[[], Any]
    """Returns what it starts with if the model's variable has changed since."""
    layout: Any
    """How it is spread over devices (`keras.distribution`), or None."""


def form(
    kind: str,
    owner: Any,
    initializer: Any,
    codec: codecs.Float,
    sample: Callable[[Sequence[int]], Sample],
) -> Form:
    """Return the form of a variable.

    Args:
        kind: What it is, such as `velocity`.
        owner: The model's variable.
        initializer: A Keras initializer for its numbers.
        codec: How the slots of this variable are stored.
        sample: Function from a shape to the elements that a search looks at.
    """
    dtype = keras.backend.standardize_dtype(owner.dtype)
    shape, layout = owner.shape, getattr(owner, "_layout", None)
    if kind in rule.Slots._fields:
        number = rule.Slots._fields.index(kind)
        initializer = codec.initializer(initializer, shape, number)
        dtype, shape = codec.dtype(dtype), codec.shape(shape)
    elif kind in (FIRST_WEIGHT, GRADIENT_SUM):
        dtype, shape = rule.wide(dtype), sample(shape).shape
    elif kind in (ACCUMULATOR, WEIGHT_AVERAGE):
        # In bfloat16 a sum of 256 ones does not grow, and an average stands still.
        dtype = rule.wide(dtype)
    if layout is not None and tuple(shape) != tuple(owner.shape):
        layout = (
            sample(owner.shape).layout(layout)
            if kind in (FIRST_WEIGHT, GRADIENT_SUM)
            # None would mean: as those have it whose paths look alike.
            else type(layout)([None] * len(shape), layout.device_mesh)
        )

    def start() -> Any:
        # Copies: on JAX both would share one buffer, and give it away twice.
        if kind == WEIGHT_AVERAGE:
            return ops.cast(copied(owner), dtype)
        if kind == FIRST_WEIGHT:
            return sample(owner.shape).of(copied(owner))
        return keras.initializers.get(initializer)(shape, dtype)

    return Form(dtype, shape, initializer, start, layout)


def name_of(kind: str, owner: Any) -> str:
    """Return the name of a variable, as Keras gives it."""
    path = str(getattr(owner, "path", owner.name))
    return f"{path.replace('/', '_').replace(':', '_')}_{kind}"
