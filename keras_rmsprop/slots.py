"""The variables that an optimizer keeps for those of a model: made, found, extended.

A slot is found by its kind (`velocity`, `momentum`, ...) and by the model's variable
that it belongs to. So when an optimizer is built again for more variables, as after
layers were unfrozen, it reuses each slot that exists, in any subclass, too.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

WEIGHT_AVERAGE, ACCUMULATOR = "average", "gradient_accumulator"
"""The kinds of slots that Keras makes: of `use_ema`, and to accumulate gradients."""
FIRST_WEIGHT, GRADIENT_SUM = "first_weight", "gradient_sum"
"""The kinds that the search for a learning rate needs; then, its estimate."""
RATE_ESTIMATE = "learning_rate_estimate"
OF_SEARCH = FIRST_WEIGHT, GRADIENT_SUM, RATE_ESTIMATE
RATE, RATE_FACTOR = "learning_rate", "learning_rate_factor"
"""The names of the learning rate, and of the factor on one that is found."""
ITERATION = "iteration"
"""The name of the step count."""
EMA_BEGIN = "ema_begin"
"""The name of the step count from which averages of weights warm up."""
VELOCITY = "velocity"
"""The kind of the slots that there always are."""


UNKNOWN_ORDER = (
    "The order of the model's variables is not known: they came in parts. Call "
    "`optimizer.build(model.trainable_variables)` first"
)


class Key(NamedTuple):
    """The key by which a variable of the optimizer is found again."""

    kind: str
    owner: Hashable
    """Something that stands for the model's variable, or None."""
    number: int
    """Which of this kind and owner it is: nearly always the first, 0."""


class Entry(NamedTuple):
    """A variable of the optimizer, and what it is."""

    variable: Any
    key: Key
    start: Callable[[], Any]
    """Returns what it starts with."""

    @property
    def kind(self) -> str:
        """Return its kind, with a number, as in `norm#1`, if there are several."""
        return (
            f"{self.key.kind}#{self.key.number}" if self.key.number else self.key.kind
        )

    def start_fresh(self) -> None:
        """Give it the value that it starts with."""
        self.variable.assign(self.start())


class Order(NamedTuple):
    """The order of the model's variables, as far as lists of some of them showed it.

    Lists of a part of a model show the order of that part. The order of all is certain
    if each stood beside the next in some list, or if one list had all.

    Example:
        >>> parts = Order().then("bc").then("ab")
        >>> parts.keys, parts.is_certain
        (('a', 'b', 'c'), True)
        >>> apart = Order().then("ac").then("ab")
        >>> apart.is_certain, apart.then("acb").keys
        (False, ('a', 'c', 'b'))
    """

    keys: tuple[Hashable, ...] = ()
    """What stands for each variable."""
    neighbors: frozenset[tuple[Hashable, Hashable]] = frozenset()
    """Those that stood beside each other in a list."""
    is_certain: bool = True

    def then(self, given: Iterable[Hashable]) -> "Order":
        """Return the order after one more list: of known variables, new ones, or both.

        A list in another order changes nothing that is certain.
        """
        given = tuple(dict.fromkeys(given))
        known, new = {*self.keys}, {*given} - {*self.keys}
        if self.is_certain and not new:
            return self
        if known <= {*given}:
            return Order(given)
        keys = list(self.keys)
        if not self.is_certain:
            indices = [i for i, key in enumerate(keys) if key in given]
            here = [key for key in given if key in known]
            for index, key in zip(indices, here, strict=True):
                keys[index] = key
        for i, key in enumerate(given):
            if key not in new:
                continue
            if i:
                keys.insert(keys.index(given[i - 1]) + 1, key)
            else:
                later = (keys.index(k) for k in given if k in known)
                keys.insert(next(later, len(keys)), key)
        neighbors = self._pairs() | self.neighbors | {*itertools.pairwise(given)}
        certain = all(pair in neighbors for pair in itertools.pairwise(keys))
        return Order(tuple(keys), neighbors, certain)

    def check(self) -> None:
        """Fail if the order is not certain: for what goes by position.

        Raises:
            ValueError: It is not.
        """
        if not self.is_certain:
            raise ValueError(f"{UNKNOWN_ORDER}, or give variables with gradients.")

    def _pairs(self) -> frozenset[tuple[Hashable, Hashable]]:
        return frozenset(itertools.pairwise(self.keys) if self.is_certain else ())


