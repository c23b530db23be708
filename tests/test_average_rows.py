"""Averages of tables cost their rows, and are those of dense arithmetic.

The oracles: the built-in with the gradients as dense ones; and, with `ema_warmup`,
which it does not have, NumPy in float64, told the weights after each step.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from small_models import (
    compiled,
    gradient,
    table_model,
    take_steps,
)
from stepping import WAYS, assert_close, examples

from keras_rmsprop import RMSprop, tables
from keras_rmsprop.callbacks import AverageForEvaluation

pytestmark = pytest.mark.tensorflow("rows of embeddings")

BUILT_IN = keras.optimizers.RMSprop
ROWS, WIDTH = 7, 2
OPTIONS = {"learning_rate": 0.05, "epsilon": 1e-3, "use_ema": True, "ema_momentum": 0.9}


def averages_of(optimizer):
    return [v.numpy() for v in optimizer.variables if v.path.endswith("average")]


class Oracle:
    """The averages of weights in float64."""

    def __init__(self, momentum=0.9, *, warms_up=False):
        self.momentum, self.warms_up = momentum, warms_up
        self.t, self.begin, self.averages = 0, 0, None

    def follow(self, *weights):
        m = self.momentum
        if self.warms_up:
            t = self.t - self.begin
            m = min(m, (1 + t) / (10 + t))
        if self.t == 0:
            m, self.averages = 0.0, weights
        pairs = zip(self.averages, weights, strict=True)
        self.averages = [m * a + (1 - m) * w.astype("float64") for a, w in pairs]
        self.t += 1


class Run:
    """A table, a bias, and an optimizer that takes steps with random gradients."""

    def __init__(self, optimizer, *, way="eager", sparse=True, dtype="float32"):
        rng = np.random.default_rng(0)
        self.table = keras.Variable(rng.normal(size=(ROWS, WIDTH)), dtype=dtype)
        self.bias = keras.Variable(rng.normal(size=3), dtype=dtype)
        self.optimizer, self.sparse, self.dtype = optimizer, sparse, dtype
        optimizer.build([self.table, self.bias])
        self.apply = WAYS[way](optimizer) if sparse else optimizer.apply
        self.rng = np.random.default_rng(1)

    def step(self, ids):
        """Take a step; `ids` of a sparse gradient, "dense" or "none"."""
        beside = tf.constant(self.rng.normal(size=3), self.dtype)
        if ids == "none":
            of_table = None
        elif ids == "dense":
            values = self.rng.normal(size=(ROWS, WIDTH))
            of_table = tf.constant(values, self.dtype)
        else:
            values = self.rng.normal(size=(len(ids), WIDTH))
            slices = tf.IndexedSlices(
                tf.constant(values, self.dtype),
                tf.constant(ids, "int64"),
                tf.constant([ROWS, WIDTH], "int64"),
            )
            of_table = slices if self.sparse else tf.convert_to_tensor(slices)
        self.apply([of_table, beside])

    def weights(self):
        return [self.table.numpy(), self.bias.numpy()]

    def is_behind(self):
        return self.optimizer._clocks[0].average.is_behind()


rows = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4)
steps = st.lists(st.one_of(rows, st.sampled_from(["none", "read"])), max_size=50)


@pytest.mark.slow
@examples(12)
@given(steps=steps, momentum=st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0]))
def test_random_steps_equal_the_dense_built_in(steps, momentum):
    options = OPTIONS | {"ema_momentum": momentum}
    ours = Run(RMSprop(**options, jit_compile=False))
    theirs = Run(BUILT_IN(**options), sparse=False)
    for ids in [*steps, [1, 1]]:
        if ids == "read":
            _ = ours.optimizer.variables
            continue
        ours.step(ids)
        theirs.step(ids)
    assert_close(ours.weights(), theirs.weights(), 1e-5)
    assert_close(averages_of(ours.optimizer), averages_of(theirs.optimizer), 2e-6)


@pytest.mark.slow
@examples(12)
@given(steps=steps, momentum=st.sampled_from([0.0, 0.05, 0.15, 0.5, 0.9, 1.0]))
def test_random_steps_with_warm_up_equal_numpy(steps, momentum):
    options = OPTIONS | {"ema_momentum": momentum, "ema_warmup": True}
    run = Run(RMSprop(**options, jit_compile=False), dtype="float64")
    oracle = Oracle(momentum, warms_up=True)
    for ids in [*steps, [1, 1]]:
        if ids == "read":
            _ = run.optimizer.variables
            continue
        run.step(ids)
        oracle.follow(*run.weights())
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-12)


FIFTY = [[int(n) for n in np.random.default_rng(2).zipf(1.5, 3) % ROWS]] * 2 + [
    [int(n) % ROWS for n in np.random.default_rng(step).zipf(1.5, 3)]
    for step in range(48)
]


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warms_up", [False, True])
def test_fifty_steps_every_way(way, warms_up, monkeypatch):
    monkeypatch.setattr(tables, "DENSE_RATIO", 0)  # XLA would update all rows
    run = Run(RMSprop(**OPTIONS, ema_warmup=warms_up), way=way)
    oracle = Oracle(warms_up=warms_up)
    for ids in FIFTY:
        run.step(ids)
        oracle.follow(*run.weights())
    assert run.is_behind()
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)
    assert not run.is_behind()


@pytest.mark.one_in(7)
@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_steps_by_rows_dense_and_without_gradient(way):
    run, oracle = Run(RMSprop(**OPTIONS, ema_warmup=True), way=way), Oracle()
    oracle.warms_up = True
    for ids in ([0, 3], "none", [3], "none", "dense", [1], "none", [0], "dense", [5]):
        run.step(ids)
        oracle.follow(*run.weights())
        if ids == "dense":
            assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


def test_a_step_touches_its_rows_alone():
    table = keras.Variable(np.ones((50, 3), "float32"))
    optimizer = RMSprop(**OPTIONS, ema_overwrite_frequency=9)
    optimizer.build([table])
    step = tf.function(
        lambda ids: optimizer.apply([tf.IndexedSlices(tf.ones((2, 3)), ids)])
    )
    step(tf.constant([1, 2]))
    graph = step.get_concrete_function(tf.constant([1, 2])).graph
    for op in graph.get_operations():
        for tensor in op.outputs:
            if tensor.shape.rank and tuple(tensor.shape) == (50, 3):
                assert op.type == "ReadVariableOp", op.name
    assert "1 by rows (only those of the batch" in optimizer.explain()
    average = optimizer._weight_averages[0]
    average.assign(np.full((50, 3), np.nan))
    step(tf.constant([3, 4]))
    assert np.isnan(average.numpy()[[0, 1, 49]]).all()


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("changes", "then"),
    [
        ({"ema_momentum": 0.5}, Oracle(0.5)),
        ({"ema_warmup": True}, Oracle(0.9, warms_up=True)),
        ({"ema_momentum": keras.Variable(0.5)}, Oracle(0.5)),
        ({"momentum": 0.0}, Oracle()),
    ],
    ids=["ema_momentum", "ema_warmup", "a variable", "nothing"],
)
def test_options_that_change_count_from_then_on(changes, then):
    run, oracle = Run(RMSprop(**OPTIONS)), Oracle()
    for n, ids in enumerate([[0, 1, 2], [1], [2], [1], [3], [0], [4], [2]]):
        if n == 4:
            for name, value in changes.items():
                setattr(run.optimizer, name, value)
            oracle.momentum, oracle.warms_up = then.momentum, then.warms_up
        run.step(ids)
        oracle.follow(*run.weights())
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


def test_switched_off_averages_stay():
    run, oracle = Run(RMSprop(**OPTIONS)), Oracle()
    for ids in ([0, 1], [2], [2]):
        run.step(ids)
        oracle.follow(*run.weights())
    run.optimizer.use_ema = False
    run.step([0, 4])
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


def test_lazy_after_exact_and_back():
    run, oracle = Run(RMSprop(**OPTIONS)), Oracle()
    for ids in ([0, 1], [2], [2]):
        run.step(ids)
        oracle.follow(*run.weights())
    run.optimizer.sparse_update = "lazy"
    expected = oracle.averages[0]
    for _ in range(2):
        run.step([3])
        w = run.table.numpy()[3]
        expected[3] = 0.9 * expected[3] + 0.1 * w
    assert_close(averages_of(run.optimizer)[:1], [expected], 1e-6)
    run.optimizer.sparse_update = "exact"
    for _ in range(2):
        run.step([4])
        expected = 0.9 * expected + 0.1 * run.table.numpy()
    assert_close(averages_of(run.optimizer)[:1], [expected], 1e-6)


def test_iterations_that_jump():
    run, oracle = Run(RMSprop(**OPTIONS, ema_warmup=True)), Oracle(warms_up=True)
    for n, ids in enumerate([[0, 1], [2], [2], [0], [3], "none", [2], [1]]):
        if n in (3, 5):
            run.optimizer.iterations.assign(20 * n)
            oracle.t = 20 * n
        run.step(ids)
        oracle.follow(*run.weights())
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_a_state_that_is_set_leaves_the_averages(way):
    run, oracle = Run(RMSprop(**OPTIONS), way=way), Oracle()
    for n, ids in enumerate([[0, 1], [2], [2], [0], [3]]):
        run.step(ids)
        oracle.follow(*run.weights())
        if n == 2:
            run.optimizer.set_state(run.optimizer.get_state())
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


def test_what_keeps_a_table_dense():
    table = keras.Variable(np.ones((ROWS, WIDTH), "float32"))
    table.constraint = keras.constraints.MaxNorm(0.5)
    optimizer = RMSprop(**OPTIONS)
    optimizer.apply([tf.IndexedSlices([[1.0, 1.0]], [1])], [table])
    assert not [*optimizer._clocks]
    run = Run(RMSprop(**OPTIONS | {"ema_momentum": keras.Variable(0.9)}))
    oracle = Oracle()
    for ids in ([1], [2], "none", [1]):
        run.step(ids)
        oracle.follow(*run.weights())
    assert not [*run.optimizer._clocks]
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


def test_a_graph_that_overwrites_a_table_it_does_not_update():
    def trained(optimizer, sparse):
        run = Run(optimizer, sparse=sparse)
        head = tf.function(lambda g: optimizer.apply([None, g]))
        for n in range(8):
            if n % 3 == 0:
                head(tf.ones(3))
            else:
                run.step([n % ROWS])
        return [*run.weights(), *averages_of(optimizer)]

    options = OPTIONS | {"ema_overwrite_frequency": 4}
    ours = trained(RMSprop(**options), True)
    assert_close(ours, trained(BUILT_IN(**options), False), 1e-5)


def test_steps_that_are_skipped_do_not_count():
    run, oracle = Run(RMSprop(**OPTIONS, skip_nonfinite=True)), Oracle()
    for ids in ([0, 1], [2], [2], [0]):
        run.step(ids)
        oracle.follow(*run.weights())
        bad = tf.IndexedSlices([[np.nan, 1.0]], [4])
        run.optimizer.apply([bad, tf.zeros(3)])
    assert_close(averages_of(run.optimizer), oracle.averages, 1e-6)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("frozen", ["table", "head"])
def test_frozen_and_unfrozen_again(frozen):
    models = [table_model(RMSprop(**OPTIONS)), table_model(BUILT_IN(**OPTIONS))]
    for model, sparse in zip(models, (True, False), strict=True):
        take_steps(model, range(3), sparse)
        for layer in model.layers:
            layer.trainable = layer.name != frozen
        take_steps(model, range(3, 6), sparse)
        for layer in model.layers:
            layer.trainable = True
        take_steps(model, range(6, 9), sparse)
    ours, theirs = (averages_of(model.optimizer) for model in models)
    assert_close(ours, theirs, 1e-5)


def test_a_layer_that_is_unfrozen_later():
    model = table_model(RMSprop(**OPTIONS))
    model.layers[-1].trainable = False
    oracle, table = Oracle(), model.layers[0]
    for step in range(3):
        take_steps(model, [step])
        oracle.follow(table.get_weights()[0])
    model.layers[-1].trainable = True
    for step in range(3, 6):
        take_steps(model, [step])
        oracle.follow(table.get_weights()[0])
    assert_close(averages_of(model.optimizer)[:1], oracle.averages, 1e-6)


def tokens():
    rng = np.random.default_rng(0)
    return rng.integers(0, 30, (24, 4)), rng.normal(size=(24, 1)).astype("float32")


def model_on_tokens(optimizer, jit_compile=False):
    layers = [
        keras.layers.Embedding(30, 3),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = compiled(optimizer, keras.Input((4,), dtype="int32"), layers)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model


@pytest.mark.slow
@pytest.mark.one_in(13)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("warms_up", [False, True])
def test_fit_ends_with_the_averages(jit_compile, warms_up):
    model = model_on_tokens(RMSprop(**OPTIONS, ema_warmup=warms_up), jit_compile)
    oracle = Oracle(warms_up=warms_up)
    follow = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: oracle.follow(*model.get_weights())
    )
    fit = {"batch_size": 6, "epochs": 3, "verbose": 0, "callbacks": [follow]}
    model.fit(*tokens(), **fit)
    assert [*model.optimizer._clocks] == [0]
    assert_close(model.get_weights(), oracle.averages, 1e-6)
    # It goes on from there.
    before, oracle.averages = oracle.averages, [*oracle.averages]
    oracle.begin = oracle.t
    model.fit(*tokens(), **fit)
    assert not np.allclose(before[0], oracle.averages[0])
    assert_close(model.get_weights(), oracle.averages, 1e-6)


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "callback", [AverageForEvaluation, keras.callbacks.SwapEMAWeights]
)
def test_evaluation_in_fit(callback):
    seen, oracle = [], Oracle()

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            oracle.follow(*self.model.get_weights())

        def on_test_batch_end(self, batch, logs=None):
            seen.append(self.model.get_weights())
            assert_close(seen[-1], oracle.averages, 1e-6)

    model = model_on_tokens(RMSprop(**OPTIONS))
    callbacks = [callback(), Watch()]
    fit = {"batch_size": 6, "epochs": 3, "verbose": 0, "callbacks": callbacks}
    model.fit(*tokens(), validation_data=tokens(), **fit)
    assert len(seen) > 2


def test_a_wrapper_that_scales_losses():
    inner = RMSprop(**OPTIONS)
    model = table_model(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0))
    oracle = Oracle()
    for step in range(5):
        gradients = [gradient(model, v, step) for v in model.trainable_variables]
        model.optimizer.apply(gradients, model.trainable_variables)
        oracle.follow(*model.get_weights())
    assert_close(averages_of(inner), oracle.averages, 1e-6)
