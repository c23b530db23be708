"""The options of `RMSprop`: a row each, with its check.

The constructor and the configuration read this table; the formula is in `rule.py`.
"""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

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
    return lambda name, value: checks.one_of(name, value, choices)


def dtype(*choices: str) -> Check:
    """Return the check of a dtype or None; it may be any framework's object."""

    def check(name: str, value: Any) -> str | None:
        if not isinstance(value, str | None):
            # What is no dtype is left for the error.
            with contextlib.suppress(TypeError, ValueError):
                value = keras.backend.standardize_dtype(value)
        return checks.one_of(name, value, (None, *choices))

    return check


def optional(check: Check) -> Check:
    """Return the check of an option that may be None."""
    return lambda name, value: None if value is None else check(name, value)


def steps(least: int) -> Check:
    """Return the check of a number of steps; None or 0: not at all."""

    def check(name: str, value: Any) -> int | None:
        is_off = value is None or (isinstance(value, int | np.integer) and value == 0)
        return None if is_off else checks.integer(name, value, least, MOST_STEPS)

    return check


MOST_STEPS = 2**31 - 1
"""JAX counts steps in int32."""

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
    "slot_dtype": dtype("bfloat16", "float32", "float64", "uint8"),
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
    "ema_overwrite_frequency": steps(1),
    "loss_scale_factor": optional(number(checks.POSITIVE)),
    "gradient_accumulation_steps": steps(2),
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


DEFAULTS: dict[str, Any] = {
    "momentum": 0.0,
    "epsilon": 1e-7,
    "bias_correction": False,
    "nesterov": False,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_warmup": False,
}
"""What the arguments that are None by default stand for: what the built-in does."""
AUTO: dict[str, Any] = {
    "momentum": 0.9,
    "epsilon": 1e-30,
    "bias_correction": True,
    "nesterov": True,
    "use_ema": True,
}
"""What they stand for with a learning rate that is found, if that is something else.

Beside a larger epsilon small gradients would not count."""
AUTO_AVERAGE: dict[str, Any] = {"ema_warmup": True, "ema_momentum": 0.9999}
"""The same of options of the average, if there is one.

Without the warm-up such an average would be of the first weights for long."""


def filled(given: Mapping[str, Any], *, auto: bool) -> dict[str, Any]:
    """Return arguments, with what those stand for that were not given.

    Args:
        given: Arguments by name; None: not given.
        auto: Whether a learning rate is found in training.
    """
    defaults = DEFAULTS | (AUTO if auto else {})
    if auto and given["centered"]:  # the variance of the first gradients is 0
        defaults |= {name: DEFAULTS[name] for name in ("epsilon", "bias_correction")}
    use_ema = given["use_ema"]
    if auto and (use_ema is None or use_ema):
        defaults |= AUTO_AVERAGE
        if not (given["ema_warmup"] is None or given["ema_warmup"]):
            defaults["ema_momentum"] = DEFAULTS["ema_momentum"]
    missing = {k: default for k, default in defaults.items() if given[k] is None}
    return {**given, **missing}


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


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Say of arguments that `RMSprop` does not have which one may have been meant.

    Args:
        given: The arguments that nobody knows, by name.

    Raises:
        ValueError: There are some; for `decay`, which Keras ignores, it is a warning.
    """
    given = {**given}
    if given.pop("decay", None) is not None:
        warnings.warn(
            "Argument `decay` is no longer supported and will be ignored. What other "
            "frameworks call `decay` is `rho`, or a schedule of the learning rate: see "
            "`keras_rmsprop.dialects`",
            stacklevel=3,
        )
    if not given:
        return
    known = ["learning_rate", "name", *OPTIONS, *OF_KERAS]
    hints = "".join(
        f". `{name}` is what other frameworks call `{FOREIGN[name]}`: for an optimizer "
        "like theirs see `keras_rmsprop.dialects`"
        if name in FOREIGN
        else checks.did_you_mean(name, known)
        for name in given
    )
    raise ValueError(f"Argument(s) not recognized: {given}{hints}")


FOREIGN = {"alpha": "rho", "eps": "epsilon"}
"""What PyTorch and others call some of the arguments."""


def warn_without_average(use_ema: bool, given: Mapping[str, Any]) -> None:
    """Warn of options of the weights' average if there is none.

    Args:
        use_ema: Whether there is one.
        given: The options of `OF_THE_AVERAGE`, by name.
    """
    idle = [] if use_ema else [*_not_defaults(given)]
    if idle:
        names = ", ".join(f"`{name}`" for name in idle)
        warnings.warn(
            f"{names} without `use_ema=True`: there is no average of the weights",
            stacklevel=3,
        )


OF_THE_AVERAGE = {
    "ema_momentum": DEFAULTS["ema_momentum"],
    "ema_overwrite_frequency": None,
    "ema_warmup": DEFAULTS["ema_warmup"],
}
"""The options that say how weights are averaged, with their defaults."""


def _not_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: given[name]
        for name, default in OF_THE_AVERAGE.items()
        if name in given and (is_tensor(given[name]) or given[name] != default)
    }


def without_average(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a configuration, so that making an optimizer of it does not warn again.

    Args:
        config: What `get_config` returned.

    Returns:
        Arguments, and attributes to set afterwards: the options of an average that is
        not there.
    """
    idle = {} if config.get("use_ema") else _not_defaults(config)
    check = OF_KERAS | OPTIONS
    idle = {name: check[name](name, value) for name, value in idle.items()}
    return {k: v for k, v in config.items() if k not in idle}, idle


def check_made(given: Mapping[str, tuple[Any, bool]]) -> None:
    """Check that what options need was made when the optimizer was built.

    Args:
        given: Value of each option that needs something, and whether that is there.

    Raises:
        ValueError: An option was switched on too late.
    """
    for name, (value, is_there) in given.items():
        if is_on(value) and not is_there:
            raise ValueError(
                f"`{name}` must be given when the optimizer is made, or before it is "
                f"built. Received: {name}={value} later"
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
    """Whether an option is a variable or tensor: read at each step."""
    return isinstance(value, keras.Variable) or keras.ops.is_tensor(value)


def has_value(value: Any) -> bool:
    """Whether a tensor's value is known now."""
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
