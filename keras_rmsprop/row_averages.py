"""The averages (`use_ema`) of a table of which a step updates only some rows.

A row without a gradient keeps its weights w. Its average still follows them:
avg <- m avg + (1 - m) w. After n such updates that is M avg + (1 - M) w, where M is
the product of the n shares m. So the update can wait until w changes, or until the
average is read. A clock (`clocks.AverageTicks`) counts the updates.

Imported only on the TensorFlow backend.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rmsprop import rule, sparse
from keras_rmsprop.ema_share import Momentum
from keras_rmsprop.kernel import rows as kernel_rows
from keras_rmsprop.update import Part


class Table(NamedTuple):
    """A table with an average of which a step updates only some rows."""

    weights: Any
    average: Any
    clock: Any
    """The `clocks.AverageTicks`."""
    momentum: Momentum
    by_kernel: bool = False
    """Whether the native kernel averages its rows."""

    def caught_up(self, ids: Any = None) -> Any:
        """Return the averages of some rows, or of all, after the updates so far."""
        kept = keras.backend.standardize_dtype(self.average.dtype)
        dtype = rule.wide(kept)
        average, weights = (
            tf.cast(sparse.read(variable, ids), dtype)
            for variable in (self.average, self.weights)
        )
        share = tf.reshape(self.share(ids), [-1] + [1] * (len(average.shape) - 1))
        return tf.cast(share, dtype) * average + tf.cast(1 - share, dtype) * weights

    def share(self, ids: Any) -> Any:
        """Return the share of the averages of rows that stays when they catch up."""
        clock = self.clock
        start = clock.iterations(sparse.read(clock.last, ids))
        end = clock.iterations(tf.convert_to_tensor(clock.updates))
        kept = keras.backend.standardize_dtype(self.average.dtype)
        return self.momentum.over(start, end, kept)

    def before_step(self, ids: Any) -> Any:
        """Return the averages of rows whose weights are about to change.

        The kernel brings them up to date in place; then None is returned.
        """
        if not self.by_kernel:
            return self.caught_up(ids)
        kernel_rows.average_rows(self.weights, self.average, ids, self.share(ids))
        self.clock.mark(ids, tf.size(ids), tf.convert_to_tensor(self.clock.updates))
        return None

    @property
    def key(self) -> tuple[Any, ...]:
        """What is equal for an equal table."""
        of_momentum = (
            x if isinstance(x, int | float) else id(x) for x in self.momentum
        )
        return id(self.weights), id(self.average), *of_momentum

    def catch_up(self) -> None:
        """Bring the averages of all rows up to date, in one operation."""
        self.clock.at_once(self._catch_up, self.key)

    def _catch_up(self) -> None:
        _set(self.average, self.caught_up(), None)
        self.clock.reset()

    def follow(self, ids: Any, read: Any, m: Any, t: Any) -> None:
        """Let averages of rows follow the weights that a step gave them; count it.

        Args:
            ids: The rows, or None: no row.
            read: What `before_step` returned.
            m: The share of the averages that stays.
            t: The optimizer's iterations.
        """
        if ids is not None and read is None:
            kernel_rows.average_rows(self.weights, self.average, ids, m)
        elif ids is not None:
            new = sparse.read(self.weights, ids)
            new, m = (tf.cast(x, read.dtype) for x in (new, m))
            _set(self.average, m * read + (1 - m) * new, ids)
        self._tick(ids, _as_int(t))

    def _tick(self, ids: Any, t: Any) -> None:
        """Count an update of the average, after t others, in which some rows followed.

        At the first one all rows follow, and at each if somebody else may have moved
        rows since the last one.

        Args:
            ids: The rows, or None: no row.
            t: The optimizer's iterations, an int64.
        """
        clock = self.clock
        if ids is None:
            now = tf.convert_to_tensor(clock.updates.assign_add(1))
        else:
            now = clock.tick(ids, tf.size(ids))
        clock.first.assign(tf.where(now == 1, t, tf.convert_to_tensor(clock.first)))

        def all_follow() -> None:
            copied = tf.cast(sparse.read(self.weights, None), self.average.dtype)
            followed = tf.cast(self.caught_up(), self.average.dtype)
            _set(self.average, tf.where(t == 0, copied, followed), None)
            clock.reset()

        _only_if((t == 0) | tf.convert_to_tensor(clock.shared), all_follow)


class Waiting(NamedTuple):
    """A table in a step that updates some of its rows or none, before the step."""

    table: Table
    read: Any
    """What `Table.before_step` returned; None: no row is updated."""


def before_step(
    tables: Mapping[int, Table], parts: Sequence[Part], iterations: Any
) -> tuple[Sequence[Part], dict[int, Waiting]]:
    """Bring up to date averages that depend on weights that a step will change.

    Args:
        tables: Tables, by their index.
        parts: The variables that have a gradient.
        iterations: The optimizer's iterations.

    Returns:
        The parts, their rows known only after the averages; and the tables of which the
        step does not update all rows, by their index.
    """
    updated = {part.variable_index: part.ids for part in parts}
    waiting: dict[int, Waiting] = {}
    for i, table in tables.items():
        updates = tf.convert_to_tensor(table.clock.updates)
        behind = updates > 0
        if i in updated and updated[i] is None:
            _only_if(behind, table.catch_up)
            continue
        # As a rule iterations go up by one. If not, the counter restarts.
        jumped = _as_int(iterations) != table.clock.iterations(updates)
        _only_if(behind & jumped, table.catch_up)
        read = None
        if i in updated:
            caught_up = tf.convert_to_tensor(table.clock.updates)
            updated[i] = sparse.after(updated[i], caught_up)
            read = table.before_step(updated[i])
        waiting[i] = Waiting(table, read)
    parts = [part._replace(ids=updated[part.variable_index]) for part in parts]
    return parts, waiting


def _set(variable: Any, values: Any, ids: Any) -> None:
    sparse.write(variable, tf.cast(values, variable.dtype), ids)


def _as_int(iterations: Any) -> Any:
    return tf.cast(tf.convert_to_tensor(iterations), tf.int64)


def _only_if(condition: Any, do: Any) -> None:
    # XLA would copy what is written if no branch were empty. As it is, in the second.
    tf.cond(tf.logical_not(condition), lambda: None, do)
