"""State in files: HDF5 files in memory and dicts for stores, arrays for variables."""

import io
import json

import h5py
import numpy as np
import pytest

from keras_rmsprop import planning, saving
from keras_rmsprop.alignment import Owner
from keras_rmsprop.planning import RefusedError, plan
from keras_rmsprop.saving import File, Name, Value


class Store:
    """A store as Keras gives it with HDF5: values with attributes, keys as text."""

    def __init__(self):
        self._h5_entry_group = h5py.File(io.BytesIO(), "w")
        self.keys = self._h5_entry_group.keys
        self.read = []

    def __setitem__(self, key, value):
        self._h5_entry_group[key] = value

    def __getitem__(self, key):
        self.read.append(key)
        return np.array(self._h5_entry_group[key])

    def attributes(self, key):
        return self._h5_entry_group[key].attrs


A, B = Owner("a/kernel", (2,)), Owner("b/kernel", (3,))
ITERATION, RATE = Name("iteration"), Name("learning_rate")


def v(owner):
    return Name("velocity", owner)


def m(owner):
    return Name("momentum", owner)


def state(*owners, momentum=False, start=0):
    """Return what is written for these owners: each value has numbers of its own."""
    numbers = range(len(owners))
    names = [ITERATION, RATE, *map(v, numbers), *(map(m, numbers) if momentum else ())]
    return {
        name: np.full(
            () if name.owner is None else owners[name.owner].shape, start + i, "float32"
        )
        for i, name in enumerate(names)
    }


def file_of(values, owners, **options):
    return File(
        [Value(n, x.shape, x.dtype, lambda x=x: x) for n, x in values.items()],
        owners,
        **options,
    )


def unnamed(values):
    file = file_of(values, [])
    return file._replace(values=[v._replace(name=None) for v in file.values])


def planned(file, places, owners, **options):
    return plan(file, places, owners, **{"in_order": True, **options})


def arrays(done):
    return {name: value.read() for name, value in done.values.items()}


def assert_same(got, expected):
    assert [*got] == [*expected]
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def written(values, owners, store=None):
    store = Store() if store is None else store
    saving.write(store, values.items(), owners, in_model_order=True)
    return store


def test_what_was_written_is_read():
    owners = [Owner(f"{n}/kernel", (n,), n) for n in range(12)]
    values = {v(n): np.full(n, n) for n in range(12)}
    store = written(values, owners)
    assert [*store.keys()][:3] == ["0", "1", "10"]
    read = saving.read(store)
    assert not store.read  # shapes first
    assert [value.shape for value in read.values] == [(n,) for n in range(12)]
    assert_same({value.name: value.read() for value in read.values}, values)
    assert [*read.owners] == owners
    assert read.in_model_order
    # What other versions will look for.
    attributes = dict(store.attributes("2"))
    assert attributes.pop("kind") == "velocity"
    assert json.loads(attributes.pop("owner")) == {
        "path": "2/kernel",
        "shape": [2],
        "weights": 2,
        "number": 2,
        "in_order": True,
    }
    assert not attributes


def test_owners_of_which_there_is_nothing_are_left_out():
    store = written({m(1): np.ones(3), m(2): np.zeros(2)}, [A, B, A])
    read = saving.read(store)
    assert read.owners == [B, A]
    assert [value.name for value in read.values] == [m(0), m(1)]


def test_an_order_that_is_not_certain_is_told():
    store = Store()
    saving.write(store, state(A).items(), [A], in_model_order=False)
    assert not saving.read(store).in_model_order


def test_without_attributes_places_are_left():
    store = written(state(A), [A], {})
    assert [*store] == ["0", "1", "2"]
    read = saving.read(store)
    assert not read.has_names
    assert read.in_model_order
    assert_same(arrays(planned(read, state(A), [A])), state(A))


@pytest.mark.parametrize(
    "attributes",
    [
        {"kind": 3},
        {"kind": np.ones(2)},
        {"owner": 3},
        {"owner": "no JSON"},
        {"owner": "[]"},
        {"owner": "{}"},
        {"owner": json.dumps({"number": "x"})},
        {"codes": saving.codecs.CODES},
        {"codes": saving.codecs.CODES, "shape": [10**9]},
    ],
    ids=str,
)
def test_attributes_that_say_nothing_are_an_error(attributes):
    store = written(state(A), [A])
    for name, value in attributes.items():
        store.attributes("2")[name] = value
    with pytest.raises(ValueError, match=r"The file must say what value '2' is. Rec"):
        saving.read(store)


def test_what_is_not_in_the_file_itself_is_an_error(tmp_path):
    store = written(state(A), [A])
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.ones(2)
    store._h5_entry_group["3"] = h5py.ExternalLink(tmp_path / "other.h5", "x")
    for read in saving.read, saving.copied:
        with pytest.raises(ValueError, match=r"must not be a link. Received: '3'"):
            read(store)


