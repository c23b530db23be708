"""scikeras: it clones, pickles, and makes optimizers from their class and options."""

import pickle

import keras
import numpy as np
from data import x, y
from scikeras.wrappers import KerasRegressor
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from keras_rmsprop import RMSprop

TARGETS = y[:, 0]


def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


def regressor(optimizer, **options):
    given = {"loss": "mse", "epochs": 3, "verbose": 0, "random_state": 0, **options}
    return KerasRegressor(model, optimizer=optimizer, **given)


def test_a_clone_trains_as_the_original():
    first = regressor(RMSprop(0.01, momentum=0.9)).fit(x, TARGETS)
    again = clone(first).fit(x, TARGETS)
    np.testing.assert_array_equal(first.predict(x), again.predict(x))
    assert type(again.model_.optimizer) is RMSprop


def test_after_a_pickle_training_goes_on_as_without():
    first = regressor(RMSprop(0.01)).fit(x, TARGETS)
    again = pickle.loads(pickle.dumps(first))
    assert int(again.model_.optimizer.iterations) == 6
    for one in (first, again):
        keras.utils.set_random_seed(0)
        one.partial_fit(x, TARGETS)
    np.testing.assert_allclose(again.predict(x), first.predict(x), 1e-6)


def test_a_search_sets_its_options():
    rates = [1e-6, 0.05]
    search = GridSearchCV(
        regressor(RMSprop, optimizer__momentum=0.5),
        {"optimizer__learning_rate": rates},
        cv=2,
    ).fit(x, TARGETS)
    assert search.best_params_ == {"optimizer__learning_rate": 0.05}
    assert search.best_estimator_.model_.optimizer.momentum == 0.5
