"""Which value of a file belongs where, and whether it can be what it says."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_rmsprop import checks, codecs
from keras_rmsprop.alignment import Owner, aligned
from keras_rmsprop.codecs import ROUNDING_OFFSET
from keras_rmsprop.saving import File, Name, Value, not_numeric
from keras_rmsprop.slots import (
    EMA_BEGIN,
    ITERATION,
    OF_SEARCH,
    RATE,
    RATE_ESTIMATE,
    RATE_FACTOR,
    VELOCITY,
)
from keras_rmsprop.state import is_real, wrong_numbers

SKIPPED_STEPS = "skipped_steps"
OURS = (ROUNDING_OFFSET, SKIPPED_STEPS, EMA_BEGIN)
"""Kinds that the built-in does not have, and that a file may lack."""
_NOT_IN_BUILT_IN = *OURS, *OF_SEARCH
BACK = checks.Range(lambda x: abs(x) < 1.01, "in [-1, 1]")  # but for rounding


class RefusedError(Exception):
    """A file cannot be the state of this optimizer; nothing was changed."""


class Plan(NamedTuple):
    """What loading a file would do."""

    values: dict[Name, Value]
    """The value for each place."""
    fresh: list[Name]
    """What starts fresh, as the file has nothing for it."""
    warning: str = ""
    """What a user should know, or nothing."""


def plan(
    file: File, places: Mapping[Name, Any], owners: Sequence[Owner], *, in_order: bool
) -> Plan:
    """Decide where each value in a file goes, and what starts fresh.

    Args:
        file: What was saved.
        places: What there is to load into, in the optimizer's order: anything that has
            a shape.
        owners: The model's variables that the optimizer was built with.
        in_order: Whether they stand in the model's order.

    Raises:
        RefusedError: The file holds the state of another optimizer, or none.
        ValueError: A value is not numeric.
    """
    if file.has_names:
        named, left, names_differ = _by_name(file, places, owners, in_order)
    else:
        named, left, names_differ = _by_position(file, places, in_order), [], False
    _check_numeric([*named.items(), *((v.name, v) for v in left)], owners)
    fitting = {
        name: named[name]
        for name, place in places.items()
        if name in named and codecs.fits(place, named[name])
    }
    mine = [name for name in places if name.owner is not None]
    theirs = [value for name, value in named.items() if name.owner is not None] + [
        value for value in left if value.name and value.name.owner is not None
    ]
    if mine and not theirs:
        raise RefusedError("there are no averages in the file")
    if mine and not any(codecs.fits(places[n], v) for n in mine for v in theirs):
        raise RefusedError(f"no shape fits: {_first_misfit(theirs, places, owners)}")
    fresh = [n for n in places if n not in fitting and n.kind not in OURS]
    unused = [name for name in named if name not in fitting]
    unused += [value.name for value in left if value.name]
    unused = [name for name in unused if name.kind != ROUNDING_OFFSET]
    warning = ""
    if fresh or unused:
        warning = (
            "The state was saved with other options or for other variables. Started "
            f"fresh: {_counted(fresh)}. Left out: {_counted(unused)}."
        )
    if names_differ:
        warning = (
            f"{warning} The variables in the file have other names; they were matched "
            "by their positions."
        ).strip()
    return Plan(fitting, fresh, warning)


def _by_name(
    file: File, places: Mapping[Name, Any], owners: Sequence[Owner], in_order: bool
) -> tuple[dict[Name, Value], list[Value], bool]:
    """Return values under my names, those without one, and whether names differ."""
    # A variable that nothing belongs to, as of float8 training, is in no file.
    mine = sorted({name.owner for name in places if name.owner is not None})
    found, names_differ = aligned(
        file.owners,
        [owners[i] for i in mine],
        in_order=in_order and file.in_model_order,
    )
    named, left = {}, []
    for value in file.values:
        kind, owner = value.name or Name("")
        index = None if owner is None else found[owner]
        if owner is not None and index is None:
            left.append(value)
        else:
            named[Name(kind, None if index is None else mine[index])] = value
    return named, left, names_differ


def _by_position(
    file: File, places: Mapping[Name, Any], in_order: bool
) -> dict[Name, Value]:
    """Return the values of a file without names, which may be the built-in's."""
    count = len(file.values)
    by_position = [
        n._replace(kind=RATE) if n.kind == RATE_FACTOR else n
        for n in places
        if n.kind not in _NOT_IN_BUILT_IN
    ]
    if count == len(places):
        by_position = [*places]
    plain = [n for n in by_position if n.kind in (ITERATION, RATE, VELOCITY)]
    if count == len(plain):
        by_position = plain
    if count != len(by_position):
        shapes = [value.shape for value in file.values if value.shape]
        is_of_pairs = bool(shapes) and shapes[::2] == shapes[1::2]
        raise RefusedError(
            f"it holds the state of {'Adam, or of ' if is_of_pairs else ''}no RMSprop "
            f"with these options: {count} values without names, not {len(by_position)}"
        )
    if not in_order:
        raise RefusedError(
            "its values have no names, and the order of the model's variables is not "
            "known. Call `optimizer.build(model.trainable_variables)` before"
        )
    return dict(zip(by_position, file.values, strict=True))