@pytest.mark.parametrize("made", [Store, dict], ids=["HDF5", "dict"])
def test_a_copy_is_read_as_the_store_is(made):
    store = written(state(A, B), [A, B], made())
    with saving.opened(saving.copied(store)) as file:
        expected = saving.read(store)
        assert [x.name for x in file.values] == [x.name for x in expected.values]
        assert file.owners == expected.owners
        for x, y in zip(file.values, state(A, B).values(), strict=True):
            np.testing.assert_array_equal(x.read(), y)


def test_a_copy_takes_no_more_than_is_in_the_file():
    store = Store()
    more = {"shape": (10**8,), "dtype": "f4", "chunks": (2**20,), "compression": "gzip"}
    store._h5_entry_group.create_dataset("0", **more)
    assert len(saving.copied(store).getvalue()) < 10**5


def test_a_copy_of_text_is_refused():
    with pytest.raises(ValueError, match=r"value '0': received \(1,\) of <U1"):
        saving.copied({"0": np.array(["x"])})


def test_what_fits_is_taken_over_without_a_word():
    values = state(A, B, momentum=True)
    places = state(A, B, momentum=True, start=50)
    for file in file_of(values, [A, B]), unnamed(values):
        done = planned(file, places, [A, B])
        assert_same(arrays(done), values)
        assert (done.fresh, done.warning) == ([], "")


def test_an_option_switched_on_or_off():
    with_m, without = state(A, B, momentum=True), state(A, B)
    on = planned(file_of(without, [A, B]), with_m, [A, B])
    assert_same(arrays(on), without)
    assert on.fresh == [m(0), m(1)]
    assert on.warning == (
        "The state was saved with other options or for other variables. "
        "Started fresh: 2 `momentum`. Left out: nothing."
    )
    off = planned(file_of(with_m, [A, B]), without, [A, B])
    assert_same(arrays(off), without)
    assert off.fresh == []
    assert "fresh: nothing. Left out: 2 `momentum`." in off.warning


def test_layers_frozen_or_unfrozen():
    more = planned(file_of(state(A), [A]), state(A, B), [A, B])
    assert_same(arrays(more), state(A))
    assert more.fresh == [v(1)]
    assert "fresh: 1 `velocity`. Left out: nothing" in more.warning
    fewer = planned(file_of(state(A, B), [A, B]), state(B), [B])
    np.testing.assert_array_equal(arrays(fewer)[v(0)], state(A, B)[v(1)])
    assert [*fewer.values] == [ITERATION, RATE, v(0)]
    assert "fresh: nothing. Left out: 1 `velocity`" in fewer.warning


def test_variables_without_anything_are_no_owners():
    # As of float8 training: they are in no file, unless gradients are accumulated.
    scale = Owner("a/scale", ())
    names = [ITERATION, RATE, v(0), v(2)]
    values = dict(zip(names, state(A, B).values(), strict=True))
    done = planned(file_of(state(A, B), [A, B]), values, [A, scale, B])
    assert_same(arrays(done), values)
    assert not done.warning
    sums = Name("gradient_accumulator", 1)
    values[sums] = np.ones(())
    done = planned(file_of(values, [A, scale, B]), values, [A, scale, B])
    assert_same(arrays(done), values)
    assert not done.warning


def test_by_the_order_of_the_model_or_by_name():
    one, two = Owner("dense/kernel", (2,)), Owner("dense_1/kernel", (2,))
    values = state(one, two)
    for options, first, warning in (
        ({}, 0, True),
        ({"in_model_order": False}, 1, False),
    ):
        file = file_of(values, [one, two], **options)
        done = planned(file, values, [two, one])
        np.testing.assert_array_equal(arrays(done)[v(0)], values[v(first)])
        assert ("other names" in done.warning) == warning
    done = planned(file_of(values, [one, two]), values, [two, one], in_order=False)
    np.testing.assert_array_equal(arrays(done)[v(0)], values[v(1)])


def test_other_names_are_told():
    other = Owner("other/kernel", (2,))
    done = planned(file_of(state(A), [A]), state(other), [other])
    np.testing.assert_array_equal(arrays(done)[v(0)], state(A)[v(0)])
    assert done.warning == (
        "The variables in the file have other names; they were matched by their "
        "positions."
    )
    both = planned(file_of(state(A), [A]), state(other, momentum=True), [other])
    assert "Left out: nothing. The variables in the file" in both.warning


def test_what_only_this_optimizer_has_need_not_be_there():
    offset = Name("rounding_offset")
    places = state(A) | {offset: np.int32(7)}
    for file in file_of(state(A), [A]), unnamed(state(A)):
        done = planned(file, places, [A])
        assert_same(arrays(done), state(A))
        assert not done.fresh
        assert not done.warning
    # Nor be left out where it is.
    assert_same(arrays(planned(unnamed(places), places, [A])), places)


def test_what_is_left_out_is_counted_by_its_kind():
    a, b = Name("average_gradient", 0), Name("average_gradient", 1)
    more = state(A, B) | {b: np.ones(3), m(0): np.ones(2), a: np.ones(2)}
    done = planned(file_of(more, [A, B]), state(A, B), [A, B])
    assert done.warning.endswith("Left out: 2 `average_gradient`, 1 `momentum`.")


