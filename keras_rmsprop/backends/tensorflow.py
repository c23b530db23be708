"""How a step is taken on TensorFlow: by the kernel, by rows, end to end, on its own."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rmsprop import codecs, skipping, sparse
from keras_rmsprop.backends import layouts, plain
from keras_rmsprop.backends.plain import Step, Taken, Update, Way
from keras_rmsprop.backends.programs import XLA_PROGRAMS, Programs, is_xla_left
from keras_rmsprop.backends.programs import has_slices as has_slices
from keras_rmsprop.backends.programs import is_slices as is_slices
from keras_rmsprop.backends.runner import (
    XLA_EAGER_ELEMENTS,
    XLA_IN_GRAPH_ELEMENTS,
    is_large,
    is_watched,
    is_worth_xla,
)
from keras_rmsprop.backends.runner import Runner as Runner
from keras_rmsprop.folding import folded
from keras_rmsprop.kernel import tensorflow as kernel
from keras_rmsprop.rule import Slots
from keras_rmsprop.sparse import inside_xla as inside_xla
from keras_rmsprop.sparse import native, widened

folds = inside_xla
"""Whether to reduce in parts, see `folding`."""

HAS_ROWS = True
"""Whether a step may update only some rows of a table, with a clock."""

outside_functions = tf.init_scope
clocks = sparse.Clocks


def as_gradients(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Return gradients as tensors or as slices of tensors, None as it is."""
    return [
        g if isinstance(g, tf.Tensor) else as_gradient(g, v)
        for g, v in zip(grads, variables, strict=True)
    ]


def as_gradient(gradient: Any, variable: Any) -> Any:
    """Return one gradient, as `as_gradients` does."""
    if isinstance(gradient, tf.Tensor) or gradient is None:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        values = as_gradient(gradient.values, variable)
        others = (gradient.indices, gradient.dense_shape)
        return tf.IndexedSlices(
            values, *(None if x is None else tf.convert_to_tensor(x) for x in others)
        )
    if isinstance(gradient, np.ndarray) and np.iscomplexobj(gradient):
        return tf.constant(gradient)  # to be refused; a cast would take the real part
    return tf.convert_to_tensor(keras.ops.convert_to_tensor(gradient, variable.dtype))


def check(gradient: Any, variable: Any) -> None:
    """Fail if a gradient does not fit its variable by its shape or dtype."""
    if gradient is None:
        return
    if not isinstance(variable, keras.Variable | tf.Variable):
        raise TypeError(
            f"Gradients must come with variables. Received: {type(variable).__name__}"
        )
    name, shape = variable.name, tuple(variable.shape)
    if not gradient.dtype.is_floating:
        raise TypeError(
            "A gradient must be of floating point numbers. "
            f"Received: {gradient.dtype.name} for variable {name!r}"
        )
    if not gradient.shape.is_compatible_with(shape):
        raise ValueError(
            "A gradient must have the shape of its variable. Received: "
            f"shape {tuple(gradient.shape)} for variable {name!r} of shape {shape}"
        )
    if not isinstance(gradient, tf.IndexedSlices):
        return
    values, ids = gradient.values, gradient.indices
    if (
        ids.dtype not in (tf.int32, tf.int64)
        or not ids.shape.is_compatible_with([None])
        or not values.shape.is_compatible_with([*ids.shape[:1], *shape[1:]])
        or not shape
    ):
        raise ValueError(
            "A sparse gradient must have int32 or int64 indices, and for each a row as "
            f"wide as the variable's. Received: {ids.dtype.name} indices of shape "
            f"{tuple(ids.shape)} and values of shape {tuple(values.shape)} for "
            f"variable {name!r} of shape {shape}"
        )


