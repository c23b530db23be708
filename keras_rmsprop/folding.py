"""Reductions that XLA can run in parallel.

On a CPU, XLA runs a reduction on one thread, element by element, and all else on all
threads.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

from keras import ops

PARTS = 8
FOLDED_ELEMENTS = 2**12
"""From this size on, `total` folds."""


def folded(x: Any, combine: Callable[[Any, Any], Any]) -> list[Any]:
    """Return tensors with fewer elements, which together reduce to what `x` reduces to.

    Args:
        x: A tensor. One whose shape is not known comes back as it is.
        combine: The reduction, of two tensors element by element.
    """
    if None in x.shape:
        return [x]
    x = ops.reshape(x, (-1,))
    rest = x.shape[0] % PARTS
    if rest:
        return [*folded(x[:-rest], combine), x[-rest:]]
    return [functools.reduce(combine, ops.split(x, PARTS))]


def total(x: Any, *, fold: bool) -> Any:
    """Return the sum of all elements of a tensor.

    Args:
        x: A tensor of known shape.
        fold: Whether XLA compiles this, which reduces on one thread.
    """
    if not fold or math.prod(x.shape) < FOLDED_ELEMENTS:
        return ops.sum(x)
    # Along other axes than the last, so that a part of that one needs no copy.
    x = ops.reshape(x, (-1, *x.shape[-1:])) if len(x.shape) > 1 else x
    most = x.shape[0] // PARTS * PARTS
    sum_ = ops.sum(functools.reduce(operator.add, ops.split(x[:most], PARTS)))
    return sum_ if most == x.shape[0] else sum_ + ops.sum(x[most:])
