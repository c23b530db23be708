"""`fit` with `AverageForEvaluation`, on any backend; called by test_callbacks.py.

    python averaging_run.py [mirrored]

The oracle is the same run without the callback: the weights that it had, and the
averages that its optimizer had, at the end of each epoch and after each batch.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from keras_rmsprop import RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation

OPTIONS = {"learning_rate": 0.1, "use_ema": True, "ema_momentum": 0.8}


def model_on(optimizer, scope=contextlib.nullcontext, jit_compile=False):
    keras.utils.set_random_seed(0)
    with scope():
        layers = [keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((2,)), *layers])
        model.compile(optimizer(), "mse", jit_compile=jit_compile)
    return model


def fit(model, callbacks=(), **options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 2)), rng.normal(size=(24, 1))
    given = {"validation_data": (x[:8] + 1, y[:8]), "epochs": 3}
    given |= {"batch_size": 8, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, callbacks=[*callbacks], **given).history


def arrays(variables):
    return [np.array(v.numpy()) for v in variables]


def averages(model):
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return arrays(v for v in optimizer.variables if v.path.endswith("average"))


class Watch(keras.callbacks.Callback):
    """Notes what the model has at each moment, as others would see it."""

    def __init__(self, of=lambda model: model.get_weights()):
        super().__init__()
        self.of, self.seen = of, {}

    def note(self, moment):
        self.seen.setdefault(moment, []).append(self.of(self.model))

    def on_epoch_begin(self, epoch, logs=None):
        self.note("epoch begin")

    def on_epoch_end(self, epoch, logs=None):
        self.note("epoch end")

    def on_train_batch_begin(self, batch, logs=None):
        self.note("batch begin")

    def on_train_batch_end(self, batch, logs=None):
        self.note("batch end")

    def on_test_batch_end(self, batch, logs=None):
        self.note("validation")

    def on_train_end(self, logs=None):
        self.note("train end")


def same(got, expected):
    """Compare lists of lists of arrays, to the bit."""
    assert len(got) == len(expected)
    for some, others in zip(got, expected, strict=True):
        for a, b in zip(some, others, strict=True):
            np.testing.assert_array_equal(a, b)


def check(
    optimizer, scope=contextlib.nullcontext, jit_compile=False, places=(1,), **options
):
    """Run with the callback, in places of the list; compare with the plain run."""
    plain, of_averages = Watch(), Watch(averages)
    twin = model_on(optimizer, scope, jit_compile)
    history = fit(twin, [plain, of_averages], **options)
    raw, expected = plain.seen, of_averages.seen
    assert not np.allclose(raw["epoch end"][-1][0], expected["epoch end"][-1][0])
    for place in places:
        model, watches = model_on(optimizer, scope, jit_compile), [Watch(), Watch()]
        callbacks = [*watches]
        callbacks.insert(place, AverageForEvaluation())
        found = fit(model, callbacks, **options)
        assert found["loss"] == history["loss"]
        for watch in watches:
            for moment in ("epoch begin", "batch begin", "batch end"):
                same(watch.seen[moment], raw[moment])
            same(watch.seen["epoch end"], expected["epoch end"])
            same(watch.seen.get("validation", []), expected.get("validation", []))
            same(watch.seen["train end"], raw["train end"])
        if "val_loss" in history:
            assert found["val_loss"] != history["val_loss"]
            judge = model_on(optimizer, scope, jit_compile)
            for n, weights in enumerate(expected["epoch end"]):
                judge.set_weights(weights)
                rng = np.random.default_rng(0)
                x, y = rng.normal(size=(24, 2)), rng.normal(size=(24, 1))
                loss = judge.evaluate(x[:8] + 1, y[:8], batch_size=8, verbose=0)
                np.testing.assert_allclose(found["val_loss"][n], loss, rtol=1e-5)
        same([arrays(model.optimizer.variables)], [arrays(twin.optimizer.variables)])
        fit(model, [AverageForEvaluation()], epochs=1)  # it works a second time
    return expected, raw


def check_files(optimizer, scope=contextlib.nullcontext, jit_compile=False):
    """What is saved and what is restored are averages."""
    plain, of_averages = Watch(), Watch(averages)
    fit(model_on(optimizer, scope, jit_compile), [plain, of_averages])
    expected = of_averages.seen
    with tempfile.TemporaryDirectory() as name:
        folder, stop = Path(name), keras.callbacks.EarlyStopping
        watch = Watch()
        callbacks = [
            keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.keras")),
            keras.callbacks.ModelCheckpoint(
                str(folder / "after.weights.h5"), save_weights_only=True, save_freq=2
            ),
            keras.callbacks.BackupAndRestore(
                str(folder / "backup"), delete_checkpoint=False
            ),
            best := stop("val_loss", mode="max", restore_best_weights=True, patience=9),
            AverageForEvaluation(),
            watch,
        ]
        model = model_on(optimizer, scope, jit_compile)
        fit(model, callbacks)
        for moment in ("epoch begin", "batch begin"):
            same(watch.seen[moment], plain.seen[moment])
        same(watch.seen["batch end"], expected["batch end"])
        same([model.get_weights()], [expected["epoch end"][best.best_epoch]])
        for epoch in (1, 2, 3):
            loaded = keras.models.load_model(folder / f"{epoch}.keras")
            same([loaded.get_weights()], [expected["epoch end"][epoch - 1]])
        loaded.load_weights(folder / "after.weights.h5")
        same([loaded.get_weights()], [expected["batch end"][7]])
        loaded.load_weights(folder / "backup/latest.weights.h5")
        same([loaded.get_weights()], [plain.seen["epoch end"][-1]])


def main(kind=""):
    scope = contextlib.nullcontext
    if kind == "mirrored":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope
    check(lambda: RMSprop(**OPTIONS), scope, places=(0, 2))
    check(lambda: keras.optimizers.RMSprop(**OPTIONS), scope)
    check_files(lambda: RMSprop(**OPTIONS), scope)
    print("right on", keras.backend.backend())


if __name__ == "__main__":
    main(*sys.argv[1:])
