"""What a step needs of the backend that Keras runs on, and what a backend needs of it.

`Backend` works with any backend of Keras, and is what JAX uses. `tensorflow.py` and
`torch.py` do in their own way what they can do faster.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import keras
import numpy as np
from keras import ops

from keras_rmsprop import rule, skipping
from keras_rmsprop.update import Constants, Update, Way, update_in_turn

Context = contextlib.AbstractContextManager[Any]
Function = TypeVar("Function", bound=Callable[..., Any])
Gradients = Sequence[Any]
"""A tensor, slices of a table or None for each variable."""


class Stepper(Protocol):
    """What a backend asks of an optimizer whose step it takes."""

    programs: Any
    """What `Backend.programs` returned."""

    @property
    def learning_rate(self) -> Any:
        """A variable, or the present value of anything else."""

    @property
    def jit_compile(self) -> bool | str:
        """The option; a subclass' own step is not compiled unless it is `True`."""

    def calls_users_python(self, variables: Sequence[Any]) -> bool:
        """Whether an eager step must call a hook or a constraint of the user's."""

    def take(
        self,
        grads: Gradients,
        variables: Sequence[Any],
        rate: Any = None,
        in_program: bool = False,
    ) -> None:
        """Take the step, stage by stage."""

    def prepare(self, grads: Gradients, variables: Sequence[Any]) -> Sequence[Any]:
        """Check gradients, build; return the optimizer's variables."""

    def attributes(self) -> Mapping[str, Any]:
        """Return what a trace holds as constants, by name."""

    def also_constant(self) -> tuple[Hashable, ...]:
        """Return what else it holds as constants."""

    def new_tables(self, grads: Gradients, variables: Sequence[Any]) -> set[int]:
        """Return the tables that get a last-update counter with this step."""

    def make_clocks(self, tables: Iterable[int]) -> None:
        """Make the last-update counters of tables."""

    def is_for_kernel(self, variables: Sequence[Any]) -> bool:
        """Whether the native kernel runs nearly all of it."""

    def has_blocks(self) -> bool:
        """Whether slots are stored in blocks, to be decoded one after the other."""


class NoClocks(tuple[int, ...]):
    """The last-update counters of tables, where a step has no rows: none."""

    refused: frozenset[Any] = frozenset()
    sparse: frozenset[Any] = frozenset()


