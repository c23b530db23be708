"""Slots in bfloat16: half the memory, without averages that stall."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import WAYS, arrays

from keras_rmsprop import RMSprop
from keras_rmsprop.rounding import Noise


def rounded(x, n):
    """Return each number of x rounded n times, as (n, len(x))."""
    values = Noise(0).round(np.tile(x, (n, 1)), 0, 0)
    return keras.ops.convert_to_numpy(values).astype("float32")


def test_results_are_the_neighbours_and_right_on_average():
    x = np.float32([1.001, -1.001, 3.1416, 1e-30, -7e20, 0.0, 1.0, 255.5])
    values = rounded(x, 40_000)
    one_bit = 2.0 ** (np.floor(np.log2(np.abs(np.where(x == 0, 1, x)))) - 7)
    assert (np.abs(values - x) < one_bit)[:, x != 0].all()
    assert all(len(np.unique(column)) <= 2 for column in values.T)
    # Of 40 000 draws the mean is known to half a bit / 200; this is six times that.
    error = np.abs(values.mean(0, dtype="float64") - x) / one_bit
    assert error[x != 0].max() < 0.015


def test_what_bfloat16_has_stays_as_it_is():
    x = np.float32([0.0, -0.0, 1.0, -2.5, 2.0**-130, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(rounded(x, 9), np.stack([x] * 9))


def test_draws_differ_between_elements_places_and_seeds():
    x = np.full((1000,), 1.001, "float32")
    ups = [
        keras.ops.convert_to_numpy(Noise(seed).round(x, place, 0)) > 1
        for seed, place in [(0, 0), (0, 1), (1, 0)]
    ]
    for up in ups:
        assert 0.05 < up.mean() < 0.45  # 1.001 is 0.128 of the way up
    assert all(
        (a != b).any()
        for a, b in [(0, 1), (0, 2), (1, 2)]
        for a, b in [(ups[a], ups[b])]
    )


@pytest.mark.parametrize("way", WAYS)
def test_v_does_not_stall(way):
    # In plain bfloat16 v stops at 0.5: there 0.999 * v + 0.001 rounds to v.
    variable = keras.Variable(np.zeros((400,), "float32"))
    optimizer = RMSprop(rho=0.999, slot_dtype="bfloat16")
    optimizer.build([variable])
    apply, gradient = WAYS[way](optimizer), tf.ones((400,))
    for _ in range(2000):
        apply([gradient])
    v = optimizer.get_state().slots[0].velocity.astype("float64")
    expected = 1 - 0.999**2000
    np.testing.assert_allclose(v.mean(), expected, rtol=0.01)
    np.testing.assert_allclose(v, expected, rtol=0.03)


def run(seed, steps=5, optimizer=None):
    keras.utils.set_random_seed(seed)
    variable = keras.Variable(arrays([(50,)])[0])
    optimizer = RMSprop(
        0.1, momentum=0.9, centered=True, epsilon=1e-2, slot_dtype="bfloat16"
    )
    optimizer.build([variable])
    for t in range(steps):
        optimizer.apply([tf.constant(arrays([(50,)], seed=t)[0])])
    return variable, optimizer


def test_is_reproducible_under_set_random_seed():
    (a, _), (b, _), (c, _) = run(0), run(0), run(1)
    np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert (a.numpy() != c.numpy()).any()


def test_all_slots_have_half_the_bytes():
    _, optimizer = run(0)
    slots = [s for s in optimizer.variables if s.shape == (50,)]
    assert [s.dtype for s in slots] == ["bfloat16"] * 3


def test_resumes_to_the_same_bits():
    store = {}
    variable, optimizer = run(0, steps=3)
    optimizer.save_own_variables(store)
    keras.utils.set_random_seed(7)
    other = RMSprop.from_config(optimizer.get_config())
    twin = keras.Variable(variable.numpy())
    other.build([twin])
    other.load_own_variables(store)
    for t in (3, 4):
        other.apply([tf.constant(arrays([(50,)], seed=t)[0])])
    np.testing.assert_array_equal(twin.numpy(), run(0)[0].numpy())


def test_steps_stay_close_to_float32():
    variable, _ = run(0, steps=20)
    keras.utils.set_random_seed(0)
    twin = keras.Variable(arrays([(50,)])[0])
    optimizer = RMSprop(0.1, momentum=0.9, centered=True, epsilon=1e-2)
    for t in range(20):
        optimizer.apply([tf.constant(arrays([(50,)], seed=t)[0])], [twin])
    np.testing.assert_allclose(variable.numpy(), twin.numpy(), atol=0.05)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_sparse_rows(jit_compile):
    # v of 200 elements, touched every second step: the same averages in expectation.
    table = keras.Variable(np.zeros((2, 200), "float32"))
    optimizer = RMSprop(0.0, rho=0.99, slot_dtype="bfloat16")
    optimizer.build([table])
    apply = tf.function(optimizer.apply, jit_compile=jit_compile)
    for t in range(200):
        apply([tf.IndexedSlices(tf.ones((1, 200)), tf.constant([t % 2]))])
    expected = 0.0
    for t in range(200):
        expected = 0.99 * expected + 0.01 * (t % 2)
    v = optimizer.get_state().slots[0].velocity.astype("float64")
    np.testing.assert_allclose(v[1].mean(), expected, rtol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "int8", "half", 3])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="`slot_dtype` must be None, "):
        RMSprop(slot_dtype=dtype)


def test_dtypes_may_be_objects():
    assert RMSprop(slot_dtype=tf.bfloat16).slot_dtype == "bfloat16"
    optimizer = RMSprop(slot_dtype="float64")
    optimizer.build([keras.Variable([1.0])])
    optimizer.apply([tf.constant([2.0])])
    assert optimizer.get_state().slots[0].velocity.dtype == "float64"
