"""What the callbacks of this package have in common."""

import sys
from collections.abc import Sequence
from typing import Any

import keras


class Callback(keras.callbacks.Callback):
    """A callback that can be copied and pickled at any time.

    A copy has the settings and the results. It has no model and nothing of a `fit` that
    is under way: those it gets in a `fit` of its own.
    """

    def _forget(self) -> None:
        """Set what belongs to one `fit` to what it is before."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or a pickled one, has."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.set_model(None)
        copy._forget()
        return copy.__dict__


def list_of(callback: Any) -> Any:
    """Return the list that is calling a callback; Keras does not tell. Else None."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller if callback in caller.callbacks else None
        frame = frame.f_back
    return None


def inner(optimizer: Any) -> Sequence[Any]:
    """Return the optimizers that a wrapper has, or the optimizer itself."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "optimizers", [optimizer])


def described(optimizer: Any) -> str:
    """Return what a message calls an optimizer."""
    if optimizer is None:
        return "None"
    return f"{type(optimizer).__name__} (name={optimizer.name!r})"
