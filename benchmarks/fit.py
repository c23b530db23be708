"""The steps of `fit` that are measured, and imports: of one optimizer, on a model.

Where the model is an embedding, PyTorch trains it, too, and the update of its table is
measured on its own.
"""

import functools
import importlib
import itertools
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness

CLASSES, WARM_UP = 10, 5
BATCHES = 20
WIDTH, IDS_EACH, TABLE_BATCHES = 64, 8, 64
"""Of a table, of its input, and so many batches that their rows are in no cache."""
ROW = 4 * WIDTH
"""Bytes of a row of the table."""


class Task(NamedTuple):
    """A model, and what it is fed with."""

    hidden: Callable[[Any], list[Any]]
    """Takes `keras.layers`, returns the layers before the last, which gives logits."""
    shape: tuple[int, ...]
    """Of one input; its label is a class."""
    batch: int = 32
    rows: int = 0
    """Of the table, if the input is ids."""
    width: int = WIDTH
    """Of the table."""


def dense(number: int, units: int) -> Callable[[Any], list[Any]]:
    """Return what makes so many layers of so many units."""
    return lambda layers: [layers.Dense(units, "relu") for _ in range(number)]


def embedding(rows: int) -> Task:
    """Return the model with a table of so many rows."""

    def hidden(layers: Any) -> list[Any]:
        # Zeros: random numbers would need more memory than the steps do.
        table = layers.Embedding(rows, WIDTH, embeddings_initializer="zeros")
        return [table, layers.GlobalAveragePooling1D()]

    return Task(hidden, (IDS_EACH,), 1024, rows)


MODELS = {
    "MNIST network": Task(dense(2, 128), (784,), 64),
    "61 x 64": Task(dense(61, 64), (64,)),
    "3 x 2048": Task(dense(3, 2048), (2048,)),
    "wide": Task(dense(2, 4096), (1024,)),
    "deep": Task(dense(60, 256), (256,)),
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
    ),
    "LSTM": Task(lambda layers: [layers.LSTM(128)], (32, 64)),
}
TABLES = {
    f"{rows:,} rows": embedding(rows)
    for rows in (1_000, 10_000, 100_000, 1_000_000, 4_000_000)
}
UNDER_XLA = {
    f"{rows:,} x {width}, {ids:,} ids": Task(list, (ids,), 1, rows, width)
    for rows in (100, 1_000, 10_000, 100_000)
    for width in (8, 128)
    for ids in (512, 16_384)
}
"""Tables whose updates XLA compiles."""
SMALL, LARGE = "1,000 rows", "1,000,000 rows"
"""Tables whose times are compared. From the larger one on the memory is, too."""
JIT = {"default": "auto", "jit_compile=True": True}
TABLE_JIT = {"without XLA": False, "with XLA": True}
UPDATE, XLA_UPDATE = "an update", "an update with XLA"
"""Of a table, by gradients that are there already; no model, no `fit`. Eagerly, or in a
function that XLA compiles."""
MONITOR = "this, Monitor"
OPTIMIZERS = {
    "this": "keras_rmsprop:RMSprop",
    harness.PORTABLE: "keras_rmsprop:RMSprop",
    "auto": "keras_rmsprop:RMSprop",
    MONITOR: "keras_rmsprop:RMSprop",
    "Keras": "keras.optimizers:RMSprop",
    "Adam": "keras.optimizers:Adam",
    "SGD": "keras.optimizers:SGD",
}
TABLE_OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"learning_rate": "auto"},
    "EMA": {"use_ema": True},
    "auto, EMA": {"learning_rate": "auto", "use_ema": True},
    "accumulation": {"gradient_accumulation_steps": 4},
}
"""Of this, as competitors on tables."""
EACH_OPTION = "mean, without XLA"
"""How these compete."""
TORCH, FLOOR = "torch SparseAdam", "gradients only"
KEPT = {"this": 2 * ROW + 4, "Keras": 2 * ROW, TORCH: 3 * ROW, FLOOR: ROW}
"""Bytes kept of a row: the weights, the state and the clock."""
IMPORTS = {"this": ["keras_rmsprop"], "Keras": ["keras", "keras.optimizers"]}


