"""Files that come too early wait: with plain objects, no optimizer."""

import numpy as np
import pytest
from keras_rmsprop.backends.plain import NoClocks

from keras_rmsprop.alignment import Owner
from keras_rmsprop.restoring import Restorer
from keras_rmsprop.slots import Keeper


class Place:
    """A variable, as far as saving knows one."""

    def __init__(self, value, name=""):
        self.value, self.name, self.shape = np.array(value), name, np.shape(value)

    def assign(self, value):
        self.value = np.array(value)

    def numpy(self):
        return self.value


class Store(dict):
    """Holds arrays, and their names as HDF5 does."""

    class Attributes:
        def __init__(self):
            self.attrs = {}

    def __init__(self):
        super().__init__()
        self._h5_entry_group = {}

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self._h5_entry_group[key] = self.Attributes()


def made(rate=0.5):
    """Return a restorer, what builds its optimizer, and the variables there are."""
    keeper, variables, owners = Keeper(), [Place(rate, "learning_rate")], []
    restored = [0]

    def build():
        owners.append(Owner("dense/kernel", (2,)))
        slot = keeper.find_or_make(
            "velocity", 0, 0, lambda: Place([0.0, 0.0]), lambda: [0.0, 0.0]
        )
        variables.append(slot)

    restorer = Restorer(
        keeper, lambda: variables, lambda: owners, int, NoClocks(), lambda: restored[0]
    )
    return restorer, build, variables, restored


@pytest.fixture
def store():
    restorer, build, variables, _ = made(rate=0.25)
    build()
    variables[1].assign([3.0, 4.0])
    found = Store()
    restorer.save(found, built=True)
    return found


def test_what_is_there_is_loaded_at_once(store):
    restorer, build, variables, _ = made()
    build()
    restorer.load(store, built=True, who="it")
    assert not restorer.waits
    assert [v.value.tolist() for v in variables] == [0.25, [3.0, 4.0]]


def test_slots_wait_and_a_rate_set_meanwhile_stays(store):
    restorer, build, variables, _ = made()
    restorer.load(store, built=False, who="it")
    assert restorer.waits
    assert variables[0].value == 0.25
    variables[0].assign(0.125)
    build()
    restorer.load_what_waits("it")
    assert not restorer.waits
    assert [v.value.tolist() for v in variables] == [0.125, [3.0, 4.0]]


def test_a_checkpoint_that_comes_later_counts(store):
    restorer, build, variables, restored = made()
    restorer.load(store, built=False, who="it")
    build()
    restored[0] += 1
    restorer.load_what_waits("it")
    assert variables[1].value.tolist() == [0.0, 0.0]


def test_what_waits_is_saved_again(store):
    restorer, _, variables, _ = made()
    restorer.load(store, built=False, who="it")
    variables[0].assign(0.125)
    again = Store()
    restorer.save(again, built=False)
    assert [np.asarray(x).tolist() for x in again.values()] == [0.125, [3.0, 4.0]]


def test_state_that_is_foreign_is_skipped_and_the_rate_put_back(store):
    store["1"] = np.array([-3.0, 4.0])
    store._h5_entry_group["1"].attrs |= {"kind": "velocity", "path": "dense/kernel"}
    restorer, build, variables, _ = made()
    restorer.load(store, built=False, who="it")
    build()
    with pytest.warns(
        UserWarning, match="Skipping variable loading for optimizer 'it'"
    ):
        restorer.load_what_waits("it")
    assert [v.value.tolist() for v in variables] == [0.5, [0.0, 0.0]]
