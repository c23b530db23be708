"""Time eager `apply` of this RMSprop and of the built-in, side by side.

    python benchmarks/eager_apply.py [--rounds N]

Each optimizer runs in a process of its own, in turns, on three sets of variables: those
of the MNIST network, 160 small ones and a large one. A figure is the median over the
rounds of each round's median, with the rounds' range in brackets; the ratio is what
counts, as all share the machine. The state is what the slots take, in bytes for each
parameter.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import harness
from rich import box
from rich.console import Console
from rich.table import Table

MNIST: list[tuple[int, ...]] = [
    (784, 128),
    (128,),
    (128, 128),
    (128,),
    (128, 10),
    (10,),
]
SETS: dict[str, list[tuple[int, ...]]] = {
    "MNIST network, 6 variables": MNIST,
    "160 small": [(256, 256), (256,)] * 80,
    "one of 4096 x 4096": [(4096, 4096)],
}
OPTIMIZERS = [
    "keras.optimizers.RMSprop",
    "RMSprop",
    "RMSprop, skip_nonfinite",
    "RMSprop, bfloat16 slots",
]
WARM_UP, STEPS = 5, 30


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    print(harness.sentence(harness.machine()))
    results = harness.in_turns(
        {
            (set_name, optimizer): [
                sys.executable,
                __file__,
                "--measure",
                set_name,
                optimizer,
            ]
            for set_name in SETS
            for optimizer in OPTIMIZERS
        },
        arguments.rounds,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("variables", "optimizer"):
        table.add_column(heading)
    for heading in ("ms", "times faster", "bytes of state"):
        table.add_column(heading, justify="right")
    for (set_name, optimizer), rounds in results.items():
        times = [one["ms"] for one in rounds]
        built_in = [one["ms"] for one in results[set_name, OPTIMIZERS[0]]]
        ratios = [b / a for a, b in zip(times, built_in, strict=True)]
        table.add_row(
            set_name,
            optimizer,
            str(harness.spread(times)),
            str(harness.spread(ratios)),
            f"{rounds[0]['bytes']:.2f}",
        )
    Console(width=100).print(table)


def measure(set_name: str, optimizer_name: str) -> dict[str, float]:
    """Return the median milliseconds of a step, and the bytes of state a parameter.

    Args:
        set_name: One of `SETS`.
        optimizer_name: One of `OPTIMIZERS`.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_rmsprop

    make: dict[str, Any] = {
        "keras.optimizers.RMSprop": keras.optimizers.RMSprop,
        "RMSprop": keras_rmsprop.RMSprop,
        "RMSprop, skip_nonfinite": lambda: keras_rmsprop.RMSprop(skip_nonfinite=True),
        "RMSprop, bfloat16 slots": lambda: keras_rmsprop.RMSprop(slot_dtype="bfloat16"),
    }
    rng = np.random.default_rng(0)
    values = [rng.normal(size=s).astype("float32") for s in SETS[set_name]]
    variables = [keras.Variable(value) for value in values]
    gradients = [tf.constant(value) for value in values]
    optimizer = make[optimizer_name]()
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.apply(gradients, variables)
        variables[-1].numpy()  # waits for the step to end
        times.append(1e3 * (time.perf_counter() - start))
    shapes = {tuple(v.shape) for v in variables}
    slots = [v.value for v in optimizer.variables if tuple(v.shape) in shapes]
    size = sum(v.dtype.size * int(np.prod(v.shape)) for v in slots)
    return {
        "ms": statistics.median(times[WARM_UP:]),
        "bytes": size / sum(v.size for v in values),
    }


if __name__ == "__main__":
    main()
