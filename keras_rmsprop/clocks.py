"""Last-update counters of tables: how far each row is behind.

Imported only on the TensorFlow backend.
"""

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow as tf

from keras_rmsprop.access import (
    after,
    inside_xla,
    outside_functions,
    read,
    unwrapped,
    write,
)


class Ticks(tf.Module):
    """Last-update counter of a table: up to which update each row is up to date.

    Attributes:
        updates: int32 scalar, the updates since all rows were last up to date.
        last: int32, one for each row: the update up to which the row is up to date.
    """

    def __init__(self, table: Any) -> None:
        super().__init__()
        self._programs = _Programs()
        with _beside(table):
            self.updates = tf.Variable(0, dtype=tf.int32, trainable=False)
            self.last = tf.Variable(
                tf.zeros(table.shape[:1], tf.int32), trainable=False
            )

    def is_behind(self) -> bool:
        """Whether there were updates since all rows were up to date."""
        # A variable of several replicas is no number, but reads as one.
        return bool(tf.convert_to_tensor(self.updates) > 0)

    def tick(self, ids: Any, count: Any) -> Any:
        """Count an update of some rows, `count` of them; return its number."""
        now = tf.convert_to_tensor(self.updates.assign_add(1))
        self.mark(ids, count, now)
        return now

    def mark(self, ids: Any, count: Any, now: Any) -> None:
        """Note that some rows, `count` of them, are up to date with an update."""
        if inside_xla():
            ids = after(ids, read(self.last, ids))  # rows that were read before
        write(self.last, tf.fill(tf.reshape(count, [1]), now), ids)

    def reset(self) -> None:
        """Restart: all rows are up to date."""
        self.updates.assign(0)
        # That is 0. To write zeros, XLA copies twice.
        self.last.assign(tf.minimum(tf.convert_to_tensor(self.last), 0))

    def at_once(self, change: Callable[[], None], key: Hashable) -> None:
        """Change variables of the table in one operation, which no Ctrl-C can split.

        Args:
            change: Changes them. It is traced, once for each key.
            key: Something that is equal where `change` is the same.
        """
        # In a graph it is a part of that; one replica of several has parts of others.
        if not tf.executing_eagerly() or (
            tf.distribute.has_strategy()
            and not tf.distribute.in_cross_replica_context()
        ):
            change()
        else:
            # Each replica updates copies of its own, which a program knows.
            place = tf.convert_to_tensor(self.updates).device
            self._programs.run(change, (key, place))


class AverageTicks(Ticks):
    """When the average of each row of a table last followed the row's weights.

    Updates of the average are counted, which happen at each step, also in one without
    a gradient for the table.

    Attributes:
        first: int64 scalar, the optimizer's iterations at the first of these updates.
    """

    def __init__(self, table: Any, shared: bool = False) -> None:
        super().__init__(table)
        with _beside(table):
            self.first = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._shared = _Unsaved(tf.Variable(shared, trainable=False))

    def _trackable_children(self, save_type: Any = "checkpoint", **kwargs: Any) -> Any:
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":  # which must have all that its functions use
            children = {**children, "shared": self.shared}
        return children

    @property
    def shared(self) -> Any:
        """Whether another optimizer updates the table, too: a bool variable.

        Then rows may move unseen, so the averages of all rows follow at each step.
        """
        return self._shared.variable

    def iterations(self, updates: Any) -> Any:
        """Return the optimizer's iterations after so many updates."""
        return self.first + tf.cast(updates, tf.int64)


class Clock(Ticks):
    """Last-update counter of a table, counted in updates of that table.

    Args:
        table: The table.
        has_average: Whether its weights are averaged.
        has_sums: Whether its gradients are summed over several steps.
        shared: Whether another optimizer updates the table, too.
        stays_current: Whether all rows are brought up to date at the end of each
            step, as a graph that knows no clock updates the table, too.

    Attributes:
        shape: That of the table.
        average: The clock of the average of the weights, or None.
        sum: float32 scalar, the running sum of `estimate.py`; valid once there were
            updates.
        pending: int64, the rows that have sums of gradients; or None.
        all_pending: bool scalar, whether any row may have sums, whatever `pending`
            says; or None.
        stays_current: See above.
    """

    def __init__(
        self,
        table: Any,
        *,
        has_average: bool = False,
        has_sums: bool = False,
        shared: bool = False,
        stays_current: bool = False,
    ) -> None:
        super().__init__(table)
        self.shape = tf.TensorShape(table.shape)
        self.stays_current = stays_current
        self.pending: Any = None
        self.all_pending: Any = None
        with _beside(table):
            self.sum = tf.Variable(0.0, trainable=False)
            if has_sums:
                self.pending = tf.Variable(
                    tf.zeros([0], tf.int64), shape=[None], trainable=False
                )
                self.all_pending = tf.Variable(True, trainable=False)
        self.average = AverageTicks(table, shared) if has_average else None

    def reset(self) -> None:
        """Restart: the averages of all rows, of all kinds, are up to date."""
        super().reset()
        if self.average is not None:
            self.average.reset()
        self.mark_all_pending()

    def mark_all_pending(self) -> None:
        """Say that any row may have sums of gradients: who wrote them is unknown."""
        if self.all_pending is not None:
            self.all_pending.assign(True)


class _Unsaved:
    """Holds a variable that is in no checkpoint."""

    def __init__(self, variable: Any) -> None:
        self.variable = variable


