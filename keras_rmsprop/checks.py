"""Checks of arguments. Their errors say what was expected and what was received."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Range(NamedTuple):
    """The numbers that an argument may be."""

    holds: Callable[[float], bool]
    name: str


UP_TO_ONE = Range(lambda x: 0 <= x <= 1, "in [0, 1]")
SHARE = Range(lambda x: 0 <= x < 1, "in [0, 1)")
POSITIVE = Range(lambda x: 0 < x < math.inf, "finite and > 0")
ABOVE_ONE = Range(lambda x: x > 1, "> 1")
NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "finite and >= 0")


def number(name: str, value: Any, allowed: Range) -> float:
    """Return an argument as a float.

    Args:
        name: Name of the argument.
        value: What was received.
        allowed: What it may be.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    value = _scalar(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not allowed.holds(float(value)):
        raise ValueError(f"`{name}` must be {allowed.name}. Received: {name}={value}")
    return float(value)


def optional(name: str, value: Any, allowed: Range) -> float | None:
    """Return an argument as a float, or None if it is None; see `number`."""
    return None if value is None else number(name, value, allowed)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an argument as an int.

    Args:
        name: Name of the argument.
        value: What was received.
        least: The smallest that it may be.
        most: The largest that it may be; None: any.

    Raises:
        ValueError: It is not an integer, or it is out of range.
    """
    value = _scalar(value)
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_integer and least <= value and (most is None or value <= most):
        return int(value)
    allowed = f"<= {most}" if is_integer and value >= least else f">= {least}"
    raise ValueError(
        f"`{name}` must be an integer {allowed}. Received: {name}={value!r}"
    )


def _scalar(value: Any) -> Any:
    """Return the Python number that a NumPy scalar holds; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        return value.item()
    return value


def flag(name: str, value: Any) -> bool:
    """Return an argument as a bool.

    Args:
        name: Name of the argument.
        value: What was received.

    Raises:
        TypeError: It is neither `True` nor `False`.
    """
    if not isinstance(value, int | np.bool_) or value not in (0, 1):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return an argument that has a few possible values.

    Args:
        name: Name of the argument.
        value: What was received.
        choices: What it may be.

    Raises:
        ValueError: It is none of the choices.
    """
    if value not in choices:
        *others, last = (f'"{x}"' if isinstance(x, str) else str(x) for x in choices)
        expected = f"{', '.join(others)} or {last}"
        hint = did_you_mean(value, [x for x in choices if isinstance(x, str)], '"')
        raise ValueError(
            f"`{name}` must be {expected}. Received: {name}={value!r}{hint}"
        )
    return choices[choices.index(value)]


def did_you_mean(word: Any, known: Iterable[str], quote: str = "`") -> str:
    """Return a question to add to a message, or nothing if no known word is alike.

    Args:
        word: What was received.
        known: The words that it may be.
        quote: What stands before and after a word.

    Example:
        >>> did_you_mean("momentun", ["rho", "momentum"])
        '. Did you mean `momentum`?'
    """
    alike = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f". Did you mean {quote}{alike[0]}{quote}?" if alike else ""


def names(name: str, value: Any) -> tuple[str, ...]:
    """Return an argument as a tuple of strings.

    Args:
        name: Name of the argument.
        value: What was received.

    Raises:
        TypeError: It is not a list or tuple of strings.
    """
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(isinstance(part, str) for part in value):
        raise TypeError(
            f"`{name}` must be a list of strings. Received: {name}={value!r}"
        )
    return tuple(value)


def learning_rate(value: Any) -> Any:
    """Return a learning rate; Keras checks what is not a number.

    Args:
        value: A number, a schedule, a callable or a tensor.

    Raises:
        TypeError: It is a string, `None` or a class.
        ValueError: It is out of range.
    """
    if not isinstance(value, numbers.Real | str | type | None):
        return value
    if isinstance(value, str | type):
        raise TypeError(
            '`learning_rate` must be a number, "auto", a schedule or a callable. '
            f"Received: learning_rate={value!r}"
        )
    return number("learning_rate", value, NOT_NEGATIVE)
