"""How a step is taken on PyTorch: by the kernel, or in blocks, small ones end to end.

Without the kernel: on a CPU an operation on a large tensor waits for memory. So a large
variable is updated block after block: one fits into a core's cache, for all operations
of the formula. And an operation on a bias costs more than what it computes. So small
variables are laid end to end, to be a block.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import keras
import torch

from keras_rmsprop import codecs
from keras_rmsprop.backends import plain
from keras_rmsprop.backends.plain import HAS_ROWS as HAS_ROWS
from keras_rmsprop.backends.plain import Runner as Runner
from keras_rmsprop.backends.plain import Step, Update, Way
from keras_rmsprop.backends.plain import after as after
from keras_rmsprop.backends.plain import all_finite as all_finite
from keras_rmsprop.backends.plain import as_taken as as_taken
from keras_rmsprop.backends.plain import assign_everywhere as assign_everywhere
from keras_rmsprop.backends.plain import clocks as clocks
from keras_rmsprop.backends.plain import folds as folds
from keras_rmsprop.backends.plain import has_slices as has_slices
from keras_rmsprop.backends.plain import inside_xla as inside_xla
from keras_rmsprop.backends.plain import is_eager as is_eager
from keras_rmsprop.backends.plain import is_for_kernel as is_for_kernel
from keras_rmsprop.backends.plain import is_slices as is_slices
from keras_rmsprop.backends.plain import outside_functions as outside_functions
from keras_rmsprop.kernel import torch as kernel
from keras_rmsprop.rule import Slots

BLOCK_ELEMENTS = 2**19
"""Of a block: a few of that size fit into the caches."""
SMALL_ELEMENTS = 2**12
"""Up to this size copying a variable costs less than the operations it saves."""


def as_gradients(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Return gradients as tensors, None as it is."""
    return [
        g if isinstance(g, torch.Tensor) else plain.as_gradient(g, v)
        for g, v in zip(grads, variables, strict=True)
    ]


def check(gradient: Any, variable: Any) -> None:
    """Fail if a gradient does not fit its variable by its shape or dtype."""
    fits = (
        isinstance(gradient, torch.Tensor)
        and isinstance(variable, keras.Variable)
        and gradient.is_floating_point()
        and gradient.shape == variable.shape
    )
    if not fits:
        plain.check(gradient, variable)


def update(
    updates: Sequence[Update], step: Step, *, in_program: bool = False
) -> list[Any]:
    """Take the step of all variables; see `tensorflow.update`."""
    is_once = len({id(one.variable) for one in updates}) == len(updates)
    if not (updates and is_once and _can_be_in_place(updates[0].variable)):
        return plain.update(updates, step)
    with torch.no_grad():
        followed, others = _update_by_kernel(updates, step)
        _update_in_blocks(others, step)
    return followed


def _update_by_kernel(
    updates: Sequence[Update], step: Step
) -> tuple[list[Any], Sequence[Update]]:
    """Take the step of what the kernel takes.

    Returns:
        The averages that have followed their weights, and the updates that are left.
    """
    if _why_not_by_kernel(step):
        return [], updates
    followed: list[Any] = []
    others: list[Update] = []
    taken: dict[int, list[Update]] = defaultdict(list)
    parts_of: dict[int, list[kernel.Part]] = defaultdict(list)
    for one in updates:
        part = _part(one, step)
        if part is None:
            others.append(one)
            continue
        taken[part.kind].append(one)
        parts_of[part.kind].append(part)
    for kind, parts in parts_of.items():
        of_kind = taken[kind]
        if not kernel.update(parts, [one.decay for one in of_kind], step):
            others += of_kind
            continue
        both = zip(of_kind, parts, strict=True)
        followed += [one.average for one, part in both if part.at_average]
    return followed, others


def _part(one: Update, step: Step) -> kernel.Part | None:
    average = one.average._value if step.share and one.average is not None else None
    gradient, weights, slots = _tensors_of(one)
    return kernel.part(gradient, weights, slots, average)


def _why_not_by_kernel(step: Step) -> str:
    """Return why the kernel takes no update of a step; empty if it may."""
    if not step.native:
        return "`jit_compile=False`"
    return "PyTorch is watched" if kernel.is_watched() else kernel.why_not()


def _update_in_blocks(updates: Sequence[Update], step: Step) -> None:
    alike: dict[Hashable, tuple[Update, list[_Tensors]]] = {}
    for one in updates:
        tensors = _tensors_of(one)
        if step.options.cautious or not _is_elementwise(tensors.slots.velocity.dtype):
            plain.update_one(one, step)
        else:
            _, several = alike.setdefault(_kind(tensors, one.decay), (one, []))
            several.append(tensors)
    for one, several in alike.values():
        # Keras moves what it makes of numbers to the current device.
        with keras.device(str(several[0].weights.device)):
            for block in _blocks(several):
                _update_block(block, one, step)


@functools.cache
def _is_elementwise(dtype: Any) -> bool:
    return codecs.named(keras.backend.standardize_dtype(dtype)).elementwise


def _can_be_in_place(variable: Any) -> bool:
    """Whether variables have tensors of their own now, which may be changed.

    In a step as a function they have those of a scope. There is no public way to know.
    Without the private one the answer is no.
    """
    try:
        from keras.src.backend.common.stateless_scope import in_stateless_scope
    except ImportError:
        return False
    return hasattr(variable, "_value") and not in_stateless_scope()


class _Tensors(NamedTuple):
    """The tensors of an update."""

    gradient: Any
    weights: Any
    slots: Slots


