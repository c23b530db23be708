"""Rows under XLA, by rows and as whole tables, give what dense gradients give."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import assert_close

from keras_rmsprop import RMSprop, tables

pytestmark = pytest.mark.tensorflow("rows of embeddings")

BUILT_IN = keras.optimizers.RMSprop
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"centered": True, "epsilon": 1e-2},
    {"clipnorm": 0.5},
    {"global_clipnorm": 1.0},
    {"weight_decay": 0.1},
    {"use_ema": True, "ema_momentum": 0.9},
    {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
    {"loss_scale_factor": 64.0},
]
OF_THIS = [{"learning_rate": "auto"}, {"learning_rate": "auto", "use_ema": True}]
"""The built-in has no such options: these are compared with dense, eager steps."""
BY_ROWS, WHOLE = 0, 10**9
"""Values of `tables.DENSE_RATIO`."""

programs = given(
    rows=st.integers(1, 300),
    width=st.sampled_from([(), (1,), (5,), (2, 3)]),
    count=st.integers(1, 60),
    ratios=st.lists(st.sampled_from([BY_ROWS, WHOLE]), min_size=1, max_size=2),
    steps=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    id_dtype=st.sampled_from(["int32", "int64"]),
    options=st.sampled_from(OPTIONS + OF_THIS),
    seed=st.integers(0, 2**31),
)


def check(rows, width, count, ratios, steps, dtype, id_dtype, options, seed):
    """Train a table by slices under XLA, and one by dense gradients; compare all."""
    rng, shape = np.random.default_rng(seed), (rows, *width)
    start = rng.integers(-8, 9, shape) / 8
    given = {"learning_rate": 0.05, "epsilon": 1e-3} | options
    is_auto = given["learning_rate"] == "auto"
    table = keras.Variable(start, dtype=dtype, name="embeddings")
    other_dtype = dtype if is_auto else "float64"
    twin = keras.Variable(start, dtype=other_dtype, name="embeddings")
    ours, other = RMSprop(**given), (RMSprop if is_auto else BUILT_IN)(**given)
    ours.build([table])
    other.build([twin])
    applies = [tf.function(lambda g: ours.apply([g]), jit_compile=True) for _ in ratios]
    of_weights = "average", "estimate", "first_weight"
    for step in range(steps):
        # Zipf, so with many repeats; some outside the table, which XLA leaves out.
        ids = np.minimum(rng.zipf(1.3, count) - 2, rows)
        values = rng.integers(-16, 17, (count, *width)) / 16  # exact in bfloat16
        inside = (ids >= 0) & (ids < rows)
        dense = np.zeros(shape)
        np.add.at(dense, ids[inside], values[inside])
        gradient = tf.IndexedSlices(
            tf.constant(values, dtype), tf.constant(ids, id_dtype)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "DENSE_RATIO", ratios[step % len(ratios)])
            applies[step % len(ratios)](gradient)
        other.apply([tf.constant(dense, "float32" if is_auto else "float64")], [twin])
    coarse = 0.03 if dtype == "bfloat16" else 3e-5  # weights are rounded at each step

    def compare(mine, theirs, near):
        assert_close(*([np.asarray(x, "float64")] for x in (mine, theirs)), near)

    compare(table, twin, coarse)
    kept = {v.name: v for v in ours.variables}
    for v in other.variables:
        is_rounded = is_auto or any(word in v.name for word in of_weights)
        compare(kept[v.name], v, coarse if is_rounded else 3e-5)


@pytest.mark.slow
@settings(max_examples=6)
@programs
def test_random_programs(**program):
    check(**program)


@pytest.mark.rest
@settings(max_examples=400, derandomize=False, print_blob=True)
@programs
def test_many_random_programs(**program):
    check(**program)
