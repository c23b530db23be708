"""Train on JAX, alone or as one of several workers; called by test_jax_workers.py.

    python distributed_jax_run.py all|resume OUTPUT.npz [ADDRESS WORKERS NUMBER]

What is written must not depend on the number of workers.
"""

import os
import sys
from pathlib import Path

import jax
import keras
import numpy as np

from keras_rmsprop import RMSprop

ROWS, BATCH, EPOCHS = 48, 16, 40
ALL = {
    "momentum": 0.5,
    "centered": True,
    "epsilon": 1e-3,
    "weight_decay": 0.01,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_overwrite_frequency": 4,
}
RUNS = {
    "dense": ("dense", {}),
    "dense, everything": ("dense", ALL),
    "accumulation": ("dense", {"gradient_accumulation_steps": 2}),
    "auto": ("dense", {"learning_rate": "auto"}),
    "table": ("table", {}),
    "table, everything": ("table", ALL),
    "skipped": ("dense", {"skip_nonfinite": True}),
}


def model_and_data(kind, options):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    if kind == "table":
        x = np.minimum(rng.zipf(1.5, (ROWS, 4)), 30) - 1  # with repeats
        layers = [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(30, 3, name="table"),
            keras.layers.Flatten(),
        ]
    else:
        x = rng.normal(size=(ROWS, 4)).astype("float32")
        layers = [keras.Input((4,)), keras.layers.Dense(5, "tanh", name="body")]
    y = rng.normal(size=(ROWS, 1)).astype("float32")
    if options.get("skip_nonfinite"):
        y[BATCH - 1] = np.nan  # seen by the last worker alone
    model = keras.Sequential([*layers, keras.layers.Dense(1, name="head")])
    model.compile(RMSprop(**{"learning_rate": 0.01} | options), "mse")
    return model, x, y


def mine(x, y):
    """Yield this worker's share of each batch."""
    share = BATCH // jax.process_count()
    first = share * jax.process_index()
    for n in range(0, ROWS, BATCH):
        part = slice(n + first, n + first + share)
        yield x[part], y[part]


def train(model, x, y):
    """Train for an epoch."""
    steps = {"steps_per_epoch": ROWS // BATCH, "epochs": 1}
    model.fit(mine(x, y), **steps, verbose=0)


def state(model):
    """Return all that training changed, as this worker has it."""
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def all_runs():
    """Return the state after each of the runs."""
    results = {}
    for run, (kind, options) in RUNS.items():
        model, x, y = model_and_data(kind, options)
        for _ in range(2):
            train(model, x, y)
        results |= {f"{run}, {n}": array for n, array in enumerate(state(model))}
    return results


def resume(path):
    """Train to the end, saving after each epoch; go on from the file, if there is one.

    All workers save, as Keras makes variables for that, which all must make. The file
    of the first one counts.
    """
    model, x, y = model_and_data("dense", {"momentum": 0.5, "centered": True})
    if path.exists():
        model = keras.models.load_model(path)
    done = int(model.optimizer.iterations.numpy()) // (ROWS // BATCH)
    print(f"Worker {os.getpid()} starts after {done} of {EPOCHS} epochs", flush=True)
    for epoch in range(done, EPOCHS):
        train(model, x, y)
        new = path.with_name(f"{jax.process_index()}_{path.name}")
        model.save(new)
        if jax.process_index() == 0:
            new.replace(path)
        print(f"Epoch {epoch + 1}", flush=True)
    return {str(n): array for n, array in enumerate(state(model))}


def main(what, output, address=None, workers=1, number=0):
    if address:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize(address, int(workers), int(number))
        # The data are shared out already.
        whole = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(whole)
    if what == "resume":
        results = resume(Path(output).parent / "model.keras")
    else:
        results = all_runs()
    np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
