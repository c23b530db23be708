"""The optimizer: its arguments, slots, configuration and saving."""

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_rmsprop import rule

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop.tensorflow import rows
    from keras_rmsprop.tensorflow.optimizer import TensorFlowOptimizer

    Optimizer: Any = TensorFlowOptimizer
else:
    Optimizer = keras.optimizers.Optimizer


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class RMSprop(Optimizer):
    r"""RMSprop: gradients divided by the root of their recent mean square.

    A drop-in for `keras.optimizers.RMSprop`, whose positional arguments, defaults,
    variables and results it shares. For each weight $w$ with gradient $g$, decay rate
    $\rho$ = `rho`, learning rate $\eta$ = `learning_rate` and $\epsilon$ = `epsilon`:

    $$v \leftarrow \rho v + (1 - \rho) g^2, \qquad
      w \leftarrow w - \eta \frac{g}{\sqrt{v + \epsilon}}$$

    With $\mu$ = `momentum` > 0 the updates are summed first, and with `centered` the
    variance takes the place of the mean square:

    $$a \leftarrow \rho a + (1 - \rho) g, \qquad
      m \leftarrow \mu m + \eta \frac{g}{\sqrt{v - a^2 + \epsilon}}, \qquad
      w \leftarrow w - m$$

    The slots $v$ (`velocity`), $m$ (`momentum`) and $a$ (`average_gradient`) have the
    shape of their weight and start at 0. Their dtype is the weight's, but never less
    than float32, so that averages of float16 and bfloat16 weights do not stall.

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
        epsilon: $\epsilon$ > 0, in units of the squared gradient: it stands inside
            the root. Defaults to `1e-7`.
        centered: Whether to divide by the root of the variance. Defaults to `False`.
        weight_decay: Number or `None`: before the update each weight loses
            `weight_decay * learning_rate` of itself (see
            `exclude_from_weight_decay`).
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
        nesterov: Whether momentum looks one step ahead: $w \leftarrow w - (\mu m + u)$
            where $u$ is what this step added to $m$. Defaults to `False`.
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
        TypeError: An argument that must be a number is none.

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
          slide 29; `centered` is from [Graves, 2013](https://arxiv.org/abs/1308.0850).
    """

    _slots_being_added = False

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
        nesterov: bool = False,
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
            learning_rate=_checked_learning_rate(learning_rate),
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
        self.rho = _checked_number("rho", rho, lambda x: 0 <= x < 1, "in [0, 1)")
        self.momentum = _checked_number(
            "momentum", momentum, lambda x: 0 <= x < 1, "in [0, 1)"
        )
        self.epsilon = _checked_number(
            "epsilon", epsilon, lambda x: 0 < x < math.inf, "finite and > 0"
        )
        self.centered = centered
        self.nesterov = nesterov
        if sparse_update not in ("exact", "lazy"):
            raise ValueError(
                '`sparse_update` must be "exact" or "lazy". '
                f"Received: sparse_update={sparse_update!r}"
            )
        self.sparse_update = sparse_update
        if jit_compile not in ("auto", True, False):
            raise ValueError(
                '`jit_compile` must be "auto", True or False. '
                f"Received: jit_compile={jit_compile!r}"
            )
        self.jit_compile = jit_compile if jit_compile == "auto" else bool(jit_compile)

    def build(self, variables: list[Any]) -> None:
        """Create the slots of `variables`: `velocity` and, where used, the others.

        Args:
            variables: The variables that later steps may update.
        """
        if self.built:
            return
        super().build(variables)
        self._slots_being_added = True
        self._velocities = self.add_optimizer_variables(variables, "velocity")
        self._momentums = (
            self.add_optimizer_variables(variables, "momentum") if self.momentum else []
        )
        self._average_gradients = (
            self.add_optimizer_variables(variables, "average_gradient")
            if self.centered
            else []
        )
        self._slots_being_added = False

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Add a variable to the optimizer; a slot gets float32 at least.

        Args:
            shape: Shape of the variable.
            initializer: What it starts with.
            dtype: Its dtype, by default `keras.config.floatx()`.
            **kwargs: See `keras.optimizers.Optimizer.add_variable`.
        """
        if self._slots_being_added:
            dtype = keras.backend.result_type(dtype, "float32")
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its slots by `rule.step`.

        Args:
            gradient: The gradient, after clipping.
            variable: The variable.
            learning_rate: The learning rate, a scalar.
        """
        i = self._get_variable_index(variable)
        slots = rule.Slots(
            self._velocities[i],
            self._momentums[i] if self.momentum else None,
            self._average_gradients[i] if self.centered else None,
        )
        dtype = slots.velocity.dtype

        def step(slots: rule.Slots) -> tuple[Any, rule.Slots]:
            return rule.step(
                ops.cast(gradient, dtype),
                slots,
                ops.cast(learning_rate, dtype),
                rho=self.rho,
                momentum=self.momentum,
                epsilon=self.epsilon,
                nesterov=self.nesterov,
            )

        if keras.backend.backend() == "tensorflow" and i in self._clocks:
            ids = self._ids.get(i)
            rows.update(variable, slots, self._clocks[i], ids, self.rho, step)
            return
        taken, new = step(slots)
        for slot, value in zip(slots, new, strict=True):
            if slot is not None:
                self.assign(slot, value)
        self.assign_sub(variable, taken)

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the moment; a number can be assigned at any time."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        Optimizer.learning_rate.fset(self, _checked_learning_rate(learning_rate))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make an equal optimizer, without its state."""
        return super().get_config() | {
            "rho": self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "centered": self.centered,
            "nesterov": self.nesterov,
            "sparse_update": self.sparse_update,
            "jit_compile": self.jit_compile,
        }


def rmsprop_optimizer(
    learning_rate: Any = 0.001, rho: float = 0.9, epsilon: float = 1e-8
) -> RMSprop:
    """Return an `RMSprop` with the documents' arguments and their defaults.

    Args:
        learning_rate: See `RMSprop`.
        rho: See `RMSprop`.
        epsilon: See `RMSprop`; smaller here.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument that must be a number is none.

    Example:
        >>> rmsprop_optimizer(rho=0.95).epsilon
        1e-08
    """
    return RMSprop(learning_rate=learning_rate, rho=rho, epsilon=epsilon)


def _checked_number(
    name: str, value: Any, in_range: Callable[[float], bool], expected: str
) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not in_range(float(value)):
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value}")
    return float(value)


def _checked_learning_rate(learning_rate: Any) -> Any:
    if not isinstance(learning_rate, numbers.Real | str | None):
        return learning_rate  # a schedule, a callable, a tensor: Keras checks these
    return _checked_number(
        "learning_rate",
        learning_rate,
        lambda x: 0 <= x < math.inf,
        "finite and >= 0",
    )
