"""Stochastic rounding, so that averages in bfloat16 do not stall.

bfloat16 keeps 8 bits of a number. An average that should grow by less than half of the
last one is rounded back to where it was, step after step. Rounded up or down by a draw,
with chances as each is near, it is right on average.

Independent draws would let an average stray, with a decay rate of 0.999 and steady
gradients by 2 %. These draws depend on the element, the step and a random offset: a
lattice that covers elements and steps evenly, from which each draw is uniform all the
same, as the offset is. So the averages stray by one bit, 0.5 %, and the draws cost next
to nothing.
"""

from typing import Any

from keras import ops

ELEMENT, STEP, SLOT = 49471, 37345, 27147
"""By how much the draw moves on from one to the next, in units of 2^-16: 1/p and 1/p^2,
where p^3 = p + 1, and the fraction of the root of 2; odd, so that none is left out."""


def stochastically(x: Any, offset: Any, t: Any, slot: int) -> Any:
    """Return a tensor in bfloat16, each element rounded up or down.

    Args:
        x: Any floating tensor.
        offset: An integer scalar, drawn once.
        t: The number of the step, an integer scalar.
        slot: Which slot this is.

    Reference:
        - [Roberts, 2018](https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences/)
          for the lattice.
    """
    x = ops.cast(x, "float32")
    element = ops.reshape(ops.arange(ops.size(x), dtype="int32"), ops.shape(x))
    start = ops.cast(offset + slot * SLOT, "int32") + ops.cast(t, "int32") * STEP
    draw = ops.bitwise_and(element * ELEMENT + start, 2**16 - 1)
    # float32 has 16 bits more than bfloat16: the draw decides whether they carry.
    bits = ops.bitwise_and(ops.view(x, "int32") + draw, -(2**16))
    rounded = ops.where(ops.isfinite(x), ops.view(bits, "float32"), x)
    return ops.cast(rounded, "bfloat16")
