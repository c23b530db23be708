"""Which variable in a file belongs to which variable of the model.

The weights tell: a variable with the weights that one had when the file was saved is
that one. Then names and positions do. Keras finds weights by their position in the
model, and names are a check, as Keras numbers layers as they are made: `dense_1` in one
process may be `dense` in another.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple


class Owner(NamedTuple):
    """A variable of a model, as far as it can be told from a file."""

    path: str
    shape: tuple[int, ...]
    weights: int | None = None
    """A checksum of a sample of its weights, if these tell it from others."""


class Alignment(NamedTuple):
    """Which variable in the file is which of mine."""

    indices: list[int | None]
    """For each variable in the file, its index among mine, or None."""
    names_differ: bool = False
    """Whether variables were matched whose names say that they are others."""


def aligned(
    theirs: Sequence[Owner], mine: Sequence[Owner], *, in_order: bool = True
) -> Alignment:
    """Find the variables of a file among those of a model.

    Those with the same weights are the same. The layers' names that they show hold for
    the other variables of these layers. If both orders are the model's, the others are
    found by their positions, with names as a check (see `_by_positions`); else by their
    names alone (see `_by_names`).

    Args:
        theirs: The variables in the file, in its order.
        mine: My variables, in my order.
        in_order: Whether both orders are the model's.

    Example:
        >>> a, b, c = (Owner(f"{name}/kernel", (2,)) for name in "abc")
        >>> aligned([a, b], [b, a]).indices, aligned([b], [a, b, c]).indices
        ([1, 0], [1])
    """
    indices: list[int | None] = _unique(theirs, mine, _weights)
    layers = {
        _parent(owner.path): _parent(mine[i].path)
        for owner, i in zip(theirs, indices, strict=True)
        if i is not None
    }
    rest = [i for i, index in enumerate(indices) if index is None]
    free = [i for i in range(len(mine)) if i not in indices]
    called = [_in_layer(theirs[i], layers) for i in rest]
    match = _by_positions if in_order else _by_names
    found, names_differ = match(called, [mine[i] for i in free])
    for i, index in zip(rest, found, strict=True):
        indices[i] = None if index is None else free[index]
    return Alignment(indices, names_differ)


def _weights(owner: Owner) -> Hashable:
    return owner.weights if owner.weights is None else (owner.weights, owner.shape)


def _in_layer(owner: Owner, layers: dict[str, str]) -> Owner:
    """Return a variable under the name that its layer has here, if that is known."""
    parent = _parent(owner.path)
    leaf = owner.path.removeprefix(parent)
    return owner._replace(path=layers.get(parent, parent) + leaf)


def _unique(
    theirs: Sequence[Owner],
    mine: Sequence[Owner],
    feature: Callable[[Owner], Hashable],
) -> list[int | None]:
    """Return the indices of those with a feature that only one here and there has."""
    indices = {feature(owner): i for i, owner in enumerate(mine)}
    counts = [Counter(map(feature, owners)) for owners in (theirs, mine)]
    return [
        indices[f] if f is not None and all(c[f] == 1 for c in counts) else None
        for f in map(feature, theirs)
    ]


def _by_names(theirs: Sequence[Owner], mine: Sequence[Owner]) -> Alignment:
    """Match by names alone: by whole paths, then by less and less of their ends.

    Only if no layer has the same name, numbers and then all names are left aside.
    """
    depth = max((o.path.count("/") for o in (*theirs, *mine)), default=0) + 1
    exact = [_end(parts) for parts in range(max(depth, 2), 1, -1)]
    loose = [] if _share_names(theirs, mine) else [_kind_of_layer, _kind]
    found: list[int | None] = [None] * len(theirs)
    differ = False
    for feature in [*exact, *loose]:
        rest = [i for i, index in enumerate(found) if index is None]
        free = [i for i in range(len(mine)) if i not in found]
        matches = _unique([theirs[i] for i in rest], [mine[i] for i in free], feature)
        for i, index in zip(rest, matches, strict=True):
            if index is not None:
                found[i] = free[index]
                differ = differ or feature in loose
    return Alignment(found, differ)


def _end(parts: int) -> Callable[[Owner], Hashable]:
    return lambda o: (tuple(o.path.split("/")[-parts:]), o.shape)


def _kind_of_layer(owner: Owner) -> Hashable:
    return _without_numbers(owner.path), owner.shape


def _kind(owner: Owner) -> Hashable:
    return _leaf(owner.path), owner.shape


def _by_positions(theirs: Sequence[Owner], mine: Sequence[Owner]) -> Alignment:
    """Match by position, with names as a check.

    If there are as many, with the same shapes, each has kept its position: unless the
    names, apart from the numbers that Keras gives, are the same in another order, or
    only some are the same. Otherwise the order is kept, and if there are several ways
    to match them, only what all of them agree on counts.
    """
    same_shapes = [o.shape for o in theirs] == [o.shape for o in mine]
    if same_shapes and _all_equal(theirs, mine, _without_numbers):
        # Layers made in another order, most likely; or it is not the model's order.
        differ = _permuted(theirs, mine, _layer) not in (None, [*range(len(mine))])
        return Alignment([*range(len(theirs))], differ)
    for short in (_whole, _layer) if same_shapes else ():
        permuted = _permuted(theirs, mine, short)
        if permuted is not None:
            return Alignment(permuted)
    # Where some names are the same, others that differ mean other variables.
    names_count = _share_names(theirs, mine)
    if same_shapes and not names_count:
        found: list[int | None] = [*range(len(theirs))]
    else:
        found = _in_order(theirs, mine, names_count)
    differ = any(
        i is not None and _without_numbers(owner.path) != _without_numbers(mine[i].path)
        for owner, i in zip(theirs, found, strict=True)
    )
    return Alignment(found, differ)


def _whole(path: str) -> str:
    return path


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _layer(path: str) -> str:
    """Return a path without the names of models, which a loaded model may lack."""
    return "/".join(path.split("/")[-2:])


def _without_numbers(path: str) -> str:
    return re.sub(r"_\d+(?=/|$)", "", _layer(path))


def _leaf(path: str) -> str:
    return _without_numbers(path).split("/")[-1]


def _share_names(theirs: Sequence[Owner], mine: Sequence[Owner]) -> bool:
    return bool({_layer(o.path) for o in theirs} & {_layer(o.path) for o in mine})


def _all_equal(
    theirs: Sequence[Owner], mine: Sequence[Owner], short: Callable[[str], Hashable]
) -> bool:
    return [short(o.path) for o in theirs] == [short(o.path) for o in mine]


def _permuted(
    theirs: Sequence[Owner], mine: Sequence[Owner], short: Callable[[str], str]
) -> list[int | None] | None:
    """Return the indices by name; None if one is missing, misfits or occurs twice."""
    indices = {short(o.path): i for i, o in enumerate(mine)}
    names = [short(o.path) for o in theirs]
    if len(indices) < len(mine) or sorted(names) != sorted(indices):
        return None
    found = [indices[name] for name in names]
    fits = all(mine[i].shape == o.shape for i, o in zip(found, theirs, strict=True))
    return [*found] if fits else None


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
    """Return the indices that every best match in order agrees on."""
    forward = _best(theirs, mine, names_count)
    n = len(mine)
    backward = [
        None if index is None else n - 1 - index
        for index in _best(theirs[::-1], mine[::-1], names_count)[::-1]
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
    indices: list[int | None] = [None] * rows
    i = j = 0
    while i < rows and j < columns:
        like = likeness[i][j]
        if like and best[i][j] == like + best[i + 1][j + 1]:
            indices[i] = j
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return indices
