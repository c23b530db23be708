"""The methods of Keras that a subclass may override, and how a step calls them.

A step calls a hook where a subclass, or an instance, overrides it; else a stage may go
its own, faster way. With a hook of its own each stage leaves its result where Keras
would, and gradients of tables are whole.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_rmsprop.update import Part

UPDATE_STEP = frozenset({"update_step", "assign", "assign_add", "assign_sub"})
"""The hooks that change how one variable is updated."""
DECAY, CLIP = "_apply_weight_decay", "_clip_gradients"
UPDATES, AVERAGES = "_backend_update_step", "_update_model_variables_moving_average"
HOOKS = UPDATE_STEP | {DECAY, CLIP, UPDATES, AVERAGES}
"""The hooks whose overriding changes how a step runs."""
OWN_UPDATE = UPDATE_STEP | {UPDATES}
"""The hooks that update in their own way. Then weights decay before, as in Keras."""
NOT_CALLED = (
    "_all_reduce_sum_gradients",
    "_backend_apply_gradients",
    "_backend_increment_gradient_accumulators",
    "_backend_reset_gradient_accumulators",
    "_distributed_tf_update_step",
)
"""Methods that Keras' own step calls, and this one does not."""


def own(optimizer: Any, base: type) -> frozenset[str]:
    """Return the names of the hooks that a subclass or an instance overrides.

    Args:
        optimizer: The optimizer.
        base: The class whose methods are no overrides.
    """
    kind, of_instance = type(optimizer), frozenset(HOOKS & vars(optimizer).keys())
    if kind is base:
        return of_instance
    of_class = {
        name for name in HOOKS if getattr(kind, name) is not getattr(base, name)
    }
    return of_instance | of_class


def is_users_constraint(variable: Any) -> bool:
    """Whether a variable has a constraint that is not Keras' own."""
    constraint = getattr(variable, "constraint", None)
    module = "keras" if constraint is None else type(constraint).__module__
    return module.split(".")[0] != "keras"


def refuse_others(kind: type) -> None:
    """Fail if a subclass overrides a method that would never be called.

    Raises:
        TypeError: It does.
    """
    for name in NOT_CALLED:
        if getattr(kind, name, None) is not getattr(
            keras.optimizers.Optimizer, name, None
        ):
            raise TypeError(
                f"`{kind.__name__}.{name}` would never be called: a step of `RMSprop` "
                f"calls {', '.join(f'`{hook}`' for hook in sorted(HOOKS))}"
            )


def decays_apart(optimizer: Any, own: frozenset[str]) -> bool:
    """Whether weights decay before the update, and not in it."""
    return bool(optimizer.decoupled_weight_decay and own & (OWN_UPDATE | {DECAY}))


def decay(optimizer: Any, parts: Sequence[Part], own: frozenset[str]) -> None:
    """Let w <- (1 - eta omega) w before a subclass' update, or as it likes."""
    if decays_apart(optimizer, own):
        optimizer._apply_weight_decay([part.variable for part in parts])


def update(
    optimizer: Any, parts: Sequence[Part], rate: Any, own: frozenset[str]
) -> bool:
    """Let a subclass update all variables; return whether it does."""
    if UPDATES not in own:
        return False
    grads, variables = [p.gradient for p in parts], [p.variable for p in parts]
    optimizer._backend_update_step(grads, variables, rate)
    return True


def average(optimizer: Any, own: frozenset[str]) -> bool:
    """Let a subclass update the EMA of the weights; return whether it does."""
    if AVERAGES not in own:
        return False
    optimizer._update_model_variables_moving_average(optimizer._trainable_variables)
    return True


@contextlib.contextmanager
def rate_in_force(optimizer: Any, rate: Any) -> Iterator[None]:
    """Let `optimizer.learning_rate` be the rate of the step while hooks run."""
    instance = vars(optimizer)
    before = instance.get("_rate_in_force")
    instance["_rate_in_force"] = rate
    try:
        yield
    finally:
        instance["_rate_in_force"] = before
