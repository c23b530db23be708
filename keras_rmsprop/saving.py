"""State in files: what is written, and which value belongs where when it is read.

Values are saved in the places that Keras gives them, so that a file can move between
this optimizer and `keras.optimizers.RMSprop`. An attribute beside each value says what
it is and which variable it belongs to. So it is found again when an option has been
switched on or off since, or when layers have been frozen or unfrozen.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_rmsprop import codecs, rule
from keras_rmsprop.alignment import Owner, aligned
from keras_rmsprop.codecs import ROUNDING_OFFSET
from keras_rmsprop.slots import OF_SEARCH, RATE, RATE_FACTOR
from keras_rmsprop.state import is_real

OURS = (ROUNDING_OFFSET, "skipped_steps")
"""Kinds that the built-in does not have, and that a file may lack."""
_NOT_IN_BUILT_IN = *OURS, *OF_SEARCH
_ORDER = "order"
"""The attribute that says in which order variables stand: `"model"`, the model's. In
files of version 0.1.0, which lack it, those unfrozen later come last."""
_CODES, _SHAPE = "codes", "shape"
"""The attributes of what is kept in codes: in which, and the shape of the weights."""
_KINDS_OF_0_1 = {"accumulator": "gradient_accumulator"}


class Name(NamedTuple):
    """What a value is."""

    kind: str
    """As in `velocity` or `iteration`."""
    path: str
    """The path of the model's variable that it belongs to; empty if there is none."""

    @property
    def slot(self) -> int:
        """Which slot of its variable it is; -1 if it is something else."""
        kind, slots = self.kind.partition("#")[0], rule.Slots._fields
        return slots.index(kind) if self.path and kind in slots else -1


class File(NamedTuple):
    """The contents of a file."""

    values: dict[str, NDArray[Any]]
    """In the order in which they were saved."""
    names: dict[str, Name]
    """By the same keys; empty in a file of the built-in."""
    in_model_order: bool = True


def updated(file: File, values: Sequence[tuple[Name, Any]]) -> list[tuple[Name, Any]]:
    """Return what a file holds, with other values for some of it, to be written."""
    new = dict(values)
    held = [
        (file.names.get(key, Name("", "")), file.values[key]) for key in file.values
    ]
    return [(name, new.get(name, value)) for name, value in held]


class Plan(NamedTuple):
    """What loading a file would do."""

    values: dict[Name, NDArray[Any]]
    """The value for each place."""
    fresh: list[Name]
    """What starts fresh, as the file has nothing for it."""
    clocks: dict[Name, NDArray[Any]]
    """The row clocks in a file of version 0.1.0."""
    warning: str = ""
    """What a user should know, or nothing."""


class ForeignStateError(Exception):
    """A file does not hold the state of an RMSprop optimizer."""


def write(store: Any, values: Iterable[tuple[Name, Any]]) -> None:
    """Write arrays to a store, and their names where it can hold them.

    Args:
        store: What Keras passes to `save_own_variables`.
        values: Names and arrays, in order.
    """
    for number, (name, value) in enumerate(values):
        key = str(number)
        stored = getattr(value, "stored", value)
        store[key] = stored
        attributes = _attributes(store, key)
        attributes["kind"], attributes["path"] = name
        attributes[_ORDER] = "model"
        if stored is not value:
            attributes[_CODES] = codecs.CODES
            attributes[_SHAPE] = value.shape


def read(store: Any) -> File:
    """Return what a store holds.

    Args:
        store: What Keras passes to `load_own_variables`.
    """
    values, names, in_order = {}, {}, True
    # HDF5 sorts the keys as text: 10 before 2.
    for key in sorted(store.keys(), key=lambda key: (not key.isdigit(), len(key), key)):
        values[key] = np.asarray(store[key])
        attributes = _attributes(store, key)
        if "kind" in attributes:
            kind = attributes["kind"]
            names[key] = Name(_KINDS_OF_0_1.get(kind, kind), attributes["path"])
            in_order = in_order and _ORDER in attributes
            if attributes.get(_CODES) == codecs.CODES:
                values[key] = codecs.numbers(
                    values[key], tuple(attributes[_SHAPE]), names[key].slot
                )
    return File(values, names, in_order)


def is_walking() -> bool:
    """Whether the caller's caller is Keras' saving, which looks at all attributes.

    Without Keras' module of today the answer is no.
    """
    caller = sys._getframe(2).f_globals.get("__name__")
    return caller == "keras.src.saving.saving_lib"


def has_slots(file: File) -> bool:
    """Whether a file may hold slots: not if it was saved before there were any."""
    if file.names:
        return any(name.path for name in file.names.values())
    return bool(file.values)


def _attributes(store: Any, key: str) -> Any:
    """Return the attributes of a value in an HDF5 file; there is no public way there.

    For other stores return a dict that is thrown away: their values have no names.
    """
    try:
        if key in store._h5_entry_group:
            return store._h5_entry_group[key].attrs
        # In one of the other files, if weights are saved in several.
        for name in store.current_shard_filenames:
            store._switch_h5_file(name, mode="r")
            if key in store._h5_entry_group:
                return dict(store._h5_entry_group[key].attrs)
    except (AttributeError, KeyError, TypeError):
        pass
    finally:
        if hasattr(store, "_restore_h5_file"):
            store._restore_h5_file()
    return {}