class Book:
    """The variables of an optimizer, by kind and owner.

    Attributes:
        order: The order of the model's variables.

    Example:
        >>> book = Book()
        >>> for owners in ("b",), ("a", "b"):  # built, and built again for one more
        ...     book.begin()
        ...     for owner in owners:
        ...         _ = book.find_or_make("velocity", owner, object, start=lambda: 0)
        >>> [entry.key.owner for entry in book.all()], len(book.made())
        (['a', 'b'], 1)
    """

    def __init__(self) -> None:
        self.order = Order()
        self._by_key: dict[Key, Entry] = {}
        self.begin()

    def begin(self) -> None:
        """Say that the optimizer is built, for the first time or again."""
        self._built: list[Key] = []  # in the order of the last time it was built
        self._made: list[Key] = []  # those of them that were new
        self._count: Counter[tuple[str, Hashable]] = Counter()

    def find_or_make(
        self,
        kind: str,
        owner: Hashable,
        make: Callable[[], Any],
        start: Callable[[], Any],
    ) -> Any:
        """Return the variable of this kind and owner; make it if there is none.

        Args:
            kind: What it is.
            owner: What stands for the model's variable that it belongs to, or None.
            make: Makes it.
            start: Returns what it starts with.
        """
        key = Key(kind, owner, self._count[kind, owner])
        if key not in self._by_key:
            self._by_key[key] = Entry(make(), key, start)
            self._made.append(key)
        self._count[kind, owner] += 1
        self._built.append(key)
        return self._by_key[key].variable

    def all(self) -> list[Entry]:
        """Return what the optimizer was last built with, in that order."""
        return [self._by_key[key] for key in self._built]

    def made(self) -> list[Entry]:
        """Return those of them that were not there before."""
        return [self._by_key[key] for key in self._made]

    def in_order(self, variables: Sequence[Any]) -> list[Any]:
        """Return variables in the order in which a new optimizer would have them.

        Args:
            variables: All of the optimizer's; those it has kept go to the end.
        """
        ordered = [entry.variable for entry in self.all()]
        ids = {id(variable) for variable in ordered}
        return [v for v in variables if id(v) not in ids] + ordered


def set_variables(optimizer: Any, variables: Sequence[Any]) -> None:
    """Replace the list of an optimizer's variables. Keras has no public way to."""
    own = vars(optimizer)
    tracker = own.pop("_tracker")  # without it a list is not tracked again
    try:
        optimizer._variables = [*variables]
    finally:
        own["_tracker"] = tracker
    is_variable, _ = tracker.config["variables"]
    tracker.config["variables"] = is_variable, own["_variables"]


@contextlib.contextmanager
def all_or_nothing(optimizer: Any, *others: Any) -> Iterator[None]:
    """Build an optimizer: if that fails, it is as it was, and so are its parts.

    Args:
        optimizer: The optimizer.
        others: Objects that building changes, too.
    """
    things = [optimizer, optimizer._tracker, *others]
    before = [
        (vars(thing), {k: (x, _content(x)) for k, x in vars(thing).items()})
        for thing in things
    ]
    try:
        # Lists that TensorFlow tracks cannot be put back: building fills copies.
        set_variables(optimizer, optimizer._variables)
        optimizer._trainable_variables_indices = {
            **optimizer._trainable_variables_indices
        }
        yield
    except BaseException:
        for own, attributes in before:
            for name in own.keys() - attributes.keys():
                del own[name]
            for name, (value, content) in attributes.items():
                own[name] = value
                if content is not None:
                    value.clear()
                    (value.extend if type(value) is list else value.update)(content)
        raise


def _content(value: Any) -> Any:
    """Return a copy of a plain collection, which may change in place."""
    return value.copy() if type(value) in (list, dict, set, Counter) else None
