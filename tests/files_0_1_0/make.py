"""Makes the files of version 0.1.0, and says how runs go on from them.

The files beside this program were made by running it once, with version 0.1.0
(`python tests/files_0_1_0/make.py`). It must not be run again with a later version: the
files are there to show that later versions read what 0.1.0 wrote.
`tests/test_files_of_0_1_0.py` imports the models and the steps from here.

Each run takes `STEPS_BEFORE` steps, is saved in three ways, takes `STEPS_AFTER` more,
and what it has then is kept in `NAME.npz`: weights, slots, iterations, skipped steps
and, with `use_ema`, the weights after `finalize_variable_values`. Nothing is read
between the files and the end. Gradients are random numbers, not those of a loss, so
that results depend on the optimizer's arithmetic alone.
"""

from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_rmsprop
from keras_rmsprop import RMSprop

FOLDER = Path(__file__).parent
STEPS_BEFORE, STEPS_AFTER = 7, 3
ROWS = 9

ROWS_BEFORE = [[0, 1, 2], [3, 1, 3], [4], [0, 5], [3], [5, 5], [3, 4]]
ROWS_AFTER = [[0, 3], [1], [8]]
"""Which rows of a table have a gradient, by step. When the files are written 1 and 2
were silent for some steps; after that 1 is used again, 2 is not. 6 and 7 never are."""


class Run(NamedTuple):
    """One run: a model, the options of its optimizer, and what is special about it."""

    options: dict
    table: bool = False
    nan_at: tuple = ()
    """Steps whose gradients have a NaN."""
    unfrozen_at: int = 0
    """The step before which the first layer is unfrozen; 0: it is never frozen."""


OP_BY_OP = {"learning_rate": 0.02, "jit_compile": False}

RUNS = {
    "dense": Run(OP_BY_OP),
    "moments": Run(
        {
            **OP_BY_OP,
            "rho": 0.8,
            "momentum": 0.5,
            "centered": True,
            "use_ema": True,
            "ema_momentum": 0.9,
        }
    ),
    "bfloat16_slots": Run({**OP_BY_OP, "momentum": 0.5, "slot_dtype": "bfloat16"}),
    "table": Run(OP_BY_OP, table=True),
    "table_centered": Run({**OP_BY_OP, "centered": True}, table=True),
    "accumulation": Run({**OP_BY_OP, "gradient_accumulation_steps": 3}),
    "skipping": Run({**OP_BY_OP, "skip_nonfinite": True}, nan_at=(2, 4, 8)),
    "unfrozen": Run({**OP_BY_OP, "momentum": 0.5}, unfrozen_at=4),
}


def compiled_model(name: str) -> keras.Model:
    """Return a fresh model for a run, with its optimizer; all its layers trainable."""
    run = RUNS[name]
    layers = [keras.Input((3,)), keras.layers.Dense(3, name="body")]
    if run.table:
        layers = [keras.Input((3,)), keras.layers.Embedding(ROWS, 2, name="table")]
    model = keras.Sequential([*layers, keras.layers.Dense(3, name="head")])
    model.compile(RMSprop(**run.options), "mse")
    return model


def step(name: str, model: keras.Model, number: int) -> None:
    """Take one step of a run; their numbers start at 0."""
    rng = np.random.default_rng(number)
    gradients = []
    for variable in model.trainable_variables:
        if layer_and_name(variable.path).startswith("table/"):
            ids = (ROWS_BEFORE + ROWS_AFTER)[number]
            values = rng.normal(size=(len(ids), 2)).astype("float32")
            gradient = tf.IndexedSlices(
                tf.constant(values), tf.constant(ids), tf.constant([ROWS, 2])
            )
        else:
            gradient = rng.normal(size=variable.shape).astype("float32")
            if number in RUNS[name].nan_at:
                gradient.flat[0] = np.nan
            gradient = tf.constant(gradient)
        gradients.append(gradient)
    model.optimizer.apply(gradients, model.trainable_variables)


def take_first_steps(name: str, model: keras.Model) -> None:
    """Take the steps up to the files."""
    unfrozen_at = RUNS[name].unfrozen_at
    model.layers[0].trainable = not unfrozen_at
    for number in range(STEPS_BEFORE):
        if unfrozen_at and number == unfrozen_at:
            model.layers[0].trainable = True
        step(name, model, number)


def take_last_steps(name: str, model: keras.Model) -> None:
    """Take the steps after the files."""
    for number in range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER):
        step(name, model, number)


def layer_and_name(path: str) -> str:
    """Return the path of a variable without the name of its model."""
    return "/".join(path.split("/")[-2:])


def everything(model: keras.Model) -> dict[str, np.ndarray]:
    """Return all that a run leaves, by name; it changes the weights if `use_ema`."""
    optimizer = model.optimizer
    result = {f"weight {layer_and_name(v.path)}": v.numpy() for v in model.variables}
    state = optimizer.get_state()
    for path, slots in zip(state.paths, state.slots, strict=True):
        for kind, slot in slots._asdict().items():
            if slot is not None:
                result[f"{kind} {layer_and_name(path)}"] = slot
    result["iterations"] = np.asarray(state.iterations)
    result["skipped steps"] = np.asarray(int(optimizer.skipped_steps))
    if optimizer.use_ema:
        optimizer.finalize_variable_values(model.trainable_variables)
        for variable in model.trainable_variables:
            result[f"average {layer_and_name(variable.path)}"] = variable.numpy()
    return result


def make(name: str) -> None:
    """Write the files of a run."""
    keras.utils.set_random_seed(0)
    model = compiled_model(name)
    take_first_steps(name, model)
    model.save(FOLDER / f"{name}.keras")
    model.save_weights(FOLDER / f"{name}.weights.h5")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.write(str(FOLDER / f"{name}.checkpoint"))
    take_last_steps(name, model)
    np.savez_compressed(FOLDER / f"{name}.npz", **everything(model))


if __name__ == "__main__":
    if keras_rmsprop.__version__ != "0.1.0":
        raise SystemExit("These are the files of version 0.1.0.")
    for each in RUNS:
        make(each)