def setup(who: str, what: str, how: str) -> harness.Ready:
    """Make a model, and warm up.

    Args:
        who: One of `OPTIMIZERS`; for tables `TABLE_OPTIONS`, `TORCH` or `FLOOR`, too.
        what: One of `MODELS`, `TABLES` or `UNDER_XLA`, or `"import"`.
        how: Ends as one of `JIT` or `TABLE_JIT`, as `UPDATE` or as `XLA_UPDATE`; begins
            with the kind of ids, or with "mean", for the mean of the steps, as a few of
            them take longer.
    """
    if what == "import":
        start = time.perf_counter()
        for name in IMPORTS[who]:
            importlib.import_module(name)
        return harness.Ready({"first": time.perf_counter() - start}, {})
    task = {**MODELS, **TABLES, **UNDER_XLA}[what]
    if who == TORCH:
        return with_torch(task, how)
    if how.endswith((UPDATE, XLA_UPDATE)):
        return of_table(who, task, how)
    start_tensorflow()
    fit, memory = with_keras(who, task, how)
    start = time.perf_counter()
    fit(1, 0.0)
    first = time.perf_counter() - start
    # The first time that a row is written, the system finds memory for it.
    fit(TABLE_BATCHES if how == EACH_OPTION else 2 * WARM_UP, 0.0)

    def step(seconds: float) -> float:
        ends = fit(WARM_UP + 3, seconds)
        times = [1e3 * (b - a) for a, b in itertools.pairwise(ends)]
        average = statistics.mean if how.startswith("mean") else statistics.median
        return average(times[WARM_UP - 1 :])

    return ready(first, step, memory)


def ready(
    first: float, step: Callable[[float], float], memory: harness.Memory
) -> harness.Ready:
    """Return what is ready, given the seconds of the first step and how to time."""

    def peak(seconds: float) -> float | None:
        step(seconds)  # as it may be one step of many that takes more
        return memory.peak()

    return harness.Ready({"first": first}, {"time": step, "peak": peak})


def warmed_up(step: Callable[[], None], memory: harness.Memory) -> harness.Ready:
    """Take the first steps, and return what is ready."""
    [first] = harness.milliseconds(step, seconds=0, least=1)
    harness.milliseconds(step, seconds=0, least=2 * WARM_UP)

    def timed(seconds: float) -> float:
        return statistics.median(harness.milliseconds(step, seconds, WARM_UP))

    return ready(first / 1e3, timed, memory)


@functools.cache
def start_tensorflow() -> None:
    """Pay for the start of TensorFlow and XLA, so that no first step has to."""
    fit, _ = with_keras("SGD", Task(lambda layers: [], (1,), 1), "with XLA")
    fit(1, 0.0)


def batches(task: Task, how: str) -> tuple[Any, Any]:
    """Return inputs and labels, the same for every competitor."""
    import numpy as np

    rng = np.random.default_rng(0)
    size = TABLE_BATCHES if task.rows else BATCHES, task.batch
    y = rng.integers(CLASSES, size=size)
    if not task.rows:
        return rng.standard_normal((*size, *task.shape), "float32"), y
    u = rng.random((*size, *task.shape))
    if how.startswith("zipf"):  # the k-th id has a share of about 1 / k
        ids = np.minimum((task.rows + 1) ** u, task.rows) - 1
    else:
        ids = u * task.rows
    return ids.astype("int32"), y


