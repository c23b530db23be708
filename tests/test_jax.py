"""On JAX, in a process of its own: which backend Keras has is settled on import."""

import pytest
from stepping import python


@pytest.mark.rest
@pytest.mark.slow
def test_low_precision_gradients_are_accumulated():
    out = python(
        """
        import keras, numpy as np
        from keras_rmsprop import RMSprop

        def losses(optimizer, dtype):
            keras.utils.set_random_seed(0)
            layer = keras.layers.Dense(2, dtype=dtype)
            model = keras.Sequential([keras.Input((4,)), layer])
            model.compile(optimizer, "mse")
            x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
            history = model.fit(x, x[:, :2], batch_size=16, epochs=6, verbose=0)
            assert model.weights[0].dtype == dtype
            return history.history["loss"]

        for options in ({}, {"momentum": 0.5, "use_ema": True}, {"clipnorm": 0.5}):
            options |= {"learning_rate": 0.05, "gradient_accumulation_steps": 2}
            for dtype in ("float32", "bfloat16", "float16"):
                found = losses(RMSprop(**options), dtype)
                expected = losses(keras.optimizers.RMSprop(**options), dtype)
                np.testing.assert_allclose(found, expected, rtol=0.05)
        print(keras.backend.backend())
        """,
        KERAS_BACKEND="jax",
    )
    assert out == "jax"


@pytest.mark.rest
@pytest.mark.slow
def test_lists_are_gradients_and_explain_answers():
    out = python(
        """
        import keras, numpy as np
        from keras_rmsprop import RMSprop
        weight, optimizer = keras.Variable([1.0, 2.0]), RMSprop(0.1)
        for wrong in ([[1.0]], 2.0):
            try:
                optimizer.apply([wrong], [weight])
            except ValueError as error:
                assert "must have the shape of its variable" in str(error)
        assert not optimizer.built
        optimizer.apply([[2.0, -0.5]], [weight])
        found = [round(float(w), 4) for w in weight.numpy()]
        print(found, "on its own" in optimizer.explain())
        """,
        KERAS_BACKEND="jax",
    )
    assert out == "[0.6838, 2.3162] True"


@pytest.mark.rest
@pytest.mark.slow
def test_sparse_gradients_are_those_that_they_stand_for():
    """Repeats are summed before they are squared, as in the dense gradient."""
    out = python(
        """
        import jax, jax.numpy as jnp, keras, numpy as np
        from jax.experimental import sparse
        from keras_rmsprop import RMSprop, reference

        ids = np.array([1, 4, 1, 1])
        rows = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
        dense = np.zeros((6, 3))
        np.add.at(dense, ids, rows)

        def gradient(shape=(6, 3)):
            return sparse.BCOO((jnp.asarray(rows), ids[:, None]), shape=shape)

        def trained(gradient, *, jit, **options):
            table, bias = keras.Variable(np.ones((6, 3))), keras.Variable(np.ones(2))
            optimizer = RMSprop(0.1, **options)
            optimizer.build([table, bias])
            if not jit:
                for _ in range(4):
                    optimizer.apply([gradient, jnp.ones(2)], [table, bias])
                return table.numpy()
            weights = [table.value, bias.value]
            state = [v.value for v in optimizer.variables]
            step = jax.jit(optimizer.stateless_apply)
            for _ in range(4):
                weights, state = step(state, [gradient, jnp.ones(2)], weights)
            return np.asarray(weights[0])

        def close(x, y):
            np.testing.assert_allclose(x, y, rtol=1e-5)

        for jit in (False, True):
            want = reference.minimize(
                lambda w: dense, np.ones((6, 3)), 4, alpha=0.1, epsilon=1e-7
            )
            close(trained(gradient(), jit=jit), want)
            for options in (
                {"momentum": 0.5, "centered": True, "weight_decay": 0.1},
                {"clipnorm": 0.1},
                {"global_clipnorm": 0.1},
                {"gradient_accumulation_steps": 2},
                {"skip_nonfinite": True, "use_ema": True},
                {"learning_rate": "auto"},
                {"loss_scale_factor": 4.0},
            ):
                options = {"jit": jit} | options
                if options.pop("learning_rate", None):
                    options |= {"bias_correction": True}
                close(
                    trained(gradient(), **options),
                    trained(jnp.asarray(dense, "float32"), **options),
                )
        table = keras.Variable(np.ones((6, 3)))
        for shape in ((7, 3), (5, 3)):
            optimizer = RMSprop()
            try:
                optimizer.apply([gradient(shape)], [table])
            except ValueError as error:
                assert "must have the shape of its variable" in str(error)
            else:
                raise AssertionError("not refused")
            assert not optimizer.built
        print(keras.backend.backend())
        """,
        KERAS_BACKEND="jax",
    )
    assert out == "jax"


