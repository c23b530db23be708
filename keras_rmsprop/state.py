"""What an optimizer remembers of its variables, independent of any framework."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rmsprop.rule import Slots


class State(NamedTuple):
    """The state of an optimizer, as NumPy arrays; see `RMSprop.get_state`."""

    iterations: int
    """How many updates there were."""
    slots: list[Slots]
    """The slots of each variable, in the order the optimizer was built with."""
    paths: Sequence[str] = ()
    """The path of each variable."""


def is_real(array: Any) -> bool:
    """Whether an array is one of real numbers."""
    return np.can_cast(np.asarray(array).dtype, np.float64, "same_kind")


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
            elif array is not None and not is_real(array):
                wrong.append(
                    f"`{name}` of {path!r}: expected real numbers, "
                    f"received {np.asarray(array).dtype}"
                )
            elif place is not None:
                pairs.append((place, np.asanyarray(array)))
    if wrong:
        raise ValueError("The state does not fit. " + "; ".join(wrong))
    return pairs


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
