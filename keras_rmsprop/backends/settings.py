"""What a program or a record of a step holds as constants, as keys for a dictionary."""

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

MOST_SETTINGS = 64
"""How many settings are told apart from those before."""


class Settings:
    """The attributes of an object, as a number: equal where all of them are equal.

    An attribute that is no plain value (a list, a layer, a function) is compared by
    identity, so what changes inside it goes unseen. None is kept alive.

    Example:
        >>> settings = Settings()
        >>> [settings.number({"rho": rho}) for rho in (0.9, 0.5, 0.9)]
        [0, 1, 0]
    """

    def __init__(self) -> None:
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._count = itertools.count()
        self._objects = Identities()

    def number(self, attributes: Mapping[str, Any]) -> int:
        """Return the number of these attributes.

        Args:
            attributes: As of `vars`.
        """
        key = tuple(
            (name, *self._objects.comparable(x))
            for name, x in attributes.items()
            if not name.startswith("_self_")  # TensorFlow's notes for checkpoints
        )
        if key not in self._numbers:
            self._numbers[key] = next(self._count)
        self._numbers.move_to_end(key)
        if len(self._numbers) > MOST_SETTINGS:
            self._numbers.popitem(last=False)
        return self._numbers[key]


class Identities:
    """A number for each object, like its id, but never used again for another."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}
        self._count = itertools.count()

    def comparable(self, x: Any) -> tuple[type, Hashable]:
        """Return something equal for equal plain values and for the same objects."""
        if x is None or isinstance(x, bool | int | float | str):
            return type(x), x
        if isinstance(x, tuple):
            return type(x), tuple(map(self.comparable, x))
        return type(x), self._number(x)

    def _number(self, x: Any) -> int:
        key = id(x)
        if key not in self._known or self._known[key][0]() is not x:
            try:
                reference = weakref.ref(x, lambda _: self._known.pop(key, None))
            except TypeError:  # a plain list, say: it is kept
                reference = functools.partial(_itself, x)  # type: ignore[assignment]
            self._known[key] = reference, next(self._count)
        return self._known[key][1]


def _itself(x: Any) -> Any:
    return x


def constraint_key(variable: Any) -> Hashable:
    """Return something that changes as a variable's constraint does."""
    constraint = variable.constraint
    if constraint is None:
        return None
    attributes = getattr(constraint, "__dict__", {}).values()
    plain = (x for x in attributes if isinstance(x, bool | int | float | str))
    return id(constraint), *plain