def _tensors_of(one: Update) -> _Tensors:
    """Return the tensors of an update whose variables are not in a scope."""
    v, m, a = one.slots
    # `value` looks for a scope each time, which takes longer than an operation.
    slots = Slots(
        v._value, None if m is None else m._value, None if a is None else a._value
    )
    return _Tensors(one.gradient, one.variable._value, slots)


def _kind(tensors: _Tensors, decay: Any) -> Hashable:
    """Return something equal for variables that can be in one block."""
    g, w, slots = tensors
    dtypes = (None if x is None else x.dtype for x in (g, w, *slots))
    return plain.same(decay), w.device, *dtypes


class _Block(NamedTuple):
    """Tensors that are updated at once."""

    gradients: list[Any]
    weights: list[Any]
    slots: list[Slots]


def _blocks(tensors: Sequence[_Tensors]) -> Iterator[_Block]:
    """Yield all variables, small ones end to end, large ones cut."""
    small, elements = _Block([], [], []), 0
    for gradient, weights, slots in tensors:
        size = weights.numel()
        if size > SMALL_ELEMENTS:
            yield from _cut(gradient, weights, slots)
            continue
        if elements + size > BLOCK_ELEMENTS:
            yield small
            small, elements = _Block([], [], []), 0
        for place, x in zip(small, (gradient, weights, slots), strict=True):
            place.append(x)
        elements += size
    if small.weights:
        yield small


def _cut(gradient: Any, weights: Any, slots: Slots) -> Iterator[_Block]:
    places = [weights, *(slot for slot in slots if slot is not None)]
    is_one = weights.numel() <= BLOCK_ELEMENTS or not weights.is_cpu
    if is_one or not all(x.is_contiguous() for x in places):
        yield _Block([gradient], [weights], [slots])
        return

    def cut(x: Any) -> Any:
        return x.reshape(-1).split(BLOCK_ELEMENTS)

    parts = [repeat(None) if x is None else cut(x) for x in slots]
    for g, w, *of_slots in zip(cut(gradient), cut(weights), *parts, strict=False):
        yield _Block([g], [w], [Slots(*of_slots)])


def _update_block(block: _Block, one: Update, step: Step) -> None:
    """Update a block.

    Args:
        block: The block.
        one: The update of any variable of it.
        step: The step.
    """
    places = [*zip(*block.slots, strict=True)]
    old = Slots(*map(_end_to_end, places))
    weights = None if one.decay is None else _end_to_end(block.weights)
    taken, new = step.taken(
        _end_to_end(block.gradients),
        weights,
        old,
        dtype=one.dtype,
        decay=one.decay,
        accumulate=_accumulate,
    )
    new = codecs.encoded(old, new, step.draw)
    for of_kind, value in zip(places, new, strict=True):
        if value is not None and value is not of_kind[0]:
            torch._foreach_copy_(of_kind, _parted(value, of_kind))
    taken = taken.to(block.weights[0].dtype)
    if len(block.weights) == 1:
        block.weights[0].sub_(taken)
    else:
        torch._foreach_sub_(block.weights, _parted(taken, block.weights))


def _accumulate(old: Any, share: Any, new: Any) -> Any:
    """Do it in place: no slot is read after it has its new value."""
    return old.mul_(share).add_(new)


def _end_to_end(parts: Sequence[Any]) -> Any:
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return torch.cat([x if x.dim() == 1 else x.reshape(-1) for x in parts])


def _parted(x: Any, places: Sequence[Any]) -> list[Any]:
    if len(places) == 1:
        return [x]
    parts = x.split([place.numel() for place in places])
    return [
        part if place.dim() == 1 else part.view(place.shape)
        for part, place in zip(parts, places, strict=True)
    ]


def searching_kernel(variables: Sequence[Any]) -> Any:
    """Return the kernel if it may follow variables of a search here, else None.

    Args:
        variables: Variables where it may run; none: nowhere.
    """
    may = variables and not kernel.is_watched() and kernel.library()
    return kernel if may and _can_be_in_place(variables[0]) else None


def scale_of_global_norm(
    grads: Sequence[Any], most: float, native: Sequence[Any]
) -> float | None:
    """Return what clips the global norm; see `tensorflow.scale_of_global_norm`."""
    norm = kernel.norm([g for g in grads if g is not None]) if native else None
    if norm is None:
        return None
    return most / max(norm, most) + (norm - norm)


why_no_kernel = kernel.why_not

KERNEL, ALONE = "by the kernel", "on its own"
END_TO_END, IN_BLOCKS = "end to end with others", "in blocks"


def way(one: Update, step: Step, *, in_program: bool = False) -> Way:
    """Say how `update` updates a variable, and why."""
    like = one._replace(gradient=one.variable._value)
    if not _why_not_by_kernel(step) and _part(like, step):
        return Way(KERNEL, "one native call takes the step of all of them")
    if step.options.cautious:
        return Way(ALONE, "`cautious` counts each variable's elements")
    if not codecs.of(one.slots.velocity).elementwise:
        return Way(ALONE, "`slot_dtype` draws by each element's place")
    if math.prod(one.variable.shape) <= SMALL_ELEMENTS:
        return Way(END_TO_END, "small, so operations cost more than what they compute")
    return Way(IN_BLOCKS, "a block fits into the caches, for all operations")


def kinds_of_steps(
    variables: Sequence[Any],
    jit_compile: bool | str,
    is_for_kernel: bool,
    in_blocks: bool = False,
) -> dict[str, dict[str, bool]]:
    """Return the kinds of steps, in words, and the arguments of `way` for each."""
    return {"A step, here and now:": {}}
