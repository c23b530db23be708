"""Train one model with two workers on this machine, each a process of its own.

    python examples/distributed.py

Each worker takes half of every batch; the gradients are summed, of the embedding only
the rows in use, and both take the same step. Kill a worker, or all: the job stops, and
started again it resumes from its last checkpoint and ends with the same weights. (The
workers of several machines need a folder for it that all of them see.)
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from keras_rmsprop import RMSprop

VOCABULARY, WORDS, BATCH_SIZE, ROWS = 1000, 20, 32, 640


class Workers(tf.distribute.MultiWorkerMirroredStrategy):
    """The strategy for several workers, with a fix for `fit` of Keras 3."""

    def reduce(self, reduce_op: Any, value: Any, axis: Any) -> Any:
        """Reduce a value: a whole batch, too, and scalars, which have no axis."""
        reduce = super().reduce

        def one(part: Any) -> Any:
            has_axes = self.experimental_local_results(part)[0].shape.rank
            return reduce(reduce_op, part, axis if has_axes else None)

        return tf.nest.map_structure(one, value)


def work(directory: Path, epochs: int) -> None:
    """Train as the worker that the environment variable `TF_CONFIG` describes."""
    strategy = Workers()
    is_chief = strategy.cluster_resolver.task_id == 0
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((WORDS,), dtype="int32"),
                keras.layers.Embedding(VOCABULARY, 16),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1, activation="sigmoid"),
            ]
        )
        model.compile(RMSprop(0.01), "binary_crossentropy", metrics=["accuracy"])
        model.optimizer.build(model.trainable_variables)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        manager = tf.train.CheckpointManager(checkpoint, str(directory), max_to_keep=1)
        checkpoint.restore(manager.latest_checkpoint)
    done = int(checkpoint.save_counter.numpy())
    print(f"Worker {os.getpid()} starts after {done} of {epochs} epochs.", flush=True)

    if not is_chief:  # all must save, but only one may write there
        unused = tempfile.mkdtemp()
        manager = tf.train.CheckpointManager(checkpoint, unused, max_to_keep=1)
    rng = np.random.default_rng(0)
    x = rng.integers(VOCABULARY, size=(ROWS, WORDS))
    y = (rng.normal(size=VOCABULARY)[x].sum(axis=1, keepdims=True) > 0).astype("int32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)
    save = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: manager.save())
    plan = {"initial_epoch": done, "epochs": epochs, "callbacks": [save]}
    model.fit(data, **plan, shuffle=False, verbose=2 if is_chief else 0)
    weights = b"".join(w.tobytes() for w in model.get_weights())
    print(f"Weights: {hashlib.sha256(weights).hexdigest()[:16]}, of each worker.")


def cluster(workers: int) -> list[dict[str, str]]:
    """Return the environment of each worker: where all are, and which it is."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(workers)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return [
        os.environ
        | {
            "TF_CONFIG": json.dumps(
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                }
            )
        }
        for index in range(workers)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the workers, and stop all of them if one fails."""
    parser = argparse.ArgumentParser(description="Train with several workers.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--directory", type=Path, default=Path("runs/distributed"))
    options = parser.parse_args(arguments)
    if "TF_CONFIG" in os.environ:
        work(options.directory, options.epochs)
        return
    command = [
        sys.executable,
        __file__,
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    running = [
        subprocess.Popen(command, env=environment)
        for environment in cluster(options.workers)
    ]
    try:
        while running:
            for process in list(running):
                try:
                    code = process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
                running.remove(process)
                if code:
                    raise SystemExit(
                        f"Worker {process.pid} failed ({code}). Start again."
                    )
    finally:
        for process in running:
            process.kill()


if __name__ == "__main__":
    main()
