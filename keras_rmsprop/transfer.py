"""Moving a run from one framework to another: the optimizer's state, in and out.

You move the weights yourself. These functions move the state that belongs to them: the
average squared gradient, the momentum buffer, the average gradient and the step count.
The optimizer must be built, with the variables of the model. Either all of a state is
taken over, or nothing is, and an error names what does not fit.

**`mapping` says which of their parameters belongs to which Keras variable.** It is a
list with an entry for each variable of the optimizer, in the order of
`model.trainable_variables`. An entry is the parameter's name in the other framework, or
its number. If its axes are in another order, it is a pair of that and the order in
which to take the axes, as in `numpy.transpose`. A PyTorch `Linear` has its weight as
(out, in) and Keras as (in, out), so the entry is `("fc.weight", LINEAR)`.

No function here reads a pickle. `torch.load(path, weights_only=True)` reads a state
dict without running what somebody put into the file.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_rmsprop.mapping import Array, Axes, Entry, arranged, resolved, transposed
from keras_rmsprop.optimizer import RMSprop
from keras_rmsprop.rule import Slots
from keras_rmsprop.state import State, matched

LINEAR: Axes = (1, 0)
"""PyTorch's (out, in) to Keras' (in, out)."""
CONV1D: Axes = (2, 1, 0)
"""PyTorch's (out, in, width) to Keras' (width, in, out)."""
CONV2D: Axes = (2, 3, 1, 0)
"""PyTorch's (out, in, height, width) to Keras' (height, width, in, out)."""
CONV3D: Axes = (2, 3, 4, 1, 0)
"""PyTorch's (out, in, depth, height, width) to Keras' (depth, ..., in, out)."""

_TORCH = Slots("square_avg", "momentum_buffer", "grad_avg")
_OPTAX = Slots("nu", "trace", "mu")


def from_torch(
    optimizer: RMSprop, state_dict: Mapping[str, Any], mapping: Sequence[Entry]
) -> None:
    """Take over the state of a `torch.optim.RMSprop`, or of timm's `RMSpropTF`.

    PyTorch's momentum buffer leaves out the learning rate. If that of the optimizer
    includes it (`lr_in_momentum`), it is multiplied by the rate in the state dict.

    Args:
        optimizer: The optimizer that takes it over. It must be built.
        state_dict: What `torch_optimizer.state_dict()` returned.
        mapping: See this module. A number counts the parameters as they were given to
            the PyTorch optimizer; names work if it was given named parameters.

    Raises:
        ValueError: Something does not fit; nothing is changed.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_rmsprop import dialects, transfer
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> optimizer = dialects.torch()
        >>> optimizer.build(model.trainable_variables)  # kernel and bias
        >>> state_dict = {  # here without PyTorch, to show what there is
        ...     "state": {
        ...         0: {"step": 7, "square_avg": np.full((2, 3), 0.5)},
        ...         1: {"step": 7, "square_avg": np.zeros(2)},
        ...     },
        ...     "param_groups": [{"lr": 0.01, "params": [0, 1]}],
        ... }
        >>> transfer.from_torch(optimizer, state_dict, [(0, transfer.LINEAR), 1])
        >>> int(optimizer.iterations), optimizer.get_state().slots[0].velocity.shape
        (7, (3, 2))
    """
    groups, names = _torch_groups(state_dict)
    theirs: dict[Any, Slots | None] = dict.fromkeys(groups)
    steps = {0}
    for number, state in state_dict["state"].items():
        v, m, a = (_numpy(state[key]) if key in state else None for key in _TORCH)
        rate = 1.0 if m is None else _torch_rate(groups[number], optimizer)
        theirs[number] = Slots(v, m, a).with_momentum_times(rate)
        steps.add(int(state["step"]))
    slots = arranged(optimizer, mapping, theirs, names)
    optimizer.set_state(State(max(steps), slots))


def to_torch(
    optimizer: RMSprop, state_dict: Mapping[str, Any], mapping: Sequence[Entry]
) -> dict[str, Any]:
    """Return the optimizer's state as a state dict for `torch.optim.RMSprop`.

    Args:
        optimizer: The optimizer that gives it. It must be built.
        state_dict: What `state_dict()` of the PyTorch optimizer returns that is to
            continue. Its groups, with their learning rates, are kept.
        mapping: See `from_torch`.

    Returns:
        A state dict for `load_state_dict` of the PyTorch optimizer.

    Raises:
        ValueError: Something does not fit. Shapes are compared where the state dict has
            a state; that of a new PyTorch optimizer has none.
    """
    import torch

    groups, names = _torch_groups(state_dict)
    iterations, mine, paths, *_ = optimizer.get_state()
    states, places, given = {}, [], []
    for (number, axes), slots in zip(
        resolved(mapping, paths, groups, names), mine, strict=True
    ):
        group = groups[number]
        if slots.momentum is not None:
            slots = slots.with_momentum_times(1 / _torch_rate(group, optimizer))
        inverse = None if axes is None else tuple(np.argsort(axes))
        slots = transposed(slots, inverse)
        v = state_dict["state"].get(number, {}).get("square_avg", slots.velocity)
        places.append(
            Slots(v, v if group["momentum"] else None, v if group["centered"] else None)
        )
        given.append(slots)
        states[number] = {"step": torch.tensor(float(iterations))} | {
            key: torch.tensor(x)
            for key, x in zip(_TORCH, slots, strict=True)
            if x is not None
        }
    matched(places, given, paths)
    return {**state_dict, "state": states}


def from_keras(optimizer: RMSprop, builtin: Any) -> None:
    """Take over the state of a `keras.optimizers.RMSprop`.

    Args:
        optimizer: The optimizer that takes it over. It must be built, with variables in
            the same order.
        builtin: The optimizer that gives it. It must be built.

    Raises:
        ValueError: Something does not fit; nothing is changed.

    Example:
        >>> import keras
        >>> from keras_rmsprop import RMSprop, transfer
        >>> weight = keras.Variable([1.0, 1.0])
        >>> builtin, optimizer = keras.optimizers.RMSprop(), RMSprop()
        >>> builtin.apply([keras.ops.array([2.0, -0.5])], [weight])
        >>> optimizer.build([weight])
        >>> transfer.from_keras(optimizer, builtin)
        >>> optimizer.get_state().slots[0].velocity
        array([0.4  , 0.025], dtype=float32)
    """
    slots = [of_one.map(_numpy) for of_one in _builtin_slots(builtin)]
    steps = int(builtin.iterations)
    slots = _converted(slots, builtin.learning_rate, optimizer)
    optimizer.set_state(State(steps, slots))


def to_keras(optimizer: RMSprop, builtin: Any) -> None:
    """Give the state to a `keras.optimizers.RMSprop`.

    Args:
        optimizer: The optimizer that gives it. It must be built.
        builtin: The optimizer that takes it over. It must be built, with variables in
            the same order.

    Raises:
        ValueError: Something does not fit; nothing is changed.
    """
    iterations, mine, paths, *_ = optimizer.get_state()
    if not optimizer.lr_in_momentum:
        rate = float(builtin.learning_rate)
        mine = [slots.with_momentum_times(rate) for slots in mine]
    for slot, array in matched(_builtin_slots(builtin), mine, paths):
        slot.assign(array)
    # `iterations` counts updates, the variable behind it the calls that accumulate.
    builtin.variables[0].assign(iterations * (builtin.gradient_accumulation_steps or 1))


def from_tensorflow_v1(
    optimizer: RMSprop,
    checkpoint_path: str,
    mapping: Sequence[Entry] | None = None,
    *,
    name: str = "RMSProp",
    global_step: str = "global_step",
) -> None:
    """Take over the state of a `tf.compat.v1.train.RMSPropOptimizer`.

    Args:
        optimizer: The optimizer that takes it over. It must be built.
        checkpoint_path: Path of the checkpoint, without `.index`.
        mapping: See this module; by default the names are the paths of the variables,
            as in `dense/kernel`.
        name: Name of the optimizer there.
        global_step: Name of the step count there. If there is none, the count is 0.

    Raises:
        ValueError: Something does not fit; nothing is changed.
    """
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(checkpoint_path)
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(
            "`checkpoint_path` must be the path of a TensorFlow checkpoint. "
            f"Received: checkpoint_path={checkpoint_path!r}"
        ) from error
    tensors = reader.get_variable_to_shape_map()
    theirs = {}
    for variable in tensors:
        # Slots have no names of their own: they are numbered as they were made.
        v, *others = (f"{variable}/{name}{number}" for number in ("", "_1", "_2"))
        if v in tensors:
            present = [other for other in others if other in tensors]
            # Without momentum its slot is there, too, and holds the last update.
            m = present[-1] if present and optimizer.momentum else None
            a = present[0] if len(present) == 2 else None
            theirs[variable] = Slots(v, m, a).map(reader.get_tensor)
    if mapping is None:
        mapping = list(optimizer.get_state().paths)
    slots = arranged(optimizer, mapping, theirs)
    steps = int(reader.get_tensor(global_step)) if global_step in tensors else 0
    slots = _converted(slots, _rate_after(optimizer, steps), optimizer)
    optimizer.set_state(State(steps, slots))


def from_optax(
    optimizer: RMSprop, opt_state: Any, mapping: Sequence[Entry] | None = None
) -> None:
    """Take over the state of an `optax.rmsprop`.

    Args:
        optimizer: The optimizer that takes it over. It must be built.
        opt_state: The state, as `init` and `update` return it. It has a step count only
            with `bias_correction` or a schedule; else the count is taken to be 0.
        mapping: See this module. A number counts the leaves of the parameters. A name
            is the path of a leaf, as in `params/Dense_0/kernel`. By default all leaves
            are taken in their order. In a dict that is alphabetical, so `bias` comes
            before `kernel`.

    Raises:
        ValueError: Something does not fit; nothing is changed.
    """
    from jax import tree_util

    found = dict(_named_fields(opt_state))
    if "nu" not in found:
        raise ValueError(
            "`opt_state` must be the state of `optax.rmsprop`. "
            f"Received: opt_state={opt_state!r}"
        )
    if not optimizer.momentum:
        found.pop("trace", None)  # with momentum 0.0 there is one: the last update
    leaves, _ = tree_util.tree_flatten_with_path(found["nu"])
    names = {
        tree_util.keystr(path, simple=True, separator="/"): number
        for number, (path, _) in enumerate(leaves)
    }
    columns = (
        tree_util.tree_leaves(found[key]) if key in found else [None] * len(leaves)
        for key in _OPTAX
    )
    theirs = {
        number: Slots(*of_one).map(_numpy)
        for number, of_one in enumerate(zip(*columns, strict=True))
    }
    slots = arranged(
        optimizer, range(len(leaves)) if mapping is None else mapping, theirs, names
    )
    # There the sum is what is added to the weights: it has the other sign.
    slots = [of_one.with_momentum_times(-1) for of_one in slots]
    steps = int(found.get("count", 0))
    slots = _converted(slots, _rate_after(optimizer, steps), optimizer)
    optimizer.set_state(State(steps, slots))


def _rate(learning_rate: Any, theirs: bool, optimizer: RMSprop) -> float:
    """Return what their momentum buffer is to be multiplied by.

    Args:
        learning_rate: Their learning rate.
        theirs: Whether their sum includes it.
        optimizer: The one whose sum it becomes.
    """
    if theirs == optimizer.lr_in_momentum:
        return 1.0
    rate = float(learning_rate)
    if not rate:
        raise ValueError(
            "The learning rate must be > 0 to convert between sums of updates with and "
            f"without it. Received: {rate}"
        )
    return 1 / rate if theirs else rate


def _converted(
    slots: Sequence[Slots], learning_rate: Any, optimizer: RMSprop
) -> list[Slots]:
    """Return slots whose momentum buffer includes the learning rate, as mine does."""
    if all(of_one.momentum is None for of_one in slots):
        return list(slots)
    rate = _rate(learning_rate, True, optimizer)
    return [of_one.with_momentum_times(rate) for of_one in slots]


def _rate_after(optimizer: RMSprop, steps: int) -> Any:
    """Return my learning rate, which may follow a schedule, after that many steps."""
    schedule = optimizer._learning_rate
    is_schedule = isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule)
    if is_schedule and optimizer._search is None:
        return schedule(steps)
    return optimizer.current_learning_rate or optimizer.learning_rate


def _torch_groups(
    state_dict: Mapping[str, Any],
) -> tuple[dict[int, Any], dict[str, int]]:
    """Return the group of each parameter by its number, and the numbers by name."""
    groups: dict[int, Any] = {}
    names: dict[str, int] = {}
    for group in state_dict["param_groups"]:
        groups.update(dict.fromkeys(group["params"], group))
        names.update(zip(group.get("param_names", ()), group["params"], strict=False))
    return groups, names


def _torch_rate(group: Mapping[str, Any], optimizer: RMSprop) -> float:
    return _rate(group["lr"], group.get("lr_in_momentum", False), optimizer)


def _builtin_slots(builtin: Any) -> list[Slots]:
    """Return the slots of a `keras.optimizers.RMSprop`, which are variables."""
    if not isinstance(builtin, keras.optimizers.RMSprop) or not builtin.built:
        raise ValueError(
            "`builtin` must be a `keras.optimizers.RMSprop`, built. "
            f"Received: builtin={builtin!r}"
        )
    count = len(builtin._trainable_variables)
    columns = []
    for name in Slots._fields:
        column = [v for v in builtin.variables if v.name.endswith(f"_{name}")]
        columns.append(column or [None] * count)
    return [Slots(*of_one) for of_one in zip(*columns, strict=True)]


def _named_fields(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the named tuples in a tree that hold RMSprop's state."""
    if hasattr(tree, "_fields"):
        kind = type(tree).__name__
        is_ours = kind.startswith(("ScaleByRms", "ScaleByRStdDev", "TraceState"))
        for name, value in zip(tree._fields, tree, strict=True):
            if is_ours and name in (*_OPTAX, "count"):
                yield name, value
            else:
                yield from _named_fields(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _named_fields(value)
    elif isinstance(tree, Mapping):
        yield from _named_fields(list(tree.values()))


def _numpy(x: Any) -> Array:
    """Return a tensor of any framework as an array, bfloat16 as float32."""
    if hasattr(x, "detach"):  # PyTorch's, from wherever it is
        x = x.detach().cpu()
        x = x.float() if x.element_size() < 4 else x
    return np.asarray(x)
