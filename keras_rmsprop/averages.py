"""Averages of the weights (`use_ema`): they follow them, and can replace them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_rmsprop import options
from keras_rmsprop.backends import current as backend
from keras_rmsprop.ema_share import Momentum, Share, begin_of
from keras_rmsprop.slots import EMA_BEGIN
from keras_rmsprop.state import copied
from keras_rmsprop.update import Part

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_rmsprop import row_averages, sparse
    from keras_rmsprop.kernel import rows as kernel_rows


def follow(
    variables: Sequence[Any],
    averages: Sequence[Any],
    rows: Mapping[int, Any],
    iterations: Any,
    momentum: Momentum,
    waiting: Mapping[int, Any],
) -> None:
    """Let averages follow their variables: avg <- m avg + (1 - m) w; first avg <- w.

    Args:
        variables: The variables.
        averages: The average of each, or None.
        rows: The rows that were updated, by the index of their table, for tables of
            which only some rows were. If a table is not in `waiting`, the averages of
            its other rows do not follow.
        iterations: How many updates there were.
        momentum: Gives m.
        waiting: What `row_averages.before_step` returned.
    """
    pairs = [*zip(variables, averages, strict=True)]
    dtypes = {average.dtype for average in averages if average is not None}
    momentums = {dtype: momentum.at(iterations, dtype) for dtype in dtypes}
    for i, (variable, average) in enumerate(pairs):
        if average is None:
            continue
        m = momentums[average.dtype]
        if i in waiting:
            table, read = waiting[i]
            table.follow(rows.get(i), read, m, iterations)
        elif i in rows:
            tf.cond(
                tf.equal(iterations, 0),
                functools.partial(sparse.copy, average, variable),
                functools.partial(sparse.mix, average, variable, rows[i], m),
            )
        else:
            weights = ops.cast(variable, average.dtype)
            average.assign(m * average + (1 - m) * weights)


def replace(variables: Sequence[Any], averages: Sequence[Any]) -> None:
    """Give variables the values of their averages, where they have one.

    As in Keras, averages follow weights before their constraint; here it is met.
    """
    for variable, average in zip(variables, averages, strict=True):
        if average is not None:
            value = ops.cast(average, variable.dtype)
            if variable.constraint is not None:
                value = variable.constraint(value)
            # A copy: on JAX both would share one buffer, and give it away twice.
            variable.assign(ops.copy(value))


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

    def tables(self, *, kernel: bool = False) -> dict[int, Any]:
        """Return the tables in whose averages rows may wait, by their index.

        Args:
            kernel: Whether a native kernel may follow rows.

        Returns:
            A `row_averages.Table` each.
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
                found[i] = row_averages.Table(*table, clock, self.momentum(), by_kernel)
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
    ) -> tuple[Sequence[Part], Mapping[int, Any]]:
        """Bring up to date averages that depend on weights that a step will change.

        Args:
            parts: The parts of the step.
            own: The hooks that a subclass overrides: then all averages are dense.
            kernel: Whether a native kernel may do it.

        Returns:
            See `row_averages.before_step`.
        """
        tables = self.tables(kernel=kernel)
        if own:
            for table in tables.values():
                table.catch_up()
        if own or not tables:
            return parts, {}
        return row_averages.before_step(tables, parts, self._optimizer.iterations)

    def follow(
        self, parts: Sequence[Part], waiting: Mapping[int, Any], done: Sequence[Any]
    ) -> None:
        """Let avg <- m avg + (1 - m) w; at first avg <- w.

        Args:
            parts: The parts of the step.
            waiting: What `read` returned.
            done: Averages that were updated with their weights.
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
            waiting,
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
