"""Tables: which rows a step updates, and why it must update all of some.

Where only the rows of a batch change, a table has a last-update counter for each row
(`clocks.Clock`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_rmsprop import codecs, options
from keras_rmsprop.averages import Averages
from keras_rmsprop.backends import current as backend
from keras_rmsprop.update import Constants, Part, Update

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop import catching_up, sparse


OPTIONS_OF_ROWS = (
    *("rho", "centered", "sparse_update"),
    *("use_ema", "ema_momentum", "ema_warmup"),
    "_self_update_uid",
)
"""The options that decide how rows without a gradient are brought up to date; and what
TensorFlow sets before it restores a checkpoint, which may hold no counters."""


DENSE_RATIO = 4
"""Under XLA, a table of at most so many times the slices of its gradient is updated as
a whole: in loops on all cores, where rows are written one by one."""
UNKNOWN_SLICES = 2**11
"""How many slices there are taken to be where their number is not known yet."""
EPSILON_IN_SQUARES = 10
"""Epsilon of a table with "auto", as a multiple of a typical square of its gradient."""


class Tables:
    """Says which tables a step updates by rows, and keeps their counters current.

    Args:
        optimizer: The optimizer, with the counters of its tables in `_clocks`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def is_on(self) -> bool:
        """Whether the backend has sparse gradients."""
        return backend.has_rows

    def build(self, variables: Sequence[Any]) -> None:
        """Tell other optimizers which tables this one updates from now on.

        A table gets a counter with its first sparse gradient.
        """
        if self.is_on():
            self._optimizer._clocks.share()

    def to_be(self, grads: Sequence[Any], variables: Sequence[Any]) -> set[int]:
        """Return the tables that get a counter with this step, by their index.

        Once a traced graph has updated a table without a counter, the table never gets
        one, as the graph would not increment it: it is marked in `clocks.refused`.
        """
        optimizer, found = self._optimizer, set()
        clocks, index_of = optimizer._clocks, optimizer._trainable_variables_indices
        for gradient, variable in zip(grads, variables, strict=True):
            if not backend.is_slices(gradient):
                continue
            clocks.sparse.add(optimizer._var_key(variable))
            index = optimizer._get_variable_index(variable)
            if index not in clocks and not optimizer._steps.why_all_rows(variable):
                sparse.check_ids(gradient, variable)
                found.add(index)
        if not backend.is_eager():
            with_clock = found.union(clocks)
            for gradient, variable in zip(grads, variables, strict=True):
                key = optimizer._var_key(variable)
                if gradient is not None and index_of.get(key) not in with_clock:
                    clocks.refused.add(key)
            if optimizer.use_ema and optimizer.ema_overwrite_frequency:
                # Averages replace the weights of all, those without a gradient, too.
                clocks.refused |= {
                    key for key, i in index_of.items() if i not in with_clock
                }
        return found

    def in_step(
        self, grads: Sequence[Any], variables: Sequence[Any], own: frozenset[str]
    ) -> dict[int, Any]:
        """Return the counters of the tables whose rows suffice for a step.

        Args:
            grads: A tensor, slices or None for each variable.
            variables: The variables.
            own: The hooks that a subclass overrides.

        Returns:
            The counters, by the position of the gradient in `grads`.
        """
        optimizer = self._optimizer
        clocks = optimizer._clocks
        if not clocks:
            return {}
        is_exact = optimizer.sparse_update != "lazy"
        may_be_whole = is_exact and backend.inside_xla()
        if optimizer.gradient_accumulation_steps and may_be_whole:
            return {}  # how many rows have sums is not known there
        indices = [optimizer._get_variable_index(v) for v in variables]
        if own:
            for i in {*indices} & {*clocks}:
                self.catch_up(i)  # such a step knows no counter
            return {}
        return {
            position: clocks[i]
            for position, (gradient, variable, i) in enumerate(
                zip(grads, variables, indices, strict=True)
            )
            if backend.is_slices(gradient)
            and i in clocks
            and indices.count(i) == 1
            and not (may_be_whole and is_small(variable, gradient))
            and not optimizer._steps.why_all_rows(variable)
        }

    def why_all_rows(self, variable: Any) -> str:
        """Return why a step must not leave out rows without a gradient, or nothing."""
        optimizer = self._optimizer
        key = optimizer._var_key(variable)
        i = optimizer._trainable_variables_indices.get(key)
        if options.is_tensor(optimizer.rho):
            return "`rho` may change unseen"
        if i is not None and codecs.are_in_blocks(optimizer._steps.slots_of(i)):
            return "its slots are stored in blocks, not in rows"
        if options.is_on(optimizer.momentum) and optimizer._auto is None:
            return "`momentum` moves rows without a gradient"
        if optimizer._steps.decay_of(variable) is not None:
            return "`weight_decay` moves rows without a gradient"
        if key in optimizer._clocks.refused:
            return "a graph updates the table densely"
        return ""

    def keep_current(self, parts: Sequence[Part]) -> None:
        """Catch up at once tables that a graph without counters updates, too."""
        for part in parts:
            if (
                part.ids is not None
                and self._optimizer._clocks[part.variable_index].stays_current
            ):
                self.catch_up(part.variable_index)

    def catch_up(self, i: int) -> None:
        """Bring all rows of a table up to date: of slots, search and averages."""
        optimizer, search = self._optimizer, self._optimizer._search
        shape = optimizer._trainable_variables[i].shape
        catching_up.catch_up(
            optimizer._clocks[i],
            optimizer._steps.slots_of(i),
            optimizer.rho,
            codecs.Draw(optimizer._offset, optimizer.iterations),
            gradient_sums=search and search.sums[i],
            sample=search and search.options.sample(shape),
            average=Averages(optimizer).tables().get(i),
        )

    def caught_up(self, i: int, slots: Any) -> Any:
        """Return the slots of a table, with all rows brought up to date."""
        rows = self.rows_of(i, None)
        rho = self._optimizer.rho
        return slots if rows is None else sparse.caught_up(slots, rows, rho)

    def rows_of(self, i: int, ids: Any) -> Any:
        """Return the rows of a table that a step updates; None if it has no counter."""
        if i not in self._optimizer._clocks:
            return None
        return sparse.Rows(self._optimizer._clocks[i], ids)


