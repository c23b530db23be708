"""The kernel for PyTorch: functions that are given the addresses of tensors."""

import ctypes
import functools
import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import torch

from keras_rmsprop import blockwise
from keras_rmsprop.backends.plain import Step
from keras_rmsprop.kernel import DTYPES, SLOTS, build, loaded
from keras_rmsprop.rule import Slots

KINDS = [
    tuple(getattr(torch, dtype) for dtype in (t, w, s))
    for t in DTYPES
    for s in SLOTS[t]
    for w in DTYPES[t]
]
"""The dtypes of gradient, weights and slots, in the order of `pointers.cc`."""
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_PLAIN = torch.Tensor, torch.nn.Parameter


class Tensors(NamedTuple):
    """The tensors of an update."""

    gradient: Any
    weights: Any
    slots: Slots
    average: Any
    """Of the weights; None if it does not follow now."""


class Part(NamedTuple):
    """What the kernel is told of a variable."""

    tensors: Tensors
    """With a gradient in the dtype in which it computes."""
    kind: int
    """The number of the dtypes."""
    places: Sequence[int]
    """The size, and the address of each tensor, or 0."""


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
    return found


def is_watched() -> bool:
    """Whether PyTorch has to see each operation, as it traces or counts them.

    There is no public way to know all of it. Without the private one the answer is no.
    """
    count = getattr(torch._C, "_len_torch_dispatch_stack", int)
    return torch.compiler.is_compiling() or count() > 0


def takes(x: Any) -> bool:
    """Whether the elements of a tensor lie at its address, one after the other."""
    return (
        type(x) in _PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_inference()
        and not x.is_neg()
    )


def part(tensors: Tensors) -> Part | None:
    """Return what the kernel is to be told of a variable; None if it does not take it.

    Args:
        tensors: Its tensors.
    """
    gradient, weights, slots, average = tensors
    size, velocity = weights.numel(), slots.velocity
    wide = torch.float64 if torch.float64 in (weights.dtype, velocity.dtype) else None
    gradient = gradient.to(wide or torch.float32).contiguous()
    number = _NUMBERS.get((gradient.dtype, weights.dtype, velocity.dtype))
    if number is None or not (gradient.numel() == size and takes(gradient)):
        return None
    if average is not None and not weights.dtype == average.dtype == gradient.dtype:
        average = None
    in_blocks = velocity.dtype is torch.uint8
    bytes_each = blockwise.BLOCK + blockwise.SCALE
    kept = blockwise.blocks(size) * bytes_each if in_blocks else size
    wanted = (size, *([kept] * 3), size)
    places = [size]
    try:
        places.append(gradient.data_ptr())
        for x, elements in zip((weights, *slots, average), wanted, strict=True):
            if x is None:
                places.append(0)
                continue
            if not (takes(x) and x.numel() == elements):
                return None
            places.append(x.data_ptr())
    except RuntimeError:  # within a transform of `torch.func` there are no addresses
        return None
    if any(x is not None and x.dtype is not velocity.dtype for x in slots):
        return None
    return Part(Tensors(gradient, weights, slots, average), number, places)


def update(parts: Sequence[Part], decays: Sequence[Any], step: Step) -> bool:
    """Take the step of variables of one kind in one call.

    Args:
        parts: The variables. None may be there twice.
        decays: The weight decay of each, or None.
        step: What is the same for all.

    Returns:
        Whether it was taken: not if there is no memory for it.
    """
    kind = parts[0].kind
    dtype = {torch.float32: "float32", torch.float64: "float64"}[KINDS[kind][0]]
    numbers = step.options
    rho, correction = _number(numbers.rho), 1.0
    if numbers.bias_correction and rho:
        correction = -math.expm1((_number(step.draw.step) + 1) * math.log(rho))
    scale = 1.0 if step.scale is None else _number(step.scale)
    draw, offset = 0, step.draw.offset
    if offset is not None:
        draw = (int(_number(step.draw.step)) + int(_number(offset))) % 2**32
    follows = any(one.tensors.average is not None for one in parts)
    request = _Request(
        -scale if numbers.maximize else scale,
        _number(step.learning_rate),
        rho,
        _number(numbers.momentum),
        _number(numbers.epsilon),
        correction,
        _number(step.share(dtype)) if follows and step.share else 0.0,
        draw,
        numbers.epsilon_inside_sqrt,
        numbers.nesterov,
        numbers.lr_in_momentum,
        step.decoupled_weight_decay,
        numbers.cautious and parts[0].tensors.slots.momentum is not None,
    )
    places = array("q", [x for one in parts for x in one.places])
    decay = array("d", [0.0 if x is None else _number(x) for x in decays])
    taken = library().keras_rmsprop_step(
        ctypes.byref(request),
        kind,
        len(parts),
        *(ctypes.c_void_p(x.buffer_info()[0]) for x in (places, decay)),
        torch.get_num_threads(),
    )
    # As PyTorch's own operations do: a graph that has kept the old weights says so.
    for one in parts:
        torch.autograd.graph.increment_version(one.tensors.weights)
    return bool(taken)


def squares(tensors: Sequence[Any]) -> list[float] | None:
    """Return the sum of the squares of each tensor.

    A sum is finite if and only if all elements of a float32 tensor are. It is None if
    the kernel does not take these tensors.
    """
    if not (tensors and library()) or is_watched():
        return None
    [dtype, *others] = {x.dtype for x in tensors}
    name = {torch.float32: "float", torch.float64: "double"}.get(dtype)
    tensors = [x.contiguous() for x in tensors]
    if others or name is None or not all(map(takes, tensors)):
        return None
    try:
        places = array("q", [x.data_ptr() for x in tensors])
    except RuntimeError:
        return None
    sizes = array("q", [x.numel() for x in tensors])
    sums = array("d", bytes(8 * len(tensors)))
    getattr(library(), f"keras_rmsprop_squares_of_{name}")(
        len(tensors),
        *(ctypes.c_void_p(x.buffer_info()[0]) for x in (sizes, places, sums)),
        torch.get_num_threads(),
    )
    return sums.tolist()


def _number(x: Any) -> float:
    """Return a number: of a Keras variable, a tensor, or itself."""
    if isinstance(x, keras.Variable):
        x = x.value
    return x.item() if torch.is_tensor(x) else float(x)
