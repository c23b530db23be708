"""Which variable of a file is which of a model."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rmsprop.alignment import Owner, aligned


def owners(*paths, shape=(2,)):
    return [Owner(path, shape) for path in paths]


def places(theirs, mine, **options):
    return aligned(owners(*theirs), owners(*mine), **options).indices


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        (["a/kernel", "b/kernel"], ["a/kernel", "b/kernel"]),
        (["dense_7/kernel", "dense_8/kernel"], ["dense/kernel", "dense_1/kernel"]),
        # The names of models count for nothing.
        (["model/a/kernel", "model/b/kernel"], ["a/kernel", "b/kernel"]),
    ],
)
def test_each_is_at_its_place(theirs, mine):
    assert aligned(owners(*theirs), owners(*mine)) == ([0, 1], False)


def test_names_of_ones_own_say_which_is_which():
    theirs = ["model/left/kernel", "model/right/kernel"]
    assert places(theirs, theirs[::-1]) == [1, 0]
    assert places(theirs, ["other/right/kernel", "other/left/kernel"]) == [1, 0]


def test_other_names_at_the_same_places_are_told():
    found = aligned(owners("a/kernel", "b/kernel"), owners("c/kernel", "d/kernel"))
    assert found == ([0, 1], True)


def test_by_name_numbers_count_too():
    theirs = ["dense/kernel", "dense_1/kernel"]
    assert places(theirs, theirs[::-1], in_order=False) == [1, 0]
    # Of other shapes, too: where the order in the file is not the model's.
    a, b, c = Owner("a", (1,)), Owner("b", (2,)), Owner("c", (3,))
    assert aligned([b, c, a], [a, b, c], in_order=False).indices == [1, 2, 0]
    # One name for two says nothing.
    twice = owners("x/a/kernel", "y/a/kernel")
    assert aligned(twice, twice[::-1], in_order=False).indices == [1, 0]
    other = owners("z/a/kernel", "w/a/kernel")
    assert aligned(twice, other, in_order=False).indices == [None, None]


@pytest.mark.parametrize(
    ("theirs", "mine", "expected"),
    [
        ("b", "abc", [1]),
        ("abc", "b", [None, 0, None]),
        ("bd", "abcde", [1, 3]),
        ("abcde", "bd", [None, 0, None, 1, None]),
    ],
)
def test_some_of_them(theirs, mine, expected):
    kernels = [[f"{name}/kernel" for name in names] for names in (theirs, mine)]
    assert places(*kernels) == expected


def test_numbers_are_no_hindrance_where_shapes_tell():
    theirs = [Owner("dense_4/kernel", (2, 3)), Owner("dense_5/kernel", (3, 1))]
    mine = [Owner("dense/kernel", (9, 2)), Owner("dense_1/kernel", (2, 3))]
    assert aligned(theirs, mine).indices == [1, None]


def test_only_what_all_ways_to_match_agree_on_counts():
    assert places(["p/kernel"], ["q/kernel", "r/kernel"]) == [None]
    assert places(["dense_5/kernel"], ["dense/kernel", "dense_1/kernel"]) == [None]
    kernel, bias = Owner("x/kernel", (2,)), Owner("x/bias", (3,))
    mine = [
        Owner("y/kernel", (2,)),
        Owner("z/kernel", (2,)),
        Owner("z/bias", (3,)),
        Owner("z/gain", (2,)),
    ]
    assert aligned([kernel, bias], mine).indices == [None, 2]


def test_a_shape_or_a_last_name_that_differs_is_no_match():
    a = Owner("a/kernel", (2,))
    assert aligned([a], [Owner("a/kernel", (3,))]).indices == [None]
    assert aligned([a], [Owner("a/bias", (2,)), Owner("b", (1,))]).indices == [None]
    assert aligned([], [a]).indices == []
    assert aligned([a], []).indices == [None]


def test_a_better_name_wins():
    like = ["dense_1/kernel", "dense/kernel", "model/dense/kernel"]
    for better in 2, 1:
        assert places(["model/dense/kernel"], like[: better + 1]) == [better]
    # The numbers alone differ: more than another layer, less than the same.
    assert places(["dense_3/kernel"], ["other/kernel", "dense/kernel"]) == [1]


names = st.sampled_from(["a", "b", "dense", "dense_1", "dense_2", "m/dense"])
leaves = st.sampled_from(["kernel", "bias"])
some = st.lists(
    st.builds(
        Owner,
        st.builds("{}/{}".format, names, leaves),
        st.sampled_from([(1,), (2,), (2, 2)]),
        st.none(),
    ),
    max_size=6,
)


@given(some, some)
def test_matches_fit_keep_the_order_and_are_one_to_one(theirs, mine):
    found = aligned(theirs, mine).indices
    assert len(found) == len(theirs)
    pairs = [(a, mine[i]) for a, i in zip(theirs, found, strict=True) if i is not None]
    assert all(a.shape == b.shape for a, b in pairs)
    matched = [i for i in found if i is not None]
    assert len({*matched}) == len(matched)
    if [o.shape for o in theirs] != [o.shape for o in mine]:
        assert matched == sorted(matched)


@given(some, st.data())
def test_of_distinct_names_any_part_is_found_again(all_of_them, data):
    distinct = [*{o.path: o for o in all_of_them}.values()]
    keep = data.draw(st.lists(st.booleans(), min_size=len(distinct), max_size=6))
    part = [*itertools.compress(distinct, keep)]
    for owner, i in zip(part, aligned(part, distinct).indices, strict=True):
        assert i is None or distinct[i] == owner


@given(some)
def test_itself(mine):
    assert aligned(mine, mine) == ([*range(len(mine))], False)


def test_where_some_names_are_the_same_others_mean_others():
    a, b, c, d = (Owner(f"{name}/kernel", (2,)) for name in "abcd")
    assert aligned([a, b], [b, c]).indices == [None, 0]
    assert aligned([a, b, c], [b, d]).indices == [None, 0, None]
    assert aligned([a, b], [c, d]) == ([0, 1], True)


def test_names_of_others_are_no_match_however_many_they_are():
    others = [f"{name}/kernel" for name in "cdefghijk"]
    mine = ["b/kernel", *(f"{path}s/kernel" for path in others)]
    assert places([*others, "b/kernel"], mine) == [None] * 9 + [0]


def test_names_of_variables_alone():
    assert places(["b"], ["c", "b"]) == [1]


@pytest.mark.parametrize(
    ("theirs", "mine", "expected"),
    [
        ("ca", "abc", [2, 0]),
        ("cba", "ac", [1, None, 0]),
        ("cax", "abc", [2, 0, None]),
    ],
)
def test_by_name_some_of_them(theirs, mine, expected):
    assert places(theirs, mine, in_order=False) == expected


def test_numbers_in_another_order_are_told():
    # Layers made in another order, most likely; or not the model's order.
    theirs = owners("dense/kernel", "dense_1/kernel")
    assert aligned(theirs, theirs[::-1]) == ([0, 1], True)


@pytest.mark.parametrize("in_order", [True, False])
def test_the_weights_tell_before_names_and_places(in_order):
    def layer(name, weights):
        return [Owner(f"{name}/kernel", (2,), weights), Owner(f"{name}/bias", (2,))]

    theirs = [*layer("a", 1), *layer("b", 2)]
    mine = [*layer("b", 1), *layer("a", 2)]  # the biases are all 0, and tell nothing
    assert aligned(theirs, mine, in_order=in_order) == ([0, 1, 2, 3], False)
    # The same weights twice, or in another shape, tell nothing either.
    same = [Owner("a/x", (2,), 1), Owner("b/x", (2,), 1)]
    assert aligned(same, same[::-1], in_order=in_order).indices == [1, 0]
    other = [Owner("a/x", (3,), 1)]
    assert aligned(other, [Owner("b/x", (2,), 1)], in_order=in_order).indices == [None]


def test_without_an_order_what_names_leave_open_stays_so():
    a = owners("m/dense_7/kernel")
    assert aligned(a, owners("dense/kernel"), in_order=False) == ([0], True)
    two = owners("dense/kernel", "dense_1/kernel")
    assert aligned(a, two, in_order=False).indices == [None]
    # `dense_1` is here and there, so `dense` is not the other one here.
    other = owners("dense_1/kernel", "dense_2/kernel")
    assert aligned(two, other, in_order=False).indices == [None, 0]


@given(some, some, st.randoms())
def test_without_an_order_no_order_counts(theirs, mine, random):
    def pairs(theirs, mine):
        found = aligned(theirs, mine, in_order=False).indices
        pairs = zip(theirs, found, strict=True)
        return {(a, mine[i]) for a, i in pairs if i is not None}

    expected = pairs(theirs, mine)
    assert all(a.shape == b.shape for a, b in expected)
    shuffled = [random.sample(owners, len(owners)) for owners in (theirs, mine)]
    assert pairs(*shuffled) == expected
