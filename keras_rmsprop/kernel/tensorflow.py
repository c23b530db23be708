"""The kernel for TensorFlow: ops of its own, of all variables of a step."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rmsprop import options, rule
from keras_rmsprop.codecs import Draw
from keras_rmsprop.ema_share import Share
from keras_rmsprop.kernel import DTYPES, SLOTS, build, loaded
from keras_rmsprop.sparse import unwrapped
from keras_rmsprop.update import Constants, Sought, Update

TAKE_GROUPS = "KerasRmspropStep", "KerasRmspropFollow"
"""The ops that take a `group` instead of several variables."""
SINGLE = "counters", "rates", "warmups", "estimates"
"""Their inputs that are no variables of a model."""


def ops() -> Any:
    """Return the module of its ops, or None if there is none."""
    return _loaded()[0]


def why_not() -> str:
    """Return why there is no kernel; empty if there is one."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Any, str]:
    return loaded(build.OPS, tf.load_op_library)


# So that a SavedModel that holds a step can be loaded before any step is taken.
# Without the Python functions, which take longer to make; and without a warning.
loaded(build.OPS, tf.load_library, warn=False)


def why_not_for(update: Update, constants: Constants) -> str:
    """Return why the kernel does not take this update; empty if it does.

    Args:
        update: The update.
        constants: What is the same for all.
    """
    if not constants.kernel:
        return "`jit_compile=False`"
    if ops() is None:
        return why_not()
    if constants.options.cautious and update.rows is not None:
        return "`cautious` counts rows without a gradient, too"
    if update.slots.velocity is None:
        return "a variable in float8"
    variables = [
        unwrapped(x) for x in (update.variable, *update.slots) if x is not None
    ]
    if not _are_here(variables) or len({v.device for v in variables}) > 1:
        return "not on one CPU of this process"
    [kept, *others] = {slot.dtype.name for slot in variables[1:]}
    can_keep = SLOTS[update.dtype] if update.rows is None else [update.dtype]
    of_weights = variables[0].dtype.name
    if others or kept not in can_keep or of_weights not in DTYPES[update.dtype]:
        return "the dtypes of weight and slots"
    return ""


def _are_here(variables: Sequence[Any]) -> bool:
    """Whether `tf.Variable`s are on CPUs of this process."""
    with tf.init_scope():
        here = tf.zeros(()).device.partition("/device:")[0]  # job, replica and task
    return all(
        hasattr(v, "handle") and v.device.startswith(here) and "CPU" in v.device
        for v in variables
    )


def group(handles: Sequence[Any]) -> Any:
    """Return variables as one, which `keras_rmsprop_step` need not look up.

    It is for eager calls alone: a function would not know which variables an op uses.

    Args:
        handles: The handles of the variables.
    """
    return ops().keras_rmsprop_group(variables=handles)


def averages(update: Update, constants: Constants) -> bool:
    """Whether the average of the weights can follow in the same call."""
    if update.average is None or constants.share is None:
        return False
    variable, average = unwrapped(update.variable), unwrapped(update.average)
    same = average.dtype == variable.dtype == update.dtype
    return same and _are_here([average]) and average.device == variable.device


def update(updates: Sequence[Update], constants: Constants) -> None:
    """Take the step of variables of one dtype, on one device, in one call.

    Args:
        updates: What to do to each. None may be there twice. All with an average that
            is to follow, or none.
        constants: What is the same for all.
    """
    dtype = updates[0].dtype
    kinds = list(zip(*(update.slots for update in updates), strict=True))
    velocities, momenta, average_gradients = (
        [] if kind[0] is None else [slot.handle for slot in kind] for kind in kinds
    )
    rate, search = constants.learning_rate, _NO_SEARCH
    if isinstance(rate, Sought):
        rate, search = rate.factor, _search(updates, rate)
    rates = _readable_rates(updates, rate)
    constants = constants._replace(learning_rate=0 if rates else rate)
    corrects = constants.options.bias_correction
    most, warmups = _share(constants, dtype)
    if constants.count is not None:  # then the op itself finds the correction
        options = constants.options._replace(bias_correction=False)
        constants = constants._replace(options=options)
    ops().keras_rmsprop_step(
        gradients=[tf.cast(update.gradient, dtype) for update in updates],
        weights=[update.variable.handle for update in updates],
        velocities=velocities,
        momenta=momenta,
        average_gradients=average_gradients,
        averages=[
            update.average.handle for update in updates if update.average is not None
        ],
        counters=[] if constants.count is None else [constants.count.handle],
        rates=rates,
        warmups=warmups,
        share=tf.cast(most, dtype),
        draw=_draw(constants.draw),
        S=updates[0].slots.velocity.dtype.base_dtype,
        cautious=constants.options.cautious,
        bias_correction=corrects,
        **search,
        **numbers(updates, constants),
    )


