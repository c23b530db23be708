"""A step as the operators of torch that it calls, without the Python around them.

What Keras and this package do besides takes longer than the update of a small network.
So a step is recorded while it is taken. The record is a function of straight-line
code, which calls the same operators in the same order: it is the plain step, and there
is no second way to do one. Tensors that are there at each step, such as weights, are
constants of it. What differs, such as gradients, goes in.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keras_rmsprop.backends import statements
from keras_rmsprop.backends.statements import Line

_POINTWISE = {"add", "mul", "sub", "div", "sqrt", "pow", "minimum", "maximum", "clamp"}
"""Operators, element by element, that can put a result into memory that is there."""
_IN_PLACE = {"add_", "mul_", "sub_", "copy_", "_foreach_copy_", "_foreach_sub_"}
_OTHERS = {"cat", "split_with_sizes", "view", "gt", "eq", "where", "sum", "stack"}
_QUICK = _POINTWISE | _IN_PLACE | _OTHERS
"""Operators with a namesake in torch that takes the same arguments. To call that takes
less time."""
_ARITHMETIC = "add", "mul", "sub", "div"
_EXACT = torch.float32, torch.float64
"""Dtypes in which a number may as well be a tensor, which takes less time."""
_NAME = "_name_in_record"
"""The attribute of a result that holds its name."""


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
        self._lines: list[Line] = []
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
        """Return the result, under a name."""
        tensors = [*_tensors([*args, *kwargs.values()])]
        writes, numbers = func._schema.is_mutable, map(self._is_number, tensors)
        if tensors and all(numbers) and not writes:
            return result  # the same at each step
        if any(map(self._is_number, _tensors(_written(func, args)))):
            self._is_whole = False
        function, args = self._quick(func, args, result)
        texts = [self._text(x) for x in args]
        texts += [f"{key}={self._text(x)}" for key, x in kwargs.items()]
        name, base, number = f"t{len(self._lines)}", "", ""
        if _is_view(func):
            base = self._text(tensors[0]).partition("[")[0]
        if isinstance(result, bool | int | float):  # Python looks at a number
            self._is_whole &= not self._has_written and result == result
            number, writes = repr(result), False
        self._has_written |= writes
        is_one = _name(func) in _POINTWISE and not writes and result.is_cpu
        like = torch.empty_like(result, device="meta") if is_one else None
        called = _name(func), self._constant(function), texts
        self._lines.append(Line(name, *called, writes, base, like, number))
        for key, x in _named(result, name):
            if not any(x is known for known in tensors):
                setattr(x, _NAME, (self, key))
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
        is_shape = x.dim() == 1 and x.numel() <= 8 and not x.is_floating_point()
        is_new = is_new and not self._name_of(x)
        return is_new and (x.numel() < 2 or (is_shape and x.dtype != torch.bool))

    def _name_of(self, x: Any) -> str:
        recorder, name = getattr(x, _NAME, (None, ""))
        return name if recorder is self else ""

    def _text(self, x: Any) -> str:
        if isinstance(x, list | tuple):
            return f"[{', '.join(map(self._text, x))}]"
        if isinstance(x, torch.Tensor):
            name = self._given.get(id(x)) or self._name_of(x)
            if not name:
                if id(x) not in self._known and not self._is_number(x):
                    self._is_whole = False  # nobody knows where it comes from
                name = self._constant(x)
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

    def signature(self) -> Hashable:
        """Return something equal for recordings of the same; None if not whole.

        What Python computes from what it has counted, or has seen in an array, differs.
        """
        if not self._is_whole:
            return None
        values = {name: self._comparable(x) for name, x in self._constants.items()}
        lines = ((line.result, line.operator, *line.arguments) for line in self._lines)
        return (*lines, *values.items())

    def _comparable(self, x: Any) -> Hashable:
        if isinstance(x, torch.Tensor) and id(x) not in self._known:
            return repr(x if x.is_meta else x.tolist())
        return x if isinstance(x, int | float | str | torch.device) else id(x)

    def recorded(self) -> Callable[[Sequence[Any]], bool]:
        """Return what was done, as a function of the tensors in place of the given.

        It returns False, and does nothing, where a number that Python looked at, as in
        a condition, is another now. The recording must be whole. It is not where such
        a number was looked at after something had been written, and where a tensor
        came from elsewhere.
        """
        constants = {**self._constants}
        lines = statements.without_unread(self._lines)
        lines = statements.fused(lines, self._scalars, constants)
        lines = statements.placed(lines, constants)
        return statements.function(lines, self._given.values(), constants)


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
