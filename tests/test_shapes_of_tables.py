"""Every option on tables of every shape: rows give what dense gradients give."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("rows of embeddings")

SHAPES = [
    (6,),
    (5000,),  # so large that the search looks at some elements only
    (5000, 1),
    (7, 0),
    (1, 3),
    (1, 4100),
    (20, 210),
    (1400, 3),
    (6, 2, 3),
    (3, 40, 41),
]
OPTIONS = {
    "defaults": {},
    "auto": {"learning_rate": "auto"},
    "EMA": {"use_ema": True, "ema_momentum": 0.5},
    "auto, EMA": {"learning_rate": "auto", "use_ema": True, "ema_warmup": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation, EMA": {"gradient_accumulation_steps": 2, "use_ema": True},
    "bfloat16": {"slot_dtype": "bfloat16"},
    "bfloat16, centered": {
        "slot_dtype": "bfloat16",
        "centered": True,
        "epsilon": 1e-2,
    },
    "bytes": {"slot_dtype": "uint8"},
    "centered": {"centered": True, "epsilon": 1e-2},
    "momentum": {"momentum": 0.9},
    "lazy": {"momentum": 0.9, "weight_decay": 0.1, "sparse_update": "lazy"},
    "lazy, bytes": {"momentum": 0.9, "slot_dtype": "uint8", "sparse_update": "lazy"},
    "lazy, auto, accumulation": {
        "learning_rate": "auto",
        "gradient_accumulation_steps": 2,
        "sparse_update": "lazy",
    },
    "skipping, clipping": {"skip_nonfinite": True, "global_clipnorm": 1.0},
    "cautious, lazy": {"momentum": 0.9, "cautious": True, "sparse_update": "lazy"},
}
WAYS = {
    "eager": lambda optimizer: optimizer.apply,
    "portable": lambda optimizer: optimizer.apply,
    "tf.function": lambda optimizer: tf.function(
        optimizer.apply, reduce_retracing=True
    ),
    "XLA": lambda optimizer: tf.function(optimizer.apply, jit_compile=True),
}


def gradients(shape, way):
    """Yield gradients by rows, and as dense ones: some with repeats, one without rows.

    The last one is of all rows.
    """
    rng = np.random.default_rng(0)
    n = shape[0]
    for size in (3, 3, 3, 3) if way == "XLA" else (3, 2, 0, 4):
        ids = rng.integers(0, n, size)
        values = rng.normal(size=(size, *shape[1:])).astype("float32")
        dense = np.zeros(shape, "float32")
        np.add.at(dense, ids, values)
        yield tf.IndexedSlices(tf.constant(values), tf.constant(ids)), dense


def trained(shape, options, way, sparse):
    """Return the weights after each step, and what the optimizer remembers then."""
    start = np.random.default_rng(1).normal(size=shape)
    # With "auto" a dense gradient is that of a table only by this name.
    name = "embeddings" if "learning_rate" in options else "table"
    table = keras.Variable(start, dtype="float32", name=name)
    scalar = keras.Variable(1.0, name="scalar")
    keras.utils.set_random_seed(0)  # where random rounding starts
    given = {"learning_rate": 0.05, "epsilon": 1e-3} | options
    optimizer = RMSprop(**given, jit_compile=False if way == "portable" else "auto")
    optimizer.build([table, scalar])
    apply = WAYS[way](optimizer) if sparse else optimizer.apply
    weights = []
    for rows, dense in gradients(shape, way):
        apply([rows if sparse else tf.constant(dense), tf.constant(0.5)])
        weights.append(table.numpy())
    return weights, [v.numpy() for v in optimizer.variables], optimizer


@pytest.mark.slow
@pytest.mark.one_in(80)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_give_what_dense_gradients_give(name, shape, way):
    options = OPTIONS[name]
    weights, state, optimizer = trained(shape, options, way, sparse=True)
    is_lazy = options.get("sparse_update") == "lazy"
    if not (is_lazy and {"momentum", "weight_decay"} & {*options}):
        expected, expected_state, _ = trained(shape, options, way, sparse=False)
        # A byte keeps two digits, bfloat16 three; rows are rounded in another order.
        rounded = {"bfloat16": 2e-2, "uint8": 0.1}.get(options.get("slot_dtype"), 0)
        assert_close(weights, expected, rounded or 2e-5)
        if not rounded:
            assert_close(state, expected_state, 2e-5)
    if is_lazy:
        moved = np.zeros(shape[:1], bool)
        for rows, _ in gradients(shape, way):
            moved[rows.indices.numpy()] = True
        start = np.random.default_rng(1).normal(size=shape).astype("float32")
        changed = (weights[-1] != start).reshape(shape[0], -1).any(1)
        np.testing.assert_array_equal(changed, moved & (0 not in shape))
    assert optimizer.explain()


class Biases(keras.Model):
    """Looks up a number for each id, as item biases are."""

    def __init__(self, shape):
        super().__init__()
        self.table = self.add_weight(shape=shape, name="biases", initializer="zeros")

    def call(self, ids):
        rows = tf.gather(self.table, ids[:, 0])
        return tf.reduce_sum(tf.reshape(rows, [tf.size(ids), -1]), 1, keepdims=True)


@pytest.mark.slow
@pytest.mark.one_in(24)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", ["auto", "bfloat16", "auto, EMA", "accumulation"])
@pytest.mark.parametrize("shape", [(5000,), (5000, 1), (4100, 2, 1)], ids=str)
def test_in_fit(shape, name, jit_compile):
    ids = np.arange(0, 4096, 32).reshape(-1, 1)
    ends = []
    for jit in (jit_compile, None):
        keras.utils.set_random_seed(0)
        model = Biases(shape)
        options = {"learning_rate": 0.05} | OPTIONS[name]
        model.compile(RMSprop(**options), "mse", jit_compile=jit is True)
        if jit is None:  # dense: the oracle
            model.optimizer.build(model.trainable_variables)
            model.optimizer._clocks.refused.add(model.optimizer._var_key(model.table))
        model.fit(ids, np.ones(ids.shape), batch_size=16, verbose=0, shuffle=False)
        ends.append([model.table.numpy()])
    assert np.abs(ends[0][0]).max() > 0
    assert_close(*ends, 3e-2 if name == "bfloat16" else 1e-5)
