"""Bits of numbers, and the draws by which numbers are rounded at random.

A draw costs next to nothing here: each step has a number of its own, as good as random,
and from it the elements go on by a fixed stride, which covers all draws evenly. So the
mean over a variable is better than that of independent draws, while a single average
strays as it does with these. (Even strides in time, too, would hold a steady average
closer, but err where gradients repeat, as those of an epoch do.)
"""

import math
from typing import Any

import keras
from keras import ops

DRAWS = 2**16
"""How many different draws there are."""
ELEMENT_STRIDE, SLOT_STRIDE = 49471, 27147
"""From one element's draw to the next, and from one slot's, in units of 2^-16: 1/p,
where p^3 = p + 1, and the fraction of the root of 2. Both are odd: so all are met."""


def draws(x: Any, offset: Any, t: Any, slot: int) -> Any:
    """Return an int32 in [0, `DRAWS`) for each element of a tensor.

    Args:
        x: The tensor.
        offset: An integer scalar, drawn once.
        t: The number of the step, an integer scalar.
        slot: Which slot this is, a small number.

    Reference:
        - Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018, for
          the stride.
    """
    step = ops.cast(t, "int32") + ops.cast(offset, "int32")
    start = _mixed(step) + slot * SLOT_STRIDE
    # As a number where it is known: on PyTorch `ops.size` is a tensor.
    size = ops.size(x) if None in tuple(x.shape) else math.prod(x.shape)
    element = ops.reshape(ops.arange(size, dtype="int32"), ops.shape(x))
    return _low(element * ELEMENT_STRIDE + start)


def _mixed(n: Any) -> Any:
    """Map the numbers below 2^16 onto themselves, in an order that looks random."""
    for _ in range(3):
        n = _low(n * 40503 + 12345)
        n = ops.bitwise_xor(n, ops.right_shift(n, 8))
    return n


def _low(n: Any) -> Any:
    return ops.bitwise_and(n, DRAWS - 1)


def view(x: Any, dtype: str) -> Any:
    """Return the bits of a tensor as numbers of another dtype of that size."""
    if keras.backend.backend() == "tensorflow":
        # Keras' own fails if the last axis has an unknown size, as rows of a vector.
        import tensorflow as tf

        return tf.bitcast(x, dtype)
    if hasattr(ops, "view"):
        return ops.view(x, dtype)
    # Keras before 3.12 leaves this to its backends.
    return x.view(ops.zeros((), dtype).dtype)
