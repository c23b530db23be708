"""Copies of callbacks and optimizers behave as the original, whenever they are made."""

import copy
import pickle

import cloudpickle
import keras
import numpy as np
import pytest
from small_models import assert_same_bits, dense_model, numbers

from keras_rmsprop import AutoLearningRate, RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation, LearningRateFinder, Monitor

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "cloudpickle": lambda x: cloudpickle.loads(cloudpickle.dumps(x)),
}
CALLBACKS = {
    "average": AverageForEvaluation,
    "monitor": lambda: Monitor(every=1, show=False),
    "finder": lambda: LearningRateFinder(1e-4, 1e-2, steps=20),
}


class Saves(keras.callbacks.Callback):
    """Sees what a `ModelCheckpoint(save_freq=1)` would save."""

    save_freq = 1

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.model.get_weights()[0])


class Copies(keras.callbacks.Callback):
    """Copies another callback in the middle of an epoch, and at its end."""

    def __init__(self, other, how):
        super().__init__()
        self.other, self.how, self.made = other, how, []

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            self.made.append(self.how(self.other))

    def on_epoch_end(self, epoch, logs=None):
        self.made.append(self.how(self.other))


def seen_in_fit(*callbacks):
    """Return what is saved, what the callbacks found, and the model, after `fit`."""
    model = dense_model(RMSprop(0.05, use_ema=True, ema_momentum=0.9))
    x, y = numbers(model, 64)
    saves = Saves()
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[*callbacks, saves])
    found = [*saves.seen]
    for one in callbacks:
        found += [getattr(one, "losses", []), getattr(one, "suggestion", None) or 0]
        # The first look is at the first step of this `fit`.
        found += [reading[2:] for reading in getattr(one, "readings", [])]
    return found, model


def assert_same(found, expected):
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.one_in(24)
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_a_copied_callback_does_what_the_original_does(make, how):
    expected, twin = seen_in_fit(make())
    original = make()
    before, copies = how(original), Copies(original, how)
    seen_in_fit(original, copies)
    for one in [before, copies.made[0], copies.made[1], how(original)]:
        if isinstance(one, Monitor):  # its results are copied, too
            one.readings = []
        found, model = seen_in_fit(one)
        assert_same(found, expected)
        assert_same_bits(model, twin)


@pytest.mark.rest
@pytest.mark.slow
def test_a_copy_has_results_of_its_own():
    original = Monitor(every=1, show=False)
    seen_in_fit(original)
    count = len(original.readings)
    for how in COPIES.values():
        other = how(original)
        assert other.readings == original.readings
        assert other.model is None
        seen_in_fit(other)
        assert len(original.readings) == count < len(other.readings)
    with pytest.raises(ValueError, match="needs a model"):
        copy.copy(AverageForEvaluation()).put_back()


@pytest.mark.slow
@pytest.mark.one_in(9)
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "rate",
    [
        0.01,
        "auto",
        AutoLearningRate(
            growth=2.0, factor=keras.optimizers.schedules.CosineDecay(1.0, 9)
        ),
    ],
    ids=["number", "auto", "schedule"],
)
def test_a_copied_optimizer_goes_on_as_the_original(rate, how):
    model = dense_model(RMSprop(rate, momentum=0.9, use_ema=True))
    x, y = numbers(model, 32)
    assert how(model.optimizer).get_config() == model.optimizer.get_config()
    for _ in range(5):
        model.train_on_batch(x, y)
    optimizer = how(model.optimizer)
    other = dense_model(optimizer)
    other.set_weights(model.get_weights())
    for _ in range(5):
        model.train_on_batch(x, y)
        other.train_on_batch(x, y)
    assert_same_bits(other, model)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copied_way_to_look_is_equal(how):
    auto = AutoLearningRate(1e-6, 0.5, 1.1, 2, factor=0.5, restarts=False)
    assert how(auto).get_config() == auto.get_config()
    assert " at 0x" not in repr(auto)


def test_messages_show_no_addresses():
    for make in CALLBACKS.values():
        model = dense_model(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1.0, 9))
        )
        with pytest.raises(ValueError, match="Received: ") as caught:
            model.fit(*numbers(model), verbose=0, callbacks=[make()])
        assert " at 0x" not in str(caught.value)
