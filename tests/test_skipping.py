"""`skip_nonfinite`: a run with bad steps is the run without them."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import LOOP, WAYS, arrays, assert_close, python, tensor

from keras_rmsprop import RMSprop

SHAPES = [(), (5,), (0,), (3, 3, 2, 4)]
BAD = {2: np.nan, 3: np.inf, 7: -np.inf}
"""What is wrong with the gradients of these steps."""

OPTIONS = {
    "defaults": {},
    "momentum, centered": {"momentum": 0.9, "centered": True, "epsilon": 1e-3},
    "decay, clipping": {"weight_decay": 0.1, "global_clipnorm": 1.0},
    "EMA": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss scale": {"loss_scale_factor": 8.0},
    "callable": {"learning_rate": lambda: 0.05},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    },
}


def spoiled(gradients, bad, where):
    """Return the gradients with something bad in the last element of one of them."""
    gradients = [g.copy() for g in gradients]
    gradients[where].reshape(-1)[-1:] = bad
    return gradients


def run(optimizer, apply, with_bad_steps, where=3):
    variables = [keras.Variable(a) for a in arrays(SHAPES)]
    optimizer.build(variables)
    apply = apply(optimizer)
    for step in range(12):
        gradients = arrays(SHAPES, seed=step)
        if step in BAD and with_bad_steps:
            gradients = spoiled(gradients, BAD[step], where)
        if step not in BAD or with_bad_steps:
            apply([tensor(g) for g in gradients])
    state = {v.path.split("/")[-1]: v.numpy() for v in optimizer.variables}
    return [v.numpy() for v in variables], state


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "eager") for name in OPTIONS),
        *itertools.product(["defaults", "accumulation", "EMA"], ["tf.function", "XLA"]),
    ],
)
def test_equals_the_built_in_without_the_bad_steps(name, way):
    options = OPTIONS[name]
    expected = run(keras.optimizers.RMSprop(**options), WAYS["eager"], False)
    optimizer = RMSprop(skip_nonfinite=True, **options)
    weights, state = run(optimizer, WAYS[way], True)
    assert int(state.pop("skipped_steps")) == int(optimizer.skipped_steps) == len(BAD)
    assert_close((weights, state), expected, 1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options", [{"jit_compile": False}, {"slot_dtype": "bfloat16"}]
)
@pytest.mark.parametrize("where", [0, 1])
def test_equals_itself_without_the_bad_steps(options, where):
    def optimizer():
        keras.utils.set_random_seed(0)
        return RMSprop(0.01, skip_nonfinite=True, **options)

    weights, state = run(optimizer(), WAYS["eager"], True, where)
    assert int(state.pop("skipped_steps")) == len(BAD)
    expected, expected_state = run(optimizer(), WAYS["eager"], False)
    assert int(expected_state.pop("skipped_steps")) == 0
    assert_close((weights, state), (expected, expected_state), 0)


@pytest.mark.one_in(6)
@pytest.mark.tensorflow("sparse gradients")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"momentum": 0.5}])
def test_tables(way, options):
    """Sparse gradients; the built-in gets them densified."""
    table, twin = (keras.Variable(np.ones((6, 2), "float32")) for _ in range(2))
    optimizer = RMSprop(0.1, skip_nonfinite=True, **options)
    builtin = keras.optimizers.RMSprop(0.1, **options)
    optimizer.build([table])
    apply = WAYS[way](optimizer)
    rng = np.random.default_rng(0)
    for step in range(10):
        ids = rng.integers(0, 6, 4)
        values = rng.normal(size=(4, 2)).astype("float32")
        if step in BAD:
            values[-1, -1] = BAD[step]
        slices = tf.IndexedSlices(tensor(values), tensor(ids), tensor([6, 2]))
        apply([slices])
        if step not in BAD:
            builtin.apply([tf.convert_to_tensor(slices)], [twin])
    np.testing.assert_allclose(table.numpy(), twin.numpy(), rtol=1e-5)
    assert int(optimizer.skipped_steps) == len(BAD)
    for i in optimizer._clocks if way != "XLA" else ():  # there all rows are updated
        assert int(optimizer._clocks[i].updates) == 10 - len(BAD)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(jit_compile):
    x, y = arrays([(12, 4, 3), (12, 4, 2)])
    good = [step for step in range(12) if step not in BAD]

    def fitted(optimizer, x, y):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        batches = tf.data.Dataset.from_tensor_slices((x, y))
        model.fit(batches, epochs=2, verbose=0)
        return model.get_weights()

    spoiled_y = y.copy()
    for step, bad in BAD.items():
        spoiled_y[step, 0, 0] = bad
    optimizer = RMSprop(0.01, skip_nonfinite=True)
    got = fitted(optimizer, x, spoiled_y)
    assert_close(got, fitted(keras.optimizers.RMSprop(0.01), x[good], y[good]), 1e-5)
    assert int(optimizer.skipped_steps) == 2 * len(BAD)
    assert int(optimizer.iterations) == 2 * len(good)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", WAYS)
def test_without_it_what_is_bad_stays_in_the_weights_as_in_the_built_in(bad, way):
    def finite(optimizer):
        weight = keras.Variable([1.0, 1.0, 1.0])
        optimizer.build([weight])
        apply = WAYS[way](optimizer)
        for gradient in ([1.0, bad, 0.0], [1.0, 1.0, 1.0]):
            apply([tensor(gradient)])
        return np.isfinite(weight.numpy()).tolist()

    assert (
        finite(RMSprop()) == finite(keras.optimizers.RMSprop()) == [True, False, True]
    )
    assert RMSprop().skipped_steps == 0


def test_in_a_loss_scale_optimizer_which_skips_itself():
    weight = keras.Variable([1.0, 2.0])
    inner = RMSprop(0.1, skip_nonfinite=True)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    outer.build([weight])
    apply = LOOP(outer)
    for gradient in ([8.0, 4.0], [np.nan, 1.0], [np.inf, 1.0]):
        apply([tensor(gradient)])
    expected = keras.Variable([1.0, 2.0])
    keras.optimizers.RMSprop(0.1).apply([tensor([1.0, 0.5])], [expected])
    np.testing.assert_allclose(weight.numpy(), expected.numpy(), rtol=1e-6)
    assert (int(inner.iterations), int(inner.skipped_steps)) == (1, 0)
    assert float(outer.dynamic_scale) == 2.0


def test_gradients_whose_sum_overflows_are_finite():
    weight = keras.Variable(np.zeros(20, "float32"))
    optimizer = RMSprop(0.1, skip_nonfinite=True)
    optimizer.apply([keras.ops.full([20], 1e38)], [weight])
    assert (int(optimizer.iterations), int(optimizer.skipped_steps)) == (1, 0)


def test_switching_it_off_takes_effect_at_once():
    weight = keras.Variable([1.0])
    optimizer = RMSprop(0.1, skip_nonfinite=True)
    optimizer.apply([tensor([np.nan])], [weight])
    assert weight.numpy() == 1
    optimizer.skip_nonfinite = False
    optimizer.apply([tensor([np.nan])], [weight])
    assert np.isnan(weight.numpy())


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_switching_it_on_too_late_is_an_error_that_changes_nothing(jit_compile):
    weight = keras.Variable([1.0])
    optimizer = RMSprop(0.1, jit_compile=jit_compile)
    optimizer.build([weight])
    optimizer.skip_nonfinite = True
    with pytest.raises(ValueError, match="when the optimizer is made"):
        optimizer.apply([tensor([1.0])])
    assert (weight.numpy(), int(optimizer.iterations)) == (1, 0)


def test_a_state_is_loaded_where_it_was_switched_on_too_late():
    store = {"0": np.int64(3), "1": np.float32(0.5), "2": np.float32([4.0])}
    optimizer = RMSprop()
    optimizer.build([keras.Variable([1.0])])
    optimizer.skip_nonfinite = True
    optimizer.load_own_variables(store)
    assert [v.numpy().item() for v in optimizer.variables] == [3, 0.5, 4]


@pytest.mark.parametrize(
    "option", [{"skip_nonfinite": True}, {"slot_dtype": "bfloat16"}]
)
def test_a_state_of_the_built_in_is_loaded(option, recwarn):
    weight, store = keras.Variable([1.0]), {}
    builtin = keras.optimizers.RMSprop()
    builtin.apply([tensor([2.0])], [weight])
    builtin.save_own_variables(store)
    optimizer = RMSprop(**option)
    optimizer.build([weight])
    optimizer.load_own_variables(store)
    assert int(optimizer.iterations) == 1
    v = optimizer.get_state().slots[0].velocity
    np.testing.assert_allclose(v, [0.4], rtol=0.01)
    assert not [w for w in recwarn if w.category is UserWarning]


def test_the_count_is_saved(tmp_path):
    def compiled(**options):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(RMSprop(**options), "mse")
        return model

    model = compiled(skip_nonfinite=True)
    model.fit(np.full((3, 2), np.nan), np.ones((3, 1)), batch_size=1, verbose=0)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert int(other.optimizer.skipped_steps) == 3


@pytest.mark.tensorflow("a start: the others need not be started again")
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("jax", marks=pytest.mark.rest),
        pytest.param("torch", marks=pytest.mark.peers),
    ],
)
def test_other_backends(backend):
    result = python(
        """
        import keras, numpy as np
        from keras_rmsprop import RMSprop
        x = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
        y = x[:, :1].copy()

        def fitted(optimizer, x, y):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            model.compile(optimizer, "mse")
            model.fit(x, y, batch_size=1, verbose=0, shuffle=False)
            return model.get_weights()

        expected = fitted(keras.optimizers.RMSprop(0.01), x[2:], y[2:])
        y[:2] = np.nan
        optimizer = RMSprop(0.01, skip_nonfinite=True)
        for a, b in zip(fitted(optimizer, x, y), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        print(int(optimizer.skipped_steps), int(optimizer.iterations))

        a, b = keras.Variable([1.0]), keras.Variable([1.0])  # unfrozen by a bad step
        optimizer = RMSprop(0.1, skip_nonfinite=True)
        optimizer.build([a])
        optimizer.apply([keras.ops.ones(1), keras.ops.array([np.nan])], [a, b])
        print(a.numpy(), b.numpy(), *(v.numpy() for v in optimizer._velocities))
        """,
        KERAS_BACKEND=backend,
    )
    assert result == "2 10\n[1.] [1.] [0.] [0.]"
