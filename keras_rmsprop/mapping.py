"""Which parameter of another framework is which variable here, and its axes' order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_rmsprop.optimizer import RMSprop
from keras_rmsprop.rule import Slots

Array = NDArray[Any]
Axes = tuple[int, ...]
Entry = int | str | tuple[int | str, Axes]
"""A parameter of the other framework, or a pair of that and its axes."""


def arranged(
    optimizer: RMSprop,
    mapping: Sequence[Entry],
    theirs: Mapping[Any, Slots | None],
    names: Mapping[str, Any] | None = None,
) -> list[Slots]:
    """Return their slots in my order and layout.

    Args:
        optimizer: Mine. Built.
        mapping: See `keras_rmsprop.transfer`.
        theirs: Their slots; None stands for slots that had no step yet.
        names: Names for the keys of `theirs`.

    Raises:
        ValueError: The mapping does not fit, or leaves something out.
    """
    _, mine, paths, *_ = optimizer.get_state()
    pairs = resolved(mapping, paths, theirs, names or {})
    called = {key: name for name, key in (names or {}).items()}
    used = {key for key, _ in pairs}
    left = [k for k, slots in theirs.items() if slots is not None and k not in used]
    if left:
        raise ValueError(
            "`mapping` must name each parameter that has a state. "
            f"It leaves out: {', '.join(repr(called.get(k, k)) for k in left)}"
        )
    start = optimizer.initial_accumulator_value
    slots = []
    for (key, axes), of_one in zip(pairs, mine, strict=True):
        given = theirs[key]
        if given is None:
            fresh = [np.full_like(of_one.velocity, x) for x in (start, 0, 0)]
            given, axes = Slots(*fresh), None
        slots.append(transposed(given, axes))
    return slots


def resolved(
    mapping: Sequence[Entry],
    paths: Sequence[str],
    keys: Mapping[Any, Any],
    names: Mapping[str, Any],
) -> list[tuple[Any, Axes | None]]:
    """Return the key, and the axes if there are any, that each entry stands for.

    Args:
        mapping: See `keras_rmsprop.transfer`.
        paths: The paths of my variables.
        keys: What an entry may be.
        names: Names for the keys.

    Raises:
        ValueError: The mapping does not have one entry for each variable, or has an
            unknown one, or the same one twice.
    """
    if len(mapping) != len(paths):
        raise ValueError(
            f"`mapping` must have an entry for each of the {len(paths)} variables. "
            f"Received: {len(mapping)} entries"
        )
    pairs: list[tuple[Any, Axes | None]] = []
    for entry, path in zip(mapping, paths, strict=True):
        key, axes = entry if isinstance(entry, tuple | list) else (entry, None)
        key = names.get(key, key)  # type: ignore[arg-type]
        if key not in keys or key in (used for used, _ in pairs):
            raise ValueError(
                f"Each entry of `mapping` must be one of {[*names, *keys]}, once. "
                f"Received: {entry!r} for {path!r}"
            )
        pairs.append((key, axes))
    return pairs


def transposed(slots: Slots, axes: Axes | None) -> Slots:
    """Return slots with their axes in another order; None: as they are.

    Args:
        slots: Arrays.
        axes: See `numpy.transpose`.

    Raises:
        ValueError: These are not the axes of the arrays.
    """

    def one(x: Array) -> Array:
        if axes is None:
            return x
        if sorted(axes) != list(range(x.ndim)):
            raise ValueError(
                f"The axes in `mapping` must be those of an array of shape {x.shape}. "
                f"Received: {axes}"
            )
        return np.transpose(x, axes)

    return slots.map(one)