def plan(file: File, places: Mapping[Name, Any], owners: Sequence[Owner]) -> Plan:
    """Decide where each value in a file goes, and what starts fresh.

    Args:
        file: What was saved.
        places: What there is to load into, in the optimizer's order: anything that has
            a shape.
        owners: The model's variables that the optimizer was built with.

    Raises:
        ForeignStateError: The file holds the state of another optimizer, or none.
        ValueError: A value is not numeric.
    """
    values, names_differ = _named(file, places, owners)
    for name in values.keys() & places.keys():
        if isinstance(place := places[name], codecs.Place):
            values[name] = place.understood(values[name])
    wrong = [name for name, value in values.items() if not is_real(value)]
    if wrong:
        shown = ", ".join(
            f"`{name.kind}` of {name.path!r}: received {values[name].shape} of "
            f"{values[name].dtype}"
            for name in wrong
        )
        raise ValueError(f"The state in the file does not fit. {shown}")
    clocks = {n: values.pop(n) for n in [*values] if n.kind.startswith("clock_")}
    fitting = {
        name: values[name]
        for name, place in places.items()
        if name in values and tuple(place.shape) == values[name].shape
    }
    mine = {tuple(place.shape) for name, place in places.items() if name.path}
    if mine and not any(name.path for name in values):
        raise ForeignStateError("there are no averages in the file")
    shapes = {value.shape for name, value in values.items() if name.path}
    if mine and not shapes & mine:
        raise ForeignStateError(f"no shape fits: {_first_misfit(values, places)}")
    if any((v < 0).any() for n, v in fitting.items() if n.kind == "velocity"):
        raise ForeignStateError(
            "averages of squares cannot be negative, as some in the file are. It may "
            "hold the state of SGD or Adam"
        )
    fresh = [n for n in places if n not in fitting and n.kind not in OURS]
    left = {n for n in values.keys() - fitting.keys() if n.kind != ROUNDING_OFFSET}
    warning = ""
    if fresh or left:
        warning = (
            "The state was saved with other options or for other variables. Started "
            f"fresh: {_counted(fresh)}. Left out: {_counted(left)}."
        )
    if names_differ:
        warning = (
            f"{warning} The variables in the file have other names; they were matched "
            "by their places."
        ).strip()
    return Plan(fitting, fresh, clocks, warning)


def _named(
    file: File, places: Mapping[Name, Any], owners: Sequence[Owner]
) -> tuple[dict[Name, NDArray[Any]], bool]:
    """Return a file's values under my names, and whether names contradict that."""
    paths = [owner.path for owner in owners]
    if not file.names:
        keys = [key for key in file.values if key.isdigit()]
        by_position = [
            Name(RATE, "") if n.kind == RATE_FACTOR else n
            for n in places
            if n.kind not in _NOT_IN_BUILT_IN
        ]
        if len(keys) == len(places):
            by_position = [*places]
        if len(keys) != len(by_position):
            raise ForeignStateError(
                f"it has {len(by_position)} variables, the file {len(keys)} without "
                "names"
            )
        values = {
            name: file.values[key] for name, key in zip(by_position, keys, strict=True)
        }
        for key in file.values.keys() - {*keys}:
            name = _clock_without_name(key, paths)
            if name:
                values[name] = file.values[key]
        return values, False
    theirs = [
        Owner(name.path, file.values[key].shape)
        for key, name in file.names.items()
        if name.kind == "velocity"
    ]
    found, names_differ = aligned(theirs, owners, by_name=not file.in_model_order)
    mine = {
        owner.path: None if i is None else paths[i]
        for owner, i in zip(theirs, found, strict=True)
    }
    values = {}
    for key, (kind, path) in file.names.items():
        to = mine.get(path) if path else ""
        # What has no place here keeps its name, to be counted.
        values[Name(kind, f"{path} (file)" if to is None else to)] = file.values[key]
    return values, names_differ


def _clock_without_name(key: str, paths: Sequence[str]) -> Name | None:
    """Return what a key like `clock_3_last` of version 0.1.0 stands for."""
    kind, index, what = [*key.split("_"), "", ""][:3]
    if kind != "clock" or not index.isdigit() or int(index) >= len(paths):
        return None
    return Name(f"clock_{what}", paths[int(index)])


def _first_misfit(
    values: Mapping[Name, NDArray[Any]], places: Mapping[Name, Any]
) -> str:
    name = next(n for n in places if n.path)
    received = [v.shape for n, v in values.items() if n.kind == name.kind]
    return (
        f"`{name.kind}` of {name.path!r}: expected shape {tuple(places[name].shape)}, "
        f"received {', '.join(map(str, received[:3])) or 'nothing'}"
    )


def _counted(names: Iterable[Name]) -> str:
    kinds = Counter(name.kind for name in names)
    return ", ".join(f"{n} `{kind}`" for kind, n in sorted(kinds.items())) or "nothing"
