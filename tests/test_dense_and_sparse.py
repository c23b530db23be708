"""A table with dense and sparse gradients in turn, each taken in a way of its own.

A function that was traced while the table had no silent rows must not pass by those
that it has later. The oracle is the built-in with dense gradients.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import WAYS

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("rows of embeddings")

BUILT_IN = keras.optimizers.RMSprop

LARGE = (2**20, 1)
"""As large as a table whose dense step in a function is a program of its own."""

DENSE_FIRST = "dense", "sparse", "sparse", "dense", "sparse", "dense", "sparse"
SPARSE_FIRST = "sparse", "sparse", "dense", "sparse", "sparse", "dense", "sparse"


def gradient(shape, step, kind):
    """Return a gradient with two rows, or such a one as a dense one with all rows."""
    rng = np.random.default_rng(step)
    values = tf.constant(rng.normal(size=(2, shape[1])), "float32")
    rows = tf.constant([step % 4, (step + 1) % 4])
    slices = tf.IndexedSlices(values, rows, tf.constant(shape))
    if kind == "sparse":
        return slices
    return tf.convert_to_tensor(slices) + (0.5 if kind == "dense" else 0.0)


def expected(shape, kinds, **options):
    """Return the first rows of the table and of its slots, from the built-in."""
    table = keras.Variable(np.ones(shape, "float32"))
    optimizer = BUILT_IN(0.1, **options)
    for step, kind in enumerate(kinds):
        made_dense = "dense" if kind == "dense" else "made dense"
        optimizer.apply([gradient(shape, step, made_dense)], [table])
    return [v.numpy()[:8] for v in [table, *optimizer.variables[2:]]]


def take_steps(steps, shape, kinds):
    """Take each step by the function for its kind."""
    for step, kind in enumerate(kinds):
        steps[kind]([gradient(shape, step, kind)])


def assert_equals_dense(optimizer, table, shape, kinds, **options):
    slots = optimizer.get_state().slots[0]
    found = [table.numpy(), *(slot for slot in slots if slot is not None)]
    for got, want in zip(found, expected(shape, kinds, **options), strict=True):
        np.testing.assert_allclose(got[:8], want, 1e-5, 1e-6)


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(DENSE_FIRST, id="dense first"),
        pytest.param(SPARSE_FIRST, id="sparse first", marks=pytest.mark.rest),
    ],
)
@pytest.mark.parametrize("jit_compile", ["auto", True])
@pytest.mark.parametrize(("dense", "sparse"), [*itertools.product(WAYS, WAYS)])
def test_each_way_with_each(dense, sparse, jit_compile, kinds):
    shape = (8, 2)
    table = keras.Variable(np.ones(shape, "float32"))
    optimizer = RMSprop(0.1, jit_compile=jit_compile)
    optimizer.build([table])
    steps = {"dense": WAYS[dense](optimizer), "sparse": WAYS[sparse](optimizer)}
    take_steps(steps, shape, kinds)
    assert_equals_dense(optimizer, table, shape, kinds)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("options", [{}, {"centered": True, "epsilon": 0.1}], ids=repr)
@pytest.mark.parametrize("kinds", [DENSE_FIRST, SPARSE_FIRST], ids=lambda k: k[0])
def test_a_large_table(kinds, options):
    table = keras.Variable(np.ones(LARGE, "float32"))
    optimizer = RMSprop(0.1, **options)
    optimizer.build([table])
    steps = {"dense": tf.function(optimizer.apply), "sparse": optimizer.apply}
    take_steps(steps, LARGE, kinds)
    assert_equals_dense(optimizer, table, LARGE, kinds, **options)


@pytest.mark.parametrize("kinds", [DENSE_FIRST, SPARSE_FIRST], ids=lambda k: k[0])
def test_both_in_one_function(kinds):
    shape = (8, 2)
    table = keras.Variable(np.ones(shape, "float32"))
    optimizer = RMSprop(0.1)
    optimizer.build([table])

    @tf.function
    def step(is_dense, values, rows):
        slices = tf.IndexedSlices(values, rows, tf.constant(shape))
        tf.cond(
            is_dense,
            lambda: optimizer.apply([tf.convert_to_tensor(slices) + 0.5]),
            lambda: optimizer.apply([slices]),
        )

    for n, kind in enumerate(kinds):
        slices = gradient(shape, n, "sparse")
        step(tf.constant(kind == "dense"), slices.values, slices.indices)
    assert_equals_dense(optimizer, table, shape, kinds)


@pytest.mark.parametrize("as_variable", [False, True], ids=["number", "variable"])
def test_rho_that_changes_while_rows_are_silent(as_variable):
    shape = (8, 2)

    def run(optimizer_class, kind):
        table = keras.Variable(np.ones(shape, "float32"))
        optimizer = optimizer_class(0.1, rho=0.9)
        rho = keras.Variable(0.9, trainable=False)
        if as_variable:
            optimizer.rho = rho
        for step, value in enumerate([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.7, 0.7, 0.7]):
            if as_variable:
                rho.assign(value)
            else:
                optimizer.rho = value
            optimizer.apply([gradient(shape, step, kind)], [table])
        return table.numpy()

    np.testing.assert_allclose(
        run(RMSprop, "sparse"), run(BUILT_IN, "made dense"), 1e-5
    )


@pytest.mark.parametrize(
    ("of_values", "of_ids", "bad"),
    [
        ([None, None], [None], tf.ones((2, 4))),
        ([None, None], [None], tf.ones((2, 1))),
        ([None, 3], [None], tf.ones((3, 3))),
        (None, None, tf.ones(2)),
    ],
)
def test_slices_whose_shape_is_wrong_at_last_change_nothing(of_values, of_ids, bad):
    table, bias = keras.Variable(np.ones((10, 3))), keras.Variable(np.ones(3))
    optimizer = RMSprop(0.01)
    optimizer.build([table, bias])
    signature = [tf.TensorSpec(of_values), tf.TensorSpec(of_ids, tf.int32)]

    @tf.function(input_signature=signature)
    def step(values, ids):
        slices = tf.IndexedSlices(values, ids, tf.constant([10, 3]))
        optimizer.apply([slices, tf.ones(3)])

    step(tf.ones((2, 3)), tf.constant([1, 2]))
    everything = [table, bias, *optimizer.variables]
    before = [v.numpy() for v in everything]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"shape|row for each"):
        step(bad, tf.constant([1, 2]))
    for v, old in zip(everything, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), old, v.path)


def test_a_table_without_columns():
    table = keras.Variable(np.ones((10, 0)))
    optimizer = RMSprop(gradient_accumulation_steps=2)
    for _ in range(3):
        slices = tf.IndexedSlices(tf.ones((2, 0)), tf.constant([1, 2]))
        optimizer.apply([slices], [table])
    assert int(optimizer.iterations) == 1


def test_the_rate_of_a_table_of_float64_is_found():
    found = []
    for densely in (False, True):
        # By its name, a dense gradient is that of a table, too.
        table = keras.Variable(np.zeros((6, 3)), dtype="float64", name="embeddings")
        optimizer = RMSprop("auto")
        for _ in range(30):
            slices = tf.IndexedSlices(
                tf.gather(table.value, [1, 4]) - 1, tf.constant([1, 4]), (6, 3)
            )
            gradient = tf.convert_to_tensor(slices) if densely else slices
            optimizer.apply([gradient], [table])
        found.append(optimizer.current_learning_rate)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 1e-5  # it begins at 1e-6
