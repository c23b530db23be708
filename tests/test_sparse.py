"""Rows of tables, with `tf.Variable`s and no optimizer, against dense NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rmsprop import sparse
from keras_rmsprop.codecs import Draw
from keras_rmsprop.rule import Slots

pytestmark = pytest.mark.tensorflow("rows of embeddings")

DRAW = Draw(None, 0)
RHO, ROWS, WIDTH = 0.9, 5, 2


def slices(ids, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).normal(size=(len(ids), WIDTH))
    return tf.IndexedSlices(tf.constant(values, dtype), tf.constant(ids))


def summed(gradient, rows=ROWS):
    whole = np.zeros((rows, WIDTH))
    np.add.at(whole, gradient.indices.numpy(), gradient.values.numpy())
    return whole


def table(value=1.0):
    return tf.Variable(tf.fill([ROWS, WIDTH], value))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("ids", [[3, 0, 3, 3], [1], [4, 2, 0]])
@pytest.mark.parametrize("xla", [False, True])
def test_distinct_rows_and_their_sums(ids, xla):
    gradient = slices(ids)
    clock = sparse.Clock(table())
    clock.last.assign([5, 0, 7, 7, 1])
    distinct = tf.function(lambda g: sparse.distinct(g, clock), jit_compile=xla)
    values, rows = distinct(gradient)
    np.testing.assert_array_equal(clock.last, [5, 0, 7, 7, 1])
    # XLA has as many rows as slices: those left over are 0, and outside the table.
    assert len(rows) == (len(ids) if xla else len({*ids}))
    real = rows.numpy() < ROWS
    assert sorted(rows.numpy()[real]) == sorted({*ids})
    assert (rows.numpy()[~real] == ROWS).all()
    np.testing.assert_array_equal(values.numpy()[~real], 0)
    whole = np.zeros((ROWS, WIDTH))
    whole[rows.numpy()[real]] = values.numpy()[real]
    np.testing.assert_allclose(whole, summed(gradient), rtol=1e-6)
    np.testing.assert_allclose(
        sparse.dense(gradient, table()), summed(gradient), rtol=1e-6
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("count", [1, 7, 20_000])
def test_thousands_of_repeats_find_each_other_under_xla(count, dtype):
    rng, rows = np.random.default_rng(count), 50
    ids = np.minimum(rng.zipf(1.3, count) - 1, rows + 3)
    ids[::5] = rng.integers(-3, 0, len(ids[::5]))  # outside, as are the last ones
    values = rng.integers(-9, 9, (count, 3)).astype("float32")
    clock = sparse.Clock(tf.Variable(tf.zeros([rows, 3])))
    last = rng.integers(0, 2**31 - 1, rows)
    clock.last.assign(last)
    distinct = tf.function(sparse.distinct, jit_compile=True)
    gradient = tf.IndexedSlices(tf.constant(values), tf.constant(ids, dtype))
    sums, found = (x.numpy() for x in distinct(gradient, clock))
    np.testing.assert_array_equal(clock.last, last)
    is_inside = (ids >= 0) & (ids < rows)
    real = found < rows
    assert sorted(found[real]) == sorted({*ids[is_inside]})
    np.testing.assert_array_equal(sums[~real], 0)
    expected = np.zeros((rows, 3))
    np.add.at(expected, ids[is_inside], values[is_inside])
    np.testing.assert_array_equal(sums[real], expected[found[real]])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_sums_are_in_float32_at_least(dtype, wide):
    gradient = tf.IndexedSlices(
        tf.ones([1000, WIDTH], dtype), tf.zeros([1000], tf.int32)
    )
    for values in (
        sparse.dense(gradient, table())[:1],
        sparse.distinct(gradient, sparse.Clock(table()))[0],
    ):
        assert values.dtype.name == wide
        np.testing.assert_array_equal(values, [[1000] * WIDTH])


@pytest.mark.parametrize("ids", [[-1], [0, ROWS]])
def test_an_index_outside_the_table_fails(ids):
    sparse.check_ids(slices([0, ROWS - 1]), table())
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"not in \[0, 5\)"):
        sparse.check_ids(slices(ids), table())


def test_updates_of_rows_are_those_of_the_whole_table():
    weights, clock = table(), None
    slots = Slots(table(0.5), table(0.25), table(0.125))
    clock = sparse.Clock(weights)
    w, v, m, a = (np.full((ROWS, WIDTH), x, "float64") for x in (1, 0.5, 0.25, 0.125))
    for seed, ids in enumerate([[0, 3, 0], [1], [1, 4], [3]]):
        gradient = slices(ids, seed)
        g, touched = summed(gradient), sorted({*ids})
        v, a = RHO * v + 0.1 * g**2, RHO * a + 0.1 * g
        m[touched] = 0.5 * m[touched] + g[touched]
        w[touched] -= 0.1 * m[touched] * w[touched]

        values, rows = sparse.distinct(gradient, clock)

        def step(weights, old, values=values):
            new = Slots(
                RHO * old.velocity + 0.1 * values**2,
                0.5 * old.momentum + values,
                RHO * old.average_gradient + 0.1 * values,
            )
            return 0.1 * new.momentum * weights, new

        sparse.update(
            weights,
            slots,
            sparse.Rows(clock, rows),
            RHO,
            DRAW,
            step,
            reads_weights=True,
        )
        np.testing.assert_allclose(weights, w, rtol=1e-5)
        np.testing.assert_allclose(slots.momentum, m, rtol=1e-5)
        current = sparse.caught_up(slots, sparse.Rows(clock), RHO)
        np.testing.assert_allclose(current.velocity, v, rtol=1e-5)
        np.testing.assert_allclose(current.average_gradient, a, rtol=1e-5, atol=1e-7)
    assert clock.updates.numpy() == 4
    np.testing.assert_array_equal(clock.last, [1, 3, 0, 4, 3])
    assert not np.allclose(slots.velocity, v)  # some rows are behind ...

    sparse.catch_up(slots, clock, RHO, DRAW)  # ... until they are brought up to date
    np.testing.assert_allclose(slots.velocity, v, rtol=1e-5)
    np.testing.assert_allclose(slots.average_gradient, a, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slots.momentum, m, rtol=1e-5)
    assert clock.updates.numpy() == 0
    np.testing.assert_array_equal(clock.last, [0] * ROWS)


def test_weights_are_read_where_they_are_asked_for_only():
    weights, slots = table(), Slots(table(0.0))
    rows = sparse.Rows(sparse.Clock(weights))

    def step(seen, old):
        assert seen is None
        return tf.ones_like(weights), old

    sparse.update(weights, slots, rows, RHO, DRAW, step, reads_weights=False)
    np.testing.assert_array_equal(weights, np.zeros((ROWS, WIDTH)))
    assert not rows.clock.is_behind()  # of all rows none is


def test_a_mean_leaves_out_the_rows_that_were_made_up():
    values = tf.constant([[1.0, 3.0], [5.0, 7.0], [0.0, 0.0]])
    ids = tf.constant([2, 0, ROWS])
    assert sparse.mean(values, ids=ids, variable=table()) == 4.0
    none = tf.fill([3], ROWS)
    assert sparse.mean(values, ids=none, variable=table()) == 0.0


def test_an_average_follows_some_rows():
    average, weights = table(1.0), table(3.0)
    sparse.mix(average, weights, tf.constant([1, 3]), 0.75)
    expected = np.ones((ROWS, WIDTH))
    expected[[1, 3]] = 1.5
    np.testing.assert_allclose(average, expected)


def test_reads_of_a_table_do_not_copy_it():
    # TensorFlow switches to copies at a gather or scatter; this switches back.
    @tf.function
    def written(ids):
        sparse.write(weights, sparse.read(weights, ids) + 1, ids)

    weights = table()
    for xla in (False, True):
        function = tf.function(written.python_function, jit_compile=xla)
        graph = function.get_concrete_function(tf.constant([0, 1])).graph
        kinds = [op.type for op in graph.get_operations()]
        assert kinds.count("ResourceScatterUpdate") == 1
        assert kinds.count("ResourceGather") == 1
        assert kinds.count("DisableCopyOnRead") == 2 * (not xla)


class Owner:
    """Stands for an optimizer."""

    def __init__(self, count):
        self._trainable_variables = [table() for _ in range(count)]
        self.use_ema, self.asked = False, []
        self._state_io = self

    def before_checkpoint(self):
        self.asked.append(1)


def test_clocks_go_with_their_tables():
    owner = Owner(3)
    clocks = sparse.Clocks(owner)
    first, last = clocks.make(0), clocks.make(2)
    assert clocks.make(0) is first
    assert sorted(clocks) == [0, 2]
    assert 1 not in clocks
    clocks.move({0: 2, 2: 1})
    assert sorted(clocks) == [1, 2]
    assert clocks[2] is first
    assert clocks[1] is last


def test_a_checkpoint_brings_rows_up_to_date_and_makes_clocks(tmp_path):
    owner = Owner(2)
    clocks = sparse.Clocks(owner)
    clocks.make(1).last.assign([1, 2, 3, 4, 5])
    path = tf.train.Checkpoint(clocks=clocks).save(str(tmp_path / "c"))
    assert owner.asked
    other = sparse.Clocks(owner)
    tf.train.Checkpoint(clocks=other).restore(path)
    assert [*other] == [1]
    np.testing.assert_array_equal(other[1].last, [1, 2, 3, 4, 5])
    # One that was there takes what is in the file, too, and none is made without need.
    clocks.make(0).last.assign([5, 4, 3, 2, 1])
    path = tf.train.Checkpoint(clocks=clocks).save(str(tmp_path / "d"))
    tf.train.Checkpoint(clocks=other).restore(path)
    assert sorted(other) == [0, 1]
    np.testing.assert_array_equal(other[0].last, [5, 4, 3, 2, 1])
    assert clocks._lookup_dependency("table") is None


def test_only_what_writes_a_checkpoint_brings_rows_up_to_date():
    owner = Owner(1)
    clocks = sparse.Clocks(owner)
    clock = clocks.make(0)
    for given in ((), ("savedmodel",)):
        assert clocks._trackable_children(*given, cache={})["table_0"] is clock
    with tf.Graph().as_default():
        clocks._trackable_children("checkpoint")
    assert not owner.asked
    clocks._trackable_children("checkpoint")
    assert owner.asked


def test_before_there_are_tables_only_known_clocks_are_found():
    owner = Owner(1)
    clocks = sparse.Clocks(owner)
    assert clocks.refused == set()
    clock = clocks.make(0)
    owner._trainable_variables.clear()
    assert clocks._lookup_dependency("table_0") is clock
    assert clocks._lookup_dependency("table_1") is None


def test_a_clock_counts_and_does_not_learn():
    clock = sparse.Clock(table())
    assert not clock.is_behind()
    clock.updates.assign_add(1)
    assert clock.is_behind() is True
    clock.reset()
    assert not clock.is_behind()
    assert clock.trainable_variables == ()
    assert clock.updates.dtype == clock.last.dtype == tf.int32


def test_a_clock_is_where_its_table_is():
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    with strategy.scope():
        weights = keras.Variable(np.ones((ROWS, WIDTH)))
    clock = sparse.Clock(weights)
    for variable in (clock.updates, clock.last):
        assert variable.distribute_strategy is strategy
    assert not clock.is_behind()


def test_variables_of_keras_are_as_good():
    weights = keras.Variable(np.ones((ROWS, WIDTH)), dtype="float32")
    assert sparse.unwrapped(weights) is weights.value
    sparse.write(weights, tf.zeros([1, WIDTH]), tf.constant([2]))
    np.testing.assert_array_equal(
        sparse.read(weights, tf.constant([1, 2]))[:, 0], [1, 0]
    )
    sparse.subtract(weights, tf.ones([ROWS, WIDTH], "float64"), None)
    np.testing.assert_array_equal(weights.numpy()[:, 1], [0, 0, -1, 0, 0])


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2)])
@pytest.mark.parametrize(
    ("kept", "wide", "rtol"),
    [
        ("bfloat16", "float32", 1e-6),
        ("float32", "float32", 1e-6),
        ("float64",) * 2 + (1e-15,),
    ],
)
@pytest.mark.parametrize("ids", [None, [2, 0]])
def test_silence_is_made_up_for_in_the_dtype_of_a_step(shape, kept, wide, rtol, ids):
    # A power of rho as float32 or float64 has it, and not as Python does.
    rho = 0.999
    clock = sparse.Clock(tf.zeros(shape))
    clock.updates.assign(40)
    clock.last.assign([40, 39, 0])
    slots = Slots(*(tf.Variable(tf.fill(shape, tf.cast(x, kept))) for x in (1, 2, 4)))
    of_rows = np.array([0, 1, 40])[slice(None) if ids is None else ids]
    power = np.array(rho, wide).astype("float64") ** of_rows
    power = power.reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape[1:])
    rows = sparse.Rows(clock, None if ids is None else tf.constant(ids))
    for given in (rho, tf.constant(rho, wide)):
        v, m, a = sparse.caught_up(slots, rows, given)
        assert {x.dtype.name for x in (v, m, a)} == {wide}
        assert v.shape == a.shape == m.shape == power.shape
        np.testing.assert_allclose(v, power, rtol=rtol)
        np.testing.assert_allclose(a, 4 * power, rtol=rtol)
        np.testing.assert_array_equal(m, np.full(power.shape, 2.0))
    alone = sparse.caught_up(Slots(slots.velocity), rows, rho)
    assert alone[1:] == (None, None)


def test_what_is_caught_up_is_rounded_by_the_draw():
    def caught(step):
        slots = Slots(tf.Variable(tf.ones([1, 4096], "bfloat16")))
        clock = sparse.Clock(slots.velocity)
        clock.updates.assign(1)
        sparse.catch_up(slots, clock, 0.999, Draw(tf.constant(5), tf.constant(step)))
        return slots.velocity.numpy().astype("float64")

    first, second = caught(1), caught(2)
    assert (first != second).any()
    for v in (first, second):
        np.testing.assert_allclose(v.mean(), 0.999, rtol=1e-5)


def test_means_of_tables_of_any_rank():
    ids = tf.constant([2, 0, ROWS])
    one_axis = tf.constant([3.0, 5.0, 100.0])
    assert sparse.mean(one_axis, ids=ids, variable=tf.zeros([ROWS])) == 4.0
    three_axes = tf.reshape(tf.range(12.0), [3, 2, 2])
    assert sparse.mean(three_axes, ids=ids, variable=tf.zeros([ROWS, 2, 2])) == 3.5


def test_an_error_names_ten_indices():
    with pytest.raises(tf.errors.InvalidArgumentError) as e:
        sparse.check_ids(slices(range(101, 115)), table())
    assert "[An index of a sparse gradient is not in [0, 5)]" in str(e.value)
    assert "110" in str(e.value)
    assert "111" not in str(e.value)


def test_without_the_private_function_all_is_as_under_xla(monkeypatch):
    from tensorflow.python.ops import control_flow_util

    assert sparse.inside_xla() is False
    monkeypatch.delattr(control_flow_util, "GraphOrParentsInXlaContext")
    assert sparse.inside_xla() is True
    sums, ids = sparse.distinct(slices([1, 1]), sparse.Clock(table()))
    order = np.argsort(ids)
    np.testing.assert_array_equal(ids.numpy()[order], [1, ROWS])
    expected = [slices([1, 1]).values.numpy().sum(0), [0, 0]]
    np.testing.assert_allclose(sums.numpy()[order], expected)
