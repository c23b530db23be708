"""Which elements of a variable the search for a learning rate looks at."""

import math
from collections.abc import Sequence
from typing import Any

import keras

SAMPLED_ELEMENTS = 2**12
"""From this size on, only a sample of a variable's elements is looked at."""


class Sample:
    """Which elements of a variable are looked at: all of a small one, else one in n.

    Of a matrix the shorter side is thinned, else the last axis. So in a large table
    each row can be followed on its own, and in a square kernel whole lines of memory
    are left out.

    Args:
        shape: The variable's shape.
        sample_every: n.

    Attributes:
        is_small: Whether all are looked at, whatever `sample_every` is.
        shape: The shape of these elements.
        row_step: They are of one row in so many, all elements of it if that is not 1.
        stands_for: How many elements of the variable one of these stands for.
        runs: How they lie in memory, in runs: the elements of a run, the distance
            from one run to the next, and that from one element to the next.
        row_runs: The same of those of one row, from its beginning.

    Example:
        >>> import numpy as np
        >>> sample = Sample((2000, 5), 4)
        >>> sample.of(np.arange(10_000).reshape(2000, 5))[:2]
        array([[0, 4],
               [5, 9]])
        >>> sample.shape, sample.stands_for
        ((2000, 2), 2.5)
        >>> sample.runs
        (2, 5, 4)
    """

    def __init__(self, shape: Sequence[int], sample_every: int) -> None:
        size, last = math.prod(shape), shape[-1] if len(shape) else 1
        self.is_small = size < SAMPLED_ELEMENTS
        self._step = step = 1 if self.is_small else sample_every
        self._lines = len(shape) == 2 and 1 < step <= shape[0] <= last
        self.row_step = step if self._lines or len(shape) == 1 else 1
        self.shape = tuple(shape)
        if self._lines:
            self.shape = -(-shape[0] // step), last
        elif self._step > 1:
            self.shape = *shape[:-1], -(-last // step)
        self.stands_for = size / max(math.prod(self.shape), 1)
        self.runs = max(math.prod(self.shape), 1), max(size, 1), 1
        if self._lines:
            self.runs = last, step * last, 1
        elif step > 1:
            self.runs = self.shape[-1], last, step

        self.row_runs = self.runs
        if self.row_step > 1 or step == 1 or len(shape) < 2:
            width = max(math.prod(shape[1:]), 1)
            self.row_runs = width, width, 1

    def of(self, x: Any) -> Any:
        """Return these elements of a tensor of the variable's shape.

        If `row_step` is 1, it may also be some rows of such a tensor.
        """
        if self._lines:
            return x[:: self._step]
        return x if self._step == 1 else x[..., :: self._step]

    def layout(self, whole: Any) -> Any:
        """Return how to spread these elements over devices: like the variable's.

        Args:
            whole: The `keras.distribution.TensorLayout` of the variable. An axis of it
                that does not divide the elements evenly is not used.
        """
        axes = whole.axes
        mesh = whole.device_mesh
        parts = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        axes = [
            axis if n % parts.get(axis, 1) == 0 else None
            for axis, n in zip(axes, self.shape, strict=True)
        ]
        return keras.distribution.TensorLayout(axes, mesh)
