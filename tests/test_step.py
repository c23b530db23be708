"""The pipeline of a step: its stages, Keras' stages, and life without a feature."""

import ast
import inspect
import textwrap

import keras
import numpy as np
import pytest
from stepping import BACKEND, arrays, assert_close, tensor

from keras_rmsprop import RMSprop, hooks, reference, step


def methods_called(function):
    """Return the methods of `self` that a method calls, in this class alone."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }


def class_with(name):
    """Return Keras' class that defines a method last: the one that all inherit."""
    return next(
        c for c in reversed(keras.optimizers.Optimizer.__mro__) if name in vars(c)
    )


STAGES_OF_APPLY = {
    "build",
    "_check_variables_are_known",
    "_filter_empty_gradients",
    "_overwrite_variables_directly_with_gradients",
    "_backend_apply_gradients",
}
STAGES_OF_BACKEND = {
    "_apply_weight_decay",
    "_backend_increment_gradient_accumulators",
    "_backend_reset_gradient_accumulators",
    "_backend_update_step",
    "_clip_gradients",
    "_get_variable_index",
    "_overwrite_model_variables_with_average_value",
    "_update_model_variables_moving_average",
}
"""What Keras' step calls. `step.Steps.take` does each, or calls it."""


def test_keras_step_has_no_stage_that_this_one_lacks():
    """A later Keras with a new stage fails here, by its name."""
    apply = class_with("apply").apply
    assert methods_called(apply) - STAGES_OF_APPLY == set()
    base = class_with("_backend_apply_gradients")._backend_apply_gradients
    assert methods_called(base) - STAGES_OF_BACKEND == set()


@pytest.mark.skipif(BACKEND != "jax", reason="Keras has a step of its own for JAX")
def test_nor_has_that_of_jax():
    own = keras.optimizers.Optimizer._backend_apply_gradients
    assert own is not class_with("_backend_apply_gradients")._backend_apply_gradients
    assert methods_called(own) - STAGES_OF_BACKEND == set()


def test_every_hook_is_a_method_of_keras():
    for name in (*hooks.HOOKS, "_overwrite_variables_directly_with_gradients"):
        assert hasattr(keras.optimizers.Optimizer, name) or name == "update_step", name


@pytest.mark.parametrize("name", hooks.NOT_CALLED)
def test_a_subclass_cannot_override_what_is_never_called(name):
    with pytest.raises(TypeError, match=f"`Late.{name}` would never be called"):
        type("Late", (RMSprop,), {name: lambda self, *args: None})
    mixin = type("Mixin", (), {name: lambda self, *args: None})
    with pytest.raises(TypeError, match=f"`Late.{name}` would never be called"):
        type("Late", (mixin, RMSprop), {})


@pytest.mark.parametrize("missing", step.FEATURES, ids=lambda kind: kind.__name__)
def test_without_a_feature_the_plain_step_is_the_rule(missing, monkeypatch):
    left = tuple(kind for kind in step.FEATURES if kind is not missing)
    monkeypatch.setattr(step, "FEATURES", left)
    weights, optimizer = [keras.Variable(x) for x in arrays()], RMSprop(0.01)
    expected = [(x.astype("float64"), {}) for x in arrays()]
    for n in range(1, 4):
        grads = arrays(seed=n)
        optimizer.apply([tensor(g) for g in grads], weights)
        expected = [
            (reference.step(w, g, state, alpha=0.01, beta=0.9, epsilon=1e-7), state)
            for (w, state), g in zip(expected, grads, strict=True)
        ]
    assert missing not in optimizer._steps.features
    assert_close([v.numpy() for v in weights], [w for w, _ in expected], 1e-5)


@pytest.mark.tensorflow("tables")
def test_without_rows_a_table_gets_whole_gradients(monkeypatch):
    import tensorflow as tf

    every = step.FEATURES
    without = tuple(kind for kind in every if kind is not step.Tables)
    found = []
    for features in (every, without):
        monkeypatch.setattr(step, "FEATURES", features)
        table, optimizer = keras.Variable(np.ones((5, 2), "float32")), RMSprop(0.1)
        for ids in ([1, 1], [3, 0], [1, 4]):
            slices = tf.IndexedSlices(tf.ones((2, 2)), tf.constant(ids), [5, 2])
            optimizer.apply([slices], [table])
        found.append(table.numpy())
        assert len([*optimizer._clocks]) == (features is every)
    np.testing.assert_allclose(*found, rtol=1e-6)
