"""A step, stage by stage: read `take` from the top.

`take` defines two functions: Skip, at its end, guards `step`, which calls `update`.
Each stage is a call, handed what it needs, below a comment with its name and what it
does to gradient g, weights w, their EMA avg, sums G, learning rate eta and count t.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from keras_rmsprop import clipping, hooks
from keras_rmsprop.accumulating import Accumulation
from keras_rmsprop.automatic import Search
from keras_rmsprop.averages import Averages
from keras_rmsprop.backends import current as backend
from keras_rmsprop.skipping import Skipping
from keras_rmsprop.tables import Tables, of_table, parts_of
from keras_rmsprop.update import Constants, Part, Update, update_one


class Feature(Protocol):
    """A part of the optimizer with variables, and a stage of the step, of its own."""

    def __init__(self, optimizer: Any) -> None: ...

    def is_on(self) -> bool:
        """Whether steps have its stage."""

    def build(self, variables: Sequence[Any]) -> None:
        """Make its variables for those of the model."""

    def why_all_rows(self, variable: Any) -> str:
        """Return why a step must update all rows of a table; empty: it need not."""


FEATURES: tuple[type[Feature], ...] = Skipping, Accumulation, Averages, Search, Tables
"""The features there are. Without one, steps lack its stage."""

F = TypeVar("F", bound=Feature)


class Taker(Protocol):
    """What a step asks of the optimizer's `stepping.Steps`."""

    optimizer: Any

    @property
    def jit_compile(self) -> bool | str:
        """The option; a subclass' own step is not compiled unless it is `True`."""

    def on(self, kind: type[F]) -> F | None:
        """Return a feature if there is one of this kind, and it is on."""

    def own(self) -> frozenset[str]:
        """Return the hooks that a subclass overrides."""

    def has_kernel(self) -> bool:
        """Whether a native kernel may sum up gradients and follow variables here."""

    def prepare(self, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Check gradients; make slots for variables that have none."""

    def updates_of(self, parts: Sequence[Part]) -> list[Update]:
        """Return what a step does to variables."""

    def is_apart(self, part: Part) -> bool:
        """Whether a part is a table that steps as `tables.of_table` says."""

    def constants(self, rate: Any, scale: Any = None) -> Constants:
        """Return what is the same for all variables of a step."""


def take(
    steps: Taker,
    grads: Sequence[Any],
    variables: Sequence[Any],
    rate: Any = None,
    in_program: bool = False,
) -> None:
    """Take a step.

    Args:
        steps: The optimizer's.
        grads: A tensor, slices or None for each variable.
        variables: The variables.
        rate: The learning rate; None: the current one. With "auto" the factor on the
            estimated one.
        in_program: Whether this is traced for a program that holds nothing else.
    """
    optimizer = steps.optimizer
    # Check: shapes and dtypes fit, slots exist, there is a gradient.
    steps.prepare(grads, variables)
    optimizer._filter_empty_gradients(grads, variables)
    tables, skipping = steps.on(Tables), steps.on(Skipping)
    sums, averages = steps.on(Accumulation), steps.on(Averages)
    search = steps.on(Search)
    own, kernel = steps.own(), steps.has_kernel()
    rate = optimizer.learning_rate if rate is None else rate
    state = [*optimizer._trainable_variables, *optimizer._variables]
    # Distinct rows: g <- the sum of the slices of each row; float32 at least.
    clocks = tables.in_step(grads, variables, own) if tables else {}
    index_of = optimizer._get_variable_index
    given, checks = parts_of(grads, variables, clocks, index_of, kernel=kernel)

    def step() -> None:
        parts, waiting = (
            averages.read(given, own, kernel=kernel) if averages else (given, {})
        )
        # Overwrite: w <- g, for float8 scales.
        parts = overwritten(optimizer, parts)
        # Unscale: g <- g / loss_scale_factor.
        parts = unscaled(parts, optimizer.loss_scale_factor)
        # Accumulate: G <- G + g; each n-th call g <- (G + g) / n, G <- 0, update.
        done = sums.take(parts, update, state) if sums else update(parts)
        # Average: avg <- m avg + (1 - m) w; w <- avg, at each n-th update.
        if averages:
            if not hooks.average(optimizer, own):
                averages.follow(parts, waiting, done)
            averages.overwrite(state)
        # Constrain: w <- constraint(w).
        constrain(parts)
        # Count: t <- t + 1, unless the update did.
        if not any(variable is optimizer._iterations for variable in done):
            backend.count(optimizer._iterations)
        if tables:
            tables.keep_current(parts)

    def update(parts: Sequence[Part]) -> list[Any]:
        # Clip: g <- g min(1, most / |g|); the scale may wait for the update.
        parts, scale = clipping.clipped(parts, optimizer, own, kernel=kernel)
        # If nothing else is left to do, a kernel may search and count in the update.
        count = optimizer._iterations if is_last(steps, parts) else None
        fuse, found = count is not None, rate
        # Search: eta <- (1 - mu) d eta, with the distance d of "auto".
        if search:
            found = search.rate(parts, rate, scale, kernel=kernel, fuse=fuse)
        with hooks.rate_in_force(optimizer, found):
            # Decay: w <- (1 - eta omega) w, if a subclass steps; else in the update.
            hooks.decay(optimizer, parts, own)
            if hooks.update(optimizer, parts, found, own):
                return []
            return update_all(steps, parts, found, scale, count, in_program=in_program)

    scope = backend.scope(optimizer.name, convertible=steps.jit_compile is False)
    with scope, backend.after(checks):
        # Skip: if a gradient is not finite, nothing changes but a counter.
        if skipping:
            grads = [part.gradient for part in given]
            finite = backend.all_finite(grads, kernel=kernel)
            skipping.take(step, finite, backend.either, state)
        else:
            step()


def update_all(
    steps: Taker,
    parts: Sequence[Part],
    rate: Any,
    scale: Any = None,
    count: Any = None,
    *,
    in_program: bool = False,
) -> list[Any]:
    """Update variables with their gradients.

    Args:
        steps: The optimizer's.
        parts: The variables, with clipped gradients.
        rate: The learning rate.
        scale: What gradients are still to be multiplied by; None: 1.
        count: A counter that may be incremented with them, or None.
        in_program: See `take`.

    Returns:
        What was updated with them: averages of weights, the counter.
    """
    optimizer, own = steps.optimizer, steps.own()
    if own & hooks.UPDATE_STEP:
        for part in parts:
            variable = backend.for_update_step(part.variable)
            optimizer.update_step(part.gradient, variable, rate)
        return []
    # Update: the rule, v <- rho v + (1 - rho) g^2, w <- w - eta g / sqrt(v + eps).
    constants, done = steps.constants(rate, scale), list[Any]()
    apart, others = list[Part](), list[Part]()
    for part in parts:
        (apart if steps.is_apart(part) else others).append(part)
    search = steps.on(Search)
    lead = search.lead_of_tables() if search and apart else 1
    for update in steps.updates_of(apart):
        of_one = of_table(update, constants, lead)
        done += backend.update(*of_one, in_program=in_program)
    if others:
        constants = constants._replace(count=count)
        updates = steps.updates_of(others)
        done += backend.update(updates, constants, in_program=in_program)
    return done


def is_last(steps: Taker, parts: Sequence[Part]) -> bool:
    """Whether only the count is left to do after the update of these parts.

    That is so only if averages are updated with their weights. Those of tables that
    step apart follow later, and need the count as it is.
    """
    averages = steps.on(Averages)
    return not (
        steps.own()
        or steps.on(Accumulation)
        or any(part.variable.constraint is not None for part in parts)
        or any(steps.is_apart(part) for part in parts)
        or (averages and averages.has_more_than(parts))
    )


def update_variable(steps: Taker, gradient: Any, variable: Any, rate: Any) -> None:
    """Update one variable, for a subclass' `update_step`.

    Args:
        steps: The optimizer's.
        gradient: Its gradient.
        variable: The variable.
        rate: The learning rate.
    """
    optimizer = steps.optimizer
    index = optimizer._get_variable_index(variable)
    part = Part(index, optimizer._trainable_variables[index], gradient)
    [update], constants = steps.updates_of([part]), steps.constants(rate)
    search = steps.on(Search)
    if search and steps.is_apart(part):
        lead = search.lead_of_tables()
        [update], constants = of_table(update, constants, lead)
    if steps.own() & hooks.UPDATE_STEP:
        assign, assign_sub = optimizer.assign, optimizer.assign_sub
        update_one(update._replace(rows=None), constants, assign, assign_sub)
    else:
        backend.update([update], constants, in_program=False)


def overwritten(optimizer: Any, parts: Sequence[Part]) -> Sequence[Part]:
    """Let Keras give float8 scales the values of their gradients; return the others."""
    scales = [p for p in parts if getattr(p.variable, "overwrite_with_gradient", False)]
    if not scales:
        return parts
    optimizer._overwrite_variables_directly_with_gradients(
        [part.gradient for part in scales], [part.variable for part in scales]
    )
    return [part for part in parts if part not in scales]


def unscaled(parts: Sequence[Part], factor: Any) -> Sequence[Part]:
    """Return gradients of the loss, given those of the loss times a factor."""
    if factor is None:
        return parts
    return [part._replace(gradient=part.gradient / factor) for part in parts]


def constrain(parts: Sequence[Part]) -> None:
    """Let w <- constraint(w), where a variable has one."""
    for part in parts:
        if part.variable.constraint is not None:
            part.variable.assign(part.variable.constraint(part.variable))
