"""The range test of learning rates: what it sees, and that it leaves no trace."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import compiled, dense_model, everything, numbers
from stepping import BACKEND, python

from keras_rmsprop import RMSprop
from keras_rmsprop.callbacks import LearningRateFinder
from keras_rmsprop.range_test import smoothed, suggested


def noisy_model(optimizer):
    """Return a model with statistics, seeds and a table besides weights."""
    keras.utils.set_random_seed(0)  # layers draw seeds when they are made
    layers = [
        keras.layers.Embedding(12, 4),
        keras.layers.Flatten(),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5, seed=0),  # without, PyTorch has no variable for it
        keras.layers.Dense(1),
    ]
    return compiled(optimizer, keras.Input((4,), dtype="int32"), layers)


def ids_and_targets(batches=40, batch=4):
    random = np.random.default_rng(0)
    return random.integers(0, 12, (batches * batch, 4)), random.normal(
        size=(batches * batch, 1)
    )


def find(model, x, y, finder=None, **options):
    finder = finder or LearningRateFinder(steps=20)
    options = {"batch_size": 4, "verbose": 0, "shuffle": False} | options
    history = model.fit(x, y, callbacks=[finder], **options)
    return finder, history


OPTIMIZERS = {
    "ours": lambda: RMSprop(0.01, momentum=0.5),
    "averages": lambda: RMSprop(0.01, use_ema=True, ema_warmup=True),
    "built-in": lambda: keras.optimizers.RMSprop(0.01, use_ema=True),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(RMSprop(0.01)),
}


@pytest.mark.slow
@pytest.mark.one_in(6)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_it_leaves_no_trace(make, steps_before):
    x, y = ids_and_targets()
    ends = []
    for tests in False, True:
        model = noisy_model(make())
        for _ in range(steps_before):
            model.train_on_batch(x[:4], y[:4])
        if tests:
            find(model, x, y)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        ends.append(everything(model))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def test_its_losses_are_those_of_the_batches():
    x, y = numbers(dense_model(RMSprop()), batch=90)
    finder, _ = find(dense_model(RMSprop()), x, y, epochs=2)
    model = dense_model(RMSprop())
    batches = [slice(i, i + 4) for i in range(0, 90, 4)]
    for step, rate in enumerate(finder.rates):
        assert rate == pytest.approx(1e-6 * 10 ** (6 * step / 19))
        model.optimizer.learning_rate = rate
        batch = batches[step % len(batches)]
        model.reset_metrics()
        loss = model.train_on_batch(x[batch], y[batch])
        assert finder.losses[step] == pytest.approx(float(loss), rel=1e-3)


def test_it_ends_where_the_loss_is_lost():
    model = dense_model(RMSprop())
    finder = LearningRateFinder(1e-3, 1e9, steps=60)
    find(model, *numbers(model, 400), finder)
    assert 20 < len(finder.losses) == len(finder.rates) < 60
    first = np.mean(finder.losses[:20])
    assert not np.median(finder.losses[-5:]) <= 4 * first
    assert np.median(finder.losses[-6:-1]) <= 4 * first


def test_the_rate_is_put_back_or_the_suggestion_taken():
    for train in False, True:
        model = dense_model(RMSprop(0.25))
        x = np.random.default_rng(0).normal(size=(400, 3))
        finder = LearningRateFinder(steps=60, train=train)
        find(model, x, x, finder, epochs=2)
        assert 1e-4 < finder.suggestion < 1
        rate = float(model.optimizer.learning_rate)
        assert rate == pytest.approx(finder.suggestion if train else 0.25)
        # The test is not part of the training.
        assert int(model.optimizer.iterations) == (200 - 60 if train else 0)


def test_what_it_stopped_in_is_in_the_history_and_validated_as_it_was():
    model = dense_model(RMSprop(0.25))
    x, y = numbers(model, 400)
    before = model.evaluate(x, y, verbose=0)
    finder, history = find(model, x, y, validation_data=(x, y), epochs=3)
    assert history.history["val_loss"] == [pytest.approx(before)]
    assert history.history["loss"] == [pytest.approx(np.mean(finder.losses), rel=1e-4)]


@pytest.mark.slow
def test_too_few_batches_are_told_of():
    model = dense_model(RMSprop(0.25))
    x, y = numbers(model, 40)
    with pytest.warns(UserWarning, match="has seen 10 of 20 batches"):
        finder, _ = find(model, x, y)
    assert len(finder.losses) == 10
    assert float(model.optimizer.learning_rate) == 0.25


def interrupted(model, x, y):
    """Return a finder whose test was interrupted in its sixth batch."""

    def stop(batch, logs):
        if batch == 5:
            raise KeyboardInterrupt

    finder = LearningRateFinder(1e-2, steps=20)
    stopper = keras.callbacks.LambdaCallback(on_train_batch_begin=stop)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[finder, stopper])
    return finder


def test_after_an_interruption_it_puts_back_what_there_was():
    model = dense_model(RMSprop(0.25))
    x, y = numbers(model, 400)
    weights = model.get_weights()

    finder = interrupted(model, x, y)
    assert not np.array_equal(model.get_weights()[0], weights[0])
    find(model, x, y, finder)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("batches", [1, 3, 12])
def test_few_batches_are_enough_to_put_back(batches):
    model = dense_model(RMSprop(0.25))
    x, y = numbers(model, 4 * batches)
    weights = model.get_weights()
    with pytest.warns(UserWarning, match=f"has seen {batches} of 100"):
        finder, _ = find(model, x, y, LearningRateFinder())
    assert len(smoothed(finder.losses)) == len(finder.losses) == batches
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(model.optimizer.learning_rate) == 0.25
    finder.plot()
    assert suggested([1, 2, 3], [3, 2, 1]) in (1 / 3, 2 / 3, 1)


@pytest.mark.slow
@pytest.mark.one_in(7)
@pytest.mark.parametrize("make", [OPTIMIZERS["ours"], OPTIMIZERS["Adam"]])
def test_a_model_that_is_not_built(make):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(make(), "mse")
    x = np.random.default_rng(0).normal(size=(400, 3))
    finder, _ = find(model, x, x[:, :1], LearningRateFinder(steps=60))
    assert len(finder.losses) == 60
    # On TensorFlow it is built by a step.
    assert int(model.optimizer.iterations) == int(BACKEND == "tensorflow")
    model.fit(x, x[:, :1], verbose=0)


@pytest.mark.slow
def test_losses_of_batches_of_all_sizes():
    sizes = [1, 64, 7] * 10

    def batches():
        for i, size in enumerate(sizes):
            yield np.ones((size, 3), "float32"), np.full((size, 3), i % 3, "float32")

    model = dense_model(keras.optimizers.SGD(0.1))
    finder = LearningRateFinder(1e-9, 1e-8, steps=30)
    finder, _ = find(model, batches(), None, finder, batch_size=None)
    loss = [model.evaluate(x, y, verbose=0) for x, y in batches()]
    np.testing.assert_allclose(finder.losses, loss, 1e-4)


@pytest.mark.tensorflow("`tf.GradientTape`")
def test_a_train_step_that_tells_its_own_loss():
    class Own(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x) - y))
            weights = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return {"loss": loss}

    model = Own([keras.Input((3,)), keras.layers.Dense(3)])
    model.compile(RMSprop(), "mse", jit_compile=False)
    x, y = np.random.default_rng(0).normal(size=(2, 80, 3)).astype("float32")
    finder, _ = find(model, x, y, LearningRateFinder(1e-9, 1e-8, steps=20))
    batches = [slice(i, i + 4) for i in range(0, 80, 4)]
    loss = [np.mean((model(x[b]).numpy() - y[b]) ** 2) for b in batches]
    np.testing.assert_allclose(finder.losses, loss, 1e-4)


def test_interrupted_it_puts_back_the_model_that_it_is_of():
    a, b = dense_model(RMSprop(0.25)), dense_model(RMSprop(0.25))
    b.set_weights([w + 1 for w in b.get_weights()])
    weights = [m.get_weights() for m in (a, b)]
    x, y = numbers(a, 400)

    finder = interrupted(a, x, y)
    find(b, x, y, finder)
    for model, before in zip((a, b), weights, strict=True):
        for w, old in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(w, old)


@pytest.mark.slow
def test_noise_does_not_end_it():
    random = np.random.default_rng(0)
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model = dense_model(RMSprop())
        x = random.normal(size=(150, 3))
        finder = LearningRateFinder(1e-9, 1e-8)
        find(model, x, x @ random.normal(size=(3, 3)), finder, batch_size=1)
        assert len(finder.losses) == 100


def test_a_bowl_with_noise():
    rates = np.geomspace(1e-6, 10, 100)
    noise = 0.02 * np.random.default_rng(0).normal(size=100)
    falls_at, rises_at = 1e-3, 1.0
    losses = 1 + noise - 0.8 / (1 + falls_at / rates) + (rates / rises_at) ** 2
    assert falls_at / 3 < suggested(rates, losses) < falls_at * 30
    assert suggested(rates, 3 + rates) is None
    np.testing.assert_allclose(smoothed(np.full(50, 7.0)), 7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lowest": 0}, ValueError, "`lowest` must be finite and > 0"),
        ({"highest": 1e-6}, ValueError, "`highest` must be > 1e-06"),
        ({"steps": 10}, ValueError, "`steps` must be an integer >= 20"),
        ({"train": "yes"}, TypeError, "`train` must be True or False"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LearningRateFinder(**arguments)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("auto", "not needed with"),
        (keras.optimizers.schedules.CosineDecay(0.1, 10), "number.*: .*=CosineDecay"),
    ],
    ids=["auto", "schedule"],
)
def test_only_a_number_can_be_found(rate, message):
    model = dense_model(RMSprop(rate))
    with pytest.raises(ValueError, match=message):
        find(model, *numbers(model))


@pytest.mark.slow
def test_the_picture(tmp_path):
    finder = LearningRateFinder(steps=20)
    with pytest.raises(ValueError, match="no batch yet"):
        finder.plot()
    model = dense_model(RMSprop())
    find(model, *numbers(model, 400), finder)
    finder.losses[-1] = 1e9  # as the loss that ends a test may be
    figure = finder.plot()
    figure.savefig(tmp_path / "finder.png")
    assert (tmp_path / "finder.png").stat().st_size > 10_000
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    first = np.mean(finder.losses)
    assert axes.get_ylim()[1] == pytest.approx(4 * first)
    finder.losses[0] = -1.0
    assert finder.plot().axes[0].get_yscale() == "linear"


@pytest.mark.rest
@pytest.mark.tensorflow("a start: the others need not be started again")
@pytest.mark.parametrize(
    "backend", ["jax", pytest.param("torch", marks=pytest.mark.rest)]
)
def test_other_backends(backend):
    pytest.importorskip(backend)
    out = python(
        """
        import keras, numpy as np
        from keras_rmsprop import RMSprop
        from keras_rmsprop.callbacks import LearningRateFinder
        keras.utils.set_random_seed(0)
        layers = [keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((3,)), *layers])
        model.compile(RMSprop(0.25, use_ema=True), "mse")
        x = np.random.default_rng(0).normal(size=(400, 3))
        before = [keras.ops.convert_to_numpy(v) for v in model.weights]
        for train in False, True:
            finder = LearningRateFinder(steps=60, train=train)
            model.fit(x, x, batch_size=4, verbose=0, callbacks=[finder])
            assert len(set(finder.losses)) == 60, finder.losses
            assert 1e-4 < finder.suggestion < 1
            after = [keras.ops.convert_to_numpy(v) for v in model.weights]
            same = all(np.array_equal(a, b) for a, b in zip(before, after))
            assert same is not train
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        assert abs(rate / finder.suggestion - 1) < 1e-6
        print(keras.backend.backend())
        """,
        KERAS_BACKEND=backend,
    )
    assert out.splitlines()[-1] == backend
