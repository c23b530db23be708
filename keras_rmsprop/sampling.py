"""Which elements of a variable the search for a learning rate looks at."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

SAMPLED_ELEMENTS = 2**12
"""From this size on, only a sample of a variable's elements is looked at."""


class Sample:
    """Which elements of a variable are looked at: all of a small one, else one in n.

    The shorter side is thinned. So in a large table each row can be followed on its
    own, and in a square kernel whole lines of memory are left out.

    Args:
        shape: The variable's shape.
        sample_every: n.

    Attributes:
        is_small: Whether all are looked at, whatever `sample_every` is.
        shape: The shape of these elements.
        whole_rows: Whether they are all elements of some rows.
        stands_for: How many elements of the variable one of these stands for.
        places: Where they are: they come in runs. In memory a run has so many elements,
            the next run begins so many elements later, and so does the next element.

    Example:
        >>> import numpy as np
        >>> sample = Sample((2000, 5), 4)
        >>> sample.of(np.arange(10_000).reshape(2000, 5))[:2]
        array([[0, 4],
               [5, 9]])
        >>> sample.shape, sample.stands_for
        ((2000, 2), 2.5)
        >>> sample.places
        (2, 5, 4)
    """

    def __init__(self, shape: Sequence[int], sample_every: int) -> None:
        size, self._last = math.prod(shape), shape[-1] if len(shape) else 1
        rows = size // max(self._last, 1)
        self.is_small = size < SAMPLED_ELEMENTS
        self._step = 1 if self.is_small else sample_every
        self.whole_rows = 1 < self._step <= rows <= self._last
        self.shape = tuple(shape)
        if self.whole_rows:
            self.shape = -(-rows // self._step), self._last
        elif self._step > 1:
            self.shape = *shape[:-1], -(-self._last // self._step)
        self.stands_for = size / max(math.prod(self.shape), 1)
        self.places = max(math.prod(self.shape), 1), max(size, 1), 1
        if self.whole_rows:
            self.places = self._last, self._step * self._last, 1
        elif self._step > 1:
            self.places = self.shape[-1], self._last, self._step

    def of(self, x: Any) -> Any:
        """Return these elements of a tensor of the variable's shape, or of its rows."""
        if self.whole_rows:
            return ops.reshape(x, (-1, self._last))[:: self._step]
        return x if self._step == 1 else x[..., :: self._step]

    def layout(self, whole: Any) -> Any:
        """Return how to spread these elements over devices: like the variable's.

        Args:
            whole: The `keras.distribution.TensorLayout` of the variable. An axis of it
                that does not divide the elements evenly is not used.
        """
        axes = whole.axes
        if self.whole_rows:
            axes = (axes[0] if len(axes) == 2 else None), axes[-1]
        mesh = whole.device_mesh
        parts = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        axes = [
            axis if n % parts.get(axis, 1) == 0 else None
            for axis, n in zip(axes, self.shape, strict=True)
        ]
        return keras.distribution.TensorLayout(axes, mesh)
