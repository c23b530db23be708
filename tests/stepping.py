"""What several tests use: steps to compare, and programs in a process of their own."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings

BACKEND = keras.backend.backend()

SHAPES = [(), (5,), (0,), (3, 3, 2, 4)]

tensor = keras.ops.convert_to_tensor


def jitted(optimizer):
    """Return `apply` as `fit` runs it on JAX: compiled, from one state to the next."""
    import jax

    stateless = jax.jit(optimizer.stateless_apply)

    def apply(grads):
        variables = optimizer._trainable_variables, optimizer.variables
        weights, state = map(_values, variables)
        for several, new in zip(
            variables, stateless(state, grads, weights), strict=True
        ):
            _assign(several, new)

    return apply


WAYS = {"eager": lambda optimizer: optimizer.apply} | {
    "tensorflow": {
        "tf.function": lambda optimizer: tf.function(optimizer.apply),
        "XLA": lambda optimizer: tf.function(optimizer.apply, jit_compile=True),
    },
    "jax": {"XLA": jitted},
    "torch": {},
}[BACKEND]
"""How a step can be taken on this backend; `conftest.py` skips tests of other ways."""

LOOP = WAYS["XLA" if BACKEND == "jax" else "eager"]
"""How `LossScaleOptimizer` takes steps: on JAX it takes none without `jax.jit`."""


def examples(number, **options):
    """Let Hypothesis try a third of so many examples, and all in `make test-rest`."""
    tried = number if os.environ.get("EXAMPLES") == "all" else -(-number // 3)
    how = settings(max_examples=tried, **options)
    return lambda test: pytest.mark.examples(how(test))


def arrays(shapes=SHAPES, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def train(optimizer, steps=20, shapes=SHAPES, dtype="float32", way="eager"):
    """Return the weights and optimizer variables after steps on random gradients."""
    variables = [keras.Variable(a, dtype=dtype) for a in arrays(shapes, dtype)]
    optimizer.build(variables)
    apply = WAYS[way](optimizer)
    for seed in range(1, steps + 1):
        apply([tensor(g) for g in arrays(shapes, dtype, seed)])
    return (
        [v.numpy() for v in variables],
        {v.path.split("/")[-1]: v.numpy() for v in optimizer.variables},
    )


def gradients_of(model, x, y):
    """Return the gradients of the mean squared error of a model, and the error."""
    variables = model.trainable_variables
    if BACKEND == "jax":
        return _on_jax(model)(_values(variables), x, y)
    if BACKEND == "torch":
        model.zero_grad()
        loss = _error(model(x), y)
        loss.backward()
        return [v.value.grad for v in variables], loss
    with tf.GradientTape() as tape:
        loss = _error(model(x), y)
    return tape.gradient(loss, _values(variables)), loss


def _error(found, y):
    return keras.ops.mean(keras.ops.square(found - tensor(y)))


def _on_jax(model):
    """Return a function from weights and a batch to gradients and error."""
    import jax

    def error(weights, x, y):
        state = _values(model.non_trainable_variables)
        found, _ = model.stateless_call(weights, state, x)
        return _error(found, y)

    return lambda *args: jax.value_and_grad(error)(*args)[::-1]


def loop(model, optimizer):
    """Return the step of a loop of one's own, as it is written for the backend.

    It takes a batch, trains on it and returns the mean squared error before.
    """
    variables = model.trainable_variables

    def step(x, y):
        gradients, loss = gradients_of(model, x, y)
        optimizer.apply(gradients, variables)
        return loss

    if BACKEND == "tensorflow":
        return tf.function(step)
    if BACKEND == "torch":
        return step

    import jax

    @jax.jit
    def stateless(weights, state, x, y):
        gradients, loss = _on_jax(model)(weights, x, y)
        return *optimizer.stateless_apply(state, gradients, weights), loss

    def step_on_jax(x, y):
        weights, state = map(_values, (variables, optimizer.variables))
        weights, state, loss = stateless(weights, state, x, y)
        _assign(variables, weights)
        _assign(optimizer.variables, state)
        return loss

    optimizer.build(variables)
    return step_on_jax


def _values(variables):
    return [v.value for v in variables]


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def assert_close(result, expected, rtol):
    """Compare what two runs of `train` returned, or two lists of arrays."""
    if isinstance(result, tuple):
        weights, state = result
        expected_weights, expected_state = expected
        assert_close(weights, expected_weights, rtol)
        assert_close(list(state.values()), list(expected_state.values()), rtol)
        return
    assert len(result) == len(expected)
    for got, want in zip(result, expected, strict=True):
        assert got.shape == want.shape
        # Relative to the size of the array: single elements may cancel to nothing.
        scale = np.abs(want).max(initial=0.0)
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * scale)


def python(program, *, executable=sys.executable, cwd=None, **environment):
    """Run a program in a process of its own and return what it prints."""
    result = subprocess.run(
        [str(executable), "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()
