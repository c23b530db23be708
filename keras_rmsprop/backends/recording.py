"""A step as the operators of torch that it calls, without the Python around them.

What Keras and this package do besides takes longer than the update of a small network.
So a step is recorded while it is taken. The record is a function of straight-line
code, which calls the same operators in the same order: it is the plain step, and there
is no second way to do one. Tensors that are there at each step, such as weights, are
constants of it. What differs, such as gradients, goes in.

Results of a moderate size have places of their own: to get such memory from the system
and to give it back takes longer than to compute them.
"""

import math
import re
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PLACES, LEAST, MOST = 8, 2**10, 2**17
"""How many places there are for results of a kind, and of how many elements."""

_POINTWISE = frozenset("add mul sub div sqrt neg pow minimum maximum clamp".split())
"""Operators, element by element, that can write into a place."""
_QUICK = _POINTWISE | frozenset(
    """
    add_ mul_ sub_ abs sign gt eq ne where sum mean stack cat split_with_sizes expm1
    isfinite logical_and floor_divide view copy_ _foreach_copy_ _foreach_sub_
    """.split()
)
"""Operators with a namesake in torch that takes the same arguments. To call that takes
less time."""
_ARITHMETIC = "add", "mul", "sub", "div"
_EXACT = torch.float32, torch.float64
"""Dtypes in which a number may as well be a tensor, which takes less time."""
_NAME, _BASE = "_name_in_record", "_base_in_record"
"""Attributes of results: what they are called, and what they are a view of."""


class _Line(NamedTuple):
    """A statement."""

    result: str
    """What it gives a name to, or in which place it puts its result."""
    operator: str
    function: str
    arguments: list[str]
    uses: frozenset[str]
    """The results of other lines, not in places, that it reads."""
    stays: bool
    """Whether it does more than to compute a result that has no place."""
    number: str = ""
    """What the result is compared with."""

    def read(self) -> set[str]:
        """Return the names of what it reads."""
        given = " ".join(x for x in self.arguments if not x.startswith("out="))
        return {*re.findall(r"[cgt]\d+(?:\[\d+\])*", given)}

    def text(self, is_read: bool) -> str:
        """Return the statement; it may leave out a name that is not read."""
        call = f"{self.function}({', '.join(self.arguments)})"
        if self.number:
            return f"if {call} != {self.number}: return False"
        return f"{self.result} = {call}" if is_read else call


