"""How a step is taken on PyTorch: in blocks, and soon from a record.

On a CPU an operation on a large tensor waits for memory. So a large variable is updated
block after block: one fits into a core's cache, for all operations of the formula. And
an operation on a bias costs more than what it computes. So small variables are laid end
to end, to be a block.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import keras
import torch

from keras_rmsprop import codecs
from keras_rmsprop.backends import plain
from keras_rmsprop.backends.plain import HAS_ROWS as HAS_ROWS
from keras_rmsprop.backends.plain import Request, Step, Update, Way
from keras_rmsprop.backends.plain import after as after
from keras_rmsprop.backends.plain import all_finite as all_finite
from keras_rmsprop.backends.plain import as_taken as as_taken
from keras_rmsprop.backends.plain import assign_everywhere as assign_everywhere
from keras_rmsprop.backends.plain import clocks as clocks
from keras_rmsprop.backends.plain import has_slices as has_slices
from keras_rmsprop.backends.plain import inside_xla as inside_xla
from keras_rmsprop.backends.plain import is_eager as is_eager
from keras_rmsprop.backends.plain import is_for_kernel as is_for_kernel
from keras_rmsprop.backends.plain import is_slices as is_slices
from keras_rmsprop.backends.plain import outside_functions as outside_functions
from keras_rmsprop.backends.plain import scale_of_global_norm as scale_of_global_norm
from keras_rmsprop.backends.plain import searching_kernel as searching_kernel
from keras_rmsprop.backends.plain import why_no_kernel as why_no_kernel
from keras_rmsprop.backends.recording import Recorder
from keras_rmsprop.backends.settings import Settings, constraint_key
from keras_rmsprop.backends.statements import MOST
from keras_rmsprop.rule import Slots

BLOCK_ELEMENTS = MOST
"""Of a block: a few of that size fit into the caches."""
SMALL_ELEMENTS = 2**12
"""Up to this size copying a variable costs less than the operations it saves."""
MOST_KINDS, MOST_RECORDS = 16, 4
"""How many kinds of steps an optimizer remembers, and how many records of each."""


def as_gradient(gradient: Any, variable: Any) -> Any:
    """Return a gradient in a form that the backend knows."""
    if isinstance(gradient, torch.Tensor):
        return gradient
    return plain.as_gradient(gradient, variable)


def check(gradient: Any, variable: Any) -> None:
    """Fail if a gradient does not fit its variable by its shape."""
    if getattr(gradient, "shape", None) != variable.shape:
        plain.check(gradient, variable)


def update(
    updates: Sequence[Update], step: Step, *, in_program: bool = False
) -> list[Any]:
    """Take the step of all variables; see `tensorflow.update`."""
    alike: dict[Hashable, list[Update]] = {}
    once = len({id(one.variable) for one in updates}) == len(updates)
    for one in updates:
        if way(one, step, in_program=in_program and once).name == ALONE:
            with _device(one):
                plain.update_one(one, step)
        else:
            alike.setdefault(_kind(one), []).append(one)
    for several in alike.values():
        with _device(several[0]):
            for block in _blocks(several):
                _update_block(block, several[0], step)
    return []


def _device(one: Update) -> Any:
    """Return a context for its tensors: Keras moves them to the current device."""
    return keras.device(str(one.variable.value.device))


def _is_itself(variable: Any) -> bool:
    """Whether the value of a variable is its own tensor, and not that of a scope."""
    return variable.value is getattr(variable, "_value", None)


def _kind(one: Update) -> Hashable:
    """Return something equal for variables that can be in one block."""
    tensors = one.variable.value, one.gradient, *_values(one.slots)
    dtypes = (None if x is None else x.dtype for x in tensors)
    decay = id(one.decay) if torch.is_tensor(one.decay) else one.decay
    return decay, tensors[0].device, *dtypes


def _values(slots: Slots) -> Slots:
    return slots.map(lambda slot: slot.value)


class _Block(NamedTuple):
    """Tensors that are updated at once."""

    gradients: list[Any]
    weights: list[Any]
    slots: list[Slots]


def _blocks(updates: Sequence[Update]) -> Iterator[_Block]:
    """Yield all variables, small ones end to end, large ones cut."""
    small, elements = _Block([], [], []), 0
    for gradient, weights, slots in (
        (one.gradient, one.variable.value, _values(one.slots)) for one in updates
    ):
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


END_TO_END, IN_BLOCKS, ALONE = "end to end with others", "in blocks", "on its own"


def way(one: Update, step: Step, *, in_program: bool = False) -> Way:
    """Say how `update` updates a variable, and why."""
    if not in_program:
        return plain.way(one, step)
    if step.options.cautious:
        return Way(ALONE, "`cautious` counts each variable's elements")
    if not codecs.of(one.slots.velocity).elementwise:
        return Way(ALONE, "`slot_dtype` draws by each element's place")
    if math.prod(one.variable.shape) <= SMALL_ELEMENTS:
        return Way(END_TO_END, "small, so operations cost more than what they compute")
    return Way(IN_BLOCKS, "a block fits into the caches, for all operations")


def kinds_of_steps(
    variables: Sequence[Any], jit_compile: bool | str, is_for_kernel: bool
) -> dict[str, dict[str, bool]]:
    """Return the kinds of steps, in words, and the arguments of `way` for each."""
    if jit_compile is False:
        return {"A step runs operation by operation:": {"in_program": False}}
    text = "A step, in `fit` too, repeats what an earlier one has recorded:"
    return {text: {"in_program": True}}


class _Kind:
    """What is known of steps of a kind."""

    def __init__(self) -> None:
        self.records: list[Callable[[Sequence[Any]], bool]] = []
        self.is_new, self.may_record = True, False  # what comes once is not worth it
        self._seen: set[Hashable] = set()

    def note(self, recorder: Recorder) -> None:
        """Make a record of what was done if it is done for the second time.

        What is never done again is not recorded any more.
        """
        signature = recorder.signature()
        if signature in self._seen:
            self.records.append(recorder.recorded())
            self._seen.clear()
        else:
            self._seen.add(signature)
        is_full = MOST_RECORDS in (len(self.records), len(self._seen))
        self.may_record = signature is not None and not is_full


class Runner:
    """Takes an optimizer's steps, and takes those again that it has recorded."""

    def __init__(self) -> None:
        self._settings = Settings()
        self._number: int | None = None
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def forget_settings(self) -> None:
        """Say that an attribute of the optimizer was assigned."""
        self._number = None

    def run(
        self,
        step: Callable[..., None],
        grads: list[Any],
        variables: Sequence[Any],
        request: Request,
    ) -> None:
        """Take a step; see `tensorflow.Runner`."""
        with torch.no_grad():
            self._run(step, grads, variables, request)

    def _run(
        self,
        step: Callable[..., None],
        grads: list[Any],
        variables: Sequence[Any],
        request: Request,
    ) -> None:
        given = [g for g in grads if g is not None]
        if (
            request.jit_compile is False
            or torch.compiler.is_compiling()
            or not all(isinstance(g, torch.Tensor) for g in given)
            or len({*map(id, given)}) < len(given)
            or not _is_itself(variables[0])
        ):
            step(grads, variables)
            return
        rate, learning_rate = request.learning_rate(), None
        if not isinstance(rate, keras.Variable):
            learning_rate = torch.as_tensor(rate)
            given.append(learning_rate)
            rate = learning_rate.dtype
        if self._number is None:
            self._number = self._settings.number(request.attributes)
        kind = self._kind(
            (
                self._number,
                id(rate),
                *map(id, variables),
                *(id(v._value) for v in variables),
                *map(constraint_key, variables),
                *(None if g is None else (g.shape, g.dtype, g.device) for g in grads),
            )
        )
        if any(record(given) for record in kind.records):
            return
        if not kind.may_record:
            step(grads, variables, learning_rate)
            kind.may_record = kind.is_new
            kind.is_new = False
            return
        known = {id(x): x for x in _known([request.attributes, variables, rate])}
        with Recorder(given, [*known.values()]) as recorder:
            step(grads, variables, learning_rate, True)
        kind.note(recorder)

    def _kind(self, key: Hashable) -> _Kind:
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)
        return kind


def _known(things: Any) -> Iterator[Any]:
    """Yield all tensors of variables, and other tensors, among things."""
    for x in things.values() if isinstance(things, Mapping) else things:
        if isinstance(x, keras.Variable):
            yield x.value
        elif isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple | Mapping):
            yield from _known(x)
