"""Which elements of a variable the search for a learning rate looks at."""

import math
from collections.abc import Sequence
from typing import Any

import keras

SAMPLED_ELEMENTS = 2**12
"""From this size on, only a sample of a variable's elements is looked at."""
MOST_ELEMENTS, MOST_ROWS = 2**20, 2**16
"""Of a variable of at most so many rows, less than twice as many elements suffice. One
of more rows may be a table, of which few rows have a gradient."""
LINE = 16
"""So many elements one after the other are a line: in float32 those of 64 bytes."""


class Sample:
    """Which elements of a variable are looked at: all of a small one, else one in n.

    Lines of memory are thinned: of a matrix, rows. Of a large variable fewer than one
    in n are looked at.

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
        array([[ 0,  1,  2,  3,  4],
               [20, 21, 22, 23, 24]])
        >>> sample.shape, sample.stands_for
        ((500, 5), 4.0)
        >>> sample.runs
        (5, 20, 1)
    """

    def __init__(self, shape: Sequence[int], sample_every: int) -> None:
        size = math.prod(shape)
        self.is_small = size < SAMPLED_ELEMENTS
        step = 1 if self.is_small else sample_every
        while step > 1 and size >= 2 * step * MOST_ELEMENTS and shape[0] <= MOST_ROWS:
            step *= 2
        axis = self._axis = _axis_of(shape, step) if step > 1 else 0
        self._step, self.row_step = step, step if axis == 0 else 1
        self.shape = tuple(shape)
        self.runs = max(size, 1), max(size, 1), 1
        if step > 1:
            lines, line = shape[axis], math.prod(shape[axis + 1 :])
            kept = -(-lines // step)
            self.shape = *shape[:axis], kept, *shape[axis + 1 :]
            self.runs = (kept, lines, step) if line == 1 else (line, step * line, 1)
        self.stands_for = size / max(math.prod(self.shape), 1)
        self.row_runs = self.runs
        if axis == 0:
            width = max(math.prod(shape[1:]), 1)
            self.row_runs = width, width, 1

    def of(self, x: Any) -> Any:
        """Return these elements of a tensor of the variable's shape.

        If `row_step` is 1, it may also be some rows of such a tensor.
        """
        if self._step == 1:
            return x
        return x[(*[slice(None)] * self._axis, slice(None, None, self._step))]

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


def _axis_of(shape: Sequence[int], step: int) -> int:
    """Return the axis along which one line in `step` is kept.

    The pieces of memory between two lines should be long, and the axis, too.
    """
    found = len(shape) - 1
    for axis in reversed(range(len(shape))):
        before, line = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        # Else the lines that are kept are not evenly spaced in memory.
        is_even = shape[axis] % step == 0 or 1 in (before, line)
        if shape[axis] >= step and is_even:
            found = axis
            if line >= LINE:
                break
    return found
