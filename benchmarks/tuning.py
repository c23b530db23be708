"""Who needs a learning rate? RMSprop with "auto" beside others at all their rates.

    python benchmarks/tuning.py [--seeds N] [--scale S] [--tasks ...] [--only ...]

Each competitor trains each network of `tuning_tasks.py` with each seed, at each of its
rates. Every result is written at once: what was interrupted goes on where it stopped.
`--scale` shortens the trainings, and then nothing is published.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuning_competitors import (
    COMPETITORS,
    Competitor,
    MakeOptimizer,
    Result,
    Run,
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

HERE = Path(__file__).parent
RUNS = HERE / "results" / "tuning_runs.jsonl"


def run(task: Any, make: MakeOptimizer, seed: int, rate: float, scale: float) -> Result:
    """Train once.

    Args:
        task: One of `tuning_tasks`.
        make: Makes the optimizer.
        seed: Of the weights and of the order of the examples.
        rate: The learning rate.
        scale: What part of the steps.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    data, steps = task.data(), max(1, round(task.steps * scale))
    keras.utils.set_random_seed(seed)
    model = task.build()
    optimizer = make(rate, steps)
    loss: Any = "mse"
    if task.loss != "mse":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = ["accuracy"] if task.metric == "accuracy" else None
    # Compiled only where there is nothing else: a short training is over before XLA is.
    jit = keras.backend.backend() == "jax"
    model.compile(optimizer, loss, metrics=accuracy, jit_compile=jit)

    optimizer.build(model.trainable_variables)

    def test() -> tuple[float, float]:
        logs = model.evaluate(
            data.test_x, data.test_y, batch_size=500, verbose=0, return_dict=True
        )
        return logs[task.metric], logs["loss"]

    random, needed = np.random.default_rng(seed), steps * task.batch
    rounds = -(-needed // len(data.x))
    order = np.concatenate([random.permutation(len(data.x)) for _ in range(rounds)])
    x, y = tf.constant(data.x), tf.constant(data.y)
    batches = (
        tf.data.Dataset.from_tensor_slices(order[:needed].reshape(steps, -1))
        .map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
        .prefetch(2)
    )
    before: list[tuple[float, float]] = []
    # At the end of an epoch the weights are the raw ones, at the end of `fit` averages.
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: before.append(test())
    )
    start = time.perf_counter()
    model.fit(batches, verbose=0, callbacks=[note])
    seconds = time.perf_counter() - start
    value, loss_ = test() if optimizer.use_ema else before[0]
    found = getattr(optimizer, "current_learning_rate", None)
    found = rate if found is None else float(np.max(keras.ops.convert_to_numpy(found)))
    return Result(value, loss_, before[0][0], found, seconds)


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """Yield what shall run: a seed after the other, so that all have the first soon."""
    import tuning_tasks

    for seed in range(options.seeds):
        for task in options.tasks or tuning_tasks.TASKS:
            for who in options.only or COMPETITORS:
                for rate in COMPETITORS[who].rates:
                    yield Run(task, who, rate, seed, options.scale)


def finished(file: Path) -> dict[Run, Result]:
    """Return what ran already; each line of the file is one training."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {Run(*given): Result(*result) for given, result in lines}


def train(
    runs: list[Run], file: Path, competitors: Mapping[str, Competitor] = COMPETITORS
) -> None:
    """Train, in this process, and add each result to the file."""
    import keras
    import tuning_tasks

    every = tuning_tasks.TASKS | tuning_tasks.HELD_OUT
    for given in runs:
        make = competitors[given.competitor].make
        task = every[given.task]
        result = run(task, make, given.seed, given.rate, given.scale)
        keras.utils.clear_session()  # its graphs would fill the memory
        with file.open("a") as lines:
            lines.write(json.dumps([given, result]) + "\n")
        print(*given, f"{result.value:.5g}", f"{result.seconds:.1f} s", flush=True)


def fix_threads(threads: int) -> None:
    """Let TensorFlow use that many threads, so that others find a core free."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def main() -> None:
    """Train what is missing, print the table, publish it if it is whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="how often each one trains")
    add("--scale", type=float, default=1.0, help="part of the steps")
    add("--tasks", nargs="*", help="only these networks")
    add("--only", nargs="*", choices=COMPETITORS, help="only these competitors")
    add("--file", type=Path, default=RUNS, help="where the results are kept")
    add("--threads", type=int, default=0, help="TensorFlow's; 0: as many as it likes")
    add("--publish", action="store_true", help="table and picture anew; no training")
    add("--backend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.file.parent.mkdir(exist_ok=True)

    backends = [] if options.publish else ["tensorflow", "jax"]
    if options.backend:  # this process is one of those started below
        os.environ["KERAS_BACKEND"] = options.backend
        if options.threads:
            fix_threads(options.threads)
        done = finished(options.file)
        mine = {n for n, c in COMPETITORS.items() if c.backend == options.backend}
        runs = [r for r in plan(options) if r.competitor in mine and r not in done]
        train(runs, options.file)
        return
    import tuning_report  # and with it Keras, on the backend set above

    failed = False
    for backend in backends:
        command = [sys.executable, __file__, *sys.argv[1:], "--backend", backend]
        failed |= bool(subprocess.run(command).returncode)
    results = {
        given: result
        for given, result in finished(options.file).items()
        if math.isclose(given.scale, options.scale)
    }
    tuning_report.show(results)
    if options.scale == 1 and not failed and options.file == RUNS:
        tuning_report.publish(results)
    sys.exit(failed)


if __name__ == "__main__":
    main()
