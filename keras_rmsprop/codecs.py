"""How a slot is kept: the dtype of its variable, and how numbers get in and out.

A step is computed in float32 or float64. A codec says in which dtype the results are
kept between steps (`dtype`) and which variables that needs besides (`extra`). It
converts between the two (`encode`, `decode`). Nothing else in the package knows how a
slot is kept.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import keras
from keras import ops

from keras_rmsprop.rule import Slots, wide

ROUNDING_OFFSET = "rounding_offset"
"""The variable that `StochasticBfloat16` needs: an int32 scalar, drawn once."""


class Draw(NamedTuple):
    """What random rounding depends on."""

    offset: Any
    """The variable `ROUNDING_OFFSET`, or None."""
    step: Any
    """The number of steps so far."""


class Float:
    """Keeps numbers in a floating dtype, with its usual rounding.

    Args:
        kept: The dtype, or None for that of the weights, but at least float32.
    """

    extra: ClassVar[Mapping[str, Callable[[], int]]] = {}
    """What else it needs: int32 scalars, by name, and what each starts with."""
    elementwise = True
    """Whether how an element is kept depends on nothing but its value."""

    def __init__(self, kept: str | None = None) -> None:
        self._kept = kept

    def dtype(self, weights: Any) -> str:
        """Return the dtype of a slot whose weights have this dtype."""
        return self._kept or wide(weights)

    def decode(self, stored: Any, dtype: str) -> Any:
        """Return the kept values in the dtype of a step."""
        return ops.cast(stored, dtype)

    def encode(self, values: Any, dtype: str, draw: Draw, slot: int) -> Any:
        """Return new values in the form in which they are kept.

        Args:
            values: The values, in the dtype of the step.
            dtype: The dtype of the variable that keeps them.
            draw: What random rounding depends on.
            slot: Which slot this is, a small number.
        """
        return ops.cast(values, dtype)


class StochasticBfloat16(Float):
    """Keeps numbers in bfloat16, rounded up or down at random, right on average."""

    extra: ClassVar[Mapping[str, Callable[[], int]]] = {
        ROUNDING_OFFSET: lambda: random.randrange(2**16)
    }
    elementwise = False  # its place decides how it is rounded

    def __init__(self) -> None:
        super().__init__("bfloat16")

    def encode(self, values: Any, dtype: str, draw: Draw, slot: int) -> Any:
        """See `Float.encode`."""
        return stochastically(values, draw.offset, draw.step, slot)


Codec = Float | StochasticBfloat16


def named(slot_dtype: str | None) -> Codec:
    """Return the codec that the option `slot_dtype` asks for."""
    return StochasticBfloat16() if slot_dtype == "bfloat16" else Float(slot_dtype)


def of(stored: Any) -> Codec:
    """Return the codec of an existing slot, whatever the option says now."""
    return named(keras.backend.standardize_dtype(stored.dtype))


def encoded(slots: Slots, values: Slots, draw: Draw) -> Slots:
    """Return new values of slots in the form in which the slots keep them."""
    return Slots(
        *(
            None
            if slot is None or value is None
            else of(slot).encode(
                value, keras.backend.standardize_dtype(slot.dtype), draw, number
            )
            for number, (slot, value) in enumerate(zip(slots, values, strict=True))
        )
    )


# Stochastic rounding, so that averages in bfloat16 do not stall.
#
# bfloat16 keeps 8 bits of a number. An average that should grow by less than half of
# the last one is rounded back to where it was, step after step. Rounded up or down by
# a draw, with chances as each is near, it is right on average.
#
# A draw costs next to nothing here: each step has a number of its own, as good as
# random, and from it the elements go on by a fixed stride, which covers all draws
# evenly. So the mean over a variable is better than that of independent draws, while a
# single average strays as it does with these. (Even strides in time, too, would hold a
# steady average closer, but err where gradients repeat, as those of an epoch do.)

ELEMENT_STRIDE, SLOT_STRIDE = 49471, 27147
"""From one element's draw to the next, and from one slot's, in units of 2^-16: 1/p,
where p^3 = p + 1, and the fraction of the root of 2. Both are odd: so all are met."""


def stochastically(x: Any, offset: Any, t: Any, slot: int) -> Any:
    """Return a tensor in bfloat16, each element rounded up or down.

    Args:
        x: Any floating tensor.
        offset: An integer scalar, drawn once.
        t: The number of the step, an integer scalar.
        slot: Which slot this is.

    Reference:
        - Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018, for
          the stride.
    """
    x = ops.cast(x, "float32")
    step = ops.cast(t, "int32") + ops.cast(offset, "int32")
    start = _mixed(step) + slot * SLOT_STRIDE
    element = ops.reshape(ops.arange(ops.size(x), dtype="int32"), ops.shape(x))
    draw = _low(element * ELEMENT_STRIDE + start)
    # float32 has 16 bits more than bfloat16: the draw decides whether they carry.
    bits = ops.bitwise_and(_view(x, "int32") + draw, -(2**16))
    rounded = ops.where(ops.isfinite(x), _view(bits, "float32"), x)
    return ops.cast(rounded, "bfloat16")


def _mixed(n: Any) -> Any:
    """Map the numbers below 2^16 onto themselves, in an order that looks random."""
    for _ in range(3):
        n = _low(n * 40503 + 12345)
        n = ops.bitwise_xor(n, ops.right_shift(n, 8))
    return n


def _low(n: Any) -> Any:
    return ops.bitwise_and(n, 2**16 - 1)


def _view(x: Any, dtype: str) -> Any:
    """Return the bits of a tensor as numbers of another dtype."""
    if hasattr(ops, "view"):
        return ops.view(x, dtype)
    # Keras before 3.12 leaves this to its backends.
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(x, dtype)
    return x.view(ops.zeros((), dtype).dtype)
