"""What several tests use: steps to compare, and programs in a process of their own."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import tensorflow as tf

SHAPES = [(), (5,), (0,), (3, 3, 2, 4)]

WAYS = {
    "eager": lambda optimizer: optimizer.apply,
    "tf.function": lambda optimizer: tf.function(optimizer.apply),
    "XLA": lambda optimizer: tf.function(optimizer.apply, jit_compile=True),
}


def arrays(shapes=SHAPES, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def train(optimizer, steps=20, shapes=SHAPES, dtype="float32", way="eager"):
    """Return the weights and optimizer variables after steps on random gradients."""
    variables = [keras.Variable(a, dtype=dtype) for a in arrays(shapes, dtype)]
    optimizer.build(variables)
    apply = WAYS[way](optimizer)
    for seed in range(1, steps + 1):
        apply([tf.constant(g) for g in arrays(shapes, dtype, seed)])
    return (
        [v.numpy() for v in variables],
        {v.path.split("/")[-1]: v.numpy() for v in optimizer.variables},
    )


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
