"""The statements of a recorded step: made fewer, given memory, and made a function.

A name that begins with t is that of a result; one that begins with g is given; and one
that begins with c is a constant. A result has one statement and never changes its name.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
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
    lines: Sequence[Line], numbers: Set[str], constants: dict[str, Any]
) -> list[Line]:
    """Return fewer statements, which differ in how they round at most.

    Where s is a number, x <- x +- s g / d is one statement, and so is
    x <- x + s min(g^2, most) but for the bound on g.

    Args:
        lines: The statements.
        numbers: The names of tensors that are one number.
        constants: What the statements need besides is added.
    """
    root = roots(lines)
    readers = Counter(name for line in lines for name in line.reads())
    places = {line.result: i for i, line in enumerate(lines) if line.like is not None}
    fewer: list[Line | None] = [*lines]
    torchs = torch.Tensor
    constants |= {f.__name__: f for f in (torchs.item, torchs.addcdiv_)}
    constants |= {f.__name__: f for f in (torch.clamp, torchs.addcmul_)}

    def chain(name: str, *operators: str) -> list[int]:
        """Return where something was computed step by step, each for one reader."""
        i = places.get(name, -1)
        if i < 0 or readers[name] > 1 or len(lines[i].arguments) > 2:
            return []
        if lines[i].operator != operators[0]:
            return []
        others = [chain(x, *operators[1:]) for x in lines[i].arguments[:2]]
        rest = max(others, key=len) if operators[1:] else []
        return [i, *rest] if len(rest) == len(operators) - 1 else []

    def unchanged(names: Sequence[str], start: int, end: int) -> bool:
        written = (line.reads() for line in lines[start:end] if line.writes)
        changed = {root.get(name, name) for reads in written for name in reads}
        return not {root.get(name, name) for name in names} & changed

    for k, line in enumerate(lines):
        if line.operator not in ("add_", "sub_") or len(line.arguments) > 2:
            continue
        x, new = line.arguments
        sign = "-" if line.operator == "sub_" else ""
        if found := chain(new, "div", "mul"):
            j, i = found
            d = lines[j].arguments[1]
            s, g = sorted(lines[i].arguments, key=lambda name: name not in numbers)
            if s in numbers and d != lines[i].result and unchanged((s, g, d), i, k):
                arguments = [x, g, d, f"value={sign}item({s})"]
                fewer[i] = fewer[j] = None
                fewer[k] = line._replace(function="addcdiv_", arguments=arguments)
        elif found := chain(new, "mul", "minimum", "pow"):
            j, i, h = found
            g, power = lines[h].arguments
            most = [y for y in lines[i].arguments if y != lines[h].result]
            s = next((y for y in lines[j].arguments if y != lines[i].result), "")
            is_bound = most and most[0] in numbers & constants.keys()
            if power == "2" and is_bound and s in numbers and unchanged([s], j, k):
                bound = float(constants[most[0]]) ** 0.5
                arguments = [g, repr(-bound), repr(bound)]
                fewer[h] = lines[h]._replace(function="clamp", arguments=arguments)
                arguments = [x, *2 * [lines[h].result], f"value={sign}item({s})"]
                fewer[i] = fewer[j] = None
                fewer[k] = line._replace(function="addcmul_", arguments=arguments)
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
