"""How a step is taken on PyTorch: by the kernel, or in blocks, small ones concatenated.

Without the kernel: on a CPU an operation on a large tensor waits for memory. So a large
variable is updated block after block: one fits into a core's cache, for all operations
of the formula. And an operation on a bias costs more than what it computes. So small
variables are concatenated, to be a block.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, final

import keras
import torch

from keras_rmsprop import codecs
from keras_rmsprop.backends.base import Backend, Gradients, Stepper
from keras_rmsprop.kernel import torch as kernel
from keras_rmsprop.rule import Slots
from keras_rmsprop.update import Constants, Update, Way, same, update_one

BLOCK_ELEMENTS = 2**19
"""Of a block: a few of that size fit into the caches."""
SMALL_ELEMENTS = 2**12
"""Up to this size copying a variable costs less than the operations it saves."""
KERNEL, ALONE = "by the native kernel", "on its own"
CONCATENATED, IN_BLOCKS = "concatenated with others", "in blocks"


@final
class Torch(Backend):
    """Takes steps at once, with in-place operations on tensors."""

    def as_gradients(self, grads: Gradients, variables: Sequence[Any]) -> list[Any]:
        """See `Backend`."""
        return [
            g if isinstance(g, torch.Tensor) else self.as_gradient(g, v)
            for g, v in zip(grads, variables, strict=True)
        ]

    def check(self, gradient: Any, variable: Any) -> None:
        """See `Backend`."""
        fits = (
            isinstance(gradient, torch.Tensor)
            and isinstance(variable, keras.Variable)
            and gradient.is_floating_point()
            and gradient.shape == variable.shape
        )
        if not fits:
            super().check(gradient, variable)

    def has_kernel(self, variables: Sequence[Any]) -> bool:
        """See `Backend`."""
        return not kernel.is_watched() and kernel.library() is not None

    def scale_of_global_norm(
        self, grads: Gradients, most: float, *, kernel: bool
    ) -> float | None:
        """See `Backend`."""
        norm = _kernel.norm(grads) if kernel else None
        return None if norm is None else most / max(norm, most) + (norm - norm)

    def search_kernel(self, variables: Sequence[Any], *, kernel: bool) -> Any:
        """See `Backend`."""
        return _kernel if kernel and _can_be_in_place(variables[0]) else None

    def update(
        self, updates: Sequence[Update], constants: Constants, *, in_program: bool
    ) -> list[Any]:
        """See `Backend`."""
        is_once = len({id(update.variable) for update in updates}) == len(updates)
        if not (updates and is_once and _can_be_in_place(updates[0].variable)):
            return super().update(updates, constants, in_program=in_program)
        with torch.no_grad():
            done, others = _update_by_kernel(updates, constants)
            _update_in_blocks(others, constants)
        return done

    def why_no_kernel(self) -> str:
        """See `Backend`."""
        return _kernel.why_not()

    def way(
        self, update: Update, constants: Constants, *, xla: bool | None = None
    ) -> Way:
        """See `Backend`."""
        like = update._replace(gradient=update.variable._value)
        if not _why_not_by_kernel(constants) and _part(like, constants):
            return Way(KERNEL, "all in one call")
        if constants.options.cautious:
            return Way(ALONE, "`cautious` counts each variable's elements")
        if not codecs.of(update.slots.velocity).elementwise:
            return Way(ALONE, "`slot_dtype` draws by each element's position")
        if math.prod(update.variable.shape) <= SMALL_ELEMENTS:
            return Way(CONCATENATED, "small")
        return Way(IN_BLOCKS, "a block fits into the caches, for all operations")

    def kinds_of_steps(
        self, stepper: Stepper, variables: Sequence[Any]
    ) -> dict[str, bool]:
        """See `Backend`."""
        return {"A step runs immediately": False}


_kernel = kernel
"""The same, where an argument has its name."""


def _update_by_kernel(
    updates: Sequence[Update], constants: Constants
) -> tuple[list[Any], Sequence[Update]]:
    """Take the step of what the kernel takes.

    Returns:
        The averages that have followed their weights, and the updates that are left.
    """
    if _why_not_by_kernel(constants):
        return [], updates
    followed: list[Any] = []
    others: list[Update] = []
    taken: dict[int, list[Update]] = defaultdict(list)
    parts_of: dict[int, list[kernel.Pointers]] = defaultdict(list)
    for update in updates:
        part = _part(update, constants)
        if part is None:
            others.append(update)
            continue
        taken[part.kind].append(update)
        parts_of[part.kind].append(part)
    for kind, parts in parts_of.items():
        of_kind = taken[kind]
        if not kernel.update(parts, [update.decay for update in of_kind], constants):
            others += of_kind
            continue
        both = zip(of_kind, parts, strict=True)
        followed += [update.average for update, part in both if part.at_average]
    return followed, others


def _part(update: Update, constants: Constants) -> kernel.Pointers | None:
    average = (
        update.average._value
        if constants.share and update.average is not None
        else None
    )
    gradient, weights, slots = _tensors_of(update)
    return kernel.part(gradient, weights, slots, average)


def _why_not_by_kernel(constants: Constants) -> str:
    """Return why the kernel takes no update of a step; empty if it may."""
    if not constants.kernel:
        return "`jit_compile=False`"
    return "PyTorch is watched" if kernel.is_watched() else kernel.why_not()


def _update_in_blocks(updates: Sequence[Update], constants: Constants) -> None:
    alike: dict[Hashable, tuple[Update, list[_Tensors]]] = {}
    for update in updates:
        tensors = _tensors_of(update)
        if constants.options.cautious or not _is_elementwise(
            tensors.slots.velocity.dtype
        ):
            update_one(update, constants)
        else:
            _, several = alike.setdefault(_kind(tensors, update.decay), (update, []))
            several.append(tensors)
    for update, several in alike.values():
        # Keras moves what it makes of numbers to the current device.
        with keras.device(str(several[0].weights.device)):
            for block in _blocks(several):
                _update_block(block, update, constants)


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


def _tensors_of(update: Update) -> _Tensors:
    """Return the tensors of an update whose variables are not in a scope."""
    v, m, a = update.slots
    # `value` looks for a scope each time, which takes longer than an operation.
    slots = Slots(
        v._value, None if m is None else m._value, None if a is None else a._value
    )
    return _Tensors(update.gradient, update.variable._value, slots)


def _kind(tensors: _Tensors, decay: Any) -> Hashable:
    """Return something equal for variables that can be in one block."""
    g, w, slots = tensors
    dtypes = (None if x is None else x.dtype for x in (g, w, *slots))
    return same(decay), w.device, *dtypes


class _Block(NamedTuple):
    """Tensors that are updated at once."""

    gradients: list[Any]
    weights: list[Any]
    slots: list[Slots]


def _blocks(tensors: Sequence[_Tensors]) -> Iterator[_Block]:
    """Yield all variables, small ones concatenated, large ones cut."""
    small, elements = _Block([], [], []), 0
    for gradient, weights, slots in tensors:
        size = weights.numel()
        if size > SMALL_ELEMENTS:
            yield from _cut(gradient, weights, slots)
            continue
        if elements + size > BLOCK_ELEMENTS:
            yield small
            small, elements = _Block([], [], []), 0
        for gathered, x in zip(small, (gradient, weights, slots), strict=True):
            gathered.append(x)
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


def _update_block(block: _Block, update: Update, constants: Constants) -> None:
    """Update a block.

    Args:
        block: The block.
        update: The update of any variable of it.
        constants: What is the same for all variables.
    """
    places = [*zip(*block.slots, strict=True)]
    old = Slots(*map(_concatenated, places))
    weights = None if update.decay is None else _concatenated(block.weights)
    change, new = constants.change(
        _concatenated(block.gradients),
        weights,
        old,
        dtype=update.dtype,
        decay=update.decay,
        accumulate=_accumulate,
    )
    new = codecs.encoded(old, new, constants.draw)
    for of_kind, value in zip(places, new, strict=True):
        if value is not None and value is not of_kind[0]:
            torch._foreach_copy_(of_kind, _parted(value, of_kind))
    change = change.to(block.weights[0].dtype)
    if len(block.weights) == 1:
        block.weights[0].sub_(change)
    else:
        torch._foreach_sub_(block.weights, _parted(change, block.weights))


def _accumulate(old: Any, share: Any, new: Any) -> Any:
    """Do it in place: no slot is read after it has its new value."""
    return old.mul_(share).add_(new)


def _concatenated(parts: Sequence[Any]) -> Any:
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
