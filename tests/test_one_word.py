"""`RMSprop("auto")` alone: what it stands for, and how its tables step."""

import inspect
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    JIT,
    ROWS,
    assert_same_bits,
    dense_model,
    gradient,
    numbers,
    table_model,
)
from stepping import BACKEND, LOOP, assert_close, tensor

from keras_rmsprop import AutoLearningRate, RMSprop, reference
from keras_rmsprop.backends import current as backend
from keras_rmsprop.tables import typical_square

BUILT_IN = {
    "momentum": 0.0,
    "epsilon": 1e-7,
    "nesterov": False,
    "bias_correction": False,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_warmup": False,
}
AUTO = {
    "momentum": 0.9,
    "epsilon": 1e-30,
    "nesterov": True,
    "bias_correction": True,
    "use_ema": True,
    "ema_momentum": 0.9999,
    "ema_warmup": True,
}


def in_force(optimizer):
    config = optimizer.get_config()
    return {name: config[name] for name in AUTO}


@pytest.mark.parametrize("rate", ["auto", AutoLearningRate()], ids=["word", "object"])
def test_one_word_sets_the_other_defaults(rate):
    assert in_force(RMSprop(rate)) == AUTO
    assert in_force(RMSprop(learning_rate=rate)) == AUTO


@pytest.mark.parametrize("rate", [0.001, keras.optimizers.schedules.CosineDecay(1, 9)])
def test_without_it_they_are_those_of_the_built_in(rate):
    assert in_force(RMSprop(rate)) == BUILT_IN
    theirs = keras.optimizers.RMSprop().get_config()
    assert theirs.items() >= {k: v for k, v in BUILT_IN.items() if k in theirs}.items()


@pytest.mark.parametrize(
    "given",
    [
        {"momentum": 0.0},
        {"momentum": 0.5},
        {"nesterov": False},
        {"bias_correction": False},
        {"epsilon": 1e-7},
        {"ema_momentum": 0.99},
        {"ema_warmup": False, "ema_momentum": 0.9},
        {"cautious": True},
    ],
    ids=str,
)
def test_what_is_given_counts(given):
    optimizer = RMSprop("auto", **given)
    assert in_force(optimizer) == AUTO | {k: v for k, v in given.items() if k in AUTO}
    assert all(getattr(optimizer, name) == value for name, value in given.items())
    again = RMSprop.from_config(json.loads(json.dumps(optimizer.get_config())))
    assert again.get_config() == optimizer.get_config()


def test_without_its_warm_up_the_average_is_a_short_one():
    found = in_force(RMSprop("auto", ema_warmup=False))
    assert found == AUTO | {"ema_warmup": False, "ema_momentum": 0.99}


def test_without_the_average_it_has_the_usual_options(recwarn):
    optimizer = RMSprop("auto", use_ema=False)
    of_average = {k: v for k, v in BUILT_IN.items() if "ema" in k}
    assert in_force(optimizer) == AUTO | of_average
    assert RMSprop.from_config(optimizer.get_config()).use_ema is False
    assert not [w for w in recwarn.list if "ema" in str(w.message)]


def test_a_variance_keeps_its_epsilon():
    found = in_force(RMSprop("auto", centered=True))
    assert found == AUTO | {"epsilon": 1e-7, "bias_correction": False}


def test_positions_are_those_of_keras():
    mine = [*inspect.signature(RMSprop).parameters]
    theirs = [*inspect.signature(keras.optimizers.RMSprop).parameters]
    theirs.remove("kwargs")
    assert mine[: len(theirs)] == theirs


# Tables.


def stepped_beside_the_reference(model, steps=30, sparse=True, **options):
    """Take steps; return the weights, those of the reference, and both rates."""
    variables, optimizer, state = model.trainable_variables, model.optimizer, {}
    optimizer.build(variables)
    apply = LOOP(optimizer)
    weights = [keras.ops.convert_to_numpy(v).astype("float64") for v in variables]
    options = {"momentum": 0.9, "nesterov": True, "epsilon": 1e-30} | options
    for step in range(steps):
        pulls = [
            0.3 * (keras.ops.convert_to_numpy(v) > 0) for v in variables
        ]  # else no rate is found
        given, dense = [], []
        for v, pull in zip(variables, pulls, strict=True):
            g = keras.ops.convert_to_numpy(gradient(model, v, step, False))
            g = np.where(g != 0, g + pull, 0).astype("float32")
            rows = np.flatnonzero(g.any(1)) if g.ndim == 2 else []
            is_table = v.path.endswith("embeddings")
            slices = sparse and is_table and BACKEND == "tensorflow"
            given.append(
                tf.IndexedSlices(tensor(g[rows]), tensor(rows)) if slices else tensor(g)
            )
            dense.append(g.astype("float64"))
        apply(given)
        weights = reference.automatic_step(
            weights, dense, state, tables=[0], bias_correction=True, **options
        )
    found = [keras.ops.convert_to_numpy(v) for v in variables]
    rate = state["d"] * (1 - options["momentum"])
    return found, weights, optimizer.current_learning_rate, rate


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.0}, {"epsilon": 1e-30, "weight_decay": 0.1}],
    ids=str,
)
def test_tables_step_as_those_of_the_reference(options, sparse):
    # Smaller first steps are mostly rounding.
    model = table_model(RMSprop(AutoLearningRate(initial=1e-3), **options))
    found, expected, rate, expected_rate = stepped_beside_the_reference(
        model, sparse=sparse, initial=1e-3, **options
    )
    assert rate == pytest.approx(expected_rate, rel=1e-3)
    assert_close(found, expected, 1e-4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=str)
