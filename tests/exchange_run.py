"""Saves runs, and goes on with the runs that other backends saved.

    KERAS_BACKEND=jax python tests/exchange_run.py FOLDER
    KERAS_BACKEND=jax python tests/exchange_run.py FOLDER tensorflow jax torch

The first trains, saves and goes on; the second goes on from what these saved. Both
print the losses from there on, as JSON: by backend, run and kind of file.
"""

import json
import pickle
import sys
from pathlib import Path

import keras
import numpy as np

from keras_rmsprop import RMSprop

BACKEND = keras.backend.backend()
RUNS = {
    "defaults": {},
    "all slots": {"momentum": 0.5, "centered": True, "epsilon": 1e-3, "use_ema": True},
    "auto": {"learning_rate": "auto", "use_ema": True, "ema_warmup": True},
    "sums": {"gradient_accumulation_steps": 2, "weight_decay": 0.01},
    "own": {"momentum": 0.5, "bias_correction": True, "skip_nonfinite": True},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.9)
    },
}
FILES = ["keras", "weights.h5", "state"]


def made(name):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="body"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.3, v.shape) for v in model.weights])
    optimizer = RMSprop(**{"learning_rate": 0.02} | RUNS[name])
    model.compile(optimizer, "mse", jit_compile=BACKEND == "jax")
    return model


def steps(model, numbers):
    """Take steps, each on a batch of its own; return the losses."""
    losses = []
    for n in numbers:
        x = np.random.default_rng(n).normal(size=(16, 6)).astype("float32")
        model.reset_metrics()
        losses.append(float(model.train_on_batch(x, np.sin(x[:, :2] * x[:, 2:3]))))
    return losses


def begin(folder, name):
    """Train, save and go on."""
    model = made(name)
    steps(model, range(7))
    stem = folder / f"{BACKEND}_{name}"
    model.save(f"{stem}.keras")
    model.save_weights(f"{stem}.weights.h5")
    state = model.get_weights(), model.optimizer.get_state()
    Path(f"{stem}.state").write_bytes(pickle.dumps(state))
    return steps(model, range(7, 14))


def go_on(folder, source, name, kind):
    """Go on from what a backend saved."""
    path = folder / f"{source}_{name}.{kind}"
    if kind == "keras":
        model = keras.models.load_model(path)
    else:
        model = made(name)
        if kind == "state":
            weights, state = pickle.loads(path.read_bytes())
            model.set_weights(weights)
            model.optimizer.build(model.trainable_variables)
            model.optimizer.set_state(state)
        else:
            model.load_weights(path)
    return steps(model, range(7, 14))


def main(folder, *sources):
    if not sources:
        found = {name: begin(folder, name) for name in RUNS}
    else:
        found = {
            f"{source}, {name}, {kind}": go_on(folder, source, name, kind)
            for source in sources
            for name in RUNS
            for kind in FILES
            # A state holds no averages and no estimate, and sums begin anew after it.
            if kind != "state" or name not in ("auto", "sums")
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
