"""State in files, with dicts for stores and arrays for variables."""

import types

import numpy as np
import pytest

from keras_rmsprop import saving
from keras_rmsprop.alignment import Owner
from keras_rmsprop.saving import File, ForeignStateError, Name, Plan, plan, updated


class Store(dict):
    """A store as Keras gives it with HDF5: values with attributes, keys as text."""

    def __init__(self):
        self._h5_entry_group = {}

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self._h5_entry_group[key] = types.SimpleNamespace(attrs={})

    def keys(self):
        return sorted(super().keys())


A, B = Owner("a/kernel", (2,)), Owner("b/kernel", (3,))
ITERATION, RATE = Name("iteration", ""), Name("learning_rate", "")


def v(owner):
    return Name("velocity", owner.path)


def m(owner):
    return Name("momentum", owner.path)


def state(*owners, momentum=False, start=0):
    """Return what is written for these owners: each value has numbers of its own."""
    names = [ITERATION, RATE, *map(v, owners), *(map(m, owners) if momentum else ())]
    shapes = {owner.path: owner.shape for owner in owners}
    return {
        name: np.full(shapes.get(name.path, ()), start + number, "float32")
        for number, name in enumerate(names)
    }


def file_of(values, **options):
    keys = [*map(str, range(len(values)))]
    return File(
        dict(zip(keys, values.values(), strict=True)),
        dict(zip(keys, values, strict=True)),
        **options,
    )


def unnamed(values):
    return file_of(values)._replace(names={})


def assert_same(got, expected):
    assert [*got] == [*expected]
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_what_was_written_is_read():
    values = {Name("velocity", f"{n}/kernel"): np.full(n, n) for n in range(12)}
    store = Store()
    saving.write(store, values.items())
    assert [*store.keys()][:3] == ["0", "1", "10"]
    read = saving.read(store)
    assert_same(read.values, {str(n): np.full(n, n) for n in range(12)})
    assert [*read.names.values()] == [*values]
    assert read.in_model_order
    # What other versions will look for.
    attributes = store._h5_entry_group["2"].attrs
    assert attributes == {"kind": "velocity", "path": "2/kernel", "order": "model"}


def test_without_attributes_places_are_left():
    store = {}
    saving.write(store, state(A).items())
    assert [*store] == ["0", "1", "2"]
    read = saving.read(store)
    assert read.names == {}
    assert read.in_model_order
    assert_same(plan(read, state(A), [A]).values, state(A))


def test_files_of_0_1_0():
    store = Store()
    saving.write(store, [(Name("accumulator", "a/kernel"), np.ones(2))])
    del store._h5_entry_group["0"].attrs["order"]
    store["clock_0_last"] = np.ones(2)
    read = saving.read(store)
    assert read.names == {"0": Name("gradient_accumulator", "a/kernel")}
    assert [*read.values] == ["0", "clock_0_last"]
    assert not read.in_model_order


def test_some_values_are_written_anew():
    file = file_of(state(A, B))
    new = np.full(3, 9.0)
    written = updated(file, [(v(B), new), (Name("velocity", "other"), new)])
    assert_same(dict(written), state(A, B) | {v(B): new})
    # What has no name keeps its place.
    (kept,) = updated(unnamed({ITERATION: 5}), [(ITERATION, 6)])
    assert kept == (Name("", ""), 5)


def test_what_fits_is_taken_over_without_a_word():
    values = state(A, B, momentum=True)
    for file in file_of(values), unnamed(values):
        done = plan(file, state(A, B, momentum=True, start=50), [A, B])
        assert_same(done.values, values)
        assert done == Plan(done.values, [], {}, "")


def test_an_option_switched_on_or_off():
    with_m, without = state(A, B, momentum=True), state(A, B)
    on = plan(file_of(without), with_m, [A, B])
    assert_same(on.values, without)
    assert on.fresh == [m(A), m(B)]
    assert on.warning == (
        "The state was saved with other options or for other variables. "
        "Started fresh: 2 `momentum`. Left out: nothing."
    )
    off = plan(file_of(with_m), without, [A, B])
    assert_same(off.values, without)
    assert off.fresh == []
    assert "fresh: nothing. Left out: 2 `momentum`." in off.warning


def test_layers_frozen_or_unfrozen():
    more = plan(file_of(state(A)), state(A, B), [A, B])
    assert_same(more.values, state(A))
    assert more.fresh == [v(B)]
    assert "fresh: 1 `velocity`. Left out: nothing" in more.warning
    fewer = plan(file_of(state(A, B)), state(B), [B])
    assert_same(fewer.values, {n: state(A, B)[n] for n in (ITERATION, RATE, v(B))})
    assert "fresh: nothing. Left out: 1 `velocity`" in fewer.warning


def test_by_the_order_of_the_model_or_by_name():
    one, two = Owner("dense/kernel", (2,)), Owner("dense_1/kernel", (2,))
    values = state(one, two)
    mine = state(two, one)
    by_place = plan(file_of(values), mine, [two, one])
    np.testing.assert_array_equal(by_place.values[v(two)], values[v(one)])
    by_name = plan(file_of(values, in_model_order=False), mine, [two, one])
    np.testing.assert_array_equal(by_name.values[v(two)], values[v(two)])
    assert by_place.warning == by_name.warning == ""