def update(
    updates: Sequence[Update], step: Step, *, in_program: bool = False
) -> list[Any]:
    """Take the step of all variables.

    Args:
        updates: What to do to each.
        step: What is the same for all.
        in_program: Whether this is traced for a program that holds nothing else.

    Returns:
        The averages that have followed their weights.
    """
    followed: list[Any] = []
    together: dict[Hashable, list[Update]] = {}
    by_kernel: dict[Hashable, list[Update]] = {}
    in_turn: list[Update] = []
    one_each = len({id(native(one.variable)) for one in updates}) == len(updates)
    for one in updates:
        one = one._replace(variable=native(one.variable), slots=one.slots.map(native))
        kind = way(one, step, in_program=in_program).name
        if kind == ROWS:
            _update_rows(one, step)
        elif kind == KERNEL and one_each:
            average = one.average if kernel.averages(one, step) else None
            if average is not None:
                followed.append(average)
            one = one._replace(average=None if average is None else native(average))
            dtypes = one.variable.dtype, one.dtype, one.slots.velocity.dtype
            place = *dtypes, one.variable.device, average is None
            by_kernel.setdefault(place, []).append(one)
        elif kind == IN_TURN:
            in_turn.append(one)
        elif kind == ONE_AXIS:
            layouts.update_on_one_axis(
                one.gradient,
                one.variable,
                one.slots,
                functools.partial(_kept, one, step),
                step.draw.step >= 0,
            )
        elif kind == END_TO_END and one_each:
            key = one.variable.dtype, one.slots.velocity.dtype, plain.same(one.decay)
            together.setdefault(key, []).append(one)
        else:
            plain.update_one(one, step)
    _update_in_turn(in_turn, step, in_program=in_program)
    for several in by_kernel.values():
        kernel.update(several, step)
    for several in together.values():
        if len(several) == 1:
            plain.update_one(several[0], step)
        else:
            layouts.update_end_to_end(
                [one.gradient for one in several],
                [one.variable for one in several],
                [one.slots for one in several],
                functools.partial(_kept, several[0], step),
            )
    return followed


def _update_in_turn(updates: Sequence[Update], step: Step, *, in_program: bool) -> None:
    """Update variables one after the other, so that only one is decoded at a time.

    Where XLA may be used, each is an XLA program of its own, the same for the same
    shapes: in one program XLA decodes all slots first.
    """
    if inside_xla():
        plain.update_in_turn(updates, step, in_one_program=True)
        return
    programs: dict[Hashable, Any] = {}
    done: list[Any] = []
    may_nest = step.native and not (
        tf.executing_eagerly() or tf.distribute.has_strategy()
    )
    for one in updates:
        places = one.variable, *one.slots
        kinds = (x if x is None else (x.shape, x.dtype) for x in places)
        key = *kinds, one.gradient.dtype, plain.same(one.decay)
        is_worth_it = (
            in_program or math.prod(one.variable.shape) >= XLA_IN_GRAPH_ELEMENTS
        )
        with tf.control_dependencies(done):
            if may_nest and is_worth_it and (key in programs or is_xla_left()):
                if key not in programs:
                    programs[key] = _program_of(one, step)
                    Programs.compiled += 1
                done = [programs[key](one.gradient, one.variable, tuple(one.slots))]
            else:
                plain.update_one(one, step)
                done = [] if tf.executing_eagerly() else [one.variable.read_value()]


def _program_of(one: Update, step: Step) -> Callable[..., Any]:
    """Return an XLA program that updates a variable like this one."""

    def update(gradient: Any, variable: Any, slots: Sequence[Any]) -> Any:
        places = {"variable": variable, "slots": Slots(*slots)}
        plain.update_one(one._replace(gradient=gradient, **places), step)
        return tf.constant(True)

    return tf.function(update, autograph=False, jit_compile=True)


ROWS, ONE_AXIS = "by rows", "on one axis"
END_TO_END, ALONE = "end to end with others", "on its own"
KERNEL, IN_TURN = "by the kernel", "one after the other"


def way(
    one: Update, step: Step, *, in_program: bool = False, xla: bool | None = None
) -> Way:
    """Say how `update` updates a variable, and why.

    Args:
        one: The update.
        step: The step.
        in_program: See `update`.
        xla: Whether XLA compiles it; None: look.
    """
    xla = inside_xla() if xla is None else xla
    by_kernel = _is_kernel(one, step, xla)
    if one.rows is not None:
        how = ", in one native call" if by_kernel else ""
        return Way(ROWS, f"sparse gradients: the rows of the batch{how}")
    if by_kernel:
        return Way(KERNEL, "one native call takes the step of all of them")
    if codecs.are_in_blocks(one.slots):
        return Way(IN_TURN, "its slots are in blocks, so one at a time is in float32")
    if xla and in_program and layouts.has_short_axis(one.variable):
        return Way(ONE_AXIS, "its last axis is short, and XLA vectorises no other")
    if xla:
        return Way(ALONE, "XLA makes one loop of its operations")
    if not layouts.is_small(one.variable):
        return Way(ALONE, f"more than {layouts.END_TO_END_ELEMENTS} elements")
    if tf.distribute.has_strategy():
        return Way(ALONE, "under `tf.distribute`")
    if step.options.cautious:
        return Way(ALONE, "`cautious` counts each variable's elements")
    if not codecs.of(one.slots.velocity).elementwise:
        return Way(ALONE, "`slot_dtype` draws by each element's place")
    return Way(END_TO_END, "small, so operations cost more than what they compute")


