import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close

from keras_rmsprop import RMSprop
from keras_rmsprop.backends import layouts
from keras_rmsprop.backends.programs import XLA_EAGER_ELEMENTS
from keras_rmsprop.rule import Slots

pytestmark = [pytest.mark.portable, pytest.mark.tensorflow("XLA programs")]

SHAPES = [(3, 4), (7,), (), (1, 5), (2, 3, 2), (layouts.SMALL_ELEMENTS + 1,)]


@pytest.fixture
def calls(monkeypatch):
    """The number of variables in each call of `update_concatenated`."""
    calls = []
    update = layouts.update_concatenated

    def counted(gradients, variables, *args):
        calls.append(len(variables))
        update(gradients, variables, *args)

    monkeypatch.setattr(layouts, "update_concatenated", counted)
    return calls


def steps(optimizer, shapes=SHAPES, dtypes=("float32",), missing=()):
    rng = np.random.default_rng(0)
    variables = [
        keras.Variable(rng.normal(size=s), dtype=dtypes[i % len(dtypes)], name=f"v{i}")
        for i, s in enumerate(shapes)
    ]
    optimizer.build(variables)

    @tf.function
    def step(grads):
        grads = [None if i in missing else g for i, g in enumerate(grads)]
        optimizer.apply(grads, variables)

    for _ in range(4):
        step([tf.constant(rng.normal(size=v.shape), v.dtype) for v in variables])
    return [v.numpy().astype(float) for v in [*variables, *optimizer.variables]]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "centered": True, "global_clipnorm": 1.0},
        {"clipnorm": 0.5, "use_ema": True},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
    ],
)
def test_several_at_once_as_the_built_in_one_by_one(options, calls):
    ours = steps(RMSprop(0.01, **options), missing=[3])
    assert calls == [4]
    built_in = keras.optimizers.RMSprop(0.01, **options)
    assert_close(ours, steps(built_in, missing=[3]), 1e-5)


@pytest.mark.slow
def test_variables_whose_steps_differ_are_apart(calls):
    weights = {}
    for kind in (RMSprop, keras.optimizers.RMSprop):
        optimizer = kind(0.01, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=["v0", "v1"])
        weights[kind] = steps(optimizer)
    assert sorted(calls) == [2, 3]
    assert_close(*weights.values(), 1e-5)

    calls.clear()
    optimizer = RMSprop(0.01)
    mixed = steps(optimizer, dtypes=("float32", "float64"))
    assert sorted(calls) == [2, 3]
    built_in = keras.optimizers.RMSprop(0.01)
    assert_close(mixed, steps(built_in, dtypes=("float32", "float64")), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"cautious": True, "momentum": 0.9}, {"slot_dtype": "bfloat16"}]
)
def test_what_depends_on_a_variable_alone_is_done_alone(options, calls):
    steps(RMSprop(0.01, **options))
    assert not calls


def test_the_same_variable_twice_in_one_step(calls):
    weights = []
    for optimizer in (RMSprop(0.1), keras.optimizers.RMSprop(0.1)):
        variables = [keras.Variable(tf.ones([3])) for _ in range(2)]
        optimizer.build(variables)
        grads = [tf.ones([3]), tf.ones([3]), 2 * tf.ones([3])]
        step = functools.partial(optimizer.apply, grads, [*variables, variables[0]])
        tf.function(step)()
        weights.append([v.numpy() for v in variables])
    assert not calls
    assert_close(*weights, 1e-6)


def test_a_subclass_with_a_step_of_its_own(calls):
    class Other(RMSprop):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, gradient)

    steps(Other())
    assert not calls


def test_xla_takes_one_by_one(calls):
    optimizer, variables = RMSprop(), [keras.Variable(tf.ones([3])) for _ in range(3)]
    optimizer.build(variables)
    step = tf.function(lambda: optimizer.apply([tf.ones([3])] * 3), jit_compile=True)
    step()
    assert not calls


@pytest.mark.parametrize(
    ("shape", "jit_compile", "xla"),
    [
        ((4,), "auto", False),
        ((4,), True, True),
        ((XLA_EAGER_ELEMENTS + 1,), "auto", True),
    ],
)
def test_eager_steps_of_small_variables_are_not_compiled(shape, jit_compile, xla):
    optimizer, variable = (
        RMSprop(jit_compile=jit_compile),
        keras.Variable(tf.ones(shape)),
    )
    optimizer.apply([tf.ones(shape)], [variable])
    (program,) = optimizer._steps.programs._programs.values()
    attributes = program.concrete.function_def.attr
    assert attributes["_XlaMustCompile"].b is xla


def toy(gradient, weights, slots):
    """A step whose result says which numbers met, and on how many axes."""
    assert len(gradient.shape) == len(weights.shape) == 1
    v, m, a = slots
    assert all(x is None or x.shape == gradient.shape for x in slots)
    new = Slots(v + gradient, m if m is None else 2 * m, a if a is None else 3 * a)
    return tf.cast(10 * gradient + 100 * weights, "float64"), new


def numbered(shapes, kinds):
    """Return gradients, variables and slots without two numbers that are equal."""
    count = np.arange(10000, dtype="float32").__iter__()

    def drawn(shape):
        return np.array([next(count) for _ in range(int(np.prod(shape)))]).reshape(
            shape
        )

    return [
        (
            tf.constant(drawn(shape), "float32"),
            tf.Variable(tf.constant(drawn(shape), "float32")),
            Slots(
                *(
                    tf.Variable(tf.constant(drawn(shape), "float32")) if there else None
                    for there in kinds
                )
            ),
        )
        for shape in shapes
    ]


def expected_of(several):
    return [
        [w - 10 * g - 100 * w, v + g, *(() if m is None else (2 * m,))]
        + ([] if a is None else [3 * a])
        for g, w, (v, m, a) in (
            (g.numpy(), w.numpy(), slots.map(lambda x: x.numpy()))
            for g, w, slots in several
        )
    ]


def values_of(several):
    return [
        [w.numpy(), *(x.numpy() for x in slots if x is not None)]
        for _, w, slots in several
    ]


KINDS = [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "shapes", [[(3,), (2,)], [(), (2, 3), (4,), (1,), (0,), (2, 1)]]
)
def test_end_to_end_each_gets_its_own_numbers(kinds, shapes):
    several = numbered(shapes, kinds)
    expected = expected_of(several)
    layouts.update_concatenated(*zip(*several, strict=True), toy)
    for got, want in zip(values_of(several), expected, strict=True):
        for x, y in zip(got, want, strict=True):
            assert x.shape == y.shape
            np.testing.assert_array_equal(x, y)


def test_the_largest_that_is_small():
    assert layouts.is_small(tf.zeros([4, layouts.SMALL_ELEMENTS // 4]))
    assert not layouts.is_small(tf.zeros([layouts.SMALL_ELEMENTS + 1]))


def test_vectors_are_not_reshaped():
    # An operation on a small variable costs more than what it computes.
    @tf.function
    def update():
        layouts.update_concatenated(*zip(*several, strict=True), toy)

    several = numbered([(3,), (2,)], (1, 0, 0))
    kinds = [op.type for op in update.get_concrete_function().graph.get_operations()]
    assert "Reshape" not in kinds
    assert kinds.count("ConcatV2") == 3
    several = numbered([(3,), (2, 1)], (1, 0, 0))
    update = tf.function(update.python_function)
    kinds = [op.type for op in update.get_concrete_function().graph.get_operations()]
    assert kinds.count("Reshape") == 3 + 2
