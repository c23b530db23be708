"""State in files: what is written, and which value belongs where when it is read.

Values are saved where Keras saves them, so that a file can move between
this optimizer and `keras.optimizers.RMSprop`. Attributes beside each value say what it
is and which variable it belongs to. So it is found again when an option has been
switched on or off since, or when layers have been frozen or unfrozen.

A file is read in two passes: shapes and attributes first, then the values that fit, one
at a time. So nothing that is in a file can take more memory than the optimizer does.
"""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from keras_rmsprop import codecs, rule
from keras_rmsprop.alignment import Owner
from keras_rmsprop.state import is_real

_KIND, _OWNER = "kind", "owner"
"""The attributes that say what a value is, and whose, as JSON."""
_CODES, _SHAPE = "codes", "shape"
"""The attributes of what is kept in codes: in which, and the shape of the weights."""


class Name(NamedTuple):
    """What a value is."""

    kind: str
    """As in `velocity` or `iteration`."""
    owner: int | None = None
    """The number of the model's variable that it belongs to; None if there is none."""

    @property
    def slot(self) -> int:
        """Which slot of its variable it is; -1 if it is something else."""
        kind, slots = self.kind.partition("#")[0], rule.Slots._fields
        is_slot = self.owner is not None and kind in slots
        return slots.index(kind) if is_slot else -1


class Value(NamedTuple):
    """A value in a file."""

    name: Name | None
    """None in a file of the built-in."""
    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], NDArray[Any]]
    """Returns it."""


class File(NamedTuple):
    """What is in a file."""

    values: Sequence[Value]
    """In the order in which they were saved."""
    owners: Sequence[Owner]
    """The model's variables; a name has the number of one."""
    in_model_order: bool = True
    """Whether they stand in the model's order, as far as the optimizer knew."""

    @property
    def has_names(self) -> bool:
        """Whether it says what its values are."""
        return any(value.name for value in self.values)

    @property
    def may_have_slots(self) -> bool:
        """Whether it may hold slots: not if it was saved before there were any."""
        return bool(self.owners or (self.values and not self.has_names))


def write(
    store: Any,
    values: Iterable[tuple[Name | None, Any]],
    owners: Sequence[Owner],
    *,
    in_model_order: bool,
) -> None:
    """Write arrays to a store, and what they are where it can hold that.

    Args:
        store: What Keras passes to `save_own_variables`.
        values: Names and arrays, in order.
        owners: The model's variables.
        in_model_order: Whether these stand in the model's order.
    """
    for number, (name, value) in enumerate(values):
        key = str(number)
        stored = getattr(value, "stored", value)
        store[key] = stored
        with _dataset(store, key) as dataset:
            if name is None or dataset is None:
                continue
            dataset.attrs[_KIND] = name.kind
            if name.owner is not None:
                more = {"number": name.owner, "in_order": in_model_order}
                dataset.attrs[_OWNER] = json.dumps(owners[name.owner]._asdict() | more)
            if stored is not value:
                dataset.attrs[_CODES] = codecs.CODES
                dataset.attrs[_SHAPE] = value.shape


def read(store: Any) -> File:
    """Return what a store holds; the values are read later.

    Args:
        store: What Keras passes to `load_own_variables`.

    Raises:
        ValueError: What the file says about a value makes no sense.
    """
    values: list[Value] = []
    owners: dict[Any, Owner] = {}
    are_in_order = []
    for key in _keys(store):
        with _dataset(store, key) as dataset:
            header = np.asarray(store[key]) if dataset is None else dataset
            shape, dtype = tuple(header.shape), header.dtype
            attributes = {} if dataset is None else dict(dataset.attrs)
        load: Callable[[], Any] = functools.partial(_loaded, store, key)
        if codecs.noted_dtype(attributes):
            dtype = np.dtype("float32")  # which has all of its numbers
        try:
            name, owner, is_in_order = _said(attributes)
            if name and attributes.get(_CODES) == codecs.CODES:
                codes, shape = shape, (*map(int, attributes[_SHAPE]),)
                if (codes, dtype) != (codecs.shape_of_codes(shape), np.uint8):
                    raise ValueError(codes)
                dtype = np.dtype("float32")
                load = functools.partial(_decoded, load, shape, name.slot)
        except (TypeError, ValueError, KeyError) as error:
            shown = ", ".join(f"{k}={str(v)[:60]!r}" for k, v in attributes.items())
            raise ValueError(
                f"The file must say what value {key!r} is. Received: {shown}"
            ) from error
        if name and owner:
            owners[name.owner] = owner
            are_in_order.append(is_in_order)
        values.append(Value(name, shape, dtype, load))
    numbers = sorted(owners)
    index_of: dict[Any, int] = {number: i for i, number in enumerate(numbers)}
    if any(value.name for value in values):
        values = [
            value._replace(
                name=value.name._replace(owner=index_of.get(value.name.owner))
            )
            for value in values
            if value.name
        ]
    return File(values, [owners[i] for i in numbers], all(are_in_order))


