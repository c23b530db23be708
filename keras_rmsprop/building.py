"""How an optimizer is built, and extended for variables that come later."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_rmsprop import codecs, hooks, options
from keras_rmsprop.auto_rate import AutoLearningRate
from keras_rmsprop.backends import current as backend
from keras_rmsprop.forms import form, name_of
from keras_rmsprop.rule import Slots
from keras_rmsprop.slots import (
    VELOCITY,
    WEIGHT_AVERAGE,
    Order,
    all_or_nothing,
    set_variables,
)

TABLES = ("embeddings",)
"""Parts of the names of tables, as Keras' `Embedding` names its own."""


def build(optimizer: Any, variables: Sequence[Any], build_of_keras: Any) -> None:
    """Make the slots of variables: all of them, or none if it fails.

    Args:
        optimizer: The optimizer.
        variables: The model's variables.
        build_of_keras: Keras' `build`, which makes averages and accumulators.
    """
    with all_or_nothing(optimizer, *_parts(optimizer)):
        options.check_slots(optimizer.slot_dtype, optimizer.centered)
        build_of_keras(variables)
        make = functools.partial(optimizer.add_optimizer_variables, variables)
        value = float(optimizer.initial_accumulator_value)
        # `Constant` takes twice the memory.
        start = keras.initializers.Constant(value) if value else "zeros"
        optimizer._velocities = make(VELOCITY, start)
        optimizer._momentums = _momentums(optimizer, variables)
        has_average = optimizer.centered
        optimizer._average_gradients = make("average_gradient") if has_average else []
        for name, draw in codecs.named(optimizer.slot_dtype).extra.items():
            drawn = keras.initializers.Constant(draw())
            optimizer._offset = optimizer.add_variable((), drawn, "int32", name=name)
        for feature in optimizer._steps.features.values():
            feature.build(variables)
        if not optimizer._book.order.keys:
            keys = map(optimizer._var_key, variables)
            optimizer._book.order = Order().then(keys)


def _momentums(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Make the momentum of each variable; None: it has none. Without any, no list."""
    if not options.is_on(optimizer.momentum):
        return []
    others = [v for v in variables if not is_apart(optimizer, v)]
    made = iter(optimizer.add_optimizer_variables(others, "momentum"))
    return [None if is_apart(optimizer, v) else next(made) for v in variables]


def is_apart(optimizer: Any, variable: Any) -> bool:
    """Whether a variable is a table that steps as `tables.of_table` says: with "auto".

    Its path tells, or a sparse gradient that it had.
    """
    if optimizer._auto is None:
        return False
    name = getattr(variable, "path", variable.name).rpartition("/")[2]
    if any(part in name for part in TABLES):
        return True
    return optimizer._var_key(variable) in optimizer._clocks.sparse


def _parts(optimizer: Any) -> list[Any]:
    """Return the objects that change, too, when an optimizer is built."""
    parts = optimizer._book, optimizer._search, optimizer._clocks
    return [part for part in parts if part is not None]


def build_for(optimizer: Any, variables: Sequence[Any]) -> None:
    """Build an optimizer; if it is built for some of these variables, add the rest.

    Raises:
        ValueError: It is built, and for none of these.
    """
    if not optimizer.built:
        optimizer.build([*variables])
    optimizer._state_io.load_pending()
    given = {optimizer._var_key(v): v for v in variables}
    known = {optimizer._var_key(v): v for v in optimizer._trainable_variables}
    # If some are known, layers were unfrozen. If none is, they are another model's.
    if given and given.keys().isdisjoint(known):
        raise ValueError(
            "Unknown variables: the optimizer was built with others. Make another "
            f"optimizer for them. Received: {[v.name for v in variables]}"
        )
    order = optimizer._book.order.then(given)
    if order.keys != optimizer._book.order.keys:
        with backend.outside_functions():
            _rebuild(optimizer, [(known | given)[key] for key in order.keys])
    optimizer._book.order = order


def _rebuild(optimizer: Any, variables: Sequence[Any]) -> None:
    """Build for variables in this order; reuse what exists for them."""
    before, book = optimizer._trainable_variables, optimizer._book
    with all_or_nothing(optimizer, *_parts(optimizer)):
        book.begin()
        optimizer.built = False
        optimizer.build(variables)
        for entry in book.made():
            # New averages start at the current weights.
            backend.assign_everywhere(entry.variable, entry.start())
        if optimizer._search is not None and book.made():
            optimizer._search.restart()
        set_variables(optimizer, book.in_order(optimizer._variables))
        if optimizer._clocks:
            index_of = optimizer._get_variable_index
            optimizer._clocks.move({i: index_of(v) for i, v in enumerate(before)})


def slot(
    optimizer: Any, owner: Any, kind: str, initializer: Any, add: Callable[..., Any]
) -> Any:
    """Return the slot of this kind that a variable has; make it if there is none.

    Args:
        optimizer: The optimizer.
        owner: The model's variable.
        kind: What the slot is, such as `velocity`.
        initializer: What it starts with.
        add: Keras' `add_variable`.
    """
    codec, _ = codec_of(optimizer, owner)
    if kind in Slots._fields[1:]:  # all slots of a variable are stored as its velocity
        i = optimizer._get_variable_index(owner)
        codec = codecs.of(optimizer._velocities[i])
    sample = (optimizer._auto or AutoLearningRate()).sample
    made = form(kind, owner, initializer, codec, sample)
    if kind == WEIGHT_AVERAGE and hooks.AVERAGES in optimizer._steps.own():
        made = made._replace(dtype=owner.dtype)  # as Keras, whose code it may be

    def make() -> Any:
        with backend.beside(owner, optimizer):
            like = made.shape, made.initializer, made.dtype
            return add(*like, layout=made.layout, name=name_of(kind, owner))

    key = optimizer._var_key(owner)
    return optimizer._book.find_or_make(kind, key, make, made.start)


def codec_of(optimizer: Any, variable: Any) -> tuple[codecs.Float, str]:
    """Return how the slots of a variable of the model will be stored, and why."""
    path, shape = getattr(variable, "path", variable.name), variable.shape
    return codecs.chosen(optimizer.slot_dtype, path, shape, optimizer.float32_slots)


def slots_of(optimizer: Any, i: int) -> Slots:
    """Return the slots of a variable that are in use, by its index."""
    variable = optimizer._trainable_variables[i]
    is_on = options.is_on(optimizer.momentum)
    has_momentum = is_on and not is_apart(optimizer, variable)
    return Slots(
        optimizer._velocities[i],
        optimizer._momentums[i] if has_momentum else None,
        optimizer._average_gradients[i] if optimizer.centered else None,
    )


def knows(optimizer: Any, variables: Sequence[Any]) -> bool:
    """Whether an optimizer is built for all of these variables."""
    index_of = optimizer._trainable_variables_indices
    return optimizer.built and all(optimizer._var_key(v) in index_of for v in variables)
