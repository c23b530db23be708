"""Reductions that XLA can take in parallel.

On CPU, XLA reduces on one thread, element by element; the rest it does on all threads.
"""

import functools
from collections.abc import Callable
from typing import Any

from keras import ops

PARTS = 8


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
