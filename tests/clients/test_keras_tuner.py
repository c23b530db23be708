"""keras-tuner: it copies callbacks, and loads the best weights into a new model."""

import keras
import keras_tuner
import numpy as np
from data import x, y

from keras_rmsprop import RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation


def test_a_search_and_its_best_model(tmp_path):
    def build(choices):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        rate = choices.Choice("rate", [1e-6, 0.05])
        model.compile(RMSprop(rate, use_ema=True, ema_warmup=True), "mse")
        return model

    tuner = keras_tuner.GridSearch(build, "val_loss", directory=tmp_path)
    data = {"x": x, "y": y, "validation_data": (x, y), "epochs": 3, "verbose": 0}
    tuner.search(**data, callbacks=[AverageForEvaluation()])
    assert tuner.get_best_hyperparameters()[0].values == {"rate": 0.05}

    [model] = tuner.get_best_models()
    found = tuner.oracle.get_best_trials()[0].score
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), found, 1e-5)
    assert int(model.optimizer.iterations) == 6  # its state came with the weights
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == 8
