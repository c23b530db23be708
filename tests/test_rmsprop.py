"""Arguments, slots, configuration: what one sees of the optimizer from outside."""

import importlib.util
import inspect
import unittest
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import LOOP, assert_close, tensor, train

from keras_rmsprop import RMSprop, rmsprop_optimizer
from keras_rmsprop.options import DEFAULTS

BUILT_IN = keras.optimizers.RMSprop


def test_signature_is_the_built_ins_and_keyword_only_beyond():
    ours = inspect.signature(RMSprop).parameters
    theirs = inspect.signature(BUILT_IN).parameters
    # Before Keras 3.15 each was named "rmsprop", not numbered like other objects.
    assert [
        (p.name, None if p.default == "rmsprop" else p.default) for p in theirs.values()
    ] == [
        (p.name, DEFAULTS.get(p.name) if p.default is None else p.default)
        for p in ours.values()
        if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ]


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "centered": True, "use_ema": True}],
    ids=["defaults", "all slots"],
)
def test_variables_are_the_built_ins(options):
    def variables(optimizer):
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        model.compile(optimizer, loss="mse")
        optimizer.build(model.trainable_variables)
        return [(v.path, v.shape, v.dtype) for v in optimizer.variables]

    ours = variables(RMSprop(**options, name="rmsprop"))
    assert ours == variables(BUILT_IN(**options, name="rmsprop"))


def test_numbers_of_every_kind_are_numbers():
    optimizer = RMSprop(1, np.float32(0.5), np.int64(0), np.float64(1e-3))
    assert optimizer.get_config()["learning_rate"] == 1.0
    assert (optimizer.rho, optimizer.momentum, optimizer.epsilon) == (0.5, 0.0, 1e-3)


def test_lr_is_deprecated_but_works():
    with pytest.warns(DeprecationWarning, match="use `learning_rate`"):
        optimizer = RMSprop(lr=0.25)
    assert optimizer.learning_rate.numpy() == 0.25


def test_textbook_factory():
    config = rmsprop_optimizer().get_config()
    assert (
        config
        == RMSprop(0.001, rho=0.9, epsilon=1e-8, name=config["name"]).get_config()
    )
    assert rmsprop_optimizer(0.1, 0.8, 1e-3).rho == 0.8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_slots_have_float32_at_least(dtype):
    optimizer = RMSprop(momentum=0.9, centered=True)
    optimizer.build([keras.Variable([1.0], dtype=dtype)])
    expected = "float64" if dtype == "float64" else "float32"
    assert [v.dtype for v in optimizer.variables[2:]] == [expected] * 3