def test_the_rate_of_tables_does_not_fade(options):
    rng = np.random.default_rng(0)
    shapes = (6, 2), (3,)
    variables = [
        keras.Variable(np.zeros(shape) + 0.5, name=name)
        for shape, name in zip(shapes, ("embeddings", "bias"), strict=True)
    ]
    optimizer, state = RMSprop(AutoLearningRate(initial=1e-3), **options), {}
    optimizer.build(variables)
    apply, leads = LOOP(optimizer), []
    weights = [np.zeros(shape) + 0.5 for shape in shapes]
    for step in range(60):
        pull = 1 if step < 12 else 0  # then there is only noise
        given = [pull + 0.5 * rng.normal(size=shape) for shape in shapes]
        given[0][rng.integers(6)] = 0
        given = [g.astype("float32") for g in given]
        apply([tensor(g) for g in given])
        weights = reference.automatic_step(
            weights,
            given,
            state,
            tables=[0],
            initial=1e-3,
            bias_correction=True,
            momentum=0.9,
            nesterov=True,
            epsilon=1e-30,
            **options,
        )
        leads.append(state["most"] / state["d"])
    assert leads[0] == 1
    assert leads[-1] > 1.1
    found = [keras.ops.convert_to_numpy(v) for v in variables]
    assert_close(found, weights, 1e-3)


def test_an_epsilon_that_is_given_is_that_of_tables_too():
    steps = {}
    for epsilon in (1e-3, None):
        table = keras.Variable(np.zeros((4, 2)), name="embeddings")
        optimizer = RMSprop("auto", epsilon=epsilon, bias_correction=False)
        optimizer.build([table])
        g = np.array([[1, 1], [0, 0], [0.01, 0.01], [0, 0]], "float32")
        LOOP(optimizer)([tensor(g)])
        steps[epsilon] = -1e5 * keras.ops.convert_to_numpy(table)[[0, 2], 0]
    typical = 10 * 0.01  # 0.01: the geometric mean of 1 and 0.0001
    for epsilon, expected in ((1e-3, 1e-3), (None, typical)):
        v = 0.1 * np.array([1, 0.01]) ** 2
        np.testing.assert_allclose(
            steps[epsilon], [1, 0.01] / np.sqrt(v + expected), rtol=0.02
        )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_a_table_whose_rows_all_have_gradients_has_no_epsilon(sparse, zero):
    if sparse and BACKEND != "tensorflow":
        pytest.skip("sparse gradients")
    table = keras.Variable(np.zeros((3, 2)), name="embeddings")
    optimizer = RMSprop("auto", bias_correction=False)
    optimizer.build([table])
    g = np.array([[1, 1], [0.01, 0.01], [0.1, 0 if zero else 0.1]], "float32")
    rows = [2, 0, 1]
    given = tf.IndexedSlices(tensor(g[rows]), rows) if sparse else tensor(g)
    LOOP(optimizer)([given])
    moved = -1e5 * keras.ops.convert_to_numpy(table)
    typical = 10 * np.exp(2 * np.log(g[g != 0]).mean()) if zero else 0
    expected = g / np.sqrt(0.1 * g**2 + typical + 1e-30)
    np.testing.assert_allclose(moved, expected, rtol=0.02)


def test_tables_have_no_momentum():
    model = table_model(RMSprop("auto"))
    model.optimizer.build(model.trainable_variables)
    kept = [v.path for v in model.optimizer.variables if "momentum" in v.path]
    assert len(kept) == 2
    assert not any("embeddings" in path for path in kept)
    state = model.optimizer.get_state()
    assert [slots.momentum is None for slots in state.slots] == [True, False, False]
    model.optimizer.set_state(state)
    fixed = table_model(RMSprop(0.1, momentum=0.9))
    fixed.optimizer.build(fixed.trainable_variables)
    assert len([v for v in fixed.optimizer.variables if "momentum" in v.path]) == 3


