"""Arguments that are taken in several forms, and those that have no effect yet.

What is refused when an optimizer is made is in `test_bad_input.py`.
"""

import copy
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import WAYS, assert_close, tensor

from keras_rmsprop import RMSprop
from keras_rmsprop.state import as_array


@pytest.mark.tensorflow("variables that Keras copies to NumPy without a warning")
def test_reading_a_variable_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("float32", "bfloat16", "int64"):
            variable = keras.Variable([1, 2], dtype=dtype, trainable=False)
            assert as_array(variable).tolist() == [1, 2]
        optimizer = RMSprop()
        optimizer.build([keras.Variable([1.0, 2.0])])
        assert optimizer.get_state().iterations == 0


def test_decay_which_keras_ignores_points_to_the_dialects():
    with pytest.warns(UserWarning, match=r"`decay` .* `keras_rmsprop.dialects`"):
        assert RMSprop(decay=0.9).rho == 0.9


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"gradient_accumulation_steps": np.int64(2)}, 2),
        ({"gradient_accumulation_steps": np.int32(0)}, None),
        ({"use_ema": True, "ema_overwrite_frequency": np.uint8(3)}, 3),
        ({"rho": np.float32(0.5)}, 0.5),
        ({"epsilon": np.array(0.5)}, 0.5),
        ({"weight_decay": tf.bfloat16.as_numpy_dtype(0.5)}, 0.5),
        ({"centered": np.True_}, True),
        ({"slot_dtype": np.dtype("float32")}, "float32"),
        ({"slot_dtype": np.float64}, "float64"),
        ({"slot_dtype": tf.bfloat16.as_numpy_dtype}, "bfloat16"),
        ({"slot_dtype": tf.bfloat16}, "bfloat16"),
    ],
    ids=repr,
)
def test_numbers_and_dtypes_of_numpy(given, want):
    name = [*given][-1]
    got = RMSprop(**given).get_config()[name]
    assert got == want
    assert type(got) is type(want)


IDLE = {"ema_momentum": 0.5, "ema_overwrite_frequency": 3, "ema_warmup": True}


@pytest.mark.parametrize("name", IDLE)
def test_options_of_an_average_that_is_not_there(name):
    with pytest.warns(UserWarning, match=f"`{name}` without `use_ema=True`") as found:
        optimizer = RMSprop(**{name: IDLE[name]})
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        RMSprop(ema_momentum=0.99, ema_overwrite_frequency=None, ema_warmup=False)
        RMSprop(use_ema=True, **{name: IDLE[name]})
        copies = [RMSprop.from_config(optimizer.get_config())]
        keras_config = keras.optimizers.serialize(optimizer)
        copies += [keras.optimizers.deserialize(keras_config), copy.copy(optimizer)]
    assert all(c.get_config() == optimizer.get_config() for c in copies)


LATE = {
    "momentum": 0.9,
    "centered": True,
    "use_ema": True,
    "gradient_accumulation_steps": 2,
    "skip_nonfinite": True,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LATE)
def test_an_option_switched_on_too_late(name, way):
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = RMSprop(0.1)
    optimizer.build([variable])
    before = [v.numpy() for v in [variable, *optimizer.variables]]
    setattr(optimizer, name, LATE[name])
    with pytest.raises(ValueError, match=f"`{name}` must be given when .* is made"):
        WAYS[way](optimizer)([tensor(np.ones(2, "float32"))])
    after = [v.numpy() for v in [variable, *optimizer.variables]]
    assert all(np.array_equal(x, y) for x, y in zip(after, before, strict=True))


def test_momentum_may_be_switched_off_and_on():
    variables = [keras.Variable(np.ones(2, "float32")) for _ in range(2)]
    for optimizer, variable in zip(
        (RMSprop(0.1, momentum=0.5), keras.optimizers.RMSprop(0.1, momentum=0.5)),
        variables,
        strict=True,
    ):
        for momentum in (0.5, 0.0, 0.9):
            optimizer.momentum = momentum
            optimizer.apply([tensor(np.ones(2, "float32"))], [variable])
    assert_close(*([v.numpy()] for v in variables), rtol=1e-6)