_NO_SEARCH: dict[str, Any] = {
    "first_weights": [],
    "gradient_sums": [],
    "estimates": [],
    "search": (),
    "samples": [],
}


def _search(updates: Sequence[Update], sought: Sought) -> dict[str, Any]:
    """Return the arguments of the op with which it finds the learning rate."""
    by_variable = {id(unwrapped(part.variable)): part for part in sought.parts}
    parts = [by_variable[id(update.variable)] for update in updates]
    return {
        "first_weights": [unwrapped(part.first).handle for part in parts],
        "gradient_sums": [unwrapped(part.sums).handle for part in parts],
        "estimates": [unwrapped(sought.estimate).handle],
        "search": sought.numbers,
        "samples": [x for part in parts for x in part.sample.runs],
    }


def searches(updates: Sequence[Update], sought: Sought) -> bool:
    """Whether a call of `update` with these, which counts, may find the rate, too."""
    of_updates = {id(update.variable) for update in updates}
    dtype, device = updates[0].dtype, updates[0].variable.device
    return (
        {id(unwrapped(part.variable)) for part in sought.parts} == of_updates
        and all(part.rows is None and follows(part) for part in sought.parts)
        and {part.gradient.dtype.name for part in sought.parts} == {dtype}
        and _is_beside(unwrapped(sought.estimate), device)
    )


def _share(constants: Constants, dtype: str) -> tuple[Any, list[Any]]:
    """Return the share of averages that stays.

    If the op counts, it finds the share: then the most that it can be, and the variable
    with the count at which it began to warm up, if it does.
    """
    share = constants.share
    if share is None or constants.count is None:
        return 0 if share is None else share(dtype), []
    most, warms_up, begin = share.momentum
    if not options.is_tensor(most):
        most = tf.constant(most, dtype)
    return most, [unwrapped(begin).handle] if warms_up else []


def _readable_rates(updates: Sequence[Update], rate: Any) -> list[Any]:
    """Return the variable with the learning rate, if the op itself may read it.

    An operation that reads it makes an eager step of a small network a tenth slower.
    """
    rate = unwrapped(rate)
    if not (isinstance(rate, tf.Variable) and rate.dtype in (tf.float32, tf.float64)):
        return []
    return [rate.handle] if _is_beside(rate, updates[0].variable.device) else []


def _is_beside(variable: Any, device: str) -> bool:
    """Whether a variable is on this device, of this process."""
    return _are_here([variable]) and bool(variable.device == device)


def numbers(updates: Sequence[Update], constants: Constants) -> dict[str, Any]:
    """Return the arguments of an op that say how to update."""
    dtype, numbers = updates[0].dtype, constants.options
    t = tf.cast(constants.draw.step + 1, dtype) if numbers.bias_correction else None
    corrects = t is not None and not rule.is_zero(numbers.rho)
    correction = rule.correction(numbers.cast(dtype).rho, t) if corrects else 1
    scale = 1 if constants.scale is None else constants.scale
    decays = [0 if update.decay is None else update.decay for update in updates]
    if constants.decoupled_weight_decay:
        # In float32 first, as in Keras.
        decays = [d if options.is_tensor(d) else np.float32(d) for d in decays]
    return {
        "learning_rate": tf.cast(constants.learning_rate, dtype),
        "correction": tf.cast(correction, dtype),
        "scale": tf.cast(-scale if numbers.maximize else scale, dtype),
        "constants": _vector([numbers.rho, numbers.momentum, numbers.epsilon]),
        "decays": _vector(
            [] if all(update.decay is None for update in updates) else decays
        ),
        "W": updates[0].variable.dtype.base_dtype,
        "epsilon_inside_sqrt": numbers.epsilon_inside_sqrt,
        "nesterov": numbers.nesterov,
        "lr_in_momentum": numbers.lr_in_momentum,
        "decoupled_weight_decay": constants.decoupled_weight_decay,
    }


