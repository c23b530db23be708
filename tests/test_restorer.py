"""Files that come too early are pending: with plain objects, no optimizer."""

import io
import re

import h5py
import numpy as np
import pytest
from small_models import user_warnings

from keras_rmsprop import restoring
from keras_rmsprop.restoring import Contents
from keras_rmsprop.slots import Book, Order


class Variable:
    """A variable, as far as saving knows one."""

    def __init__(self, value, name=""):
        self.value, self.name, self.path = np.array(value, "float32"), name, name
        self.shape, self.dtype = np.shape(value), "float32"

    def assign(self, value):
        self.value = np.array(value)

    def numpy(self):
        return self.value

    def __array__(self, dtype=None, copy=None):
        return self.value


class Store:
    """A store as Keras gives it with HDF5."""

    def __init__(self):
        self._h5_entry_group = h5py.File(io.BytesIO(), "w")
        self.keys = self._h5_entry_group.keys

    def __setitem__(self, key, value):
        if key in self._h5_entry_group:
            del self._h5_entry_group[key]
        self._h5_entry_group[key] = value

    def __getitem__(self, key):
        return np.array(self._h5_entry_group[key])


def made(rate=0.5):
    """Return what an optimizer holds before it is built, and a function to build it."""
    contents = Contents([Variable(rate, "learning_rate")], Book(), [], {})

    def build():
        contents.weights.append(Variable([1.0, 2.0], "dense/kernel"))
        contents.indices["key"] = 0
        contents.book.order = Order().then(["key"])
        slot = contents.book.find_or_make(
            "velocity", "key", lambda: Variable([0.0, 0.0]), lambda: [0.0, 0.0]
        )
        contents.variables.append(slot)

    return contents, build


def values(contents):
    return [v.value.tolist() for v in contents.variables]


@pytest.fixture
def store():
    contents, build = made(rate=0.25)
    build()
    contents.variables[1].assign([3.0, 4.0])
    found = Store()
    restoring.save(found, contents, None)
    return found


def test_what_is_there_is_loaded_at_once(store):
    contents, build = made()
    build()
    restoring.load(store, contents, "it")
    assert values(contents) == [0.25, [3.0, 4.0]]


def test_slots_are_pending_and_a_rate_set_meanwhile_stays(store):
    contents, build = made()
    pending = restoring.load_later(store, contents, 0, "it")
    assert values(contents) == [0.25]
    contents.variables[0].assign(0.125)
    store._h5_entry_group.close()  # the file may be gone by then
    build()
    restoring.load_pending(pending, contents, 0, "it")
    assert values(contents) == [0.125, [3.0, 4.0]]


def test_a_checkpoint_that_comes_later_counts(store):
    contents, build = made()
    pending = restoring.load_later(store, contents, 0, "it")
    build()
    restoring.load_pending(pending, contents, 1, "it")
    assert values(contents)[1] == [0.0, 0.0]


def test_what_is_pending_is_saved_again(store):
    contents, _ = made()
    pending = restoring.load_later(store, contents, 0, "it")
    contents.variables[0].assign(0.125)
    again = Store()
    restoring.save(again, contents, pending)
    contents, build = made()
    build()
    restoring.load(again, contents, "it")
    assert values(contents) == [0.125, [3.0, 4.0]]


def test_a_file_before_any_slots_is_not_pending():
    contents, _ = made(rate=0.25)
    store = Store()
    restoring.save(store, contents, None)
    other, _ = made()
    assert restoring.load_later(store, other, 0, "it") is None
    assert values(other) == [0.25]


def put(store, key, value):
    attributes = dict(store._h5_entry_group[key].attrs)
    store[key] = value
    for name, attribute in attributes.items():
        store._h5_entry_group[key].attrs[name] = attribute


SKIPPED = "Skipping variable loading for optimizer 'it'"


@pytest.mark.parametrize("changed", [None, 0.125])
def test_what_is_refused_leaves_the_rate_as_it_was_or_as_it_was_set(store, changed):
    put(store, "1", np.array([-3.0, 4.0]))
    contents, build = made()
    pending = restoring.load_later(store, contents, 0, "it")
    if changed is not None:
        contents.variables[0].assign(changed)
    build()
    with pytest.warns(UserWarning, match=f"{SKIPPED}: `velocity`: .* negative"):
        restoring.load_pending(pending, contents, 0, "it")
    assert values(contents) == [changed or 0.5, [0.0, 0.0]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0", np.nan, "`learning_rate` must be finite and >= 0"),
        ("0", np.ones(3), r"`learning_rate` must have shape \(\). Received: \(3,\)"),
        ("1", np.array([1.0, np.nan]), "`velocity`: it has NaN"),
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_what_is_refused_changes_nothing(store, key, value, message, built):
    put(store, key, value)
    contents, build = made()
    if built:
        build()
    before = values(contents)
    if built and np.shape(value) == (3,):
        message = "Started fresh: 1 `learning_rate`"  # the rest fits
        before[1] = [3.0, 4.0]
    with user_warnings() as warned:
        if built:
            restoring.load(store, contents, "it")
        else:
            pending = restoring.load_later(store, contents, 0, "it")
            build()
            before.append([0.0, 0.0])
            if pending:
                restoring.load_pending(pending, contents, 0, "it")
    assert len(warned) == 1
    assert re.search(message, warned[0])
    assert values(contents) == before


def test_an_attribute_of_another_type_is_an_error_at_once(store):
    store._h5_entry_group["1"].attrs["kind"] = 3
    contents, _ = made()
    with pytest.raises(ValueError, match="The file must say what value '1' is"):
        restoring.load_later(store, contents, 0, "it")
    assert values(contents) == [0.5]