def with_keras(
    who: str, task: Task, how: str
) -> tuple[Callable[[int, float], list[float]], harness.Memory]:
    """Return how to `fit` a new model, and the memory from before it was made."""
    import keras
    import tensorflow as tf

    class Floor(keras.optimizers.SGD):
        """Reads the gradients, so that they are computed, and updates nothing."""

        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            if not self.built:
                self.build(trainable_variables)
                self.total = self.add_variable((), name="total")
            slices = (g.values if isinstance(g, tf.IndexedSlices) else g for g in grads)
            self.total.assign(sum(map(tf.reduce_sum, slices)))
            self.iterations.assign_add(1)

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    quiet = tf.data.Options()
    # The thread of autotune may hold up the end of a `fit` by a second.
    quiet.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices(batches(task, how))
    data = data.repeat().with_options(quiet)
    memory = harness.Memory()
    model = keras.Sequential(
        [
            keras.Input(task.shape, dtype="int32" if task.rows else None),
            *task.hidden(keras.layers),
            keras.layers.Dense(CLASSES),
        ]
    )
    name = OPTIMIZERS.get(who, OPTIMIZERS["this"])
    optimizer = Floor if who == FLOOR else pkgutil.resolve_name(name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    jit = (JIT | TABLE_JIT)[how.rpartition(", ")[2]]
    options = TABLE_OPTIONS.get(who, {})
    watching = []
    if who == MONITOR:
        from keras_rmsprop.callbacks import Monitor

        watching = [Monitor()]
    model.compile(optimizer(**options), loss, jit_compile=jit)
    memory.forget_peak()

    def fit(steps: int, seconds: float) -> list[float]:
        """Return when the steps ended: at least so many, for at least so long."""
        ends: list[float] = []

        def end(batch: int, logs: Any) -> None:
            ends.append(time.perf_counter())
            if len(ends) >= steps and ends[-1] - ends[0] >= seconds:
                model.stop_training = True

        clock = keras.callbacks.LambdaCallback(on_train_batch_end=end)
        model.fit(
            data,
            callbacks=[*watching, clock],
            shuffle=False,
            steps_per_epoch=sys.maxsize,
            verbose=0,
        )
        return ends

    return fit, memory


def of_table(who: str, task: Task, how: str) -> harness.Ready:
    """Prepare updates of the table alone."""
    import keras
    import numpy as np
    import tensorflow as tf

    ids, _ = batches(task, how)
    ids = ids.reshape(len(ids), -1)
    shape = task.rows, task.width
    values = np.random.default_rng(0).standard_normal((ids.shape[1], shape[1]), "f")
    given = [(tf.constant(values), tf.constant(i)) for i in ids]
    memory = harness.Memory()
    table = keras.Variable(keras.ops.zeros(shape))
    optimizer = pkgutil.resolve_name(OPTIMIZERS[who])()
    optimizer.build([table])
    memory.forget_peak()

    def slices(values: Any, ids: Any) -> Any:
        return tf.IndexedSlices(values, ids, tf.constant(shape))

    if how.endswith(XLA_UPDATE):
        start_tensorflow()

        # Slices as arguments cost as much as a small step; a tape makes them inside.
        def update(values: Any, ids: Any) -> None:
            optimizer.apply([slices(values, ids)])

        apply = tf.function(update, jit_compile=True, autograph=False)
        turns = itertools.cycle(given)
        return warmed_up(lambda: apply(*next(turns)), memory)
    gradients = itertools.cycle([slices(*each) for each in given])
    return warmed_up(lambda: optimizer.apply([next(gradients)]), memory)


def with_torch(task: Task, how: str) -> harness.Ready:
    """Prepare the same model in PyTorch, its table trained by `SparseAdam`."""
    import torch
    from torch import nn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    x, y = map(torch.tensor, batches(task, how))
    data = itertools.cycle(zip(x, y, strict=True))
    memory = harness.Memory()
    table = torch.empty(task.rows, WIDTH).zero_()
    bag = nn.EmbeddingBag.from_pretrained(table, False, mode="mean", sparse=True)
    dense = nn.Linear(WIDTH, CLASSES)
    optimizers = (
        torch.optim.SparseAdam(bag.parameters()),
        torch.optim.Adam(dense.parameters()),
    )
    memory.forget_peak()

    def step() -> None:
        ids, labels = next(data)
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(dense(bag(ids)), labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    return warmed_up(step, memory)


if __name__ == "__main__":
    harness.serve(setup)
