"""`learning_rate="auto"`: the rate that is found, on every path there is."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    dense_model,
    gradient,
    no_fit_of_other_layers,
    numbers,
    table_model,
)
from stepping import LOOP, WAYS, assert_close, python, tensor

from keras_rmsprop import AutoLearningRate, RMSprop, estimate, reference
from keras_rmsprop.complaints import complaint
from keras_rmsprop.sampling import Sample

SHAPES = [(70, 80), (200, 30), (3, 4), (5,), (), (0, 2), (2, 3, 40, 20)]
PLAIN = {"momentum": 0.0, "use_ema": False}
"""Without what "auto" does besides."""
FOUND = ("first_weight", "gradient_sum", "learning_rate_estimate")
IN_REFERENCE = {"rho": "beta"}


def problem(seed=0, shapes=SHAPES):
    """Return weights, and a function from weights to the noisy gradient of a bowl."""
    rng = np.random.default_rng(seed)
    goals = [rng.normal(size=s) for s in shapes]
    weights = [goal + 0.1 * rng.normal(size=goal.shape) for goal in goals]

    def gradients(weights, step):
        noise = np.random.default_rng(step)
        return [
            w - goal + 0.02 * noise.normal(size=goal.shape)
            for w, goal in zip(weights, goals, strict=True)
        ]

    return weights, gradients


def both(optimizer, options, steps=20, way="eager", scale=1.0, **search):
    """Take steps beside the reference; return the weights of both, and both rates."""
    weights, gradients = problem()
    variables = [keras.Variable(w, dtype="float32") for w in weights]
    weights = [v.numpy().astype("float64") for v in variables]
    optimizer.build(variables)
    apply, state = WAYS[way](optimizer), {}
    # The averages of the weights change no step.
    options = {IN_REFERENCE.get(k, k): x for k, x in options.items() if k != "use_ema"}
    options = {"momentum": 0.9, "nesterov": True} | options
    if not options.get("centered"):
        options = {"epsilon": 1e-30, "bias_correction": True} | options
    for step in range(steps):
        # Both get the gradients of the optimizer's weights, or they would drift apart.
        given = gradients([v.numpy().astype("float64") for v in variables], step)
        apply([tensor(scale * g, "float32") for g in given])
        weights = reference.automatic_step(weights, given, state, **search, **options)
    rate = state["d"] * (1 - options["momentum"])
    found = optimizer.current_learning_rate
    return [v.numpy() for v in variables], weights, found, rate


OPTIONS = [
    {},
    PLAIN,
    {"momentum": 0.9, "nesterov": False},
    {"momentum": 0.5, "rho": 0.99},
    {"centered": True, "epsilon": 1e-4},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    PLAIN | {"bias_correction": False, "initial_accumulator_value": 1.0},
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("way", "options"),
    [("eager", options) for options in OPTIONS]
    + [(way, options) for way in ("tf.function", "XLA") for options in OPTIONS[:2]],
    ids=str,
)
def test_the_rate_and_the_steps_are_those_of_the_reference(way, options):
    # Smaller first steps are mostly rounding, in weights about 1 in float32.
    optimizer = RMSprop(AutoLearningRate(initial=1e-3), **options)
    found, expected, rate, expected_rate = both(
        optimizer, options, way=way, initial=1e-3
    )
    assert rate == pytest.approx(expected_rate, rel=3e-4)
    assert rate > 2e-3 * (1 - options.get("momentum", 0.9))  # else nothing was found
    assert_close(found, expected, 1e-4)


@pytest.mark.slow
@settings(max_examples=10)
@given(
    initial=st.sampled_from([1e-5, 1e-4, 1e-3]),
    coefficient=st.floats(0.2, 2),
    growth=st.sampled_from([1.1, 2.0, np.inf]),
    sample_every=st.integers(1, 9),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_however_it_is_looked_for(momentum, **search):
    options = {"momentum": momentum}
    optimizer = RMSprop(AutoLearningRate(**search), **options)
    found, expected, rate, expected_rate = both(optimizer, options, 15, **search)
    assert rate == pytest.approx(expected_rate, rel=1e-8 / search["initial"] + 3e-4)
    assert_close(found, expected, 3e-4)


@pytest.mark.one_in(17)
@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_the_scale_of_the_loss_does_not_matter(scale):
    x, y = numbers(dense_model(RMSprop()), batch=64)

    def losses(scale):
        model = dense_model(RMSprop("auto"), frozen=())
        model.compile(
            RMSprop("auto"), lambda y, p: scale * keras.losses.mean_squared_error(y, p)
        )
        # Later rounding is amplified: 1000 is no power of two.
        return np.array([model.train_on_batch(x, y) for _ in range(30)]) / scale

    np.testing.assert_allclose(losses(scale), losses(1.0), rtol=1e-4)


def test_the_order_of_the_variables_does_not_matter():
    rates, ends = [], []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        weights, gradients = problem(shapes=SHAPES[:4])
        variables = [keras.Variable(w, dtype="float32") for w in weights]
        optimizer = RMSprop("auto")
        for step in range(30):
            given = gradients([v.numpy() for v in variables], step)
            optimizer.apply(
                [tensor(given[i], "float32") for i in order],
                [variables[i] for i in order],
            )
        rates.append(optimizer.current_learning_rate)
        ends.append([v.numpy() for v in variables])
    assert rates[0] == pytest.approx(rates[1], rel=1e-4)
    assert_close(*ends, 1e-4)


def test_going_up_finds_the_rate_of_going_down():
    rates = []
    for sign in (1, -1):
        weights, gradients = problem(shapes=SHAPES[:4])
        variables = [keras.Variable(w, dtype="float32") for w in weights]
        optimizer = RMSprop("auto", maximize=sign < 0)
        for step in range(30):
            given = gradients([v.numpy() for v in variables], step)
            optimizer.apply([tensor(sign * g, "float32") for g in given], variables)
        rates.append(optimizer.current_learning_rate)
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)
    assert rates[0] > 1e-5


# What multiplies it.


def test_what_is_set_is_a_factor():
    optimizer, weight = RMSprop("auto", **PLAIN), keras.Variable([1.0, -1.0])
    assert float(optimizer.learning_rate) == 1
    for _ in range(50):
        optimizer.apply([weight.numpy()], [weight])
    whole = optimizer.current_learning_rate
    optimizer.learning_rate = 0.25
    assert optimizer.current_learning_rate == pytest.approx(whole / 4)
    before = weight.numpy()
    optimizer.apply([[1.0, -1.0]], [weight])
    way = before - weight.numpy()
    assert np.abs(way).max() < 1.01 * optimizer.current_learning_rate * 10**0.5
    optimizer.learning_rate = 0.0
    before = weight.numpy()
    optimizer.apply([[1.0, -1.0]], [weight])
    np.testing.assert_array_equal(weight.numpy(), before)
    optimizer.learning_rate = "auto"
    assert float(optimizer.learning_rate) == 1


@pytest.mark.slow
def test_a_schedule_and_callbacks_multiply_it():
    decay = keras.optimizers.schedules.PolynomialDecay(1.0, 40, 0.0)
    model = dense_model(RMSprop(AutoLearningRate(factor=decay)))
    x, y = numbers(model, batch=64)
    model.fit(x, y, batch_size=16, epochs=5, verbose=0)
    optimizer = model.optimizer
    distance = optimizer._search.estimate.numpy()[0]
    assert optimizer.current_learning_rate == pytest.approx(distance / 20)

    model = dense_model(RMSprop("auto"))
    reduce = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=0, min_delta=1e9)
    history = model.fit(x, y, epochs=4, verbose=0, callbacks=[reduce])
    assert history.history["learning_rate"][0] == 1
    assert float(model.optimizer.learning_rate) == 0.125


# Where it comes from, and where it goes.


def test_the_configuration_makes_an_equal_one():
    decay = keras.optimizers.schedules.CosineDecay(1.0, 10)
    optimizer = RMSprop(AutoLearningRate(1e-6, 0.5, 1.1, 2, factor=decay), momentum=0.5)
    config = json.loads(json.dumps(optimizer.get_config()))
    again = RMSprop.from_config(config)
    assert again.get_config() == optimizer.get_config()
    auto = again._search.options
    assert (auto.initial, auto.coefficient, auto.growth, auto.sample_every) == (
        *(1e-6, 0.5, 1.1, 2),
    )
    plain = RMSprop("auto")
    plain.learning_rate = 0.5
    again = RMSprop.from_config(plain.get_config())
    assert float(again.learning_rate) == 0.5
    assert again._search.options.growth == np.inf
    assert again.bias_correction
    assert again.epsilon == 1e-30
    assert RMSprop("auto", bias_correction=False, epsilon=1e-3).epsilon == 1e-3
    assert not RMSprop("auto", bias_correction=False).bias_correction
    assert RMSprop("auto", centered=True).epsilon == 1e-7
    assert RMSprop("auto", epsilon=1e-7).epsilon == 1e-7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"initial": 0}, ValueError, r"`initial` must be in \[1e-12, 1\]"),
        ({"initial": 1e-300}, ValueError, r"`initial` must be in \[1e-12, 1\]"),
        ({"initial": 2}, ValueError, r"`initial` must be in \[1e-12, 1\]"),
        ({"coefficient": 1e300}, ValueError, r"`coefficient` must be in \(0, 1000\]"),
        ({"coefficient": "1"}, TypeError, "`coefficient` must be a number"),
        ({"growth": 1}, ValueError, "`growth` must be > 1"),
        ({"sample_every": 0}, ValueError, "`sample_every` must be an integer >= 1"),
        ({"sample_every": True}, ValueError, "`sample_every` must be an integer >= 1"),
        ({"factor": -1}, ValueError, "`learning_rate` must be finite and >= 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AutoLearningRate(**arguments)


def test_it_is_asked_for_when_the_optimizer_is_made():
    optimizer = RMSprop(0.1)
    assert optimizer.current_learning_rate == pytest.approx(0.1)
    assert RMSprop("auto").current_learning_rate is None  # there was no step
    with pytest.raises(ValueError, match="when the optimizer is made"):
        optimizer.learning_rate = "auto"
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    for rate in "automatic", AutoLearningRate:
        with pytest.raises(TypeError, match='"auto"'):
            RMSprop(rate)
    optimizer = RMSprop("auto")
    optimizer.learning_rate = AutoLearningRate(factor=0.5)
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(ValueError, match="when the optimizer is made"):
        optimizer.learning_rate = AutoLearningRate(initial=1e-3)


def test_a_config_need_not_be_complete():
    whole = AutoLearningRate().get_config()
    assert AutoLearningRate.from_config({}).get_config() == whole
    assert AutoLearningRate.from_config({"growth": None}).get_config() == whole


@pytest.mark.one_in(5)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "use_ema": True}], ids=str)
def test_saved_and_resumed_it_goes_on_to_the_same_bits(tmp_path, options):
    model = dense_model(RMSprop("auto", **options))
    x, y = numbers(model, batch=32)
    for _ in range(10):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert (
        again.optimizer.current_learning_rate == model.optimizer.current_learning_rate
    )
    for _ in range(10):
        model.train_on_batch(x, y)
        again.train_on_batch(x, y)
    for a, b in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("way", WAYS)
def test_steps_that_go_back_and_forth_count_as_in_the_reference(way):
    weights = [np.linspace(-1, 1, n, dtype="float32") for n in (5000, 30, 40)]
    curvatures = [np.linspace(1, 2, w.size) for w in weights]
    variables = [keras.Variable(w) for w in weights[:2]]
    variables.append(keras.Variable(weights[2], name="embeddings"))
    optimizer, state = RMSprop("auto"), {}
    optimizer.build(variables)
    apply, rates, back, brakes = WAYS[way](optimizer), [], [], []
    options = {"momentum": 0.9, "nesterov": True, "bias_correction": True}
    for _ in range(300):  # without noise
        given = [
            c * (keras.ops.convert_to_numpy(v) - 2.0)
            for c, v in zip(curvatures, variables, strict=True)
        ]
        apply([tensor(g, "float32") for g in given])
        weights = reference.automatic_step(
            weights, given, state, tables=[2], epsilon=1e-30, **options
        )
        back.append(state["q"])
        brakes.append(state["k"])
        rates.append(optimizer.current_learning_rate)
        found = state["k"] * state["d"]
        np.testing.assert_allclose(10 * rates[-1], found, rtol=5e-3)
    known = optimizer._search.known()
    assert known.back == pytest.approx(state["q"], abs=1e-2)
    assert known.brake == pytest.approx(state["k"], rel=1e-2)
    assert max(back) > 0.8
    assert min(brakes) < 0.995


def test_a_rate_that_rounding_eats_is_told_of():
    weight = keras.Variable([1.0], dtype="bfloat16")
    optimizer = RMSprop("auto")
    for _ in range(110):
        optimizer.apply([keras.ops.cast(weight - 2.0, "bfloat16")], [weight])
    words = optimizer._search.complaint(1.0)
    assert "weights round such steps away" in words
    assert "(initial=0.1)" in words


def test_without_noise_it_converges_and_goes_on_to_another_optimum():
    x = np.random.default_rng(0).normal(size=(64, 10)).astype("float32")
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(1)])
    model.compile(RMSprop("auto"), "mse")
    errors = []
    # The second is nearer to the first weights, the third beyond them.
    for scale in (1.0, 0.5, -1.0):
        for _ in range(2):
            y = scale * x.sum(1, keepdims=True)
            data = tf.data.Dataset.from_tensors((x, y)).repeat(1200)
            model.fit(data, verbose=0)
            errors.append(model.evaluate(x, y, verbose=0))
    assert max(errors) < 1e-6


def test_it_begins_from_the_weights_that_are_loaded():
    loaded = [np.full(s, 7.0, "float32") for s in ((3, 3), (3,), (3, 3), (3,))]
    model = dense_model(RMSprop("auto"))
    model.optimizer.build(model.trainable_variables)
    model.set_weights(loaded)
    x, y = numbers(model)
    model.fit(x, y, verbose=0)
    first = model.optimizer._search.firsts
    for found, expected in zip(first, loaded, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.slow
def test_a_file_of_the_built_in_is_taken_over(tmp_path):
    model = dense_model(keras.optimizers.RMSprop())
    x, y = numbers(model)
    model.fit(x, y, epochs=3, verbose=0)
    model.save_weights(tmp_path / "its.weights.h5")
    mine = dense_model(RMSprop("auto", **PLAIN))
    mine.optimizer.build(mine.trainable_variables)
    with pytest.warns(UserWarning, match="Started fresh"):
        mine.load_weights(tmp_path / "its.weights.h5")
    assert int(mine.optimizer.iterations) == 3
    mine.fit(x, y, verbose=0)
    velocity = mine.optimizer._velocities[0].numpy()
    model.fit(x, y, verbose=0)
    np.testing.assert_allclose(
        velocity, model.optimizer._velocities[0].numpy(), rtol=1e-5
    )


@pytest.mark.one_in(8)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("finds", [False, True])
def test_a_rate_in_a_file_is_no_factor_nor_the_other_way_round(
    tmp_path, built, finds, steps
):
    rates = {True: "auto", False: 0.25}
    source = dense_model(RMSprop(rates[not finds]))
    x, y = numbers(source)
    for _ in range(steps):
        source.train_on_batch(x, y)
    source.save_weights(tmp_path / "m.weights.h5")
    model = dense_model(RMSprop(rates[finds]))
    if built:
        model.optimizer.build(model.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_weights(tmp_path / "m.weights.h5")
        model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == steps + 1
    assert float(model.optimizer.learning_rate) == (1 if finds else 0.25)


def test_a_rate_in_a_file_of_the_built_in_is_no_factor(tmp_path):
    source = dense_model(keras.optimizers.RMSprop(0.25))
    x, y = numbers(source)
    source.train_on_batch(x, y)
    source.save_weights(tmp_path / "m.weights.h5")
    model = dense_model(RMSprop("auto", **PLAIN))
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="1 `learning_rate_factor`"):
        model.load_weights(tmp_path / "m.weights.h5")
    assert float(model.optimizer.learning_rate) == 1
    for ours, theirs in zip(
        model.optimizer._velocities, source.optimizer._velocities, strict=True
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_factor_set_before_the_first_step_is_saved(tmp_path):
    source = dense_model(RMSprop("auto"))
    source.optimizer.learning_rate = 0.5
    source.save_weights(tmp_path / "m.weights.h5")
    model = dense_model(RMSprop("auto"))
    model.load_weights(tmp_path / "m.weights.h5")
    assert float(model.optimizer.learning_rate) == 0.5


@pytest.mark.tensorflow("`tf.train.Checkpoint`")
@pytest.mark.parametrize("rates", [("auto", 0.25), (0.25, "auto")])
def test_a_checkpoint_of_a_rate_is_not_restored_as_a_factor(tmp_path, rates):
    saved, other = (dense_model(RMSprop(rate)).optimizer for rate in rates)
    path = tf.train.Checkpoint(optimizer=saved).save(tmp_path / "checkpoint")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"learning_rate.*dtype"):
        tf.train.Checkpoint(optimizer=other).restore(path)
    again = RMSprop(rates[0])
    again.learning_rate = 2.0
    tf.train.Checkpoint(optimizer=again).restore(path)
    assert float(again.learning_rate) == float(saved.learning_rate)


@pytest.mark.slow
def test_a_search_that_fits_in_parts_begins_anew(tmp_path):
    def model(sample_every):
        auto = AutoLearningRate(sample_every=sample_every)
        return dense_model(RMSprop(auto), units=(2000, 3))

    source = model(sample_every=1)
    x, y = numbers(source, batch=32)
    source.fit(x, y, epochs=20, verbose=0)
    source.save_weights(tmp_path / "m.weights.h5")
    other = model(sample_every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_weights(tmp_path / "m.weights.h5")
        other.fit(x, y, verbose=0)
    assert int(other.optimizer.iterations) == 21
    known = other.optimizer._search.known()
    assert (known.distance, known.steps) == (np.float32(1e-5), 1)
    for first, w in zip(other.optimizer._search.firsts, source.weights, strict=True):
        sample = other.optimizer._search.options.sample(w.shape)
        np.testing.assert_array_equal(first.numpy(), sample.of(w.numpy()))


@pytest.mark.tensorflow("`tf.function`")
def test_the_rate_found_is_a_tensor_in_a_function():
    optimizer, weight = RMSprop("auto"), keras.Variable([1.0, 2.0])
    for _ in range(30):
        optimizer.apply([weight.numpy()], [weight])
    inside = tf.function(lambda: optimizer.current_learning_rate)()
    assert float(inside) == pytest.approx(optimizer.current_learning_rate)


@pytest.mark.slow
@pytest.mark.tensorflow("`tf.function`")
def test_a_training_can_end_in_a_function():
    optimizer, weight = RMSprop("auto", use_ema=True), keras.Variable([1.0, 2.0])
    optimizer.build([weight])

    @tf.function
    def step():
        optimizer.apply([tf.ones(2)], [weight])
        optimizer.finalize_variable_values([weight])

    step()
    assert int(optimizer.iterations) == 1


@pytest.mark.slow
@no_fit_of_other_layers
def test_layers_that_are_unfrozen_begin_where_they_are():
    model = dense_model(RMSprop("auto"), frozen=("body",))
    x, y = numbers(model, batch=32)
    model.fit(x, y, epochs=5, verbose=0)
    model.get_layer("body").trainable = True
    now = model.get_weights()
    model.compile(model.optimizer, "mse")
    model.fit(x, y, epochs=1, verbose=0)
    for first, weights in zip(model.optimizer._search.firsts, now, strict=True):
        np.testing.assert_array_equal(first.numpy(), weights)
    assert model.optimizer._search.known().steps == 1


# Tables.


@pytest.mark.one_in(9)
@pytest.mark.tensorflow("sparse gradients")
@pytest.mark.parametrize("jit", [None, False, True])
@pytest.mark.parametrize(
    "shape",  # looked at are all elements, some columns, and twice some rows
    [(120, 3), (120, 40), (30, 200), (5000,)],
)
def test_the_rows_of_a_table_give_what_dense_gradients_give(jit, shape):
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape)
    steps = [
        (rng.integers(0, 30, 9), rng.normal(size=(9, *shape[1:]))) for _ in range(40)
    ]
    found = []
    for sparse in (True, False):
        # On the way to the rule of tables; else only slices tell what is one.
        table = keras.Variable(start, dtype="float32", name="embeddings")
        bias = keras.Variable(start[0], dtype="float32", name="bias")
        optimizer = RMSprop(AutoLearningRate(initial=1e-3))
        optimizer.build([table, bias])
        apply = optimizer.apply
        if jit is not None:
            apply = tf.function(optimizer.apply, jit_compile=jit)
        for n, (ids, values) in enumerate(steps):
            values = 0.1 * values + start[ids]  # there is a way to go
            dense = np.zeros(table.shape)
            np.add.at(dense, ids, values)
            slices = tf.IndexedSlices(tensor(values, "float32"), tensor(ids))
            given = slices if sparse else tensor(dense, "float32")
            apply([given, tensor(values[0], "float32")])
            if n == 20:
                _ = optimizer.variables  # brings all rows up to date
        found.append([v.numpy() for v in [table, bias, *optimizer.variables]])
    rate = found[0][-1][0]
    assert rate > 2e-3
    assert_close(*found, 1e-4)


@pytest.mark.one_in(3)
@pytest.mark.tensorflow("sparse gradients")
@pytest.mark.parametrize("shape", [(40, 200), (5000,)])
def test_a_table_of_which_some_rows_are_looked_at_goes_by_rows(shape):
    table = keras.Variable(np.ones(shape), dtype="float32")
    optimizer = RMSprop("auto")
    for i in (4, 3):  # one row in four is looked at
        slices = tf.IndexedSlices(tf.ones((1, *shape[1:])), [i])
        optimizer.apply([slices], [table])
    assert [*optimizer._clocks] == [0]
    assert np.argwhere(table.numpy() != 1)[:, 0].tolist()[:: shape[-1]] in (
        [3],
        [3, 4],
    )
    s = optimizer._search.sums[0].numpy()
    assert {*np.argwhere(s)[:, 0].tolist()} == {1}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sparse", [True, False])
def test_what_has_no_gradient_counts_as_it_stands(sparse):
    """Against the reference, to which a gradient of None is a variable left out."""
    model = table_model(RMSprop("auto", **PLAIN))
    variables = model.trainable_variables
    optimizer = model.optimizer
    optimizer.build(variables)
    state = {}
    weights = [v.numpy().astype("float64") for v in variables]
    for step in range(30):
        given = [gradient(model, v, step, sparse) for v in variables]
        as_dense = [
            keras.ops.convert_to_numpy(gradient(model, v, step, False))
            for v in variables
        ]
        if step % 3 == 2:
            given[1] = as_dense[1] = None
        optimizer.apply(given, variables)
        weights = automatic_without(weights, as_dense, state)
    assert optimizer.current_learning_rate == pytest.approx(state["d"], rel=1e-4)
    assert_close([v.numpy() for v in variables], weights, 1e-4)


def automatic_without(weights, gradients, state):
    """Take a step of the reference, where a gradient may be None."""
    known = [g is not None for g in gradients]
    zeros = [
        np.zeros_like(w) if g is None else g
        for w, g in zip(weights, gradients, strict=True)
    ]
    if all(known):
        return reference.automatic_step(
            weights, zeros, state, tables=[0], epsilon=1e-30, bias_correction=True
        )
    # A silent variable keeps its s, its v and its weights.
    kept = [s / 0.999**0.5 for s in state["s"]]
    state["s"] = [
        s if k else o for s, o, k in zip(state["s"], kept, known, strict=True)
    ]
    each = [dict(e) for e in state["each"]]
    new = reference.automatic_step(
        weights, zeros, state, tables=[0], epsilon=1e-30, bias_correction=True
    )
    for i, k in enumerate(known):
        if not k:
            state["each"][i] = each[i] | {"t": each[i]["t"] + 1}
    return [n if k else w for n, w, k in zip(new, weights, known, strict=True)]


# Beside other options.


def test_a_step_that_is_skipped_finds_nothing():
    optimizer, weight = RMSprop("auto", skip_nonfinite=True), keras.Variable([1.0, 2.0])
    for _ in range(20):
        optimizer.apply([weight.numpy()], [weight])
    before = optimizer._search.estimate.numpy()
    optimizer.apply([[np.nan, 1.0]], [weight])
    np.testing.assert_array_equal(optimizer._search.estimate.numpy(), before)


@pytest.mark.slow
def test_accumulated_gradients_count_once():
    found = []
    for every in (None, 2):
        weights, gradients = problem(shapes=SHAPES[:4])
        variables = [keras.Variable(w, dtype="float32") for w in weights]
        optimizer = RMSprop("auto", gradient_accumulation_steps=every)
        optimizer.build(variables)
        apply = LOOP(optimizer)
        for step in range(20):
            given = gradients([v.numpy() for v in variables], step)
            for _ in range(every or 1):
                apply([tensor(g, "float32") for g in given])
        found.append(
            [v.numpy() for v in variables] + [optimizer._search.estimate.numpy()]
        )
    assert_close(*found, 1e-5)


def test_scaled_losses_find_the_same():
    found = []
    for scale in (None, 1024.0):
        weight = keras.Variable([1.0, -2.0, 3.0])
        optimizer = RMSprop("auto", loss_scale_factor=scale)
        for _ in range(30):
            optimizer.apply([weight.numpy() * (scale or 1)], [weight])
        found.append([weight.numpy(), optimizer._search.estimate.numpy()])
    assert_close(*found, 1e-6)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_dtypes(dtype):
    weight = keras.Variable(np.linspace(-1, 1, 8), dtype=dtype)
    # A first step is one that the weights can take.
    optimizer = RMSprop("auto", slot_dtype="bfloat16" if dtype == "bfloat16" else None)
    for _ in range(150):
        optimizer.apply([keras.ops.cast(weight.value, dtype)], [weight])
    wide = "float64" if dtype == "float64" else "float32"
    assert optimizer._search.sums[0].dtype == wide
    assert np.abs(weight.numpy().astype("float32")).max() < 0.5
    assert weight.dtype == dtype
    first = 1e-5 if dtype == "float64" else 1e-3
    assert optimizer._search.options.initial == first
    assert optimizer.get_config()["learning_rate"]["config"]["initial"] is None


@pytest.mark.rest
@pytest.mark.slow
@pytest.mark.tensorflow("`tf.distribute`")
def test_two_replicas_find_what_one_finds():
    out = python(
        """
        import keras, numpy as np, tensorflow as tf
        from keras_rmsprop import RMSprop
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 2,
        )
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 50, (64, 4))
        y = rng.normal(size=(64, 1))

        def trained(strategy):
            keras.utils.set_random_seed(0)
            with strategy.scope():
                model = keras.Sequential([
                    keras.Input((4,), dtype="int32"), keras.layers.Embedding(50, 3),
                    keras.layers.Flatten(), keras.layers.Dense(1)])
                model.compile(RMSprop("auto"), "mse", jit_compile=False)
            optimizer = model.optimizer
            for model.layers[0].trainable in (False, True):
                with strategy.scope():
                    model.compile(optimizer, "mse", jit_compile=False)
                model.fit(ids, y, batch_size=16, epochs=5, shuffle=False, verbose=0)
            for v in (*model.variables, *optimizer.variables):
                copies = strategy.experimental_local_results(v.value)
                for copy in copies:
                    np.testing.assert_array_equal(copy, copies[0], v.path)
            weights = [w.numpy() for w in model.weights]
            return weights, optimizer.current_learning_rate

        one, rate = trained(tf.distribute.OneDeviceStrategy("CPU:0"))
        two, rate_of_two = trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
        assert rate > 3e-6  # it begins at 1e-6
        np.testing.assert_allclose(rate_of_two, rate, rtol=1e-4)
        for a, b in zip(one, two):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        print("same")
        """
    )
    assert out.splitlines()[-1] == "same"


@pytest.mark.rest
@pytest.mark.tensorflow("a start: the others need not be started again")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_find_what_the_reference_finds(backend):
    pytest.importorskip(backend)
    out = python(
        """
        import keras, numpy as np
        from keras_rmsprop import RMSprop, reference
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=s).astype("float32") for s in ((70, 80), (5,), ())]
        variables = [keras.Variable(w) for w in weights]
        optimizer, state = RMSprop("auto", momentum=0.5), {}
        for step in range(30):
            given = [keras.ops.convert_to_numpy(v) - 2 for v in variables]
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in given], variables)
            weights = reference.automatic_step(
                weights, given, state,
                momentum=0.5, nesterov=True, epsilon=1e-30,
                bias_correction=True)
        np.testing.assert_allclose(
            optimizer.current_learning_rate, state["d"] / 2, rtol=2e-3)
        for v, w in zip(variables, weights):
            found = keras.ops.convert_to_numpy(v)
            np.testing.assert_allclose(found, w, rtol=0, atol=2e-3)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        model.compile(RMSprop("auto", use_ema=True), "mse")
        x = rng.normal(size=(64, 8))
        loss = model.fit(x, x[:, :4], epochs=40, verbose=0).history["loss"]
        assert loss[-1] < loss[0] / 2 and model.optimizer.current_learning_rate > 1e-3
        print(keras.backend.backend())
        """,
        KERAS_BACKEND=backend,
    )
    assert out.splitlines()[-1] == backend


def test_a_subclass_with_a_step_of_its_own_is_given_the_rate_found():
    class Plain(RMSprop):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, learning_rate * gradient)

    weight, optimizer = keras.Variable([1.0, -2.0]), Plain("auto")
    for _ in range(5):
        before, given = weight.numpy(), weight.numpy()
        optimizer.apply([given], [weight])
        way = optimizer.current_learning_rate * given
        np.testing.assert_allclose(before - weight.numpy(), way, rtol=1e-2, atol=1e-7)


# What a user is told.


@pytest.mark.slow
def test_a_rate_that_is_stuck_is_told_of():
    model = dense_model(RMSprop("auto"))
    x, y = numbers(model)
    model.compile(
        RMSprop("auto"), lambda y, p: 0.0 * keras.losses.mean_squared_error(y, p)
    )
    with pytest.warns(
        UserWarning, match=r"still at its initial value of 1e-05 .*initial"
    ):
        model.fit(x, y, batch_size=1, epochs=15, verbose=0)
    with pytest.warns(UserWarning, match=r"not agree.*\(initial=0.001\)"):
        assert model.optimizer.current_learning_rate == pytest.approx(1e-6)
    known = estimate.Estimate(0.03, 0.0, 100.0, 3.0, 0.0)
    assert not complaint(known._replace(longest=1.0), 0.03, 1.0)  # it has fallen again
    words = complaint(known, 0.03, 1.0)
    assert "too large" in words
    assert "(initial=1e-05)" in words


def test_a_rate_that_runs_away_is_told_of():
    weight, optimizer = keras.Variable([0.0]), RMSprop("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(20):
            optimizer.apply([[1.0]], [weight])
        _ = optimizer.current_learning_rate
    for _ in range(1000):
        optimizer.apply([[1.0]], [weight])  # a slope without end
    with pytest.warns(UserWarning, match="larger than weights should move"):
        assert optimizer.current_learning_rate == pytest.approx(estimate.MOST / 10)
    assert np.isfinite(weight.numpy())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("initial", [1e-5, 3e-4, 1e-3])  # two are rounded up
def test_a_rate_that_is_stuck_is_told_of_whatever_it_is(initial):
    weight = keras.Variable(np.ones(50), dtype="bfloat16")  # steps are lost in it
    optimizer = RMSprop(AutoLearningRate(initial=initial))
    for _ in range(101):
        way = keras.ops.convert_to_tensor(weight) - 3
        optimizer.apply([way], [weight])
    with pytest.warns(UserWarning, match="still at its initial value"):
        assert optimizer.current_learning_rate == pytest.approx(initial / 10)


ABSOLUTE = {
    "scheduler": lambda m: keras.callbacks.LearningRateScheduler(lambda epoch: 1e-3),
    "decay": lambda m: keras.callbacks.LearningRateScheduler(
        lambda epoch: 3e-4 * 0.9**epoch
    ),
    "assigned": lambda m: setattr(m.optimizer, "learning_rate", 1e-3),
    "in place": lambda m: m.optimizer.learning_rate.assign(1e-3),
    "0.01 in place": lambda m: m.optimizer.learning_rate.assign(0.01),
    "0.01 assigned": lambda m: setattr(m.optimizer, "learning_rate", 0.01),
    "so small that the rate grows little": lambda m: m.optimizer.learning_rate.assign(
        0.02
    ),
    "a plateau before the rate has grown": lambda m: keras.callbacks.ReduceLROnPlateau(
        "loss", 0.01, patience=0, min_delta=1e9
    ),
}


@pytest.mark.one_in(11)
@pytest.mark.parametrize("act", ABSOLUTE.values(), ids=ABSOLUTE)
def test_a_rate_where_a_factor_is_meant_is_told_of(act):
    model = dense_model(RMSprop("auto"))
    x, y = numbers(model, 100)

    def trained():
        made = act(model)
        callbacks = [made] if isinstance(made, keras.callbacks.Callback) else []
        model.fit(x, y, batch_size=10, epochs=15, verbose=0, callbacks=callbacks)

    with pytest.warns(UserWarning, match=r"`learning_rate` is .*factor.*= 1\.0"):
        trained()


FACTORS = {
    "scheduler": [
        keras.callbacks.LearningRateScheduler(
            lambda epoch: [1.0, 0.5, 0.1, 0.02][epoch]
        )
    ],
    "warm-up": [
        keras.callbacks.LearningRateScheduler(lambda epoch: min(1.0, (epoch + 1) / 4))
    ],
    "plateau": [
        keras.callbacks.ReduceLROnPlateau("loss", 0.1, patience=0, min_delta=1e9)
    ],
    "cosine": keras.optimizers.schedules.CosineDecay(1.0, 40),
    "warm-up of steps": keras.optimizers.schedules.CosineDecay(
        0.0, 20, warmup_target=1.0, warmup_steps=20
    ),
}


@pytest.mark.one_in(23)
@pytest.mark.parametrize("given", FACTORS.values(), ids=FACTORS)
def test_a_factor_is_not_told_of(given):
    callbacks, factor = (given, 1.0) if isinstance(given, list) else ([], given)
    model = dense_model(RMSprop(AutoLearningRate(factor=factor)))
    x, y = numbers(model, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, y, batch_size=10, epochs=4, verbose=0, callbacks=callbacks)
        assert model.optimizer.current_learning_rate > 0 or callbacks == []


def test_a_stop_before_the_rate_has_grown_is_told_of():
    model = dense_model(RMSprop("auto"))
    x, y = numbers(model, 16)

    def train(**options):
        stop = keras.callbacks.EarlyStopping("loss", **options)
        model.fit(x, y, batch_size=8, epochs=80, verbose=0, callbacks=[stop])

    with pytest.warns(UserWarning, match=r"stopped after 8 steps.*a hundred steps"):
        train(min_delta=1e9, patience=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(baseline=0.0, patience=70)  # by then it has grown


def test_a_decay_is_not_the_cause_of_a_rate_that_is_stuck():
    decay = keras.optimizers.schedules.PolynomialDecay(1.0, 120, 1e-6)
    optimizer, weight = RMSprop(AutoLearningRate(factor=decay)), keras.Variable([1.0])
    for step in range(120):
        optimizer.apply([[(-1.0) ** step]], [weight])
    with pytest.warns(UserWarning, match="gradients do not agree"):
        _ = optimizer.current_learning_rate


def test_what_it_keeps_is_a_quarter_of_large_variables():
    kernel = keras.Variable(np.zeros((256, 512)), dtype="float32")
    optimizer = RMSprop("auto")
    optimizer.build([kernel, keras.Variable(np.zeros(512), dtype="float32")])
    kept = {v.path: v for v in optimizer.variables if any(k in v.path for k in FOUND)}
    assert sum(np.prod(v.shape) for v in kept.values()) == 2 * (64 * 512 + 512) + 8


@pytest.mark.parametrize(
    ("shape", "every", "kept"),
    [
        ((63, 64), 4, (63, 64)),  # small
        ((784, 128), 4, (196, 128)),
        ((5000, 10), 4, (1250, 10)),
        ((3, 4096), 4, (3, 1024)),
        ((4096,), 4, (1024,)),
        ((3, 3, 64, 32), 4, (3, 3, 16, 32)),
        ((3, 3, 66, 32), 4, (3, 3, 66, 8)),  # 66 do not divide by 4
        ((3, 3, 512, 1), 4, (3, 3, 128, 1)),
        ((7, 7, 3, 64), 4, (2, 7, 3, 64)),
        ((256, 256, 3, 3), 4, (64, 256, 3, 3)),
        ((3, 3, 3, 333), 4, (3, 3, 3, 84)),
        ((4096, 4096), 4, (256, 4096)),  # a million suffice
        ((4096, 4096), 1, (4096, 4096)),
        ((2**17, 64), 4, (2**15, 64)),  # may be a table
    ],
)
def test_the_elements_that_are_looked_at_are_lines(shape, every, kept):
    sample, places = Sample(shape, every), np.arange(np.prod(shape)).reshape(shape)
    assert sample.shape == kept
    run, pitch, stride = sample.runs
    i = np.arange(np.prod(kept))
    expected = i // run * pitch + i % run * stride
    np.testing.assert_array_equal(np.ravel(sample.of(places)), expected)
    assert sample.stands_for == places.size / i.size
    if sample.row_step == 1:
        np.testing.assert_array_equal(sample.of(places[1:]), sample.of(places)[1:])
    else:
        np.testing.assert_array_equal(sample.of(places), places[:: sample.row_step])


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((64, 128), ("a", "b"), ("a", "b")),  # whole rows: (16, 128)
        ((128, 72), ("b", "a"), ("b", "a")),  # (32, 72)
        ((72, 128), ("b", None), (None, None)),  # 18 rows do not divide by 4
        ((8, 8, 128), ("a", "b", "b"), ("a", None, "b")),  # (8, 2, 128)
        ((8, 512, 1), ("a", "b", None), ("a", "b", None)),  # (8, 128, 1)
        ((2**14,), ("b",), ("b",)),
    ],
)
def test_a_sample_is_spread_over_devices_as_its_variable_is(shape, axes, expected):
    devices = [f"cpu:{n}" for n in range(8)]
    mesh = keras.distribution.DeviceMesh((2, 4), ["a", "b"], devices)
    whole = keras.distribution.TensorLayout(axes, mesh)
    sample = AutoLearningRate().sample(shape)
    assert len(sample.shape) == len(expected)
    assert sample.layout(whole).axes == expected
    assert sample.layout(whole).device_mesh is mesh
