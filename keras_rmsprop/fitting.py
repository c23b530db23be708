"""Which `fit` runs, and what it trains: Keras does not tell its optimizers."""

import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras


class Trained(NamedTuple):
    """What a search is about, as far as Python can see."""

    trainable: tuple[bool, ...]
    """Of each of the optimizer's variables, whether it is trained."""
    model: Any = None
    """A weak reference to the model whose `fit` trains them, if it is known."""
    train_function: Any = None
    """One to what `fit` calls; None: unknown, or `compile` has dropped it."""

    @classmethod
    def now(cls, variables: Sequence[Any], before: "Trained | None") -> "Trained":
        """Return what is trained now, by the `fit` that runs or the last one that did.

        Args:
            variables: The model's variables.
            before: What this returned before; None: it was not called.
        """
        trainable = tuple(getattr(v, "trainable", True) for v in variables)
        known = (before or cls(()))._replace(trainable=trainable)
        model = _fitting() or (known.model and known.model())
        if model is None:
            return known
        function, last = model.train_function, known.train_function
        if last is not None and last() is function is not None:
            return known
        now = None if function is None else weakref.ref(function)
        return cls(trainable, weakref.ref(model), now)

    def differs_from(self, other: "Trained") -> bool:
        """Whether layers were frozen or unfrozen, or a model was compiled again."""
        before = other.train_function
        is_compiled = before is not None and self.train_function is not before
        return self.trainable != other.trainable or is_compiled


def _fitting() -> Any:
    """Return the model whose `fit` runs now; Keras does not tell. Else None."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "fit":
            model = frame.f_locals.get("self")
            if isinstance(model, keras.Model):
                return model
        frame = frame.f_back
    return None


def fit_that_ends() -> dict[str, Any]:
    """Return the variables of Keras' `fit`, if it and no callback says that it ends."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "finalize_variable_values":
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "fit":
        return {}
    # A loop of the user's own may have the same name.
    is_of_keras = frame.f_globals.get("__name__", "").startswith("keras.")
    return frame.f_locals if is_of_keras else {}
