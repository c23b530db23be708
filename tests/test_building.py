"""Variables join an optimizer in parts, in any order, and builds are interrupted."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import BACKEND, tensor

from keras_rmsprop import RMSprop


def three():
    return [keras.Variable(np.ones(2, "float32"), name=n) for n in "abc"]


def velocities(optimizer, variables):
    slots = dict(
        zip(
            map(id, optimizer._trainable_variables),
            optimizer.get_state().slots,
            strict=True,
        )
    )
    return [float(slots[id(v)].velocity[0]) for v in variables]


def in_parts(*histories, last=()):
    """Return variables and an optimizer that took steps on parts of them."""
    variables, optimizer = three(), RMSprop()
    for part in [*histories, *last]:
        grads = [tensor([10.0**i] * 2) for i in part]
        optimizer.apply(grads, [variables[i] for i in part])
    return variables, optimizer


def test_once_all_are_given_they_stand_in_that_order():
    variables, optimizer = in_parts([0, 2], [0, 1], [0, 1, 2])
    assert [v.path for v in optimizer._trainable_variables] == ["a", "b", "c"]
    other = RMSprop(name=optimizer.name)
    other.build(variables)
    # As a new one would have them, by which `set_weights` and checkpoints go.
    assert [v.path for v in optimizer.variables] == [v.path for v in other.variables]
    other.set_weights([v.numpy() for v in optimizer.variables])
    expected = velocities(optimizer, variables)
    assert velocities(other, variables) == expected
    np.testing.assert_allclose(expected, [0.271, 19.0, 1900.0], rtol=1e-4)


def test_an_order_that_is_not_known_is_told(tmp_path):
    variables, optimizer = in_parts([0, 2], [0, 1])
    with pytest.raises(ValueError, match="order of the model's variables is not known"):
        optimizer.apply([tensor([1.0, 1.0])] * 3)
    state = [v.numpy() for v in optimizer.variables]
    with pytest.warns(UserWarning, match="order of the model's variables is not known"):
        optimizer.set_weights(state)
    if BACKEND == "tensorflow":
        with pytest.warns(UserWarning, match="order of the model's variables is not"):
            tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "c"))
    optimizer.build(variables)
    optimizer.apply([tensor([0.0, 0.0])] * 3)
    v = velocities(optimizer, variables)
    np.testing.assert_allclose(v, [0.171, 9.0, 900.0], rtol=1e-4)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("first", [True, False], ids=["built", "extended"])
def test_a_build_that_fails_leaves_what_was_there(monkeypatch, first, which):
    a, b, _ = three()
    optimizer = RMSprop(momentum=0.5, use_ema=True)
    twin, twins = RMSprop(momentum=0.5, use_ema=True), three()
    one = tensor([1.0, 1.0])
    if not first:
        optimizer.apply([one], [b])
        twin.apply([one], [twins[1]])
    before = [v.path for v in optimizer.variables]
    make, made = keras.optimizers.Optimizer.add_variable, []

    def fails(self, *args, **kwargs):
        made.append(kwargs)
        if len(made) > which:
            raise MemoryError
        return make(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(keras.optimizers.Optimizer, "add_variable", fails)
        with pytest.raises(MemoryError):
            optimizer.apply([one, one], [a, b])
    assert optimizer.built != first
    assert [v.path for v in optimizer.variables] == before
    optimizer.apply([one, one], [a, b])
    twin.apply([one, one], twins[:2])
    for x, y in zip((a, b), twins, strict=False):
        np.testing.assert_array_equal(x.numpy(), y.numpy())
    for x, y in zip(optimizer.variables, twin.variables, strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy())
    kinds = [entry.kind for entry in optimizer._book.all()]  # which files go by
    assert kinds == [entry.kind for entry in twin._book.all()]


@pytest.mark.tensorflow("`tf.train.Checkpoint` and tables")
@pytest.mark.parametrize(
    "options",
    [{}, {"initial_accumulator_value": 1.0, "use_ema": True}, {"centered": True}],
    ids=str,
)
def test_a_checkpoint_without_a_clock_stops_the_one_that_is_there(tmp_path, options):
    table = keras.Variable(np.ones((4, 2), "float32"), name="embeddings")
    optimizer = RMSprop(0.01, rho=0.5, **options)
    optimizer.apply([tf.ones((4, 2))], [table])
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, table=table)
    path = checkpoint.save(str(tmp_path / "c"))
    saved = [v.numpy() for v in optimizer.variables]
    row = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]), tf.constant([4, 2]))
    for _ in range(3):
        optimizer.apply([row], [table])
    checkpoint.restore(path)
    for got, want in zip(optimizer.variables, saved, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.skipif(BACKEND != "jax", reason="there `fit` goes by position")
def test_fit_after_steps_of_parts_in_another_order():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.w = [self.add_weight(shape=(2,), name=n) for n in "abc"]
            self.built = True

        def call(self, x):
            sums = [10**i * keras.ops.sum(w) for i, w in enumerate(self.w)]
            return keras.ops.reshape(sum(sums), (1, 1)) + 0 * x[:, :1]

    for last in ([[0, 1, 2]], []):
        model = Model()
        variables, optimizer = model.trainable_variables, RMSprop()
        for part in [[0, 2], [0, 1], *last]:
            optimizer.apply(
                [tensor([0.0, 0.0])] * len(part), [variables[i] for i in part]
            )
        model.compile(optimizer, loss=lambda y, p: keras.ops.mean(p))
        x, y = np.zeros((1, 2)), np.zeros((1, 1))
        if not last:
            values = [v.value for v in optimizer.variables]
            weights = [v.value for v in variables]
            with pytest.raises(ValueError, match="order of the model's variables is"):
                optimizer.stateless_apply(values, weights, weights)
            optimizer.build(variables)
        model.fit(x, y, verbose=0)
        v = velocities(optimizer, variables)
        np.testing.assert_allclose(v, [0.1, 10.0, 1000.0], rtol=1e-5)
