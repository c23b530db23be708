"""Which variable in a file belongs to which variable of the model.

Keras finds weights by their place in the model, and this module does the same for their
slots. Names are a check: Keras numbers layers as they are made, so `dense_1` in one
process may be `dense` in another.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple


class Owner(NamedTuple):
    """A variable of a model, as far as it can be told from a file."""

    path: str
    shape: tuple[int, ...]


class Alignment(NamedTuple):
    """Which variable in the file is which of mine."""

    places: list[int | None]
    """For each variable in the file, its index among mine, or None."""
    names_differ: bool = False
    """Whether variables were matched whose names say that they are others."""


def aligned(
    theirs: Sequence[Owner], mine: Sequence[Owner], *, by_name: bool = False
) -> Alignment:
    """Find the variables of a file among those of a model.

    If there are as many, with the same shapes, each is at its place: unless the names,
    apart from the numbers that Keras gives, are the same in another order, or only some
    are the same. Otherwise the order is kept, and if there are several ways to match
    them, only what all of them agree on counts.

    Args:
        theirs: The variables in the file, in its order.
        mine: My variables, in my order.
        by_name: Whether the same names in another order mean another order even if
            Keras may have given them.

    Example:
        >>> a, b, c = (Owner(f"{name}/kernel", (2,)) for name in "abc")
        >>> aligned([a, b], [b, a]).places, aligned([b], [a, b, c]).places
        ([1, 0], [1])
    """
    same_shapes = [o.shape for o in theirs] == [o.shape for o in mine]
    if same_shapes and not by_name and _all_equal(theirs, mine, _without_numbers):
        return Alignment([*range(len(theirs))])
    for short in (_whole, _layer):
        found = _by_name(theirs, mine, short)
        if found is not None and (by_name or same_shapes):
            return Alignment(found)
    # Where some names are the same, others that differ mean other variables.
    names_count = bool(
        {_layer(o.path) for o in theirs} & {_layer(o.path) for o in mine}
    )
    if same_shapes and not names_count:
        found = [*range(len(theirs))]
    else:
        found = _in_order(theirs, mine, names_count)
    differ = any(
        i is not None and _without_numbers(owner.path) != _without_numbers(mine[i].path)
        for owner, i in zip(theirs, found, strict=True)
    )
    return Alignment(found, differ)


def _whole(path: str) -> str:
    return path


def _layer(path: str) -> str:
    """Return a path without the names of models, which a loaded model may lack."""
    return "/".join(path.split("/")[-2:])


def _without_numbers(path: str) -> str:
    return re.sub(r"_\d+(?=/|$)", "", _layer(path))


def _leaf(path: str) -> str:
    return _without_numbers(path).split("/")[-1]


def _all_equal(
    theirs: Sequence[Owner], mine: Sequence[Owner], short: Callable[[str], Hashable]
) -> bool:
    return [short(o.path) for o in theirs] == [short(o.path) for o in mine]


def _by_name(
    theirs: Sequence[Owner], mine: Sequence[Owner], short: Callable[[str], str]
) -> list[int | None] | None:
    """Return the places by name; None if one is missing, misfits or occurs twice."""
    places = {short(o.path): i for i, o in enumerate(mine)}
    names = [short(o.path) for o in theirs]
    if len(places) < len(mine) or len({*names}) < len(names):
        return None
    if not ({*names} <= places.keys() or places.keys() <= {*names}):
        return None
    found = [places.get(name) for name in names]
    fits = all(
        i is None or mine[i].shape == owner.shape
        for i, owner in zip(found, theirs, strict=True)
    )
    return found if fits else None


def _likeness(a: Owner, b: Owner, names_count: bool) -> int:
    """Return how much speaks for two being the same variable; 0: nothing does."""
    if a.shape != b.shape or _leaf(a.path) != _leaf(b.path):
        return 0
    for points, short in ((8, _whole), (7, _layer), (2, _without_numbers)):
        if short(a.path) == short(b.path):
            return points
    return 0 if names_count else 1


def _in_order(
    theirs: Sequence[Owner], mine: Sequence[Owner], names_count: bool
) -> list[int | None]:
    """Return the places that every best match in order agrees on."""
    forward = _best(theirs, mine, names_count)
    n = len(mine)
    backward = [
        None if place is None else n - 1 - place
        for place in _best(theirs[::-1], mine[::-1], names_count)[::-1]
    ]
    return [a if a == b else None for a, b in zip(forward, backward, strict=True)]


def _best(
    theirs: Sequence[Owner], mine: Sequence[Owner], names_count: bool
) -> list[int | None]:
    """Return a match in order with the most likeness; of equal ones the earliest."""
    rows, columns = len(theirs), len(mine)
    # best[i][j]: what the rest of theirs from i and of mine from j can reach.
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    likeness = [[_likeness(a, b, names_count) for b in mine] for a in theirs]
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            like = likeness[i][j]
            best[i][j] = max(
                best[i + 1][j],
                best[i][j + 1],
                like + best[i + 1][j + 1] if like else 0,
            )
    places: list[int | None] = [None] * rows
    i = j = 0
    while i < rows and j < columns:
        like = likeness[i][j]
        if like and best[i][j] == like + best[i + 1][j + 1]:
            places[i] = j
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return places
