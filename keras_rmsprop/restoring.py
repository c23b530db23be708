"""Saving and loading the optimizer's variables, at any time.

A file may be loaded before the optimizer is built, and so before there are variables to
load it into. Then it is pending, unless something else is restored in the meantime.
"""

import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_rmsprop import codecs, planning, saving
from keras_rmsprop.backends import current as backend
from keras_rmsprop.planning import RefusedError
from keras_rmsprop.saving import File, Name
from keras_rmsprop.slots import GRADIENT_SUM, OF_SEARCH, Book
from keras_rmsprop.state import owners


class Contents(NamedTuple):
    """What an optimizer holds."""

    variables: Sequence[Any]
    """Its variables."""
    book: Book
    """What these are."""
    weights: Sequence[Any]
    """The model's variables, in the optimizer's order."""
    indices: Mapping[Hashable, int]
    """Their numbers, by what stands for them in the book."""

    def named(self) -> dict[Name, Any]:
        """Return the optimizer's variables by what they are."""
        entries = {id(entry.variable): entry for entry in self.book.all()}
        found = {}
        for variable in self.variables:
            entry = entries.get(id(variable))
            if entry is None:
                name = Name(variable.name)
            else:
                owner = entry.key.owner
                name = Name(entry.kind, None if owner is None else self.indices[owner])
            found[name] = variable
        return found

    def places(self) -> dict[Name, Any]:
        """Return the same, slots as places for numbers."""
        return {
            name: variable
            if name.owner is None or name.slot < 0
            else codecs.place(variable, self.weights[name.owner].shape, name.slot)
            for name, variable in self.named().items()
        }

    def start_fresh(self, names: Collection[Name]) -> None:
        """Give variables the values that they start with."""
        entries = {id(entry.variable): entry for entry in self.book.all()}
        for name, variable in self.named().items():
            if name in names and id(variable) in entries:
                entries[id(variable)].start_fresh()


class Pending:
    """A file that was loaded before there were variables to load it into.

    Args:
        store: What Keras passes to `load_own_variables`.
        checkpoint: What tells whether a checkpoint is restored later.
    """

    def __init__(self, store: Any, checkpoint: Any) -> None:
        self.copy = saving.copied(store)
        self.checkpoint = checkpoint
        self.before: dict[Name, tuple[Any, Any]] = {}
        """Variables that have their values already: what these were, and are now."""


def save(store: Any, contents: Contents, pending: Pending | None) -> None:
    """Save the variables, with names by which they are found again.

    Args:
        store: What Keras passes to `save_own_variables`.
        contents: The variables.
        pending: A file that is not loaded yet: it is saved again.
    """
    places = contents.places()
    if pending is not None:
        with saving.opened(pending.copy) as file:
            values = (
                (v.name, places[v.name].numpy() if v.name in places else v.read())
                for v in file.values
            )
            saving.write(store, values, file.owners, in_model_order=file.in_model_order)
        return
    saving.write(
        store,
        ((name, place.numpy()) for name, place in places.items()),
        owners(contents.weights),
        in_model_order=contents.book.order.is_certain,
    )


def load(store: Any, contents: Contents, who: str) -> None:
    """Load the variables.

    Args:
        store: What Keras passes to `load_own_variables`.
        contents: The variables.
        who: What a warning calls the optimizer.

    Raises:
        ValueError: A value in the file is not numeric; nothing is changed.
    """
    try:
        _load(saving.read(store), contents)
    except RefusedError as error:
        _warn_skipped(error, who)


def load_later(
    store: Any, contents: Contents, checkpoint: Any, who: str
) -> Pending | None:
    """Return a file to be loaded when the optimizer is built, if it has slots.

    What there is already, as the learning rate, may be changed before the first step:
    that is loaded now, if the file says what its values are. Else it may be that of any
    optimizer.

    Args:
        store: What Keras passes to `load_own_variables`.
        contents: The variables that there are.
        checkpoint: What tells whether a checkpoint is restored later.
        who: What a warning calls the optimizer.

    Raises:
        ValueError: A value in the file is not numeric; nothing is changed.
    """
    file, places = saving.read(store), contents.places()
    given = {}
    try:
        for value in file.values:
            if value.name in places:
                given[value.name] = planning.checked(value, places[value.name])
    except RefusedError as error:
        _warn_skipped(error, who)
        return None
    pending = Pending(store, checkpoint) if file.may_have_slots else None
    for name, array in given.items():
        before = places[name].numpy()
        places[name].assign(array)
        if pending is not None:
            pending.before[name] = before, places[name].numpy()
    return pending


def load_pending(
    pending: Pending, contents: Contents, checkpoint: Any, who: str
) -> None:
    """Load the file that is pending, now that there are variables.

    Args:
        pending: The file.
        contents: The variables.
        checkpoint: What tells whether a checkpoint was restored later.
        who: What a warning calls the optimizer.
    """
    if checkpoint != pending.checkpoint:
        return  # what was restored later is what was meant
    with backend.outside_functions(), saving.opened(pending.copy) as file:
        try:
            _load(file, contents, loaded=pending.before)
        except (ValueError, RefusedError) as error:
            _warn_skipped(error, who)
            places = contents.places()
            for name, (before, now) in pending.before.items():
                if np.array_equal(places[name].numpy(), now):  # else it is the user's
                    places[name].assign(before)


def _load(file: File, contents: Contents, loaded: Collection[Name] = ()) -> None:
    """Load a file, except for what was loaded already. All is checked before."""
    places = contents.places()
    plan = planning.plan(
        file,
        places,
        owners(contents.weights),
        in_order=contents.book.order.is_certain,
    )
    for name, value in plan.values.items():
        planning.checked(value._replace(name=name), places[name])
    if plan.warning:
        warnings.warn(plan.warning, stacklevel=2)
    fresh = {*plan.fresh}
    if any(name.kind == GRADIENT_SUM for name in fresh):
        # Parts of two searches would find a learning rate that is far too large.
        fresh |= {name for name in places if name.kind in OF_SEARCH}
    contents.start_fresh(fresh)
    for name, value in plan.values.items():
        if name not in fresh and name not in loaded:
            places[name].assign(codecs.understood(places[name], value.read()))


def _warn_skipped(error: Exception, who: str) -> None:
    warnings.warn(
        f"Skipping variable loading for optimizer {who!r}: {error}.", stacklevel=2
    )