def _draw(draw: Draw) -> Any:
    """Return the number from which random rounding starts in a step."""
    if draw.offset is None:
        return tf.constant(0)
    return tf.cast(draw.step, "int32") + tf.cast(draw.offset, "int32")


def _vector(numbers: Sequence[Any]) -> Any:
    """Return numbers, some of them tensors, as a vector of doubles."""
    if any(map(options.is_tensor, numbers)):
        return tf.stack(
            [
                tf.cast(x, "float64")
                if options.is_tensor(x)
                else tf.constant(x, "float64")
                for x in numbers
            ]
        )
    return tf.constant(numbers, "float64")


def follows(part: Any) -> bool:
    """Whether `follow` takes a variable of the search."""
    if ops() is None or part.gradient is None:
        return False
    variables = [unwrapped(x) for x in (part.variable, part.first, part.sums)]
    if part.momentum is not None:
        variables.append(unwrapped(part.momentum))
    if not _are_here(variables) or len({v.device for v in variables}) > 1:
        return False
    weights, first, sums = (v.dtype.name for v in variables[:3])
    given = getattr(part.gradient, "dtype", None)
    return first == sums == given and weights in DTYPES.get(sums, ())


def follow(
    parts: Sequence[Any], weight: Any, forgetting: Any
) -> tuple[list[Any], list[Any]]:
    """Let s of variables follow their gradients, in a search for a learning rate.

    Args:
        parts: The variables, each an `estimate.Sampled`.
        weight: What a gradient is multiplied by.
        forgetting: The share of s that stays.

    Returns:
        For each call that it took, `estimate.Sums`, as a vector of doubles. And the
        parts that it has left alone.
    """
    groups: dict[tuple[Any, ...], list[Any]] = {}
    left = []
    for part in parts:
        if part.rows is not None or not follows(part):
            left.append(part)
            continue
        variable = unwrapped(part.variable)
        moves = part.momentum is not None
        kind = variable.dtype, part.gradient.dtype, variable.device, moves
        groups.setdefault(kind, []).append(part)
    found = []
    for (of_weights, dtype, _, moves), several in groups.items():
        momenta = several if moves else []
        sums = ops().keras_rmsprop_follow(
            gradients=[part.gradient for part in several],
            weights=[unwrapped(part.variable).handle for part in several],
            first_weights=[unwrapped(part.first).handle for part in several],
            gradient_sums=[unwrapped(part.sums).handle for part in several],
            momenta=[unwrapped(part.momentum).handle for part in momenta],
            forgetting=tf.cast(forgetting, dtype),
            weight=tf.cast(weight, dtype),
            W=of_weights.base_dtype,
            samples=[x for part in several for x in part.sample.runs],
        )
        found.append(tf.unstack(sums))
    return found, left


def counts(updates: Sequence[Update], counter: Any, share: Share | None) -> bool:
    """Whether a call of `update` with these may also increment a counter.

    Args:
        updates: What it is to do.
        counter: The variable.
        share: See `Constants`.
    """
    own = [counter]
    if share is not None and share.momentum.warms_up:
        own.append(unwrapped(share.momentum.begin))
    device = updates[0].variable.device
    return counter.dtype == tf.int64 and all(_is_beside(x, device) for x in own)


def is_for(variables: Sequence[Any]) -> bool:
    """Whether there is a kernel where these variables are."""
    return ops() is not None and _are_here(list(map(unwrapped, variables)))


def takes(tensors: Sequence[Any]) -> bool:
    """Whether `scale` takes these tensors, by their dtypes."""
    dtypes = {getattr(x, "dtype", None) for x in tensors}
    return dtypes in ({tf.float32}, {tf.float64})


def scale(tensors: Sequence[Any], most: Any) -> Any:
    """Return what scales tensors so that their global norm is at most this.

    Args:
        tensors: Tensors of one dtype.
        most: A number.

    Returns:
        A scalar of that dtype. It is NaN if and only if the norm, in doubles, is not
        finite.
    """
    return ops().keras_rmsprop_scale(tensors=tensors, most=tf.cast(most, "float64"))


def logs(tensor: Any) -> tuple[Any, Any]:
    """Return the sum of ln |x| of a tensor, where it is finite, and of how many x.

    Subnormal numbers count as 0, as they do on TensorFlow's threads.

    Args:
        tensor: In float32 or float64.

    Returns:
        A scalar of that dtype, and an int64.
    """
    found = ops().keras_rmsprop_logs(tensor=tensor)
    return tf.cast(found.total, tensor.dtype), found.count
