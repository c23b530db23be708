"""Whoever takes steps on TensorFlow: directly, as a program, or on all replicas."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from keras_rmsprop.backends.plain import Request
from keras_rmsprop.backends.programs import (
    Programs,
    Settings,
    has_slices,
    is_xla_left,
)
from keras_rmsprop.sparse import native

XLA_IN_GRAPH_ELEMENTS = 2**20
"""From this size on, XLA makes a variable's update faster in a graph without XLA."""
XLA_EAGER_ELEMENTS = 2**12
"""If no variable is larger, launching XLA takes as long as the step does."""


class Runner:
    """Takes an optimizer's steps: directly, as a program, or on all replicas."""

    def __init__(self) -> None:
        self._programs = Programs()
        self._settings = Settings()
        self._number: int | None = None

    def forget_settings(self) -> None:
        """Say that an attribute of the optimizer was assigned."""
        self._number = None

    def run(
        self,
        step: Callable[..., None],
        grads: list[Any],
        variables: Sequence[Any],
        request: Request,
    ) -> None:
        """Take a step.

        Args:
            step: The plain step; see `programs.Step`. The last two may be left out.
            grads: A tensor, slices or None for each variable.
            variables: The model's variables.
            request: What there is to know of the step.
        """
        if tf.distribute.has_strategy():
            on_all_replicas(step, grads, variables, request.make_clocks)
            return
        request.make_clocks()
        jit_compile, is_for_kernel = request.jit_compile, request.is_for_kernel
        if not self.has_program(grads, variables, jit_compile, is_for_kernel) or (
            not tf.executing_eagerly() and request.in_blocks()
        ):
            step(grads, variables)
            return

        def settings() -> Hashable:
            if self._number is None:
                self._number = self._settings.number(request.attributes)
            return self._number, *request.also()

        self._programs.run(
            step,
            grads,
            variables,
            settings=settings,
            learning_rate=request.learning_rate(),
            prepare=request.prepare,
            xla=lambda: (
                (
                    jit_compile is True
                    or (
                        is_worth_xla(variables)
                        and is_xla_left()
                        and not is_for_kernel()
                    )
                )
                and not request.in_blocks()
            ),
        )

    def has_program(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        jit_compile: bool | str,
        is_for_kernel: Callable[[], bool],
    ) -> bool:
        """Whether a step taken here and now should be a program of its own."""
        if jit_compile is False or tf.config.functions_run_eagerly() or is_watched():
            return False
        if tf.executing_eagerly():
            return True
        # In a graph only XLA gains, and XLA would compile for each number of rows.
        return not has_slices(grads) and (
            jit_compile is True or (is_large(variables) and not is_for_kernel())
        )


def is_worth_xla(variables: Sequence[Any]) -> bool:
    """Whether XLA is faster for an eager step of these variables."""
    return any(math.prod(v.shape) > XLA_EAGER_ELEMENTS for v in variables)


def is_large(variables: Sequence[Any]) -> bool:
    """Whether XLA is faster for the step of these variables in another's graph."""
    return any(math.prod(v.shape) >= XLA_IN_GRAPH_ELEMENTS for v in variables)


def is_watched() -> bool:
    """Whether TensorFlow's debugging tools look at each operation, which XLA hides.

    There is no public way to know. Without the private one the answer is no.
    """
    try:
        from tensorflow.python.eager import context

        return bool(context.context().op_callbacks)
    except (ImportError, AttributeError):
        return False


def on_all_replicas(
    step: Callable[..., None],
    grads: Sequence[Any],
    variables: Sequence[Any],
    make_clocks: Callable[[], None],
) -> None:
    """Sum the gradients over the replicas; then each steps with its own copies.

    For sparse gradients only the rows travel. After the sum all replicas know the
    same, so nothing else has to travel, and each takes the plain step.
    """
    distribute = tf.__internal__.distribute
    strategy = tf.distribute.get_strategy()
    replica = tf.distribute.get_replica_context()
    given = [g for g in grads if g is not None]
    if replica and given:
        summed = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, given))
        grads = [g if g is None else next(summed) for g in grads]
    if not replica:
        make_clocks()
    # Replicas that cannot meet, as XLA compiles them apart, make no clock: then the
    # sum of slices becomes dense.
    elif has_slices(grads) and not distribute.strategy_supports_no_merge_call():
        replica.merge_call(lambda _: make_clocks())
    strategy.extended.update(
        native(variables[0]),
        lambda _, *grads: step(grads, variables),
        args=tuple(grads),
        group=False,
    )
