"""The optimizer: its arguments, what it keeps, its step and its configuration."""

import contextlib
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import keras
from keras import ops

from keras_rmsprop import (
    automatic,
    averages,
    checks,
    codecs,
    estimate,
    options,
    rule,
    saving,
    skipping,
)
from keras_rmsprop.alignment import Owner
from keras_rmsprop.backends import current as backend
from keras_rmsprop.backends import plain
from keras_rmsprop.backends.plain import Request, Step, Update, Way
from keras_rmsprop.explaining import explained
from keras_rmsprop.restoring import Restorer
from keras_rmsprop.slots import (
    ACCUMULATOR,
    FIRST_WEIGHT,
    GRADIENT_SUM,
    RATE_FACTOR,
    WEIGHT_AVERAGE,
    Keeper,
    in_order_of,
)
from keras_rmsprop.state import State, as_array, copied, matched

on_tensorflow = keras.backend.backend() == "tensorflow"
if on_tensorflow:
    from keras_rmsprop import sparse


class _Now:
    """What is set while a step is taken, or while a slot is made."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}
        """The rows that a step takes of tables, by the index of the table."""
        self.averages: dict[int, Any] = {}
        """The averages of these rows before the step, by the index of the table."""
        self.learning_rate: Any = None
        """The learning rate, if it was given to the step."""
        self.in_program = False
        """Whether a program that holds the step and nothing else is being traced."""
        self.may_scale = False
        """Whether gradients that are to be scaled may be so in the update."""
        self.scale: Any = None
        """What the update is to multiply gradients by, or None."""
        self.followed: list[Any] = []
        """The averages of weights that followed them in the update."""
        self.slot: tuple[str, Any, str, Sequence[int]] | None = None
        """Kind, owner, dtype and shape of the slot that is being made."""


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

    Where a line has two ways, the first is the default and an option takes the second:
    $c_t$ `bias_correction`, $d$ `epsilon_inside_sqrt=False`, $u$ `nesterov`. $\mu$ is
    `momentum`; $s$ is 1, or -1 with `maximize`; $\omega$ is `weight_decay`, or 0 with
    `decoupled_weight_decay=False`, and then $\lambda$ is `weight_decay`, else 0; $k$ is
    1, or a mask with `cautious`. Without `centered`, $a$ is 0.

    The slots $v$ (`velocity`), $m$ (`momentum`) and $a$ (`average_gradient`) have the
    shape of their weight. Their dtype is the weight's, but never less than float32,
    so that averages of float16 and bfloat16 weights do not stall (see `slot_dtype`).

    On the TensorFlow backend a step taken eagerly - in a notebook or a custom training
    loop - runs as one program: unscaling, clipping, decay, update and averages. On CPUs
    a native kernel runs the update, if there is one (`python -m keras_rmsprop.kernel`
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
            (see `AutoLearningRate`), and `found_learning_rate` is the rate. A value
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
        epsilon_inside_sqrt: Whether $\epsilon$ is added inside the root of $d$. Outside
            it is in units of the gradient, and $d$ has no finite derivative by $v$ at
            0: that matters for gradients through a step, on JAX. Defaults to `True`.
        initial_accumulator_value: $v_0$ >= 0, in units of the squared gradient; 1
            keeps the first steps short. Defaults to `0.0`.
        bias_correction: Whether to divide $v$ by $1 - \rho^t$, as Adam does, so that it
            is the mean square over the steps so far. Defaults to `False`.
        nesterov: Whether $u$ looks one step ahead of the momentum buffer. Without
            momentum it makes no difference. Defaults to `False`.
        lr_in_momentum: Whether $\eta$ enters the momentum buffer, as above; else
            $m \leftarrow \mu m + g / d$ and the update is $\eta\,k \odot u$, so that a
            changed learning rate scales past updates, too. Defaults to `True`.
        decoupled_weight_decay: Whether `weight_decay` is $\omega$, which leaves the
            slots alone; else it is $\lambda$, the L2 penalty, added to the gradient
            after clipping. Defaults to `True`.
        maximize: Whether to maximize instead of minimize. Defaults to `False`.
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
            4096 elements. Sparse gradients of a quantized table are converted to dense
            ones. Defaults to `("embeddings",)`.
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
            gradient. It costs what its rows cost if rows without a gradient stay as
            they are: no momentum, no weight decay of that variable,
            and with `use_ema` no constraint and no accumulation. The state of rows
            without a gradient, their EMA included, is brought up to date when it is
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
        **kwargs: Unpack[options.Dialect],
    ) -> None:
        given: dict[str, Any] = {**kwargs}
        learning_rate = _one_of_both(learning_rate, given)
        own = {name: given.pop(name) for name in options.DIALECT if name in given}
        auto = automatic.asked_for(learning_rate)
        if auto is not None:
            learning_rate = auto.factor
            if not centered:  # the variance of the first gradients is 0
                own.setdefault("bias_correction", True)
                epsilon = estimate.EPSILON if epsilon == 1e-7 else epsilon
        own |= {"rho": rho, "momentum": momentum, "epsilon": epsilon}
        own = options.checked(own | {"centered": centered})
        learning_rate = checks.learning_rate(learning_rate)
        is_factor = auto is not None and isinstance(learning_rate, float)
        super().__init__(
            learning_rate=(lambda: 0.0) if is_factor else learning_rate,
            ema_overwrite_frequency=ema_overwrite_frequency,
            name=name,
            **options.checked_of_keras(
                {
                    "weight_decay": weight_decay,
                    "clipnorm": clipnorm,
                    "clipvalue": clipvalue,
                    "global_clipnorm": global_clipnorm,
                    "use_ema": use_ema,
                    "ema_momentum": ema_momentum,
                    "loss_scale_factor": loss_scale_factor,
                    "gradient_accumulation_steps": gradient_accumulation_steps,
                }
            ),
            **given,
        )
        for option, value in own.items():
            setattr(self, option, value)
        self._search: Any = None if auto is None else automatic.Search(auto)
        if is_factor:
            self._learning_rate: Any = super().add_variable(
                (),
                keras.initializers.Constant(learning_rate),
                _dtype_of_factor(),
                name=RATE_FACTOR,
            )
        self.skipped_steps: Any = 0
        self._keeper = Keeper()
        self._now = _Now()
        self._runner = backend.Runner()
        self._clocks: Any = backend.clocks(
            lambda: self._trainable_variables,
            self._catch_up_all,
            lambda: self.use_ema,
            lambda: bool(vars(self).get("_accumulated_gradients")),
        )
        self._offset: Any = None
        self._restorer = Restorer(
            self._keeper,
            lambda: self._variables,
            self._owners,
            self._get_variable_index,
            self._clocks,
            # There is no public way to know. Without the private one it stays None.
            lambda: vars(self).get("_self_update_uid"),
        )

    # What it keeps for each variable of the model.

    def build(self, variables: list[Any]) -> None:
        """Create the slots of `variables`: `velocity` and, where used, the others.

        If the optimizer is built for some of them, as before layers were unfrozen, it
        is extended. A step does that by itself, but not inside `fit` on JAX.

        Args:
            variables: The variables that later steps may update.
        """
        if self.built:
            known = self._trainable_variables_indices
            if any(self._var_key(v) in known for v in variables):
                self._check_variables_are_known(list(variables))
            return
        is_to_load = self._restorer.waits
        # A variable made inside a function would be initialized after it is loaded.
        with backend.outside_functions() if is_to_load else contextlib.nullcontext():
            self._build(variables)
        if type(self).build is RMSprop.build:  # else a subclass has more to make
            self._load_what_waits()

    def _build(self, variables: list[Any]) -> None:
        options.check_slots(self.slot_dtype, self.centered)
        super().build(variables)
        make = functools.partial(self.add_optimizer_variables, variables)
        value = float(self.initial_accumulator_value)
        # `Constant` has what it makes in memory twice.
        start = keras.initializers.Constant(value) if value else "zeros"
        self._velocities = make("velocity", start)
        has_momentum = options.is_on(self.momentum)
        self._momentums = make("momentum") if has_momentum else []
        self._average_gradients = make("average_gradient") if self.centered else []
        if self._search is not None:
            self._search.build(make, self.add_variable)
        for name, draw in codecs.named(self.slot_dtype).extra.items():
            drawn = keras.initializers.Constant(draw())
            self._offset = self.add_variable((), drawn, "int32", name=name)
        if self.skip_nonfinite:
            self.skipped_steps = self.add_variable(
                (), "zeros", "int32", name="skipped_steps"
            )

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
        dtype = keras.backend.standardize_dtype(reference_variable.dtype)
        shape = reference_variable.shape
        if name in rule.Slots._fields:
            codec, _ = self._codec(reference_variable)
            number = rule.Slots._fields.index(name)
            if number:  # all slots of a variable are kept as its velocity is
                i = self._get_variable_index(reference_variable)
                codec = codecs.of(self._velocities[i])
            initializer = codec.initializer(initializer, shape, number)
            dtype, shape = codec.dtype(dtype), codec.shape(shape)
        elif name == ACCUMULATOR:
            # In bfloat16 a sum of 256 ones does not grow.
            dtype = rule.wide(dtype)
        if self._search is not None and name in (FIRST_WEIGHT, GRADIENT_SUM):
            dtype = rule.wide(dtype)
            shape = self._search.options.sample(shape).shape
        self._now.slot = name or "var", reference_variable, dtype, shape
        try:
            return super().add_variable_from_reference(
                reference_variable, name=name, initializer=initializer
            )
        finally:
            self._now.slot = None

    def _codec(self, variable: Any) -> tuple[codecs.Float, str]:
        """Return how the slots of a variable of the model will be kept, and why."""
        path = getattr(variable, "path", variable.name)
        return codecs.chosen(self.slot_dtype, path, variable.shape, self.float32_slots)

    def _is_in_blocks(self, variable: Any) -> bool:
        """Whether slots of a variable are kept, or will be, in no rows."""
        i = self._trainable_variables_indices.get(self._var_key(variable))
        is_there = self.built and i is not None
        codec = codecs.of(self._velocities[i]) if is_there else self._codec(variable)[0]
        return codec.in_blocks

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Add a variable to the optimizer; see `keras.optimizers.Optimizer`.

        When the optimizer is built anew, as after layers were unfrozen, return the
        variable that exists.
        """
        given: tuple[Any, Any, Any, Any] = kwargs.get("name"), None, dtype, shape
        kind, owner, dtype, wanted = self._now.slot or given
        if tuple(wanted) != tuple(shape):
            if (layout := kwargs.get("layout")) is not None:
                is_sample = kind in (FIRST_WEIGHT, GRADIENT_SUM)
                kwargs["layout"] = (
                    self._search.options.sample(shape).layout(layout)
                    if is_sample
                    # None would mean: as those have it whose paths look alike.
                    else type(layout)([None] * len(wanted), layout.device_mesh)
                )
            shape = wanted
        make = functools.partial(
            super().add_variable, shape, initializer, dtype, **kwargs
        )
        key = None if owner is None else self._var_key(owner)
        initial = keras.initializers.get(initializer)

        def start() -> Any:
            # Copies: on JAX both would share one buffer, and give it away twice.
            if kind == WEIGHT_AVERAGE:
                return copied(owner)
            if kind == FIRST_WEIGHT:
                return self._search.options.sample(owner.shape).of(copied(owner))
            return initial(shape, dtype)

        return self._keeper.find_or_make(str(kind), key, owner, make, start)

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
        with backend.outside_functions():
            self._build_anew(
                in_order_of(self._trainable_variables, variables, self._var_key)
            )

    def _build_anew(self, variables: list[Any]) -> None:
        """Build for more variables; reuse what exists for the others."""
        before = self._trainable_variables
        self._keeper.begin()
        self.built = False
        try:
            self.build(variables)
        finally:
            self.built = True
        for kept in self._keeper.made():
            # Averages as the weights are now.
            backend.assign_everywhere(kept.variable, kept.start())
        self._put_in_order()
        if self._clocks:
            self._clocks.move(
                {i: self._get_variable_index(v) for i, v in enumerate(before)}
            )

    def _put_in_order(self) -> None:
        """Order `variables` as a new optimizer would. Keras has no public way to."""
        own: Any = vars(self)
        tracker = own.pop("_tracker")  # without it a list is not tracked again
        self._variables: Any = self._keeper.in_order(own["_variables"])
        self._tracker = tracker
        is_variable, _ = tracker.config["variables"]
        tracker.config["variables"] = is_variable, self._variables

    # A step.

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
        variables = list(self._trainable_variables if variables is None else variables)
        if len(grads) != len(variables):
            raise ValueError(
                "There must be one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        grads = backend.as_gradients(grads, variables)
        is_sparse = backend.has_slices(grads)
        if not self.built or is_sparse:
            self._prepare(grads, variables)
        tables: set[int] = set()
        if is_sparse or not backend.is_eager():
            tables = self._tables_to_be(grads, variables)
        request = Request(
            jit_compile=self._jit_compile(),
            attributes=vars(self),
            also=self._also_baked_in,
            learning_rate=lambda: self.learning_rate,
            make_clocks=lambda: self._make_clocks(tables),
            prepare=functools.partial(self._prepare, grads, variables),
            is_for_kernel=lambda: self._is_for_kernel(variables),
            in_blocks=self._has_blocks,
        )
        return self._runner.run(self._take, grads, variables, request)

    def _is_for_kernel(self, variables: Sequence[Any]) -> bool:
        """Whether a native kernel takes nearly all of a step of these variables.

        What else there may be to do, XLA does faster than one operation after another.
        """
        others = (
            *(self.clipnorm, self.clipvalue, self.loss_scale_factor),
            self.gradient_accumulation_steps,
            *(getattr(variable, "constraint", None) for variable in variables),
        )
        known = (
            self.built
            and {self._var_key(variable) for variable in variables}
            <= self._trainable_variables_indices.keys()
        )
        does_more = self._has_own_step() or any(x is not None for x in others)
        if self._jit_compile() != "auto" or does_more or not known:
            return False
        updates = [self._update_of(None, variable) for variable in variables]
        return backend.is_for_kernel(updates, self._step(0.0))

    def _has_blocks(self) -> bool:
        """Whether slots of any variable are kept in blocks."""
        count = len(self._velocities) if self.built else 0
        return any(codecs.are_in_blocks(self._slots_of(i)) for i in range(count))

    def _also_baked_in(self) -> tuple[Any, ...]:
        """Return what a trace holds as constants besides the attributes of this."""
        if not (self.use_ema and self.ema_overwrite_frequency):
            return (*self._clocks,)
        return *self._clocks, *map(_is_trainable, self._trainable_variables)

    def _make_clocks(self, tables: Iterable[int]) -> None:
        for i in sorted(tables):
            self._clocks.make(i)

    def _jit_compile(self) -> bool | str:
        """Return the option; with "auto" a subclass' step runs as Keras runs it."""
        own_step = self.jit_compile == "auto" and self._has_own_step()
        return False if own_step else self.jit_compile

    def _has_own_step(self) -> bool:
        """Whether a subclass, or this instance, takes steps in its own way."""
        return self._has_own(_STEP_METHODS)

    def _has_own(self, methods: Mapping[str, Any]) -> bool:
        """Whether a subclass, or this instance, has others than these methods."""
        own, kind = vars(self), type(self)
        return any(
            name in own or getattr(kind, name) is not method
            for name, method in methods.items()
        )

    def _prepare(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Check gradients; only then make slots for variables that have none."""
        for gradient, variable in zip(grads, variables, strict=True):
            backend.check(gradient, variable)
        if not self.built:
            self.build(list(variables))
        self._load_what_waits()
        self._check_variables_are_known(list(variables))
        return self._variables

    def _tables_to_be(self, grads: Sequence[Any], variables: Sequence[Any]) -> set[int]:
        """Return the tables that get a clock with this step, by their index.

        A table that somebody's graph updates without a clock gets none later: that
        graph would not know of it.
        """
        found = set()
        for gradient, variable in zip(grads, variables, strict=True):
            if not backend.is_slices(gradient):
                continue
            index = self._get_variable_index(variable)
            if index not in self._clocks and self._rows_suffice(variable):
                sparse.check_ids(gradient, variable)
                found.add(index)
        if not backend.is_eager():
            places = self._trainable_variables_indices
            with_clock = found.union(self._clocks)
            for gradient, variable in zip(grads, variables, strict=True):
                key = self._var_key(variable)
                if gradient is not None and places.get(key) not in with_clock:
                    self._clocks.refused.add(key)
            if self.use_ema and self.ema_overwrite_frequency:
                # Averages replace the weights of all, those without a gradient, too.
                self._clocks.refused |= {
                    key for key, place in places.items() if place not in with_clock
                }
        return found

    def _rows_suffice(self, variable: Any) -> bool:
        """Whether a step may leave out the rows of a table that have no gradient."""
        return not self._why_all_rows(variable)

    def _why_all_rows(self, variable: Any) -> str:
        """Return why a step must not leave out rows without a gradient, or nothing."""
        reasons = {
            "`use_ema` averages at each call, `gradient_accumulation_steps` sums": (
                self.use_ema and self.gradient_accumulation_steps
            ),
            "`update_step` is a subclass'": self._has_own_step(),
            "`rho` may change unseen": options.is_tensor(self.rho),
            "its slots are kept in blocks, not in rows": self._is_in_blocks(variable),
            "the learning rate is found from whole rows": (
                self._search is not None
                and self._search.options.sample(variable.shape).whole_rows
            ),
            "`ema_momentum` may change unseen": (
                self.use_ema and options.is_tensor(self.ema_momentum)
            ),
            "a graph updates the table densely": (
                self._var_key(variable) in self._clocks.refused
            ),
        }
        if self.sparse_update != "lazy":
            reasons |= {
                "`momentum` moves silent rows": options.is_on(self.momentum),
                "`use_ema` averages what a constraint does to silent rows": (
                    self.use_ema and getattr(variable, "constraint", None) is not None
                ),
                "`weight_decay` moves silent rows": self._decay_of(variable)
                is not None,
            }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _take(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        learning_rate: Any = None,
        in_program: bool = False,
    ) -> None:
        """Take a step as Keras does, with sparse gradients as those of their rows.

        Args:
            grads: A tensor, slices or None for each variable.
            variables: The variables.
            learning_rate: The learning rate, or None for the current one.
            in_program: Whether this is traced for a program of its own.
        """
        self._prepare(grads, variables)
        if self.skip_nonfinite and isinstance(self.skipped_steps, int):
            raise ValueError(
                "`skip_nonfinite` must be given when the optimizer is made, or before "
                "it is built. Received: skip_nonfinite=True later"
            )
        clocks = self._clocks_in_step(grads, variables)
        grads, rows, asserts = backend.as_taken(
            grads, variables, clocks, self._native()
        )
        now = self._now
        now.learning_rate, now.in_program = learning_rate, in_program
        now.may_scale = self._scales_in_update()
        now.rows = {
            self._get_variable_index(v): ids
            for v, ids in zip(variables, rows, strict=True)
            if ids is not None
        }
        given = [g for g in grads if g is not None]
        if self.gradient_accumulation_steps:
            grads = list(map(self._summand, grads, variables))
        apply = super().apply

        def step() -> None:
            if tables := self._averaged_by_rows():
                indices = map(self._get_variable_index, variables)
                updated = {
                    i: now.rows.get(i)
                    for i, g in zip(indices, grads, strict=True)
                    if g is not None
                }
                now.averages = averages.before_step(tables, updated, self.iterations)
            apply(grads, variables)

        try:
            # Nothing is written before all indices are known to be good.
            with backend.after(asserts):
                if not (self.skip_nonfinite and given):
                    step()
                    return
                finite = backend.all_finite(given, self._native())
                state = [*self._trainable_variables, *self._variables]
                skipping.unless_bad(step, finite, state)
                # Not in a branch: XLA leaves a condition alone only if one is empty.
                self.skipped_steps.assign_add(1 - ops.cast(finite, "int32"))
        finally:
            now.learning_rate, now.in_program = None, False
            now.may_scale, now.scale = False, None
            now.rows, now.averages, now.followed = {}, {}, []

    def _summand(self, gradient: Any, variable: Any) -> Any:
        """Return a gradient in the form that is summed up: for a table, its rows."""
        i = self._get_variable_index(variable)
        ids = self._now.rows.get(i)
        if ids is None:
            return gradient

        def on_sum(rows: Any) -> None:
            self._now.rows[i] = rows

        return sparse.Summand(gradient, ids, self._clocks[i], on_sum)

    def _clocks_in_step(
        self, grads: Sequence[Any], variables: Sequence[Any]
    ) -> list[Any]:
        """Return the clock of each table of which a step takes the rows, else None."""
        if not self._clocks:
            return [None] * len(variables)
        indices = [self._get_variable_index(v) for v in variables]
        if self.gradient_accumulation_steps and backend.inside_xla():
            return [None] * len(indices)  # which rows have sums is not known there
        if self._has_own_step():
            for i in {*indices} & {*self._clocks}:
                self._catch_up(i)  # as such a step knows no clock
        return [
            self._clocks[i]
            if backend.is_slices(gradient)
            and i in self._clocks
            and indices.count(i) == 1
            and self._rows_suffice(variable)
            else None
            for gradient, variable, i in zip(grads, variables, indices, strict=True)
        ]

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
        if not self._has_own_step():
            self._update([gradient], [variable], learning_rate)
            return
        # No rows, and through the methods that a subclass may have overridden.
        one = self._update_of(gradient, variable)._replace(rows=None)
        plain.update_one(one, self._step(learning_rate), self.assign, self.assign_sub)

    # Keras' own of these would go through `tf.distribute` again, and know no rows.

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], rate: Any
    ) -> None:
        if self._search is not None:
            indices = map(self._get_variable_index, trainable_variables)
            distance = self._search.distance(
                self._trainable_variables,
                [*zip(indices, grads, strict=True)],
                self._rows_of,
                rate,
                sign=-1 if self.maximize else 1,
                fold=backend.folds(),
                scale=self._now.scale,
                kernel=backend.searching_kernel(self._native()),
            )
            rate = self._rate_of(distance, rate)
        if self._has_own_step():
            for gradient, variable in zip(grads, trainable_variables, strict=True):
                self.update_step(gradient, variable, rate)
        else:
            self._update(grads, trainable_variables, rate)

    def _search_is_known(self) -> bool:
        """Whether the estimate is known now, and not in a function being traced."""
        kept = self._search.estimate
        if kept is None:
            return True
        return backend.is_eager() and options.has_value(kept[0])

    def _rate_of(self, distance: Any, factor: Any) -> Any:
        """Return the learning rate of a distance: with momentum, steps add up."""
        return ops.cast(factor, "float32") * distance * (1 - self.momentum)

    @property
    def found_learning_rate(self) -> Any:
        """The learning rate found while training, of the last step.

        It is a number, or a tensor in a `tf.function`, where the optimizer must be
        built: `learning_rate` times the distance that was found, times `1 - momentum`.
        It is None without `learning_rate="auto"`. A warning says if it seems wrong.
        """
        if self._search is None:
            return None
        factor = self._get_current_learning_rate()
        if not self._search_is_known():
            return self._rate_of(self._search.estimate[0], factor)
        self._warn(self._search.complaint())
        return float(self._rate_of(self._search.known().distance, factor))

    def _update(
        self, grads: Sequence[Any], variables: Sequence[Any], rate: Any
    ) -> None:
        updates = list(map(self._update_of, grads, variables))
        self._now.followed = backend.update(
            updates, self._step(rate), in_program=self._now.in_program
        )

    def _update_of(self, gradient: Any, variable: Any) -> Update:
        """Return what a step does to a variable."""
        i = self._get_variable_index(variable)
        slots, rows = self._slots_of(i), self._rows_of(i)
        average = self._weight_averages[i] if self.use_ema else None
        decay = self._decay_of(variable)
        return Update(variable, gradient, slots, decay, rows, average)

    def _rows_of(self, i: int) -> Any:
        """Return the rows of a table that the step takes; None if it has no clock."""
        if i not in self._clocks:
            return None
        return sparse.Rows(self._clocks[i], self._now.rows.get(i))

    def _slots_of(self, i: int) -> rule.Slots:
        return rule.Slots(
            self._velocities[i],
            self._momentums[i] if options.is_on(self.momentum) else None,
            self._average_gradients[i] if self.centered else None,
        )

    def _decay_of(self, variable: Any) -> Any:
        """Return the weight decay that is a part of a variable's update, or None."""
        if not options.is_on(self.weight_decay) or self._decays_in_its_own_way():
            return None
        return self.weight_decay if self._use_weight_decay(variable) else None

    def _decays_in_its_own_way(self) -> bool:
        return self.decoupled_weight_decay and self._has_own(_DECAY_METHODS)

    def _step(self, learning_rate: Any) -> Step:
        """Return what is the same for all variables of a step."""
        constants = (getattr(self, name) for name in rule.Options._fields)
        return Step(
            rule.Options(*constants),
            learning_rate,
            self._draw(),
            self.decoupled_weight_decay,
            scale=self._now.scale,
            native=bool(self._native()),
            share=self._share_in_update(),
        )

    def _share_in_update(self) -> Any:
        """Return how averages follow in the update itself; None if they do not."""
        if not self.use_ema or self.gradient_accumulation_steps:
            return None  # Keras averages at each call, also at those that only sum up
        if self._has_own_step() or self._has_own(_METHODS_OF_AVERAGES):
            return None
        return functools.partial(self._ema().at, self.iterations)

    def _ema(self) -> averages.Momentum:
        return averages.Momentum(self.ema_momentum, self.ema_warmup)

    def _draw(self) -> codecs.Draw:
        return codecs.Draw(self._offset, self.iterations)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Do nothing, as it is part of the update; for a subclass do as Keras does."""
        if self._decays_in_its_own_way():
            super()._apply_weight_decay(variables)

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        norm, global_norm = self.clipnorm, self.global_clipnorm
        if on_tensorflow and (norm or global_norm) and backend.inside_xla():
            return backend.clipped(grads, norm, global_norm)
        if global_norm and not norm and self._now.may_scale:
            self._now.scale = backend.scale_of_global_norm(
                grads, global_norm, self._native()
            )
            if self._now.scale is not None:
                return grads
        return super()._clip_gradients(grads)

    def _native(self) -> Sequence[Any]:
        """Return variables where a native kernel may compute; none if none may."""
        return [] if self._jit_compile() is False else self._trainable_variables

    def _scales_in_update(self) -> bool:
        """Whether nobody sees gradients between clipping and the update."""
        return not self._has_own_step() and not self._has_own(_METHODS_IN_BETWEEN)

    def _backend_increment_gradient_accumulators(
        self, grads: Sequence[Any], acc_grads: Sequence[Any]
    ) -> None:
        places = {id(sums): i for i, sums in enumerate(self._accumulated_gradients)}
        for gradient, sums in zip(grads, acc_grads, strict=True):
            i = places[id(sums)]
            if i in self._now.rows:
                gradient.add_to(sums)
                continue
            sums.assign_add(gradient)
            if i in self._clocks:
                self._clocks[i].mark_sums(True)

    def _backend_reset_gradient_accumulators(self) -> None:
        if not self._clocks:
            super()._backend_reset_gradient_accumulators()
            return
        for i, sums in enumerate(self._accumulated_gradients):
            ids = self._now.rows.get(i)
            if ids is None:
                sums.assign(ops.zeros_like(sums))
            else:
                sparse.write(sums, ops.zeros_like(sparse.read(sums, ids)), ids)
            if i in self._clocks:
                self._clocks[i].mark_sums(False, ids)

    def _update_model_variables_moving_average(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        followed = {id(average) for average in self._now.followed}
        averages.follow(
            trainable_variables,
            [None if id(x) in followed else x for x in self._weight_averages],
            self._now.rows,
            self.iterations,
            self._ema(),
            self._averaged_by_rows(),
            self._now.averages,
        )

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        """The averages of the weights, under the name by which Keras reads them."""
        if backend.is_eager() and hasattr(self, "_weight_averages"):
            self._catch_up_all()
        if keras.backend.backend() != "jax":
            return self._weight_averages
        # There Keras itself replaces weights by these, those of frozen layers, too.
        pairs = zip(self._trainable_variables, self._weight_averages, strict=True)
        return [average if _is_trainable(v) else v for v, average in pairs]

    @_model_variables_moving_average.setter
    def _model_variables_moving_average(self, variables: list[Any]) -> None:
        self._weight_averages = variables

    def _averaged_by_rows(self) -> dict[int, averages.Table]:
        """Return the tables in whose averages silent rows may wait, by their index."""
        is_lazy = self.sparse_update == "lazy"
        if not self.use_ema or is_lazy or options.is_tensor(self.ema_momentum):
            return {}
        return {
            i: averages.Table(
                self._trainable_variables[i],
                self._weight_averages[i],
                self._clocks[i].average,
                self._ema(),
            )
            for i in self._clocks
            if self._clocks[i].average is not None
        }

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        places = self._trainable_variables_indices
        known = [
            v
            for v in trainable_variables
            if self._var_key(v) in places and _is_trainable(v)
        ]
        indices = list(map(self._get_variable_index, known))
        for i, table in self._averaged_by_rows().items():
            if i in indices:
                table.catch_up()
        averages.replace(known, [self._weight_averages[i] for i in indices])

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """End a training, as `fit` does; see `keras.optimizers.Optimizer`.

        Args:
            var_list: The model's variables.
        """
        # On JAX `fit` has taken all values if a step failed; an error about them would
        # hide that of the step. There is no public way to know.
        if self.built and getattr(self._iterations, "_value", 0) is None:
            return
        if self._search is not None and self.built and self._search_is_known():
            self._warn(self._search.complaint(self._trainable_variables))
        super().finalize_variable_values(var_list)

    def explain(self) -> str:
        """Say which way each variable's update goes, and why.

        Raises:
            ValueError: The optimizer is not built.

        Example:
            >>> import keras
            >>> from keras_rmsprop import RMSprop
            >>> optimizer = RMSprop(jit_compile=False)
            >>> optimizer.build([keras.Variable([1.0, 2.0], name="bias")])
            >>> print(optimizer.explain())
            An eager step runs operation by operation:
              1 end to end with others (small, so operations cost more than what they
                compute): bias (2,)
            In `fit` and in a `tf.function` a step is part of that graph:
              1 end to end with others (small, so operations cost more than what they
                compute): bias (2,)
        """
        self._check_built()
        variables = self._trainable_variables
        updates = list(map(self._update_of, [None] * len(variables), variables))
        jit_compile, step = self._jit_compile(), self._step(0.0)
        steps: dict[str, list[Way]] = {}
        kinds = backend.kinds_of_steps(
            variables, jit_compile, self._is_for_kernel(variables), self._has_blocks()
        )
        for text, context in kinds.items():
            steps[text] = [self._way(one, step, context) for one in updates]
        shapes = [tuple(v.shape) for v in variables]
        names = [f"{p} {s}" for p, s in zip(self._paths(), shapes, strict=True)]
        text = explained(steps, names)
        if jit_compile is not False and (why := backend.why_no_kernel()):
            text += f"\nNo kernel: {why}."
        slots = [self._slots_of(i) for i in range(len(variables))]
        if self._has_blocks():
            kept = [
                codecs.explained(of_one, self._codec(variable)[1])
                for of_one, variable in zip(slots, variables, strict=True)
            ]
            ways = [Way(*one) for one in kept]
            text += "\n" + explained({"What a step leaves is kept as:": ways}, names)
        if self._search is not None:
            text += f"\nThe learning rate found is {self.found_learning_rate:.3g}."
        return text

    def _way(self, one: Update, step: Step, context: Mapping[str, bool]) -> Way:
        if self._has_own_step():
            return Way("by its own `update_step`", "as Keras would")
        if one.slots.velocity is None:
            return Way("replaced by its gradient", "as of float8 training")
        why = self._why_all_rows(one.variable)
        if one.rows is not None and why:
            return Way("by all rows", f"sparse gradients, but {why}")
        return backend.way(one, step, **context)

    # Its state: every door leads through `variables` or `get_state`.

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables: those of the built-in, in its order.

        If you read them outside a function, the averages of all rows are up to date.
        """
        if backend.is_eager() and not saving.is_walking():
            self._load_what_waits()
            self._catch_up_all()
        return super().variables

    def _catch_up_all(self) -> None:
        """Bring the averages of all rows of all tables up to date."""
        for i in self._clocks:
            self._catch_up(i)

    def _catch_up(self, i: int) -> None:
        """Bring the averages of all rows of a table up to date."""
        clock = self._clocks[i]
        if not backend.is_eager() or clock.is_behind():
            if self._search is not None:
                estimate.catch_up(self._search.sums[i], clock)
            sparse.catch_up(self._slots_of(i), clock, self.rho, self._draw())
        clock.mark_sums(True)  # what is written to the sums comes in another way
        table = self._averaged_by_rows().get(i)
        if table and (not backend.is_eager() or table.clock.is_behind()):
            table.catch_up()

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the optimizer's variables; see `keras.optimizers.Optimizer`."""
        _ = self.variables  # up to date, they need no clock
        super().set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Save the state, with names by which it is found again.

        Args:
            store: See `keras.optimizers.Optimizer`.
        """
        _ = self.variables  # up to date
        self._restorer.save(store, built=self.built)

    def load_own_variables(self, store: Any) -> None:
        """Load the state, or keep it until the optimizer is built, if it is not yet.

        Values are matched by their place among the model's variables, with names as a
        check. What the file does not have starts fresh, and a warning says so.

        Args:
            store: See `keras.optimizers.Optimizer`.

        Raises:
            ValueError: A value in the file is not numeric; nothing is changed.
        """
        self._restorer.load(store, built=self.built, who=self.name)

    def _load_what_waits(self) -> None:
        """Load the file that waits, if there are variables now."""
        if self.built:
            self._restorer.load_what_waits(self.name)

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
        self._load_what_waits()
        found = []
        for i in range(len(self._velocities)):
            slots = self._slots_of(i)
            if i in self._clocks:
                slots = sparse.caught_up(slots, sparse.Rows(self._clocks[i]), self.rho)
            shape = self._trainable_variables[i].shape
            found.append(codecs.as_numbers(slots, shape).map(as_array))
        return State(int(as_array(self.iterations)), found, self._paths())

    def set_state(self, state: State) -> None:
        """Take over a state, from `get_state` or made from another framework's.

        Args:
            state: One entry in `slots` for each variable that the optimizer was built
                with, in that order. `paths` is not read.

        Raises:
            TypeError: It is not a `State`.
            ValueError: The optimizer is not built, or the state does not fit. Then
                nothing is changed, and the message says what does not fit.
        """
        self._check_built()
        if not isinstance(state, State):
            raise TypeError(
                f"`state` must be a `State`, as of `get_state`. Received: {state!r}"
            )
        _ = self.variables  # up to date, they need no clock
        iterations = checks.integer("iterations", state.iterations, 0)
        places = [
            codecs.places(self._slots_of(i), variable.shape)
            for i, variable in enumerate(self._trainable_variables)
        ]
        for place, array in matched(places, state.slots, self._paths()):
            place.assign(array.copy())  # JAX may share the memory of an array
        every = self.gradient_accumulation_steps or 1
        self._iterations.assign(iterations * every)
        for sums in self._accumulated_gradients if every > 1 else []:
            sums.assign(ops.zeros(sums.shape, sums.dtype))
        for i in self._clocks:
            self._clocks[i].reset()

    def _owners(self) -> list[Owner]:
        shapes = [tuple(v.shape) for v in self._trainable_variables]
        return list(map(Owner, self._paths(), shapes))

    def _paths(self) -> list[str]:
        """Return the paths of the variables; those of TensorFlow only have names."""
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

    # Its configuration.

    @property
    def learning_rate(self) -> Any:
        """The current learning rate; a number can be assigned at any time."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        auto = automatic.asked_for(learning_rate)
        if auto is not None:
            if self._search is None or not self._search.options.looks_like(auto):
                raise ValueError(
                    "How a learning rate is found must be said when the optimizer is "
                    f"made. Received: learning_rate={learning_rate!r}"
                )
            learning_rate = auto.factor
        inherited: Any = keras.optimizers.Optimizer.learning_rate
        inherited.fset(self, checks.learning_rate(learning_rate))

    def _get_current_learning_rate(self) -> Any:
        if self._now.learning_rate is not None:
            return self._now.learning_rate
        return checks.learning_rate(super()._get_current_learning_rate())

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; programs that hold another value are not used any more."""
        if name in _OF_SILENT_ROWS and backend.is_eager() and "_clocks" in vars(self):
            self._catch_up_all()  # silent rows have followed the old one so far
        super().__setattr__(name, value)
        is_property = isinstance(getattr(type(self), name, None), property)
        if not is_property and "_runner" in vars(self):
            self._runner.forget_settings()

    def get_config(self) -> dict[str, Any]:
        """Return the arguments to make an equal optimizer with, without its state."""
        config = super().get_config()
        config |= {name: getattr(self, name) for name in options.OPTIONS}
        if self._search is not None:
            auto = keras.saving.serialize_keras_object(self._search.options)
            auto["config"]["factor"] = config["learning_rate"]
            config["learning_rate"] = auto
        return {k: float(x) if options.is_tensor(x) else x for k, x in config.items()}


_STEP_METHODS = {
    name: getattr(RMSprop, name)
    for name in ("update_step", "assign", "assign_add", "assign_sub")
}
"""The methods that a subclass overrides to take steps in its own way."""

_METHODS_IN_BETWEEN = {
    name: getattr(RMSprop, name)
    for name in ("_clip_gradients", "_apply_weight_decay", "_backend_update_step")
}
"""Methods that would see gradients which are yet to be scaled."""

_DECAY_METHODS = {"_apply_weight_decay": RMSprop._apply_weight_decay}
"""The method that a subclass overrides to decay weights in its own way."""

_METHODS_OF_AVERAGES = {
    name: getattr(RMSprop, name)
    for name in ("_update_model_variables_moving_average", "_backend_apply_gradients")
}
"""Methods that would see averages which have followed already."""

_OF_SILENT_ROWS = ("rho", "use_ema", "ema_momentum", "ema_warmup", "sparse_update")
"""The options that decide how silent rows are brought up to date."""

_signature = options.signature(RMSprop.__init__)
RMSprop.__init__.__signature__ = _signature  # type: ignore[attr-defined]


def _dtype_of_factor() -> str:
    """Return a dtype that rates do not have, if `tf.train.Checkpoint` may be used.

    It compares no names, but it refuses to load one dtype into another.
    """
    rates = str(keras.config.floatx())
    if not on_tensorflow:
        return rates
    return "float32" if rates == "float64" else "float64"


def _is_trainable(variable: Any) -> bool:
    return getattr(variable, "trainable", True)


def _one_of_both(learning_rate: Any, given: dict[str, Any]) -> Any:
    """Return the learning rate; take its deprecated spelling out of the arguments."""
    if "lr" not in given:
        return learning_rate
    lr = given.pop("lr")
    if learning_rate != 0.001:
        raise ValueError(
            "`lr` is the deprecated spelling of `learning_rate`: give one of them. "
            f"Received: learning_rate={learning_rate}, lr={lr}"
        )
    warnings.warn(
        "The `lr` argument is deprecated, use `learning_rate` instead.",
        DeprecationWarning,
        stacklevel=3,
    )
    return lr
