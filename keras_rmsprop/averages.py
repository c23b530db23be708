"""Averages of the weights (`use_ema`): they follow the weights, and can replace them.

A row of a table without a gradient keeps its weights w. Its average still follows
them: avg <- m avg + (1 - m) w. After n such updates that is M avg + (1 - M) w, where M
is the product of the n shares m. So the update can wait until w changes, or until the
average is read. A clock (`clocks.AverageTicks`) counts the updates.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rmsprop import options, rule
from keras_rmsprop.backends import current as backend
from keras_rmsprop.ema_share import Momentum, Share, begin_of
from keras_rmsprop.slots import EMA_BEGIN
from keras_rmsprop.state import copied
from keras_rmsprop.update import Part

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_rmsprop import sparse
    from keras_rmsprop.kernel import rows as kernel_rows


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

    def tick(self, ids: Any, t: Any) -> None:
        """Count an update of the average, after t others, in which some rows followed.

        At the first one all rows follow, and at each if somebody else may have moved
        rows since the last one.

        Args:
            ids: The rows, or None: no row.
            t: The optimizer's iterations.
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


def before_step(
    tables: Mapping[int, Table], parts: Sequence[Part], iterations: Any
) -> tuple[Sequence[Part], dict[int, Any]]:
    """Read the averages that depend on weights that a step is about to change.

    Args:
        tables: Tables, by their index.
        parts: The variables that have a gradient.
        iterations: The optimizer's iterations.

    Returns:
        The parts, their rows known only after the averages; and, by the index of a
        table, the averages of the rows that will be updated. None: no row, or they are
        up to date. A table of which all rows will be updated is not among them.
    """
    updated = {part.variable_index: part.ids for part in parts}
    found: dict[int, Any] = {}
    for i, table in tables.items():
        updates = tf.convert_to_tensor(table.clock.updates)
        behind = updates > 0
        if i in updated and updated[i] is None:
            _only_if(behind, table.catch_up)
            continue
        # As a rule iterations go up by one. If not, the counter restarts.
        jumped = _as_int(iterations) != table.clock.iterations(updates)
        _only_if(behind & jumped, table.catch_up)
        found[i] = None
        if i in updated:
            caught_up = tf.convert_to_tensor(table.clock.updates)
            updated[i] = sparse.after(updated[i], caught_up)
            found[i] = table.before_step(updated[i])
    return [part._replace(ids=updated[part.variable_index]) for part in parts], found


def follow(
    variables: Sequence[Any],
    averages: Sequence[Any],
    rows: Mapping[int, Any],
    iterations: Any,
    momentum: Momentum,
    tables: Mapping[int, Table],
    before: Mapping[int, Any],
) -> None:
    """Let averages follow their variables: avg <- m avg + (1 - m) w; first avg <- w.

    Args:
        variables: The variables.
        averages: The average of each, or None.
        rows: The rows that were updated, by the index of their table, for tables of
            which only some rows were. If a table is not in `before`, the averages of
            its other rows do not follow.
        iterations: How many updates there were.
        momentum: Gives m.
        tables: See `before_step`.
        before: What `before_step` returned.
    """
    pairs = [*zip(variables, averages, strict=True)]
    dtypes = {variable.dtype for variable, average in pairs if average is not None}
    momentums = {dtype: momentum.at(iterations, dtype) for dtype in dtypes}
    for i, (variable, average) in enumerate(pairs):
        if average is None:
            continue
        m = momentums[variable.dtype]
        if i in before:
            if i in rows and before[i] is None:
                kernel_rows.average_rows(variable, average, rows[i], m)
            elif before[i] is not None:
                new = sparse.read(variable, rows[i])
                new, m = (tf.cast(x, before[i].dtype) for x in (new, m))
                _set(average, m * before[i] + (1 - m) * new, rows[i])
            tables[i].tick(rows.get(i), _as_int(iterations))
        elif i in rows:
            tf.cond(
                tf.equal(iterations, 0),
                functools.partial(sparse.write, average, variable, None),
                functools.partial(sparse.mix, average, variable, rows[i], m),
            )
        else:
            average.assign(m * average + (1 - m) * variable)