@pytest.mark.tensorflow("sparse gradients")
def test_slices_tell_what_is_a_table():
    table, bias = (keras.Variable(np.ones(s), name="x") for s in ((9, 2), (2,)))
    optimizer = RMSprop("auto")
    for step in range(3):
        slices = tf.IndexedSlices(tf.ones((1, 2)), [step])
        optimizer.apply([slices, tf.ones(2)], [table, bias])
    assert "by rows" in optimizer.explain()
    assert optimizer.explain().endswith("does not decay: x#0 (9, 2)")
    moved = (table.numpy() != 1).any(1)
    np.testing.assert_array_equal(moved, np.arange(9) < 3)
    assert not optimizer._momentums[0].numpy().any()
    assert optimizer._momentums[1].numpy().all()


def trained(scale=1.0, order=slice(None), **options):
    model = table_model(RMSprop("auto"))
    optimizer, state = RMSprop("auto", **options), []
    variables = model.trainable_variables[order]
    optimizer.build(variables)
    apply = LOOP(optimizer)
    for step in range(25):
        pull = [0.3 * np.asarray(v > 0, "float32") for v in variables]
        given = [
            keras.ops.convert_to_numpy(gradient(model, v, step, False))
            for v in variables
        ]
        apply(
            [
                tensor(scale * np.where(g != 0, g + p, 0), "float32")
                for g, p in zip(given, pull, strict=True)
            ]
        )
    state = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    return state, optimizer.current_learning_rate


@pytest.mark.one_in(7)
@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_the_scale_of_the_loss_does_not_matter_to_tables(scale):
    (expected, rate), (found, found_rate) = trained(), trained(scale)
    assert found_rate == pytest.approx(rate, rel=1e-4)
    assert_close(found, expected, 1e-4)


def test_the_order_of_the_variables_does_not_matter_to_tables():
    expected, rate = trained()
    found, found_rate = trained(order=slice(None, None, -1))
    assert found_rate == pytest.approx(rate, rel=1e-4)
    assert_close(found, expected, 1e-4)


# With everything else.


@pytest.mark.slow
@pytest.mark.one_in(6)
@pytest.mark.parametrize("make", [dense_model, table_model])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"global_clipnorm": 1.0, "skip_nonfinite": True},
        {"loss_scale_factor": 8.0, "clipvalue": 0.5},
        {"slot_dtype": "bfloat16"},
        {"slot_dtype": "uint8", "cautious": True},
    ],
    ids=str,
)
def test_it_resumes_to_the_bit(tmp_path, make, options):
    model = make(RMSprop("auto", **options))
    if make is table_model:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, ROWS, (32, 4)), rng.normal(size=(32, 1))
    else:
        x, y = numbers(model, batch=32)

    def fit(model):
        history = model.fit(x, y, batch_size=8, epochs=6, shuffle=False, verbose=0)
        return history.history["loss"]

    losses = fit(model)
    assert np.isfinite(losses).all()
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.get_config() == model.optimizer.get_config()
    losses += fit(model)
    fit(again)
    assert losses[-1] < losses[0]
    assert_same_bits(again, model)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras has it since 3.15"
)
def test_it_is_a_part_of_a_multi_optimizer():
    model = dense_model("sgd")
    optimizers = keras.optimizers.OptimizerMap(
        keras.optimizers.SGD(0.01), {".*head/.*": RMSprop("auto")}
    )
    model.compile(keras.optimizers.MultiOptimizer(optimizers), "mse", jit_compile=JIT)
    x, y = numbers(model, batch=32)
    losses = model.fit(x, y, epochs=60, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_typical_square_of_float16_is_that_of_float32(size):
    g = size * np.random.default_rng(0).normal(size=(3000, 50)).astype("float16")
    found = float(typical_square(*backend.logs(tensor(g), kernel=False)))
    wide = np.abs(g.astype("float64"))
    expected = np.exp(2 * np.log(wide[wide > 0]).mean())
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("g", "expected"),
    [([2, -8, 0], 16), ([2, 8, np.nan, np.inf], 16), ([0, 0], 0), ([np.nan], 0)],
)
def test_a_typical_square_is_of_what_counts(g, expected):
    g = tensor(np.array(g, "float32"))
    found = typical_square(*backend.logs(g, kernel=backend.has_kernel([])))
    np.testing.assert_allclose(float(found), expected, rtol=1e-5)


def test_tables_step_where_squares_are_infinite():
    table = keras.Variable(np.zeros((2, 2)), name="embeddings")
    optimizer = RMSprop("auto")
    optimizer.build([table])
    LOOP(optimizer)([tensor(np.full((2, 2), 1e25, "float32"))])
    assert (keras.ops.convert_to_numpy(table) < 0).all()
