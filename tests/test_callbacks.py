"""With `AverageForEvaluation` all but training sees the averages of the weights."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from averaging_run import OPTIONS, Watch, averages, check, check_files, fit, model_on
from averaging_run import same as assert_same
from small_models import no_fit_of_other_layers

import keras_rmsprop
from keras_rmsprop import RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation

PROGRAM = Path(__file__).parent / "averaging_run.py"


def ours(**options):
    return RMSprop(**OPTIONS | options)


@pytest.mark.slow
def test_validation_and_callbacks_see_averages_wherever_it_stands():
    check(ours, places=(0, 1, 2))


@pytest.mark.one_in(7)
@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.RMSprop(**OPTIONS),
        lambda: keras.optimizers.Adam(**OPTIONS),
        lambda: keras.optimizers.LossScaleOptimizer(ours(), initial_scale=4.0),
        lambda: ours(ema_warmup=True, gradient_accumulation_steps=2),
        lambda: ours(ema_overwrite_frequency=4),
    ],
    ids=["built-in", "Adam", "loss scale", "accumulation", "overwritten"],
)
def test_other_optimizers_and_options(optimizer):
    check(optimizer)


@pytest.mark.rest
@pytest.mark.slow
def test_with_xla_and_without_validation():
    check(ours, jit_compile=True)
    check(ours, validation_data=None)


@pytest.mark.slow
def test_files_and_early_stopping():
    check_files(ours)


@pytest.mark.rest
@pytest.mark.tensorflow("a start: the others need not be started again")
@pytest.mark.parametrize(
    "arguments",
    [
        "jax",
        "torch",
        "tensorflow mirrored",
    ],
)
def test_other_backends_and_distribution(arguments):
    backend, *kind = arguments.split()
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *kind],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": backend},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(f"right on {backend}")


@pytest.mark.slow
def test_evaluate_and_predict_outside_fit():
    model = model_on(ours)
    x, y = np.ones((4, 2)), np.zeros((4, 1))
    callback = AverageForEvaluation()
    start = model.evaluate(x, y, verbose=0)
    # Without a step there are no averages.
    assert model.evaluate(x, y, verbose=0, callbacks=[callback]) == start
    for _ in range(3):
        model.train_on_batch(x, y)
    raw, of_raw = model.get_weights(), model.evaluate(x, y, verbose=0)
    judge = model_on(ours)
    judge.set_weights(averages(model))
    expected = judge.evaluate(x, y, verbose=0)
    assert expected != of_raw
    assert model.evaluate(x, y, verbose=0, callbacks=[callback]) == expected
    assert_same([model.get_weights()], [raw])
    np.testing.assert_array_equal(
        model.predict(x, verbose=0, callbacks=[callback]), judge.predict(x, verbose=0)
    )
    assert_same([model.get_weights()], [raw])


@pytest.mark.parametrize(
    "optimizer",
    [RMSprop(), keras.optimizers.LossScaleOptimizer(RMSprop()), None],
    ids=["ours", "loss scale", "none"],
)
def test_an_optimizer_without_averages_is_refused(optimizer):
    model = model_on(lambda: optimizer or "sgd")
    for run in (
        fit,
        lambda m, c: m.evaluate(np.ones((1, 2)), np.ones((1, 1)), callbacks=c),
    ):
        with pytest.raises(ValueError, match="needs an optimizer with `use_ema=True`"):
            run(model, [AverageForEvaluation()])


class Interrupt(keras.callbacks.Callback):
    def on_test_begin(self, logs=None):
        raise KeyboardInterrupt


def interrupted():
    """Return a model whose training was interrupted, and the weights it had."""
    watch, model = Watch(), model_on(ours)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [watch, Interrupt(), AverageForEvaluation()])
    assert_same([model.get_weights()], [averages(model)])
    return model, watch.seen["batch end"][-1]


def test_after_an_interruption_training_goes_on_from_the_weights():
    model, raw = interrupted()
    assert not np.array_equal(model.get_weights()[0], raw[0])
    watch = Watch()
    fit(model, [AverageForEvaluation(), watch])
    assert_same(watch.seen["epoch begin"][:1], [raw])


def test_after_an_interruption_the_weights_are_put_back():
    model, raw = interrupted()
    callback = AverageForEvaluation()
    callback.set_model(model)
    for _ in range(2):
        callback.put_back()
        assert_same([model.get_weights()], [raw])


@pytest.mark.slow
def test_after_an_interruption_other_weights_are_left_alone():
    model, _ = interrupted()
    other = [w + 1 for w in model.get_weights()]
    model.set_weights(other)
    watch, x = Watch(), np.ones((4, 2))
    fit(model, [AverageForEvaluation(), watch], epochs=1)
    assert_same(watch.seen["epoch begin"], [other])
    model, _ = interrupted()
    model.set_weights(other)
    model.evaluate(x, x[:, :1], verbose=0, callbacks=[AverageForEvaluation()])
    assert_same([model.get_weights()], [other])


@pytest.mark.slow
def test_evaluation_within_evaluation():
    class Nested(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            x = np.ones((4, 2))
            same = [outer, AverageForEvaluation()][epoch % 2]
            self.model.evaluate(x, x[:, :1], verbose=0, callbacks=[same])
            assert_same([self.model.get_weights()], [averages(self.model)])

    outer, plain, watch = AverageForEvaluation(), Watch(), Watch()
    fit(model_on(ours), [plain])
    fit(model_on(ours), [Nested(), watch, outer])
    assert_same(watch.seen["epoch begin"], plain.seen["epoch begin"])


@no_fit_of_other_layers
def test_a_frozen_layer_stays():
    model = model_on(ours)
    fit(model, epochs=1)
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse")
    frozen, watch = model.layers[0].get_weights(), Watch()
    fit(model, [AverageForEvaluation(), watch])
    for weights in watch.seen["epoch end"] + watch.seen["validation"]:
        assert_same([weights[:2]], [frozen])


def test_it_is_where_it_is_looked_for():
    assert keras_rmsprop.callbacks.AverageForEvaluation is AverageForEvaluation