def replace(variables: Sequence[Any], averages: Sequence[Any]) -> None:
    """Give variables the values of their averages, where they have one."""
    for variable, average in zip(variables, averages, strict=True):
        if average is not None:
            # A copy: on JAX both would share one buffer, and give it away twice.
            variable.assign(ops.copy(average))


def _set(variable: Any, values: Any, ids: Any) -> None:
    sparse.write(variable, tf.cast(values, variable.dtype), ids)


def _as_int(iterations: Any) -> Any:
    return tf.cast(tf.convert_to_tensor(iterations), tf.int64)


def _only_if(condition: Any, do: Any) -> None:
    # XLA would copy what is written if no branch were empty. As it is, in the second.
    tf.cond(tf.logical_not(condition), lambda: None, do)


class Averages:
    """Updates the EMA of the weights after each step (`use_ema`).

    Args:
        optimizer: The optimizer. Keras makes the averages, `_weight_averages`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def is_on(self) -> bool:
        """Whether the option is on."""
        return bool(self._optimizer.use_ema)

    def build(self, variables: Sequence[Any]) -> None:
        """Make the counter of `Momentum.begin`; Keras makes the averages."""
        optimizer = self._optimizer
        if optimizer.use_ema and optimizer.ema_warmup:
            optimizer._ema_begin = optimizer.add_variable(
                (), "zeros", "int32", name=EMA_BEGIN
            )

    def are_new(self) -> bool:
        """Whether there are averages, and no step that they followed."""
        count = self._optimizer._iterations
        if not vars(self._optimizer).get("_weight_averages"):
            return False
        if getattr(count, "_value", 0) is None:
            return False  # on JAX, `fit` keeps it elsewhere
        count = ops.add(count, 0)  # a variable of several replicas is no number
        return options.has_value(count) and float(count) == 0

    def start(self) -> None:
        """Let averages be as the weights are now.

        The first step does that. So this is for who goes on without it: with a step
        count from elsewhere, or to an end.
        """
        optimizer = self._optimizer
        pairs = zip(
            optimizer._trainable_variables, optimizer._weight_averages, strict=True
        )
        for variable, average in pairs:
            if average is not None:
                backend.assign_everywhere(average, copied(variable))

    def why_all_rows(self, variable: Any) -> str:
        """Return why the averages of all rows must follow at each step, or nothing."""
        optimizer = self._optimizer
        if not optimizer.use_ema:
            return ""
        if optimizer.gradient_accumulation_steps:
            return "`use_ema` averages at each call, `gradient_accumulation_steps` sums"
        if options.is_tensor(optimizer.ema_momentum):
            return "`ema_momentum` may change unseen"
        if getattr(variable, "constraint", None) is not None:
            what = "what a constraint does to rows without a gradient"
            return f"`use_ema` averages {what}"
        return ""

    def momentum(self) -> Momentum:
        """Return the decay rate."""
        return Momentum.of(self._optimizer)

    def warm_up_again(self) -> Any:
        """Warm up from here: weights that go on from their average have little past.

        Else a loop of short calls of `fit` would hardly move, as each ends with an
        average over several of them.

        Returns:
            How many updates there were since the last warm-up began.
        """
        begin, steps = begin_of(self._optimizer), self._optimizer.iterations
        if begin is not None:
            steps = ops.cast(steps, begin.dtype) - ops.convert_to_tensor(begin)
            for table in self.tables().values():
                table.catch_up()
            # A copy: on JAX both would share one buffer, and give it away twice.
            now = ops.copy(ops.cast(self._optimizer.iterations, begin.dtype))
            backend.assign_everywhere(begin, now)
        return steps

    def tables(self, *, kernel: bool = False) -> dict[int, Table]:
        """Return the tables in whose averages rows may wait, by their index.

        Args:
            kernel: Whether a native kernel may follow rows.
        """
        optimizer = self._optimizer
        is_lazy = optimizer.sparse_update == "lazy"
        if not self.is_on() or is_lazy or options.is_tensor(optimizer.ema_momentum):
            return {}
        variables, averages = optimizer._trainable_variables, optimizer._weight_averages
        found = {}
        for i in optimizer._clocks:
            table, clock = (variables[i], averages[i]), optimizer._clocks[i].average
            if clock is not None:
                by_kernel = kernel and kernel_rows.averages_rows(*table)
                found[i] = Table(*table, clock, self.momentum(), by_kernel)
        return found

    def share(self, own: frozenset[str]) -> Share | None:
        """Return the decay rate, for averages in the update itself; None: they wait.

        Args:
            own: The hooks that a subclass overrides.
        """
        if own or self._optimizer.gradient_accumulation_steps:
            return None  # Keras averages at each call, also at those that only sum up
        return Share(self.momentum(), self._optimizer.iterations)

    def read(
        self, parts: Sequence[Part], own: frozenset[str], *, kernel: bool
    ) -> tuple[Sequence[Part], dict[int, Any]]:
        """Return the averages of rows whose weights a step is about to change.

        Args:
            parts: The parts of the step.
            own: The hooks that a subclass overrides: then all averages are dense.
            kernel: Whether a native kernel may bring them up to date instead.

        Returns:
            See `before_step`.
        """
        tables = self.tables(kernel=kernel)
        if own:
            for table in tables.values():
                table.catch_up()
        if own or not tables:
            return parts, {}
        return before_step(tables, parts, self._optimizer.iterations)

    def follow(
        self,
        parts: Sequence[Part],
        before: Mapping[int, Any],
        done: Sequence[Any],
        *,
        kernel: bool = False,
    ) -> None:
        """Let avg <- m avg + (1 - m) w; at first avg <- w.

        Args:
            parts: The parts of the step.
            before: What `read` returned.
            done: Averages that were updated with their weights.
            kernel: As for `read`.
        """
        optimizer, ids = self._optimizer, {id(average) for average in done}
        rows = {part.variable_index: part.ids for part in parts if part.ids is not None}
        if optimizer.gradient_accumulation_steps:
            rows = {}  # at calls that only sum up, averages follow, too: of all rows
        follow(
            optimizer._trainable_variables,
            [None if id(x) in ids else x for x in optimizer._weight_averages],
            rows,
            optimizer.iterations,
            self.momentum(),
            self.tables(kernel=kernel),
            before,
        )

    def has_more_than(self, parts: Sequence[Part]) -> bool:
        """Whether it does more after a step than to update the averages of parts."""
        count = len(self._optimizer._trainable_variables)
        return bool(self._optimizer.ema_overwrite_frequency) or len(parts) < count

    def overwrite(self, state: Sequence[Any]) -> None:
        """Give the weights the values of their averages at each n-th update.

        Args:
            state: The variables that this may change.
        """
        optimizer = self._optimizer
        n = optimizer.ema_overwrite_frequency
        if n:
            variables = optimizer._trainable_variables
            backend.either(
                (optimizer.iterations + 1) % n == 0,
                lambda: optimizer._overwrite_model_variables_with_average_value(
                    variables
                ),
                lambda: None,
                state,
            )

    def replace(self, variables: Sequence[Any]) -> None:
        """Give trainable variables the values of their averages, where they have one.

        Args:
            variables: Variables of the model.
        """
        optimizer = self._optimizer
        if self.are_new():  # all steps were skipped, or there was none
            self.start()
        index_of = optimizer._trainable_variables_indices
        known = [
            v
            for v in variables
            if optimizer._var_key(v) in index_of and getattr(v, "trainable", True)
        ]
        indices = list(map(optimizer._get_variable_index, known))
        for i, table in self.tables().items():
            if i in indices:
                table.catch_up()
        replace(known, [optimizer._weight_averages[i] for i in indices])
