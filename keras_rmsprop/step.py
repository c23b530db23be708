"""A step, stage by stage: read `Steps.take` from the top.

Each stage is a call, handed what it needs, below a comment with its name and what it
does to gradient g, weights w, their EMA avg, sums G, learning rate eta and count t.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from keras_rmsprop import clipping, hooks, options, rule
from keras_rmsprop.accumulating import Accumulation
from keras_rmsprop.automatic import Search
from keras_rmsprop.averages import Averages
from keras_rmsprop.backends import current as backend
from keras_rmsprop.codecs import Draw, are_in_blocks
from keras_rmsprop.skipping import Skipping
from keras_rmsprop.tables import Tables, parts_of
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


class Steps:
    """Takes the steps of one optimizer.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.programs = backend.programs()
        self.features = {kind: kind(optimizer) for kind in FEATURES}

    def on(self, kind: type[F]) -> F | None:
        """Return a feature if there is one of this kind, and it is on."""
        feature: Any = self.features.get(kind)
        return feature if feature is not None and feature.is_on() else None

    def take(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        rate: Any = None,
        in_program: bool = False,
    ) -> None:
        """Take a step.

        Args:
            grads: A tensor, slices or None for each variable.
            variables: The variables.
            rate: The learning rate; None: the current one.
            in_program: Whether this is traced for a program that holds nothing else.
        """
        optimizer = self.optimizer
        # Check: shapes and dtypes fit, slots exist, there is a gradient.
        self.prepare(grads, variables)
        optimizer._filter_empty_gradients(grads, variables)
        tables, skipping = self.on(Tables), self.on(Skipping)
        sums, averages = self.on(Accumulation), self.on(Averages)
        own, kernel = optimizer._own(), self.has_kernel()
        rate = optimizer.learning_rate if rate is None else rate
        state = [*optimizer._trainable_variables, *optimizer._variables]
        # Distinct rows: g <- the sum of the slices of each row; float32 at least.
        clocks = tables.in_step(grads, variables, own) if tables else {}
        index_of = optimizer._get_variable_index
        given, checks = parts_of(grads, variables, clocks, index_of, kernel=kernel)

        def step() -> None:
            before = averages.read(given, own) if averages else {}
            # Overwrite: w <- g, for float8 scales.
            parts = overwritten(optimizer, given)
            # Unscale: g <- g / loss_scale_factor.
            parts = unscaled(parts, optimizer.loss_scale_factor)
            # Accumulate: G <- G + g; each n-th call g <- (G + g) / n, G <- 0, update.
            done = sums.take(parts, update, state) if sums else update(parts)
            # Average: avg <- m avg + (1 - m) w; w <- avg, at each n-th update.
            if averages:
                if not hooks.average(optimizer, own):
                    averages.follow(parts, before, done)
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
            with hooks.rate_in_force(optimizer, rate):
                # Decay: w <- (1 - eta omega) w, if a subclass does; else in the update.
                hooks.decay(optimizer, parts, own)
                if hooks.update(optimizer, parts, rate, own):
                    return []
                count = optimizer._iterations if self.is_last(parts) else None
                return self.update(parts, rate, scale, count, in_program=in_program)

        scope = backend.scope(optimizer.name, convertible=self.jit_compile is False)
        with scope, backend.after(checks):
            # Skip: if a gradient is not finite, nothing changes but a counter.
            if skipping:
                grads = [part.gradient for part in given]
                finite = backend.all_finite(grads, kernel=kernel)
                skipping.take(step, finite, backend.either, state)
            else:
                step()

    def update(
        self,
        parts: Sequence[Part],
        rate: Any,
        scale: Any = None,
        count: Any = None,
        *,
        in_program: bool = False,
    ) -> list[Any]:
        """Update variables with their gradients.

        Args:
            parts: The variables, with clipped gradients.
            rate: The learning rate; with "auto" the factor on the estimated one.
            scale: What gradients are still to be multiplied by; None: 1.
            count: A counter that may be incremented with them, or None.
            in_program: See `take`.

        Returns:
            What was updated with them: averages of weights, the counter.
        """
        optimizer, own = self.optimizer, self.optimizer._own()
        # Search: eta <- (1 - mu) d eta, with the distance d of "auto".
        if search := self.on(Search):
            rate = search.rate(parts, rate, scale, kernel=self.has_kernel())
        if own & hooks.UPDATE_STEP:
            for part in parts:
                optimizer.update_step(part.gradient, part.variable, rate)
            return []
        # Update: the rule, v <- rho v + (1 - rho) g^2, w <- w - eta g / sqrt(v + eps).
        updates = list(map(self.update_of, parts))
        constants = self.constants(rate, scale)._replace(count=count)
        return backend.update(updates, constants, in_program=in_program)

    def is_last(self, parts: Sequence[Part]) -> bool:
        """Whether only the count is left to do after the update of these parts.

        If averages are updated with their weights.
        """
        optimizer, averages = self.optimizer, self.on(Averages)
        return not (
            optimizer._own()
            or self.on(Accumulation)
            or any(part.variable.constraint is not None for part in parts)
            or (averages and averages.has_more_than(parts))
        )

    def update_one(self, gradient: Any, variable: Any, rate: Any) -> None:
        """Update one variable, for a subclass' `update_step`.

        Args:
            gradient: Its gradient.
            variable: The variable.
            rate: The learning rate.
        """
        optimizer = self.optimizer
        part = Part(optimizer._get_variable_index(variable), variable, gradient)
        update, constants = self.update_of(part), self.constants(rate)
        if optimizer._own() & hooks.UPDATE_STEP:
            assign, assign_sub = optimizer.assign, optimizer.assign_sub
            update_one(update._replace(rows=None), constants, assign, assign_sub)
        else:
            backend.update([update], constants, in_program=False)

    def update_of(self, part: Part) -> Update:
        """Return what a step does to a variable."""
        optimizer, i = self.optimizer, part.place
        tables, averages = self.on(Tables), self.on(Averages)
        return Update(
            part.variable,
            part.gradient,
            optimizer._slots_of(i),
            optimizer._decay_of(part.variable),
            tables.rows_of(i, part.ids) if tables else None,
            optimizer._weight_averages[i] if averages else None,
        )

    def constants(self, rate: Any, scale: Any = None) -> Constants:
        """Return what is the same for all variables of a step."""
        optimizer, averages = self.optimizer, self.on(Averages)
        numbers = (getattr(optimizer, name) for name in rule.Options._fields)
        return Constants(
            rule.Options(*numbers),
            rate,
            Draw(optimizer._offset, optimizer.iterations),
            optimizer.decoupled_weight_decay,
            scale,
            self.jit_compile is not False,
            averages.share(optimizer._own()) if averages else None,
        )

    # Before the step: which way it is taken. `backends/base.py` asks these.

    def run(self, grads: list[Any], variables: Sequence[Any]) -> None:
        """Take a step in the fastest way: as a program, or stage by stage.

        Args:
            grads: A tensor, slices or None for each variable.
            variables: The variables.
        """
        if not self.optimizer.built or backend.has_slices(grads):
            self.prepare(grads, variables)
        backend.run(self, grads, variables)

    def prepare(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Check gradients; only then make slots for variables that have none.

        Returns:
            The optimizer's variables.
        """
        for gradient, variable in zip(grads, variables, strict=True):
            backend.check(gradient, variable)
        self.optimizer._build_for(list(variables))
        self.check_made()
        found: list[Any] = self.optimizer._variables
        return found

    def check_made(self) -> None:
        """Check that no option was switched on whose variables were not made."""
        optimizer, mine = self.optimizer, vars(self.optimizer)
        options.check_made(
            {
                "momentum": (optimizer.momentum, bool(mine.get("_momentums", True))),
                "centered": (
                    optimizer.centered,
                    bool(mine.get("_average_gradients", True)),
                ),
                "use_ema": (optimizer.use_ema, "_weight_averages" in mine),
                "gradient_accumulation_steps": (
                    optimizer.gradient_accumulation_steps,
                    "_accumulated_gradients" in mine,
                ),
                "skip_nonfinite": (
                    optimizer.skip_nonfinite,
                    not isinstance(optimizer.skipped_steps, int),
                ),
            }
        )

    def new_tables(self, grads: Sequence[Any], variables: Sequence[Any]) -> set[int]:
        """Return the tables that get a last-update counter with this step."""
        tables = self.on(Tables)
        return tables.to_be(grads, variables) if tables else set()

    def make_clocks(self, tables: Iterable[int]) -> None:
        """Make the last-update counters of tables."""
        optimizer, clocks = self.optimizer, self.optimizer._clocks
        for i in sorted(tables):
            key = optimizer._var_key(optimizer._trainable_variables[i])
            clocks.make(i, stays_current=key in clocks.refused)

    def forget_attributes(self) -> None:
        """Say that an attribute of the optimizer was assigned."""
        if self.programs is not None:
            self.programs.forget_attributes()

    @property
    def learning_rate(self) -> Any:
        """The learning rate: a variable, or the present value of anything else."""
        return self.optimizer.learning_rate

    @property
    def jit_compile(self) -> bool | str:
        """The option; with "auto" a subclass' step runs as Keras runs it."""
        wanted: bool | str = self.optimizer.jit_compile
        is_own = wanted == "auto" and self.optimizer._own() & hooks.UPDATE_STEP
        return False if is_own else wanted

    def has_kernel(self) -> bool:
        """Whether a native kernel may sum up gradients and follow variables here."""
        variables = self.optimizer._trainable_variables
        return self.jit_compile is not False and backend.has_kernel(variables)

    def attributes(self) -> Mapping[str, Any]:
        """Return the optimizer's attributes, which a trace holds as constants."""
        return vars(self.optimizer)

    def also_constant(self) -> tuple[Hashable, ...]:
        """Return what else a trace holds as constants."""
        optimizer = self.optimizer
        clocks: tuple[Hashable, ...] = (*optimizer._clocks,)
        if not (optimizer.use_ema and optimizer.ema_overwrite_frequency):
            return clocks
        return *clocks, *(v.trainable for v in optimizer._trainable_variables)

    def is_for_kernel(self, variables: Sequence[Any]) -> bool:
        """Whether a native kernel runs nearly all of a step of these variables.

        What else there may be to do, XLA does faster than one operation after another.
        """
        optimizer = self.optimizer
        others = (
            *(optimizer.clipnorm, optimizer.clipvalue, optimizer.loss_scale_factor),
            optimizer.gradient_accumulation_steps,
            *(getattr(variable, "constraint", None) for variable in variables),
        )
        does_more = optimizer._own() or any(x is not None for x in others)
        if self.jit_compile != "auto" or does_more or not optimizer._knows(variables):
            return False
        return backend.is_for_kernel(self.updates_of(variables), self.constants(0.0))

    def updates_of(self, variables: Sequence[Any]) -> list[Update]:
        """Return what a step would do to variables, without gradients."""
        index_of = self.optimizer._get_variable_index
        return [self.update_of(Part(index_of(v), v, None)) for v in variables]

    def has_blocks(self) -> bool:
        """Whether slots of any variable are stored in blocks."""
        optimizer = self.optimizer
        count = len(optimizer._velocities) if optimizer.built else 0
        return any(are_in_blocks(optimizer._slots_of(i)) for i in range(count))


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