def of_table(
    update: Update, constants: Constants, lead: Any
) -> tuple[list[Update], Constants]:
    """Return the update of a table with "auto", and its constants.

    Its rate does not fade, and is not less for momentum that it does not have. It
    decays as others do.
    Epsilon, unless it was given, is ten times `typical_square` of the gradient: else a
    row that is rarely seen, whose v has faded, would go all the way for the least
    gradient. Where no element is without one, as of a table of positions, v has not
    faded, and epsilon is that of others.

    Args:
        update: What a step does to the table, without momentum.
        constants: What is the same for all other variables.
        lead: By how much its rate is larger: see `Search.lead_of_tables`.
    """
    numbers = constants.options
    mu, epsilon = numbers.momentum, numbers.epsilon
    as_found = isinstance(epsilon, float) and epsilon == options.AUTO["epsilon"]
    if update.gradient is not None and as_found:
        kernel = constants.kernel and backend.has_kernel([update.variable])
        total, count = backend.logs(update.gradient, kernel=kernel)
        typical = EPSILON_IN_SQUARES * typical_square(total, count)
        if constants.scale is not None:
            typical *= ops.cast(ops.square(constants.scale), typical.dtype)
        # Beside an infinite epsilon there would be no steps.
        is_rare = ops.not_equal(count, math.prod(update.variable.shape))
        counts = ops.logical_and(is_rare, ops.isfinite(typical))
        typical = ops.where(counts, typical, 0)
        typical = typical if numbers.epsilon_inside_sqrt else ops.sqrt(typical)
        constants = constants._replace(
            options=numbers._replace(epsilon=typical + epsilon)
        )
    lead = lead / (1 - mu)
    if update.decay is not None and constants.decoupled_weight_decay:
        update = update._replace(decay=update.decay / lead)
    rate = ops.multiply(constants.learning_rate, lead)
    return [update], constants._replace(learning_rate=rate)


def typical_square(total: Any, count: Any) -> Any:
    """Return the geometric mean of g^2, where it is not 0; 0 if there is none.

    In this mean the few large ones, of rows that are seen often, count little. What is
    not finite does not count: it must not spoil other rows.

    Args:
        total: The sum of ln |g|, where it is finite; see `Backend.logs`.
        count: Of how many elements.
    """
    count = ops.cast(count, total.dtype)
    return ops.exp(2 * total / ops.maximum(count, 1)) * ops.minimum(count, 1)


def is_small(table: Any, gradient: Any) -> bool:
    """Whether XLA updates a table faster as a whole than by the rows of slices."""
    slices = gradient.indices.shape.num_elements()
    slices = UNKNOWN_SLICES if slices is None else slices
    return bool(table.shape[0] <= DENSE_RATIO * slices)


def parts_of(
    grads: Sequence[Any],
    variables: Sequence[Any],
    clocks: Mapping[int, Any],
    index_of: Any,
    *,
    kernel: bool,
) -> tuple[list[Part], list[Any]]:
    """Return the parts of a step, and what fails if a gradient does not fit.

    Args:
        grads: A tensor, slices or None for each variable.
        variables: The variables.
        clocks: The counters of tables whose rows suffice, by the position of the
            gradient.
        index_of: Function from a variable to its index.
        kernel: Whether a native kernel may sum up.
    """
    tensors, ids, checks = backend.widened(grads, variables, clocks, kernel=kernel)
    parts = [
        Part(index_of(variable), variable, gradient, rows)
        for variable, gradient, rows in zip(variables, tensors, ids, strict=True)
        if gradient is not None
    ]
    return parts, checks
