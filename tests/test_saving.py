"""Hyperparameters and slots survive every way to save them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import python

from keras_rmsprop import RMSprop

OPTIONS = {"learning_rate": 0.02, "rho": 0.8, "momentum": 0.5, "centered": True}


def trained(optimizer, steps=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
    model.compile(optimizer, loss="mse")
    if steps:
        model.fit(*data(), epochs=steps, verbose=0)
    else:
        optimizer.build(model.trainable_variables)
    return model


def data():
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    return x, x[:, :2]


def state(model):
    return [v.numpy() for v in model.variables + model.optimizer.variables]


def assert_same_state(model, expected):
    for got, want in zip(state(model), state(expected), strict=True):
        np.testing.assert_array_equal(got, want)


def hyperparameters(optimizer):
    shared = set(keras.optimizers.RMSprop().get_config()) - {"name"}
    return {k: v for k, v in optimizer.get_config().items() if k in shared}


def test_config_round_trip():
    optimizer = RMSprop(**OPTIONS, epsilon=1e-3, clipnorm=2.0, jit_compile=False)
    config = optimizer.get_config()
    assert RMSprop.from_config(config).get_config() == config
    serialized = keras.optimizers.serialize(optimizer)
    assert serialized["registered_name"] == "keras_rmsprop>RMSprop"
    copy = keras.optimizers.deserialize(serialized)
    assert type(copy) is RMSprop
    assert copy.get_config() == config


def test_config_round_trip_with_a_schedule():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(RMSprop(schedule)))
    assert copy.learning_rate.numpy() == np.float32(0.1)


def test_keras_file(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.optimizer) is RMSprop
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_same_state(loaded, model)
    model.fit(*data(), verbose=0)
    loaded.fit(*data(), verbose=0)
    assert_same_state(loaded, model)


def test_keras_file_in_a_fresh_process(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    model.save(tmp_path / "m.keras")
    out = python(f"""
        import keras, keras_rmsprop
        model = keras.models.load_model({str(tmp_path / "m.keras")!r})
        print(type(model.optimizer) is keras_rmsprop.RMSprop)
        print(float(sum(abs(v.numpy()).sum() for v in model.optimizer.variables)))
    """).split()
    assert out[0] == "True"
    total = sum(np.abs(v.numpy()).sum() for v in model.optimizer.variables)
    assert float(out[1]) == pytest.approx(float(total), rel=1e-6)


def test_weights_file(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    model.save_weights(tmp_path / "m.weights.h5")
    other = trained(RMSprop(**OPTIONS), steps=1)
    other.load_weights(tmp_path / "m.weights.h5")
    for got, want in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (RMSprop, RMSprop),
        (RMSprop, keras.optimizers.RMSprop),
        (keras.optimizers.RMSprop, RMSprop),
    ],
    ids=["own", "to the built-in", "from the built-in"],
)
class TestStateMoves:
    def test_in_a_keras_file(self, tmp_path, source, target):
        model = trained(source(**OPTIONS))
        model.save(tmp_path / "m.keras")
        other = trained(target(**OPTIONS), steps=0)
        other.load_weights(tmp_path / "m.keras")
        assert_same_state(other, model)

    @pytest.mark.parametrize("steps", [0, 1], ids=["built", "trained"])
    def test_in_a_checkpoint(self, tmp_path, source, target, steps):
        model = trained(source(**OPTIONS))
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
            str(tmp_path / "ckpt")
        )
        other = trained(target(**OPTIONS), steps=steps)
        checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
        checkpoint.restore(path).assert_existing_objects_matched()
        assert_same_state(other, model)
        assert other.optimizer.iterations.numpy() == 3

    def test_as_a_loaded_model_compiled_anew(self, tmp_path, source, target):
        model = trained(source(**OPTIONS))
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        optimizer = target(**OPTIONS)
        optimizer.build(loaded.trainable_variables)
        optimizer.set_weights([v.numpy() for v in loaded.optimizer.variables])
        loaded.compile(optimizer, loss="mse")
        assert_same_state(loaded, model)
        assert hyperparameters(optimizer) == hyperparameters(model.optimizer)


def test_checkpoint_restored_before_the_slots_exist(tmp_path):
    model = trained(RMSprop(**OPTIONS))
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(str(tmp_path / "ckpt"))
    optimizer = RMSprop(**OPTIONS)
    tf.train.Checkpoint(optimizer=optimizer).restore(path)
    optimizer.build(model.trainable_variables)
    for got, want in zip(optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_traced_programs_are_no_part_of_a_checkpoint(tmp_path):
    variable = keras.Variable([1.0])
    optimizer = RMSprop()
    optimizer.apply([tf.constant([1.0])], [variable])
    names = [
        n
        for n, _ in tf.train.list_variables(
            tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "ckpt"))
        )
    ]
    assert not [n for n in names if "program" in n]
