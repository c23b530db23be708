"""Statistics of `BatchNormalization`, for weights that are averaged."""

import itertools

import keras
import numpy as np
import pytest
from small_models import JIT

from keras_rmsprop import RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation, recompute_batch_norm

STATISTICS = "moving_mean", "moving_variance"


def array(x):
    return keras.ops.convert_to_numpy(x)


def model_and_data(optimizer):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = (3 * rng.normal(size=(48, 5)) + 1).astype("float32")
    layers = [
        keras.layers.Dense(4),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((5,)), *layers])
    model.compile(optimizer, "mse", jit_compile=JIT)
    return model, x, x[:, :1] ** 2


def statistics(model):
    return [array(getattr(model.get_layer("norm"), name)) for name in STATISTICS]


class Noted(keras.callbacks.Callback):
    """Notes the statistics after each batch, and at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.after, self.ends = [], []

    def on_train_batch_end(self, batch, logs=None):
        if JIT:
            self.model.jax_state_sync()
        self.after.append(statistics(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(statistics(self.model))


OPTIMIZERS = {
    "auto": lambda: RMSprop("auto"),
    "given": lambda: RMSprop(0.01, use_ema=True, ema_momentum=0.8),
    "of Keras": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8),
}
SHARES = {
    "auto": lambda t: min(0.9999, (1 + t) / (10 + t)),
    "given": lambda t: 0.8,
    "of Keras": lambda t: 0.8,
}


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fits", [1, 2])
def test_statistics_are_averaged_with_the_weights(name, fits):
    if keras.backend.backend() == "jax" and name == "of Keras" and fits > 1:
        pytest.skip("there `use_ema` of Keras' own optimizers fails in a second `fit`")
    model, x, y = model_and_data(OPTIMIZERS[name]())
    average, t = None, 0
    for _ in range(fits):
        noted, begin = Noted(), t
        model.fit(
            x,
            y,
            batch_size=8,
            epochs=3,
            verbose=0,
            validation_data=(x, y),
            callbacks=[noted, AverageForEvaluation()],
        )
        ends = []
        for i, new in enumerate(noted.after):
            m = SHARES[name](t - begin) if t else 0.0
            new = [n.astype("float64") for n in new]
            old = new if average is None else average
            average = [m * a + (1 - m) * n for a, n in zip(old, new, strict=True)]
            t += 1
            if i % 6 == 5:
                ends.append(average)
        for found, expected in zip(noted.ends, ends, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics(model), average, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_goes_on_from_those_of_the_weights():
    ends = []
    for callbacks in ([], [AverageForEvaluation()]):
        model, x, y = model_and_data(RMSprop("auto"))
        noted = Noted()
        model.fit(
            *(x, y),
            batch_size=8,
            epochs=3,
            verbose=0,
            validation_data=(x, y),
            callbacks=[noted, *callbacks],
        )
        ends.append(noted.after)
    np.testing.assert_array_equal(*ends)


def test_computed_again_they_are_means_over_batches():
    model, x, _ = model_and_data(RMSprop("auto"))
    before = [array(v) for v in model.trainable_variables]
    seeds = [array(v) for v in model.non_trainable_variables if "seed" in v.path]
    norm = model.get_layer("norm")
    recompute_batch_norm(model, [(x[:16], None), (x[16:32], None), x[32:]], 2)
    kernel, bias = (array(w) for w in model.layers[0].weights)
    parts = [x[:16] @ kernel + bias, x[16:32] @ kernel + bias]
    expected = (
        np.mean([part.mean(0) for part in parts], 0),
        np.mean([part.var(0) for part in parts], 0),
    )
    np.testing.assert_allclose(statistics(model), expected, rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.99
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)
    after = [array(v) for v in model.non_trainable_variables if "seed" in v.path]
    np.testing.assert_array_equal(after, seeds)


def test_an_array_is_cut_into_batches():
    model, x, _ = model_and_data(RMSprop("auto"))
    recompute_batch_norm(model, x, None)
    of_array = statistics(model)
    recompute_batch_norm(model, [x[:32], x[32:]], None)
    np.testing.assert_array_equal(of_array, statistics(model))


def test_what_cannot_be_is_refused():
    model, x, _ = model_and_data(RMSprop("auto"))
    with pytest.raises(ValueError, match="`batches` must be an integer >= 1"):
        recompute_batch_norm(model, x, 0)
    with pytest.raises(ValueError, match="at least one batch"):
        recompute_batch_norm(model, [])
    assert model.get_layer("norm").momentum == 0.99


def test_frozen_layers_keep_theirs_and_others_need_none():
    model, x, _ = model_and_data(RMSprop("auto"))
    model.get_layer("norm").trainable = False
    before = statistics(model)
    recompute_batch_norm(model, x)
    np.testing.assert_array_equal(statistics(model), before)
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
    recompute_batch_norm(plain, x)


def test_of_a_frozen_layer_not_even_the_last_digit_changes():
    model, x, y = model_and_data(RMSprop("auto"))
    norm = model.get_layer("norm")
    norm.moving_mean.assign([0.1, 0.2, 0.3, 0.7])
    norm.moving_variance.assign([1.1, 0.9, 0.33, 0.77])
    norm.trainable = False
    model.compile(RMSprop("auto"), "mse", jit_compile=JIT)
    before = statistics(model)
    callbacks = [AverageForEvaluation()]
    model.fit(x, y, batch_size=4, epochs=5, verbose=0, callbacks=callbacks)
    np.testing.assert_array_equal(statistics(model), before)


def test_after_an_error_the_rest_of_the_model_is_as_it_was():
    model, x, _ = model_and_data(RMSprop("auto"))
    seeds = [array(v) for v in model.non_trainable_variables if "seed" in v.path]
    with pytest.raises(ValueError, match="incompatible"):
        recompute_batch_norm(model, [x[:16], x[:, :2]])
    assert model.get_layer("norm").momentum == 0.99
    after = [array(v) for v in model.non_trainable_variables if "seed" in v.path]
    np.testing.assert_array_equal(after, seeds)


def test_a_dictionary_of_arrays_is_cut_into_batches_too():
    model, x, _ = model_and_data(RMSprop("auto"))
    recompute_batch_norm(model, x)
    of_array = statistics(model)
    given = keras.Input((5,), name="x")
    named = keras.Model({"x": given}, model(given))
    recompute_batch_norm(named, {"x": x})
    np.testing.assert_array_equal(statistics(model), of_array)


class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.one_in(5)
@pytest.mark.parametrize("place", [0, 1], ids=["before", "after"])
def test_a_restored_run_goes_on_from_the_restored_statistics(tmp_path, place):
    def model():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((2,)), *layers])
        optimizer = RMSprop(0.1, use_ema=True, ema_momentum=0.5)
        model.compile(optimizer, "mse")
        return model

    def fit(model, callbacks):
        x = np.random.default_rng(0).normal(size=(8, 2)) + 3
        given = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0}
        model.fit(x, np.ones((8, 1)), callbacks=callbacks, **given)

    def backup():
        return keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

    with pytest.raises(KeyboardInterrupt):
        fit(model(), [backup(), AverageForEvaluation(), Kill()])
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(resumed.get_weights())
    )
    callbacks = [backup(), watch]
    callbacks.insert(place, AverageForEvaluation())
    resumed = model()
    fit(resumed, callbacks)
    index = [v.path.endswith("moving_mean") for v in resumed.weights].index(True)
    # Of the last epoch: restored, then after one batch; after two: from the data.
    first, second = (np.asarray(w[index], "float64") for w in seen)
    x = np.random.default_rng(0).normal(size=(8, 2)) + 3
    third = 0.5 * second + 0.5 * x[4:].mean(0)
    expected = 0.25 * first + 0.25 * second + 0.5 * third
    np.testing.assert_allclose(resumed.get_weights()[index], expected, rtol=1e-5)


# At the end of `fit` alone.


def fitted(data="arrays", model=None, epochs=20, **given):
    """Return a model after `fit` with batches of 8, and its inputs."""
    made, x, y = model_and_data(RMSprop("auto"))
    model = model or made
    keras.utils.set_random_seed(1)
    batches = [(x[i::6], y[i::6]) for i in range(6)]
    if data == "arrays":
        model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, **given)
    elif data == "generator":
        batches = (batch for batch in itertools.cycle(batches))
        model.fit(batches, steps_per_epoch=6, epochs=epochs, verbose=0, **given)
    else:
        model.fit(Batches(batches, data), epochs=epochs, verbose=0, **given)
    return model, x


class Batches(keras.utils.PyDataset):
    """Batches, which may fail once they were read so often."""

    def __init__(self, batches, lasts):
        super().__init__()
        self.batches, self.left = batches, lasts

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError("gone")
        return self.batches[i]


def of_averages(model, x, count):
    """Return the statistics of the first batches with the weights of now."""
    kernel, bias = (array(w) for w in model.layers[0].weights)
    parts = [x[i::6] @ kernel + bias for i in range(count)]
    return np.mean([p.mean(0) for p in parts], 0), np.mean([p.var(0) for p in parts], 0)


def moving(**options):
    """Return what `fit` leaves where it computes nothing: the moving statistics."""
    noted = Noted()
    model, x = fitted(callbacks=[noted], **options)
    return model, x, noted.ends[-1]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("data", ["arrays", 1000])
def test_fit_ends_with_statistics_of_the_averages(data):
    model, x = fitted(data)
    expected = of_averages(model, x, 6)
    np.testing.assert_allclose(statistics(model), expected, rtol=1e-4, atol=1e-5)
    # And the same again: it is not chance.
    again, _ = fitted(data)
    np.testing.assert_array_equal(statistics(again), statistics(model))


@pytest.mark.slow
def test_nothing_else_changes():
    """The weights, and what a second `fit` makes of them, are as with the callback."""
    found = []
    for callbacks in ([], [AverageForEvaluation()]):
        model, _ = fitted(callbacks=callbacks)
        fitted(model=model, callbacks=callbacks, epochs=2)
        state = [*model.trainable_variables, *model.optimizer.variables]
        found.append([array(v) for v in state])
    for mine, other in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, other)


class Own(keras.Sequential):
    def train_step(self, *given):
        return super().train_step(*given)


def test_statistics_stay_after_few_steps():
    model, _, last = moving(epochs=16)  # 96 steps
    np.testing.assert_array_equal(statistics(model), last)


@pytest.mark.slow
def test_statistics_stay_without_auto():
    other, *_ = model_and_data(RMSprop(0.001, use_ema=True, ema_warmup=True))
    model, _, last = moving(model=other)
    np.testing.assert_array_equal(statistics(model), last)


@pytest.mark.slow
def test_statistics_of_a_frozen_layer_stay():
    frozen, *_ = model_and_data(RMSprop("auto"))
    frozen.get_layer("norm").trainable = False
    frozen.compile(RMSprop("auto"), "mse", jit_compile=JIT)
    model, _, last = moving(model=frozen)
    np.testing.assert_array_equal(statistics(model), last)


def is_told(recwarn, why):
    # `pytest.warns` would show all that others warn of, too.
    told = [str(w.message) for w in recwarn.list if "statistics" in str(w.message)]
    return len(told) == 1 and why in told[0] and "AverageForEvaluation" in told[0]


@pytest.mark.slow
def test_data_that_is_read_once_is_told_of(recwarn):
    model, _, last = moving(data="generator")
    assert is_told(recwarn, "read only once")
    np.testing.assert_array_equal(statistics(model), last)


@pytest.mark.slow
def test_a_step_of_ones_own_is_told_of(recwarn):
    own = Own([keras.Input((5,)), *model_and_data(RMSprop("auto"))[0].layers])
    own.compile(RMSprop("auto"), "mse", jit_compile=JIT)
    model, _, last = moving(model=own)
    assert is_told(recwarn, "train_step")
    np.testing.assert_array_equal(statistics(model), last)


@pytest.mark.slow
def test_data_that_fails_when_read_again_spoils_nothing(recwarn):
    noted = Noted()
    model, _ = fitted(6 * 20 + 2, callbacks=[noted])
    assert is_told(recwarn, "gone")
    np.testing.assert_array_equal(statistics(model), noted.ends[-1])


def fit(model, x, y):
    """Train in a loop of the user's own, that is named as that of Keras."""
    for _ in range(120):
        model.train_on_batch(x, y)
    model.optimizer.finalize_variable_values(model.trainable_variables)


class Trainer:
    """Has such a method."""

    fit = staticmethod(fit)


class OwnLoop(keras.Sequential):
    """Has it in place of that of Keras."""

    fit = fit


@pytest.mark.parametrize("way", ["function", "method", "model"])
def test_a_loop_named_fit_ends_like_any_other(way):
    model, x, y = model_and_data(RMSprop("auto"))
    if way == "model":
        optimizer, model = model.optimizer, OwnLoop(model.layers)
        model.compile(optimizer, "mse", jit_compile=JIT)
        model.fit(x, y)
    else:
        (fit if way == "function" else Trainer().fit)(model, x, y)
    averages = model.optimizer._weight_averages
    for weight, average in zip(model.trainable_variables, averages, strict=True):
        np.testing.assert_array_equal(array(weight), array(average))