def test_low_precision_slots_do_not_stall():
    # In bfloat16 v stops at 0.5: there 0.999 * v + 0.001 rounds to v.
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer = RMSprop(rho=0.999)
    gradient = tensor([1.0], "bfloat16")
    for _ in range(2000):
        optimizer.apply([gradient], [variable])
    v = optimizer.variables[2].numpy()
    np.testing.assert_allclose(v, 1 - 0.999**2000, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_weights_follow_float32(dtype):
    low, _ = train(RMSprop(0.01, epsilon=1e-3), dtype=dtype)
    high, _ = train(RMSprop(0.01, epsilon=1e-3), dtype="float32")
    assert_close(
        [w.astype("float32") for w in low],
        high,
        {"float16": 1e-2, "bfloat16": 5e-2}[dtype],
    )


@pytest.mark.tensorflow("sparse gradients")
def test_repeated_rows_of_a_sparse_gradient_are_summed_first():
    slices = tf.IndexedSlices([[1.0], [2.0], [3.0]], [0, 0, 2], dense_shape=[4, 1])
    dense = tensor([[3.0], [0.0], [3.0], [0.0]])

    def run(optimizer, gradient):
        table = keras.Variable(np.ones((4, 1), "float32"))
        for _ in range(2):
            optimizer.apply([gradient], [table])
        return table.numpy()

    expected = run(BUILT_IN(0.1), dense)
    for options in [{}, {"jit_compile": False}, {"loss_scale_factor": 1.0}]:
        assert_close([run(RMSprop(0.1, **options), slices)], [expected], 1e-6)
    # The day the built-in gets this right, this line says so.
    assert not np.allclose(run(BUILT_IN(0.1), slices), expected, atol=1e-2)


def test_none_gradients_leave_their_variables():
    a, b = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = RMSprop(0.1)
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([None, tensor([1.0])], [a, b])
    assert a.numpy() == [1.0]
    assert b.numpy() < 2.0
    optimizer.apply([tensor([1.0]), None], [a, b])
    assert a.numpy() < 1.0


def test_constraints_hold():
    variable = keras.Variable([0.1, 5.0])
    variable.constraint = keras.constraints.NonNeg()
    RMSprop(1.0).apply([tensor([1.0, 1.0])], [variable])
    np.testing.assert_array_equal(variable.numpy() >= 0, [True, True])
    assert variable.numpy()[0] == 0


@pytest.mark.parametrize(
    "kind",
    [
        np.array,
        list,
        tensor,
        pytest.param(tf.Variable, marks=pytest.mark.tensorflow("`tf.Variable`")),
        keras.Variable,
    ],
    ids=["numpy", "list", "tensor", "tf.Variable", "keras.Variable"],
)
def test_gradients_of_every_kind(kind):
    variable = keras.Variable([1.0, 1.0])
    RMSprop(0.1).apply([kind([1.0, -1.0])], [variable])
    RMSprop(0.1).apply(np.array([[1.0, -1.0]], "float32"), [variable])
    step = 2 * 0.1 / 0.1**0.5
    np.testing.assert_allclose(variable.numpy(), [1 - step, 1 + step], rtol=1e-5)


def test_no_gradients_are_no_step():
    optimizer = RMSprop()
    optimizer.build([keras.Variable([1.0])])
    optimizer.apply([])
    assert optimizer.iterations.numpy() == 0


@pytest.mark.tensorflow("`tf.Variable`")
def test_apply_gradients_counts_and_accepts_tf_variables():
    variable = tf.Variable([1.0, 2.0])
    optimizer = RMSprop()
    assert optimizer.apply_gradients([(tensor([1.0, 1.0]), variable)]).numpy() == 1
    assert (variable.numpy() < [1.0, 2.0]).all()


def test_loss_scale_optimizer_around_it():
    def run(inner):
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
        variable = keras.Variable([1.0, 2.0])
        optimizer.build([variable])
        apply = LOOP(optimizer)
        for g in [[4.0, 8.0], [float("inf"), 1.0], [2.0, -2.0]]:
            apply([tensor(g)])
        return [variable.numpy(), optimizer.dynamic_scale.numpy()]

    assert_close(run(RMSprop(0.1)), run(BUILT_IN(0.1)), 1e-6)


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras has it since 3.15"
)
def test_multi_optimizer_around_it():
    def run(kind):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, name="body"),
                keras.layers.Dense(1, name="head"),
            ]
        )
        optimizers = keras.optimizers.OptimizerMap(
            kind(0.01), {".*head/.*": kind(0.1, momentum=0.9)}
        )
        model.compile(keras.optimizers.MultiOptimizer(optimizers), loss="mse")
        x = np.arange(12, dtype="float32").reshape(4, 3)
        model.fit(x, x[:, :1], epochs=3, verbose=0, batch_size=2)
        return model.get_weights()

    assert_close(run(RMSprop), run(BUILT_IN), 1e-5)


def test_keras_own_tests_pass_with_this_class():
    path = Path(inspect.getfile(BUILT_IN)).with_name("rmsprop_test.py")
    if not path.exists():
        pytest.skip("Not every wheel of Keras holds its tests")
    spec = importlib.util.spec_from_file_location("keras_rmsprop_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RMSprop = RMSprop
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    assert suite.countTestCases() >= 6
    result = unittest.TestResult()
    suite.run(result)
    assert result.wasSuccessful(), result.failures + result.errors