class Recorder(TorchDispatchMode):
    """Records the operators that are called in its context.

    Args:
        given: Tensors in whose place the record will be given others. No two are the
            same.
        known: Tensors that are there at each step. A single number that comes from
            nothing but Python's numbers is a constant, too.

    Example:
        >>> x, total = torch.ones(2), torch.zeros(2)
        >>> with Recorder([x], [total]) as recorder:
        ...     _ = total.add_(2 * x)
        >>> recorder.recorded()([torch.tensor([1.0, 2.0])])
        True
        >>> total
        tensor([4., 6.])
    """

    def __init__(self, given: Sequence[Any], known: Sequence[Any]) -> None:
        super().__init__()
        self._given = {id(x): f"g{i}" for i, x in enumerate(given)}
        self._known = {id(x) for x in known}
        self._held = [*given, *known]  # so that no other tensor gets these ids
        self._constants: dict[str, Any] = {}
        self._names: dict[int, str] = {}  # of constants, by their ids
        self._numbers: dict[Hashable, Any] = {}
        self._free: dict[Any, list[Any]] = {}  # buffers, by their dtype
        self._lines: list[_Line] = []
        self._scalars: set[str] = set()  # the names of single numbers
        self._has_written = False
        self._is_whole = True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator, and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        return self._noted(func, args, kwargs, result) if self._is_whole else result

    def _noted(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        """Return the result under a name, or in a place."""
        tensors = [*_tensors([*args, *kwargs.values()])]
        writes, numbers = func._schema.is_mutable, map(self._is_number, tensors)
        if tensors and all(numbers) and not writes:
            return result  # the same at each step
        if any(map(self._is_number, _tensors(_written(func, args)))):
            self._is_whole = False
        buffer, uses = self._buffer(func, result), set[str]()
        function, args = self._quick(func, args, result)
        texts = [self._text(x, uses) for x in args]
        texts += [f"{key}={self._text(x, uses)}" for key, x in kwargs.items()]
        name, number = f"t{len(self._lines)}", ""
        if buffer is not None:
            place = buffer[: result.numel()].view(result.shape)
            name = self._constant(place)
            texts.append(f"out={name}")
        if isinstance(result, bool | int | float):  # Python looks at a number
            self._is_whole &= not self._has_written and result == result
            number, writes = repr(result), False
        self._has_written |= writes
        stays = writes or buffer is not None or bool(number)
        called = _name(func), self._constant(function), texts
        self._lines.append(_Line(name, *called, frozenset(uses), stays, number))
        if buffer is not None:
            return self._put(result, place, buffer)
        base = tensors[0] if _is_view(func) else None
        for key, x in _named(result, name):
            if not any(x is known for known in tensors):
                setattr(x, _NAME, (self, key))
                setattr(x, _BASE, base)
        return result

    def _buffer(self, func: Any, result: Any) -> Any:
        """Return a buffer with a place for a result, or None."""
        if _name(func) not in _POINTWISE or func._schema.is_mutable:
            return None
        if not (result.is_cpu and LEAST <= result.numel() <= MOST):
            return None
        if result.dtype not in self._free:
            new = (torch.empty(MOST, dtype=result.dtype) for _ in range(PLACES))
            self._free[result.dtype] = [*new]
        free = self._free[result.dtype]
        return free.pop() if free else None

    def _put(self, result: Any, place: Any, buffer: Any) -> Any:
        """Return a result in its place; where nobody holds it any more, it is free."""
        place.copy_(result)
        result = place.view(place.shape)
        setattr(result, _NAME, (self, self._constant(place)))
        weakref.finalize(result, self._free[place.dtype].append, buffer)
        return result

    def _quick(
        self, func: Any, args: Sequence[Any], result: Any
    ) -> tuple[Any, Sequence[Any]]:
        """Return an operator and its arguments, or what does the same in less time."""
        name = _name(func)
        quick = getattr(torch, name, None) or getattr(torch.Tensor, name, None)
        if name == "_local_scalar_dense":
            return torch.Tensor.item, args
        if name not in _QUICK or quick is None:
            return func, args
        if name == "sqrt" and result.is_cpu:
            return torch.pow, [*args, 0.5]
        if name.rstrip("_") in _ARITHMETIC and result.dtype in _EXACT:
            args = [
                self._number(x, result) if isinstance(x, float) else x for x in args
            ]
        return quick, args

    def _number(self, x: float, like: Any) -> Any:
        key = x, like.dtype, like.device
        if key not in self._numbers:
            self._numbers[key] = torch.tensor(x, dtype=like.dtype, device=like.device)
        return self._numbers[key]

    def _is_number(self, x: Any) -> bool:
        is_new = id(x) not in self._given and id(x) not in self._known
        return is_new and x.numel() == 1 and not self._name_of(x)

    def _name_of(self, x: Any) -> str:
        recorder, name = getattr(x, _NAME, (None, ""))
        return name if recorder is self else ""

    def _text(self, x: Any, uses: set[str]) -> str:
        if isinstance(x, list | tuple):
            return f"[{', '.join(self._text(one, uses) for one in x)}]"
        if isinstance(x, torch.Tensor):
            name = self._given.get(id(x)) or self._name_of(x)
            if not name:
                if id(x) not in self._known and not self._is_number(x):
                    self._is_whole = False  # nobody knows where it comes from
                name = self._constant(x)
            if name.startswith("t"):
                uses.add(name.partition("[")[0])
            if x.dim() == 0 and x.is_cpu:
                self._scalars.add(name)
            return name
        is_plain = x is None or isinstance(x, bool | int)
        if is_plain or (isinstance(x, float) and math.isfinite(x)):
            return repr(x)
        return self._constant(x)

    def _constant(self, x: Any) -> str:
        if id(x) not in self._names:
            name = f"c{len(self._constants)}"
            self._names[id(x)] = name
            self._constants[name] = x
        return self._names[id(x)]

    def recorded(self) -> Callable[[Sequence[Any]], bool] | None:
        """Return what was done, as a function of the tensors in place of the given.

        It returns False, and has done nothing, where a number that Python looked at,
        as in a condition, is another now. It is None if what was done cannot be done
        again: such a number was looked at after something had been written, or a
        tensor came from elsewhere.
        """
        if not self._is_whole:
            return None
        needed: set[str] = set()
        lines = ["return True"]
        for line in reversed(self._fused()):
            if not (line.stays or line.result in needed):
                continue
            if last_used := line.uses - needed:
                lines.append(f"del {', '.join(sorted(last_used))}")
            lines.append(line.text(line.result in needed))
            needed |= line.uses
        if self._given:
            lines.append("".join(f"{name}, " for name in self._given.values()) + "= given")
        body = "\n    ".join(reversed(lines))
        namespace = {**self._constants}
        exec(f"def step(given):\n    {body}", namespace)
        step: Callable[[Sequence[Any]], bool] = namespace["step"]
        return step


    def _fused(self) -> list[_Line]:
        """Return the lines, with x <- x +- s g / d in one for numbers s.

        That is rounded as before.
        """
        lines: list[_Line | None] = [*self._lines]
        for k, line in enumerate(self._lines):
            if line.operator not in ("add_", "sub_") or len(line.arguments) > 2:
                continue
            x, ratio = line.arguments
            if (j := self._source("div", ratio, k)) is None:
                continue
            product, d, _ = self._lines[j].arguments
            if (i := self._source("mul", product, j)) is None:
                continue
            s, g, _ = self._lines[i].arguments
            s, g = (s, g) if s in self._scalars else (g, s)
            between = self._lines[i:k]
            if s in self._scalars and not {g, d} & {*map(_changed, between[1:])}:
                sign = "-" if line.operator == "sub_" else ""
                value = f"value={sign}{self._constant(torch.Tensor.item)}({s})"
                lines[i] = lines[j] = None
                lines[k] = line._replace(
                    function=self._constant(torch.Tensor.addcdiv_),
                    arguments=[x, g, d, value],
                    uses=line.uses.union(*(other.uses for other in between)),
                )
        return [line for line in lines if line is not None]

    def _source(self, operator: str, place: str, k: int) -> int | None:
        """Return the line that put into a place what line k alone reads, if it is so.

        Args:
            operator: What that line is to call.
            place: The name of the place.
            k: The number of the line that reads it.
        """
        lines = self._lines
        is_place = place.startswith("c")
        found = [j for j in range(k) if is_place and lines[j].result == place]
        if not found or lines[found[-1]].operator != operator:
            return None
        for n in range(found[-1] + 1, len(lines)):
            if n != k and place in lines[n].read():
                return None
            if lines[n].result == place:
                break
        return found[-1]


def _changed(line: _Line) -> str:
    """Return what a line changes, if it changes one tensor."""
    return line.arguments[0] if line.result.startswith("t") else line.result


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _written(func: Any, args: Sequence[Any]) -> Iterator[Any]:
    for x, argument in zip(args, func._schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield x


def _is_view(func: Any) -> bool:
    return any(x.alias_info is not None for x in func._schema.returns)


def _tensors(arguments: Iterable[Any]) -> Iterator[Any]:
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _named(result: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(result, torch.Tensor):
        yield name, result
    elif isinstance(result, list | tuple):
        for i, x in enumerate(result):
            yield from _named(x, f"{name}[{i}]")
