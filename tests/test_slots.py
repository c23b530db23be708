"""Which slots are there, and in which order: without an optimizer."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rmsprop.slots import Book, Entry, Key, Order, all_or_nothing


def build(book, owners, kinds=("velocity",)):
    """Build for these owners, kind by kind; return what was found or made."""
    book.begin()
    return {
        (kind, owner): book.find_or_make(
            kind, owner, lambda kind=kind, owner=owner: [kind, owner], "start"
        )
        for kind in kinds
        for owner in owners
    }


def test_what_is_there_serves_again():
    book = Book()
    first = build(book, "bd", ("velocity", "momentum"))
    assert [entry.variable for entry in book.made()] == list(first.values())

    second = build(book, "abcd", ("velocity", "momentum"))
    assert all(second[key] is variable for key, variable in first.items())
    assert [entry.variable for entry in book.made()] == [
        [kind, owner] for kind in ("velocity", "momentum") for owner in "ac"
    ]
    assert [entry.variable for entry in book.all()] == list(second.values())
    assert book.all()[0] == Entry(["velocity", "a"], Key("velocity", "a", 0), "start")


def test_what_is_not_asked_for_is_left_out_and_not_lost():
    book = Book()
    before = build(book, "ab")
    build(book, "b")
    assert [entry.key.owner for entry in book.all()] == ["b"]
    assert book.made() == []
    assert build(book, "ab")["velocity", "a"] is before["velocity", "a"]


def test_several_of_one_kind_and_owner_are_told_apart_by_their_order():
    book = Book()
    runs = []
    for _ in range(2):
        book.begin()
        runs.append(
            [
                book.find_or_make("own", owner, object, None)
                for owner in (None, "a", None, "a", None)
            ]
        )
    assert len({*map(id, runs[0])}) == 5
    assert all(a is b for a, b in zip(*runs, strict=True))
    kinds = [entry.kind for entry in book.all()]
    assert kinds == ["own", "own", "own#1", "own#1", "own#2"]


def test_the_optimizers_others_come_first():
    book = Book()
    b = build(book, "b")["velocity", "b"]
    variables = ["iteration", b, "learning_rate"]
    a = build(book, "ab")["velocity", "a"]
    ordered = book.in_order([*variables, a])
    assert ordered == ["iteration", "learning_rate", a, b]
    assert ordered[2] is a
    # It is the variable itself that counts, not one that equals it.
    assert book.in_order([[*a]]) == [a, a, b]


@pytest.mark.parametrize(
    ("lists", "expected", "is_certain"),
    [
        (["ba"], "ba", True),
        (["ab", "ba"], "ab", True),  # what is certain stays
        (["bd", "abcd"], "abcd", True),  # all that are known: the order is the model's
        (["abc", "b"], "abc", True),
        (["ab", "aab"], "ab", True),
        (["bc", "ab", "abc"], "abc", True),
        (["bc", "ab"], "abc", True),  # each beside the next
        (["abde", "bcd"], "abcde", True),
        (["bd", "ab"], "abd", True),
        (["ac", "ab"], "abc", False),
        (["ac", "ab", "cb"], "acb", True),
        (["ac", "ab", "bc"], "abc", True),
        (["ac", "ab", "acb"], "acb", True),
        (["abc", "dbd"], "adbc", False),
    ],
)
def test_the_order_of_the_model(lists, expected, is_certain):
    order = Order()
    for keys in lists:
        order = order.then(keys)
    assert order.keys == (*expected,)
    assert order.is_certain == is_certain
    if is_certain:
        order.check()
    else:
        with pytest.raises(ValueError, match="order of the model's variables is not"):
            order.check()


@given(
    st.permutations("abcdef"), st.lists(st.sets(st.sampled_from("abcdef")), max_size=8)
)
def test_an_order_that_is_certain_is_the_models(model, lists):
    # Parts that each have a variable in common with those before, in the model's order.
    order = Order()
    for part in lists:
        if not order.keys or part & {*order.keys}:
            order = order.then(sorted(part, key=model.index))
    if order.is_certain:
        assert [*order.keys] == sorted(order.keys, key=model.index)
    everything = order.then(model)
    assert everything.is_certain
    assert [*everything.keys] == [*model]


class Variable(types.SimpleNamespace):
    shape, dtype = (2,), "float32"

    def assign(self, value):
        self.value = value


def test_what_starts_fresh():
    entry = Entry(Variable(), Key("velocity", None, 0), start=lambda: 7)
    entry.start_fresh()
    assert entry.variable.value == 7


class Built:
    """An optimizer, as far as building one goes."""

    def __init__(self):
        self._variables = ["iteration"]
        self._trainable_variables_indices = {}
        self._tracker = types.SimpleNamespace(config={"variables": (None, None)})


def test_an_interrupted_build_leaves_all_as_it_was():
    optimizer, book = Built(), Book()
    build(book, "a")
    before = book.all()
    variables = optimizer._variables

    def interrupted():
        with all_or_nothing(optimizer, book):
            book.begin()
            book.find_or_make("velocity", "b", object, None)
            optimizer._variables.append("velocity")
            optimizer._trainable_variables_indices["b"] = 0
            optimizer.momentums = []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert vars(optimizer).keys() == vars(Built()).keys()
    assert optimizer._variables is variables
    assert variables == ["iteration"]
    assert optimizer._tracker.config == {"variables": (None, None)}
    assert not optimizer._trainable_variables_indices
    assert book.all() == before
    build(book, "ab")
    assert len(book.made()) == 1
