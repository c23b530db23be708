"""The options of `RMSprop`: a row each, with its check.

The constructor and the configuration read this table; the formula is in `rule.py`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_rmsprop import checks

Check = Callable[[str, Any], Any]
"""Takes an option's name and what was received; returns what to keep."""


def number(allowed: checks.Range) -> Check:
    """Return the check of a number, or of a variable that holds one."""

    def check(name: str, value: Any) -> Any:
        if not is_tensor(value):
            return checks.number(name, value, allowed)
        if has_value(value):
            checks.number(name, float(value), allowed)
        return value

    return check


def one_of(*choices: Any) -> Check:
    """Return the check of an option with a few possible values."""

    def check(name: str, value: Any) -> Any:
        # A dtype may be an object: it has a name, or PyTorch's text is torch.bfloat16.
        value = getattr(value, "name", value)
        if type(value).__module__ == "torch":
            value = keras.backend.standardize_dtype(value)
        return checks.one_of(name, value, choices)

    return check


def optional(check: Check) -> Check:
    """Return the check of an option that may be None."""
    return lambda name, value: None if value is None else check(name, value)


OPTIONS: dict[str, Check] = {
    "rho": number(checks.SHARE),
    "momentum": number(checks.SHARE),
    "epsilon": number(checks.POSITIVE),
    "centered": checks.flag,
    "epsilon_inside_sqrt": checks.flag,
    "initial_accumulator_value": number(checks.NOT_NEGATIVE),
    "bias_correction": checks.flag,
    "nesterov": checks.flag,
    "lr_in_momentum": checks.flag,
    "decoupled_weight_decay": checks.flag,
    "maximize": checks.flag,
    "cautious": checks.flag,
    "slot_dtype": one_of(None, "bfloat16", "float32", "float64", "uint8"),
    "float32_slots": checks.names,
    "ema_warmup": checks.flag,
    "skip_nonfinite": checks.flag,
    "sparse_update": one_of("exact", "lazy"),
    "jit_compile": one_of("auto", True, False),
}
"""The options that `RMSprop` keeps, and puts into its configuration."""

OF_KERAS: dict[str, Check] = {
    "weight_decay": optional(number(checks.NOT_NEGATIVE)),
    "clipnorm": optional(number(checks.NOT_NEGATIVE)),
    "clipvalue": optional(number(checks.NOT_NEGATIVE)),
    "global_clipnorm": optional(number(checks.NOT_NEGATIVE)),
    "use_ema": checks.flag,
    "ema_momentum": number(checks.UP_TO_ONE),
    "loss_scale_factor": optional(number(checks.POSITIVE)),
    "gradient_accumulation_steps": lambda name, value: (
        value and checks.integer(name, value, 2)
    ),
}
"""Options of every Keras optimizer, which Keras keeps."""


def checked(table: Mapping[str, Check], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a table, checked.

    Args:
        table: The options.
        given: Arguments by name, others too.

    Raises:
        ValueError: One is out of its range.
        TypeError: One is not of its type.
    """
    return {name: check(name, given[name]) for name, check in table.items()}


def check_slots(slot_dtype: str | None, centered: bool) -> None:
    """Check options that exclude each other.

    Raises:
        ValueError: They do.
    """
    if slot_dtype == "uint8" and centered:
        raise ValueError(
            '`centered` must be False with `slot_dtype="uint8"`: the difference of two '
            "averages needs more digits. Received: centered=True"
        )


def learning_rate_of(learning_rate: Any, others: dict[str, Any]) -> Any:
    """Return the learning rate; take its deprecated spelling out of other arguments.

    Raises:
        ValueError: Both are given.
    """
    if "lr" not in others:
        return learning_rate
    lr = others.pop("lr")
    if learning_rate != 0.001:
        raise ValueError(
            "`lr` is the deprecated spelling of `learning_rate`: give one of them. "
            f"Received: learning_rate={learning_rate}, lr={lr}"
        )
    warnings.warn(
        "The `lr` argument is deprecated, use `learning_rate` instead.",
        DeprecationWarning,
        stacklevel=4,
    )
    return lr


def is_tensor(value: Any) -> bool:
    """Whether an option is a variable or tensor: read anew at each step."""
    return isinstance(value, keras.Variable) or keras.ops.is_tensor(value)


def has_value(value: Any) -> bool:
    """Whether a tensor's value is known here and now."""
    try:
        float(value)
    except Exception:  # each backend has an error of its own for that
        return False
    return True


def is_on(value: Any) -> bool:
    """Whether an option that is off at 0 or None is on; a variable always is."""
    if value is None or isinstance(value, int | float):
        return bool(value)  # which is quick
    return is_tensor(value) or bool(value)
