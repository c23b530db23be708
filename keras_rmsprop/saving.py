"""State in files: matched by variable and by what it is, not by position alone.

Values are saved in the places that Keras gives them, so that a file moves between this
optimizer and `keras.optimizers.RMSprop`. Beside each stands, as an attribute in the
file, what it is and of which variable. By that it is found again when an option was
switched on or off since, or when variables were added.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_rmsprop.state import is_real


class Name(NamedTuple):
    """What a value is."""

    kind: str
    """As in `velocity` or `iteration`."""
    path: str
    """The path of the variable that it belongs to; empty if to none."""


class File(NamedTuple):
    """What was saved."""

    values: dict[str, NDArray[Any]]
    """In the order in which they were saved."""
    names: dict[str, Name]
    """By the same keys; empty in a file of the built-in."""


def write(store: Any, values: Mapping[str, tuple[Name, Any]]) -> None:
    """Write variables to a store, and their names where it can hold them.

    Args:
        store: What Keras passes to `save_own_variables`.
        values: Names and variables, by key.
    """
    for key, (name, variable) in values.items():
        store[key] = variable.numpy()
        attributes = _attributes(store, key)
        attributes["kind"], attributes["path"] = name


def read(store: Any) -> File:
    """Return what a store holds.

    Args:
        store: What Keras passes to `load_own_variables`.
    """
    file = File({}, {})
    # HDF5 sorts the keys as text: 10 before 2.
    for key in sorted(store.keys(), key=lambda key: (not key.isdigit(), len(key), key)):
        file.values[key] = np.asarray(store[key])
        attributes = _attributes(store, key)
        if "kind" in attributes:
            file.names[key] = Name(attributes["kind"], attributes["path"])
    return file


def _attributes(store: Any, key: str) -> Any:
    """Return the attributes of a value in an HDF5 file; there is no public way there.

    Elsewhere it is a dict, soon lost: then values are found by their position.
    """
    try:
        return store._h5_entry_group[key].attrs
    except (AttributeError, KeyError, TypeError):
        return {}


def renamed(file: File, paths: Sequence[str]) -> dict[Name, NDArray[Any]]:
    """Return what a file with names holds, under the paths of my variables.

    Args:
        file: What was saved.
        paths: The paths of my variables, in the optimizer's order.

    Raises:
        ValueError: These are not the variables of the file.
    """
    theirs = [name.path for name in file.names.values() if name.kind == "velocity"]
    for short in (_whole, _layer):
        a, b = {short(path): path for path in theirs}, {short(p): p for p in paths}
        unique = len(a) == len(theirs) and len(b) == len(paths)
        if unique and (a.keys() <= b.keys() or b.keys() <= a.keys()):
            mine = {path: b.get(key, path) for key, path in a.items()}
            break
    else:
        # Keras numbers layers as they are made, `dense_1` after `dense`: it is another
        # instance of the model.
        if len(theirs) != len(paths):
            raise ValueError(
                "The file must hold the state of the same variables, or some of them. "
                f"Received: {_some(theirs)} for {_some(paths)}"
            )
        mine = dict(zip(theirs, paths, strict=True))
    return {
        Name(name.kind, mine.get(name.path, name.path)): file.values[key]
        for key, name in file.names.items()
    }


def _whole(path: str) -> str:
    return path


def _layer(path: str) -> str:
    """Return a path without the names of models, which a loaded model may lack."""
    return "/".join(path.split("/")[-2:])


def clock_name(key: str, paths: Sequence[str]) -> Name:
    """Return what a key like `clock_3_last` stands for.

    Args:
        key: The key.
        paths: The paths of the variables.
    """
    _, index, kind = key.split("_")
    return Name(f"clock_{kind}", paths[int(index)])


def matched(
    values: Mapping[Name, NDArray[Any]], places: Mapping[Name, Any]
) -> tuple[list[tuple[Any, NDArray[Any]]], list[tuple[Name, Any]]]:
    """Return pairs of a variable and the value for it, and the variables without one.

    A warning says which variables start fresh, and which values nobody took.

    Args:
        values: What was saved, under the paths of my variables.
        places: My variables.

    Raises:
        ValueError: A value has another shape than its variable, or is no number.
    """
    found = {name: values[name] for name in places if name in values}
    wrong = [
        f"`{name.kind}` of {name.path!r}: expected shape {tuple(places[name].shape)}, "
        f"received {value.shape} of {value.dtype}"
        for name, value in found.items()
        if tuple(places[name].shape) != value.shape or not is_real(value)
    ]
    if wrong:
        raise ValueError("The state in the file does not fit. " + "; ".join(wrong))
    fresh, left = places.keys() - found.keys(), values.keys() - found.keys()
    if fresh or left:
        warnings.warn(
            "The state was saved with other options or for other variables. Started "
            f"fresh: {_counted(fresh)}. Left out: {_counted(left)}.",
            stacklevel=2,
        )
    pairs = [(places[name], value) for name, value in found.items()]
    return pairs, [(name, places[name]) for name in fresh]


def _counted(names: Iterable[Name]) -> str:
    kinds = Counter(name.kind for name in names)
    return ", ".join(f"{n} `{kind}`" for kind, n in sorted(kinds.items())) or "nothing"


def _some(paths: Sequence[str]) -> str:
    return f"{len(paths)} variables ({', '.join([*paths[:3], '...'][: len(paths)])})"
