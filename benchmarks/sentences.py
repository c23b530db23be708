"""Figures inside the sentences of pages, written from what was measured.

On a page a figure stands between comments, of which the first says what it is:

    <!-- figure PART: WHO / WHO; WHAT; HOW; OF -->0.8 to 1.1<!-- end figure -->

It is a ratio, or with one competitor a figure itself. Of several cases it is the range
of the medians. Several names are separated by "|"; nothing, or what is left out, means
all. OF is `time` or another of the values of a `figures.Figure`; else it is `time`.
"""

import re
from collections.abc import Mapping
from itertools import product

from figures import Part, short, spread

MARKED = re.compile(
    r"(<!-- figure (\w+): (.*?) -->).*?(<!-- end figure -->)", re.DOTALL
)


def between(page: str, begin: str, end: str, text: str) -> str:
    """Return a page with a text between two marks, which stay.

    Raises:
        ValueError: A mark is missing.
    """
    before, rest = page.split(begin)
    _, after = rest.split(end, 1)
    return before + begin + text + end + after


def figure(part: Part, query: str) -> str:
    """Return a figure, or the range of several, in words.

    Args:
        part: What was measured.
        query: What stands on the page behind the name of the part.

    Raises:
        KeyError: It was not measured.
    """
    who, what, how, of = [*query.split("; "), "", "", ""][:4]
    of = of or "time"
    whos = who.split(" / ")
    found = []
    for case in product(
        what.split(" | ") if what else part.whats,
        how.split(" | ") if how else part.hows,
    ):
        first, *second = [(name, *case) for name in whos]
        if second:
            found.append(part.ratio(first, second[0], of))
        else:
            found.append(spread(part.values(first, of)))
    medians = sorted(x.median for x in found if x)
    if not medians:
        raise KeyError(query)
    texts = dict.fromkeys(short(x) for x in (medians[0], medians[-1]))
    return " to ".join(texts)


def filled(page: str, parts: Mapping[str, Part]) -> str:
    """Return the text of a page with the figures of parts that were measured."""

    def replaced(match: re.Match[str]) -> str:
        begin, name, query, end = match.groups()
        if name not in parts:
            return match[0]
        return begin + figure(parts[name], " ".join(query.split())) + end

    return MARKED.sub(replaced, page)
