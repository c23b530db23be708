"""Two optimizers on one table: averages follow rows that the other one moves."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("rows of embeddings")

ROWS, M = 6, 0.5
EMA = {"use_ema": True, "ema_momentum": M}
ADDED = "as another optimizer updates the table, too"


def slices(ids):
    return tf.IndexedSlices(
        tf.ones((len(ids), 2)), tf.constant(ids), tf.constant([ROWS, 2])
    )


def average_of(optimizer):
    [found] = [v.numpy() for v in optimizer.variables if v.path.endswith("average")]
    return found


def explained(optimizer):
    return " ".join(optimizer.explain().split())


class Oracle:
    """The average of a table in NumPy, from the weights after each step."""

    def __init__(self, warms_up=False):
        self.average, self.t, self.warms_up = None, 0, warms_up

    def follow(self, table):
        w = table.numpy().astype("float64")
        m = min(M, (1 + self.t) / (10 + self.t)) if self.warms_up else M
        self.average = w if self.t == 0 else m * self.average + (1 - m) * w
        self.t += 1


@pytest.mark.slow
@pytest.mark.one_in(12)
@pytest.mark.parametrize("way", ["eager", "portable", "tf.function", "XLA"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (EMA, EMA),
        (EMA, {}),
        ({}, EMA),
        (EMA | {"ema_warmup": True}, {"momentum": 0.9}),
    ],
    ids=["both average", "the first", "the second", "the first, with another kind"],
)
def test_they_take_turns(first, second, way):
    table = keras.Variable(np.ones((ROWS, 2), "float32"))
    both, oracles = [], [Oracle(first.get("ema_warmup", False)), Oracle()]
    for options in (first, second):
        jit_compile = False if way == "portable" else "auto"
        both.append(RMSprop(0.1, **options, jit_compile=jit_compile))
    applies = [lambda g, o=o: o.apply([g], [table]) for o in both]
    if way in ("tf.function", "XLA"):
        applies = [tf.function(f, jit_compile=way == "XLA") for f in applies]
    if way == "XLA":
        for optimizer in both:  # variables are not made there
            optimizer.build([table])
    for n in range(4):
        for k in (0, 0, 1) if n else (0, 0):  # the first one begins alone
            applies[k](slices([2 * k, 2 * k + 1]))
            oracles[k].follow(table)
    for optimizer, oracle in zip(both, oracles, strict=True):
        if optimizer.use_ema:
            assert_close([average_of(optimizer)], [oracle.average], 1e-6)
            assert ADDED in explained(optimizer)
        else:
            assert ADDED not in explained(optimizer)


@pytest.mark.slow
def test_both_in_one_function():
    table = keras.Variable(np.ones((ROWS, 2), "float32"))
    both, oracles = [RMSprop(0.1, **EMA) for _ in range(2)], [Oracle(), Oracle()]
    weights = [tf.Variable(tf.zeros((ROWS, 2))) for _ in both]

    @tf.function
    def step():
        for k, optimizer in enumerate(both):
            optimizer.apply([slices([2 * k, 2 * k + 1])], [table])
            weights[k].assign(table.value)

    for _ in range(4):
        step()
        for oracle, w in zip(oracles, weights, strict=True):
            oracle.follow(w)
    for optimizer, oracle in zip(both, oracles, strict=True):
        assert_close([average_of(optimizer)], [oracle.average], 1e-6)


def test_layers_that_join_later_are_shared_from_then_on():
    table, other = (keras.Variable(np.ones((ROWS, 2), "float32")) for _ in range(2))
    ours, theirs, oracle = RMSprop(0.1, **EMA), RMSprop(0.1), Oracle()
    for n in range(6):
        ours.apply([slices([0])], [table])
        oracle.follow(table)
        if n < 3:
            theirs.apply([slices([1])], [other])
        else:
            theirs.apply([slices([1]), slices([2])], [other, table])
    assert_close([average_of(ours)], [oracle.average], 1e-6)


@pytest.mark.slow
def test_an_optimizer_that_is_gone_shares_nothing():
    layers = [keras.Input((2,), dtype="int32"), keras.layers.Embedding(ROWS, 2)]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(1)])
    x, y = np.arange(12).reshape(6, 2) % ROWS, np.ones((6, 1))
    for _ in range(2):
        model.compile(RMSprop(**EMA), "mse")
        model.fit(x, y, verbose=0)
        assert "by rows" in explained(model.optimizer)
        assert ADDED not in explained(model.optimizer)


def test_a_person_reads_the_state_and_then_assigns():
    table, optimizer = keras.Variable(np.ones((ROWS, 2), "float32")), RMSprop(**EMA)
    oracle = Oracle()
    for n in range(6):
        optimizer.apply([slices([n % 2])], [table])
        oracle.follow(table)
        if n in (2, 3):
            _ = optimizer.variables  # as the page on embeddings says
            table.assign(table.numpy() + np.arange(ROWS)[:, None])
    assert_close([average_of(optimizer)], [oracle.average], 1e-6)
