"""Train under one strategy, in a process of its own; called by test_distribution.py.

    python distributed_run.py one|mirrored|workers OUTPUT.npz

What is written must not depend on the strategy.
"""

import os
import runpy
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from keras_rmsprop import RMSprop
from keras_rmsprop.kernel import tensorflow as kernel

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed.py"
ROWS, BATCH = 48, 16
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
    "dense": ("fit", "dense", {}),
    "dense, loop": ("loop", "dense", {}),
    "dense, everything": ("loop", "dense", ALL),
    "warm-up": ("fit", "dense", {"use_ema": True, "ema_warmup": True}),
    "accumulation": ("fit", "dense", {"gradient_accumulation_steps": 2}),
    "table": ("fit", "table", {}),
    "table, loop": ("loop", "table", {}),
    "table, everything": ("fit", "table", ALL),
    "table, averages": ("fit", "table", {"use_ema": True, "ema_warmup": True}),
    "table, averages, loop": ("loop", "table", {"use_ema": True, "ema_momentum": 0.5}),
    "lazy": ("fit", "table", {"momentum": 0.5, "sparse_update": "lazy"}),
    "clipped rows": ("loop", "table", {"clipnorm": 0.05}),
    "table, restored": ("restored", "table", {}),
    "table, unfrozen later": ("unfrozen 0", "table", {"use_ema": True}),
    "other layers unfrozen later": ("unfrozen -1", "table", {}),
    "skipped": ("fit", "table", {"skip_nonfinite": True}),
    "skipped, loop": ("loop", "table", {"skip_nonfinite": True}),
}


def strategy_named(name):
    if name == "workers":
        return runpy.run_path(str(EXAMPLE))["Workers"]()
    if name == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    return tf.distribute.get_strategy()


def model_and_data(kind, options):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    if kind == "table":
        x = np.minimum(rng.zipf(1.5, (ROWS, 4)), 30) - 1  # with repeats
        layers = [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(30, 3),
            keras.layers.Flatten(),
        ]
    else:
        x = rng.normal(size=(ROWS, 4)).astype("float32")
        layers = [keras.Input((4,)), keras.layers.Dense(5, "tanh")]
    y = rng.normal(size=(ROWS, 1)).astype("float32")
    if options.get("skip_nonfinite"):
        y[BATCH - 1] = np.nan  # seen by the last replica alone
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(RMSprop(0.01, **options), "mse", jit_compile=False)
    return model, tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


def loop(strategy, model, data):
    optimizer, variables = model.optimizer, model.trainable_variables
    with strategy.scope():
        optimizer.build(variables)

    def of_replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x, training=True) - y)) / BATCH
        optimizer.apply(tape.gradient(loss, variables), variables)

    step = tf.function(lambda x, y: strategy.run(of_replica, args=(x, y)))
    for _ in range(2):
        for x, y in strategy.experimental_distribute_dataset(data):
            step(x, y)
    graph = step.get_concrete_function(x, y).graph
    assert "KerasRmsprop" in str(graph.as_graph_def()) or kernel.ops() is None
    tables = {tuple(variables[i].shape) for i in optimizer._clocks}
    for op in graph.get_operations():
        for tensor in op.outputs:
            if tensor.shape.rank and tuple(tensor.shape) in tables:
                assert op.type == "ReadVariableOp", f"{op.name} is a whole table"


def state(strategy, model):
    """Return all that training changed; the copies of all replicas agree on it."""
    optimizer = model.optimizer
    variables = {v.path: v.value for v in [*model.variables, *optimizer.variables]}
    for i in optimizer._clocks:
        variables[f"last {i}"] = optimizer._clocks[i].last
        variables[f"updates {i}"] = optimizer._clocks[i].updates
    arrays = []
    for variable in variables.values():
        copies = [v.numpy() for v in strategy.experimental_local_results(variable)]
        assert all(np.array_equal(copy, copies[0]) for copy in copies)
        arrays.append(copies[0])
    return arrays


def main(name, output, *runs):
    strategy = strategy_named(name)
    results = {}
    for run in runs or RUNS:
        way, kind, options = RUNS[run]
        with strategy.scope():
            model, data = model_and_data(kind, options)
        if way == "restored":
            model.fit(data, epochs=1, shuffle=False, verbose=0)
            path = tf.train.Checkpoint(model).save(f"{output}.checkpoint")
            with strategy.scope():
                model, data = model_and_data(kind, options)
                model.optimizer.build(model.trainable_variables)
            tf.train.Checkpoint(model).restore(path)  # outside the scope
            model.fit(data, epochs=1, shuffle=False, verbose=0)
        elif way.startswith("unfrozen"):
            layer = model.layers[int(way.split()[1])]
            for layer.trainable in (False, True):
                with strategy.scope():
                    model.compile(model.optimizer, "mse", jit_compile=False)
                model.fit(data, epochs=1, shuffle=False, verbose=0)
        elif way == "fit":
            model.fit(data, epochs=2, shuffle=False, verbose=0)
        else:
            loop(strategy, model, data)
        for n, array in enumerate(state(strategy, model)):
            results[f"{run}, {n}"] = array
    np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
