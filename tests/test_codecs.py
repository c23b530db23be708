"""Slots in bfloat16: half the memory, without averages that stall."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import BACKEND, WAYS, arrays, tensor

from keras_rmsprop import RMSprop
from keras_rmsprop.codecs import stochastically


def rounded(x, offset=0, t=0, slot=0):
    values = stochastically(x, offset, t, slot)
    return keras.ops.convert_to_numpy(values).astype("float32")


NUMBERS = np.float32([1.001, -1.001, 3.1416, 1e-30, -7e20, 1.0, 255.5])
ONE_BIT = 2.0 ** (np.floor(np.log2(np.abs(NUMBERS))) - 7)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("over", ["elements", "steps", "offsets"])
def test_results_are_the_neighbours_and_right_on_average(over):
    if over == "elements":
        values = rounded(np.repeat(NUMBERS[:, None], 4096, axis=1)).T
    else:
        ways = {"steps": [{"t": n} for n in range(256)]}
        ways["offsets"] = [{"offset": 256 * n} for n in range(256)]
        values = [rounded(NUMBERS, **which) for which in ways[over]]
    values = np.asarray(values, "float64")
    assert (np.abs(values - NUMBERS) < ONE_BIT).all()
    assert all(len(np.unique(column)) <= 2 for column in values.T)
    # Draws of elements are evenly spread, those of steps as good as independent.
    n = len(values)
    allowed = 4 / n if over == "elements" else 2 / n**0.5
    assert (np.abs(values.mean(0) - NUMBERS) / ONE_BIT).max() < allowed


def test_what_bfloat16_has_stays_as_it_is():
    x = np.float32([0.0, -0.0, 1.0, -2.5, 2.0**-130, np.inf, -np.inf, np.nan])
    for t in range(9):
        np.testing.assert_array_equal(rounded(x, t=t), x)
        signs = np.signbit(rounded(x, t=t))
        np.testing.assert_array_equal(signs[:-1], np.signbit(x[:-1]))


def test_draws_differ_between_elements_slots_and_steps():
    x = np.full((1000,), 1.001, "float32")  # 0.128 of the way up
    ups = [rounded(x, **which) > 1 for which in [{}, {"slot": 1}, {"t": 1}]]
    for up in ups:
        assert 0.12 < up.mean() < 0.14
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (ups[i] != ups[j]).mean() > 0.1


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", WAYS)
def test_v_does_not_stall(way):
    # In plain bfloat16 v stops at 0.5: there 0.999 * v + 0.001 rounds to v.
    variable = keras.Variable(np.zeros((400,), "float32"))
    optimizer = RMSprop(rho=0.999, slot_dtype="bfloat16")
    optimizer.build([variable])
    apply, gradient = WAYS[way](optimizer), keras.ops.ones((400,))
    for _ in range(2000):
        apply([gradient])
    v = optimizer.get_state().slots[0].velocity.astype("float64")
    expected = 1 - 0.999**2000
    np.testing.assert_allclose(v.mean(), expected, rtol=0.01)
    np.testing.assert_allclose(v, expected, rtol=0.1)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("period", [2, 7, 93])
def test_v_is_right_on_average_where_gradients_repeat(period):
    # As in an epoch; draws in step with it would be off by 1 to 3 %.
    squares = np.random.default_rng(0).normal(size=(period, 2000)) ** 2
    v, expected, rho = tensor(np.zeros(2000, "float32")), np.zeros(2000), 0.99

    def update(v, g2, t):
        new = stochastically(rho * v + (1 - rho) * g2, 7, t, 0)
        return keras.ops.cast(new, "float32")

    if BACKEND == "tensorflow":
        update = tf.function(update, jit_compile=True)
    for t in range(1500):
        g2 = squares[t % period]
        v = update(v, tensor(g2, "float32"), tensor(t))
        expected = rho * expected + (1 - rho) * g2
    error = (keras.ops.convert_to_numpy(v) / expected - 1).mean()
    assert abs(error) < 0.005


def run(seed, steps=5, optimizer=None):
    keras.utils.set_random_seed(seed)
    variable = keras.Variable(arrays([(50,)])[0])
    optimizer = RMSprop(
        0.1, momentum=0.9, centered=True, epsilon=1e-2, slot_dtype="bfloat16"
    )
    optimizer.build([variable])
    for t in range(steps):
        optimizer.apply([tensor(arrays([(50,)], seed=t)[0])])
    return variable, optimizer


def test_is_reproducible_under_set_random_seed():
    (a, _), (b, _), (c, _) = run(0), run(0), run(1)
    np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert (a.numpy() != c.numpy()).any()


def test_all_slots_have_half_the_bytes():
    _, optimizer = run(0)
    slots = [s for s in optimizer.variables if s.shape == (50,)]
    assert [s.dtype for s in slots] == ["bfloat16"] * 3


@pytest.mark.parametrize(
    "kind",
    [
        "store",
        pytest.param("checkpoint", marks=pytest.mark.tensorflow("checkpoints")),
    ],
)
def test_resumes_to_the_same_bits(kind, tmp_path):
    store = {}
    variable, optimizer = run(0, steps=3)
    optimizer.save_own_variables(store)
    if kind == "checkpoint":
        path = tf.train.Checkpoint(o=optimizer).save(str(tmp_path / "ckpt"))
    keras.utils.set_random_seed(7)
    other = RMSprop.from_config(optimizer.get_config())
    twin = keras.Variable(variable.numpy())
    other.build([twin])
    if kind == "store":
        other.load_own_variables(store)
    else:
        tf.train.Checkpoint(o=other).restore(path)
    for t in (3, 4):
        other.apply([tensor(arrays([(50,)], seed=t)[0])])
    np.testing.assert_array_equal(twin.numpy(), run(0)[0].numpy())


def test_steps_stay_close_to_float32():
    variable, _ = run(0, steps=20)
    keras.utils.set_random_seed(0)
    twin = keras.Variable(arrays([(50,)])[0])
    optimizer = RMSprop(0.1, momentum=0.9, centered=True, epsilon=1e-2)
    for t in range(20):
        optimizer.apply([tensor(arrays([(50,)], seed=t)[0])], [twin])
    moved = np.abs(twin.numpy() - arrays([(50,)])[0]).max()
    np.testing.assert_allclose(variable.numpy(), twin.numpy(), atol=0.01 * moved)


@pytest.mark.one_in(3)
@pytest.mark.tensorflow("sparse gradients")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_sparse_rows(jit_compile):
    # v of 200 elements, touched every second step: the same averages in expectation.
    table = keras.Variable(np.zeros((2, 200), "float32"))
    optimizer = RMSprop(0.0, rho=0.99, slot_dtype="bfloat16")
    optimizer.build([table])
    apply = tf.function(optimizer.apply, jit_compile=jit_compile)
    for t in range(200):
        apply([tf.IndexedSlices(tf.ones((1, 200)), tensor([t % 2]))])
    expected = 0.0
    for t in range(200):
        expected = 0.99 * expected + 0.01 * (t % 2)
    v = optimizer.get_state().slots[0].velocity.astype("float64")
    np.testing.assert_allclose(v[1].mean(), expected, rtol=0.02)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(jit_compile):
    x, losses = arrays([(64, 3)])[0], []
    for slot_dtype in ("bfloat16", None):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        optimizer = RMSprop(0.01, slot_dtype=slot_dtype)
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        losses.append(model.fit(x, x[:, :1], epochs=5, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=0.01)


@pytest.mark.float64
def test_dtypes_may_be_objects():
    assert RMSprop(slot_dtype=tensor([1.0], "bfloat16").dtype).slot_dtype == "bfloat16"
    optimizer = RMSprop(slot_dtype="float64")
    optimizer.build([keras.Variable([1.0])])
    optimizer.apply([tensor([2.0])])
    assert optimizer.get_state().slots[0].velocity.dtype == "float64"
