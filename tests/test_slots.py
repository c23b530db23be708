"""Which slots are there, and in which order: without an optimizer."""

import types

import pytest

from keras_rmsprop.slots import Keeper, Kept, in_order_of


def build(keeper, owners, kinds=("velocity",)):
    """Build for these owners, kind by kind; return what was found or made."""
    keeper.begin()
    return {
        (kind, owner): keeper.find_or_make(
            kind, owner, owner, lambda kind=kind, owner=owner: [kind, owner], "start"
        )
        for kind in kinds
        for owner in owners
    }


def test_what_is_there_serves_again():
    keeper = Keeper()
    first = build(keeper, "bd", ("velocity", "momentum"))
    assert [kept.variable for kept in keeper.made()] == list(first.values())

    second = build(keeper, "abcd", ("velocity", "momentum"))
    assert all(second[key] is variable for key, variable in first.items())
    assert [kept.variable for kept in keeper.made()] == [
        [kind, owner] for kind in ("velocity", "momentum") for owner in "ac"
    ]
    assert [kept.variable for kept in keeper.all()] == list(second.values())
    assert keeper.all()[0] == Kept(["velocity", "a"], "velocity", "a", "start")


def test_what_is_not_asked_for_is_left_out_and_not_lost():
    keeper = Keeper()
    before = build(keeper, "ab")
    build(keeper, "b")
    assert [kept.owner for kept in keeper.all()] == ["b"]
    assert keeper.made() == []
    assert build(keeper, "ab")["velocity", "a"] is before["velocity", "a"]


def test_several_of_one_kind_and_owner_are_told_apart_by_their_order():
    keeper = Keeper()
    runs = []
    for _ in range(2):
        keeper.begin()
        runs.append(
            [
                keeper.find_or_make("own", owner, owner, object, None)
                for owner in (None, "a", None, "a", None)
            ]
        )
    assert len({*map(id, runs[0])}) == 5
    assert all(a is b for a, b in zip(*runs, strict=True))
    kinds = [kept.kind for kept in keeper.all()]
    assert kinds == ["own", "own", "own#1", "own#1", "own#2"]


def test_the_optimizers_others_come_first():
    keeper = Keeper()
    b = build(keeper, "b")["velocity", "b"]
    variables = ["iteration", b, "learning_rate"]
    a = build(keeper, "ab")["velocity", "a"]
    ordered = keeper.in_order([*variables, a])
    assert ordered == ["iteration", "learning_rate", a, b]
    assert ordered[2] is a
    # It is the variable itself that counts, not one that equals it.
    assert keeper.in_order([[*a]]) == [a, a, b]


@pytest.mark.parametrize(
    ("known", "given", "expected"),
    [
        ("", "ba", "ba"),
        ("ab", "ba", "ba"),  # all that are known: the order is the model's
        ("bd", "abcd", "abcd"),
        ("abc", "b", "abc"),
        ("abc", "dbd", "abcd"),
        ("ab", "aab", "ab"),
    ],
)
def test_the_order_of_the_model(known, given, expected):
    assert in_order_of(known, given, key=ord) == [*expected]


class Variable(types.SimpleNamespace):
    shape, dtype = (2,), "float32"

    def assign(self, value):
        self.value = value


def test_what_starts_fresh():
    kept = Kept(Variable(), "velocity", None, start=lambda: 7)
    kept.start_fresh()
    assert kept.variable.value == 7