def _check_numeric(
    values: Sequence[tuple[Name | None, Value]], owners: Sequence[Owner]
) -> None:
    wrong = [
        not_numeric(described(name, owners), value.shape, value.dtype)
        for name, value in values
        if name and not is_real(value.dtype)
    ]
    if wrong:
        raise ValueError(f"The state in the file does not fit. {', '.join(wrong)}")


def described(name: Name, owners: Sequence[Owner]) -> str:
    """Return what a value is, and whose, for a message."""
    if name.owner is None or name.owner >= len(owners):
        return f"`{name.kind}`"
    return f"`{name.kind}` of {owners[name.owner].path!r}"


def checked(value: Value, place: Any) -> NDArray[Any]:
    """Read a value, and check it as the constructor would.

    Args:
        value: The value, with its name among mine.
        place: Where it is to go.

    Raises:
        RefusedError: It cannot be.
        ValueError: It is not numeric.
    """
    assert value.name is not None
    name, kind = value.name, value.name.kind.partition("#")[0]
    if not is_real(value.dtype):
        raise ValueError(not_numeric(f"`{kind}`", value.shape, value.dtype))
    if not codecs.fits(place, value):
        raise RefusedError(
            f"`{kind}` must have shape {tuple(place.shape)}. Received: {value.shape}"
        )
    array = codecs.understood(place, value.read())
    why = wrong_numbers(kind, array) if name.slot >= 0 else ""
    if why:
        other = "" if "NaN" in why else ". It may be of SGD or Adam"
        raise RefusedError(f"`{kind}`: {why}{other}")
    if name.owner is None:
        try:
            _check_number(kind, array, place)
        except ValueError as error:
            raise RefusedError(str(error)) from error
    return array


def _check_number(kind: str, array: NDArray[Any], place: Any) -> None:
    if kind in (ITERATION, *OURS):
        most = np.iinfo(str(place.dtype)).max
        if not np.all((array == np.floor(array)) & (array >= 0) & (array <= most)):
            raise ValueError(
                f"`{kind}` must be an integer in [0, {most}]. Received: {array}"
            )
    elif kind in (RATE, RATE_FACTOR):
        checks.number(kind, float(array), checks.NOT_NEGATIVE)
    elif kind == RATE_ESTIMATE:
        distance, gain, steps, path, _, longest, back, brake = map(float, array)
        gain = abs(gain)  # it has any sign
        for number in (distance, gain, steps, path, longest):
            checks.number(kind, number, checks.NOT_NEGATIVE)
        checks.number(kind, back, BACK)
        checks.number(kind, brake, checks.UP_TO_ONE)


def _first_misfit(
    theirs: Sequence[Value], places: Mapping[Name, Any], owners: Sequence[Owner]
) -> str:
    name = next(n for n in places if n.owner is not None)
    received = [v.shape for v in theirs if v.name is None or v.name.kind == name.kind]
    return (
        f"{described(name, owners)}: expected shape {tuple(places[name].shape)}, "
        f"received {', '.join(map(str, received[:3])) or 'nothing'}"
    )


def _counted(names: Iterable[Name]) -> str:
    kinds = Counter(name.kind for name in names)
    return ", ".join(f"{n} `{kind}`" for kind, n in sorted(kinds.items())) or "nothing"
