"""The optimizer: its arguments, its step and its configuration."""

import functools
import operator
import warnings
from typing import Any

import keras
from keras import ops

from keras_rmsprop import checks, rule
from keras_rmsprop.slots import SlotOptimizer

on_tensorflow = keras.backend.backend() == "tensorflow"
if on_tensorflow:
    from keras_rmsprop.tensorflow import axes, rows

_options = operator.attrgetter(*rule.Options._fields)


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class RMSprop(SlotOptimizer):
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
        skip_nonfinite: Whether a step with a NaN or an infinity in any gradient changes
            nothing - weights, slots, averages, accumulators, `iterations` - but
            `skipped_steps`, which counts such steps. Else a NaN stays in weights and
            slots for good. It looks at the gradients as they come in: a
            `global_clipnorm` that overflows is not seen. A
            `keras.optimizers.LossScaleOptimizer` around this one skips such steps
            itself. Defaults to `False`.
        sparse_update: On the TensorFlow backend, what a `tf.IndexedSlices` gradient
            (of an embedding) does: `"exact"` gives the result of the same dense
            gradient, at the cost of its rows where silent rows stay (no momentum, no
            weight decay of that variable, no EMA, no accumulation). Averages of
            silent rows then stand as they last were, until their turn. `"lazy"` updates
            the rows only, whatever the options but accumulation. Defaults to `"exact"`.
        jit_compile: On the TensorFlow backend, whether a step is an XLA program of its
            own: `"auto"` where that is faster (an eager step unless all variables are
            small, and in a `tf.function` the step of a model with large ones), `True`
            in every `tf.function` too, `False` never. Inside a function that XLA
            compiles the step is part of that program. Steps with sparse gradients,
            under `tf.distribute` or with variables on several devices are never
            compiled on their own. `False` is also for constraints that compute outside
            TensorFlow. Defaults to `"auto"`.
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
        bias_correction: bool = False,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        cautious: bool = False,
        slot_dtype: str | None = None,
        skip_nonfinite: bool = False,
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
            weight_decay=checks.optional(
                "weight_decay", weight_decay, checks.NOT_NEGATIVE
            ),
            clipnorm=checks.optional("clipnorm", clipnorm, checks.NOT_NEGATIVE),
            clipvalue=checks.optional("clipvalue", clipvalue, checks.NOT_NEGATIVE),
            global_clipnorm=checks.optional(
                "global_clipnorm", global_clipnorm, checks.NOT_NEGATIVE
            ),
            use_ema=checks.flag("use_ema", use_ema),
            ema_momentum=checks.number("ema_momentum", ema_momentum, checks.UP_TO_ONE),
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=checks.optional(
                "loss_scale_factor", loss_scale_factor, checks.POSITIVE
            ),
            gradient_accumulation_steps=(
                gradient_accumulation_steps
                and checks.integer(
                    "gradient_accumulation_steps", gradient_accumulation_steps, 2
                )
            ),
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
        self.skip_nonfinite = checks.flag("skip_nonfinite", skip_nonfinite)
        self.sparse_update = checks.one_of(
            "sparse_update", sparse_update, ("exact", "lazy")
        )
        self.jit_compile = checks.one_of(
            "jit_compile", jit_compile, ("auto", True, False)
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its slots by `rule.step`.

        Args:
            gradient: The gradient, after clipping.
            variable: The variable.
            learning_rate: The learning rate, a scalar.
        """
        i = self._get_variable_index(variable)
        slots = self._slots_of(i)
        step = functools.partial(self._step_of, i, learning_rate)
        if i in self._clocks:
            clock, ids = self._clocks[i], self._ids.get(i)
            of_rows = functools.partial(self._step_of_rows, step, gradient, variable)
            rows.update(variable, slots, clock, ids, self.rho, of_rows)
        elif on_tensorflow and self._tracing and axes.is_short(variable.shape):
            axes.update(variable, slots, gradient, step, self.iterations >= 0)
        else:
            taken, new = step(gradient, variable, slots)
            for slot, value in zip(slots, new, strict=True):
                if slot is not None:
                    self.assign(slot, value)
            self.assign_sub(variable, taken)

    def _step_of(
        self,
        i: int,
        learning_rate: Any,
        gradient: Any,
        weights: Any,
        slots: rule.Slots,
        mean: Any = ops.mean,
    ) -> tuple[Any, rule.Slots]:
        """Return what a step takes from the variable `i`, and its new slots."""
        variable, kept = self._trainable_variables[i], self._velocities[i].dtype
        of_weights = keras.backend.standardize_dtype(variable.dtype)
        dtype = keras.backend.result_type(of_weights, kept, "float32")
        rate = ops.cast(learning_rate, dtype)
        decay = self._decay_of(variable)
        weights = None if decay is None else ops.cast(weights, dtype)
        l2 = decay is not None and not self.decoupled_weight_decay
        taken, new = rule.step(
            ops.cast(gradient, dtype),
            slots.map(lambda slot: ops.cast(slot, dtype)),
            rate,
            rule.Options(*_options(self)),
            # Traced for each variable, so only where it is read.
            t=ops.cast(self.iterations + 1, dtype) if self.bias_correction else None,
            penalty=decay * weights if l2 else None,
            mean=mean,
        )
        if decay is not None and not l2:
            # The constant in float32 first, as in Keras.
            taken = taken + rate * ops.cast(decay, dtype) * weights
        return taken, self._as_stored(new, i)

    def _step_of_rows(
        self, step: Any, gradient: Any, variable: Any, slots: rule.Slots, ids: Any
    ) -> tuple[Any, rule.Slots]:
        if ids is None:
            return step(gradient, variable, slots)
        has_decay = self._decay_of(variable) is not None
        weights = rows.read(variable, ids) if has_decay else None
        mean = functools.partial(rows.mean, ids=ids, variable=variable)
        return step(gradient, weights, slots, mean)

    def _decay_of(self, variable: Any) -> float | None:
        return (self._use_weight_decay(variable) and self.weight_decay) or None

    def _joint_step(self, variable: Any, learning_rate: Any) -> tuple[Any, Any] | None:
        """Return a key and a step if variables with this key may take it together."""
        if (
            self.cautious  # counts each variable's elements
            or self.slot_dtype == "bfloat16"  # draws by their places
            or type(self).update_step is not RMSprop.update_step
        ):
            return None
        i = self._get_variable_index(variable)
        key = variable.dtype, self._velocities[i].dtype, self._decay_of(variable)
        return key, functools.partial(self._step_of, i, learning_rate)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Do nothing: `update_step` does it, in the same pass."""

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the moment; a number can be assigned at any time."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        SlotOptimizer.learning_rate.fset(self, checks.learning_rate(learning_rate))

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
            "skip_nonfinite": self.skip_nonfinite,
            "sparse_update": self.sparse_update,
            "jit_compile": self.jit_compile,
        }
