"""Which way a step goes, in words."""

import textwrap
from collections.abc import Mapping, Sequence

from keras_rmsprop.backends.plain import Way

MOST_NAMES = 4
"""How many variables of each way are named."""


def explained(steps: Mapping[str, Sequence[Way]], variables: Sequence[str]) -> str:
    """Return a paragraph for each kind of step, with a line for each way in it.

    Args:
        steps: For each kind of step, described in words, the way of each variable.
        variables: The names of the variables.

    Example:
        >>> alone, together = Way("on its own", "large"), Way("end to end", "small")
        >>> print(explained({"Eager:": [alone, together, together]}, "abc"))
        Eager:
          1 on its own (large): a
          2 end to end (small): b, c
    """
    lines = []
    for text, ways in steps.items():
        lines += textwrap.wrap(text, 80)
        for way in dict.fromkeys(ways):
            names = [v for v, w in zip(variables, ways, strict=True) if w == way]
            shown = ", ".join(names[:MOST_NAMES])
            more = len(names) - MOST_NAMES
            line = f"{len(names)} {way.name} ({way.why}): {shown}"
            line += f" and {more} more" if more > 0 else ""
            lines += textwrap.wrap(
                line, 80, initial_indent="  ", subsequent_indent="    "
            )
    return "\n".join(lines)
