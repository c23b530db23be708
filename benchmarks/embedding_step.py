"""What `embedding.py` runs in a process of its own: the steps of one competitor.

Apart from the competitor's own framework this needs no package, so that PyTorch may
live in another interpreter.
"""

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, BATCH, IDS_EACH, WARM_UP = 64, 1024, 8, 5
ROW = 4 * WIDTH
"""Bytes of a row of the table."""


def make_ids(kind: str, size: int, steps: int) -> list[int]:
    """Return the ids of some batches, the same for every competitor.

    Args:
        kind: `"uniform"`, or `"zipf"`: the k-th id has a share of about 1 / k.
        size: How many ids there are.
        steps: How many batches.
    """
    rng = random.Random(0)
    u = (rng.random() for _ in range(steps * BATCH * IDS_EACH))
    if kind == "uniform":
        return [int(x * size) for x in u]
    return [min(int((size + 1) ** x), size) - 1 for x in u]


def milliseconds(ends: Sequence[float]) -> list[float]:
    """Return how long the steps took that ended at these times, without the first.

    Args:
        ends: Seconds.
    """
    return [1e3 * (b - a) for a, b in itertools.pairwise(ends)][WARM_UP - 1 :]


class Memory:
    """How far the memory of this process has grown since this was made, in bytes."""

    def __init__(self) -> None:
        self._before = self._read("VmRSS")

    def forget_peak(self) -> None:
        """Begin anew: `peak` is to be the highest that memory stands from now on."""
        if self._before:
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak(self) -> float | None:
        """The highest growth; None on a system that does not tell."""
        return self._read("VmHWM") - self._before if self._before else None

    def _read(self, name: str) -> int:
        status = Path("/proc/self/status")
        for line in status.read_text().splitlines() if status.exists() else []:
            if line.startswith(name):
                return 1024 * int(line.split()[1])
        return 0


def with_keras(
    competitor: str, size: int, xla: bool, steps: Mapping[str, int]
) -> tuple[dict[str, list[float]], float | None]:
    """Train with Keras.

    Args:
        competitor: `"ours"`, `"built-in"` or `"floor"`.
        size: How many rows the table has.
        xla: Whether the whole step is compiled.
        steps: How many steps to time, by the kind of ids; one kind after the other.

    Returns:
        The milliseconds of each step, and by how much memory grew at its highest.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_rmsprop

    class Floor(keras.optimizers.SGD):
        """Reads the gradients, so that they are computed, and updates nothing."""

        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            if not self.built:
                self.build(trainable_variables)
                self.total = self.add_variable((), name="total")
            slices = (g.values if isinstance(g, tf.IndexedSlices) else g for g in grads)
            self.total.assign(sum(map(tf.reduce_sum, slices)))
            self.iterations.assign_add(1)

    def batches(kind: str) -> tuple[Any, Any]:
        ids = make_ids(kind, size, WARM_UP + steps[kind])
        x = np.array(ids, "int32").reshape(-1, IDS_EACH)
        return x, np.ones((len(x), 1), "float32")

    data = {kind: batches(kind) for kind in steps}
    memory = Memory()
    model = keras.Sequential(
        [
            keras.Input((IDS_EACH,), dtype="int32"),
            # Zeros: random numbers would need more memory than the steps do.
            keras.layers.Embedding(size, WIDTH, embeddings_initializer="zeros"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    optimizers = {
        "ours": keras_rmsprop.RMSprop,
        "built-in": keras.optimizers.RMSprop,
        "floor": Floor,
    }
    model.compile(optimizers[competitor](), "mse", jit_compile=xla)
    memory.forget_peak()

    def fit(x: Any, y: Any) -> list[float]:
        ends: list[float] = []
        clock = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
        )
        model.fit(x, y, BATCH, callbacks=[clock], shuffle=False, verbose=0)
        return milliseconds(ends)

    return {kind: fit(x, y) for kind, (x, y) in data.items()}, memory.peak


def with_torch(
    size: int, steps: Mapping[str, int]
) -> tuple[dict[str, list[float]], float | None]:
    """Train the same model with PyTorch, its table by `SparseAdam`.

    Args:
        size: See `with_keras`.
        steps: See `with_keras`.

    Returns:
        See `with_keras`.
    """
    import torch
    from torch import nn

    def batches(kind: str) -> Iterator[Any]:
        ids = make_ids(kind, size, WARM_UP + steps[kind])
        return iter(torch.tensor(ids).reshape(-1, BATCH, IDS_EACH))

    torch.set_num_threads(os.cpu_count() or 1)
    data = {kind: batches(kind) for kind in steps}
    y = torch.ones(BATCH, 1)
    memory = Memory()
    table = torch.empty(size, WIDTH).zero_()
    bag = nn.EmbeddingBag.from_pretrained(table, False, mode="mean", sparse=True)
    dense = nn.Linear(WIDTH, 1)
    optimizers = (
        torch.optim.SparseAdam(bag.parameters()),
        torch.optim.Adam(dense.parameters()),
    )
    memory.forget_peak()
    times = {}
    for kind in steps:
        ends = []
        for x in data[kind]:
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.mse_loss(dense(bag(x)), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            ends.append(time.perf_counter())
        times[kind] = milliseconds(ends)
    return times, memory.peak


def main() -> None:
    """Train as the JSON on the command line says and print what that took."""
    case = json.loads(sys.argv[1])
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = str(os.cpu_count())
    # TensorFlow's allocator keeps what it once had, malloc gives it back.
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0" if case["malloc"] else "1"
    size, steps = case["size"], case["steps"]
    if case["competitor"] == "torch":
        times, peak = with_torch(size, steps)
    else:
        times, peak = with_keras(case["competitor"], size, case["xla"], steps)
    print(json.dumps({"times": times, "peak": peak}))


if __name__ == "__main__":
    main()
