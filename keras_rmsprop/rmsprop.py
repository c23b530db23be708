"""The optimizer: its arguments, slots, configuration and saving."""

import contextlib
import functools
import operator
import random
import warnings
from collections.abc import Collection
from typing import Any

import keras
from keras import ops

from keras_rmsprop import checks, rounding, rule, saving
from keras_rmsprop.state import State, matched

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop.tensorflow import rows
    from keras_rmsprop.tensorflow.optimizer import (
        TensorFlowOptimizer,
        outside_functions,
    )

    Optimizer: Any = TensorFlowOptimizer
else:
    Optimizer, outside_functions = keras.optimizers.Optimizer, contextlib.nullcontext


def _array(x: Any) -> Any:
    """Return a tensor as a NumPy array, bfloat16, which NumPy has not, as float32."""
    if x is None:
        return None
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = ops.cast(x, "float32")
    return ops.convert_to_numpy(x)


LISTS = {
    "velocity": "_velocities",
    "momentum": "_momentums",
    "average_gradient": "_average_gradients",
    "average": "_model_variables_moving_average",
    "accumulator": "_accumulated_gradients",
}
"""The attributes with one variable for each of the model's, by what these are."""

_options = operator.attrgetter(*rule.Options._fields)


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class RMSprop(Optimizer):
    r"""RMSprop: gradients divided by the root of their recent mean square.

    A drop-in for `keras.optimizers.RMSprop`, whose positional arguments, defaults,
    variables and results it shares. For each weight $w$ with gradient $g$, decay rate
    $\rho$ = `rho`, learning rate $\eta$ = `learning_rate` and $\epsilon$ = `epsilon`:

    $$v \leftarrow \rho v + (1 - \rho) g^2, \qquad
      w \leftarrow w - \eta \frac{g}{\sqrt{v + \epsilon}}$$

    What others call RMSprop differs from that in places (see
    `keras_rmsprop.dialects`). With every option, step $t = 1, 2, \dots$ is:

    $$\begin{aligned}
      g &\leftarrow s\,g + \lambda w \\
      v &\leftarrow \rho v + (1 - \rho) g^2, \qquad v_0 = \texttt{initial} \\
      a &\leftarrow \rho a + (1 - \rho) g, \qquad a_0 = 0 \\
      \hat v &= v / c_t, \quad \hat a = a / c_t,
        \qquad c_t = 1 \text{ or } 1 - \rho^t \\
      d &= \sqrt{\hat v - \hat a^2 + \epsilon}
        \;\text{ or }\; \sqrt{\hat v - \hat a^2} + \epsilon \\
      m &\leftarrow \mu m + \eta\,g / d, \qquad m_0 = 0 \\
      u &= m \;\text{ or }\; \mu m + \eta\,g / d \\
      w &\leftarrow (1 - \eta\,\omega)\,w - k \odot u
    \end{aligned}$$

    The slots $v$ (`velocity`), $m$ (`momentum`) and $a$ (`average_gradient`) have the
    shape of their weight. Their dtype is the weight's, but never less than float32,
    so that averages of float16 and bfloat16 weights do not stall (see `slot_dtype`).

    On the TensorFlow backend a step taken eagerly - in a notebook or a custom training
    loop - runs as one XLA program: unscaling, clipping, decay, update and averages (see
    `jit_compile` for the exceptions). It is traced once for each set of gradients.
    Whatever the learning rate is, a changed value takes effect with the next step and
    without a new trace.

    Args:
        learning_rate: $\eta$, a number >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable without
            arguments that returns a number. Defaults to `0.001`.
        rho: $\rho$, the decay rate of $v$ and $a$, in [0, 1). About
            $1 / (1 - \rho)$ steps are remembered. Defaults to `0.9`.
        momentum: $\mu$, the decay rate of $m$, in [0, 1). At 0 there is no $m$.
            Defaults to `0.0`.
        epsilon: $\epsilon$ > 0, in units of the squared gradient where it stands inside
            the root, else of the gradient. Defaults to `1e-7`.
        centered: Whether to divide by the root of the variance, $v - a^2$; else there
            is no $a$. Defaults to `False`.
        weight_decay: Number or `None`: $\omega$, before the update each weight loses
            `weight_decay * learning_rate` of itself; or $\lambda$, see
            `decoupled_weight_decay`. `exclude_from_weight_decay` excepts variables.
        clipnorm: Number or `None`: the largest norm one gradient may have.
        clipvalue: Number or `None`: the largest magnitude an element of a gradient may
            have.
        global_clipnorm: Number or `None`: the largest norm all gradients together may
            have.
        use_ema: Whether to keep an exponential moving average of the weights.
            Defaults to `False`.
        ema_momentum: Decay rate of that average, in [0, 1]. Defaults to `0.99`.
        ema_overwrite_frequency: Number of steps after which the average replaces the
            weights, or `None`: only when training ends.
        loss_scale_factor: Number or `None`: multiplies the loss and divides the
            gradients, against underflow in float16.
        gradient_accumulation_steps: Integer >= 2 or `None`: updates happen every so
            many calls, with the mean gradient.
        name: Name of the optimizer, the prefix of its variables' paths.
        epsilon_inside_sqrt: Which $d$: `True` the first, `False` the second, where
            epsilon is in units of the gradient. Defaults to `True`.
        initial_accumulator_value: $v_0$ >= 0, in units of the squared gradient; 1
            keeps the first steps short. Defaults to `0.0`.
        bias_correction: Which $c_t$: `False` 1; `True` the second, so that $\hat v$ is
            the mean square of the steps there were. Defaults to `False`.
        nesterov: Which $u$: `False` the first; `True` the second, the sum of updates as
            the next step would have it. Without momentum the same. Defaults to `False`.
        lr_in_momentum: Whether $\eta$ enters the sum of updates, as above; else
            $m \leftarrow \mu m + g / d$ and the update is $\eta\,k \odot u$, so that a
            changed learning rate scales past updates, too. Defaults to `True`.
        decoupled_weight_decay: Whether `weight_decay` is $\omega$, which leaves the
            slots alone; else it is $\lambda$, the L2 penalty, added to the gradient
            after clipping. Defaults to `True`.
        maximize: Whether to go up the gradient: $s = -1$, else $s = 1$. Defaults to
            `False`.
        cautious: With momentum, whether to skip elements where the update would go
            against the gradient and to enlarge the others instead:
            $k = [u g > 0]$ over its mean in the variable (0.001 at least); else
            $k = 1$. Defaults to `False`.
        slot_dtype: Dtype of the slots: `None` as said above, `"float32"`, `"float64"`,
            or `"bfloat16"`, which halves them: steps are computed in float32 and what
            is kept is rounded stochastically, up or down at random, right on average.
            What that depends on is drawn when the optimizer is built (see
            `keras.utils.set_random_seed`) and saved with it. bfloat16 keeps 2 to 3
            digits, too few for `centered` where gradients vary little. Defaults to
            `None`.
        sparse_update: On the TensorFlow backend, what a `tf.IndexedSlices` gradient
            (of an embedding) does: `"exact"` gives the result of the same dense
            gradient, at the cost of its rows where silent rows stay (no momentum, no
            weight decay of that variable, no EMA, no accumulation, no
            `tf.distribute`). Averages of silent rows then stand as they last were,
            until their turn. `"lazy"` updates the rows only, whatever the options but
            accumulation and distribution. Defaults to `"exact"`.
        jit_compile: On the TensorFlow backend, whether a step is an XLA program of its
            own: `"auto"` where that is faster (an eager step, and in a `tf.function`
            the step of a model with large variables), `True` in every `tf.function`
            too, `False` never. Inside a function that XLA compiles the step is part of
            that program. Steps with sparse gradients, under `tf.distribute` or with
            variables on several devices are never compiled on their own. `False` is
            also for constraints that compute outside TensorFlow. Defaults to `"auto"`.
        **kwargs: `lr`, the deprecated spelling of `learning_rate`.

    Raises:
        ValueError: An argument is out of its range, or unknown.
        TypeError: An argument is not of its type.

    Example:
        >>> import keras
        >>> from keras_rmsprop import RMSprop
        >>> optimizer = RMSprop(learning_rate=0.1)
        >>> weight = keras.Variable([1.0, 1.0])
        >>> optimizer.apply([[2.0, -0.5]], [weight])
        >>> [round(float(w), 4) for w in weight.numpy()]
        [0.6838, 1.3162]

        In a model:

        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=RMSprop(0.01, momentum=0.9), loss="mse")

    Reference:
        - [Hinton, 2012](
          https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf),
          slide 29; `centered` is from [Graves, 2013](https://arxiv.org/abs/1308.0850),
          `cautious` from [Liang et al., 2024](https://arxiv.org/abs/2411.16085).
    """

    _slots_being_added = False
    _file: saving.File | None = None
    """What was loaded before there were variables to load it into."""
    _clocks: Any = ()
    """By the index of the variable; the TensorFlow backend has some."""

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        epsilon_inside_sqrt: bool = True,
        initial_accumulator_value: float = 0.0,
        bias_correction: bool = False,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        cautious: bool = False,
        slot_dtype: str | None = None,
        sparse_update: str = "exact",
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        if "lr" in kwargs:
            if learning_rate != 0.001:
                raise ValueError(
                    "`lr` is the deprecated spelling of `learning_rate`: give one of "
                    f"them. Received: learning_rate={learning_rate}, lr={kwargs['lr']}"
                )
            warnings.warn(
                "The `lr` argument is deprecated, use `learning_rate` instead.",
                DeprecationWarning,
                stacklevel=2,
            )
            learning_rate = kwargs.pop("lr")
        super().__init__(
            learning_rate=checks.learning_rate(learning_rate),
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.rho = checks.number("rho", rho, checks.SHARE)
        self.momentum = checks.number("momentum", momentum, checks.SHARE)
        self.epsilon = checks.number("epsilon", epsilon, checks.POSITIVE)
        self.centered = checks.flag("centered", centered)
        self.epsilon_inside_sqrt = checks.flag(
            "epsilon_inside_sqrt", epsilon_inside_sqrt
        )
        self.initial_accumulator_value = checks.number(
            "initial_accumulator_value", initial_accumulator_value, checks.NOT_NEGATIVE
        )
        self.bias_correction = checks.flag("bias_correction", bias_correction)
        self.nesterov = checks.flag("nesterov", nesterov)
        self.lr_in_momentum = checks.flag("lr_in_momentum", lr_in_momentum)
        self.decoupled_weight_decay = checks.flag(
            "decoupled_weight_decay", decoupled_weight_decay
        )
        self.maximize = checks.flag("maximize", maximize)
        self.cautious = checks.flag("cautious", cautious)
        self.slot_dtype = checks.one_of(
            "slot_dtype",
            getattr(slot_dtype, "name", slot_dtype),
            (None, "bfloat16", "float32", "float64"),
        )
        self.sparse_update = checks.one_of(
            "sparse_update", sparse_update, ("exact", "lazy")
        )
        self.jit_compile = checks.one_of(
            "jit_compile", jit_compile, ("auto", True, False)
        )

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
        early = [str(n) for n in range(len(self.variables))]
        # A variable made inside a function would be initialized after it is loaded.
        with outside_functions():
            self._build(variables)
            file, self._file = self._file, None
            self._load(file, except_keys=early)

    def _build(self, variables: list[Any]) -> None:
        super().build(variables)
        for name, slots in self._new_slots(variables).items():
            setattr(self, name, slots)
        if self.slot_dtype == "bfloat16":
            draw = keras.initializers.Constant(random.randrange(2**16))
            self._offset = self.add_variable((), draw, "int32", name="rounding_offset")

    def _new_slots(self, variables: list[Any]) -> dict[str, list[Any]]:
        """Return slots for variables, in lists by the attributes that hold them."""
        start = keras.initializers.Constant(self.initial_accumulator_value)
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
        if self._slots_being_added:
            dtype = self.slot_dtype or keras.backend.result_type(dtype, "float32")
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its slots by `rule.step`.

        Args:
            gradient: The gradient, after clipping.
            variable: The variable.
            learning_rate: The learning rate, a scalar.
        """
        i = self._get_variable_index(variable)
        slots = self._slots_of(i)
        dtype = keras.backend.result_type(
            keras.backend.standardize_dtype(variable.dtype),
            slots.velocity.dtype,
            "float32",
        )
        l2 = 0.0 if self.decoupled_weight_decay else self.weight_decay
        l2 = l2 if l2 and self._use_weight_decay(variable) else None

        def step(slots: rule.Slots, ids: Any = None) -> tuple[Any, rule.Slots]:
            weights, mean = variable, ops.mean
            if ids is not None:
                weights = rows.read(variable, ids) if l2 else None
                mean = functools.partial(rows.mean, ids=ids, variable=variable)
            taken, new = rule.step(
                ops.cast(gradient, dtype),
                rule.Slots(*(s if s is None else ops.cast(s, dtype) for s in slots)),
                ops.cast(learning_rate, dtype),
                rule.Options(*_options(self)),
                t=ops.cast(self.iterations + 1, dtype),
                penalty=l2 and l2 * ops.cast(weights, dtype),
                mean=mean,
            )
            return taken, self._as_stored(new, i)

        if i in self._clocks:
            rows.update(
                variable, slots, self._clocks[i], self._ids.get(i), self.rho, step
            )
            return
        taken, new = step(slots)
        for slot, value in zip(slots, new, strict=True):
            if slot is not None:
                self.assign(slot, value)
        self.assign_sub(variable, taken)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        if self.decoupled_weight_decay:  # else `update_step` adds it to the gradient
            super()._apply_weight_decay(variables)

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

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the moment; a number can be assigned at any time."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        Optimizer.learning_rate.fset(self, checks.learning_rate(learning_rate))

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
        # What there is already may be changed before the first step: load it now.
        for key, (_, variable) in self._named().items():
            if key in file.values and file.values[key].shape == variable.shape:
                variable.assign(file.values[key])
        self._file = file if file.values else None

    def _load(self, file: saving.File, except_keys: Collection[str] = ()) -> None:
        paths, named = self._paths(), self._named()
        if file.names:
            values = saving.renamed(file, paths)
        else:
            by_position = {k: v for k, v in file.values.items() if k.isdigit()}
            if len(by_position) != len(self.variables):
                super().load_own_variables(by_position)  # warns, and loads nothing
                return
            values = {
                named[k][0] if k in named else saving.clock_name(k, paths): v
                for k, v in file.values.items()
            }
        for name in values:
            if (
                name.kind == "clock_updates"
                and name.path in paths
                and self._clocks != ()
            ):
                self._clocks.make(paths.index(name.path))
        places = {}
        for key, (name, variable) in self._named().items():
            if key in except_keys:
                values.pop(name, None)
            elif name in values or not name.kind.startswith("clock_"):
                places[name] = variable
        pairs, fresh = saving.matched(values, places)
        # A table without a clock in the file has no silent rows.
        for i in self._clocks:
            self._clocks[i].reset()
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
        known = [
            self._var_key(v) in self._trainable_variables_indices for v in variables
        ]
        if any(known) and not all(known):
            # Layers were unfrozen; variables of another model would be all unknown.
            with outside_functions():
                self._add([v for v, k in zip(variables, known, strict=True) if not k])
        super()._check_variables_are_known(variables)

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
            slots.append(rule.Slots(*map(_array, of_one)))
        return State(int(_array(self.iterations)), slots, self._paths())

    def set_state(self, state: State) -> None:
        """Take over a state, from `get_state` or made from another framework's.

        Args:
            state: One entry in `slots` for each variable that the optimizer was built
                with, in that order. `paths` is not read.

        Raises:
            ValueError: The optimizer is not built, or the state does not fit; then
                nothing is changed, and the message says what does not.
        """
        self._check_built()
        places = [self._slots_of(i) for i in range(len(self._velocities))]
        pairs = [
            (slot, ops.convert_to_tensor(array, slot.dtype))
            for slot, array in matched(places, state.slots, self._paths())
        ]
        for slot, value in pairs:
            slot.assign(value)
        every = self.gradient_accumulation_steps or 1
        self._iterations.assign(state.iterations * every)
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

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make an equal optimizer, without its state."""
        return super().get_config() | {
            "rho": self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "centered": self.centered,
            "epsilon_inside_sqrt": self.epsilon_inside_sqrt,
            "initial_accumulator_value": self.initial_accumulator_value,
            "bias_correction": self.bias_correction,
            "nesterov": self.nesterov,
            "lr_in_momentum": self.lr_in_momentum,
            "decoupled_weight_decay": self.decoupled_weight_decay,
            "maximize": self.maximize,
            "cautious": self.cautious,
            "slot_dtype": self.slot_dtype,
            "sparse_update": self.sparse_update,
            "jit_compile": self.jit_compile,
        }
