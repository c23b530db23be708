"""The variables an optimizer keeps for those of a model: made, saved, loaded, moved."""

import contextlib
import random
from collections.abc import Collection, Sequence
from typing import Any

import keras
from keras import ops

from keras_rmsprop import checks, rounding, rule, saving
from keras_rmsprop.skipping import SkippingOptimizer
from keras_rmsprop.state import State, matched

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop.tensorflow import rows
    from keras_rmsprop.tensorflow.optimizer import (
        TensorFlowOptimizer,
        outside_functions,
    )

    Optimizer: Any = TensorFlowOptimizer
else:
    Optimizer, outside_functions = SkippingOptimizer, contextlib.nullcontext

LISTS = {
    "velocity": "_velocities",
    "momentum": "_momentums",
    "average_gradient": "_average_gradients",
    "average": "_model_variables_moving_average",
    "accumulator": "_accumulated_gradients",
}
"""The attributes with one variable for each of the model's, by what these are."""

OWN = "clock_", "rounding_offset", "skipped_steps"
"""What the built-in does not have, and a file need not."""


class SlotOptimizer(Optimizer):
    """What RMSprop has besides its arguments and its step: slots and other state.

    `momentum`, `centered`, `initial_accumulator_value` and `slot_dtype`, which say what
    there is, are the subclass'.
    """

    _slots_being_added = False
    _file: saving.File | None = None
    """What was loaded before there were variables to load it into."""
    _before_file: Sequence[tuple[Any, Any]] = ()
    """The variables that there were, and their values before that."""
    _clocks: Any = ()
    """By the index of the variable; the TensorFlow backend has some."""

    def build(self, variables: list[Any]) -> None:
        """Create the slots of `variables`: `velocity` and, where used, the others.

        Args:
            variables: The variables that later steps may update.
        """
        if self.built:
            return
        if self._file is None:
            self._build(variables)
            return
        early = self._named().keys() if self._file.names else ()
        # A variable made inside a function would be initialized after it is loaded.
        with outside_functions():
            self._build(variables)
            file, self._file = self._file, None
            try:
                self._load(file, except_keys=early)
            except ValueError:
                for variable, value in self._before_file:
                    variable.assign(value)
                raise
            finally:
                self._before_file = ()

    def _build(self, variables: list[Any]) -> None:
        super().build(variables)
        for name, slots in self._new_slots(variables).items():
            setattr(self, name, slots)
        if self.slot_dtype == "bfloat16":
            draw = keras.initializers.Constant(random.randrange(2**16))
            self._offset = self.add_variable((), draw, "int32", name="rounding_offset")
        if self.skip_nonfinite:
            count = self.add_variable((), "zeros", "int32", name="skipped_steps")
            self.skipped_steps = count

    def _new_slots(self, variables: list[Any]) -> dict[str, list[Any]]:
        """Return slots for variables, in lists by the attributes that hold them."""
        # `Constant` has what it makes in memory twice.
        value = self.initial_accumulator_value
        start = keras.initializers.Constant(value) if value else "zeros"
        new = self.add_optimizer_variables
        self._slots_being_added = True
        slots = {
            "_velocities": new(variables, "velocity", start),
            "_momentums": new(variables, "momentum") if self.momentum else [],
            "_average_gradients": (
                new(variables, "average_gradient") if self.centered else []
            ),
        }
        self._slots_being_added = False
        return slots

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Add a variable to the optimizer; a slot gets its own dtype.

        Args:
            shape: Shape of the variable.
            initializer: What it starts with.
            dtype: Its dtype, by default `keras.config.floatx()`.
            **kwargs: See `keras.optimizers.Optimizer.add_variable`.
        """
        wide = keras.backend.result_type(dtype or "float32", "float32")
        if self._slots_being_added:
            dtype = self.slot_dtype or wide
        elif str(kwargs.get("name")).endswith("gradient_accumulator"):
            dtype = wide  # in bfloat16 a sum of 256 ones does not grow
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def _slots_of(self, i: int) -> rule.Slots:
        return rule.Slots(
            self._velocities[i],
            self._momentums[i] if self.momentum else None,
            self._average_gradients[i] if self.centered else None,
        )

    def _as_stored(self, slots: rule.Slots, i: int) -> rule.Slots:
        """Return new slots of the variable with this index in the slots' dtype."""
        dtype = self._velocities[i].dtype

        def stored(slot: int, x: Any) -> Any:
            if dtype != "bfloat16":
                return ops.cast(x, dtype)
            return rounding.stochastically(x, self._offset, self.iterations, slot)

        return rule.Slots(
            *(None if x is None else stored(n, x) for n, x in enumerate(slots))
        )

    def save_own_variables(self, store: Any) -> None:
        """Save the state, with names by which it is found again.

        Args:
            store: See `keras.optimizers.Optimizer`.
        """
        saving.write(store, self._named())

    def load_own_variables(self, store: Any) -> None:
        """Load the state; where the optimizer is not built yet, as soon as it is.

        Values are matched by what they are and by the paths of the variables; in a file
        of `keras.optimizers.RMSprop` by position. What the file does not have starts
        fresh, with a warning.

        Args:
            store: See `keras.optimizers.Optimizer`.

        Raises:
            ValueError: The state does not fit; nothing is changed.
        """
        file = saving.read(store)
        if self.built:
            self._load(file)
            return
        # The learning rate may be changed before the first step: load it now, if it is
        # one. A file without names may be that of any optimizer.
        named = self._named()
        self._before_file = [(v, v.numpy()) for _, v in named.values()]
        for key, (name, variable) in named.items():
            if file.names.get(key) == name:
                variable.assign(file.values[key])
        self._file = file if file.values else None

    def _load(self, file: saving.File, except_keys: Collection[str] = ()) -> None:
        paths, named = self._paths(), self._named()
        if file.names:
            values = saving.renamed(file, paths)
        else:
            by_position = {k: v for k, v in file.values.items() if k.isdigit()}
            shared = [n for n, _ in named.values() if not n.kind.startswith(OWN)]
            if len(by_position) not in (len(shared), len(self.variables)):
                super().load_own_variables(by_position)  # warns, and loads nothing
                return
            values = {
                named[k][0] if k in named else saving.clock_name(k, paths): v
                for k, v in file.values.items()
            }
        make_clock = getattr(self._clocks, "make", None)
        for name in values:
            if make_clock and name.kind == "clock_updates" and name.path in paths:
                make_clock(paths.index(name.path))
        places = {}
        for key, (name, variable) in self._named().items():
            if key in except_keys:
                values.pop(name, None)
            elif name in values or not name.kind.startswith(OWN):
                places[name] = variable
        pairs, fresh = saving.matched(values, places)
        # A table without a clock in the file has no silent rows.
        for i in self._clocks:
            self._clocks[i].reset()
        if not isinstance(self.skipped_steps, int):
            self.skipped_steps.assign(0)
        for variable, value in pairs:
            variable.assign(value)
        for name, variable in fresh:
            if name.kind == "average":
                variable.assign(self._trainable_variables[paths.index(name.path)])
            elif name.kind in LISTS:
                start = self.initial_accumulator_value if name.kind == "velocity" else 0
                variable.assign(ops.full(variable.shape, start, variable.dtype))

    def _named(self) -> dict[str, tuple[saving.Name, Any]]:
        """Return the variables of the state and their names, by the keys in a file."""
        paths = self._paths()
        owned = {
            id(slot): saving.Name(kind, path)
            for kind, attribute in LISTS.items()
            for slot, path in zip(getattr(self, attribute, ()), paths, strict=False)
        }
        named = {
            str(n): (owned.get(id(v), saving.Name(v.name, "")), v)
            for n, v in enumerate(self.variables)
        }
        for i in self._clocks:
            for kind, v in (
                ("updates", self._clocks[i].updates),
                ("last", self._clocks[i].last),
            ):
                named[f"clock_{i}_{kind}"] = saving.Name(f"clock_{kind}", paths[i]), v
        return named

    def _check_variables_are_known(self, variables: list[Any]) -> None:
        known = self._trainable_variables_indices
        unknown = [v for v in variables if self._var_key(v) not in known]
        if not unknown:
            return
        # If some are known, layers were unfrozen. Of another model none is.
        if len(unknown) == len(variables):
            raise ValueError(
                "Unknown variables: the optimizer was built with others. Make another "
                f"optimizer for them. Received: {[v.name for v in unknown]}"
            )
        with outside_functions():
            self._add(unknown)

    def _add(self, variables: list[Any]) -> None:
        """Make room for more variables than the optimizer was built with."""
        slots = self._new_slots(variables)
        if self.use_ema:
            averages = self.add_optimizer_variables(variables, "average")
            for average, variable in zip(averages, variables, strict=True):
                average.assign(variable)
            slots[LISTS["average"]] = averages
        if self.gradient_accumulation_steps:
            slots[LISTS["accumulator"]] = self.add_optimizer_variables(
                variables, "gradient_accumulator"
            )
        for name, new in slots.items():
            getattr(self, name).extend(new)
        for variable in variables:
            index = len(self._trainable_variables)
            self._trainable_variables_indices[self._var_key(variable)] = index
            self._trainable_variables.append(variable)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Give the variables their final values: with `use_ema` their averages.

        Args:
            var_list: The variables that the optimizer knows, in any order.
        """
        super().finalize_variable_values(
            sorted(var_list, key=self._get_variable_index) if self.use_ema else var_list
        )

    def get_state(self) -> State:
        """Return what the optimizer remembers of its variables, as NumPy arrays.

        The averages of silent rows are brought up to date in it, and slots in bfloat16
        are float32. Averages of the weights (`use_ema`) are not part of it.

        Raises:
            ValueError: The optimizer is not built.
        """
        self._check_built()
        slots = []
        for i in range(len(self._velocities)):
            of_one = self._slots_of(i)
            if i in self._clocks:
                of_one = rows.caught_up(of_one, self._clocks[i], None, self.rho)
            slots.append(of_one.map(_array))
        return State(int(_array(self.iterations)), slots, self._paths())

    def set_state(self, state: State) -> None:
        """Take over a state, from `get_state` or made from another framework's.

        Args:
            state: One entry in `slots` for each variable that the optimizer was built
                with, in that order. `paths` is not read.

        Raises:
            TypeError: It is no `State`.
            ValueError: The optimizer is not built, or the state does not fit; then
                nothing is changed, and the message says what does not.
        """
        self._check_built()
        if not isinstance(state, State):
            raise TypeError(
                f"`state` must be a `State`, as of `get_state`. Received: {state!r}"
            )
        iterations = checks.integer("iterations", state.iterations, 0)
        places = [self._slots_of(i) for i in range(len(self._velocities))]
        pairs = [
            (slot, ops.convert_to_tensor(array, slot.dtype))
            for slot, array in matched(places, state.slots, self._paths())
        ]
        for slot, value in pairs:
            slot.assign(value)
        every = self.gradient_accumulation_steps or 1
        self._iterations.assign(iterations * every)
        for sums in self._accumulated_gradients if every > 1 else []:
            sums.assign(ops.zeros_like(sums))
        for i in self._clocks:
            self._clocks[i].reset()

    def _paths(self) -> list[str]:
        """Return the paths of the variables; those of TensorFlow have but names."""
        paths = [getattr(v, "path", v.name) for v in self._trainable_variables]
        if len({*paths}) < len(paths):
            paths = [f"{path}#{i}" for i, path in enumerate(paths)]
        return paths

    def _check_built(self) -> None:
        if not self.built:
            raise ValueError(
                "The optimizer must be built. Call `optimizer.build(variables)`, or "
                "take a step, first."
            )


def _array(x: Any) -> Any:
    """Return a tensor as a NumPy array, bfloat16, which NumPy has not, as float32."""
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = ops.cast(x, "float32")
    return ops.convert_to_numpy(x)
