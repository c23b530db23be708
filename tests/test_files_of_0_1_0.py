"""Files that version 0.1.0 wrote load, and runs go on from them to the same bits.

The files and the programs that made them are in `files_0_1_0`. All is op by op, so that
bits do not depend on what XLA or the CPU fuses; one test goes on compiled.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from files_0_1_0 import make

pytestmark = pytest.mark.tensorflow("files of a version for TensorFlow, to the bit")


def compare(model, name, compare_arrays=np.testing.assert_array_equal):
    expected = dict(np.load(make.FOLDER / f"{name}.npz"))
    # Read last, as reading may bring the averages of silent rows up to date.
    found = make.everything(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        compare_arrays(found[key], value, err_msg=key)


def unbuilt(name):
    return make.compiled_model(name)


def built(name):
    model = make.compiled_model(name)
    model.optimizer.build(model.trainable_variables)
    return model


def with_a_past(name):
    """Return a model that took all the steps, with other weights."""
    model = make.compiled_model(name)
    make.take_first_steps(name, model)
    make.take_last_steps(name, model)
    return model


MODELS = [unbuilt, built, with_a_past]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("file", ["weights.h5", "keras"])
@pytest.mark.parametrize("fresh_model", MODELS)
@pytest.mark.parametrize("name", make.RUNS)
def test_weights_are_loaded(name, fresh_model, file):
    model = fresh_model(name)
    model.load_weights(make.FOLDER / f"{name}.{file}")
    make.take_last_steps(name, model)
    compare(model, name)


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15),
    reason="Keras 3.15 wrote the models: an older one does not know all of it",
)
@pytest.mark.parametrize("name", make.RUNS)
def test_a_model_is_loaded(name):
    model = keras.models.load_model(make.FOLDER / f"{name}.keras")
    make.take_last_steps(name, model)
    compare(model, name)


# In a checkpoint TensorFlow matches by position, and where layers were unfrozen 0.1.0
# had them in another order.
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in make.RUNS if name != "unfrozen"])
@pytest.mark.parametrize("fresh_model", MODELS)
def test_a_checkpoint_is_restored(name, fresh_model):
    model = fresh_model(name)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(make.FOLDER / f"{name}.checkpoint"))
    make.take_last_steps(name, model)
    compare(model, name)


@pytest.mark.parametrize("name", ["dense", "moments"])
def test_the_run_goes_on_compiled(name):
    model = make.compiled_model(name)
    model.optimizer.jit_compile = True
    model.load_weights(make.FOLDER / f"{name}.weights.h5")
    make.take_last_steps(name, model)

    def close(found, expected, err_msg):
        np.testing.assert_allclose(found, expected, 1e-5, 1e-6, err_msg=err_msg)

    compare(model, name, close)