def _is_kernel(one: Update, step: Step, xla: bool) -> bool:
    return not (xla or is_watched() or kernel.why_not_for(one, step))


def kinds_of_steps(
    variables: Sequence[Any],
    jit_compile: bool | str,
    is_for_kernel: bool,
    in_blocks: bool = False,
) -> dict[str, dict[str, bool]]:
    """Return the kinds of steps, in words, and the arguments of `way` for each."""
    in_graph = {"in_program": False, "xla": False}
    in_program = {"in_program": True, "xla": True}
    if jit_compile is False:
        eager = {"An eager step runs operation by operation:": in_graph}
    elif in_blocks and not is_for_kernel:
        text = "An eager step is one program; XLA compiles the update of each variable:"
        return {
            text: in_graph,
            "So are parts of other graphs, of large ones:": in_graph,
        }
    elif is_for_kernel and jit_compile is not True:
        eager = {"An eager step is one program without XLA:": in_graph}
    elif jit_compile is True or (is_worth_xla(variables) and is_xla_left()):
        text = (
            "An eager step is one program, compiled by XLA unless gradients are sparse:"
        )
        eager = {text: in_program}
    elif is_worth_xla(variables):
        text = (
            "An eager step that is new now is one program without XLA, which has "
            f"compiled {XLA_PROGRAMS} in this process and frees none:"
        )
        eager = {text: in_graph}
    else:
        text = (
            "An eager step is one program without XLA, as no variable has more than "
            f"{XLA_EAGER_ELEMENTS} elements:"
        )
        eager = {text: in_graph}
    graph = "In `fit` and in a `tf.function` a step is"
    if jit_compile is True or (
        jit_compile == "auto" and is_large(variables) and not is_for_kernel
    ):
        return eager | {f"{graph} a program of its own, compiled by XLA:": in_program}
    return eager | {f"{graph} part of that graph:": in_graph}


def _kept(one: Update, step: Step, gradient: Any, weights: Any, slots: Slots) -> Taken:
    """Return what a step like this one takes, and the new slots as they are kept."""
    taken, new = step.taken(gradient, weights, slots, dtype=one.dtype, decay=one.decay)
    return taken, codecs.encoded(one.slots, new, step.draw)


def _update_rows(one: Update, step: Step) -> None:
    ids = one.rows.ids
    if ids is not None and _is_kernel(one, step, inside_xla()):
        kernel.update_rows(one, step)
        return
    mean = functools.partial(sparse.mean, ids=ids, variable=one.variable)

    def taken(weights: Any, slots: Slots) -> Taken:
        return step.taken(
            one.gradient,
            weights,
            slots,
            dtype=one.dtype,
            decay=one.decay,
            mean=tf.reduce_mean if ids is None else mean,
        )

    sparse.update(
        one.variable,
        one.slots,
        one.rows,
        step.options.rho,
        step.draw,
        taken,
        reads_weights=one.decay is not None,
    )
    if step.native:
        sparse.share_reads([one.variable, *one.slots, one.rows.clock.last])


def clipped(
    grads: Sequence[Any], norm: float | None, global_norm: float | None
) -> list[Any]:
    """Return gradients as Keras clips them, by norms that XLA takes on all threads.

    Args:
        grads: Tensors or None.
        norm: The largest norm of one gradient, or None.
        global_norm: If that is None, the largest norm of all together.
    """
    squares = [
        [tf.reduce_sum(part) for part in folded(tf.square(g), tf.add)]
        for g in grads
        if g is not None
    ]
    if norm:
        norms = iter([tf.sqrt(tf.add_n(sums)) for sums in squares])
        return [
            g if g is None else g * (norm / tf.maximum(next(norms), norm))
            for g in grads
        ]
    most = global_norm
    of_all = tf.sqrt(tf.add_n([s for sums in squares for s in sums]))
    scale = most / tf.maximum(of_all, most) + (of_all - of_all)  # infinite: NaN
    return [g if g is None else g * scale for g in grads]


