"""Optuna: its callback prunes trials, and a study finds the rate."""

import keras
import optuna
from data import x, y
from optuna_integration import KerasPruningCallback

from keras_rmsprop import RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation


def test_a_study_with_pruning():
    def objective(trial):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        rate = trial.suggest_categorical("rate", [0.05, 1e-6])
        model.compile(RMSprop(rate, use_ema=True, ema_warmup=True), "mse")
        callbacks = [AverageForEvaluation(), KerasPruningCallback(trial, "val_loss")]
        options = {"validation_data": (x, y), "epochs": 3, "verbose": 0}
        return model.fit(x, y, callbacks=callbacks, **options).history["val_loss"][-1]

    optuna.logging.disable_default_handler()
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    sampler = optuna.samplers.GridSampler({"rate": [0.05, 1e-6]}, seed=0)
    study = optuna.create_study(pruner=pruner, sampler=sampler)
    study.enqueue_trial({"rate": 0.05})
    study.optimize(objective, n_trials=3)
    assert study.best_params == {"rate": 0.05}
    of_the_other = [t.state.name for t in study.trials if t.params["rate"] == 1e-6]
    assert {*of_the_other} == {"PRUNED"}
