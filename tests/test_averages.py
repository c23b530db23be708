"""Each weight gets its own average, whichever layers are trained, in whatever order.

The layers have one shape: an average in the wrong place would not be an error.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import RMSprop as BuiltIn
from small_models import (
    JIT,
    OneBuiltInEach,
    dense_model,
    no_fit_of_other_layers,
    numbers,
    save,
    take_steps,
    user_warnings,
)
from stepping import BACKEND, WAYS, assert_close, python, tensor

from keras_rmsprop import RMSprop
from keras_rmsprop.state import as_array, sync

OPTIONS = {"learning_rate": 0.02, "use_ema": True, "ema_momentum": 0.9}


def train_only(model, *layers):
    """Freeze the other layers of a model, which keeps its optimizer."""
    for layer in model.layers:
        layer.trainable = layer.name in layers
    model.compile(model.optimizer, "mse", jit_compile=JIT)


def finalize(model):
    model.optimizer.finalize_variable_values(model.trainable_variables)


def weights(model, *layers):
    """Return the weights of some layers, or of all."""
    of = [layer for layer in model.layers if not layers or layer.name in layers]
    return [w for layer in of for w in layer.get_weights()]


def ours_and_the_built_ins():
    return dense_model(RMSprop(**OPTIONS)), dense_model(BuiltIn(**OPTIONS))


@pytest.mark.parametrize(("trained", "frozen"), [("head", "body"), ("body", "head")])
def test_a_frozen_layer_stays_and_the_other_gets_its_average(trained, frozen):
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        take_steps(model, range(3))
        train_only(model, trained)
        take_steps(model, range(3, 6))
    before = weights(ours, frozen)
    finalize(ours)
    for got, want in zip(weights(ours, frozen), before, strict=True):
        np.testing.assert_array_equal(got, want)
    train_only(theirs, "body", "head")  # else the built-in takes a list for another
    finalize(theirs)
    assert_close(weights(ours, trained), weights(theirs, trained), 1e-5)


@no_fit_of_other_layers
@pytest.mark.one_in(2)
@pytest.mark.parametrize(("trained", "frozen"), [("head", "body"), ("body", "head")])
def test_fit_after_freezing(trained, frozen):
    model = dense_model(RMSprop(**OPTIONS))
    model.fit(*numbers(model), epochs=2, verbose=0)
    train_only(model, trained)
    before = weights(model, frozen)
    model.fit(*numbers(model), epochs=2, verbose=0)
    for got, want in zip(weights(model, frozen), before, strict=True):
        np.testing.assert_array_equal(got, want)
    averages = [
        v.numpy()
        for v in model.optimizer.variables
        if v.path.endswith("average") and trained in v.path
    ]
    assert len(averages) == 2
    for got, want in zip(weights(model, trained), averages, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.one_in(7)
@pytest.mark.slow
@pytest.mark.parametrize("layers", [["head"], ["body"]])
@pytest.mark.parametrize("options", [{"learning_rate": "auto"}, {"use_ema": True}])
def test_where_fit_cannot_go_on_one_is_told_why(options, layers):
    """On JAX an error in a step takes all values away, and must still be told of."""
    model = dense_model(RMSprop(**options))
    model.fit(*numbers(model), verbose=0)
    train_only(model, *layers)
    if BACKEND != "jax":
        model.fit(*numbers(model), verbose=0)
        return
    with pytest.raises(ValueError, match="the optimizer was built with 4 variables"):
        model.fit(*numbers(model), verbose=0)


def test_a_second_fit_goes_on():
    """On JAX the built-in fails: it gives a buffer away that two variables share."""
    ours, theirs = ours_and_the_built_ins()
    for _ in range(2):
        for model in (ours, theirs):
            model.fit(*numbers(model), epochs=2, shuffle=False, verbose=0)
        for variable in theirs.weights:
            variable.assign(variable.numpy())
        assert_close(weights(ours), weights(theirs), 1e-5)
        assert_close(weights(ours), averages_of(ours.optimizer), 0)


def test_frozen_and_unfrozen_again():
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        take_steps(model, range(3))
        train_only(model, "head")
        take_steps(model, range(3, 6))
        train_only(model, "body", "head")
        take_steps(model, range(6, 9))
        finalize(model)
    assert_close(weights(ours), weights(theirs), 1e-5)


def test_a_known_layer_keeps_its_average_when_another_is_unfrozen():
    model = dense_model(RMSprop(**OPTIONS), frozen=["body"])
    oracle = OneBuiltInEach(model, **OPTIONS)
    for layers, steps in ((["head"], range(3)), (["body", "head"], range(3, 6))):
        train_only(model, *layers)
        take_steps(model, steps)
        oracle.take_steps(model, steps)
    finalize(model)
    for position in (2, 3):
        weight = oracle.weights[position]
        oracle.optimizers[position].finalize_variable_values([weight])
        assert_close([model.weights[position].numpy()], [weight.numpy()], 1e-5)


def test_averages_without_a_memory_are_the_weights_themselves():
    model = dense_model(RMSprop(**OPTIONS | {"ema_momentum": 0.0}), frozen=["body"])
    for layers in (["head"], ["body", "head"], ["body"], ["body", "head"]):
        train_only(model, *layers)
        take_steps(model, range(2))
        before = weights(model)
        finalize(model)
        for got, want in zip(weights(model), before, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0], [1]], ids=str)
def test_variables_in_another_order_or_some_of_them(order):
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        take_steps(model, range(3))
    before = weights(ours)
    ours.optimizer.finalize_variable_values([ours.weights[i] for i in order])
    finalize(theirs)
    expected = weights(theirs)
    for i, got in enumerate(weights(ours)):
        assert_close([got], [expected[i] if i in order else before[i]], 1e-5)


def test_averages_that_replace_the_weights_leave_a_frozen_layer_alone():
    model = dense_model(RMSprop(**OPTIONS, ema_overwrite_frequency=2))
    take_steps(model, range(3))
    train_only(model, "head")
    before = weights(model, "body")
    take_steps(model, range(3, 8))
    for got, want in zip(weights(model, "body"), before, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("file", "built"), [("m.keras", True), ("m.weights.h5", False)]
)
def test_what_a_file_does_not_know_begins_at_its_weights(tmp_path, file, built):
    model = dense_model(RMSprop(**OPTIONS), frozen=["body"])
    take_steps(model, range(3))
    save(model, tmp_path / file)
    other = dense_model(RMSprop(**OPTIONS))
    other.set_weights([w + 1 for w in other.get_weights()])
    if built:
        other.optimizer.build(other.trainable_variables)
    with user_warnings() as warned:
        other.load_weights(tmp_path / file)
        other.optimizer.build(other.trainable_variables)
    assert len(warned) == 1
    finalize(other)
    finalize(model)
    for got, want in zip(weights(other), weights(model), strict=True):
        np.testing.assert_array_equal(got, want)


def test_fit_goes_on_from_a_file_without_averages(tmp_path):
    """On JAX an average that begins at its weights must not share their buffer."""
    model, other = dense_model(RMSprop(0.02)), dense_model(RMSprop(**OPTIONS))
    model.fit(*numbers(model), verbose=0)
    save(model, tmp_path / "m.weights.h5")
    other.optimizer.build(other.trainable_variables)
    with user_warnings() as warned:
        other.load_weights(tmp_path / "m.weights.h5")
    assert len(warned) == 1
    other.fit(*numbers(other), verbose=0)
    assert int(other.optimizer.iterations) == 2


def function_of_a_step(model):
    optimizer, variables = model.optimizer, model.trainable_variables

    @tf.function
    def step(value):
        gradients = [value * tf.ones(v.shape) for v in variables]
        optimizer.apply(gradients, variables)

    return step


@pytest.mark.tensorflow("`tf.function`")
def test_functions_that_train_some_layers_or_all():
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        model.optimizer.build(model.trainable_variables)
        for layers in (["body", "head"], ["head"], ["body", "head"]):
            train_only(model, *layers)
            step = function_of_a_step(model)
            step(tensor(1.0))
            step(tensor(2.0))
        finalize(model)
    assert_close(weights(ours), weights(theirs), 1e-5)


# With `ema_warmup`. The oracle is told the weights after each step.

WARM = OPTIONS | {"ema_warmup": True}


def averages_of(optimizer):
    return [v.numpy() for v in optimizer.variables if v.path.endswith("average")]


class Warm:
    """The averages of weights, in float64."""

    def __init__(self, momentum=0.9, every=1):
        self.momentum, self.every, self.calls = momentum, every, 0

    def follow(self, weights):
        t = self.calls // self.every
        m = min(self.momentum, (1 + t) / (10 + t)) if t else 0.0
        old = self.averages if self.calls else weights
        pairs = zip(old, weights, strict=True)
        self.averages = [m * a + (1 - m) * w.astype("float64") for a, w in pairs]
        self.calls += 1


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("way", "options"),
    [
        *((way, {}) for way in WAYS),
        ("eager", {"ema_momentum": 0.2}),
        ("tf.function", {"ema_momentum": 1.0}),
        ("eager", {"gradient_accumulation_steps": 3}),
        ("XLA", {"gradient_accumulation_steps": 3, "ema_momentum": 0.2}),
        ("eager", {"skip_nonfinite": True}),
        ("eager", {"jit_compile": False}),
    ],
)
def test_warm_up(way, options):
    optimizer = RMSprop(**WARM | options)
    weights = [keras.Variable([1.0, -2.0]), keras.Variable([[3.0]])]
    optimizer.build(weights)
    apply = WAYS[way](optimizer)
    every = options.get("gradient_accumulation_steps", 1)
    oracle = Warm((WARM | options)["ema_momentum"], every)
    rng = np.random.default_rng(0)
    for step in range(14):
        gradients = [tensor(rng.normal(size=w.shape), "float32") for w in weights]
        if step == 3 and "skip_nonfinite" in options:
            apply([gradients[0] * np.nan, gradients[1]])
            continue
        apply(gradients)
        oracle.follow([w.numpy() for w in weights])
        assert_close(averages_of(optimizer), oracle.averages, 1e-6)


@pytest.mark.float64
@pytest.mark.parametrize("way", WAYS)
def test_warm_up_in_float64(way):
    weight = keras.Variable([1.0, -2.0], dtype="float64")
    optimizer, oracle = RMSprop(**WARM | {"ema_momentum": 0.3}), Warm(0.3)
    optimizer.build([weight])
    apply = WAYS[way](optimizer)
    for step in range(8):
        apply([tensor([1.0, step], "float64")])
        oracle.follow([weight.numpy()])
    assert_close(averages_of(optimizer), oracle.averages, 1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_averages_of_short_weights_go_on_to_follow_them(way, dtype):
    weight = keras.Variable([1.0, -2.0], dtype=dtype)
    # In bfloat16 a share of .999 is 1.
    optimizer = RMSprop(**WARM | {"ema_momentum": 0.999, "learning_rate": 0.05})
    oracle = Warm(0.999)
    optimizer.build([weight])
    apply = WAYS[way](optimizer)
    for _ in range(60):
        apply([tensor([1.0, 1.0], dtype)])
        oracle.follow([weight.numpy()])
    [found] = averages_of(optimizer)
    # XLA averages weights that are not rounded yet.
    assert_close([found], oracle.averages, 2**-8 if way == "XLA" else 1e-6)
    optimizer.finalize_variable_values([weight])
    want = keras.ops.convert_to_numpy(keras.ops.cast(found, dtype))
    assert weight.dtype == dtype
    np.testing.assert_array_equal(weight.numpy(), want)


class Halves(RMSprop):
    """Has a rule of its own for averages, as Keras writes it."""

    def _update_model_variables_moving_average(self, trainable_variables):
        averages = self._model_variables_moving_average
        for v, average in zip(trainable_variables, averages, strict=True):
            average.assign(0.5 * average + (1 - 0.5) * v)


def test_a_rule_of_a_subclass_has_averages_like_the_weights():
    weight = keras.Variable([1.0, -2.0], dtype="bfloat16")
    optimizer = Halves(0.5, use_ema=True)
    optimizer.apply([tensor([1.0, 1.0], "bfloat16")], [weight])
    [average] = optimizer._model_variables_moving_average
    assert average.dtype == "bfloat16"
    half = keras.ops.convert_to_numpy(0.5 * weight)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(average), half)


@pytest.mark.tensorflow("`tf.Variable`")
def test_averages_of_short_variables_of_tensorflow():
    weight = tf.Variable(tf.constant([1.0, -2.0], "bfloat16"))
    optimizer = RMSprop(**OPTIONS, ema_overwrite_frequency=2)
    for _ in range(2):
        optimizer.apply([tf.constant([1.0, 1.0], "bfloat16")], [weight])
    [average] = averages_of(optimizer)
    np.testing.assert_array_equal(weight, tf.cast(average, "bfloat16"))
    optimizer.finalize_variable_values([weight])


@pytest.mark.tensorflow("sparse gradients")
@pytest.mark.parametrize("rows", ["exact", "lazy"])
@pytest.mark.parametrize("jit", [False, True])
def test_averages_of_rows_of_short_weights(rows, jit):
    table = keras.Variable(np.ones((5, 1)), dtype="bfloat16", name="embeddings")
    optimizer = RMSprop(**WARM | {"ema_momentum": 0.999}, sparse_update=rows)
    optimizer.build([table])
    oracle = Warm(0.999)

    @tf.function(jit_compile=jit)
    def step(ids, values):
        optimizer.apply([tf.IndexedSlices(values, ids)], [table])

    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, 5, 3) if rows == "exact" else np.arange(5)
        values = tf.cast(rng.normal(size=(len(ids), 1)), "bfloat16")
        step(tf.constant(ids), values)
        oracle.follow([table.numpy().astype("float32")])
    assert_close(averages_of(optimizer), oracle.averages, 2**-8 if jit else 1e-6)


@pytest.mark.tensorflow("sparse gradients")
def test_warm_up_follows_rows_that_are_lazy():
    table = keras.Variable(np.ones((4, 1), "float32"))
    optimizer = RMSprop(**WARM, sparse_update="lazy")
    optimizer.build([table])
    oracle = Warm()
    for _ in range(4):
        optimizer.apply([tf.IndexedSlices([[1.0]], [1])])
        oracle.follow([table.numpy()])
        assert_close(averages_of(optimizer), oracle.averages, 1e-6)


def test_warm_up_is_an_option_like_others():
    assert RMSprop().ema_warmup is False
    assert RMSprop.from_config(RMSprop(**WARM).get_config()).ema_warmup is True
    with pytest.raises(TypeError, match="`ema_warmup` must be True or False"):
        RMSprop(ema_warmup="yes")


def test_warm_up_assigned_between_two_steps():
    weight = keras.Variable([1.0])
    optimizer = RMSprop(**OPTIONS)
    found = []
    for warms_up in (False, False, True, False):
        optimizer.ema_warmup = warms_up
        before = averages_of(optimizer)
        optimizer.apply([[1.0]], [weight])
        m = 0.25 if warms_up else 0.9  # after two steps
        if before and len(found) > 0:
            expected = [m * before[0] + (1 - m) * weight.numpy()]
            assert_close(averages_of(optimizer), expected, 1e-6)
        found.append(weight.numpy())


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_warm_up_in_fit(jit_compile):
    model = dense_model(RMSprop(**WARM))
    model.compile(model.optimizer, "mse", jit_compile=jit_compile)
    oracle = Warm()
    follow = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: (
            sync(model),
            oracle.follow(weights(model)),
        )
    )
    model.fit(*numbers(model), batch_size=2, epochs=2, verbose=0, callbacks=[follow])
    assert oracle.calls == 8
    assert_close(weights(model), oracle.averages, 1e-5)


@pytest.mark.rest
@pytest.mark.tensorflow("a start: the others need not be started again")
@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("every", [None, 2])
def test_warm_up_on_other_backends(backend, every):
    pytest.importorskip(backend)
    out = python(
        f"""
        import keras, numpy as np
        from keras_rmsprop import RMSprop

        weight = keras.Variable([1.0, 2.0])
        optimizer = RMSprop(0.1, use_ema=True, ema_momentum=0.4, ema_warmup=True,
                            gradient_accumulation_steps={every})
        optimizer.build([weight])
        for calls in range(12):
            optimizer.apply([keras.ops.convert_to_tensor([1.0 + calls, -1.0])])
            t = calls // {every or 1}
            m = min(0.4, (1 + t) / (10 + t)) if t else 0.0
            w = keras.ops.convert_to_numpy(weight).astype("float64")
            expected = w if calls == 0 else m * expected + (1 - m) * w
            average = next(v for v in optimizer.variables if "average" in v.path)
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(average), expected, rtol=1e-5)

        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(RMSprop(0.1, use_ema=True, ema_warmup=True), "mse")
        history = model.fit(np.ones((8, 2)), np.ones((8, 1)), epochs=3, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        print(keras.backend.backend())
        """,
        KERAS_BACKEND=backend,
    )
    assert out.endswith(backend)


class TestBeforeTheFirstStep:
    """Averages that followed no step yet never replace weights with zeros."""

    def test_weights_stay_if_all_steps_were_skipped(self):
        model = dense_model(RMSprop(**OPTIONS, skip_nonfinite=True))
        before, (x, y) = model.get_weights(), numbers(model)
        model.fit(x, np.nan * y, verbose=0)
        assert int(model.optimizer.skipped_steps) > 0
        for got, want in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(got, want)

    def test_averages_begin_at_the_weights_if_a_state_is_set(self):
        model = dense_model(RMSprop(**OPTIONS))
        take_steps(model, range(3))
        other = dense_model(RMSprop(**OPTIONS))
        other.set_weights(model.get_weights())
        other.optimizer.build(other.trainable_variables)
        other.optimizer.set_state(model.optimizer.get_state())
        before = other.get_weights()
        take_steps(other, range(3, 4))
        after = other.get_weights()
        finalize(other)
        want = [0.9 * a + 0.1 * b for a, b in zip(before, after, strict=True)]
        assert_close(other.get_weights(), want, 1e-6)

    def test_averages_that_are_off_in_the_first_step_begin_at_the_weights(self):
        optimizer, weight = RMSprop(0.5, use_ema=True), keras.Variable([4.0, -2.0])
        optimizer.build([weight])
        optimizer.use_ema = False
        optimizer.apply([tensor([1.0, 1.0], "float32")], [weight])
        optimizer.use_ema = True
        optimizer.apply([tensor([1.0, 1.0], "float32")], [weight])
        want = 0.99 * np.array([4.0, -2.0]) + 0.01 * as_array(weight)
        assert_close(averages_of(optimizer), [want], 1e-6)


@pytest.mark.parametrize("table", [False, True])
def test_warm_up_begins_again_after_an_end(table):
    weight = keras.Variable(np.zeros((6, 1)), dtype="float32", name="embeddings")
    optimizer = RMSprop(0.1, use_ema=True, ema_momentum=0.999, ema_warmup=True)
    average, t, begin = np.zeros((6, 1)), 0, 0
    rng = np.random.default_rng(0)
    for steps in (5, 1, 12, 3):
        for _ in range(steps):
            ids = rng.choice(6, 2, replace=False)
            gradient = np.zeros((6, 1), "float32")
            gradient[ids] = rng.normal(size=(2, 1))
            if table and keras.backend.backend() == "tensorflow":
                gradient = tf.IndexedSlices(tf.constant(gradient[ids]), ids)
            optimizer.apply([gradient], [weight])
            n = t - begin
            m = min(0.999, (1 + n) / (10 + n)) if t else 0.0
            now = keras.ops.convert_to_numpy(weight)
            average, t = m * average + (1 - m) * now, t + 1
        optimizer.finalize_variable_values([weight])
        begin = t
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(weight), average, rtol=1e-5, atol=1e-7
        )


@pytest.mark.slow
def test_a_loop_of_short_fits_gets_on():
    def trained(fits):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(RMSprop("auto"), "mse")
        for _ in range(fits):
            model.fit(x, y, batch_size=8, epochs=24 // fits, verbose=0)
        return model.evaluate(x, y, verbose=0)

    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [0.5], [0.0]], "float32")
    start = float(np.mean(y**2))
    assert trained(1) < 0.01 * start
    assert trained(24) < 0.05 * start


CONSTRAINTS = {
    "MaxNorm": (keras.constraints.MaxNorm(1.0), lambda w: np.linalg.norm(w) <= 1.0001),
    "UnitNorm": (keras.constraints.UnitNorm(), lambda w: abs(np.sum(w**2) - 1) < 1e-4),
    "NonNeg": (keras.constraints.NonNeg(), lambda w: (w >= 0).all()),
    "a user's": (
        lambda w: keras.ops.clip(w, -0.1, 0.1),
        lambda w: (abs(w) <= 0.1).all(),
    ),
}


@pytest.mark.parametrize("often", [None, 3], ids=["at the end", "often"])
@pytest.mark.parametrize(("constraint", "holds"), CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_a_model_that_gets_its_averages_meets_its_constraints(constraint, holds, often):
    layer = keras.layers.Dense(1, kernel_constraint=constraint)
    model = keras.Sequential([keras.Input((10,)), layer])
    optimizer = RMSprop("auto", ema_overwrite_frequency=often)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(64, 10)).astype("float32")
    y = x @ np.linspace(-2, 2, 10)
    model.fit(x, y, batch_size=16, epochs=20, verbose=0)
    assert holds(as_array(layer.kernel))
    average = as_array(optimizer._weight_averages[0])
    assert not holds(average)  # else nothing was to be done


class OwnStep(keras.Model):
    """Trains with nothing, or with what it likes; not with what `compile` was given."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        return {"loss": keras.ops.mean(self(data[0]))}


@pytest.mark.tensorflow("a `train_step` of its own")
@pytest.mark.parametrize("way", ["own step", "frozen", "resumed at the end", "empty"])
@pytest.mark.parametrize("options", [{}, {"learning_rate": "auto"}], ids=str)
def test_fit_ends_without_a_step(way, options):
    x = np.ones((8, 3), "float32")
    layer = keras.layers.ReLU() if way == "empty" else keras.layers.Dense(3)
    layer.trainable = way != "frozen"
    model = keras.Sequential([keras.Input((3,)), layer])
    model = OwnStep(model) if way == "own step" else model
    model.compile(RMSprop(use_ema=True, **options), "mse")
    epochs = {"initial_epoch": 2} if way.startswith("resumed") else {}
    model.fit(x, x, epochs=2, verbose=0, **epochs)
    if way == "own step":
        assert not model.optimizer.built
