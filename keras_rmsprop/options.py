"""The options of `RMSprop` that Keras' own optimizers do not all have: a row each.

A row says the option's type, its default and what it must be. The constructor, the
configuration and `explain` read this table; the formula is in `rule.py`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, get_type_hints

import keras

from keras_rmsprop import checks

Check = Callable[[str, Any], Any]


class Option(NamedTuple):
    """The default and the check of an option."""

    default: Any
    check: Check
    """Takes the option's name and what was received; returns what to keep."""


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


class Numbers(TypedDict, total=False):
    """The built-in RMSprop's own options, which may be given by position."""

    rho: Annotated[float, Option(0.9, number(checks.SHARE))]
    momentum: Annotated[float, Option(0.0, number(checks.SHARE))]
    epsilon: Annotated[float, Option(1e-7, number(checks.POSITIVE))]
    centered: Annotated[bool, Option(False, checks.flag)]


class Dialect(TypedDict, total=False):
    """The options that the built-in does not have; given by name."""

    epsilon_inside_sqrt: Annotated[bool, Option(True, checks.flag)]
    initial_accumulator_value: Annotated[
        float, Option(0.0, number(checks.NOT_NEGATIVE))
    ]
    bias_correction: Annotated[bool, Option(False, checks.flag)]
    nesterov: Annotated[bool, Option(False, checks.flag)]
    lr_in_momentum: Annotated[bool, Option(True, checks.flag)]
    decoupled_weight_decay: Annotated[bool, Option(True, checks.flag)]
    maximize: Annotated[bool, Option(False, checks.flag)]
    cautious: Annotated[bool, Option(False, checks.flag)]
    slot_dtype: Annotated[
        str | None,
        Option(None, one_of(None, "bfloat16", "float32", "float64", "uint8")),
    ]
    float32_slots: Annotated[Sequence[str], Option(("embeddings",), checks.names)]
    ema_warmup: Annotated[bool, Option(False, checks.flag)]
    skip_nonfinite: Annotated[bool, Option(False, checks.flag)]
    sparse_update: Annotated[str, Option("exact", one_of("exact", "lazy"))]
    jit_compile: Annotated[bool | str, Option("auto", one_of("auto", True, False))]


def optional(check: Check) -> Check:
    """Return the check of an option that may be None."""
    return lambda name, value: None if value is None else check(name, value)


KERAS: dict[str, Check] = {
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
"""Options of every Keras optimizer. Keras keeps their defaults and configuration."""


def _rows(table: type) -> dict[str, Option]:
    hints = get_type_hints(table, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


DIALECT = _rows(Dialect)
OPTIONS = _rows(Numbers) | DIALECT


def checked_of_keras(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of every Keras optimizer, checked."""
    return {name: KERAS[name](name, value) for name, value in given.items()}


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options: those given, checked, and the defaults of the others.

    Args:
        given: Options by name.

    Raises:
        ValueError: One is out of its range.
        TypeError: One is not of its type.
    """
    options = {
        name: option.check(name, given.get(name, option.default))
        for name, option in OPTIONS.items()
    }
    check_slots(options["slot_dtype"], options["centered"])
    return options


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


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature with the rows of `Dialect` for its `**kwargs`."""
    plain = inspect.signature(function)
    hints = get_type_hints(Dialect)
    parameters = [*plain.parameters.values()]
    return plain.replace(
        parameters=[
            *parameters[:-1],
            *(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=option.default,
                    annotation=hints[name],
                )
                for name, option in DIALECT.items()
            ),
            parameters[-1],
        ]
    )


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
