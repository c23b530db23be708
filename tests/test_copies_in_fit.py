"""A step of `fit` copies no table: what it costs depends on the batch alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("rows of embeddings")

ROWS, WIDTH = 4999, 8
OPTIONS = {
    "plain": {},
    "auto": {"learning_rate": "auto"},
    "EMA": {"use_ema": True},
    "auto, EMA": {"learning_rate": "auto", "use_ema": True, "ema_warmup": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation, auto": {
        "learning_rate": "auto",
        "gradient_accumulation_steps": 2,
        "use_ema": False,
    },
    "lazy": {"momentum": 0.9, "sparse_update": "lazy", "use_ema": True},
}


def addresses(variable):
    """Return where two reads of a variable are in memory."""
    reads = [
        tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
        for _ in range(2)
    ]
    return [np.asarray(memoryview(read)).ctypes.data for read in reads]


def of_table(model):
    """Return all variables that have a row, or a number, for each row of the table."""
    optimizer = model.optimizer
    clock = optimizer._clocks[0]
    found = [
        *(v.value for v in [*model.variables, *optimizer._variables]),
        *clock.variables,
        *(clock.average.variables if clock.average is not None else ()),
    ]
    return [v for v in found if v.shape.rank and v.shape[0] == ROWS]


@pytest.mark.slow
@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_read_and_no_write_copies_a_table(name):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(list(map(addresses, of_table(self.model))))

    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(ROWS, WIDTH),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(RMSprop(**OPTIONS[name]), "mse", jit_compile=False)
    ids = np.random.default_rng(0).integers(0, ROWS, (64, 4))
    model.fit(ids, ids[:, :1] / ROWS, batch_size=8, verbose=0, callbacks=[Look()])
    assert len(seen) == 8
    assert len(seen[-1]) >= 3  # table, v, and last updates at least
    for of_step in seen[2:]:  # the first steps may begin something
        for first, second in of_step:
            assert first == second  # a read shares the memory of the variable ...
        assert of_step == seen[2]  # ... and a write does not move it


@pytest.mark.slow
def test_nothing_but_reads_is_as_long_as_a_table_that_accumulates():
    # Unless it is not known which rows have sums: that is one branch.
    optimizer = RMSprop(gradient_accumulation_steps=2)
    table = keras.Variable(np.ones((ROWS, WIDTH), "float32"))
    optimizer.build([table])
    step = tf.function(
        lambda ids: optimizer.apply([tf.IndexedSlices(tf.ones((2, WIDTH)), ids)])
    )
    graph = step.get_concrete_function(tf.constant([1, 2])).graph
    graphs = [graph, *(f.graph for f in graph._functions.values())]
    kinds = {
        op.type
        for g in graphs
        for op in g.get_operations()
        for output in op.outputs
        if output.shape.rank and output.shape[0] == ROWS
    }
    assert "Where" not in {op.type for op in graph.get_operations()}
    assert "Where" in {op.type for g in graphs for op in g.get_operations()}
    assert kinds <= {"ReadVariableOp", "NotEqual", "Any"}