FITS = """
import keras, numpy as np
from keras_rmsprop import RMSprop, reference

X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = X @ np.float32([[1.0], [-2.0], [0.5]])
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}

def new_model(**options):
    layer = keras.layers.Dense(1, "linear", False, "ones", name="layer")
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(RMSprop(**{"learning_rate": 0.01} | options), "mse")
    return model

class Oracle:
    "The same in NumPy."

    def __init__(self, model, **rule):
        [w] = model.get_weights()
        self.w, self.state, self.average, self.t = np.float64(w), {}, None, 0
        self.rule = {"alpha": 0.01, "epsilon": 1e-7} | rule

    def fit(self, epochs):
        for _ in range(epochs):
            for n in range(0, 32, 8):
                x, y = np.float64(X[n : n + 8]), np.float64(Y[n : n + 8])
                g = 2 * x.T @ (x @ self.w - y) / 8
                self.w = reference.step(self.w, g, self.state, **self.rule)
                m = 0.9 if self.t else 0.0
                old = self.w if self.average is None else self.average
                self.average = m * old + (1 - m) * self.w
                self.t += 1
        self.w = self.average

def close(model, oracle):
    np.testing.assert_allclose(model.get_weights()[0], oracle.w, rtol=0, atol=1e-5)
"""


@pytest.mark.rest
@pytest.mark.slow
def test_fit_again_with_averages(tmp_path):
    out = python(
        FITS
        + """
options = {"momentum": 0.5}
model = new_model(use_ema=True, ema_momentum=0.9, **options)
oracle = Oracle(model, **options)
for epochs in (2, 1, 2):
    model.fit(X, Y, epochs=epochs, validation_data=(X, Y), **FIT)
    oracle.fit(epochs)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    close(model, oracle)
for _ in range(2):
    model.save("m.keras")
    model = keras.models.load_model("m.keras")
    model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, epochs=1, **FIT)
    oracle.fit(1)
    close(model, oracle)
model.save_weights("m.weights.h5")
again = new_model(use_ema=True, ema_momentum=0.9, **options)
again.load_weights("m.weights.h5")
again.fit(X, Y, epochs=1, **FIT)
oracle.fit(1)
close(again, oracle)
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
        cwd=tmp_path,
    )
    assert out == "jax"


@pytest.mark.rest
@pytest.mark.slow
def test_what_starts_fresh_shares_no_memory_with_the_weights(tmp_path):
    """`fit` gives away the memory of all it updates: of each only once."""
    out = python(
        FITS
        + """
import warnings
warnings.simplefilter("ignore")  # it says what starts fresh
model = new_model()
model.fit(X, Y, **FIT)
model.save_weights("m.weights.h5")
for options in ({"use_ema": True}, {"learning_rate": "auto"}):
    for is_built in (False, True):
        model = new_model(**options)
        if is_built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights("m.weights.h5")
        model.fit(X, Y, **FIT)
        assert model.optimizer.iterations == 8
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
        cwd=tmp_path,
    )
    assert out == "jax"


@pytest.mark.rest
@pytest.mark.slow
def test_layers_unfrozen_later(tmp_path):
    """A step inside `fit` cannot make slots there; `build` does."""
    out = python(
        FITS
        + """
layers = [keras.layers.Dense(2, name="body"), keras.layers.Dense(1, name="head")]
model = keras.Sequential([keras.Input((3,)), *layers])
for options in ({"use_ema": True, "momentum": 0.5}, {"learning_rate": "auto"}):
    layers[0].trainable = False
    optimizer = RMSprop(**{"learning_rate": 0.01} | options)
    model.compile(optimizer, "mse")
    model.fit(X, Y, **FIT)
    layers[0].trainable = True
    model.compile(optimizer, "mse")
    before = {v.path: v.numpy() for v in optimizer.variables}
    optimizer.build(model.trainable_variables)
    after = {v.path: v.numpy() for v in optimizer.variables}
    assert len(after) > len(before)
    assert all(np.array_equal(after[path], x) for path, x in before.items())
    body = layers[0].kernel.numpy()
    for path, x in after.items():
        if path.endswith(("body_kernel_average", "body_kernel_first_weight")):
            assert np.array_equal(x, body)
    model.fit(X, Y, **FIT)
    assert optimizer.iterations == 8
    assert not np.array_equal(layers[0].kernel.numpy(), body)
    optimizer.build([keras.Variable(1.0)])  # of another model: as before
    assert len(optimizer.variables) == len(after)
print(keras.backend.backend())
""",
        KERAS_BACKEND="jax",
        cwd=tmp_path,
    )
    assert out == "jax"
