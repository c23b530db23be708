"""Who needs a learning rate? RMSprop with "auto" beside others at all their rates.

    python benchmarks/tuning.py [--seeds N] [--scale S] [--tasks ...] [--only ...]

Each competitor trains each network of `tuning_tasks.py` with each seed. Whose best rate
is wanted climbs: it tries rates until one is better than its neighbours. Every result
is written at once: what was interrupted goes on where it stopped.
`--scale` shortens the trainings, and then nothing is published.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tuning_competitors import COMPETITORS, GRID, START, Competitor, Result, Run

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

HERE = Path(__file__).parent
RUNS = HERE / "results" / "tuning_runs.jsonl"
MOST = 10
"""Seeds beyond so many do not count."""


def run(task: Any, who: Competitor, seed: int, rate: float, scale: float) -> Result:
    """Train once.

    Args:
        task: One of `tuning_tasks`.
        who: Who trains.
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
    optimizer = who.make(rate, steps)
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
    value, loss_ = test() if who.averages else before[0]
    found = getattr(optimizer, "current_learning_rate", None)
    found = rate if found is None else float(np.max(keras.ops.convert_to_numpy(found)))
    return Result(value, loss_, before[0][0], found, seconds)


def climb(start: int, score: Callable[[float], float]) -> Iterator[float]:
    """Yield rates of the grid until one is better than both of its neighbours.

    Args:
        start: Where in the grid to begin.
        score: Of a rate that was yielded; the greater the better.
    """
    at = start
    while True:
        near = range(max(at - 1, 0), min(at + 2, len(GRID)))
        for place in near:
            yield GRID[place]
        best = max(near, key=lambda place: score(GRID[place]))
        if not score(GRID[best]) > score(GRID[at]):
            return
        at = best


def plan(options: argparse.Namespace, done: Mapping[Run, Result]) -> Iterator[Run]:
    """Yield what shall run next, all with the first seed before any with the second.

    Args:
        options: Those of the command.
        done: All results so far; those of the runs yielded are added by the caller.
    """
    import tuning_tasks

    for seeds in range(1, options.seeds + 1):
        for task in options.tasks or tuning_tasks.EVERY:
            for who in options.only or COMPETITORS:
                competitor = COMPETITORS[who]
                if competitor.backend == options.backend and (
                    seeds <= options.searched or not competitor.searched
                ):
                    yield from plan_one(task, who, seeds, options.scale, done)


def plan_one(
    task: str, who: str, seeds: int, scale: float, done: Mapping[Run, Result]
) -> Iterator[Run]:
    """Yield what is missing of a competitor, as `plan` says, with so many seeds."""
    import tuning_tasks

    competitor = COMPETITORS[who]
    sign = 1 if tuning_tasks.EVERY[task].metric == "accuracy" else -1

    def runs(rate: float, seeds: int, who: str = who) -> list[Run]:
        return [Run(task, who, rate, seed, scale) for seed in range(seeds)]

    def score(rate: float, least: int = seeds, who: str = who) -> float:
        values = [done[run].value for run in runs(rate, MOST, who) if run in done]
        if len(values) < least or not math.isfinite(sum(values)):
            return -math.inf
        return sign * math.fsum(values) / len(values)

    def missing(rate: float) -> list[Run]:
        return [run for run in runs(rate, seeds) if run not in done]

    if competitor.default:
        yield from missing(competitor.default)
    if competitor.searched:
        start = START
        for other in (competitor.like, who):
            known = {rate: score(rate, max(seeds - 1, 1), other) for rate in GRID}
            if math.isfinite(max(known.values())):
                start = max(known, key=known.__getitem__)
        for rate in climb(GRID.index(start), score):
            yield from missing(rate)


def finished(file: Path) -> dict[Run, Result]:
    """Return what ran already; each line of the file is one training."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {Run(*given): Result(*result) for given, result in lines}


def train(
    runs: Iterable[Run],
    file: Path,
    competitors: Mapping[str, Competitor] = COMPETITORS,
    done: dict[Run, Result] | None = None,
) -> None:
    """Train, in this process, and add each result to the file, and to `done`."""
    import keras
    import tuning_tasks

    for given in runs:
        who, task = competitors[given.competitor], tuning_tasks.EVERY[given.task]
        result = run(task, who, given.seed, given.rate, given.scale)
        if done is not None:
            done[given] = result
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
    add(
        "--seeds",
        type=int,
        default=3,
        help="how often each one trains that has one rate",
    )
    add("--searched", type=int, default=2, help="how often at the rates of a search")
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
        train(plan(options, done), options.file, done=done)
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
