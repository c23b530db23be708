"""On JAX, in a process of its own: which backend Keras has is settled on import."""

import pytest
from stepping import python


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

        for options in ({}, {"momentum": 0.5, "use_ema": True}):
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
