"""Gradients of tables that `gradient_accumulation_steps` sums: by rows, as if dense."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import table_model
from stepping import assert_close, examples

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("rows of embeddings")

ROWS, WIDTH = 40, 3


def gradients(kinds, seed=0):
    """Return for each step a gradient of a table, and what it is if dense."""
    random = np.random.default_rng(seed)
    for kind in kinds:
        ids = random.integers(0, ROWS, random.integers(1, 5))
        values = random.normal(size=(len(ids), WIDTH)).astype("float32")
        dense = np.zeros((ROWS, WIDTH), "float32")
        np.add.at(dense, ids, values)
        given = tf.constant(dense)
        if kind == "rows":
            slices = tf.constant(values), tf.constant(ids), tf.constant([ROWS, WIDTH])
            given = tf.IndexedSlices(*slices)
        if kind == "none":
            yield None, None
        else:
            yield given, tf.constant(dense)


def made(optimizer):
    variables = [
        keras.Variable(np.random.default_rng(1).normal(size=shape), dtype="float32")
        for shape in ((ROWS, WIDTH), (2,))
    ]
    optimizer.build(variables)
    return variables


def assert_all_close(variables, optimizer, expected_variables, expected):
    theirs = [*expected_variables, *expected.variables]
    for a, b in zip([*variables, *optimizer.variables], theirs, strict=True):
        scale = np.abs(b.numpy()).max(initial=1e-3)
        np.testing.assert_allclose(
            a.numpy(), b.numpy(), 0, 2e-6 * scale, err_msg=b.path
        )


def check(kinds, way="eager", every=3, look=False, seed=0, **options):
    """Compare with the built-in on dense gradients, at the end or after every step."""
    options = {"learning_rate": 0.05, "epsilon": 1e-3} | options
    options["gradient_accumulation_steps"] = every
    optimizer, expected = RMSprop(**options), keras.optimizers.RMSprop(**options)
    variables, theirs = made(optimizer), made(expected)
    apply = optimizer.apply
    if way == "tf.function":
        # Which tables have rows is known to one function alone: a clock comes first.
        apply = tf.function(optimizer.apply, reduce_retracing=True)
    for step, (gradient, dense) in enumerate(gradients(kinds, seed)):
        other = tf.constant([0.1 * step, 1.0])
        apply([gradient, other])
        expected.apply([dense, other])
        if look:
            assert_all_close(variables, optimizer, theirs, expected)
    assert_all_close(variables, optimizer, theirs, expected)
    return optimizer


OPTIONS = [
    {},
    {"centered": True},
    {"momentum": 0.9},
    {"global_clipnorm": 0.5, "loss_scale_factor": 8.0},
    {"weight_decay": 0.1},
    {"use_ema": True, "ema_momentum": 0.5},
]


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_the_built_in_on_dense_gradients_gives_the_same(options, way):
    check(["rows"] * 14, way, **options)


@pytest.mark.slow
@examples(15)
@given(
    kinds=st.lists(
        st.sampled_from(["rows", "rows", "dense", "none"]), min_size=4, max_size=14
    ),
    every=st.integers(2, 4),
    look=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(["rows", "rows", "dense", "rows", "rows", "rows"], 2, False, 0)
@example(["rows", "rows", "rows", "none", "rows", "rows"], 2, False, 0)
def test_whatever_comes_in_between(kinds, every, look, seed):
    check(kinds, every=every, look=look, seed=seed)


@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_silent_rows_are_left_alone(way):
    optimizer = RMSprop(0.05, gradient_accumulation_steps=2)
    made(optimizer)
    apply = optimizer.apply if way == "eager" else tf.function(optimizer.apply)

    def step(*ids):
        values = tf.ones((len(ids), WIDTH))
        slices = tf.IndexedSlices(values, tf.constant(ids), tf.constant([ROWS, WIDTH]))
        apply([slices, tf.ones(2)])

    for _ in range(2):  # the first sums may have come in any way
        step(0, 1)
        step(2)
    stale = optimizer._velocities[0].numpy()
    step(3, 5)
    step(5, 7)
    changed = (optimizer._velocities[0].numpy() != stale).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [3, 5, 7]
    assert not optimizer._accumulated_gradients[0].numpy().any()
    expected = 0.1 * np.square([0.5, 1, 0.5])
    v = optimizer._velocities[0].numpy()[[3, 5, 7], 0]
    np.testing.assert_allclose(v, expected, 1e-5)
    assert "all rows" not in optimizer.explain()


def test_the_rows_that_have_sums_are_known():
    optimizer = RMSprop(0.05, gradient_accumulation_steps=3)
    made(optimizer)
    known = []
    for ids in ([0, 1], [5, 1, 5], [2], [7, 3], [3], [7]):
        values = tf.ones((len(ids), WIDTH))
        optimizer.apply([tf.IndexedSlices(values, tf.constant(ids)), tf.ones(2)])
        clock = optimizer._clocks[0]
        known.append(sorted(clock.pending.numpy().tolist()))
    assert known == [[0, 1], [0, 1, 5], [], [3, 7], [3, 7], []]
    assert not clock.all_pending.numpy()
    _ = optimizer.variables  # to which a reader may write
    assert clock.all_pending.numpy()


def test_lazily_the_rows_of_all_the_calls_are_updated():
    optimizer = RMSprop(
        0.05, momentum=0.9, gradient_accumulation_steps=2, sparse_update="lazy"
    )
    table, _ = made(optimizer)
    steps = list(gradients(["rows"] * 4))
    for gradient, _ in steps[:2]:
        optimizer.apply([gradient, tf.ones(2)])
    before = table.numpy()
    for gradient, _ in steps[2:]:
        optimizer.apply([gradient, tf.ones(2)])
    moved = np.flatnonzero((table.numpy() != before).any(axis=1))
    ids = np.concatenate([gradient.indices.numpy() for gradient, _ in steps[2:]])
    assert moved.tolist() == np.unique(ids).tolist()


def test_a_bad_step_in_between_adds_nothing():
    options = {"learning_rate": 0.05, "gradient_accumulation_steps": 2}
    optimizer = RMSprop(skip_nonfinite=True, **options)
    expected = keras.optimizers.RMSprop(**options)
    variables, theirs = made(optimizer), made(expected)
    for step, (gradient, dense) in enumerate(gradients(["rows"] * 6)):
        if step % 2:
            bad = gradient.values * np.nan
            slices = tf.IndexedSlices(bad, gradient.indices, gradient.dense_shape)
            optimizer.apply([slices, tf.ones(2)])
        optimizer.apply([gradient, tf.ones(2)])
        expected.apply([dense, tf.ones(2)])
    assert int(optimizer.skipped_steps) == 3
    ours = [v.numpy() for v in [*variables, *optimizer.variables[:-1]]]
    assert_close(ours, [v.numpy() for v in [*theirs, *expected.variables]], 1e-6)


def test_sums_that_are_set_count():
    """Whoever writes to `variables` is not asked which rows."""
    options = {"learning_rate": 0.05, "gradient_accumulation_steps": 2}
    optimizer, expected = RMSprop(**options), keras.optimizers.RMSprop(**options)
    variables, theirs = made(optimizer), made(expected)
    assert "gradient_accumulator" in optimizer.variables[2].path
    for step, (gradient, dense) in enumerate(gradients(["rows"] * 9)):
        if step in (2, 5):  # at the start of a window, and within one
            for one in optimizer, expected:
                state = [v.numpy() for v in one.variables]
                state[2] += 1.0  # after two numbers come the sums of the table
                one.set_weights(state)
        optimizer.apply([gradient, tf.ones(2)])
        expected.apply([dense, tf.ones(2)])
        assert_all_close(variables, optimizer, theirs, expected)


def test_switched_off_and_on_again():
    options = {"learning_rate": 0.05, "gradient_accumulation_steps": 2}
    optimizer, expected = RMSprop(**options), keras.optimizers.RMSprop(**options)
    variables, theirs = made(optimizer), made(expected)
    for step, (gradient, dense) in enumerate(gradients(["rows"] * 8)):
        for one in optimizer, expected:
            one.gradient_accumulation_steps = None if step < 2 else 2
        optimizer.apply([gradient, tf.ones(2)])
        expected.apply([dense, tf.ones(2)])
    assert_all_close(variables, optimizer, theirs, expected)


@pytest.mark.slow
def test_in_fit():
    ids = np.random.default_rng(0).integers(0, 12, (24, 4))
    ends = []
    for kind in RMSprop, keras.optimizers.RMSprop:
        model = table_model(kind(0.05, gradient_accumulation_steps=2))
        model.fit(ids, ids.mean(1), batch_size=2, epochs=2, verbose=0, shuffle=False)
        ends.append([v.numpy() for v in [*model.weights, *model.optimizer.variables]])
    assert_close(*ends, 1e-5)
