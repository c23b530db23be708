"""Whichever way the state leaves and comes in, it is all there.

Of a table with rows that had no gradient for a while the averages must have decayed.
The oracle is the built-in with the same gradients as dense ones.
"""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    ROWS,
    assert_same_bits,
    gradient,
    save,
    table_model,
    take_steps,
    user_warnings,
)
from stepping import BACKEND, WAYS

from keras_rmsprop import RMSprop
from keras_rmsprop.rule import Slots
from keras_rmsprop.state import State

BUILT_IN = keras.optimizers.RMSprop


def arrays(model):
    return [v.numpy() for v in model.optimizer.variables]


def through_set_weights(source, target, _):
    target.set_weights(source.get_weights())
    target.optimizer.set_weights(arrays(source))


def through_a_state_tree(source, target, _):
    target.set_state_tree(source.get_state_tree(value_format="numpy_array"))


def through_a_keras_file(source, target, folder):
    save(source, folder / "m.keras")
    target.load_weights(folder / "m.keras")


def through_a_weights_file(source, target, folder):
    save(source, folder / "m.weights.h5")
    target.load_weights(folder / "m.weights.h5")


def through_a_checkpoint(source, target, folder):
    if BACKEND != "tensorflow":
        pytest.skip("only on TensorFlow: `tf.train.Checkpoint`")

    def checkpoint(model):
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    path = checkpoint(source).save(str(folder / "checkpoint"))
    checkpoint(target).restore(path).assert_existing_objects_matched()


def through_orbax(source, target, folder):
    pytest.importorskip("orbax.checkpoint")
    callback = keras.callbacks.OrbaxCheckpoint(str(folder / "orbax"), save_freq=1)
    callback.set_model(source)
    callback.on_train_begin()
    callback.on_train_batch_end(0)
    callback.on_train_end()
    target.load_weights(str(folder / "orbax"))


DOORS = (
    through_set_weights,
    through_a_state_tree,
    through_a_keras_file,
    through_a_weights_file,
    through_a_checkpoint,
    through_orbax,
)


def named(**options):
    """Return an optimizer whose variables have the same paths in each model."""
    return RMSprop(0.02, **options, name="optimizer")


def scaled():
    return keras.optimizers.LossScaleOptimizer(
        named(), initial_scale=4.0, name="loss_scale"
    )


OPTIMIZERS = {
    "defaults": named,
    "centered": lambda: named(centered=True),
    "lazy momentum": lambda: named(momentum=0.5, sparse_update="lazy"),
    "averages": lambda: named(use_ema=True, ema_warmup=True),
    "bfloat16 slots": lambda: named(slot_dtype="bfloat16"),
    "sums": lambda: named(gradient_accumulation_steps=3),
    "loss scale": scaled,
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("past", [False, True], ids=["into new", "into used"])
@pytest.mark.parametrize(
    ("name", "door"),
    [
        *(("defaults", door) for door in DOORS),
        *((name, through_a_state_tree) for name in OPTIMIZERS if name != "defaults"),
        ("bfloat16 slots", through_a_weights_file),
        ("lazy momentum", through_a_checkpoint),
        *(("averages", door) for door in DOORS if door is not through_a_state_tree),
        *(("sums", door) for door in DOORS if door is not through_a_state_tree),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_the_run_goes_on_to_the_same_bits(tmp_path, name, door, past):
    if name == "loss scale" and BACKEND == "jax":
        pytest.skip("Keras' LossScaleOptimizer takes no eager steps on JAX")
    model, other = (table_model(OPTIMIZERS[name]()) for _ in range(2))
    for each in (model, other):
        # The first step would do it, but Keras' wrapper then makes other paths.
        each.optimizer.build(each.trainable_variables)
    take_steps(model, range(5))
    if past:
        take_steps(other, range(20, 24))
    door(model, other, tmp_path)
    take_steps(model, range(5, 8))
    take_steps(other, range(5, 8))
    assert_same_bits(other, model)


def test_a_pickled_model_goes_on_to_the_same_bits():
    model = table_model(named())
    take_steps(model, range(5))
    other = pickle.loads(pickle.dumps(model))
    take_steps(model, range(5, 8))
    take_steps(other, range(5, 8))
    assert_same_bits(other, model)


OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"centered": True, "epsilon": 0.1}, {"use_ema": True, "ema_momentum": 0.9}],
    ids=["defaults", "centered", "averages"],
)