def _keys(store: Any) -> list[str]:
    """Return the keys in the order of saving: HDF5 sorts them as text, 10 before 2."""
    return sorted(store.keys(), key=lambda key: (not key.isdigit(), len(key), key))


def _said(attributes: Mapping[str, Any]) -> tuple[Name | None, Owner | None, bool]:
    """Return what attributes say: name, owner, and if owners are in the model's order.

    Raises:
        KeyError, TypeError, ValueError: It makes no sense.
    """
    if _KIND not in attributes:
        return None, None, True
    kind = attributes[_KIND]
    if not isinstance(kind, str):
        raise TypeError(kind)
    if _OWNER not in attributes:
        return Name(kind), None, True
    given = json.loads(attributes[_OWNER])
    number, path, weights = (given[key] for key in ("number", "path", "weights"))
    is_good = isinstance(path, str) and isinstance(weights, int | None)
    if not (is_good and isinstance(number, int)):
        raise TypeError(given)
    owner = Owner(path, (*map(int, given["shape"]),), weights)
    return Name(kind, number), owner, bool(given["in_order"])


def _loaded(store: Any, key: str) -> NDArray[Any]:
    return np.asarray(store[key])  # older versions of Keras give an `h5py.Dataset`


def _decoded(
    load: Callable[[], NDArray[Any]], shape: tuple[int, ...], slot: int
) -> codecs.Numbers:
    return codecs.numbers(load(), shape, slot)


def copied(store: Any) -> io.BytesIO:
    """Return a copy of what a store holds, as an HDF5 file: values as they are there.

    Args:
        store: What Keras passes to `load_own_variables`.

    Raises:
        ValueError: A value is not numeric.
    """
    copy = io.BytesIO()
    with h5py.File(copy, "w") as file:
        for key in _keys(store):
            with _dataset(store, key) as dataset:
                if dataset is not None:
                    file.copy(dataset, key)
                    continue
            value = np.asarray(store[key])
            if not is_real(value.dtype):
                raise ValueError(
                    not_numeric(f"value {key!r}", value.shape, value.dtype)
                )
            file.create_dataset(key, data=value)
            codecs.note_dtype(file[key].attrs, value.dtype)
    return copy


@contextlib.contextmanager
def opened(copy: io.BytesIO) -> Iterator[File]:
    """Read such a copy."""
    with h5py.File(copy, "r") as file:
        yield read(_Copy(file))


class _Copy:
    """A store, as Keras gives it."""

    def __init__(self, file: Any) -> None:
        self._h5_entry_group = file
        self.keys = file.keys

    def __getitem__(self, key: str) -> NDArray[Any]:
        dataset = self._h5_entry_group[key]
        return np.array(dataset, dtype=codecs.noted_dtype(dataset.attrs))


def is_walking() -> bool:
    """Whether the caller's caller is Keras' saving, which looks at all attributes.

    Without Keras' module of today the answer is no.
    """
    caller = sys._getframe(2).f_globals.get("__name__")
    return caller == "keras.src.saving.saving_lib"


@contextlib.contextmanager
def _dataset(store: Any, key: str) -> Iterator[Any]:
    """Give the dataset of a value; None if the store is no HDF5 file.

    There is no public way to it. Keras refuses what would read another file.
    """
    try:
        yield _found_dataset(store, key)
    finally:
        if hasattr(store, "_restore_h5_file"):
            store._restore_h5_file()


def _found_dataset(store: Any, key: str) -> Any:
    group: Any = getattr(store, "_h5_entry_group", {})
    # In one of the other files, if weights are saved in several.
    for name in getattr(store, "current_shard_filenames", ()):
        if key in group:
            break
        store._switch_h5_file(name, mode="r")
        group = store._h5_entry_group
    if key not in group:
        return None
    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"A value in a file must not be a link. Received: {key!r}")
    dataset = group[key]
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"A value must be in the file itself. Received: {key!r}")
    return dataset


def not_numeric(what: str, shape: Any, dtype: Any) -> str:
    """Return what is not numeric, for a message."""
    return f"{what}: received {shape} of {dtype}"
