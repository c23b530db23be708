"""How variables are updated on TensorFlow: by the kernel, by rows, together, alone."""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop import codecs, sparse
from keras_rmsprop.backends import layouts
from keras_rmsprop.backends.base import Stepper
from keras_rmsprop.backends.programs import (
    XLA_EAGER_ELEMENTS,
    XLA_PROGRAMS,
    is_large,
    is_watched,
    is_worth_xla,
    is_xla_left,
)
from keras_rmsprop.kernel import rows as kernel_rows
from keras_rmsprop.kernel import tensorflow as kernel
from keras_rmsprop.rule import Slots
from keras_rmsprop.sparse import inside_xla, unwrapped
from keras_rmsprop.update import (
    Change,
    Constants,
    Sought,
    Update,
    Way,
    same,
    update_one,
)

ROWS, KERNEL, IN_TURN = "by rows", "by the native kernel", "one after the other"
CONCATENATED, ALONE = "concatenated with others", "on its own"


def update(
    updates: Sequence[Update], constants: Constants, *, in_program: bool
) -> list[Any]:
    """Update all variables; see `Backend.update`."""
    done: list[Any] = []
    together: dict[Hashable, list[Update]] = {}
    by_kernel: dict[Hashable, list[Update]] = {}
    in_turn: list[Update] = []
    is_once = len({id(unwrapped(u.variable)) for u in updates}) == len(updates)
    rows: list[Update] = []
    alone: list[Update] = []
    for update in updates:
        update = update._replace(
            variable=unwrapped(update.variable), slots=update.slots.map(unwrapped)
        )
        kind = way(update, constants).name
        if kind == ROWS:
            rows.append(update)
        elif kind == KERNEL and is_once:
            average = update.average if kernel.averages(update, constants) else None
            if average is not None:
                done.append(average)
                average = unwrapped(average)
            update = update._replace(average=average)
            dtypes = (x.dtype for x in (update.variable, update.slots.velocity))
            group = *dtypes, update.dtype, update.variable.device, average is None
            by_kernel.setdefault(group, []).append(update)
        elif kind == IN_TURN:
            in_turn.append(update)
        elif kind == CONCATENATED and is_once:
            dtypes = (x.dtype for x in (update.variable, update.slots.velocity))
            together.setdefault((*dtypes, same(update.decay)), []).append(update)
        else:
            alone.append(update)
    # What is the same for all, and can be found or counted in one call that does all.
    several = next(iter(by_kernel.values()), [])
    is_all = 0 < len(several) == len(updates) and all(
        mine.average is not None or given.average is None
        for mine, given in zip(several, updates, strict=True)
    )
    if (counter := constants.count) is not None:
        may = is_all and kernel.counts(several, unwrapped(counter), constants.share)
        done += [counter] if may else []
        constants = constants._replace(count=unwrapped(counter) if may else None)
    rate = constants.learning_rate
    if isinstance(rate, Sought) and not (
        constants.count is not None and kernel.searches(several, rate)
    ):
        constants = constants._replace(learning_rate=rate.find())
    for update in rows:
        _update_rows(update, constants)
    for update in alone:
        update_one(update, constants)
    layouts.update_in_turn(in_turn, constants, in_program=in_program)
    for several in by_kernel.values():
        kernel.update(several, constants)
    for several in together.values():
        if len(several) == 1:
            update_one(several[0], constants)
        else:
            layouts.update_concatenated(
                [update.gradient for update in several],
                [update.variable for update in several],
                [update.slots for update in several],
                functools.partial(_encoded, several[0], constants),
            )
    return done


def way(update: Update, constants: Constants, *, xla: bool | None = None) -> Way:
    """Say how `update` updates a variable, and why; see `Backend.way`."""
    xla = inside_xla() if xla is None else xla
    by_kernel = _is_for_kernel(update, constants, xla)
    if update.rows is not None:
        how = ", in one native call" if by_kernel else ""
        return Way(ROWS, f"only those of the batch{how}")
    if by_kernel:
        return Way(KERNEL, "all in one call")
    if codecs.are_in_blocks(update.slots):
        return Way(IN_TURN, "8-bit state, so one at a time is in float32")
    if xla:
        return Way(ALONE, "XLA makes one loop of its operations")
    if not layouts.is_small(update.variable):
        return Way(ALONE, f"more than {layouts.SMALL_ELEMENTS} elements")
    if tf.distribute.has_strategy():
        return Way(ALONE, "under `tf.distribute`")
    if constants.options.cautious:
        return Way(ALONE, "`cautious` counts each variable's elements")
    if not codecs.of(update.slots.velocity).elementwise:
        return Way(ALONE, "`slot_dtype` draws by each element's position")
    return Way(CONCATENATED, "small")


def kinds_of_steps(stepper: Stepper, variables: Sequence[Any]) -> dict[str, bool]:
    """Return the kinds of steps, in words; see `Backend.kinds_of_steps`."""
    compiled, for_kernel = stepper.jit_compile, stepper.is_for_kernel(variables)
    eager, xla = "Eager: one program without XLA", False
    is_program = compiled is not False and not stepper.calls_users_python(variables)
    if not is_program:
        eager = "Eager: operation by operation"
    elif stepper.has_blocks() and not for_kernel:
        eager = "Eager: one program, where XLA compiles the update of each variable"
        return {eager: False, f"{IN_GRAPHS}: the same for large models": False}
    elif for_kernel and compiled is not True:
        pass
    elif compiled is True or (is_worth_xla(variables) and is_xla_left()):
        eager = "Eager: one program, compiled by XLA unless gradients are sparse"
        xla = True
    elif is_worth_xla(variables):
        eager += f", as it has compiled {XLA_PROGRAMS} in this process and frees none"
    else:
        eager += f", as no variable has more than {XLA_EAGER_ELEMENTS} elements"
    in_graph = compiled is True or (
        is_program and is_large(variables) and not for_kernel
    )
    what = "a program of its own, compiled by XLA" if in_graph else "part of the graph"
    return {eager: xla, f"{IN_GRAPHS}: {what}": in_graph}


IN_GRAPHS = "In `fit` and `tf.function`"


def _is_for_kernel(update: Update, constants: Constants, xla: bool) -> bool:
    return not (xla or is_watched() or kernel.why_not_for(update, constants))


def _encoded(
    like: Update, constants: Constants, gradient: Any, weights: Any, slots: Slots
) -> Change:
    """Return the change of weights, and the new slots as they are stored."""
    change, new = constants.change(
        gradient, weights, slots, dtype=like.dtype, decay=like.decay
    )
    return change, codecs.encoded(like.slots, new, constants.draw)


def _update_rows(update: Update, constants: Constants) -> None:
    ids = update.rows.ids
    if ids is not None and _is_for_kernel(update, constants, inside_xla()):
        kernel_rows.update_rows(update, constants)
        return
    mean = functools.partial(sparse.mean, ids=ids, variable=update.variable)

    def change(weights: Any, slots: Slots) -> Change:
        return constants.change(
            update.gradient,
            weights,
            slots,
            dtype=update.dtype,
            decay=update.decay,
            mean=tf.reduce_mean if ids is None else mean,
        )

    sparse.update(
        update.variable,
        update.slots,
        update.rows,
        constants.options.rho,
        constants.draw,
        change,
        reads_weights=update.decay is not None,
    )
