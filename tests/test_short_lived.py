"""Optimizers that come and go, and steps of which no two are alike, cost little."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import python

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("programs of eager steps")

BUILT_IN = keras.optimizers.RMSprop


@pytest.mark.slow
def test_the_memory_of_optimizers_that_are_dropped_comes_back():
    grown = python("""
        import gc
        import psutil
        import tensorflow as tf
        import keras
        from keras_rmsprop import RMSprop

        shapes = [(784, 256), (256,), (256, 128), (128,), (128, 10), (10,)]
        gradients = [tf.ones(shape) for shape in shapes]

        def use():
            variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
            RMSprop(0.01).apply(gradients, variables)

        def resident():
            gc.collect()
            return psutil.Process().memory_info().rss

        for _ in range(5):
            use()
        before = resident()
        for _ in range(40):
            use()
        print((resident() - before) / 2**20)
    """)
    assert float(grown) < 60  # MB; of the built-in 1


@pytest.fixture
def traces(monkeypatch):
    """Return a list that grows by one for each function that TensorFlow traces."""
    made, original = [], tf.function

    def function(body=None, **options):
        if body is None:
            return functools.partial(function, **options)

        @functools.wraps(body)
        def counted(*args, **kwargs):
            made.append(body)
            return body(*args, **kwargs)

        return original(counted, **options)

    monkeypatch.setattr(tf, "function", function)
    return made


def test_traces_are_counted(traces):
    step = tf.function(lambda x: x + 1, autograph=False)
    for x in (tf.ones(1), tf.ones(1), tf.ones(2)):
        step(x)
    tf.function(autograph=False)(lambda x: x)(tf.ones(1))
    assert len(traces) == 3


SHAPES = [(65, 65), *((n,) for n in range(1, 12))]  # 924 ways to leave half out


def run(optimizer, before_step, steps=40):
    """Return the weights after steps; `before_step` says which have a gradient."""
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in SHAPES]
    optimizer.build(variables)
    for step in range(steps):
        given = before_step(optimizer, step)
        gradients = [
            tf.fill(shape, 1.0 + (step + i) % 3) if i in given else None
            for i, shape in enumerate(SHAPES)
        ]
        optimizer.apply(gradients, variables)
    return [v.numpy() for v in variables]


def change_momentum(optimizer, step):
    optimizer.momentum = 0.5 + step / 100
    return range(len(SHAPES))


def change_rho(optimizer, step):
    optimizer.rho = 0.5 + step / 100
    return range(len(SHAPES))


def leave_some_out(optimizer, step):
    rng = np.random.default_rng(step)
    return set(rng.choice(len(SHAPES), 6, replace=False).tolist())


@pytest.mark.slow
@pytest.mark.one_in(13)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("change", [change_momentum, change_rho, leave_some_out])
def test_steps_of_which_no_two_are_alike_are_not_traced_each(traces, change):
    ours = run(RMSprop(0.01, momentum=0.5), change)
    theirs = run(BUILT_IN(0.01, momentum=0.5), change)
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, 1e-4)
    assert len(traces) <= 10