def built_in(**options):
    return BUILT_IN(0.02, **options, name="optimizer")


def built_in_with_dense_gradients(steps, **options):
    """Return a model that the built-in trained, as it should have trained it."""
    model = table_model(built_in(**options))
    take_steps(model, steps, sparse=False)
    return model


def assert_equals(model, expected):
    """Compare weights and state with those of a model that the built-in trained."""
    pairs = zip(
        [*model.variables, *model.optimizer.variables],
        [*expected.variables, *expected.optimizer.variables],
        strict=True,
    )
    for got, want in pairs:
        assert got.path == want.path
        np.testing.assert_allclose(
            got.numpy(), want.numpy(), 1e-5, 1e-7, err_msg=got.path
        )


@pytest.mark.one_in(3)
@OPTIONS
def test_the_variables_are_those_of_the_built_in(options):
    model = table_model(named(**options))
    take_steps(model, range(5))
    assert_equals(model, built_in_with_dense_gradients(range(5), **options))


@pytest.mark.one_in(6)
@OPTIONS
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_the_built_in_takes_over(tmp_path, door, options):
    model = table_model(named(**options))
    take_steps(model, range(5))
    other = table_model(built_in(**options))
    other.optimizer.build(other.trainable_variables)
    with user_warnings() as warned:
        door(model, other, tmp_path)
    assert not warned
    take_steps(other, range(5, 8), sparse=False)
    assert_equals(other, built_in_with_dense_gradients(range(8), **options))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("put_back", [False, True], ids=["read", "read and put back"])
def test_the_state_is_read_after_each_step(way, put_back):
    model = table_model(named())
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.build(variables)
    step = WAYS[way](optimizer)
    expected = table_model(built_in())
    for n in range(6):
        step([gradient(model, v, n) for v in variables])
        take_steps(expected, [n], sparse=False)
        if put_back:
            optimizer.set_weights(arrays(model))
        assert_equals(model, expected)


@pytest.mark.parametrize("options", [{}, {"slot_dtype": "uint8"}], ids=str)
def test_a_state_that_was_given_may_change_later(options):
    def aligned(x):
        # As deep-learning frameworks align memory, which JAX then shares.
        memory = np.empty(x.nbytes + 64, "uint8")
        start = -memory.ctypes.data % 64
        place = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        place[:] = x
        return place

    optimizer = RMSprop(**options)
    optimizer.build([keras.Variable(np.ones(5000, "float32"))])
    given = aligned(np.linspace(0, 1, 5000, dtype="float32"))
    optimizer.set_state(State(3, [Slots(given)]))
    before = optimizer.get_state().slots[0].velocity.copy()
    given[:] = 7
    np.testing.assert_array_equal(optimizer.get_state().slots[0].velocity, before)

    state = optimizer.get_state()  # with the bytes, if there are any
    stored = getattr(state.slots[0].velocity, "stored", None)
    if stored is not None:
        state.slots[0].velocity.stored = aligned(stored)
        optimizer.set_state(state)
        state.slots[0].velocity.stored[:] = 1
        np.testing.assert_array_equal(optimizer.get_state().slots[0].velocity, before)


def test_reading_twice_gives_the_same_bits():
    model = table_model(named())
    take_steps(model, range(5))
    for first, second in zip(arrays(model), arrays(model), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.tensorflow("`tf.function`")
def test_the_variables_are_read_inside_a_function():
    model = table_model(named())
    optimizer, variables = model.optimizer, model.trainable_variables
    take_steps(model, range(3))

    @tf.function
    def step(*gradients):
        optimizer.apply(gradients, variables)
        return tf.add_n([tf.reduce_sum(tf.abs(v)) for v in optimizer.variables[2:]])

    for n in range(3, 6):
        assert np.isfinite(step(*(gradient(model, v, n) for v in variables)).numpy())
    assert_equals(model, built_in_with_dense_gradients(range(6)))


def test_the_state_of_another_run_counts_from_when_it_was_put_in():
    # All rows of what comes in are up to date, however long they were silent here.
    model = table_model(named())
    take_steps(model, range(7))
    v = np.random.default_rng(0).uniform(0.1, 1, (ROWS, 2)).astype("float32")
    state = arrays(model)
    state[2] = v
    model.optimizer.set_weights(state)
    np.testing.assert_array_equal(arrays(model)[2], v)
    np.testing.assert_array_equal(model.optimizer.get_state().slots[0].velocity, v)
