r"""Numbers in one byte each, in blocks that share a scale.

A block is 256 numbers, in the order in which they lie in memory, filled up with zeros
at the end. Its scale $s$ is the largest magnitude in it. A number is kept as a code
$c$, which stands for a share of the scale. With $n$ the largest power of two that is at
most $c + 1$:

$$\text{share}(c) = \frac{(7 (c + 1) - 6 n)\, n^2}{2^{24}}, \qquad
  \text{share}(0) = 0, \quad \text{share}(255) = 1$$

From one power of two to the next the codes are evenly spaced, and the share grows by a
factor of 8. So half of the codes serve numbers within a factor of 8 of the largest one,
a quarter the next factor of 8, and so on. All codes are used, all shares are exact in
float32, and code 1 stands for $8^{-7}$, about $5 \cdot 10^{-7}$.

Numbers with a sign have 7 bits for their magnitude. There share(127) is 1, all other
shares grow by a factor of 8, too, and the byte is the code, or its two's complement.

Between two codes the share grows in a straight line, so a number is rounded up or down
at random, with chances as each is near: what is kept is right on average.
"""

from typing import Any

from keras import ops

from keras_rmsprop import bits

BLOCK, SCALE = 256, 4
"""Numbers in a block, and the bytes of its scale."""
GROWTH = 8
"""How many times its share grows while a code (plus one) doubles."""
LEAST, MOST = 2.0**-126, 2.0**126
"""The scales that there are, but for 0: beyond them a float32 or its inverse has no
full precision, and processors may take it for 0."""
NEAREST = bits.DRAWS // 2
"""The draw that rounds to the nearest code."""


def blocks(size: int) -> int:
    """Return how many blocks so many numbers take."""
    return -(-size // BLOCK)


def decoded(stored: Any, *, signed: bool) -> Any:
    """Return the numbers that bytes stand for, a row of float32 for each block.

    Args:
        stored: Rows of uint8: `BLOCK` codes, then a float32 as `SCALE` bytes, the
            lowest first.
        signed: Whether the numbers have a sign.

    Example:
        >>> x = ops.convert_to_tensor([[0.5, 1e-6, 0.25, 0.001] + 252 * [0.0]])
        >>> kept = encoded(x, NEAREST, signed=False)
        >>> [round(float(y), 7) for y in decoded(kept, signed=False)[0, :4]]
        [0.5, 1.1e-06, 0.2504883, 0.0009766]
    """
    code = ops.cast(stored[:, :BLOCK], "float32")
    is_negative = code > BLOCK / 2
    if signed:
        code = ops.where(is_negative, BLOCK - code, code)
    share = _share(code + 1) * (GROWTH if signed else 1)
    if signed:
        share = ops.where(is_negative, -share, share)
    return share * _joined(stored[:, BLOCK:])


def encoded(x: Any, draw: Any, *, signed: bool) -> Any:
    """Return numbers as bytes; see `decoded`. A block with a NaN is kept as zeros.

    Args:
        x: Rows of float32, one for each block. Negative only if they have a sign.
        draw: Which way each is rounded: integers in [0, `bits.DRAWS`).
        signed: Whether the numbers have a sign.
    """
    if 0 in x.shape:  # of which not every backend knows a maximum
        return ops.zeros((0, BLOCK + SCALE), "uint8")
    # Of `x` as it is: an operation before the maximum made XLA take it twice as long.
    scale = ops.max(x, axis=1, keepdims=True)
    if signed:
        scale = ops.maximum(scale, -ops.min(x, axis=1, keepdims=True))
    is_good = ops.logical_and(scale >= LEAST, scale <= MOST)
    inverse = ops.where(is_good, 1 / ops.where(is_good, scale, 1.0), 0.0)
    share = (ops.abs(x) if signed else x) * inverse
    share = ops.where(share < 1, share, 1.0) / (GROWTH if signed else 1)
    code = ops.right_shift(ops.cast(_position(share), "int32") + draw, 16)
    code = ops.minimum(code, 127 if signed else 255)
    if signed:
        code = ops.bitwise_and(ops.where(x < 0, -code, code), 255)
    scale = ops.where(is_good, scale, 0.0)
    parts = [ops.cast(code, "uint8"), _parted(scale)]
    return ops.concatenate(parts, axis=1)


def _share(above: Any) -> Any:
    """Return the share of a code plus one."""
    bits_of_power = ops.bitwise_and(bits.view(above, "int32"), 0x7F800000)
    n = bits.view(bits_of_power, "float32")
    share = (7 * above - 6 * n) * (n * n) * 2.0**-24
    return ops.where(above > 1, share, 0.0)


def _position(share: Any) -> Any:
    """Return where a share lies among the codes, in units of 1 / `bits.DRAWS`."""
    # From one group to the next the exponent grows by three.
    exponent = ops.right_shift(bits.view(share, "int32"), 23) - 103
    group = ops.right_shift(ops.maximum(exponent, 0) * 171, 9)  # a third of it
    n = _power_of_two(group)
    # Times, not over: XLA changes one into the other, and all are to agree.
    above = (share * _power_of_two(24 - 2 * group) + 6 * n) * (bits.DRAWS / 7)
    return ops.where(group > 0, above - bits.DRAWS, share * GROWTH**7 * bits.DRAWS)


def _power_of_two(exponent: Any) -> Any:
    return bits.view(ops.left_shift(exponent + 127, 23), "float32")


def _parted(scale: Any) -> Any:
    """Return the bytes of a column of float32."""
    whole = bits.view(scale, "int32")
    parts = [ops.bitwise_and(ops.right_shift(whole, 8 * i), 255) for i in range(SCALE)]
    return ops.cast(ops.concatenate(parts, axis=1), "uint8")


def _joined(parts: Any) -> Any:
    """Return the float32, none of them negative, of which these are the bytes."""
    parts = ops.cast(parts, "int32")
    whole = sum(ops.left_shift(parts[:, i : i + 1], 8 * i) for i in range(SCALE))
    return bits.view(whole, "float32")
