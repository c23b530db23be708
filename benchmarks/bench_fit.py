"""What `bench.py` runs in a process of its own: `fit` with one optimizer.

    python benchmarks/bench_fit.py OPTIMIZER
    python benchmarks/bench_fit.py --import MODULE

The first answers the requests of `harness.Worker`: `prepare` a model, `time` steps of
it. The second prints the seconds that the import of `keras_rmsprop` or `keras` takes.
"""

import gc
import importlib
import json
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from embedding_step import WARM_UP, milliseconds

BATCHES, CLASSES = 20, 10


class Task(NamedTuple):
    """A model, and what it is fed with."""

    hidden: Callable[[Any], list[Any]]
    """Takes `keras.layers`, returns the layers before the last, which gives logits."""
    shape: tuple[int, ...]
    """Of one input; its label is a class."""
    batch: int


MODELS = {
    "MNIST network": Task(
        lambda layers: [layers.Dense(128, "relu") for _ in range(2)], (784,), 64
    ),
    "wide": Task(
        lambda layers: [layers.Dense(4096, "relu") for _ in range(2)], (1024,), 32
    ),
    "deep": Task(
        lambda layers: [layers.Dense(256, "relu") for _ in range(60)], (256,), 32
    ),
    "conv net": Task(
        lambda layers: [
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
        ],
        (28, 28, 1),
        32,
    ),
    "LSTM": Task(lambda layers: [layers.LSTM(128)], (32, 64), 32),
}
OPTIMIZERS = {
    "this": "keras_rmsprop:RMSprop",
    "Keras": "keras.optimizers:RMSprop",
    "Adam": "keras.optimizers:Adam",
    "SGD": "keras.optimizers:SGD",
}
IMPORTS = {"keras_rmsprop": ["keras_rmsprop"], "keras": ["keras", "keras.optimizers"]}


class Measuring:
    """What is asked of one optimizer."""

    def __init__(self, optimizer: str) -> None:
        self._fit: Callable[..., list[float]] | None = None
        self._optimizer = pkgutil.resolve_name("keras.optimizers:SGD")
        tiny = Task(lambda layers: [], (1,), 1)
        self._make(tiny, jit=True)(1)  # pays for the start of TensorFlow and XLA
        self._optimizer = pkgutil.resolve_name(OPTIMIZERS[optimizer])

    def __call__(self, do: str, **what: Any) -> Any:
        """Answer a request; see `prepare` and `time`."""
        return getattr(self, do)(**what)

    def prepare(self, model: str, jit: bool | None) -> dict[str, float]:
        """Make a model in place of the last, and warm up.

        Args:
            model: Its name in `MODELS`.
            jit: Given as `jit_compile`; None leaves that to Keras.

        Returns:
            The seconds of a `fit` of one step, the first, with tracing and compiling.
        """
        self._fit = None
        fit = self._make(MODELS[model], jit)
        start = time.perf_counter()
        fit(1)
        first = time.perf_counter() - start
        fit(2 * WARM_UP)
        self._fit = fit
        return {"first": first}

    def time(self, seconds: float) -> float:
        """Return the median milliseconds of the steps in about so many seconds."""
        assert self._fit
        return statistics.median(milliseconds(self._fit(WARM_UP + 3, seconds)))

    def _make(self, task: Task, jit: bool | None) -> Callable[..., list[float]]:
        """Return how to `fit` a new model."""
        import keras
        import numpy as np
        import tensorflow as tf

        keras.backend.clear_session()
        gc.collect()
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(task.shape),
                *task.hidden(keras.layers),
                keras.layers.Dense(CLASSES),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        options = {} if jit is None else {"jit_compile": jit}
        model.compile(self._optimizer(), loss, **options)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((BATCHES, task.batch, *task.shape), "float32")
        y = rng.integers(CLASSES, size=(BATCHES, task.batch))
        quiet = tf.data.Options()
        # The thread of autotune may hold up the end of a `fit` by a second.
        quiet.autotune.enabled = False
        data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().with_options(quiet)

        def fit(steps: int, seconds: float = 0.0) -> list[float]:
            """Return when the steps ended: at least so many, for at least so long."""
            ends: list[float] = []

            def end(batch: int, logs: Any) -> None:
                ends.append(time.perf_counter())
                if len(ends) >= steps and ends[-1] - ends[0] >= seconds:
                    model.stop_training = True

            clock = keras.callbacks.LambdaCallback(on_train_batch_end=end)
            model.fit(
                data,
                callbacks=[clock],
                shuffle=False,
                steps_per_epoch=sys.maxsize,
                verbose=0,
            )
            return ends

        return fit


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if sys.argv[1] == "--import":
        start = time.perf_counter()
        for name in IMPORTS[sys.argv[2]]:
            importlib.import_module(name)
        print(json.dumps(time.perf_counter() - start))
    else:
        import harness  # here, as it imports packages

        harness.serve(Measuring(sys.argv[1]))
