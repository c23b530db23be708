"""Stochastic rounding, so that averages in bfloat16 do not stall.

bfloat16 keeps 8 bits of a number. An average that should grow by less than half of the
last one is rounded back to where it was, step after step. Rounded up or down by a draw,
with chances as each is near, it is right on average.

A draw costs next to nothing here: each step has a number of its own, as good as random,
and from it the elements go on by a fixed stride, which covers all draws evenly. So the
mean over a variable is better than that of independent draws, while a single average
strays as it does with these. (Even strides in time, too, would hold a steady average
closer, but err where gradients repeat, as those of an epoch do.)
"""

from typing import Any

import keras
from keras import ops

STRIDE, SLOT = 49471, 27147
"""From an element's draw to the next and from a slot's to the next, in units of 2^-16:
1/p, where p^3 = p + 1, and the fraction of the root of 2; odd, so that all are met."""


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
    start = _mixed(ops.cast(t, "int32") + ops.cast(offset, "int32")) + slot * SLOT
    element = ops.reshape(ops.arange(ops.size(x), dtype="int32"), ops.shape(x))
    draw = _low(element * STRIDE + start)
    # float32 has 16 bits more than bfloat16: the draw decides whether they carry.
    bits = ops.bitwise_and(_view(x, "int32") + draw, -(2**16))
    rounded = ops.where(ops.isfinite(x), _view(bits, "float32"), x)
    return ops.cast(rounded, "bfloat16")


def _mixed(n: Any) -> Any:
    """Return a number below 2^16 for each n below 2^16, all of them, in no order."""
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
