"""Stochastic rounding, so that averages in bfloat16 do not stall.

bfloat16 keeps 8 bits of a number. An average that should grow by less than half of the
last one is rounded back to where it was, step after step. Rounded up or down at random,
as likely as each is near, it grows by the right amount on average.

Chance alone would let an average stray: with a decay rate of 0.999 by 2 %. So only the
first draw of an element is random. Each step adds the golden ratio to it, modulo 1:
still every draw is uniform, but the draws of many steps are evenly spread, and the
average strays by about one bit, 0.5 %.
"""

from typing import Any

import keras
from keras import ops

GOLDEN = 40503
"""The golden ratio's fraction, in units of 2^-16; odd, so that no draw is left out."""


class Noise(keras.random.SeedGenerator):
    """Random numbers that depend on a seed, a step and a place, and on nothing else.

    A generator that counts its draws would give the replicas of a distributed run, and
    a run that resumes, numbers of their own.
    """

    _place = 0

    def round(self, x: Any, place: int, t: Any) -> Any:
        """Return a tensor in bfloat16, each element rounded up or down.

        Args:
            x: Any floating tensor.
            place: Which of the tensors that are rounded in a step this is.
            t: The number of the step, an integer scalar.
        """
        x = ops.cast(x, "float32")
        self._place = place
        draw = keras.random.randint(ops.shape(x), 0, 2**16, seed=self)
        draw = ops.bitwise_and(draw + ops.cast(t, "int32") * GOLDEN, 2**16 - 1)
        # float32 has 16 bits more than bfloat16: the draw decides whether they carry.
        bits = ops.bitwise_and(ops.view(x, "int32") + draw, -(2**16))
        rounded = ops.where(ops.isfinite(x), ops.view(bits, "float32"), x)
        return ops.cast(rounded, "bfloat16")

    def next(self, ordered: bool = True) -> Any:
        """Return the seed of the draw that `round` makes, and keep the state.

        Args:
            ordered: Not used.
        """
        place = ops.cast(ops.stack([0, self._place]), self.state.dtype)
        return ops.convert_to_tensor(self.state) + place
