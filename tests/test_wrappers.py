"""Optimizers around this one, on each backend: in a process of its own."""

import pytest
from stepping import python

BACKENDS = [
    "tensorflow",
    "jax",
    pytest.param("torch", marks=pytest.mark.peers),
]

MODEL = '''
import keras, numpy as np
from keras_rmsprop import RMSprop, reference

X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = X @ np.float32([[1.0], [-2.0], [0.5]])
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


def new_model(optimizer):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(4, use_bias=False, name="body"),
        keras.layers.Dense(1, use_bias=False, name="head"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer, "mse")
    return model


def in_numpy(weights, epochs, *rules):
    """Return the weights after these epochs, each layer with a rule of its own."""
    weights, states = [np.float64(w) for w in weights], [{}, {}]
    for _ in range(epochs):
        for n in range(0, len(X), 8):
            x, y = np.float64(X[n : n + 8]), np.float64(Y[n : n + 8])
            body, head = weights
            error = 2 * (x @ body @ head - y) / len(x)
            gradients = [x.T @ error @ head.T, (x @ body).T @ error]
            weights = [
                reference.step(w, g, state, epsilon=1e-7, **rule)
                for w, g, state, rule in zip(weights, gradients, states, rules)
            ]
    return weights


def close(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
'''


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_different_rates_for_body_and_head(backend, tmp_path):
    out = python(
        MODEL
        + """
if not hasattr(keras.optimizers, "MultiOptimizer"):
    raise SystemExit("Keras has it since 3.15")

def optimizer():
    of_head = {".*head/.*": RMSprop(0.05, momentum=0.5)}
    of_all = keras.optimizers.OptimizerMap(RMSprop(0.005, centered=True), of_head)
    return keras.optimizers.MultiOptimizer(of_all)

rules = {"alpha": 0.005, "centered": True}, {"alpha": 0.05, "momentum": 0.5}
model = new_model(optimizer())
start = model.get_weights()
model.fit(X, Y, epochs=2, **FIT)
close(model.get_weights(), in_numpy(start, 2, *rules))

model.save("m.keras")
again = keras.models.load_model("m.keras")
again.fit(X, Y, epochs=1, **FIT)
close(again.get_weights(), in_numpy(start, 3, *rules))

# Each has its own rate, and what is assigned takes effect.
[of_body] = [o for o in model.optimizer.optimizers if o.centered]
of_body.learning_rate = 0.0
body, head = model.get_weights()
model.fit(X, Y, epochs=1, **FIT)
same, other = model.get_weights()
assert np.array_equal(same, body) and not np.allclose(other, head, atol=1e-3)
print(keras.backend.backend())
""",
        KERAS_BACKEND=backend,
        cwd=tmp_path,
    )
    assert out in (backend, "")


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scale_and_get(backend, tmp_path):
    out = python(
        MODEL
        + """
# A scale that is a power of 2 changes nothing.
inner = RMSprop(0.01, momentum=0.5)
model = new_model(keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0))
start = model.get_weights()
model.fit(X, Y, epochs=2, **FIT)
close(model.get_weights(), in_numpy(start, 2, *[{"alpha": 0.01, "momentum": 0.5}] * 2))

# An infinite gradient is skipped, and halves the scale.
weights, state = model.get_weights(), [v.numpy() for v in inner.variables]
model.fit(X, Y * np.float32(np.inf), batch_size=32, verbose=0)
close(model.get_weights(), weights)
close([v.numpy() for v in inner.variables], state)
assert float(model.optimizer.dynamic_scale.numpy()) == 2.0

given = RMSprop("auto", rho=0.95, use_ema=True)
assert keras.optimizers.get(given) is given
again = keras.optimizers.get(keras.optimizers.serialize(given))
assert type(again) is RMSprop
assert again.get_config() == given.get_config()
print(keras.backend.backend())
""",
        KERAS_BACKEND=backend,
        cwd=tmp_path,
    )
    assert out == backend


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_step_as_a_function_changes_no_variable(backend):
    out = python(
        """
        import keras, numpy as np
        from keras import ops
        from keras_rmsprop import RMSprop, reference

        variable = keras.Variable(np.ones(3), dtype="float32")
        optimizer = RMSprop(0.1, momentum=0.5)
        optimizer.build([variable])
        weights = [ops.copy(ops.convert_to_tensor(variable))]
        state = [ops.copy(ops.convert_to_tensor(v)) for v in optimizer.variables]
        before = [ops.convert_to_numpy(v) for v in optimizer.variables]
        given = ops.convert_to_tensor(np.float32([1.0, -2.0, 0.5]))
        for _ in range(3):
            weights, state = optimizer.stateless_apply(state, [given], weights)
        want = reference.minimize(
            lambda w: np.array([1.0, -2.0, 0.5]), np.ones(3), 3,
            alpha=0.1, momentum=0.5, epsilon=1e-7,
        )
        got = ops.convert_to_numpy(weights[0])
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert np.array_equal(ops.convert_to_numpy(variable), np.ones(3))
        for v, x in zip(optimizer.variables, before, strict=True):
            assert np.array_equal(ops.convert_to_numpy(v), x)
        print(keras.backend.backend())
        """,
        KERAS_BACKEND=backend,
    )
    assert out == backend
