"""`Steps` ties `step.take` to an optimizer, and answers how its steps run."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from keras_rmsprop import hooks, options, rule, step
from keras_rmsprop.automatic import Search
from keras_rmsprop.averages import Averages
from keras_rmsprop.backends import current as backend
from keras_rmsprop.building import build_for, is_apart, knows, slots_of
from keras_rmsprop.codecs import Draw, are_in_blocks
from keras_rmsprop.step import F, update_all, update_variable
from keras_rmsprop.tables import Tables
from keras_rmsprop.update import Constants, Part, Update


class Steps:
    """Takes the steps of one optimizer, each as `step.take` says.

    Args:
        optimizer: The optimizer.
        base: The class to compare with: a method that differs from its is an override.
    """

    def __init__(self, optimizer: Any, base: type) -> None:
        self.optimizer, self._base = optimizer, base
        self.programs = backend.programs()
        self.features = {kind: kind(optimizer) for kind in step.FEATURES}

    def on(self, kind: type[F]) -> F | None:
        """Return a feature if there is one of this kind, and it is on."""
        feature: Any = self.features.get(kind)
        return feature if feature is not None and feature.is_on() else None

    @property
    def search(self) -> Search | None:
        """The search for a learning rate; None: there is none."""
        return self.on(Search)

    def own(self) -> frozenset[str]:
        """Return the hooks that a subclass, or this instance, overrides."""
        return hooks.own(self.optimizer, self._base)

    def take(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        rate: Any = None,
        in_program: bool = False,
    ) -> None:
        """Take a step, stage by stage; see `step.take`."""
        step.take(self, grads, variables, rate, in_program)

    def update(self, grads: Sequence[Any], variables: Sequence[Any], rate: Any) -> None:
        """Update variables with their gradients, for a subclass' hook."""
        indices = map(self.optimizer._get_variable_index, variables)
        update_all(self, [*map(Part, indices, variables, grads)], rate)

    def update_one(self, gradient: Any, variable: Any, rate: Any) -> None:
        """Update one variable with its gradient, for a subclass' `update_step`."""
        update_variable(self, gradient, variable, rate)

    # What a step does to a variable.

    def slots_of(self, i: int) -> rule.Slots:
        """Return the slots of a variable that are in use, by its index."""
        return slots_of(self.optimizer, i)

    def decay_of(self, variable: Any) -> Any:
        """Return the weight decay that is a part of a variable's update, or None."""
        decay = self._decay()
        if decay is None or not self.optimizer._use_weight_decay(variable):
            return None
        return decay

    def _decay(self) -> Any:
        optimizer = self.optimizer
        decay = optimizer.weight_decay
        if not options.is_on(decay) or hooks.decays_apart(optimizer, self.own()):
            return None
        return decay

    def why_all_rows(self, variable: Any) -> str:
        """Return why a step must update all rows of a table; empty: it need not."""
        if self.own():
            return "a subclass's step takes whole gradients"
        if self.optimizer.sparse_update == "lazy":
            return ""
        whys = (f.why_all_rows(variable) for f in self.features.values())
        return next(filter(None, whys), "")

    def updates_of(self, parts: Iterable[Part]) -> list[Update]:
        """Return what a step does to variables."""
        optimizer, decays = self.optimizer, self._decay() is not None
        tables, averages = self.on(Tables), self.on(Averages)
        return [
            Update(
                part.variable,
                part.gradient,
                slots_of(optimizer, part.variable_index),
                self.decay_of(part.variable) if decays else None,
                tables.rows_of(part.variable_index, part.ids) if tables else None,
                optimizer._weight_averages[part.variable_index] if averages else None,
            )
            for part in parts
        ]

    def is_apart(self, part: Part) -> bool:
        """Whether a part is a table that steps as `tables.of_table` says."""
        return is_apart(self.optimizer, part.variable)

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
            averages.share(self.own()) if averages else None,
        )

    # Before the step: which way it is taken. `backends/base.py` asks these.

    def run(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Take a step in the fastest way: as a program, or stage by stage.

        Args:
            grads: A tensor, slices or None for each variable.
            variables: The variables.
        """
        if len(grads) != len(variables):
            raise ValueError(
                "There must be one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        grads, search = backend.as_gradients(grads, variables), self.search
        if search is not None and self.optimizer.built:
            search.restart_if_changed(self.optimizer._trainable_variables)
        if not self.optimizer.built or backend.has_slices(grads):
            self.prepare(grads, variables)
        elif not backend.is_eager():
            self.check_made()
        backend.run(self, grads, variables)

    def prepare(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Check gradients; only then make slots for variables that have none.

        Returns:
            The optimizer's variables.
        """
        for gradient, variable in zip(grads, variables, strict=True):
            backend.check(gradient, variable)
        build_for(self.optimizer, variables)
        self.check_made()
        found: list[Any] = self.optimizer._variables
        return found

    def check_made(self) -> None:
        """Fail if an option that needs variables was switched on after the build."""
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
        """Forget what was known of the attributes, as one was assigned."""
        if self.programs is not None:
            self.programs.forget_attributes()

    @property
    def learning_rate(self) -> Any:
        """The learning rate: a variable, or the present value of anything else."""
        return self.optimizer.learning_rate

    def calls_users_python(self, variables: Sequence[Any]) -> bool:
        """Whether a step calls a hook or a constraint of the user's.

        It may be Python, for each eager step to call: so that is no program, unless
        `jit_compile=True` asks for one.
        """
        return self.optimizer.jit_compile is not True and bool(
            self.own() or any(hooks.is_users_constraint(v) for v in variables)
        )

    @property
    def jit_compile(self) -> bool | str:
        """The option; with "auto" a subclass' step runs as Keras runs it."""
        wanted: bool | str = self.optimizer.jit_compile
        is_own = wanted == "auto" and self.own() & hooks.UPDATE_STEP
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
        clocks: tuple[Hashable, ...] = (*optimizer._clocks, *optimizer._clocks.sparse)
        if not (optimizer.use_ema and optimizer.ema_overwrite_frequency):
            return clocks
        return *clocks, *(v.trainable for v in optimizer._trainable_variables)

    def is_for_kernel(self, variables: Sequence[Any]) -> bool:
        """Whether a native kernel runs nearly all of a step of these variables.

        If there is more to do, XLA is faster than one operation after another.
        """
        optimizer = self.optimizer
        others = (
            *(optimizer.clipnorm, optimizer.clipvalue, optimizer.loss_scale_factor),
            optimizer.gradient_accumulation_steps,
            *(getattr(variable, "constraint", None) for variable in variables),
        )
        does_more = self.own() or any(x is not None for x in others)
        if self.jit_compile != "auto" or does_more or not knows(optimizer, variables):
            return False
        updates = self.without_gradients(variables)
        return backend.is_for_kernel(updates, self.constants(0.0))

    def without_gradients(self, variables: Sequence[Any]) -> list[Update]:
        """Return what a step would do to variables, without gradients."""
        index_of = self.optimizer._get_variable_index
        return self.updates_of(Part(index_of(v), v, None) for v in variables)

    def has_blocks(self) -> bool:
        """Whether slots of any variable are stored in blocks."""
        optimizer = self.optimizer
        count = len(optimizer._velocities) if optimizer.built else 0
        return any(are_in_blocks(slots_of(optimizer, i)) for i in range(count))
