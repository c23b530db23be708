"""The optimizer: its arguments, the variables that it makes, its doors of state.

How it takes a step stands in `step.py`.
"""

import contextlib
import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

from keras_rmsprop import (
    automatic,
    checks,
    codecs,
    estimate,
    explaining,
    hooks,
    options,
    restoring,
    rule,
    saving,
)
from keras_rmsprop.averages import Averages
from keras_rmsprop.backends import current as backend
from keras_rmsprop.forms import form, name_of
from keras_rmsprop.slots import RATE_FACTOR, Book, Order, all_or_nothing, set_variables
from keras_rmsprop.state import State, as_array, assign_state, fingerprint, paths
from keras_rmsprop.step import Steps
from keras_rmsprop.tables import Tables
from keras_rmsprop.update import Part


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class RMSprop(keras.optimizers.Optimizer):
    r"""RMSprop: gradients divided by the root of their recent mean square.

    A drop-in for `keras.optimizers.RMSprop`, with the same positional arguments,
    defaults, variables and results. For each weight $w$ with gradient $g$, decay rate
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
    loop - runs as one program: unscaling, clipping, decay, update and averages. On CPUs
    a native kernel takes the update, if there is one (`python -m keras_rmsprop.kernel`
    builds it); else XLA compiles the program (see `jit_compile` for the exceptions). It
    is traced once for each set of gradients.
    An attribute assigned between two eager steps takes effect with the next. A new
    learning rate needs no new trace, be it a number, a schedule or a callable. (In
    `fit` and in a `tf.function`, as with Keras' optimizers, what was traced stays:
    a callable is called once, and options are those of the trace.)

    Args:
        learning_rate: $\eta$, a number >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, a callable without
            arguments that returns a number, or `"auto"`. Then the rate is found while
            training, from the gradients and the way that the weights have gone so far
            (see `AutoLearningRate`), and `current_learning_rate` is the rate. A value
            assigned to `learning_rate`, by a callback say, multiplies it. Unless
            `centered`, `bias_correction` is then on by default, and an epsilon of
            1e-7 becomes 1e-30, so that the scale of the loss does not matter. It works
            best with `use_ema` and `ema_warmup`. Defaults to `0.001`.
        rho: $\rho$, the decay rate of $v$ and $a$, in [0, 1). About
            $1 / (1 - \rho)$ steps are remembered. Defaults to `0.9`.
        momentum: $\mu$, the decay rate of $m$, in [0, 1). At 0 there is no $m$.
            Defaults to `0.0`.
        epsilon: $\epsilon$ > 0, in units of the squared gradient if it stands inside
            the root, else of the gradient. Defaults to `1e-7`.
        centered: Whether to divide by the root of the variance, $v - a^2$; else there
            is no $a$. Defaults to `False`.
        weight_decay: Number or `None`: $\omega$, before the update each weight loses
            `weight_decay * learning_rate` of itself; or $\lambda$, see
            `decoupled_weight_decay`. `exclude_from_weight_decay` exempts variables.
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
        gradient_accumulation_steps: Integer >= 2 or `None`: the number of calls for one
            update, which takes their mean gradient.
        name: Name of the optimizer, the prefix of its variables' paths.
        epsilon_inside_sqrt: Which $d$: `True` the first, `False` the second, where
            epsilon is in units of the gradient. The second has no finite derivative
            by $v$ at 0: for gradients through a step, on JAX. Defaults to `True`.
        initial_accumulator_value: $v_0$ >= 0, in units of the squared gradient; 1
            keeps the first steps short. Defaults to `0.0`.
        bias_correction: Which $c_t$: `False` 1; `True` the second, so that $\hat v$ is
            the mean square over the steps so far. Defaults to `False`.
        nesterov: Which $u$: `False` the first; `True` the second, the sum of updates as
            the next step would have it. Without momentum both are the same. Defaults to
            `False`.
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
            `"bfloat16"`, which halves them, or `"uint8"`, which quarters them: steps
            are computed in float32 and what is kept is rounded stochastically, up or
            down at random, right on average. The random numbers start from one that is
            drawn when the optimizer is built (see `keras.utils.set_random_seed`) and
            saved with it. bfloat16 keeps 2 to 3 digits, too few for `centered` where
            gradients vary little. uint8 keeps blocks of 256 numbers with a scale each,
            260 bytes, so a slot has another shape than its weight. Within a block it
            tells apart what is up to two million times smaller than the largest (see
            `keras_rmsprop.blockwise`), and it is not for `centered`. Defaults to
            `None`.
        float32_slots: With `slot_dtype="uint8"`, names: a variable that has one of them
            in its path keeps its slots as without it, and so does one with fewer than
            4096 elements. Of a table in blocks, a sparse gradient is taken as dense.
            Defaults to `("embeddings",)`.
        ema_warmup: Whether the average of the weights begins with a short memory: after
            $t$ updates its decay rate is the smaller one of `ema_momentum` and
            $(1 + t) / (10 + t)$, so that a short run does not drag its first weights
            along. Defaults to `False`.
        skip_nonfinite: Whether a step with a NaN or an infinity in any gradient changes
            nothing - weights, slots, averages, accumulators, `iterations` - except
            `skipped_steps`, which counts such steps. Else a NaN stays in weights and
            slots for good. It looks at the gradients as they come in: without the
            native kernel, a `global_clipnorm` that overflows is not seen. A
            `keras.optimizers.LossScaleOptimizer` around this one skips such steps
            itself. Defaults to `False`.
        sparse_update: On the TensorFlow backend, what a `tf.IndexedSlices` gradient
            (of an embedding) does. `"exact"` gives the result of the same dense
            gradient. It costs what its rows cost if silent rows (those without a
            gradient) stay as they are: no momentum, no weight decay of that variable,
            and with `use_ema` no constraint and no accumulation. Averages of silent
            rows, those of the weights included, are brought up to date when they are
            read. `"lazy"` updates the rows only, whatever the options, except for
            accumulation with `use_ema`. Defaults to `"exact"`.
        jit_compile: On the TensorFlow backend, how a step is compiled. `"auto"`: on
            CPUs by the native kernel, if it was built. Elsewhere, and where the kernel
            leaves much of a step to do, as an XLA program of its own where that is
            faster (an eager step, unless all variables are small; in a `tf.function`,
            the step of a model with large ones). `True`: an XLA program also in every
            `tf.function`, and in subclasses with an `update_step` of their own.
            `False`: neither XLA nor the kernel. Inside a function that XLA
            compiles, the step is part of that program. Steps with sparse gradients,
            under `tf.distribute` or with variables on several devices are never
            compiled on their own. Use `False` for constraints that compute outside
            TensorFlow. On PyTorch `"auto"` and `True` let the kernel take steps on
            CPUs. `explain` says what happens. Defaults to `"auto"`.
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
        bias_correction: bool | None = None,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        cautious: bool = False,
        slot_dtype: Literal["bfloat16", "float32", "float64", "uint8"] | None = None,
        float32_slots: Sequence[str] = ("embeddings",),
        ema_warmup: bool = False,
        skip_nonfinite: bool = False,
        sparse_update: Literal["exact", "lazy"] = "exact",
        jit_compile: bool | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        learning_rate = options.learning_rate_of(learning_rate, kwargs)
        auto = automatic.asked_for(learning_rate)
        if auto is not None:
            learning_rate = auto.factor
            if not centered:  # the variance of the first gradients is 0
                bias_correction = True if bias_correction is None else bias_correction
                epsilon = estimate.EPSILON if epsilon == 1e-7 else epsilon
        bias_correction = (
            bool(bias_correction) if bias_correction is None else bias_correction
        )
        given = locals()
        own = options.checked(options.OPTIONS, given)
        options.check_slots(own["slot_dtype"], own["centered"])
        learning_rate = checks.learning_rate(learning_rate)
        is_factor = auto is not None and isinstance(learning_rate, float)
        options.refuse_unknown(kwargs)
        super().__init__(
            learning_rate=(lambda: 0.0) if is_factor else learning_rate,
            name=name,
            **options.checked(options.OF_KERAS, given),
        )
        for option, value in own.items():
            setattr(self, option, value)
        options.warn_without_average(self.use_ema, vars(self))
        self._auto = auto
        if is_factor:
            self._learning_rate: Any = super().add_variable(
                (),
                keras.initializers.Constant(learning_rate),
                _dtype_of_factor(),
                name=RATE_FACTOR,
            )
        self._rate_in_force: Any = None
        self.skipped_steps: Any = 0
        self._book = Book()
        self._offset: Any = None
        self._clocks: Any = backend.clocks(self)
        self._steps = Steps(self)
        self._pending: Any = None  # a file, until there are variables

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse to override what a step never calls."""
        super().__init_subclass__(**kwargs)
        hooks.refuse_others(cls)

    # The variables that it makes.

    def build(self, variables: list[Any]) -> None:
        """Create the slots of `variables`: `velocity` and, where used, the others.

        If the optimizer is built for some of them, as before layers were unfrozen, it
        is extended. A step does that by itself, but not inside `fit` on JAX.

        Args:
            variables: The variables that later steps may update.
        """
        if self.built:
            if any(self._knows([v]) for v in variables):
                self._check_variables_are_known(list(variables))
            return
        # A variable made inside a function would be initialized after it is loaded.
        is_outside = self._pending is not None
        place = backend.outside_functions() if is_outside else contextlib.nullcontext()
        with place, all_or_nothing(self, *self._parts()):
            self._build(variables)
            if not self._book.order.keys:
                self._book.order = Order().then(map(self._var_key, variables))
        if type(self).build is RMSprop.build:  # else a subclass has more to make
            self._load_pending()

    def _parts(self) -> list[Any]:
        """Return the objects that change, too, when this is built."""
        parts = [self._book, self._search, self._clocks]
        return [part for part in parts if part is not None]

    def _build(self, variables: list[Any]) -> None:
        options.check_slots(self.slot_dtype, self.centered)
        super().build(variables)
        make = functools.partial(self.add_optimizer_variables, variables)
        value = float(self.initial_accumulator_value)
        # `Constant` has what it makes in memory twice.
        self._velocities = make(
            "velocity", keras.initializers.Constant(value) if value else "zeros"
        )
        has_momentum = options.is_on(self.momentum)
        self._momentums = make("momentum") if has_momentum else []
        self._average_gradients = make("average_gradient") if self.centered else []
        for name, draw in codecs.named(self.slot_dtype).extra.items():
            drawn = keras.initializers.Constant(draw())
            self._offset = self.add_variable((), drawn, "int32", name=name)
        for feature in self._steps.features.values():
            feature.build(variables)

    def add_variable_from_reference(
        self,
        reference_variable: Any,
        name: str | None = None,
        initializer: Any = "zeros",
    ) -> Any:
        """Add a slot of a variable, or return the one that it has.

        Args:
            reference_variable: The model's variable.
            name: The kind of slot, such as `velocity`; it is found again by that.
            initializer: What it starts with.
        """
        owner, kind, add = reference_variable, name or "var", super().add_variable
        key, slots = self._var_key(owner), rule.Slots._fields
        codec, _ = self._codec(owner)
        if kind in slots[1:]:  # all slots of a variable are stored as its velocity is
            codec = codecs.of(self._velocities[self._get_variable_index(owner)])
        auto = self._auto or automatic.AutoLearningRate()
        made = form(kind, owner, initializer, codec, auto.sample)

        def make() -> Any:
            with backend.beside(owner, self):
                return add(
                    *(made.shape, made.initializer, made.dtype),
                    layout=made.layout,
                    name=name_of(kind, owner),
                )

        return self._book.find_or_make(kind, key, make, made.start)

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Add a variable to the optimizer; see `keras.optimizers.Optimizer`.

        When the optimizer is built again, as after layers were unfrozen, return the
        variable that exists.
        """
        add, initial = super().add_variable, keras.initializers.get(initializer)
        return self._book.find_or_make(
            str(kwargs.get("name")),
            None,
            functools.partial(add, shape, initializer, dtype, **kwargs),
            lambda: initial(shape, dtype),
        )

    def _codec(self, variable: Any) -> tuple[codecs.Float, str]:
        """Return how the slots of a variable of the model will be stored, and why."""
        path = getattr(variable, "path", variable.name)
        return codecs.chosen(self.slot_dtype, path, variable.shape, self.float32_slots)

    def _slots_of(self, i: int) -> rule.Slots:
        return rule.Slots(
            self._velocities[i],
            self._momentums[i] if options.is_on(self.momentum) else None,
            self._average_gradients[i] if self.centered else None,
        )

    def _build_for(self, variables: list[Any]) -> None:
        """Build for variables, or for more of them; load the file that waits."""
        if not self.built:
            self.build(variables)
        self._load_pending()
        self._check_variables_are_known(variables)

    def _knows(self, variables: Sequence[Any]) -> bool:
        """Whether the optimizer is built for all of these variables."""
        places = self._trainable_variables_indices
        return self.built and all(self._var_key(v) in places for v in variables)

    def _check_variables_are_known(self, variables: list[Any]) -> None:
        given = {self._var_key(v): v for v in variables}
        known = {self._var_key(v): v for v in self._trainable_variables}
        # If some are known, layers were unfrozen. Of another model none is.
        if given and given.keys().isdisjoint(known):
            raise ValueError(
                "Unknown variables: the optimizer was built with others. Make another "
                f"optimizer for them. Received: {[v.name for v in variables]}"
            )
        order = self._book.order.then(given)
        if order.keys != self._book.order.keys:
            with backend.outside_functions():
                self._build_anew([(known | given)[key] for key in order.keys])
        self._book.order = order

    def _build_anew(self, variables: list[Any]) -> None:
        """Build for variables in this order; reuse what exists for them."""
        before = self._trainable_variables
        with all_or_nothing(self, *self._parts()):
            self._book.begin()
            self.built = False
            self.build(variables)
            for entry in self._book.made():
                # Averages as the weights are now.
                backend.assign_everywhere(entry.variable, entry.start())
            if self._search is not None and self._book.made():
                self._search.restart()
            set_variables(self, self._book.in_order(self._variables))
            if self._clocks:
                self._clocks.move(
                    {i: self._get_variable_index(v) for i, v in enumerate(before)}
                )

    # A step. What a subclass may override, and calls with `super()`, is in `hooks.py`.

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Update the variables, one step down their gradients.

        Args:
            grads: One gradient for each variable, of its shape; `None` leaves the
                variable as it is. A `tf.IndexedSlices`, or a `BCOO` of JAX, counts as
                the dense gradient that it stands for: parts of a row are summed first.
            trainable_variables: The variables. Not needed once the optimizer is
                built; then they are those it was built with, in that order.

        Raises:
            ValueError: The gradients do not fit the variables, or all are `None`.
            TypeError: A gradient is not of floating point numbers.
        """
        variables = trainable_variables
        if len(grads) == 0 or (variables is None and not self.built):
            return super().apply(grads, variables)  # no step, or Keras' own error
        if variables is None:
            self._book.order.check()
        variables = list(self._trainable_variables if variables is None else variables)
        if len(grads) != len(variables):
            raise ValueError(
                "There must be one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        grads = backend.as_gradients(grads, variables)
        self._restart_if_changed()
        return self._steps.run(grads, variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its slots by `rule.step`.

        A subclass may override it, as in Keras: it gets the whole gradient of one
        variable after the other. Unless `jit_compile=True`, an eager step then runs
        operation by operation, as Keras' own does.

        Args:
            gradient: The gradient, after clipping.
            variable: The variable.
            learning_rate: The learning rate, a scalar.
        """
        self._steps.update_one(gradient, variable, learning_rate)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], rate: Any
    ) -> None:
        parts = map(
            Part,
            map(self._get_variable_index, trainable_variables),
            trainable_variables,
            grads,
        )
        self._steps.update([*parts], rate)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        if not backend.decay(self, variables):
            super()._apply_weight_decay(variables)

    def _update_model_variables_moving_average(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        Averages(self).follow([], {}, [])

    def _own(self) -> frozenset[str]:
        """Return the hooks that a subclass, or this instance, overrides."""
        return hooks.own(self, RMSprop)

    def _why_all_rows(self, variable: Any) -> str:
        """Return why a step must update all rows of a table; empty: it need not."""
        if self._own():
            return "a subclass' step takes whole gradients"
        if self.sparse_update == "lazy":
            return ""
        whys = (f.why_all_rows(variable) for f in self._steps.features.values())
        return next(filter(None, whys), "")

    def _decay_of(self, variable: Any) -> Any:
        """Return the weight decay that is a part of a variable's update, or None."""
        is_own = self.decoupled_weight_decay and hooks.DECAY in self._own()
        if is_own or not options.is_on(self.weight_decay):
            return None
        return self.weight_decay if self._use_weight_decay(variable) else None

    @property
    def current_learning_rate(self) -> Any:
        """The learning rate in use: that of the last step if it is found, else as set.

        It is a number, or a tensor in a `tf.function`. With `learning_rate="auto"` it
        is `learning_rate` times the distance that was found, times `1 - momentum`; None
        before the first step; and a warning says if it seems wrong.
        """
        factor, search = self._get_current_learning_rate(), self._search
        if search is None:
            return float(factor) if options.has_value(factor) else factor
        if not search.is_known():
            return search.rate_of(search.estimate[0], factor)
        known = search.known()
        self._warn(search.complaint())
        return float(search.rate_of(known.distance, factor)) if known.steps else None

    def _restart_if_changed(self) -> None:
        """Restart the search if what is trained has changed; see `automatic.Search`."""
        if self._search is not None and self.built:
            self._search.restart_if_changed(self._trainable_variables)

    @property
    def _search(self) -> automatic.Search | None:
        return self._steps.on(automatic.Search)

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        """The averages of the weights, under the name by which Keras reads them."""
        if backend.is_eager() and hasattr(self, "_weight_averages"):
            self._catch_up_all()
        return self._weight_averages

    @_model_variables_moving_average.setter
    def _model_variables_moving_average(self, variables: list[Any]) -> None:
        self._weight_averages = variables

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        Averages(self).replace(trainable_variables)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """End a training, as `fit` does; see `keras.optimizers.Optimizer`.

        Args:
            var_list: The model's variables.
        """
        # On JAX `fit` has taken all values if a step failed; an error about them would
        # hide that of the step. There is no public way to know.
        if self.built and getattr(self._iterations, "_value", 0) is None:
            return
        super().finalize_variable_values(var_list)
        if self._search is not None and self.built and self._search.is_known():
            self._warn(self._search.complaint())
            self._restart_if_changed()  # it may be the first that is seen of `fit`
            self._search.end_fit(self._trainable_variables)

    def explain(self) -> str:
        """Say how each variable is updated, and why.

        Raises:
            ValueError: The optimizer is not built.

        Example:
            >>> import keras
            >>> from keras_rmsprop import RMSprop
            >>> optimizer = RMSprop(jit_compile=False)
            >>> optimizer.build([keras.Variable([1.0, 2.0], name="bias")])
            >>> print(optimizer.explain())
            An eager step runs operation by operation:
              1 concatenated with others (small, so operations cost more than what they
                compute): bias (2,)
            In `fit` and in a `tf.function` a step is part of that graph:
              1 concatenated with others (small, so operations cost more than what they
                compute): bias (2,)
        """
        self._check_built()
        return explaining.explain(self._steps, self._paths())

    # Its state: every door leads through `variables` or `get_state`.

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables: those of the built-in, in its order.

        If you read them outside a function, the averages of all rows are up to date.
        """
        if backend.is_eager() and not saving.is_walking():
            self._load_pending()
            self._restart_if_changed()
            self._catch_up_all()
        return super().variables

    def _catch_up_all(self) -> None:
        """Bring the averages of all rows of all tables up to date."""
        for i in self._clocks:
            self._catch_up(i)

    def _catch_up(self, i: int) -> None:
        """Bring all rows of a table up to date."""
        Tables(self).catch_up(i)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the optimizer's variables; see `keras.optimizers.Optimizer`."""
        self._bring_up_to_date()
        super().set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Save the state, with names by which it is found again.

        Args:
            store: See `keras.optimizers.Optimizer`.
        """
        self._bring_up_to_date()
        restoring.save(store, self._contents(), self._pending)

    def load_own_variables(self, store: Any) -> None:
        """Load the state, or keep it until the optimizer is built, if it is not yet.

        A value goes to the variable that has the weights that its variable had; else
        to the one in its place among the model's variables, with names as a check. What
        the file does not have starts fresh, and a warning says so.

        Args:
            store: See `keras.optimizers.Optimizer`.

        Raises:
            ValueError: A value in the file is not numeric; nothing is changed.
        """
        if self.built:
            self._catch_up_all()
            restoring.load(store, self._contents(), self.name)
            self._pending = None
        else:
            self._pending = restoring.load_later(
                store, self._contents(), self._last_checkpoint(), self.name
            )

    def _load_pending(self) -> None:
        """Load the file that is pending, if there are variables now."""
        if self.built and self._pending is not None:
            restoring.load_pending(
                self._pending, self._contents(), self._last_checkpoint(), self.name
            )
            self._pending = None

    def _contents(self) -> restoring.Contents:
        return restoring.Contents(
            self._variables,
            self._book,
            self._trainable_variables,
            self._trainable_variables_indices,
        )

    def _last_checkpoint(self) -> Any:
        """Return what changes when a `tf.train.Checkpoint` is restored.

        There is no public way to know. Without the private one it stays None.
        """
        return vars(self).get("_self_update_uid")

    def _bring_up_to_date(self) -> None:
        """Load the file that is pending, and bring the averages of all rows along."""
        _ = self.variables

    def _warn(self, message: str) -> None:
        if message:
            warnings.warn(f"Optimizer {self.name!r}: {message}.", stacklevel=3)

    def get_state(self) -> State:
        """Return what the optimizer remembers of its variables, as NumPy arrays.

        The averages of silent rows are up to date in it, and slots in bfloat16 or in
        bytes are float32. It does not include the averages of the weights (`use_ema`),
        nor the estimate behind `learning_rate="auto"`.

        Raises:
            ValueError: The optimizer is not built.
        """
        self._check_built()
        self._load_pending()
        found = []
        for i in range(len(self._velocities)):
            slots = Tables(self).caught_up(i, self._slots_of(i))
            shape = self._trainable_variables[i].shape
            found.append(codecs.as_numbers(slots, shape).map(as_array))
        return State(
            int(as_array(self.iterations)),
            found,
            self._paths(),
            self._book.order.is_certain,
            [*map(fingerprint, self._trainable_variables)],
        )

    def set_state(self, state: State) -> None:
        """Take over a state, from `get_state` or made from another framework's.

        Args:
            state: One entry in `slots` for each variable that the optimizer was built
                with: in that order, unless `paths` say that it is another.

        Raises:
            TypeError: It is not a `State`.
            ValueError: The optimizer is not built, or the state does not fit. Then
                nothing is changed, and the message says what does not fit.
        """
        self._check_built()
        self._bring_up_to_date()
        every = self.gradient_accumulation_steps or 1
        assign_state(
            state,
            [*map(self._slots_of, range(len(self._velocities)))],
            self._trainable_variables,
            self._iterations,
            steps=every,
            in_order=self._book.order.is_certain,
        )
        for sums in self._accumulated_gradients if every > 1 else []:
            sums.assign(ops.zeros(sums.shape, sums.dtype))

    def _paths(self) -> list[str]:
        return paths(self._trainable_variables)

    def _check_built(self) -> None:
        if not self.built:
            raise ValueError(
                "The optimizer must be built. Call `optimizer.build(variables)`, or "
                "take a step, first."
            )

    # Its configuration.

    @property
    def learning_rate(self) -> Any:
        """The current learning rate; a number can be assigned at any time."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        auto = automatic.asked_for(learning_rate)
        if auto is not None:
            if self._auto is None or not self._auto.looks_like(auto):
                raise ValueError(
                    "How a learning rate is found must be said when the optimizer is "
                    f"made. Received: learning_rate={learning_rate!r}"
                )
            learning_rate = auto.factor
        elif self._search is not None:
            old = super().learning_rate
            self._warn(automatic.complaint_of_factor(learning_rate, old))
        inherited: Any = keras.optimizers.Optimizer.learning_rate
        inherited.fset(self, checks.learning_rate(learning_rate))

    def _get_current_learning_rate(self) -> Any:
        if self._rate_in_force is not None:
            return self._rate_in_force
        return checks.learning_rate(super()._get_current_learning_rate())

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; programs that hold another value are not used any more."""
        if name in _OF_ROWS and backend.is_eager() and "_clocks" in vars(self):
            self._catch_up_all()  # waiting rows have followed the old one so far
        super().__setattr__(name, value)
        is_property = isinstance(getattr(type(self), name, None), property)
        if not is_property and "_steps" in vars(self):
            self._steps.forget_attributes()

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> "RMSprop":
        """Return an optimizer with the arguments that `get_config` returned."""
        config, idle = options.without_average(config)
        optimizer: RMSprop = super().from_config(config, custom_objects)
        for name, value in idle.items():
            setattr(optimizer, name, value)
        return optimizer

    def get_config(self) -> dict[str, Any]:
        """Return the arguments to make an equal optimizer with, without its state."""
        config = super().get_config()
        config |= {name: getattr(self, name) for name in options.OPTIONS}
        if self._auto is not None:
            auto = keras.saving.serialize_keras_object(self._auto)
            auto["config"]["factor"] = config["learning_rate"]
            config["learning_rate"] = auto
        return {k: float(x) if options.is_tensor(x) else x for k, x in config.items()}


_OF_ROWS = (
    *("rho", "use_ema", "ema_momentum", "ema_warmup", "sparse_update"),
    "_self_update_uid",
)
"""The options that decide how rows without a gradient are brought up to date; and what
TensorFlow sets before it restores a checkpoint, which may hold no counters."""


def _dtype_of_factor() -> str:
    """Return a dtype that rates do not have, if `tf.train.Checkpoint` may be used.

    It compares no names, but it refuses to load one dtype into another.
    """
    rates = str(keras.config.floatx())
    if keras.backend.backend() != "tensorflow":
        return rates
    return "float32" if rates == "float64" else "float64"
