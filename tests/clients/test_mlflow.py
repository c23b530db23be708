"""mlflow: what it logs, and who can load a model that it has logged."""

import subprocess
import sys

import keras
import mlflow
import numpy as np
import pytest
from data import x, y

from keras_rmsprop import RMSprop


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs.db")
    mlflow.create_experiment("test", artifact_location=str(folder / "artifacts"))
    mlflow.set_experiment("test")


@pytest.fixture(scope="module")
def logged(store):
    """Return a model, where it was logged, and the run."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(RMSprop(0.01, momentum=0.9), "mse")
    with mlflow.start_run() as run:
        callback = mlflow.keras.MlflowCallback(run)
        model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
        inputs = {"pip_requirements": ["keras", "tensorflow", "keras_rmsprop"]}
        info = mlflow.keras.log_model(model, name="model", **inputs)
    return model, info.model_uri, mlflow.get_run(run.info.run_id)


def test_options_and_losses_are_logged(logged):
    params, metrics = logged[2].data.params, logged[2].data.metrics
    assert params["optimizer_momentum"] == "0.9"
    assert float(params["optimizer_learning_rate"]) == pytest.approx(0.01)
    assert metrics["loss"] < 10


def load(logged, how):
    _, uri, _ = logged
    program = f"""
import mlflow
mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
{how.format(uri=uri)}
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_who_loads_it_must_import_the_package(logged):
    done = load(logged, "mlflow.keras.load_model('{uri}')")
    assert "Could not locate class 'RMSprop'" in done.stderr
    how = "import keras_rmsprop; m = mlflow.keras.load_model('{uri}')"
    done = load(logged, f"{how}; print(int(m.optimizer.iterations))")
    assert done.stdout.strip() == "4", done.stderr[-2000:]


def test_for_predictions_a_model_is_logged_without_its_optimizer(logged):
    done = load(logged, "mlflow.pyfunc.load_model('{uri}')")
    assert "Could not locate class 'RMSprop'" in done.stderr
    model = keras.Sequential.from_config(logged[0].get_config())
    model.set_weights(logged[0].get_weights())
    with mlflow.start_run():
        bare = mlflow.keras.log_model(model, name="bare", pip_requirements=["keras"])
    how = "import numpy as np; m = mlflow.pyfunc.load_model('{uri}')"
    how += "; print(*m.predict(np.ones((2, 4), 'float32'))[:, 0])"
    done = load((model, bare.model_uri, None), how)
    assert done.returncode == 0, done.stderr[-2000:]
    got = [*map(float, done.stdout.splitlines()[-1].split())]
    expected = logged[0].predict(np.ones((2, 4)), verbose=0)[:, 0]
    np.testing.assert_allclose(got, expected, 1e-5)