def test_a_shape_that_does_not_fit_starts_fresh():
    wide = Owner("b/kernel", (5,))
    done = planned(file_of(state(A, B), [A, B]), state(A, wide), [A, wide])
    assert_same(arrays(done), state(A))
    assert done.fresh == [v(1)]
    assert "fresh: 1 `velocity`. Left out: 1 `velocity`" in done.warning


SIZES = [Owner(f"{n}/kernel", (n,)) for n in (3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (file_of({ITERATION: np.int64(1)}, []), "there are no averages in the file"),
        (
            file_of(state(*SIZES), SIZES),
            "no shape fits: `velocity` of 'a/kernel': expected shape (2,), "
            "received (3,), (4,), (5,)",
        ),
        (
            unnamed(state(A, B)),
            "it holds the state of no RMSprop with these options: 4 values without "
            "names, not 3",
        ),
        (
            unnamed(state(A, A)),
            "it holds the state of Adam, or of no RMSprop with these options: 4 values "
            "without names, not 3",
        ),
    ],
)
def test_the_state_of_another_optimizer_is_refused(file, message):
    with pytest.raises(RefusedError) as e:
        planned(file, state(A), [A])
    assert str(e.value) == message


def test_without_names_and_order_nothing_can_be_told():
    with pytest.raises(RefusedError, match="no names, and the order of the model's"):
        planned(unnamed(state(A)), state(A), [A], in_order=False)


def test_what_is_no_number_is_an_error():
    bad = state(A, B) | {v(0): np.array(["x", "y"]), v(1): np.ones(3, "complex64")}
    with pytest.raises(
        ValueError, match=r"does not fit. `velocity` of 'a/kernel': rec"
    ) as e:
        planned(file_of(bad, [A, B]), state(A, B), [A, B])
    assert (
        "received (2,) of <U1, `velocity` of 'b/kernel': received (3,) of complex64"
        in str(e.value)
    )


def value_of(kind, x, owner=None):
    x = np.asarray(x)
    return Value(Name(kind, owner), x.shape, x.dtype, lambda: x)


BAD = [
    *(("iteration", x) for x in (-5, np.nan, np.inf, 1.5, 2.0**31)),
    *(("skipped_steps", x) for x in (-1, np.nan)),
    *((kind, x) for kind in planning.OURS for x in (-1, 0.5)),
    *(
        (k, x)
        for k in (RATE.kind, "learning_rate_factor")
        for x in (-1, np.nan, np.inf)
    ),
    ("learning_rate_estimate", [-1, 0, 0, 0, 0, 0, 0, 1]),
    ("learning_rate_estimate", [1, np.nan, 0, 0, 0, 0, 0, 1]),
    *(("learning_rate_estimate", [1, 0, 0, 0, 0, 0, q, 1]) for q in (-2, 2, np.nan)),
    *(("learning_rate_estimate", [1, 0, 0, 0, 0, 0, 0, k]) for k in (-1, 2, np.nan)),
]


@pytest.mark.parametrize(("kind", "x"), BAD, ids=str)
def test_numbers_that_cannot_be_are_refused(kind, x):
    with pytest.raises(RefusedError, match=f"`{kind}` must be"):
        planning.checked(value_of(kind, x), np.zeros(np.shape(x), "int32"))


@pytest.mark.parametrize("kind", ["velocity", "momentum", "average_gradient"])
def test_slots_with_nan_are_refused(kind):
    with pytest.raises(RefusedError, match=f"`{kind}`: it has NaN"):
        planning.checked(value_of(kind, [1, np.nan], 0), np.zeros(2))


def test_averages_of_squares_may_be_zero_and_not_less():
    place = np.zeros(2)
    for kind, x in (("velocity", [0, 1e-9]), ("momentum", [-1.0, 0])):
        np.testing.assert_array_equal(planning.checked(value_of(kind, x, 0), place), x)
    with pytest.raises(RefusedError, match=r"cannot be negative. It may be of SGD or"):
        planning.checked(value_of("velocity", [1, -1e-9], 0), place)


def test_numbers_that_may_be():
    for kind, x in (
        ("iteration", 2**31 - 1),
        ("iteration", 0.0),
        ("learning_rate", 0),
        ("learning_rate_estimate", [1, -5, 2, 0, 0, 0, -0.5, 0.5]),
        ("own", np.nan),  # a subclass' own
    ):
        place = np.zeros(np.shape(x), "int32")
        np.testing.assert_array_equal(planning.checked(value_of(kind, x), place), x)


def test_slots_in_a_file():
    without = {ITERATION: np.ones(()), RATE: np.ones(())}
    assert file_of(state(A), [A]).may_have_slots
    assert not file_of(without, []).may_have_slots
    assert unnamed(without).may_have_slots  # nothing says what they are
    assert not File([], []).may_have_slots


def test_who_walks_through_all_attributes():
    def asked():
        return saving.is_walking()

    def caller(name):
        scope = {"__name__": name, "asked": asked}
        exec("answer = asked()", scope)
        return scope["answer"]

    assert caller("keras.src.saving.saving_lib")
    assert not caller("keras.src.saving")
