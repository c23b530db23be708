"""The parts of the TensorFlow backend, one by one, each against what it should say."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rmsprop import rule
from keras_rmsprop.backends import current as backend
from keras_rmsprop.backends import layouts, programs
from keras_rmsprop.backends.programs import Programs
from keras_rmsprop.codecs import Draw
from keras_rmsprop.rule import Slots
from keras_rmsprop.update import Constants, Update

pytestmark = pytest.mark.tensorflow("how its backend takes a step")


def zeros(*shape, dtype="float32"):
    return tf.zeros(shape, dtype)


def rows(values, ids, shape=None):
    return tf.IndexedSlices(values, ids, shape)


WEIGHTS = keras.Variable(np.zeros((4, 3)), dtype="float32", name="w")


def test_tensors_are_gradients_as_they_are():
    gradient = zeros(4, 3)
    assert backend.as_gradient(gradient, WEIGHTS) is gradient
    assert backend.as_gradient(None, WEIGHTS) is None


@pytest.mark.parametrize(
    "given", [[1, 2], np.array([1.0, 2.0]), keras.Variable([1, 2], trainable=False)]
)
def test_other_numbers_become_tensors_of_the_variable_s_dtype(given):
    gradient = backend.as_gradient(given, keras.Variable([0.0, 0.0], dtype="bfloat16"))
    assert isinstance(gradient, tf.Tensor)
    assert gradient.dtype == tf.bfloat16
    np.testing.assert_array_equal(tf.cast(gradient, "int32"), [1, 2])


def test_complex_numbers_stay_complex():
    gradient = backend.as_gradient(np.array([1j]), WEIGHTS)
    assert isinstance(gradient, tf.Tensor)
    assert gradient.dtype == tf.complex128


def test_slices_become_slices_of_tensors():
    given = rows(np.ones((1, 3)), np.array([2]), np.array([4, 3]))
    gradient = backend.as_gradient(given, WEIGHTS)
    assert isinstance(gradient, tf.IndexedSlices)
    assert gradient.values.dtype == tf.float32
    for part, value in (
        ("values", [[1] * 3]),
        ("indices", [2]),
        ("dense_shape", [4, 3]),
    ):
        tensor = getattr(gradient, part)
        assert isinstance(tensor, tf.Tensor)
        np.testing.assert_array_equal(tensor, value)
    short = backend.as_gradient(rows(np.ones((1, 3)), np.array([2])), WEIGHTS)
    assert short.dense_shape is None


def test_gradients_that_fit():
    for ids in (tf.constant([1, 2]), tf.constant([1, 2], "int64")):
        backend.check(rows(zeros(2, 3), ids), WEIGHTS)
    backend.check(zeros(4, 3), WEIGHTS)
    backend.check(zeros(4, 3, dtype="float16"), WEIGHTS)
    backend.check(zeros(4, 3), tf.Variable(zeros(4, 3)))
    backend.check(None, "not looked at")


SPARSE = (
    "A sparse gradient must have int32 or int64 indices, and for each a row as wide as "
    "the variable's. Received: {} indices of shape {} and values of shape {} for "
    "variable 'w' of shape (4, 3)"
)


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (
            zeros(4, 3, dtype="int32"),
            TypeError,
            "A gradient must be of floating point numbers. "
            "Received: int32 for variable 'w'",
        ),
        (
            zeros(3, 4),
            ValueError,
            "A gradient must have the shape of its variable. Received: "
            "shape (3, 4) for variable 'w' of shape (4, 3)",
        ),
        (
            rows(zeros(1, 3), tf.constant([1], "int16")),
            ValueError,
            SPARSE.format("int16", "(1,)", "(1, 3)"),
        ),
        (
            rows(zeros(1, 1, 3), tf.constant([[1]])),
            ValueError,
            SPARSE.format("int32", "(1, 1)", "(1, 1, 3)"),
        ),
        (
            rows(zeros(2, 3), tf.constant([1])),
            ValueError,
            SPARSE.format("int32", "(1,)", "(2, 3)"),
        ),
        (
            rows(zeros(1, 2), tf.constant([1])),
            ValueError,
            SPARSE.format("int32", "(1,)", "(1, 2)"),
        ),
    ],
)
def test_gradients_that_do_not_fit(gradient, error, message):
    with pytest.raises(error) as e:
        backend.check(gradient, WEIGHTS)
    assert str(e.value) == message


def test_no_rows_of_a_scalar_and_no_gradient_without_a_variable():
    scalar = keras.Variable(0.0, name="s")
    with pytest.raises(ValueError, match=r"of shape .* for variable 's' of shape"):
        backend.check(rows(zeros(1), tf.constant([0])), scalar)
    with pytest.raises(TypeError) as e:
        backend.check(zeros(4, 3), zeros(4, 3).numpy())
    assert str(e.value) == "Gradients must come with variables. Received: ndarray"


def variables(*sizes):
    return [tf.Variable(zeros(size)) for size in sizes]


def test_sizes_from_which_xla_is_worth_it():
    eager, graph = programs.XLA_EAGER_ELEMENTS, programs.XLA_IN_GRAPH_ELEMENTS
    assert not programs.is_worth_xla(variables(eager, 1))
    assert programs.is_worth_xla(variables(1, eager + 1))
    assert not programs.is_large(variables(graph - 1, 1))
    assert programs.is_large(variables(1, graph))


class Asked:
    """Stands for the `Steps` of an optimizer."""

    def __init__(self, jit_compile, for_kernel=False):
        self.jit_compile, self.for_kernel = jit_compile, for_kernel

    def is_for_kernel(self, variables):
        return self.for_kernel

    def calls_users_python(self, variables):
        return False

    def has_blocks(self):
        return False


def test_which_steps_are_programs(monkeypatch):
    runner, small = Programs(), variables(1)
    large = variables(programs.XLA_IN_GRAPH_ELEMENTS)
    slices = [rows(zeros(1), tf.constant([0]))]
    found = []

    def ask():
        found.clear()
        for grads, weights in (([zeros(1)], small), ([None], large), (slices, large)):
            found.append(
                [
                    runner.has_program(Asked(x), grads, weights)
                    for x in (False, "auto", True)
                ]
            )

    ask()
    assert found == [[False, True, True]] * 3
    with tf.Graph().as_default():
        ask()
        assert not runner.has_program(Asked("auto", True), [None], large)
    assert found == [[False, False, True], [False, True, True], [False, False, False]]
    monkeypatch.setattr(programs, "is_watched", lambda: True)
    ask()
    assert found == [[False, False, False]] * 3


def test_functions_that_run_eagerly_are_no_programs():
    tf.config.run_functions_eagerly(True)
    try:
        assert not Programs().has_program(Asked(True), [zeros(1)], variables(1))
    finally:
        tf.config.run_functions_eagerly(False)


def test_debugging_tools_are_seen():
    from tensorflow.python.eager import context

    assert programs.is_watched() is False
    context.context().add_op_callback(watching := lambda *_, **__: None)
    try:
        assert programs.is_watched() is True
    finally:
        context.context().remove_op_callback(watching)


XLA = "XLA makes one loop of its operations"


@pytest.mark.parametrize(
    ("size", "jit_compile", "compiled", "eager", "graph"),
    [
        (1, False, 0, "operation by operation", "part of the graph"),
        (
            1,
            "auto",
            0,
            "one program without XLA, as no variable has more than 4096 elements",
            "part of the graph",
        ),
        (
            1,
            True,
            99,
            "one program, compiled by XLA unless gradients are sparse",
            "a program of its own, compiled by XLA",
        ),
        (
            2**13,
            "auto",
            0,
            "one program, compiled by XLA unless gradients are sparse",
            "part of the graph",
        ),
        (
            2**13,
            "auto",
            16,
            "one program without XLA, as it has compiled 16 in this process and frees "
            "none",
            "part of the graph",
        ),
        (2**20, False, 0, "operation by operation", "part of the graph"),
        (
            2**20,
            "auto",
            0,
            "one program, compiled by XLA unless gradients are sparse",
            "a program of its own, compiled by XLA",
        ),
    ],
)
def test_kinds_of_steps(size, jit_compile, compiled, eager, graph, monkeypatch):
    monkeypatch.setattr(Programs, "compiled", compiled)
    kinds = backend.kinds_of_steps(Asked(jit_compile), variables(size))
    assert kinds == {
        f"Eager: {eager}": "compiled by XLA" in eager,
        f"In `fit` and `tf.function`: {graph}": "compiled by XLA" in graph,
    }


def test_kinds_of_steps_with_a_kernel():
    large = variables(2**20)
    assert backend.kinds_of_steps(Asked("auto", True), large) == {
        "Eager: one program without XLA": False,
        "In `fit` and `tf.function`: part of the graph": False,
    }
    for jit_compile in (True, False):
        without, with_kernel = (Asked(jit_compile, x) for x in (False, True))
        kinds = backend.kinds_of_steps(without, large)
        assert backend.kinds_of_steps(with_kernel, large) == kinds


def one(*shape, kept="float32", **options):
    slots = Slots(tf.Variable(zeros(*shape, dtype=kept)))
    return Update(tf.Variable(zeros(*shape)), zeros(*shape), slots, **options)


def step(**options):
    return Constants(rule.Options(**options), 0.5, Draw(None, 0))


@pytest.mark.parametrize(
    ("update", "options", "given", "name", "why"),
    [
        (
            one(2, rows=()),
            {},
            {"xla": True},
            "by rows",
            "only those of the batch",
        ),
        *(
            (
                one(*shape),
                {},
                given,
                "on its own",
                "XLA makes one loop of its operations",
            )
            for shape, given in (
                ((2**13, 3), {"xla": True}),
                ((2,), {"xla": True}),
            )
        ),
        *(
            (one(2**13, 3), {}, given, "on its own", "more than 1024 elements")
            for given in ({}, {"xla": False})
        ),
        (
            one(2),
            {"cautious": True},
            {},
            "on its own",
            "`cautious` counts each variable's elements",
        ),
        (
            one(2, kept="bfloat16"),
            {},
            {},
            "on its own",
            "`slot_dtype` draws by each element's position",
        ),
        (
            one(2),
            {},
            {},
            "concatenated with others",
            "small",
        ),
    ],
)
def test_ways_and_reasons(update, options, given, name, why):
    assert backend.way(update, step(**options), **given) == (name, why)


@tf.function(jit_compile=True)
def clipped(grads, norm, global_norm):
    return backend.clipped_by_norm(grads, norm, global_norm)


def test_norms_as_numpy_has_them():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(4, 5)), rng.normal(size=3), 0.01 * rng.normal(size=2)]
    grads = [*map(tf.constant, arrays)]
    norms = [np.sqrt((a**2).sum()) for a in arrays]
    assert backend.clipped_by_norm(grads, 0.5, None) is None  # but under XLA
    each = clipped(grads, 0.5, None)
    of_all = np.sqrt(sum(n**2 for n in norms))
    for most in (0.5, 100.0):
        together = clipped(grads, None, most)
        scale = min(1.0, most / of_all)
        for got, want in zip(together, arrays, strict=True):
            np.testing.assert_allclose(got, scale * want, rtol=1e-12)
    for got, want, norm in zip(each, arrays, norms, strict=True):
        np.testing.assert_allclose(got, want * min(1.0, 0.5 / norm), rtol=1e-12)


def test_an_infinite_norm_of_all_makes_nan_and_of_one_nothing():
    grads = [tf.constant([np.inf, 1.0]), tf.constant([1.0])]
    assert all(np.isnan(g).all() for g in clipped(grads, None, 1.0))
    huge = [tf.constant([1e30, 1.0])]
    np.testing.assert_array_equal(clipped(huge, 1.0, None)[0], [0.0, 0.0])


class Clock:
    """Stands for that of a table."""


def test_gradients_are_tensors_in_float32_at_least():
    slices = rows(tf.ones([3, 3], "float16"), tf.constant([3, 1, 3]))
    grads = [None, tf.ones([4, 3], "float16"), slices, slices]
    tensors, kept, asserts = backend.widened(
        grads, [WEIGHTS] * 4, {3: Clock()}, kernel=False
    )
    assert tensors[0] is None
    assert [t.dtype.name for t in tensors[1:]] == ["float32"] * 3
    np.testing.assert_array_equal(tensors[1], np.ones((4, 3)))
    dense = np.outer([0, 1, 0, 2], np.ones(3))
    np.testing.assert_array_equal(tensors[2], dense)
    assert kept[:3] == [None] * 3
    np.testing.assert_array_equal(kept[3], [3, 1])
    np.testing.assert_array_equal(tensors[3], dense[[3, 1]])
    assert len(asserts) == 2
    with pytest.raises(ValueError, match="argument"):
        backend.widened(grads, [WEIGHTS], {}, kernel=False)


def test_what_is_the_same_for_all_is_done_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        layouts, "update_concatenated", lambda g, v, s, step: calls.append(len(v))
    )
    decay = tf.constant(0.5)
    several = [one(2), one(3), one(2, decay=0.5), one(4, decay=0.5), one(2, decay=0.25)]
    backend.update(several, step(), in_program=False)
    assert calls == [2, 2]
    calls.clear()
    several = [one(2, decay=decay), one(3, decay=decay), one(2, decay=decay + 0)]
    backend.update(several, step(), in_program=False)
    assert calls == [2]
    calls.clear()
    backend.update(
        [one(2), one(2, kept="float64"), one(3, kept="float64")],
        step(),
        in_program=False,
    )
    assert calls == [2]
    calls.clear()
    backend.update([several[0], several[1], several[0]], step(), in_program=False)
    assert calls == []


def test_here_and_now():
    assert backend.is_eager() is True
    with tf.Graph().as_default():
        assert backend.is_eager() is False