class Backend:
    """Takes steps with operations of Keras alone, one variable after the other."""

    has_rows: ClassVar[bool] = False
    """Whether a step may update only some rows of a table."""
    searches_in_update: ClassVar[bool] = False
    """Whether `update` takes an `update.Sought` for a learning rate."""
    resets_all_sums: ClassVar[bool] = keras.backend.backend() != "jax"
    """Whether an update resets the accumulators of variables without a gradient, too.

    As in Keras."""

    def outside_functions(self) -> Context:
        """Return a context in which variables are made at once, even in a trace."""
        return contextlib.nullcontext()

    def beside(self, variable: Any, optimizer: Any) -> Context:
        """Return a context in which variables are made where another one is."""
        return contextlib.nullcontext()

    def scope(self, name: str, *, convertible: bool) -> Context:
        """Return the context of a step's operations.

        Args:
            name: Their name, for profilers.
            convertible: Whether all must be ones that converters know.
        """
        return contextlib.nullcontext()

    def without_autograph(self, function: Function) -> Function:
        """Return a function that AutoGraph does not convert in a user's graph."""
        return function

    def is_eager(self) -> bool:
        """Whether this is not being traced by TensorFlow; elsewhere it always is so."""
        return True

    def inside_xla(self) -> bool:
        """Whether the step is a part of what XLA compiles."""
        return keras.backend.backend() == "jax"

    def folds(self) -> bool:
        """Whether to split reductions (see `folding`): not if tensors are sharded."""
        return self.inside_xla() and keras.distribution.distribution() is None

    # Gradients.

    def as_gradients(self, grads: Gradients, variables: Sequence[Any]) -> list[Any]:
        """Return gradients as tensors, None as it is; a sparse one of JAX is dense."""
        return list(map(self.as_gradient, grads, variables))

    def as_gradient(self, gradient: Any, variable: Any) -> Any:
        """Return one gradient, as `as_gradients` does."""
        if hasattr(gradient, "todense"):
            return gradient.todense()
        if gradient is None or ops.is_tensor(gradient):
            return gradient
        if isinstance(gradient, np.ndarray) and np.iscomplexobj(gradient):
            return gradient  # to be refused; a cast would take the real part
        return ops.convert_to_tensor(gradient, variable.dtype)

    def check(self, gradient: Any, variable: Any) -> None:
        """Fail if a gradient does not fit its variable by its shape or dtype."""
        if gradient is None:
            return
        if not isinstance(variable, keras.Variable):
            raise TypeError(
                "Gradients must come with variables. "
                f"Received: {type(variable).__name__}"
            )
        dtype = keras.backend.standardize_dtype(gradient.dtype)
        fits = tuple(variable.shape) == tuple(gradient.shape)
        check_fits(gradient, variable, dtype, "float" in dtype, fits)

    def has_slices(self, grads: Gradients) -> bool:
        """Whether a gradient is a sparse one that the backend treats as such."""
        return False

    def is_slices(self, gradient: Any) -> bool:
        """Whether this gradient is one."""
        return False

    def widened(
        self,
        grads: Gradients,
        variables: Sequence[Any],
        clocks: Mapping[int, Any],
        *,
        kernel: bool,
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Return gradients that every stage can use: tensors in float32 at least.

        In float16 norms overflow, and what was scaled up underflows.

        Args:
            grads: One for each variable.
            variables: The variables.
            clocks: The last-update counters of tables whose rows suffice, by the
                position of the gradient.
            kernel: Whether a native kernel may sum up.

        Returns:
            The gradients; for each its distinct rows, or None; and the operations that
            fail if an index is outside its table, or a gradient of another shape.
        """
        if any(map(_wider, {g.dtype for g in grads if g is not None})):
            grads = [g if g is None else widened(g) for g in grads]
        return list(grads), [None] * len(grads), []

    # Stages of a step.

    def programs(self) -> Any:
        """Return where an optimizer keeps the traced programs of its steps."""
        return None

    def run(self, stepper: Stepper, grads: list[Any], variables: Sequence[Any]) -> None:
        """Take a step in the fastest way: here stage by stage."""
        stepper.take(grads, variables)

    def after(self, checks: Sequence[Any]) -> Context:
        """Return a context in which everything waits for checks."""
        return contextlib.nullcontext()

    def either(
        self,
        condition: Any,
        do: Callable[[], Any],
        otherwise: Callable[[], Any],
        state: Sequence[Any],
    ) -> None:
        """Do one thing or another.

        XLA updates variables in place only if one branch is empty, and copies them in
        the second: what is rarely done goes there.

        Args:
            condition: A bool scalar.
            do: What to do if it is true; changes variables, returns nothing of use.
            otherwise: What to do if it is false.
            state: The variables that these may change.
        """
        if keras.backend.backend() != "jax":
            ops.cond(condition, _empty(do), _empty(otherwise))
            return
        if not _is_traced(condition):
            do() if condition else otherwise()
            return
        # There a branch has no side effects: do both, and choose.
        before = [variable.value for variable in state]
        do()
        done = [variable.value for variable in state]
        for variable, value in zip(state, before, strict=True):
            variable.assign(value)
        otherwise()
        for variable, value in zip(state, done, strict=True):
            if value is not variable.value:
                variable.assign(ops.where(condition, value, variable.value))

    def count(self, counter: Any) -> None:
        """Add 1 to a variable."""
        counter.assign_add(1)

    def for_update_step(self, variable: Any) -> Any:
        """Return a variable as Keras gives it to a subclass' `update_step`."""
        return variable

    def has_kernel(self, variables: Sequence[Any]) -> bool:
        """Whether a native kernel may compute where all these variables are."""
        return False

    def all_finite(self, grads: Gradients, *, kernel: bool) -> Any:
        """Return whether all elements of all gradients are finite, a bool tensor."""
        return skipping.all_finite(grads, fold=self.folds())

    def logs(self, gradient: Any, *, kernel: bool) -> tuple[Any, Any]:
        """Return the sum of ln |g|, where it is finite, and of how many elements.

        Args:
            gradient: g, a tensor.
            kernel: Whether a native kernel may sum up.
        """
        # In float16 the sum of many would be infinite.
        wide = ops.cast(gradient, rule.wide(gradient.dtype))
        logs = ops.log(ops.absolute(wide))
        counts = ops.isfinite(logs)
        total = ops.sum(ops.where(counts, logs, ops.zeros_like(logs)))
        return total, ops.count_nonzero(counts)

    def clipped_by_norm(
        self, grads: Gradients, norm: float | None, global_norm: float | None
    ) -> list[Any] | None:
        """Return gradients clipped as Keras does; None: Keras' own way is as good."""
        return None

    def scale_of_global_norm(
        self, grads: Gradients, most: float, *, kernel: bool
    ) -> Any:
        """Return what multiplies gradients to clip their global norm.

        Returns:
            A scalar, NaN if the norm is infinite; or None: clip as Keras does.
        """
        return None

    def search_kernel(self, variables: Sequence[Any], *, kernel: bool) -> Any:
        """Return the kernel that may follow variables in a search, or None."""
        return None

    def update(
        self, updates: Sequence[Update], constants: Constants, *, in_program: bool
    ) -> list[Any]:
        """Update all variables.

        Args:
            updates: What to do to each.
            constants: What is the same for all.
            in_program: Whether this is traced for a program that holds nothing else.

        Returns:
            What was updated in the same pass: averages of weights, the counter.
        """
        update_in_turn(updates, constants, in_one_program=self.inside_xla())
        return []

    def assign_everywhere(self, variable: Any, value: Any) -> None:
        """Set a variable on all replicas of this process, even if called from one."""
        variable.assign(value)

    def decay(self, optimizer: Any, variables: Sequence[Any]) -> bool:
        """Decay weights as Keras does where its own method cannot; say whether."""
        return False

    # Tables.

    def clocks(self, optimizer: Any) -> Any:
        """Return where an optimizer keeps the last-update counters of its tables."""
        return NoClocks()

    # What `explain` says.

    def why_no_kernel(self) -> str:
        """Return why there is none although the backend can have one; else nothing."""
        return ""

    def is_for_kernel(self, updates: Sequence[Update], constants: Constants) -> bool:
        """Whether a native kernel runs all of these updates."""
        return False

    def way(
        self, update: Update, constants: Constants, *, xla: bool | None = None
    ) -> Way:
        """Say how `update` updates a variable, and why.

        Args:
            update: The update.
            constants: What is the same for all.
            xla: Whether XLA compiles it; None: look.
        """
        return Way("on its own", "operation by operation")

    def kinds_of_steps(
        self, stepper: Stepper, variables: Sequence[Any]
    ) -> dict[str, bool]:
        """Return the kinds of steps, in words, and whether XLA compiles each."""
        return {"A step is part of the program that Keras' backend makes": True}


def check_fits(
    gradient: Any, variable: Any, dtype: str, is_floating: bool, fits: bool
) -> None:
    """Fail unless a gradient has floating point numbers and fits its variable."""
    name = variable.name
    if not is_floating:
        raise TypeError(
            "A gradient must be of floating point numbers. "
            f"Received: {dtype} for variable {name!r}"
        )
    if not fits:
        raise ValueError(
            "A gradient must have the shape of its variable. Received: shape "
            f"{tuple(gradient.shape)} for variable {name!r} of shape "
            f"{tuple(variable.shape)}"
        )


def widened(gradient: Any) -> Any:
    """Return a gradient in float32 at least."""
    wide = _wider(gradient.dtype)
    return gradient if wide is None else ops.cast(gradient, wide)


@functools.cache  # Keras takes longer to name a dtype than many operations do
def _wider(dtype: Any) -> str | None:
    """Return the dtype to widen this one to; None if it is wide."""
    name = keras.backend.standardize_dtype(dtype)
    return None if rule.wide(name) == name else rule.wide(name)


def _is_traced(x: Any) -> bool:
    """Whether the value of a tensor of JAX is not known while this runs."""
    import jax

    return isinstance(x, jax.core.Tracer)


def _empty(do: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that returns nothing: branches of a condition must agree."""

    def branch() -> None:
        do()

    return branch