def test_other_names_are_told():
    other = Owner("other/kernel", (2,))
    done = plan(file_of(state(A)), state(other), [other])
    np.testing.assert_array_equal(done.values[v(other)], state(A)[v(A)])
    assert done.warning == (
        "The variables in the file have other names; they were matched by their places."
    )
    both = plan(file_of(state(A)), state(other, momentum=True), [other])
    assert "Left out: nothing. The variables in the file" in both.warning


def test_what_only_this_optimizer_has_need_not_be_there():
    offset = Name("rounding_offset", "")
    places = state(A) | {offset: np.int32(7)}
    for file in file_of(state(A)), unnamed(state(A)):
        done = plan(file, places, [A])
        assert_same(done.values, state(A))
        assert not done.fresh
        assert not done.warning
    # Nor be left out where it is.
    done = plan(unnamed(places), places, [A])
    assert_same(done.values, places)


def test_clocks_of_0_1_0():
    last = np.array([1, 2])
    named = file_of(state(A) | {Name("clock_last", A.path): last})
    positions = unnamed(state(A))
    positions.values["clock_0_last"] = last
    positions.values["clock_1_last"] = positions.values["other_0_last"] = last + 1
    positions.values["clock_x"] = last + 1
    for file in named, positions:
        done = plan(file, state(A), [A])
        assert_same(done.clocks, {Name("clock_last", A.path): last})
        assert_same(done.values, state(A))
        assert not done.warning


def test_what_is_left_out_is_counted_by_its_kind():
    a, b = Name("average_gradient", A.path), Name("average_gradient", B.path)
    more = state(A, B) | {b: np.ones(3), m(A): np.ones(2), a: np.ones(2)}
    done = plan(file_of(more), state(A, B), [A, B])
    assert done.warning.endswith("Left out: 2 `average_gradient`, 1 `momentum`.")


def test_a_shape_that_does_not_fit_starts_fresh():
    wide = Owner("b/kernel", (5,))
    done = plan(file_of(state(A, B)), state(A, wide), [A, wide])
    assert_same(done.values, {n: state(A)[n] for n in (ITERATION, RATE, v(A))})
    assert done.fresh == [v(wide)]
    assert "fresh: 1 `velocity`. Left out: 1 `velocity`" in done.warning


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({ITERATION: np.int64(1)}, "there are no averages in the file"),
        (
            state(*(Owner(f"{n}/kernel", (n,)) for n in (3, 4, 5, 6))),
            "no shape fits: `velocity` of 'a/kernel': expected shape (2,), "
            "received (3,), (4,), (5,)",
        ),
        (
            {Name("", "z"): np.ones(3), RATE: 1, ITERATION: 1},
            "no shape fits: `velocity` of 'a/kernel': expected shape (2,), "
            "received nothing",
        ),
        (
            state(A) | {v(A): np.array([1.0, -1e-9])},
            "averages of squares cannot be negative, as some in the file are. It may "
            "hold the state of SGD or Adam",
        ),
    ],
)
def test_the_state_of_another_optimizer_is_refused(values, message):
    values = {name: np.asarray(value) for name, value in values.items()}
    with pytest.raises(ForeignStateError) as e:
        plan(file_of(values), state(A), [A])
    assert str(e.value) == message


def test_averages_may_be_zero():
    values = state(A) | {v(A): np.array([0.0, 1e-9])}
    assert_same(plan(file_of(values), state(A), [A]).values, values)


def test_without_names_the_number_must_be_right():
    with pytest.raises(ForeignStateError) as e:
        plan(unnamed(state(A, B)), state(A), [A])
    assert str(e.value) == "it has 3 variables, the file 4 without names"


def test_what_is_no_number_is_an_error():
    bad = state(A, B) | {v(A): np.array(["x", "y"]), v(B): np.ones(3, "complex64")}
    with pytest.raises(
        ValueError, match=r"does not fit. `velocity` of 'a/kernel': rec"
    ) as e:
        plan(file_of(bad), state(A, B), [A, B])
    assert (
        "received (2,) of <U1, `velocity` of 'b/kernel': received (3,) of complex64"
        in str(e.value)
    )


def test_an_optimizer_that_is_not_built_takes_its_two_numbers():
    both = {ITERATION: np.asarray(4), RATE: np.asarray(0.5)}
    assert_same(plan(file_of(both), both, []).values, both)
    done = plan(file_of(state(A)), both, [])
    assert [*done.values] == [ITERATION, RATE]
    assert "Left out: 1 `velocity`" in done.warning


def test_slots_in_a_file():
    without = {ITERATION: np.ones(()), RATE: np.ones(())}
    assert saving.has_slots(file_of(state(A)))
    assert not saving.has_slots(file_of(without))
    assert saving.has_slots(unnamed(without))  # nothing says what they are
    assert not saving.has_slots(File({}, {}))


def test_who_walks_through_all_attributes():
    def asked():
        return saving.is_walking()

    def caller(name):
        scope = {"__name__": name, "asked": asked}
        exec("answer = asked()", scope)
        return scope["answer"]

    assert caller("keras.src.saving.saving_lib")
    assert not caller("keras.src.saving")
