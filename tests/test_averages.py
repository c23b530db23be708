"""Each weight gets its own average, whichever layers are trained, in whatever order.

The layers have one shape: an average in the wrong place would not be an error.
"""

import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import RMSprop as BuiltIn
from small_models import (
    OneBuiltInEach,
    dense_model,
    numbers,
    save,
    take_steps,
    user_warnings,
)
from stepping import assert_close

from keras_rmsprop import RMSprop

OPTIONS = {"learning_rate": 0.02, "use_ema": True, "ema_momentum": 0.9}


def train_only(model, *layers):
    """Freeze the other layers of a model, which keeps its optimizer."""
    for layer in model.layers:
        layer.trainable = layer.name in layers
    model.compile(model.optimizer, "mse", jit_compile=False)


def finalize(model):
    model.optimizer.finalize_variable_values(model.trainable_variables)


def weights(model, *layers):
    """Return the weights of some layers, or of all."""
    of = [layer for layer in model.layers if not layers or layer.name in layers]
    return [w for layer in of for w in layer.get_weights()]


def ours_and_the_built_ins():
    return dense_model(RMSprop(**OPTIONS)), dense_model(BuiltIn(**OPTIONS))


@pytest.mark.parametrize(("trained", "frozen"), [("head", "body"), ("body", "head")])
def test_a_frozen_layer_stays_and_the_other_gets_its_average(trained, frozen):
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        take_steps(model, range(3))
        train_only(model, trained)
        take_steps(model, range(3, 6))
    before = weights(ours, frozen)
    finalize(ours)
    for got, want in zip(weights(ours, frozen), before, strict=True):
        np.testing.assert_array_equal(got, want)
    train_only(theirs, "body", "head")  # else the built-in takes a list for another
    finalize(theirs)
    assert_close(weights(ours, trained), weights(theirs, trained), 1e-5)


@pytest.mark.parametrize(("trained", "frozen"), [("head", "body"), ("body", "head")])
def test_fit_after_freezing(trained, frozen):
    model = dense_model(RMSprop(**OPTIONS))
    model.fit(*numbers(model), epochs=2, verbose=0)
    train_only(model, trained)
    before = weights(model, frozen)
    model.fit(*numbers(model), epochs=2, verbose=0)
    for got, want in zip(weights(model, frozen), before, strict=True):
        np.testing.assert_array_equal(got, want)
    averages = [
        v.numpy()
        for v in model.optimizer.variables
        if v.path.endswith("average") and trained in v.path
    ]
    assert len(averages) == 2
    for got, want in zip(weights(model, trained), averages, strict=True):
        np.testing.assert_array_equal(got, want)


def test_frozen_and_unfrozen_again():
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        take_steps(model, range(3))
        train_only(model, "head")
        take_steps(model, range(3, 6))
        train_only(model, "body", "head")
        take_steps(model, range(6, 9))
        finalize(model)
    assert_close(weights(ours), weights(theirs), 1e-5)


def test_a_known_layer_keeps_its_average_when_another_is_unfrozen():
    model = dense_model(RMSprop(**OPTIONS), frozen=["body"])
    oracle = OneBuiltInEach(model, **OPTIONS)
    for layers, steps in ((["head"], range(3)), (["body", "head"], range(3, 6))):
        train_only(model, *layers)
        take_steps(model, steps)
        oracle.take_steps(model, steps)
    finalize(model)
    for position in (2, 3):
        weight = oracle.weights[position]
        oracle.optimizers[position].finalize_variable_values([weight])
        assert_close([model.weights[position].numpy()], [weight.numpy()], 1e-5)


def test_averages_without_a_memory_are_the_weights_themselves():
    model = dense_model(RMSprop(**OPTIONS | {"ema_momentum": 0.0}), frozen=["body"])
    for layers in (["head"], ["body", "head"], ["body"], ["body", "head"]):
        train_only(model, *layers)
        take_steps(model, range(2))
        before = weights(model)
        finalize(model)
        for got, want in zip(weights(model), before, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0], [1]], ids=str)
def test_variables_in_another_order_or_some_of_them(order):
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        take_steps(model, range(3))
    before = weights(ours)
    ours.optimizer.finalize_variable_values([ours.weights[i] for i in order])
    finalize(theirs)
    expected = weights(theirs)
    for i, got in enumerate(weights(ours)):
        assert_close([got], [expected[i] if i in order else before[i]], 1e-5)


def test_averages_that_replace_the_weights_leave_a_frozen_layer_alone():
    model = dense_model(RMSprop(**OPTIONS, ema_overwrite_frequency=2))
    take_steps(model, range(3))
    train_only(model, "head")
    before = weights(model, "body")
    take_steps(model, range(3, 8))
    for got, want in zip(weights(model, "body"), before, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("file", "built"), [("m.keras", True), ("m.weights.h5", False)]
)
def test_what_a_file_does_not_know_begins_at_its_weights(tmp_path, file, built):
    model = dense_model(RMSprop(**OPTIONS), frozen=["body"])
    take_steps(model, range(3))
    save(model, tmp_path / file)
    other = dense_model(RMSprop(**OPTIONS))
    other.set_weights([w + 1 for w in other.get_weights()])
    if built:
        other.optimizer.build(other.trainable_variables)
    with user_warnings() as warned:
        other.load_weights(tmp_path / file)
        other.optimizer.build(other.trainable_variables)
    assert len(warned) == 1
    finalize(other)
    finalize(model)
    for got, want in zip(weights(other), weights(model), strict=True):
        np.testing.assert_array_equal(got, want)


def function_of_a_step(model):
    optimizer, variables = model.optimizer, model.trainable_variables

    @tf.function
    def step(value):
        gradients = [value * tf.ones(v.shape) for v in variables]
        optimizer.apply(gradients, variables)

    return step


def test_functions_that_train_some_layers_or_all():
    ours, theirs = ours_and_the_built_ins()
    for model in (ours, theirs):
        model.optimizer.build(model.trainable_variables)
        for layers in (["body", "head"], ["head"], ["body", "head"]):
            train_only(model, *layers)
            step = function_of_a_step(model)
            step(tf.constant(1.0))
            step(tf.constant(2.0))
        finalize(model)
    assert_close(weights(ours), weights(theirs), 1e-5)
