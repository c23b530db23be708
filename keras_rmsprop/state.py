"""What an optimizer remembers of its variables, independent of any framework."""

import math
import re
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rmsprop import checks, codecs
from keras_rmsprop.alignment import Owner, aligned
from keras_rmsprop.rule import Slots

SAMPLE = 2**12
"""Of a variable's values so many, or up to twice as many, tell it from others."""


class State(NamedTuple):
    """The state of an optimizer, as NumPy arrays; see `RMSprop.get_state`."""

    iterations: int
    """How many updates there were."""
    slots: list[Slots]
    """The slots of each variable, in the order the optimizer was built with."""
    paths: Sequence[str] = ()
    """The path of each variable; without paths slots are matched by their positions."""
    in_model_order: bool = True
    """Whether that order is the model's, as far as the optimizer knew."""
    checksums: Sequence[int | None] = ()
    """Of the weights of each variable, which tell it from others (`fingerprint`)."""


def is_real(dtype: Any) -> bool:
    """Whether a NumPy dtype is one of real numbers."""
    return np.can_cast(dtype, np.float64, "same_kind")


def wrong_numbers(slot: str, array: Any) -> str:
    """Return what is wrong with the numbers of a slot, or nothing.

    Args:
        slot: Which slot it is.
        array: The numbers.
    """
    if np.isnan(array).any():
        return "it has NaN"
    if slot == "velocity" and (np.asarray(array) < 0).any():
        return "averages of squares cannot be negative"
    return ""


