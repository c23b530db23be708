"""The optimizer: its arguments, state and configuration.

How it takes a step stands in `step.py`, how it is built in `building.py`.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import keras

from keras_rmsprop import auto_rate, building, checks, explaining, hooks, options
from keras_rmsprop.averages import Averages
from keras_rmsprop.backends import current as backend
from keras_rmsprop.complaints import complaint_of_factor
from keras_rmsprop.saving import is_walking
from keras_rmsprop.slots import Book
from keras_rmsprop.state import State, paths
from keras_rmsprop.state_io import StateIO, check_built
from keras_rmsprop.stepping import Steps
from keras_rmsprop.tables import OPTIONS_OF_ROWS


@keras.saving.register_keras_serializable(package="keras_rmsprop")
class RMSprop(keras.optimizers.Optimizer):
    r"""RMSprop: gradients divided by the root of their recent mean square.

    A drop-in for `keras.optimizers.RMSprop`, with the same positional arguments,
    defaults, variables and results. For each weight $w$ with gradient $g$, decay rate
    $\rho$ = `rho`, learning rate $\eta$ = `learning_rate` and $\epsilon$ = `epsilon`:

    $$v \leftarrow \rho v + (1 - \rho) g^2, \qquad
      w \leftarrow w - \eta \frac{g}{\sqrt{v + \epsilon}}$$

    With every option, step $t = 1, 2, \dots$ is (see also `keras_rmsprop.dialects`):

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

    `maximize` sets $s$, `weight_decay` $\lambda$ or $\omega$, `bias_correction` $c_t$,
    `epsilon_inside_sqrt` $d$, `nesterov` $u$, `cautious` $k$.

    The slots $v$ (`velocity`), $m$ (`momentum`) and $a$ (`average_gradient`) have the
    shape of their weight, and its dtype, but at least float32 (see `slot_dtype`).

    An attribute assigned between two eager steps takes effect with the next. In `fit`
    and in a `tf.function` options are those of the trace, as with Keras' optimizers.

    Args:
        learning_rate: $\eta$, a number >= 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, a callable without
            arguments that returns a number, or `"auto"`, which estimates it in training
            (see `AutoLearningRate`): then `current_learning_rate` is the rate, a value
            assigned to `learning_rate` multiplies it, and other defaults change, as
            noted below. Defaults to `0.001`.
        rho: $\rho$, the decay rate of $v$ and $a$, in [0, 1). Defaults to `0.9`.
        momentum: $\mu$, the decay rate of $m$, in [0, 1). At 0 there is no $m$.
            Defaults to `0.0`, with "auto" to `0.9`. Then embedding tables (variables
            with "embeddings" in their name or `tf.IndexedSlices` gradients) have none,
            and `1 / (1 - momentum)` times the rate of others.
        epsilon: $\epsilon$ > 0, in units of the squared gradient if it stands inside
            the root, else of the gradient. Defaults to `1e-7`, with "auto" to `1e-30`.
        centered: Whether to divide by the root of the variance, $v - a^2$; else there
            is no $a$. Defaults to `False`.
        weight_decay: Number or `None`: $\omega$ or $\lambda$, see
            `decoupled_weight_decay`. `exclude_from_weight_decay` exempts variables.
        clipnorm: Number or `None`: the largest norm of one gradient.
        clipvalue: Number or `None`: the largest magnitude of an element of a gradient.
        global_clipnorm: Number or `None`: the largest norm of all gradients together.
        use_ema: Whether to track an exponential moving average (EMA) of the weights.
            Defaults to `False`, with "auto" to `True`.
        ema_momentum: Decay rate of the EMA, in [0, 1]. Defaults to `0.99`, or `0.9999`
            with "auto" and `ema_warmup`.
        ema_overwrite_frequency: Number of steps after which the EMA replaces the
            weights, or `None`: only when training ends.
        loss_scale_factor: Number or `None`: multiplies the loss and divides the
            gradients, against underflow in float16.
        gradient_accumulation_steps: Integer >= 2 or `None`: the number of calls per
            update, which takes their mean gradient.
        name: Name of the optimizer, the prefix of its variables' paths.
        epsilon_inside_sqrt: Which $d$: `True` the first, `False` the second, which has
            no finite derivative by $v$ at 0. Defaults to `True`.
        initial_accumulator_value: $v_0$ >= 0, in units of the squared gradient; 1
            keeps the first steps short. Defaults to `0.0`.
        bias_correction: Whether to divide $v$ and $a$ by $1 - \rho^t$, as Adam does.
            Defaults to `False`, with "auto" and without `centered` to `True`.
        nesterov: Which $u$: `False` the first; `True` the second, the momentum buffer
            as the next step would have it. Defaults to `False`, with "auto" to `True`.
        lr_in_momentum: Whether $\eta$ enters the momentum buffer, as above; else
            $m \leftarrow \mu m + g / d$ and the update is $\eta\,k \odot u$, so that a
            changed learning rate scales past updates, too. Defaults to `True`.
        decoupled_weight_decay: Whether `weight_decay` is $\omega$: each weight loses
            `weight_decay * learning_rate` of itself per step. Else it is $\lambda$, the
            L2 penalty, added to the gradient after clipping. Defaults to `True`.
        maximize: Whether to maximize: $s = -1$, else $s = 1$. Defaults to `False`.
        cautious: With momentum, whether to skip elements where the update would go
            against the gradient and to enlarge the others: $k = [u g > 0]$ over its
            mean in the variable (0.001 at least); else $k = 1$. Defaults to `False`.
        slot_dtype: Dtype of the slots: `None` as said above, `"float32"`, `"float64"`,
            `"bfloat16"`, or `"uint8"`, 8-bit state in blocks of 256 with a float32
            scale each (see `keras_rmsprop.blockwise`). Steps are computed in float32;
            the last two are rounded stochastically. 8-bit state is not for `centered`,
            nor is bfloat16 where gradients vary little. Defaults to `None`.
        float32_slots: With 8-bit state, names: a variable with one of them in its path
            keeps its slots in float32, as do those with fewer than 4096 elements.
            Defaults to `("embeddings",)`.
        ema_warmup: Whether the decay rate of the EMA after $t$ updates of a `fit` is at
            most $(1 + t) / (10 + t)$. Defaults to `False`, or `True` with "auto".
        skip_nonfinite: Whether a step with a NaN or an infinity in any gradient changes
            nothing but `skipped_steps`, which counts such steps. Defaults to `False`.
        sparse_update: On the TensorFlow backend, what a `tf.IndexedSlices` gradient (of
            an embedding) does. `"exact"` gives the result of the same dense gradient;
            its cost depends on the rows of the gradient only, unless other rows move,
            too: with momentum, weight decay or a constraint. `"lazy"` never moves other
            rows. Defaults to `"exact"`.
        jit_compile: On the TensorFlow backend, how a step is compiled. `"auto"`: by the
            native kernel on CPUs (`python -m keras_rmsprop.kernel` builds it), else by
            XLA where that is faster. `True`: by XLA also in every `tf.function` and in
            subclasses with an `update_step` of their own. `False`: neither, with
            operations that converters support. Inside a function that XLA compiles, the
            step is part of that program. Defaults to `"auto"`.
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

    Reference:
        [Hinton, 2012](
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf), slide
        29; `centered`: [Graves, 2013](https://arxiv.org/abs/1308.0850); `cautious`:
        [Liang et al., 2024](https://arxiv.org/abs/2411.16085).
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: float = 0.9,
        momentum: float | None = None,
        epsilon: float | None = None,
        centered: bool = False,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool | None = None,
        ema_momentum: float | None = None,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        epsilon_inside_sqrt: bool = True,
        initial_accumulator_value: float = 0.0,
        bias_correction: bool | None = None,
        nesterov: bool | None = None,
        lr_in_momentum: bool = True,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        cautious: bool = False,
        slot_dtype: Literal["bfloat16", "float32", "float64", "uint8"] | None = None,
        float32_slots: Sequence[str] = ("embeddings",),
        ema_warmup: bool | None = None,
        skip_nonfinite: bool = False,
        sparse_update: Literal["exact", "lazy"] = "exact",
        jit_compile: bool | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        learning_rate = options.learning_rate_of(learning_rate, kwargs)
        auto = auto_rate.asked_for(learning_rate)
        if auto is not None:
            learning_rate = auto.factor
        given = options.filled(locals(), auto=auto is not None)
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
        self._auto, self._rate_in_force = auto, None
        if is_factor:
            like = auto_rate.form_of_factor(learning_rate)
            self._learning_rate: Any = super().add_variable((), **like)
        self.skipped_steps: Any = 0
        self._book, self._offset = Book(), None
        self._clocks: Any = backend.clocks(self)
        self._steps, self._state_io = Steps(self, RMSprop), StateIO(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse to override what a step never calls."""
        super().__init_subclass__(**kwargs)
        hooks.refuse_others(cls)

    # The variables that it makes.

    def build(self, variables: list[Any]) -> None:
        """Create slots for variables that have none yet."""
        if self.built:
            if any(building.knows(self, [v]) for v in variables):
                building.build_for(self, variables)
            return
        with backend.outside_functions():  # else each would be a condition in a trace
            building.build(self, variables, super().build)
        if type(self).build is RMSprop.build:  # else a subclass has more to make
            self._state_io.load_pending()

    def add_variable_from_reference(
        self,
        reference_variable: Any,
        name: str | None = None,
        initializer: Any = "zeros",
    ) -> Any:
        """Add a slot of a kind (`name`) for a variable, or return the one it has."""
        owner, kind, add = reference_variable, name or "var", super().add_variable
        return building.slot(self, owner, kind, initializer, add)

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Add a variable, or return the one of that name; see Keras' `Optimizer`."""
        add, initial = super().add_variable, keras.initializers.get(initializer)
        make = functools.partial(add, shape, initializer, dtype, **kwargs)
        kind, start = str(kwargs.get("name")), lambda: initial(shape, dtype)
        return self._book.find_or_make(kind, None, make, start)

    # A step. What a subclass may override, and calls with `super()`, is in `hooks.py`.

    @backend.without_autograph
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
        if trainable_variables is None and self.built and len(grads) > 0:
            self._book.order.check()
            trainable_variables = self._trainable_variables
        if trainable_variables is None or len(grads) == 0:
            return super().apply(grads, trainable_variables)  # no step, or an error
        return self._steps.run(grads, list(trainable_variables))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its slots, given its whole gradient after clipping.

        If a subclass overrides it, an eager step runs operation by operation.
        """
        self._steps.update_one(gradient, variable, learning_rate)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], rate: Any
    ) -> None:
        self._steps.update(grads, trainable_variables, rate)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        if not backend.decay(self, variables):
            super()._apply_weight_decay(variables)

    def _update_model_variables_moving_average(self, _: Sequence[Any]) -> None:
        Averages(self).follow([], {}, [])

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        Averages(self).replace(trainable_variables)

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        """The averages of the weights, under the name by which Keras reads them."""
        if backend.is_eager() and hasattr(self, "_weight_averages"):
            self._state_io.catch_up()
        return self._weight_averages

    @_model_variables_moving_average.setter
    def _model_variables_moving_average(self, variables: list[Any]) -> None:
        self._weight_averages = variables

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """End a training, as `fit` does; see `keras.optimizers.Optimizer`."""
        if not self.built or getattr(self._iterations, "_value", 0) is None:
            return  # no step was taken, or on JAX one failed in `fit`: no value is left
        super().finalize_variable_values(var_list)
        steps = Averages(self).warm_up_again()
        if self._search is not None:
            self._warn(self._search.end_fit(self._trainable_variables, steps))

    def explain(self) -> str:
        r"""Say how each variable is updated, and why.

        Raises:
            ValueError: The optimizer is not built.

        Example:
            >>> import keras
            >>> from keras_rmsprop import RMSprop
            >>> optimizer = RMSprop(jit_compile=False, cautious=True)
            >>> optimizer.build([keras.Variable([1.0, 2.0], name="bias")])
            >>> print(optimizer.explain().splitlines()[1].strip())
            1 on its own (`cautious` counts each variable's elements): bias (2,)
        """
        check_built(self)
        return explaining.explain(self._steps, paths(self._trainable_variables))

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables, in the built-in's order; all rows up to date."""
        if backend.is_eager() and not is_walking():
            self._state_io.bring_up_to_date()
        return super().variables

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the optimizer's variables; see `keras.optimizers.Optimizer`."""
        self._state_io.bring_up_to_date()
        self._state_io.warn_of_order()
        super().set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Save the state, with names by which it is found again."""
        self._state_io.save(store)

    def load_own_variables(self, store: Any) -> None:
        """Load the state, now or, if the optimizer is not built yet, when it is.

        A value goes to the variable with the weights that its variable had; else by
        position, with names as a check. A warning says what starts fresh.
        """
        self._state_io.load(store)

    def get_state(self) -> State:
        """Return the slots and the step count as NumPy arrays, in float32 at least.

        Without the EMA of the weights and the estimate behind `learning_rate="auto"`.
        """
        return self._state_io.state()

    def set_state(self, state: State) -> None:
        """Take over a state, from `get_state` or made from another framework's.

        Its `slots` have an entry for each variable that the optimizer was built with:
        in that order, unless `paths` say that it is another.

        Raises:
            ValueError: The state does not fit; nothing is changed.
        """
        self._state_io.set_state(state)

    @property
    def current_learning_rate(self) -> Any:
        """The learning rate in use: that of the last step if it is found, else as set.

        With "auto", None before the first step; a warning says if it seems wrong.
        """
        factor = self._get_current_learning_rate()
        if self._search is None or self._rate_in_force is not None:
            return float(factor) if options.has_value(factor) else factor
        self._warn(self._search.complaint(factor))
        return self._search.current_rate(factor)

    @property
    def _search(self) -> Any:
        return self._steps.search if "_steps" in vars(self) else None

    @property
    def learning_rate(self) -> Any:
        """The current learning rate; a number can be assigned at any time."""
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        if (auto := auto_rate.asked_for(learning_rate)) is not None:
            auto_rate.check_same(auto, self._auto)
            learning_rate = auto.factor
        elif self._search is not None:
            old = super().learning_rate
            self._warn(complaint_of_factor(learning_rate, old))
        inherited: Any = keras.optimizers.Optimizer.learning_rate
        inherited.fset(self, checks.learning_rate(learning_rate))

    def _get_current_learning_rate(self) -> Any:
        if self._rate_in_force is not None:
            return self._rate_in_force
        return checks.learning_rate(super()._get_current_learning_rate())

    def _warn(self, message: str) -> None:
        if message:
            warnings.warn(f"Optimizer {self.name!r}: {message}.", stacklevel=3)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; programs that hold another value are not used any more."""
        is_made = "_state_io" in vars(self)
        if is_made and name in OPTIONS_OF_ROWS and backend.is_eager():
            self._state_io.before_change()  # waiting rows followed the old one so far
        super().__setattr__(name, value)
        if is_made and not isinstance(getattr(type(self), name, None), property):
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
