"""Saving and loading the optimizer's variables, at any time.

A file may be loaded before the optimizer is built, and so before there are variables to
load it into. Then it waits, unless something else is restored in the meantime.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from keras_rmsprop import saving
from keras_rmsprop.alignment import Owner
from keras_rmsprop.backends import current as backend
from keras_rmsprop.codecs import place
from keras_rmsprop.slots import GRADIENT_SUM, OF_SEARCH, Keeper


class Restorer:
    """Saves and loads the variables of an optimizer.

    Args:
        keeper: Knows what the variables are.
        variables: Returns all of them.
        owners: Returns the model's variables, with their paths.
        index_of: Returns the index of one of the model's variables.
        clocks: The clocks of the tables.
        checkpoints: Returns something else after a `tf.train.Checkpoint` was restored.
    """

    def __init__(
        self,
        keeper: Keeper,
        variables: Callable[[], Sequence[Any]],
        owners: Callable[[], Sequence[Owner]],
        index_of: Callable[[Any], int],
        clocks: Any,
        checkpoints: Callable[[], Any],
    ) -> None:
        self._keeper = keeper
        self._variables = variables
        self._owners = owners
        self._index_of = index_of
        self._clocks = clocks
        self._checkpoints = checkpoints
        self._file: saving.File | None = None
        # The variables that there were before the file came, and their values.
        self._before: Sequence[tuple[saving.Name, Any, Any]] = ()
        self._checkpoints_before: Any = None

    @property
    def waits(self) -> bool:
        """Whether a file waits to be loaded."""
        return self._file is not None

    def named(self) -> list[tuple[saving.Name, Any]]:
        """Return the optimizer's variables, and what each is."""
        owners = self._owners()
        kept = {id(k.variable): k for k in self._keeper.all()}

        def name(variable: Any) -> saving.Name:
            it = kept.get(id(variable))
            if it is None:
                return saving.Name(variable.name, "")
            if it.owner is None:
                return saving.Name(it.kind, "")
            return saving.Name(it.kind, owners[self._index_of(it.owner)].path)

        return [(name(v), v) for v in self._variables()]

    def _places(self) -> dict[saving.Name, Any]:
        """Return the optimizer's variables, slots as places for numbers."""
        shapes = {owner.path: owner.shape for owner in self._owners()}
        return {
            name: v if name.slot < 0 else place(v, shapes[name.path], name.slot)
            for name, v in self.named()
        }

    def save(self, store: Any, *, built: bool) -> None:
        """Save the variables, with names by which they are found again.

        Args:
            store: What Keras passes to `save_own_variables`.
            built: Whether the optimizer is built.
        """
        saved = ((name, where.numpy()) for name, where in self._places().items())
        if self._file is not None and not built:
            saving.write(store, saving.updated(self._file, [*saved]))
        else:
            saving.write(store, saved)

    def load(self, store: Any, *, built: bool, who: str) -> None:
        """Load the variables; before the optimizer is built, keep the file for then.

        Args:
            store: What Keras passes to `load_own_variables`.
            built: Whether the optimizer is built.
            who: What a warning calls the optimizer.

        Raises:
            ValueError: A value in the file is not numeric; nothing is changed.
        """
        file = saving.read(store)
        self._file, self._before = None, ()
        self._checkpoints_before = self._checkpoints()
        if built:
            try:
                self._load(file)
            except saving.ForeignStateError as error:
                _skip(error, who)
            return
        # The learning rate may be changed before the first step: load it now, if it is
        # one. A file without names may be that of any optimizer.
        named = self.named()
        self._before = [(name, v, v.numpy()) for name, v in named]
        by_name = {name: file.values[key] for key, name in file.names.items()}
        for name, variable in named:
            if name in by_name:
                variable.assign(by_name[name])
        self._file = file if saving.has_slots(file) else None

    def load_what_waits(self, who: str) -> None:
        """Load the file that waits, now that there are variables.

        Args:
            who: What a warning calls the optimizer.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        before, self._before = self._before, ()
        if self._checkpoints() != self._checkpoints_before:
            return  # what was restored later is what was meant
        with backend.outside_functions():
            try:
                self._load(file, [name for name, *_ in before] if file.names else ())
            except (ValueError, saving.ForeignStateError) as error:
                _skip(error, who)
                for _, variable, value in before:
                    variable.assign(value)

    def _load(self, file: saving.File, keep: Collection[saving.Name] = ()) -> None:
        """Load a file, except for the variables to keep."""
        owners = self._owners()
        paths = [owner.path for owner in owners]
        places, variables = self._places(), dict(self.named())
        plan = saving.plan(file, places, owners)
        if plan.warning:
            warnings.warn(plan.warning, stacklevel=2)
        kept = {id(k.variable): k for k in self._keeper.all()}
        # Parts of two searches would find a learning rate that is far too large.
        restarts = any(name.kind == GRADIENT_SUM for name in plan.fresh)
        for name, variable in variables.items():
            if restarts and name.kind in OF_SEARCH:
                kept[id(variable)].start_fresh()
            elif name in plan.values and name not in keep:
                places[name].assign(plan.values[name])
            elif name in plan.fresh and id(variable) in kept:
                kept[id(variable)].start_fresh()
        # A table without a clock in the file has no silent rows.
        for i in self._clocks:
            self._clocks[i].reset()
        for (kind, path), value in plan.clocks.items():
            if backend.has_rows and path in paths:
                clock = self._clocks.make(paths.index(path))
                getattr(clock, kind.removeprefix("clock_")).assign(value)


def _skip(error: Exception, who: str) -> None:
    warnings.warn(
        f"Skipping variable loading for optimizer {who!r}: {error}.", stacklevel=2
    )