def fingerprint(variable: Any) -> int | None:
    """Return a checksum of a sample of a variable's values.

    It is None if they do not tell one variable from another: if all are equal, or not
    to be had here.
    """
    if getattr(variable, "_value", 0) is None:
        return None  # on JAX, `fit` keeps it elsewhere
    x = keras.ops.stop_gradient(keras.ops.convert_to_tensor(variable))
    if not getattr(x, "is_fully_addressable", True):
        return None  # parts are in other processes
    flat = keras.ops.reshape(x, (-1,))
    sample = as_array(flat[:: max(1, math.prod(x.shape) // SAMPLE)])
    if (sample == sample[:1]).all():
        return None
    return zlib.crc32(np.ascontiguousarray(sample, "float32").tobytes())


def owners(variables: Sequence[Any]) -> list[Owner]:
    """Return what tells a model's variables from others.

    Args:
        variables: Variables of Keras, or of TensorFlow, which only have names.
    """
    return [
        Owner(getattr(v, "path", v.name), tuple(v.shape), fingerprint(v))
        for v in variables
    ]


def paths(variables: Sequence[Any]) -> list[str]:
    """Return the paths of variables; if one is there twice, all with a number."""
    found = [getattr(v, "path", v.name) for v in variables]
    if len({*found}) < len(found):
        found = [f"{path}#{i}" for i, path in enumerate(found)]
    return found


def matched(
    places: Sequence[Slots], given: Sequence[Slots], paths: Sequence[str]
) -> list[tuple[Any, Any]]:
    """Return pairs of a place and the array that belongs there.

    An array of zeros for which there is no place holds nothing, and is left out.

    Args:
        places: Slots of anything that has a shape, one for each variable.
        given: Slots of arrays, in the same order.
        paths: The path of each variable, for the message.

    Raises:
        ValueError: There is no place for an array, or no array for a place, or an array
            has another shape or is not numeric. The message names all that do not fit.
    """
    if len(places) != len(given):
        raise ValueError(
            f"There must be slots for {len(places)} variables. "
            f"Received: slots for {len(given)}"
        )
    pairs, wrong = [], []
    for path, of_one, given_one in zip(paths, places, given, strict=True):
        for name, place, array in zip(Slots._fields, of_one, given_one, strict=True):
            expected = None if place is None else tuple(place.shape)
            received = None if array is None else tuple(np.shape(array))
            if expected != received and (
                place is not None or np.any(np.asarray(array))
            ):
                wrong.append(
                    f"`{name}` of {path!r}: expected shape {expected}, "
                    f"received {received}"
                )
            elif array is not None and not is_real(np.asarray(array).dtype):
                wrong.append(
                    f"`{name}` of {path!r}: expected real numbers, "
                    f"received {np.asarray(array).dtype}"
                )
            elif array is not None and (why := wrong_numbers(name, array)):
                wrong.append(f"`{name}` of {path!r}: {why}")
            elif place is not None:
                pairs.append((place, np.asanyarray(array)))
    if wrong:
        raise ValueError("The state does not fit. " + "; ".join(wrong))
    return pairs


def in_my_order(
    state: State, places: Sequence[Slots], variables: Sequence[Any], *, in_order: bool
) -> list[Slots]:
    """Return the slots of a state in the order of an optimizer's variables.

    Args:
        state: The state.
        places: The optimizer's slots.
        variables: The model's variables, in the optimizer's order.
        in_order: Whether that order is the model's.

    Raises:
        ValueError: It cannot be told which slots are of which variable.
    """
    mine, theirs = paths(variables), list(state.paths)
    if not len(mine) == len(theirs) == len(state.slots):
        return list(state.slots)
    checksums = state.checksums or [None] * len(theirs)
    found, names_differ = aligned(
        [*map(_owner, theirs, state.slots, checksums)],
        [*map(_owner, mine, places, map(fingerprint, variables))],
        in_order=in_order and state.in_model_order,
    )
    if None in found and theirs == mine:
        return list(state.slots)  # whose shapes do not fit
    if None in found:
        raise ValueError(
            "The state is of other variables, or the order of the model's is not known "
            f"(see `RMSprop.build`). Expected those of {mine}. Received: {theirs}"
        )
    if names_differ:
        warnings.warn(
            "The variables of the state have other names; they were matched by their "
            "positions.",
            stacklevel=3,
        )
    return [state.slots[found.index(i)] for i in range(len(mine))]


def _owner(path: str, slots: Slots, checksum: int | None) -> Owner:
    v = slots.velocity  # a variable in float8 has none
    path = re.sub(r"#\d+$", "", path)  # see `paths`
    return Owner(path, () if v is None else tuple(v.shape), checksum)


def assign_state(
    state: State,
    slots: Sequence[Slots],
    variables: Sequence[Any],
    iterations: Any,
    *,
    steps: int,
    in_order: bool,
) -> None:
    """Give an optimizer a state; check all of it before.

    Args:
        state: The state.
        slots: The optimizer's slots.
        variables: The model's variables, in the optimizer's order.
        iterations: The variable that counts calls.
        steps: How many calls there are for one update.
        in_order: Whether that order is the model's.

    Raises:
        TypeError: It is not a `State`.
        ValueError: It does not fit.
    """
    if not isinstance(state, State):
        raise TypeError(
            f"`state` must be a `State`, as of `get_state`. Received: {state!r}"
        )
    count = checks.integer("iterations", state.iterations, 0)
    most = np.iinfo(str(keras.backend.standardize_dtype(iterations.dtype))).max // steps
    if count > most:
        raise ValueError(
            f"`iterations` must be an integer <= {most}. Received: iterations={count}"
        )
    places = [
        codecs.places(of_one, variable.shape)
        for of_one, variable in zip(slots, variables, strict=True)
    ]
    given = in_my_order(state, places, variables, in_order=in_order)
    for place, array in matched(places, given, paths(variables)):
        place.assign(array.copy())  # JAX may share the memory of an array
    iterations.assign(count * steps)


def as_array(x: Any) -> Any:
    """Return a tensor as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = keras.ops.cast(x, "float32")
    # Of a tensor: of a variable NumPy 2 warns.
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(x))


def copied(x: Any) -> Any:
    """Return a copy of a variable's value that no later step changes."""
    ops = keras.ops
    return ops.copy(ops.stop_gradient(ops.convert_to_tensor(x)))


def sync(model: Any) -> None:
    """Bring a model's variables up to date: on JAX, `fit` keeps them elsewhere."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