def assign_everywhere(variable: Any, value: Any) -> None:
    """Set a variable on all replicas of this process, even if called from one."""
    copies = getattr(native(variable), "values", (native(variable),))
    value = tf.convert_to_tensor(value)
    for copy in copies:
        copy.assign(tf.cast(value, copy.dtype))


def is_for_kernel(updates: Sequence[Update], step: Step) -> bool:
    """Whether the kernel takes all of these updates."""
    return not is_watched() and not any(
        kernel.why_not_for(one, step)
        or (one.average is not None and not kernel.averages(one, step))
        for one in updates
        if one.rows is None
    )


why_no_kernel = kernel.why_not


def searching_kernel(variables: Sequence[Any]) -> Any:
    """Return the kernel if it may follow variables of a search here, else None.

    Args:
        variables: Variables where it may run; none: nowhere.
    """
    may = variables and not is_watched() and not inside_xla() and kernel.ops()
    return kernel if may else None


def scale_of_global_norm(
    grads: Sequence[Any], most: float, native: Sequence[Any]
) -> Any:
    """Return what gradients are to be multiplied by to clip their global norm.

    Args:
        grads: Tensors or None.
        most: The largest norm of all together.
        native: Variables where a kernel may sum up.

    Returns:
        A scalar, NaN if the norm is infinite; or None without such a kernel.
    """
    given = [g for g in grads if g is not None]
    if is_watched() or not kernel.takes(given, native):
        return None
    return kernel.scale(given, most)


def all_finite(grads: Sequence[Any], native: Sequence[Any]) -> Any:
    """Return whether all elements of all gradients are finite, a bool tensor.

    Args:
        grads: Tensors.
        native: Variables where a kernel may look.
    """
    sums = not is_watched() and kernel.takes(grads, native)
    if sums and grads[0].dtype == tf.float32:
        return tf.math.is_finite(kernel.scale(grads, 1))
    return skipping.all_finite(grads, fold=inside_xla())


def as_taken(
    grads: Sequence[Any],
    variables: Sequence[Any],
    clocks: Sequence[Any],
    native: Sequence[Any] = (),
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return gradients as Keras can treat them: tensors in float32 at least.

    Args:
        grads: A tensor, slices or None for each variable.
        variables: The variables.
        clocks: For each, its clock if it is a table whose rows suffice, or None.
        native: Variables where a kernel may sum up; none: nowhere.

    Returns:
        The gradients; for each its distinct rows, or None; and the operations that
        fail if an index is outside its table, or a gradient of another shape.
    """
    tensors: list[Any] = []
    rows: list[Any] = []
    asserts = []
    for gradient, variable, clock in zip(grads, variables, clocks, strict=True):
        ids = None
        if isinstance(gradient, tf.IndexedSlices):
            gradient, of_shape = sparse.with_known_shape(gradient, variable)
            asserts += [*of_shape, sparse.check_ids(gradient, variable)]
            if clock is None:
                gradient = sparse.dense(gradient, variable)
            else:
                gradient, ids = _distinct(gradient, variable, native)
        elif gradient is not None:
            if not gradient.shape.is_fully_defined():
                gradient = tf.ensure_shape(gradient, variable.shape)
                asserts.append(gradient.op)
            gradient = widened(gradient)
        tensors.append(gradient)
        rows.append(ids)
    return tensors, rows, asserts


def _distinct(
    gradient: tf.IndexedSlices, variable: Any, native: Sequence[Any]
) -> tuple[Any, Any]:
    wide = tf.IndexedSlices(widened(gradient.values), gradient.indices)
    if not is_watched() and kernel.takes([wide.values], native):
        return kernel.distinct(wide)
    return sparse.distinct(wide, variable)


after = tf.control_dependencies
"""Context in which everything waits for the given operations."""


def is_eager() -> bool:
    """Whether this runs now, and is not being traced."""
    return tf.executing_eagerly()