class _Programs:
    """Traced changes of variables. They are in no checkpoint."""

    MAX = 8

    def __init__(self) -> None:
        self._traced: dict[Hashable, Any] = {}

    def run(self, change: Callable[[], None], key: Hashable) -> None:
        """Make a change as one operation."""
        key = key, tf.distribute.has_strategy()
        if key not in self._traced:
            if len(self._traced) == self.MAX:
                self._traced.clear()
            function = tf.function(change, autograph=False)
            self._traced[key] = function, function.get_concrete_function()
        self._traced[key][1]()


@contextlib.contextmanager
def _beside(table: Any) -> Iterator[None]:
    """Make variables where a table is, wherever this is called from.

    A checkpoint may be restored anywhere.
    """
    strategy = getattr(unwrapped(table), "distribute_strategy", None)
    strategy = strategy or tf.distribute.get_strategy()
    beside = strategy.extended.colocate_vars_with
    with outside_functions(), strategy.scope(), beside(unwrapped(table)):
        yield


class Clocks(tf.Module):
    """The clocks of an optimizer's tables, by the index of the variable.

    Checkpoints find a clock by that index. Keras does not count it among the
    optimizer's variables, which thus stay those of the built-in.

    Args:
        optimizer: The optimizer, an object whose `_trainable_variables`, `use_ema`,
            `_accumulated_gradients` and `_state_io` are read.

    Attributes:
        refused: Something that stands for each table that a graph updates without a
            clock, so that none can be made later.
        sparse: Something that stands for each variable that had a sparse gradient.
    """

    _alive: ClassVar["weakref.WeakSet[Clocks]"] = weakref.WeakSet()
    _lock: ClassVar[threading.Lock] = threading.Lock()  # of the above

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.refused: set[Any] = set()
        self.sparse: set[Any] = set()
        self._reference = weakref.ref(optimizer)
        self._being_made = False
        with Clocks._lock:
            Clocks._alive.add(self)

    @property
    def _optimizer(self) -> Any:
        return self._reference()

    def _tables(self) -> Sequence[Any]:
        """Return the variables that the optimizer was built with, if it lives."""
        return getattr(self._optimizer, "_trainable_variables", ())

    def __contains__(self, index: int) -> bool:
        return f"table_{index}" in vars(self)

    def __getitem__(self, index: int) -> Clock:
        return getattr(self, f"table_{index}")

    def make(self, index: int, *, stays_current: bool = False) -> Clock:
        """Return the clock of this table; make one if it has none.

        Args:
            index: The table's index.
            stays_current: See `Clock`.
        """
        if index not in self:
            table = self._tables()[index]
            optimizer, has_average = self._optimizer, bool(self._optimizer.use_ema)
            clock = Clock(
                table,
                has_average=has_average,
                has_sums=bool(vars(optimizer).get("_accumulated_gradients")),
                shared=has_average and self._is_shared(table),
                stays_current=stays_current,
            )
            self._put(index, clock)
        return self[index]

    def _others(self) -> "list[Clocks]":
        """Return those of the other optimizers."""
        with Clocks._lock:
            return [clocks for clocks in Clocks._alive if clocks is not self]

    def _is_shared(self, table: Any) -> bool:
        """Whether another optimizer was built for a table, too."""

        def is_shared() -> bool:
            return any(
                unwrapped(variable) is unwrapped(table)
                for other in self._others()
                for variable in other._tables()
            )

        if is_shared():
            gc.collect()  # it may be one from before `compile`, which nobody has
        return is_shared()

    def share(self) -> None:
        """Tell other optimizers which tables this one updates from now on.

        Their averages of rows without a gradient rely on weights that nobody else
        moves. So they are brought up to date, and follow at each step from now on.
        """
        mine = {id(unwrapped(variable)) for variable in self._tables()}
        for other in self._others():
            for i in other:
                ticks = other[i].average
                if ticks is None or id(unwrapped(other._tables()[i])) not in mine:
                    continue
                with tf.init_scope():
                    if not tf.convert_to_tensor(ticks.shared):
                        other._optimizer._state_io.catch_up()
                        ticks.shared.assign(True)

    def _put(self, index: int, clock: Clock) -> None:
        # While it is put there, TensorFlow asks what is there, which makes a clock.
        self._being_made = True
        try:
            setattr(self, f"table_{index}", clock)
        finally:
            self._being_made = False

    def __iter__(self) -> Iterator[int]:
        names = [name for name in vars(self) if name.startswith("table_")]
        return (int(name.removeprefix("table_")) for name in names)

    def move(self, index_of: Mapping[int, int]) -> None:
        """Give the clocks the new indices of their variables."""
        clocks = {index_of[i]: self[i] for i in self}
        for i in self:
            delattr(self, f"table_{i}")
        for i, clock in clocks.items():
            self._put(i, clock)

    def _trackable_children(self, save_type: Any = None, **kwargs: Any) -> Any:
        # A checkpoint that is written asks for what to write, and says that it does.
        if save_type == "checkpoint" and tf.executing_eagerly():
            self._optimizer._state_io.before_checkpoint()
        given = () if save_type is None else (save_type,)
        return super()._trackable_children(*given, **kwargs)

    def _lookup_dependency(self, name: str, *args: Any) -> Any:
        # This is how a checkpoint finds what to restore; it finds new clocks, too.
        is_clock = name.startswith("table_") and not self._being_made
        if is_clock and self._tables():
            return self.make(int(name.removeprefix("table_")))
        return super()._lookup_dependency(name, *args)
