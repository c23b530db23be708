"""How a slot is kept: its variable, and how numbers get in and out.

A step is computed in float32 or float64. A codec says of which dtype and shape the
variable is that keeps the results between steps (`dtype`, `shape`), and which variables
that needs besides (`extra`). It converts between the two (`encode`, `decode`). Nothing
else in the package knows how a slot is kept.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_rmsprop import bits, blockwise
from keras_rmsprop.rule import Slots, wide

Shape = Sequence[int]
ROUNDING_OFFSET = "rounding_offset"
"""The variable that random rounding needs: an int32 scalar, drawn once."""
DRAWN_ONCE: Mapping[str, Callable[[], int]] = {
    ROUNDING_OFFSET: lambda: random.randrange(bits.DRAWS)
}


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
    in_blocks = False
    """Whether the slot is not of the shape of the weights; see `as_blocks`."""

    def __init__(self, kept: str | None = None) -> None:
        self._kept = kept

    def dtype(self, weights: Any) -> str:
        """Return the dtype of a slot whose weights have this dtype."""
        return self._kept or wide(weights)

    def shape(self, weights: Shape) -> Shape:
        """Return the shape of a slot whose weights have this shape."""
        return weights

    def initializer(self, start: Any, weights: Shape, slot: int) -> Any:
        """Return what makes a slot that starts with these numbers.

        Args:
            start: A Keras initializer of the numbers.
            weights: The shape of the weights.
            slot: Which slot this is.
        """
        return start

    def decode(self, stored: Any, dtype: str, shape: Shape = (), slot: int = 0) -> Any:
        """Return the kept values in the dtype of a step.

        Args:
            stored: What is kept.
            dtype: The dtype of the step.
            shape: The shape of the values.
            slot: Which slot this is, a small number.
        """
        return ops.cast(stored, dtype)

    def encode(self, values: Any, dtype: str, draw: Draw | None, slot: int) -> Any:
        """Return new values in the form in which they are kept.

        Args:
            values: The values, in the dtype of the step.
            dtype: The dtype of the variable that keeps them.
            draw: What random rounding depends on; None: round to the nearest.
            slot: Which slot this is.
        """
        return ops.cast(values, dtype)


class StochasticBfloat16(Float):
    """Keeps numbers in bfloat16, rounded up or down at random, right on average."""

    extra = DRAWN_ONCE
    elementwise = False  # its position decides how it is rounded

    def __init__(self) -> None:
        super().__init__("bfloat16")

    def encode(self, values: Any, dtype: str, draw: Draw | None, slot: int) -> Any:
        """See `Float.encode`."""
        if draw is None:
            return ops.cast(values, dtype)
        return stochastically(values, draw.offset, draw.step, slot)


class Blockwise(Float):
    """Keeps numbers in a byte each, rounded as above; see `blockwise.py`."""

    extra = DRAWN_ONCE
    elementwise, in_blocks = False, True

    def __init__(self) -> None:
        super().__init__("uint8")

    def shape(self, weights: Shape) -> Shape:
        """See `Float.shape`."""
        return shape_of_codes(weights)

    def initializer(self, start: Any, weights: Shape, slot: int) -> Any:
        """See `Float.initializer`."""
        if start == "zeros":
            return start  # which all bytes of zeros are

        def start_encoded(shape: Shape, dtype: str) -> Any:
            values = keras.initializers.get(start)(weights, "float32")
            return self.encode(values, dtype, None, slot)

        return start_encoded

    def decode(self, stored: Any, dtype: str, shape: Shape = (), slot: int = 0) -> Any:
        """See `Float.decode`."""
        stored = ops.convert_to_tensor(stored)
        blocks = blockwise.decoded(stored, signed=_is_signed(slot))
        return ops.cast(from_blocks(blocks, shape), dtype)

    def encode(self, values: Any, dtype: str, draw: Draw | None, slot: int) -> Any:
        """See `Float.encode`."""
        blocks = as_blocks(ops.cast(values, "float32"))
        drawn: Any = blockwise.NEAREST
        if draw is not None and draw.offset is not None:
            drawn = bits.draws(blocks, draw.offset, draw.step, slot)
        return blockwise.encoded(blocks, drawn, signed=_is_signed(slot))


def shape_of_codes(weights: Shape) -> Shape:
    """Return the shape of the bytes that keep numbers of this shape."""
    width = blockwise.BLOCK + blockwise.SCALE
    return (blockwise.blocks(math.prod(weights)), width)


def as_blocks(x: Any) -> Any:
    """Return a tensor as rows, one for each block, filled up with zeros."""
    size = math.prod(x.shape)
    shape = blockwise.blocks(size), blockwise.BLOCK
    if tuple(x.shape) == shape:
        return x
    padding = math.prod(shape) - size
    if padding:
        x = ops.pad(ops.reshape(x, (size,)), [[0, padding]])
    return ops.reshape(x, shape)


def from_blocks(blocks: Any, shape: Shape) -> Any:
    """Return a tensor of this shape; the inverse of `as_blocks`."""
    size, padded = math.prod(shape), math.prod(blocks.shape)
    if tuple(blocks.shape) == tuple(shape):
        return blocks
    if size < padded:
        blocks = ops.reshape(blocks, (padded,))[:size]
    return ops.reshape(blocks, shape)


def _is_signed(slot: int) -> bool:
    return Slots._fields[slot] != "velocity"


def named(slot_dtype: str | None) -> Float:
    """Return the codec that the option `slot_dtype` asks for."""
    special = {"bfloat16": StochasticBfloat16, "uint8": Blockwise}
    return special[slot_dtype]() if slot_dtype in special else Float(slot_dtype)


def of(stored: Any) -> Float:
    """Return the codec of an existing slot, whatever the option says now."""
    return named(keras.backend.standardize_dtype(stored.dtype))


def noted_dtype(attributes: Mapping[str, Any]) -> Any:
    """Return the dtype that Keras notes beside bfloat16, which HDF5 lacks; or None."""
    return "bfloat16" if attributes.get("dtype") == "bfloat16" else None


def note_dtype(attributes: Any, dtype: Any) -> None:
    """Note a dtype as Keras does, if it is such a one."""
    if dtype.name == "bfloat16":
        attributes["dtype"] = dtype.name


CODES = f"uint8 in blocks of {blockwise.BLOCK}, then a float32 scale; 8-fold groups"
"""What a file calls the form in which `Blockwise` keeps numbers."""
IN_BLOCKS = "8 bits per element, in blocks"
LEAST_ELEMENTS = 2**12
"""Of a variable with 8-bit state: with fewer it would save next to nothing."""


def chosen(
    slot_dtype: str | None, path: str, shape: Shape, float32_slots: Sequence[str]
) -> tuple[Float, str]:
    """Return how a variable's slots are kept, and why; empty: as all are.

    Args:
        slot_dtype: The option.
        path: The variable's path.
        shape: Its shape.
        float32_slots: Parts of the paths of variables whose state stays in float32.
    """
    codec, why = named(slot_dtype), ""
    if codec.in_blocks:
        why = IN_BLOCKS
        if math.prod(shape) < LEAST_ELEMENTS:
            codec, why = Float(), f"fewer than {LEAST_ELEMENTS} elements"
        for part in float32_slots:
            if part in path:
                codec, why = Float(), f"`float32_slots` has {part!r}"
    return codec, why


def decoded(slots: Slots, dtype: str, shape: Shape) -> Slots:
    """Return the values that slots keep, in the dtype of a step."""
    return slots.map_numbered(
        lambda slot, number: of(slot).decode(slot, dtype, shape, number)
    )


def as_numbers(slots: Slots, shape: Shape) -> Slots:
    """Return slots, and instead of those in another form the numbers they keep."""
    return decoded(slots, "float32", shape) if are_in_blocks(slots) else slots


def are_in_blocks(slots: Slots) -> bool:
    """Whether slots are kept in blocks; a variable in float8 has none."""
    return slots.velocity is not None and of(slots.velocity).in_blocks


def explained(slots: Slots, why: str) -> tuple[str, str]:
    """Return how slots are kept, and why.

    Args:
        slots: The slots.
        why: Why slots of this variable would be kept as they would be now.
    """
    if slots.velocity is None:
        return "nothing", "as of float8 training"
    dtype = keras.backend.standardize_dtype(slots.velocity.dtype)
    if are_in_blocks(slots):
        return dtype, IN_BLOCKS
    return dtype, why if why not in ("", IN_BLOCKS) else "by an earlier `slot_dtype`"


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


class Numbers(np.ndarray[Any, Any]):
    """Numbers of a slot that keeps them in another form."""

    stored: Any = None
    """The array in that form."""

    def copy(self, order: Any = "C") -> "Numbers":
        """Return a copy, of both forms."""
        found = super().copy(order).view(Numbers)
        found.stored = None if self.stored is None else self.stored.copy()
        return found


class Place:
    """A slot of another shape, as a place for numbers of the shape of its weights.

    Args:
        slot: The variable.
        shape: The shape of the weights.
        number: Which slot it is.
    """

    def __init__(self, slot: Any, shape: Shape, number: int) -> None:
        self._slot, self.shape, self._number = slot, tuple(shape), number

    def numpy(self) -> Any:
        """Return the numbers."""
        return self.understood(self._slot.numpy())

    def understood(self, array: Any) -> Any:
        """Return numbers, given these or what a slot like this one has."""
        is_of_slot = self.is_of_slot(array) and array.dtype == np.uint8
        return numbers(array, self.shape, self._number) if is_of_slot else array

    def assign(self, values: Any) -> None:
        """Set the slot to numbers, bit-for-bit if they come from a slot like this."""
        stored = getattr(values, "stored", None)
        if not self.is_of_slot(stored):
            values, dtype = np.asarray(values, "float32"), self._slot.dtype
            stored = of(self._slot).encode(values, dtype, None, self._number)
        self._slot.assign(stored)

    def is_of_slot(self, array: Any) -> bool:
        """Whether anything with a shape has that of the slot itself."""
        return getattr(array, "shape", None) == tuple(self._slot.shape)


def place(slot: Any, shape: Shape, number: int) -> Any:
    """Return a slot, or a `Place` if it is not of the shape of its weights."""
    is_same = tuple(slot.shape) == tuple(shape)
    return slot if is_same else Place(slot, shape, number)


def fits(place: Any, value: Any) -> bool:
    """Whether something with a shape and a dtype can go to a place."""
    if tuple(place.shape) == value.shape:
        return True
    is_place = isinstance(place, Place)
    return is_place and place.is_of_slot(value) and value.dtype == np.uint8


def understood(place: Any, array: Any) -> Any:
    """Return the numbers for a place, given these or what a slot like it has."""
    return place.understood(array) if isinstance(place, Place) else array


def places(slots: Slots, shape: Shape) -> Slots:
    """Return a place for each slot."""
    return slots.map_numbered(lambda slot, number: place(slot, shape, number))


def numbers(stored: NDArray[Any], shape: Shape, number: int) -> Numbers:
    """Return the float32 numbers that a slot of another form keeps.

    Args:
        stored: What it has.
        shape: The shape of the weights.
        number: Which slot it is.
    """
    values = of(stored).decode(stored, "float32", shape, number)
    found = ops.convert_to_numpy(values).view(Numbers)
    found.stored = stored
    return found


# Stochastic rounding, so that averages in bfloat16 do not stall.
#
# bfloat16 keeps 8 bits of a number. An average that should grow by less than half of
# the last one is rounded back to where it was, step after step. Rounded up or down by
# a draw, with chances as each is near, it is right on average.


def stochastically(x: Any, offset: Any, t: Any, slot: int) -> Any:
    """Return a tensor in bfloat16, each element rounded up or down.

    Args:
        x: Any floating tensor.
        offset: An integer scalar, drawn once.
        t: The number of the step, an integer scalar.
        slot: Which slot this is.
    """
    x = ops.cast(x, "float32")
    # float32 has 16 bits more than bfloat16: the draw decides whether they carry.
    carried = bits.view(x, "int32") + bits.draws(x, offset, t, slot)
    kept = bits.view(ops.bitwise_and(carried, -bits.DRAWS), "float32")
    rounded = ops.where(ops.isfinite(x), kept, x)
    return ops.cast(rounded, "bfloat16")
