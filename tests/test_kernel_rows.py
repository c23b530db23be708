"""The native update of rows of a table: against the portable one, and its checks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from stepping import examples
from test_kernel import DTYPES, copied, needs_kernel, update_of, values

from keras_rmsprop import RMSprop, estimate, rule
from keras_rmsprop.backends import current as backend
from keras_rmsprop.codecs import Draw
from keras_rmsprop.estimate import Sampled
from keras_rmsprop.kernel import rows as kernel_rows
from keras_rmsprop.kernel import tensorflow as kernel
from keras_rmsprop.rule import Slots
from keras_rmsprop.sampling import Sample
from keras_rmsprop.sparse import Clock, Rows
from keras_rmsprop.update import Constants, Update

pytestmark = pytest.mark.tensorflow("the native kernel")

ROWS = 50
UPDATES = 40


def clock_of(table, last):
    clock = Clock(table)
    clock.updates.assign(UPDATES)
    clock.last.assign(last)
    return clock


@needs_kernel
@given(
    dtypes=st.sampled_from(DTYPES),
    of_ids=st.sampled_from(["int32", "int64"]),
    of_row=st.sampled_from([(), (1,), (7,), (3, 5), (0,), (64,), (9001,)]),
    count=st.sampled_from([0, 1, 13, ROWS]),
    options=st.builds(
        rule.Options,
        rho=st.sampled_from([0.0, 0.9, 0.999]),
        momentum=st.sampled_from([0.0, 0.9]),
        epsilon_inside_sqrt=st.booleans(),
        bias_correction=st.booleans(),
        nesterov=st.booleans(),
        lr_in_momentum=st.booleans(),
        maximize=st.booleans(),
        epsilon=st.sampled_from([1e-7, 1.0]),
        cautious=st.just(False),
    ),
    decay=st.sampled_from([None, 0.01]),
    decoupled=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
@examples(60)
def test_is_the_portable_way(
    dtypes, of_ids, of_row, count, options, decay, decoupled, scale, seed
):
    rng = np.random.default_rng(seed)
    weights, slots = dtypes
    one = update_of((ROWS, *of_row), weights, slots, options, rng, decay)
    if one.slots.average_gradient is not None:  # v is at least a^2
        small = one.slots.average_gradient * 0.01
        one.slots.average_gradient.assign(small)
    one = one._replace(gradient=tf.cast(rng.normal(size=(count, *of_row)), slots))
    [expected] = copied([one])
    ids = tf.constant(rng.permutation(ROWS)[:count], of_ids)
    last = rng.integers(0, UPDATES + 1, ROWS)
    one, expected = (
        x._replace(rows=Rows(clock_of(x.variable, last), ids)) for x in (one, expected)
    )
    scale = None if scale is None else tf.constant(scale, "float64")
    step = Constants(options, 0.01, Draw(None, tf.constant(2)), decoupled, scale, True)
    assert kernel.why_not_for(one, step) == ""
    kernel_rows.update_rows(one, step)
    backend.update([expected], step._replace(kernel=False), in_program=False)
    # What lies between two numbers of 16 bits may be rounded to either.
    rtol = {"float16": 2e-3, "bfloat16": 2e-2}.get(weights, 2e-6)
    rtol = 1e-13 if dtypes == ("float64", "float64") else rtol
    for got, want in zip(values([one]), values([expected]), strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * 1e-2)
    ticks = (x.rows.clock.variables for x in (one, expected))
    for got, want in zip(*ticks, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def table_update(ids, **changed):
    variable = tf.Variable(tf.ones((4, 3)))
    slots = Slots(tf.Variable(tf.ones((4, 3))))
    clock = clock_of(variable, [UPDATES, 0, 0, 0])
    gradient = tf.ones((len(ids), 3))
    one = Update(variable, gradient, slots, rows=Rows(clock, tf.constant(ids)))
    return one._replace(**changed)


STEP = Constants(rule.Options(), 0.01, Draw(None, 0), kernel=True)


@needs_kernel
@pytest.mark.parametrize(
    ("ids", "changed", "message"),
    [
        ([0, 4], {}, r"not in \[0, 4\)"),
        ([-1, 0], {}, r"not in \[0, 4\)"),
        ([0, 1], {"gradient": tf.ones((3, 3))}, "a row for each index"),
        ([0, 1], {"gradient": tf.ones((2, 2))}, "shape"),
        ([0, 1], {"slots": Slots(tf.Variable(tf.ones((3, 3))))}, "shape"),
    ],
)
def test_bad_input_changes_nothing(ids, changed, message):
    one = table_update(ids, **changed)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        kernel_rows.update_rows(one, STEP)
    for v in (one.variable, one.slots.velocity):
        np.testing.assert_array_equal(v.numpy(), np.ones(v.shape))
    clock = one.rows.clock
    assert clock.updates.numpy() == UPDATES
    np.testing.assert_array_equal(clock.last.numpy(), [UPDATES, 0, 0, 0])


@needs_kernel
@given(
    dtype=st.sampled_from(["float32", "float64"]),
    of_ids=st.sampled_from(["int32", "int64"]),
    of_row=st.sampled_from([(), (1,), (3, 5), (0,), (9001,)]),
    count=st.sampled_from([0, 1, 13, 300]),
    rows=st.sampled_from([1, 7, 1000, 2**31 - 1]),
    seed=st.integers(0, 2**31),
)
@examples(40)
def test_slices_of_a_row_are_summed(dtype, of_ids, of_row, count, rows, seed):
    rng = np.random.default_rng(seed)
    slices = rng.normal(size=(count, *of_row)).astype(dtype)
    ids = rng.integers(0, rows, count).astype(of_ids)
    sums, found = kernel_rows.distinct(tf.IndexedSlices(slices, ids))
    want, first = np.unique(ids, return_index=True)
    np.testing.assert_array_equal(found, ids[np.sort(first)])
    assert found.dtype == of_ids
    for id_, sum_ in zip(found.numpy(), sums.numpy(), strict=True):
        expected = slices[ids == id_].astype("float64").sum(axis=0)
        np.testing.assert_allclose(sum_, expected, rtol=1e-5, atol=1e-5)
    assert len(want) == len(sums)


@needs_kernel
def test_slices_need_an_index_each():
    with pytest.raises(tf.errors.InvalidArgumentError, match="slice for each index"):
        kernel_rows.distinct(tf.IndexedSlices(tf.ones((3, 2)), tf.constant([1, 2])))


@needs_kernel
@given(
    dtypes=st.sampled_from(DTYPES).filter(lambda d: d[1] in ("float32", "float64")),
    of_ids=st.sampled_from(["int32", "int64"]),
    shape=st.sampled_from(
        [(50,), (5000,), (70, 100), (1000, 7), (50, 9, 20), (50, 0), (600, 1)]
    ),
    every=st.sampled_from([1, 4]),
    count=st.sampled_from([0, 1, 13, 50]),
    seed=st.integers(0, 2**31),
)
@examples(60)
def test_a_search_follows_rows_as_the_portable_way_does(
    dtypes, of_ids, shape, every, count, seed
):
    rng = np.random.default_rng(seed)
    of_weights, dtype = dtypes
    sample = Sample(shape, every)
    ids = tf.constant(rng.permutation(shape[0])[:count], of_ids)
    first, sums = rng.normal(size=(2, *sample.shape))
    weights = rng.normal(size=shape)
    last = rng.integers(0, UPDATES + 1, shape[0])
    gradient = tf.cast(rng.normal(size=(count, *shape[1:])), dtype)
    found = []
    for of in (kernel, None):
        table = tf.Variable(tf.cast(weights, of_weights))
        kept = [tf.Variable(tf.cast(x, dtype)) for x in (first, sums)]
        clock = clock_of(table, last)
        clock.sum.assign(100.0)
        part = Sampled(table, gradient, *kept, sample, Rows(clock, ids))
        assert kernel_rows.follow_rows(part, 0.0, 1.0) is not None or of is None
        got = estimate._follow_rows(part, tf.constant(0.3), False, of)
        found.append([*got[:2], clock.sum, *kept, clock.last, clock.updates])
    rtol = 1e-5 if dtype == "float32" else 1e-6  # the sum of all is in float32
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=rtol, atol=rtol * 100)


@needs_kernel
@given(
    dtype=st.sampled_from(["float32", "float64"]),
    of_ids=st.sampled_from(["int32", "int64"]),
    of_row=st.sampled_from([(), (1,), (7,), (3, 5), (0,), (64,), (9001,)]),
    count=st.sampled_from([0, 1, 13, ROWS]),
    each=st.booleans(),
    seed=st.integers(0, 2**31),
)
@examples(40)
def test_averages_of_rows_follow_to_the_bit(dtype, of_ids, of_row, count, each, seed):
    rng = np.random.default_rng(seed)
    weights, average = rng.normal(size=(2, ROWS, *of_row)).astype(dtype)
    ids = rng.permutation(ROWS)[:count].astype(of_ids)
    shares = rng.uniform(size=count if each else ())
    table, got = tf.Variable(weights), tf.Variable(average)
    kernel_rows.average_rows(table, got, tf.constant(ids), tf.constant(shares))
    m, rest = (
        np.reshape(x, [-1] + [1] * len(of_row)).astype(dtype)
        for x in (shares, 1 - shares)
    )
    average[ids] = m * average[ids] + rest * weights[ids]
    np.testing.assert_array_equal(got.numpy(), average)
    np.testing.assert_array_equal(table.numpy(), weights)


@needs_kernel
def test_bad_rows_leave_averages_and_sums_as_they_are():
    table, average = tf.Variable(tf.ones((4, 3))), tf.Variable(tf.zeros((4, 3)))
    wrong = tf.Variable(tf.zeros((3, 3)))
    for kept, ids, shares, message in [
        (average, [0, 4], 0.5, r"not in \[0, 4\)"),
        (average, [-1], 0.5, r"not in \[0, 4\)"),
        (average, [0, 1], [0.5], "share for each index"),
        (wrong, [0], 0.5, "shape"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            kernel_rows.average_rows(table, kept, tf.constant(ids), tf.constant(shares))
    first, sums = tf.Variable(tf.zeros((4, 3))), tf.Variable(tf.zeros((4, 3)))
    clock = clock_of(table, [0, 0, 0, 0])
    for kept, ids, width, message in [
        (sums, [0, 4], 3, r"not in \[0, 4\)"),
        (sums, [0], 3, "a row for each index"),
        (sums, [0, 1], 2, "shape"),
        (wrong, [0, 1], 3, "the elements that are looked at"),
    ]:
        rows = Rows(clock, tf.constant(ids))
        g = tf.ones((2, width))
        part = Sampled(table, g, first, kept, Sample((4, 3), 1), rows)
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            kernel_rows.follow_rows(part, 1.0, 0.5)
    for variable in (average, wrong, first, sums):
        assert not variable.numpy().any()


@needs_kernel
@given(
    dtype=st.sampled_from(["float32", "float64"]),
    size=st.sampled_from([0, 1, 31, 32, 33, 2047, 2048, 2049, 100_001]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
@examples(40)
def test_logarithms_are_summed(dtype, size, scale, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=size) * scale).astype(dtype)
    x[rng.random(size) < 0.1] = 0
    others = [np.nan, np.inf, -np.inf, 0.0]
    x[rng.random(size) < 0.05] = rng.choice(others)
    total, count = kernel.logs(tf.constant(x))
    counts = np.isfinite(x) & (np.abs(x) > np.finfo(dtype).tiny)
    assert count.numpy() == counts.sum()
    want = np.log(np.abs(x[counts].astype("float64"))).sum()
    rtol = 1e-6 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(total.numpy(), want, rtol=rtol, atol=rtol * (size + 1))


@needs_kernel
@pytest.mark.parametrize("given", [{}, {"use_ema": True}, {"learning_rate": "auto"}])
def test_a_step_gathers_and_scatters_no_row_of_weights(given):
    table = keras.Variable(tf.ones((5000, 8)), name="embeddings")
    optimizer = RMSprop(**given)
    optimizer.build([table])

    @tf.function
    def step(slices, ids):
        optimizer.apply([tf.IndexedSlices(slices, ids)])

    ids = tf.constant([1, 4, 1, 4999])
    step(tf.ones((4, 8)), ids)
    graph = step.get_concrete_function(tf.ones((4, 8)), ids).graph
    moved = [
        op.outputs[0] if op.type == "ResourceGather" else op.inputs[2]
        for op in graph.get_operations()
        if op.type in ("ResourceGather", "ResourceScatterUpdate")
    ]
    assert moved or not optimizer.use_ema
    assert all(tensor.shape.rank == 1 for tensor in moved)  # of a clock


@needs_kernel
def test_what_was_read_before_stays_as_it_is():
    one = table_update([1, 2])
    read = [v.read_value() for v in (one.variable, one.slots.velocity)]
    kernel_rows.update_rows(one, STEP)
    for x in read:
        np.testing.assert_array_equal(x.numpy(), np.ones((4, 3)))
    assert one.variable.numpy()[1, 0] < 1
    np.testing.assert_array_equal(one.variable.numpy()[[0, 3]], np.ones((2, 3)))


@pytest.mark.one_in(3)
@needs_kernel
@pytest.mark.parametrize("how", ["eager", "tf.function", "fit", "XLA around it"])
def test_everywhere_but_inside_xla(how, monkeypatch):
    calls = []
    original = kernel_rows.update_rows
    monkeypatch.setattr(
        kernel_rows, "update_rows", lambda *args: (calls.append(1), original(*args))
    )
    table = keras.layers.Embedding(20, 4)
    model = keras.Sequential([keras.Input((3,)), table, keras.layers.Flatten()])
    optimizer = RMSprop(0.01)
    x = np.array([[0, 1, 1], [7, 7, 7]])
    if how == "fit":
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(x, np.ones((2, 12)), verbose=0)
    else:
        optimizer.build(model.trainable_variables)

        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x) - 1))
            optimizer.apply(tape.gradient(loss, model.trainable_variables))

        if how != "eager":
            step = tf.function(step, jit_compile=how.startswith("XLA"))
        step()
    assert bool(calls) == (not how.startswith("XLA"))
    assert "in one native call" in optimizer.explain()


@needs_kernel
def test_threads_share_the_rows():
    found = []
    for jit_compile in ("auto", False):
        rng = np.random.default_rng(0)
        table = keras.Variable(rng.normal(size=(5000, 64)))
        optimizer = RMSprop(0.01, centered=True, jit_compile=jit_compile)
        optimizer.build([table])
        for _ in range(3):
            ids, slices = rng.integers(0, 5000, 6000), rng.normal(size=(6000, 64))
            slices = tf.constant(slices, "float32")
            optimizer.apply([tf.IndexedSlices(slices, tf.constant(ids))])
        found.append([v.numpy() for v in (table, *optimizer.variables)])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
