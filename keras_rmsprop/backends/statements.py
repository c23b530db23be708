"""The statements of a recorded step: made fewer, given memory, and made a function.

A name that begins with t is that of a result; one that begins with g is given; and one
that begins with c is a constant. A result has one statement and never changes its name.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

PLACES, LEAST, MOST = 8, 2**10, 2**17
"""How many results of a dtype have memory of the record's, and of how many elements.

To get such memory from the system at each step, and to give it back, takes longer than
to compute them."""


class Line(NamedTuple):
    """A statement."""

    result: str
    operator: str
    function: str
    arguments: list[str]
    writes: bool
    """Whether it changes a tensor."""
    base: str = ""
    """What its result is a view of."""
    like: Any = None
    """If it can put its result into memory that is there: a tensor like the result."""
    number: str = ""
    """What the result is compared with, if it is a number that Python looked at."""

    def reads(self) -> set[str]:
        """Return the names of what it reads."""
        return {*re.findall(r"\b[cgt]\d+", " ".join(self.arguments))}

    def text(self, is_read: bool) -> str:
        """Return the statement; it may leave out the name of what is not read."""
        call = f"{self.function}({', '.join(self.arguments)})"
        if self.number:
            return f"if {call} != {self.number}: return False"
        return f"{self.result} = {call}" if is_read else call


def function(
    lines: Sequence[Line], given: Iterable[str], constants: Mapping[str, Any]
) -> Callable[[Sequence[Any]], bool]:
    """Return statements as a function of what is given.

    It returns True; or False, and does nothing, if a number is another than before.

    Args:
        lines: The statements.
        given: Names.
        constants: Values, by their names.
    """
    needed: set[str] = set()
    text = ["return True"]
    for line in reversed(lines):
        last_used = sorted(x for x in line.reads() - needed if x.startswith("t"))
        text += [f"del {', '.join(last_used)}"] if last_used else []
        text.append(line.text(line.result in needed))
        needed |= line.reads()
    text.append("".join(f"{name}, " for name in given) + "= given")
    body = "\n    ".join(reversed(text))
    namespace = {**constants}
    exec(f"def step(given):\n    {body}", namespace)
    step: Callable[[Sequence[Any]], bool] = namespace["step"]
    return step


def roots(lines: Sequence[Line]) -> dict[str, str]:
    """Return, by the names of all results, what they are views of in the end."""
    found: dict[str, str] = {}
    for line in lines:
        found[line.result] = found.get(line.base, line.base) or line.result
    return found


def without_unread(lines: Sequence[Line]) -> list[Line]:
    """Return statements without those that nothing needs."""
    needed: set[str] = set()
    kept = []
    for line in reversed(lines):
        if line.writes or line.number or line.result in needed:
            kept.append(line)
            needed |= line.reads()
    return kept[::-1]


def fused(
    lines: Sequence[Line], numbers: Collection[str], constants: dict[str, Any]
) -> list[Line]:
    """Return statements with x <- x +- s g / d as one, which is rounded as before.

    Args:
        lines: The statements.
        numbers: The names of tensors that are one number; s is to be among them.
        constants: What the statements need besides is added.
    """
    root = roots(lines)
    readers = Counter(name for line in lines for name in line.reads())
    places = {line.result: i for i, line in enumerate(lines)}
    fewer: list[Line | None] = [*lines]

    def source(name: str, operator: str) -> int | None:
        """Return where something was computed, if so and for one reader."""
        i = places.get(name)
        is_it = (
            i is not None
            and lines[i].operator == operator
            and lines[i].like is not None
        )
        return i if is_it and readers[name] == 1 else None

    for k, line in enumerate(lines):
        if line.operator not in ("add_", "sub_") or len(line.arguments) > 2:
            continue
        x, ratio = line.arguments
        if (j := source(ratio, "div")) is None:
            continue
        product, d = lines[j].arguments
        if (i := source(product, "mul")) is None:
            continue
        s, g = lines[i].arguments
        s, g = (s, g) if s in numbers else (g, s)
        changed = {
            root.get(name, name)
            for other in lines[i:k]
            if other.writes
            for name in other.reads()
        }
        if s in numbers and not {root.get(name, name) for name in (g, d)} & changed:
            constants |= {"item": torch.Tensor.item, "addcdiv_": torch.Tensor.addcdiv_}
            value = f"value={'-' * (line.operator == 'sub_')}item({s})"
            fewer[i] = fewer[j] = None
            fewer[k] = line._replace(function="addcdiv_", arguments=[x, g, d, value])
    return [line for line in fewer if line is not None]


def placed(lines: Sequence[Line], constants: dict[str, Any]) -> list[Line]:
    """Return statements that put results into memory of the record's.

    A result may take the place of what is not read again.

    Args:
        lines: The statements.
        constants: The places are added.
    """
    root = roots(lines)
    last = {root.get(x, x): i for i, line in enumerate(lines) for x in line.reads()}
    free: dict[Any, list[Any]] = {}
    count: Counter[Any] = Counter()
    held: dict[str, Any] = {}
    names: dict[str, str] = {}
    found = []
    for i, line in enumerate(lines):
        reads, like = line.reads(), line.like
        arguments = [_renamed(x, names) for x in line.arguments]
        line = line._replace(arguments=arguments)
        ending = [name for name in held if last.get(name, 0) <= i]
        viewed = {root.get(x, x) for x in reads if root.get(x, x) != x}
        early = [
            name
            for name in ending
            if like is not None
            and name not in viewed
            and constants[names[name]].shape == like.shape
        ]
        for name in early:
            free[constants[names[name]].dtype].append(held.pop(name))
        if like is not None and LEAST <= like.numel() <= MOST:
            buffers = free.setdefault(like.dtype, [])
            if not buffers and count[like.dtype] < PLACES:
                count[like.dtype] += 1
                buffers.append(torch.empty(MOST, dtype=like.dtype))
            if buffers:
                buffer, place = buffers.pop(), f"p{i}"
                constants[place] = buffer[: like.numel()].view(like.shape)
                held[line.result], names[line.result] = buffer, place
                arguments.append(f"out={place}")
                line = line._replace(result=place)
        for name in {*ending}.difference(early):
            free[constants[names[name]].dtype].append(held.pop(name))
        found.append(line)
    return found


def _renamed(argument: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\bt\d+", lambda found: names.get(found[0], found[0]), argument)
