"""Time eager `apply` of this RMSprop and of the built-in, side by side.

    python benchmarks/eager_apply.py [--rounds N]

Each optimizer runs in a process of its own, in turns, on two sets of variables: those
of the MNIST network and 160 small ones. The figures are medians over the rounds of
each round's median; the ratio is what counts, as both share the machine.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

MNIST = [(784, 128), (128,), (128, 128), (128,), (128, 10), (10,)]
SETS = {"MNIST network, 6 variables": MNIST, "160 small": [(256, 256), (256,)] * 80}
OPTIMIZERS = ["keras_rmsprop.RMSprop", "keras.optimizers.RMSprop"]


def measure(optimizer_name: str, set_name: str, steps: int = 30) -> float:
    """Return the median milliseconds of one eager step, after warming up."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_rmsprop

    classes: dict[str, Any] = {
        "keras_rmsprop.RMSprop": keras_rmsprop.RMSprop,
        "keras.optimizers.RMSprop": keras.optimizers.RMSprop,
    }
    rng = np.random.default_rng(0)
    values = [rng.normal(size=s).astype("float32") for s in SETS[set_name]]
    variables = [keras.Variable(value) for value in values]
    gradients = [tf.constant(value) for value in values]
    optimizer = classes[optimizer_name]()
    times = []
    for _ in range(5 + steps):
        start = time.perf_counter()
        optimizer.apply(gradients, variables)
        variables[-1].numpy()  # waits for the step to end
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[5:])


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(*arguments.measure))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.rounds} rounds\n")
    print(f"{'variables':28}{'built-in':>12}{'this one':>12}{'times faster':>16}")
    for set_name in SETS:
        times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        for _ in range(arguments.rounds):
            for name in OPTIMIZERS:
                command = [sys.executable, __file__, "--measure", name, set_name]
                out = subprocess.check_output(command, stderr=subprocess.DEVNULL)
                times[name].append(float(out))
        ours, theirs = (statistics.median(times[name]) for name in OPTIMIZERS)
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        print(
            f"{set_name:28}{theirs:9.2f} ms{ours:9.2f} ms{theirs / ours:9.1f}"
            f" ({min(ratios):.0f}-{max(ratios):.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
