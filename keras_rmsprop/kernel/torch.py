"""The kernel for PyTorch: functions that are given the addresses of tensors."""

import ctypes
import functools
import math
from array import array
from collections.abc import Sequence
from itertools import repeat
from typing import Any, Final, NamedTuple

import keras
import torch

from keras_rmsprop import blockwise
from keras_rmsprop.kernel import DTYPES, SLOTS, build, loaded
from keras_rmsprop.rule import Slots
from keras_rmsprop.update import Constants

KINDS = [(t, w, s) for t in DTYPES for s in SLOTS[t] for w in DTYPES[t]]
"""The dtypes of gradient, weights and slots, in the order of `pointers.cc`."""
_KINDS = {
    (getattr(torch, w), getattr(torch, s)): (number, getattr(torch, t))
    for number, (t, w, s) in enumerate(KINDS)
}
"""For the dtypes of weights and slots: the number, and the dtype of gradients."""
SEARCHES = [(t, w) for t in DTYPES for w in DTYPES[t]]
"""The dtypes of s and weights in a search, in the order of `pointers.cc`."""
_SEARCHES = {
    (getattr(torch, t), getattr(torch, w)): number
    for number, (t, w) in enumerate(SEARCHES)
}
ADDRESSES: Final = 2
"""The first of the fields of a `Pointers` that `pointers.cc` is given."""
_PLAIN = torch.Tensor, torch.nn.Parameter


class Pointers(NamedTuple):
    """What the kernel is told of a variable: its size, and addresses, or 0."""

    kind: int
    """The number of its dtypes."""
    tensors: tuple[Any, ...]
    """They must live until the call is over. First the gradient, in a dtype that fits,
    then all that are written to; or None."""
    size: int
    at_gradient: int
    at_weights: int
    at_velocity: int
    at_momentum: int
    at_average_gradient: int
    at_average: int
    """Of the average of the weights."""


class _Request(ctypes.Structure):
    """What a step is asked for; see `step.h`."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("scale", "learning_rate", "rho")),
        *((name, ctypes.c_double) for name in ("momentum", "epsilon")),
        *((name, ctypes.c_double) for name in ("correction", "share")),
        ("draw", ctypes.c_uint32),
        *((name, ctypes.c_bool) for name in ("epsilon_inside_sqrt", "nesterov")),
        *((name, ctypes.c_bool) for name in ("lr_in_momentum", "decoupled")),
        ("cautious", ctypes.c_bool),
    )


def library() -> Any:
    """Return the library, or None if there is none."""
    return _loaded()[0]


def why_not() -> str:
    """Return why there is no kernel; empty if there is one."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Any, str]:
    return loaded(build.POINTERS, _load)


def _load(path: str) -> Any:
    found = ctypes.CDLL(path)
    found.keras_rmsprop_step.restype = ctypes.c_bool
    found.keras_rmsprop_norm.restype = ctypes.c_double
    return found


def is_watched() -> bool:
    """Whether PyTorch has to see each operation, as it traces or counts them.

    There is no public way to know all of it. Without the private one the answer is no.
    """
    count = getattr(torch._C, "_len_torch_dispatch_stack", int)
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or count() > 0


def part(gradient: Any, weights: Any, slots: Slots, average: Any) -> Pointers | None:
    """Return what the kernel is to be told of a variable; None if it does not take it.

    Args:
        gradient: A tensor of the shape of the weights.
        weights: A tensor.
        slots: Tensors.
        average: A tensor, the average of the weights that is to follow them; or None.
    """
    v, m, a = slots
    kind = _KINDS.get((weights.dtype, v.dtype))
    if kind is None:
        return None
    number, wide = kind
    if gradient.layout is not torch.strided:
        return None
    if gradient.dtype is not wide:
        gradient = gradient.to(wide)
    if not gradient.is_contiguous():
        gradient = gradient.contiguous()
    if average is not None and not average.dtype is weights.dtype is wide:
        average = None
    kept = size = gradient.numel()
    if v.dtype is torch.uint8:
        kept = blockwise.blocks(size) * (blockwise.BLOCK + blockwise.SCALE)
    try:
        return Pointers(
            number,
            (gradient, weights, v, m, a, average),
            size,
            _address(gradient, size, wide),
            _address(weights, size, weights.dtype),
            _address(v, kept, v.dtype),
            0 if m is None else _address(m, kept, v.dtype),
            0 if a is None else _address(a, kept, v.dtype),
            0 if average is None else _address(average, size, wide),
        )
    except RuntimeError:
        return None


def _address(x: Any, size: int, dtype: Any) -> int:
    """Return where the elements of a tensor lie, one after the other.

    Raises:
        RuntimeError: They do not. Within a transform of `torch.func` they lie nowhere.
    """
    if (
        type(x) in _PLAIN
        and x.is_cpu
        and x.dtype is dtype
        and x.numel() == size
        and x.is_contiguous()
        and not x.is_inference()
        and not x.is_neg()
    ):
        address = int(x.data_ptr())
        if address or size == 0:
            return address or id(x)  # an empty one has no address, but is there
    raise RuntimeError("No plain tensor")


