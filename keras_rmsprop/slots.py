"""The variables that an optimizer keeps for those of a model: made, found, extended.

A slot is found by its kind (`velocity`, `momentum`, ...) and by the model's variable
that it belongs to. So when an optimizer is built anew for more variables, as after
layers were unfrozen, it reuses each slot that exists, in any subclass, too.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

WEIGHT_AVERAGE, ACCUMULATOR = "average", "gradient_accumulator"
"""The kinds of slots that Keras makes: of `use_ema`, and to accumulate gradients."""
FIRST_WEIGHT, GRADIENT_SUM = "first_weight", "gradient_sum"
"""The kinds that the search for a learning rate needs; then, its estimate."""
RATE_ESTIMATE = "learning_rate_estimate"
OF_SEARCH = FIRST_WEIGHT, GRADIENT_SUM, RATE_ESTIMATE
RATE, RATE_FACTOR = "learning_rate", "learning_rate_factor"
"""The names of the learning rate, and of the factor on one that is found."""


class Kept(NamedTuple):
    """A variable of the optimizer, and what it is."""

    variable: Any
    kind: str
    """With a number, as in `norm#1`, if there are several of a kind."""
    owner: Any
    """The model's variable that it belongs to; None if to no single one."""
    start: Callable[[], Any]
    """Returns what it starts with."""

    def start_fresh(self) -> None:
        """Give it the value that it starts with."""
        self.variable.assign(self.start())


class Key(NamedTuple):
    """The key by which a variable of the optimizer is found again."""

    kind: str
    owner: Hashable
    """Something that stands for the model's variable, or None."""
    number: int
    """Which of this kind and owner it is: nearly always the first, 0."""


class Keeper:
    """The variables of an optimizer, by kind and owner.

    Example:
        >>> keeper = Keeper()
        >>> for owners in ("b",), ("a", "b"):  # built, and built anew for one more
        ...     keeper.begin()
        ...     for owner in owners:
        ...         _ = keeper.find_or_make(
        ...             "velocity", owner, owner, object, start=lambda: 0
        ...         )
        >>> [kept.owner for kept in keeper.all()], len(keeper.made())
        (['a', 'b'], 1)
    """

    def __init__(self) -> None:
        self._by_key: dict[Key, Kept] = {}
        self.begin()

    def begin(self) -> None:
        """Say that the optimizer is built, for the first time or anew."""
        self._built: list[Key] = []  # in the order of the last time it was built
        self._made: list[Key] = []  # those of them that were new
        self._count: Counter[tuple[str, Hashable]] = Counter()

    def find_or_make(
        self,
        kind: str,
        owner_key: Hashable,
        owner: Any,
        make: Callable[[], Any],
        start: Callable[[], Any],
    ) -> Any:
        """Return the variable of this kind and owner; make it if there is none.

        Args:
            kind: What it is.
            owner_key: Something hashable that stands for its owner, or None.
            owner: The model's variable that it belongs to, or None.
            make: Makes it.
            start: Returns what it starts with.
        """
        key = Key(kind, owner_key, self._count[kind, owner_key])
        self._count[kind, owner_key] += 1
        if key not in self._by_key:
            numbered = f"{kind}#{key.number}" if key.number else kind
            self._by_key[key] = Kept(make(), numbered, owner, start)
            self._made.append(key)
        self._built.append(key)
        return self._by_key[key].variable

    def all(self) -> list[Kept]:
        """Return what the optimizer was last built with, in that order."""
        return [self._by_key[key] for key in self._built]

    def made(self) -> list[Kept]:
        """Return those of them that were not there before."""
        return [self._by_key[key] for key in self._made]

    def in_order(self, variables: Sequence[Any]) -> list[Any]:
        """Return variables in the order in which a new optimizer would have them.

        Args:
            variables: All of the optimizer's; those it has kept go to the end.
        """
        ordered = [kept.variable for kept in self.all()]
        ids = {id(variable) for variable in ordered}
        return [v for v in variables if id(v) not in ids] + ordered


def in_order_of(known: Sequence[Any], given: Sequence[Any], key: Any) -> list[Any]:
    """Return all of the model's variables, old and new, in the model's order.

    Args:
        known: Those known so far.
        given: Those of a step. If it has all that are known, its order is the model's;
            else new ones come last.
        key: Function from a variable to something that stands for it.

    Example:
        >>> in_order_of("bd", "abcd", key=str), in_order_of("bd", "ab", key=str)
        (['a', 'b', 'c', 'd'], ['b', 'd', 'a'])
    """
    distinct = list({key(v): v for v in given}.values())
    if {key(v) for v in known} <= {key(v) for v in distinct}:
        return distinct
    keys = {key(v) for v in known}
    return [*known, *(v for v in distinct if key(v) not in keys)]