def update(
    parts: Sequence[Pointers], decays: Sequence[Any], constants: Constants
) -> bool:
    """Take the step of variables of one kind in one call.

    Args:
        parts: The variables.
        decays: The weight decay of each, or None.
        constants: What is the same for all.

    Returns:
        Whether it was taken: not if they overlap, or if there is no memory for it.
    """
    kind = parts[0].kind
    dtype, *_ = KINDS[kind]
    numbers = constants.options
    rho, correction = _number(numbers.rho), 1.0
    if numbers.bias_correction and rho:
        correction = _correction(rho, _number(constants.draw.step) + 1)
    scale = 1.0 if constants.scale is None else _number(constants.scale)
    draw, offset = 0, constants.draw.offset
    if offset is not None:
        draw = (int(_number(constants.draw.step)) + int(_number(offset))) % 2**32
    follows = any(part.at_average for part in parts)
    request = _Request(
        -scale if numbers.maximize else scale,
        _number(constants.learning_rate),
        rho,
        _number(numbers.momentum),
        _number(numbers.epsilon),
        correction,
        _number(constants.share(dtype)) if follows and constants.share else 0.0,
        draw,
        numbers.epsilon_inside_sqrt,
        numbers.nesterov,
        numbers.lr_in_momentum,
        constants.decoupled_weight_decay,
        numbers.cautious and parts[0].at_momentum != 0,
    )
    addresses = array("q", [x for part in parts for x in part[ADDRESSES:]])
    decay = array("d", [0 if x is None else _number(x) for x in decays])
    taken = library().keras_rmsprop_step(
        ctypes.byref(request),
        kind,
        len(parts),
        *(ctypes.c_void_p(x.buffer_info()[0]) for x in (addresses, decay)),
        torch.get_num_threads(),
    )
    if taken:
        # As PyTorch's operations do: a graph that has kept what was says so.
        _count_writes([x for part in parts for x in part.tensors[1:] if x is not None])
    return bool(taken)


def _correction(rho: float, t: float) -> float:
    """Return 1 - rho^t as tensors would: it is never an error."""
    try:
        return -math.expm1(t * math.log(rho))
    except OverflowError:
        return -math.inf
    except ValueError:
        return math.nan


def _count_writes(tensors: list[Any]) -> None:
    count = torch.autograd.graph.increment_version
    try:
        count(tensors)
    except TypeError:  # earlier versions take one tensor
        for x in tensors:
            count(x)


def norm(tensors: Sequence[Any]) -> float | None:
    """Return the norm of all tensors together; None if the kernel does not take them.

    It is finite if and only if all elements of float32 tensors are.
    """
    if not (tensors and library()) or is_watched():
        return None
    [dtype, *others] = {x.dtype for x in tensors}
    is_strided = all(x.layout is torch.strided for x in tensors)
    if others or dtype not in (torch.float32, torch.float64) or not is_strided:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None  # in a step as a function, somebody may ask for its derivative
    tensors = [x.contiguous() for x in tensors]
    sizes = array("q", [x.numel() for x in tensors])
    try:
        addresses = array("q", map(_address, tensors, sizes, repeat(dtype)))
    except RuntimeError:
        return None
    found = library().keras_rmsprop_norm(
        dtype is torch.float64,
        len(tensors),
        *(ctypes.c_void_p(x.buffer_info()[0]) for x in (sizes, addresses)),
        torch.get_num_threads(),
    )
    return float(found)


def follow(
    parts: Sequence[Any], weight: Any, forgetting: Any
) -> tuple[list[Any], list[Any]]:
    """Let s of variables follow their gradients, in a search for a learning rate.

    Args:
        parts: The variables, each an `estimate.Sampled`.
        weight: What a gradient is multiplied by.
        forgetting: The share of s that stays.

    Returns:
        For each call that it took, `estimate.Sums`. And the parts that it has left
        alone.
    """
    kinds: dict[int, list[tuple[int, ...]]] = {}
    left = []
    for part in parts:
        searched = _searched(part)
        if searched is None:
            left.append(part)
        else:
            kinds.setdefault(searched[0], []).append(searched[1:])
    found = []
    for kind, several in kinds.items():
        told = array("q", [x for addresses in several for x in addresses])
        sums = array("d", 4 * [0.0])
        library().keras_rmsprop_follow(
            kind,
            len(several),
            ctypes.c_void_p(told.buffer_info()[0]),
            ctypes.c_double(_number(forgetting)),
            ctypes.c_double(_number(weight)),
            torch.get_num_threads(),
            ctypes.c_void_p(sums.buffer_info()[0]),
        )
        found.append(sums)
    return found, left


def _searched(part: Any) -> tuple[int, ...] | None:
    """Return what the kernel is told of a variable of the search, or None."""
    g = part.gradient
    if g is None or part.rows is not None:
        return None
    weights, first, sums = (x._value for x in (part.variable, part.first, part.sums))
    momentum = part.momentum
    number = _SEARCHES.get((sums.dtype, weights.dtype))
    if number is None:
        return None
    run, pitch, stride = part.sample.runs
    all_, size = weights.numel(), sums.numel()
    last = (size // run - 1) * pitch + (run - 1) * stride
    if size and (size % run or last >= all_):
        return None
    try:
        return (
            *(number, run, pitch, stride, size, all_),
            _address(g, all_, sums.dtype),
            _address(weights, all_, weights.dtype),
            _address(first, size, sums.dtype),
            _address(sums, size, sums.dtype),
            0 if momentum is None else _address(momentum._value, all_, sums.dtype),
        )
    except RuntimeError:
        return None


def _number(x: Any) -> float:
    """Return a number: of a Keras variable, a tensor, or itself."""
    if isinstance(x, keras.Variable):
        x = x.value
    return x.item() if torch.is_tensor(x) else float(x)
