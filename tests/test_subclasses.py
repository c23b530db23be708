"""A subclass that does its own step gets what one of the built-in would get.

Each subclass here is made twice: of this optimizer, and of the built-in, which is given
dense gradients and is the oracle.
"""

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from small_models import (
    JIT,
    ROWS,
    OneBuiltInEach,
    assert_same_bits,
    dense_model,
    gradient,
    save,
    table_model,
    take_steps,
    user_warnings,
)
from stepping import BACKEND, WAYS, assert_close, tensor

from keras_rmsprop import AutoLearningRate, RMSprop


class BUILT_IN(keras.optimizers.RMSprop):  # noqa: N801
    """The built-in, which on PyTorch has no `update_step` unless it is subclassed."""


def centralized(update_step, optimizer, gradient, variable, learning_rate):
    update_step(gradient - ops.mean(gradient, 0), variable, learning_rate)


def with_penalty(update_step, optimizer, gradient, variable, learning_rate):
    update_step(
        gradient + 0.01 * ops.convert_to_tensor(variable), variable, learning_rate
    )


def plain_descent(update_step, optimizer, gradient, variable, learning_rate):
    rate = ops.cast(learning_rate, variable.dtype)
    optimizer.assign_sub(variable, rate * gradient)


def scaled_by_factor(update_step, optimizer, gradient, variable, learning_rate):
    update_step(optimizer.factor * gradient, variable, learning_rate)


def subclass(base, body):
    """Return a class whose step is a body, which is given the step of the base."""

    class Subclass(base):
        factor = 1.0

        def update_step(self, gradient, variable, learning_rate):
            body(super().update_step, self, gradient, variable, learning_rate)

    return Subclass


def of_class(base, body):
    return subclass(base, body)(0.02)


def of_instance(base, body):
    """Return an optimizer that got its step when it was there already."""
    optimizer = base(0.02)
    optimizer.factor = 1.0
    optimizer.update_step = functools.partial(body, optimizer.update_step, optimizer)
    return optimizer


BODIES = [centralized, with_penalty, plain_descent]
overridden = pytest.mark.parametrize("make", [of_class, of_instance])


def steps_of(model, way):
    """Return a function that takes a step of a model, in a way to take steps."""
    variables = model.trainable_variables
    model.optimizer.build(variables)
    step = WAYS[way](model.optimizer)
    return lambda n, sparse=True: step(
        [gradient(model, v, n, sparse) for v in variables]
    )


def assert_same_weights(model, expected):
    assert_close(model.get_weights(), expected.get_weights(), 1e-5)


@pytest.mark.one_in(8)
@overridden
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
@pytest.mark.parametrize(
    ("model", "way"), [*((table_model, way) for way in WAYS), (dense_model, "eager")]
)
def test_it_gets_the_whole_dense_gradient(model, body, way, make):
    ours, theirs = (model(make(base, body)) for base in (RMSprop, BUILT_IN))
    step = steps_of(ours, way)
    for n in range(4):
        step(n)
        take_steps(theirs, [n], sparse=False)
    assert_same_weights(ours, theirs)


class Drawn(keras.constraints.Constraint):
    def __init__(self):
        self.calls = 0

    def __call__(self, w):
        self.calls += 1
        w = np.clip(ops.convert_to_numpy(w), -2, 2)
        return w * self.calls if ops.sum(w) > 0 else w


def clipped(optimizer, grads):
    optimizer.calls["clip"] += 1
    return [g * optimizer.calls["clip"] if ops.sum(g) > 1 else g for g in grads]


def decayed(optimizer, variables):
    optimizer.calls["decay"] += 1
    for v in variables:
        v.assign(v * (1 - 0.1 * optimizer.calls["decay"]))


@pytest.mark.skipif(JIT, reason="on JAX these are traced by the built-in, too")
@pytest.mark.parametrize(
    "what", ["constraint", "_clip_gradients", "_apply_weight_decay"]
)
def test_an_eager_step_calls_the_users_python(what):
    hooks = {"_clip_gradients": clipped, "_apply_weight_decay": decayed}
    found = []
    for base in (RMSprop, keras.optimizers.RMSprop):
        own = {what: hooks[what]} if what in hooks else {}
        optimizer = type("Own", (base,), own)(0.1)
        optimizer.calls = {"clip": 0, "decay": 0}
        weights = keras.Variable([1.0, 2.0])
        if what == "constraint":
            weights.constraint = Drawn()
        for g in (1.0, -0.5, 2.0, 0.1):
            optimizer.apply([tensor([g, 2 * g])], [weights])
        found.append(ops.convert_to_numpy(weights))
        if base is RMSprop and BACKEND == "tensorflow":
            assert "operation by operation" in optimizer.explain()
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.tensorflow("functions that take variables")
@pytest.mark.parametrize("way", [lambda f: f, tf.function])
def test_a_function_of_the_users_takes_the_variable(way):
    class Own(RMSprop):
        def update_step(self, gradient, variable, learning_rate):
            self.change(gradient, variable)

        @tf.function
        def change(self, gradient, variable):
            if tf.reduce_sum(gradient) > 0:
                variable.assign_sub(2 * gradient)

    weights = keras.Variable([1.0, 2.0])
    optimizer = Own()
    optimizer.build([weights])
    way(optimizer.apply)([tensor([1.0, 0.5])])
    np.testing.assert_array_equal(weights.numpy(), [-1, 1])


@overridden
def test_it_is_called_for_one_variable_at_a_time_at_each_step(make):
    calls = []

    def recorded(update_step, optimizer, gradient, variable, learning_rate):
        assert not isinstance(gradient, tf.IndexedSlices)
        assert gradient.shape == variable.shape
        calls.append(tuple(variable.shape))
        update_step(gradient, variable, learning_rate)

    model = table_model(make(RMSprop, recorded))
    take_steps(model, range(3))
    assert calls == [(ROWS, 2), (2, 1), (1,)] * 3


@overridden
def test_an_attribute_of_its_own_that_changes_takes_effect(make):
    ours, theirs = (
        dense_model(make(base, scaled_by_factor), units=(3, 3))
        for base in (RMSprop, BUILT_IN)
    )
    for model in (ours, theirs):
        for n, factor in enumerate([1.0, 5.0, -2.0, 0.5]):
            model.optimizer.factor = factor
            take_steps(model, [n])
    assert_same_weights(ours, theirs)


def test_a_step_that_is_set_between_two_steps():
    ours, theirs = (dense_model(base(0.02)) for base in (RMSprop, BUILT_IN))
    for model in (ours, theirs):
        optimizer = model.optimizer
        take_steps(model, range(2))
        optimizer.update_step = functools.partial(
            plain_descent, optimizer.update_step, optimizer
        )
        take_steps(model, range(2, 4))
        del optimizer.update_step
        take_steps(model, range(4, 6))
    assert_same_weights(ours, theirs)


def test_a_step_of_another_class_is_bound_to_it():
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, self.factor * gradient)

    optimizer, variable = RMSprop(0.02), keras.Variable([1.0, 2.0])
    optimizer.factor = 0.5
    optimizer.update_step = types.MethodType(update_step, optimizer)
    optimizer.apply([tensor([1.0, 1.0])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [0.5, 1.5])


LARGE = (65, 65)
"""Large enough for a program of XLA, where the step is the optimizer's own."""


def applied(optimizer, values, shape=LARGE):
    """Return a variable after steps with gradients that are all one value."""
    variable = keras.Variable(np.ones(shape, "float32"))
    for value in values:
        optimizer.apply([keras.ops.full(shape, value)], [variable])
    return variable.numpy()


class TestDebugging:
    """What one puts into a step to see what happens in it."""

    @overridden
    @pytest.mark.tensorflow("`tf.print`")
    @pytest.mark.parametrize("shape", [(3,), LARGE], ids=["small", "large"])
    def test_print(self, capfd, shape, make):
        def printing(update_step, optimizer, gradient, variable, learning_rate):
            tf.print("norm", tf.norm(gradient))
            update_step(gradient, variable, learning_rate)

        values = [1.0, 2.0, 3.0]
        weights = applied(make(RMSprop, printing), values, shape)
        assert capfd.readouterr().err.count("norm") == 3
        expected = applied(BUILT_IN(0.02), values, shape)
        np.testing.assert_allclose(weights, expected, 1e-5)

    @overridden
    def test_python_code(self, make):
        seen = []

        def looking(update_step, optimizer, gradient, variable, learning_rate):
            seen.append(float(gradient[0, 0]))
            update_step(gradient, variable, learning_rate)

        applied(make(RMSprop, looking), [1.0, 2.0, 3.0])
        assert seen == [1.0, 2.0, 3.0]

    @pytest.mark.tensorflow("`tf.debugging`")
    @pytest.mark.parametrize("shape", [(3,), LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("base", [RMSprop, subclass(RMSprop, centralized)])
    def test_check_numerics(self, base, shape):
        tf.debugging.enable_check_numerics()
        try:
            weights = applied(base(0.02), [1.0, 2.0, 3.0], shape)
            with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
                applied(subclass(RMSprop, plain_descent)(0.02), [float("nan")], shape)
        finally:
            tf.debugging.disable_check_numerics()
        assert np.isfinite(weights).all()


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("shape", "way"), [*(((3,), way) for way in WAYS), (LARGE, "eager")]
)
@pytest.mark.parametrize("late", [False, True], ids=["given", "assigned later"])
@pytest.mark.parametrize("name", ["rho", "epsilon", "weight_decay"])
def test_an_option_that_is_a_variable(name, late, way, shape):
    def run(optimizer_class, way):
        value = keras.Variable(0.5, trainable=False)
        optimizer = optimizer_class(0.02, **({} if late else {name: value}))
        if late:
            setattr(optimizer, name, value)
        variable = keras.Variable(np.ones(shape, "float32"))
        optimizer.build([variable])
        apply = WAYS[way](optimizer)
        for n, of_option in enumerate([0.5, 0.5, 0.25, 0.75]):
            value.assign(of_option)
            apply([keras.ops.full(shape, 1.0 + n)])
        return variable.numpy()

    # Keras does not track a variable given as weight decay: `jax.jit` keeps its value.
    theirs = way if BACKEND == "jax" and name == "weight_decay" else "eager"
    np.testing.assert_allclose(run(RMSprop, way), run(BUILT_IN, theirs), 1e-5)


def with_own_slots(base, how):
    """Return a class with a slot of its own: the largest gradient that there was."""

    class WithOwnSlots(base):
        def build(self, variables):
            super().build(variables)
            if how == "one by one":
                self.largest = []
                for variable in variables:
                    self.largest.append(
                        self.add_variable_from_reference(variable, name="largest")
                    )
            else:
                self.largest = self.add_optimizer_variables(variables, "largest")

        def update_step(self, gradient, variable, learning_rate):
            largest = self.largest[self._get_variable_index(variable)]
            self.assign(largest, ops.maximum(largest, ops.abs(gradient)))
            scale = 1 / (1 + ops.convert_to_tensor(largest))
            super().update_step(scale * gradient, variable, learning_rate)

    return WithOwnSlots


@pytest.mark.parametrize("how", ["one by one", "all at once"])
class TestOwnSlots:
    def made(self, how, base=RMSprop, **options):
        return with_own_slots(base, how)(0.02, **options)

    @pytest.mark.one_in(6)
    @pytest.mark.parametrize("model", [dense_model, table_model])
    @pytest.mark.parametrize(
        ("file", "state"),
        [
            ("m.keras", "built"),
            ("m.weights.h5", "unbuilt"),
            ("m.weights.h5", "trained"),
        ],
    )
    def test_another_instance_goes_on_with_them(
        self, tmp_path, how, file, state, model
    ):
        first, other = model(self.made(how)), model(self.made(how))
        take_steps(first, range(3))
        save(first, tmp_path / file)
        if state != "unbuilt":
            other.optimizer.build(other.trainable_variables)
        if state == "trained":
            take_steps(other, range(10, 12))
        with user_warnings() as warned:
            other.load_weights(tmp_path / file)
            take_steps(other, range(3, 6))
        assert not warned
        take_steps(first, range(3, 6))
        assert_same_bits(other, first)

    def test_a_loaded_model_goes_on_with_them(self, tmp_path, how):
        model = dense_model(self.made(how))
        take_steps(model, range(3))
        model.save(tmp_path / "m.keras")
        objects = {"WithOwnSlots": type(model.optimizer)}
        other = keras.models.load_model(tmp_path / "m.keras", custom_objects=objects)
        take_steps(model, range(3, 6))
        take_steps(other, range(3, 6))
        assert_same_bits(other, model)

    def test_they_are_loaded_where_an_option_was_switched_on(self, tmp_path, how):
        model, other = (
            dense_model(self.made(how, **options))
            for options in ({}, {"momentum": 0.5})
        )
        take_steps(model, range(3))
        save(model, tmp_path / "m.weights.h5")
        with user_warnings() as warned:
            other.load_weights(tmp_path / "m.weights.h5")
            other.optimizer.build(other.trainable_variables)
            take_steps(other, range(3, 4))
        assert len(warned) == 1
        for own, known in zip(
            other.optimizer.largest, model.optimizer.largest, strict=True
        ):
            assert (own.numpy() >= known.numpy()).all()

    @pytest.mark.one_in(9)
    @pytest.mark.parametrize("reader", [RMSprop, BUILT_IN], ids=["own", "built-in"])
    def test_the_variables_are_those_of_a_subclass_of_the_built_in(
        self, tmp_path, how, reader
    ):
        model = dense_model(self.made(how))
        expected = dense_model(self.made(how, BUILT_IN))
        for each in (model, expected):
            take_steps(each, range(3))
        save(model, tmp_path / "m.weights.h5")
        other = dense_model(self.made(how, reader))
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "m.weights.h5")
        for each in (model, other):
            assert_close(
                [v.numpy() for v in each.optimizer.variables],
                [v.numpy() for v in expected.optimizer.variables],
                1e-5,
            )

    def test_unfreezing_makes_room_in_them(self, how):
        model = dense_model(self.made(how), frozen=["body"])
        oracle = OneBuiltInEach(model, make=lambda: self.made(how, BUILT_IN))
        for layers, steps in ((1, range(3)), (0, range(3, 6))):
            model.layers[0].trainable = not layers
            model.compile(model.optimizer, "mse", jit_compile=JIT)
            take_steps(model, steps)
            oracle.take_steps(model, steps)
        oracle.assert_equals(model)
        shapes = [tuple(v.shape) for v in model.optimizer.largest]
        assert shapes == [tuple(v.shape) for v in model.trainable_variables]

    def test_a_file_of_frozen_layers_is_loaded(self, tmp_path, how):
        model = dense_model(self.made(how), frozen=["body"])
        oracle = OneBuiltInEach(model, make=lambda: self.made(how, BUILT_IN))
        take_steps(model, range(3))
        oracle.take_steps(model, range(3))
        save(model, tmp_path / "m.weights.h5")
        other = dense_model(self.made(how))
        with user_warnings() as warned:
            other.load_weights(tmp_path / "m.weights.h5")
            take_steps(other, range(3, 6))
        assert len(warned) == 1
        oracle.take_steps(other, range(3, 6))
        oracle.assert_equals(other)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["none", "its own", "twice", "as Keras"])
def test_a_weight_decay_of_its_own_is_that_of_the_built_in(how, way):
    def run(kind, way):
        class Decaying(kind):
            def _apply_weight_decay(self, variables):
                for _ in range({"as Keras": 1, "twice": 2}.get(how, 0)):
                    super()._apply_weight_decay(variables)
                if how == "its own":
                    for v in variables:
                        v.assign(v * (1 - 0.3 * self.learning_rate))

        variable = keras.Variable([1.0, 2.0])
        optimizer = Decaying(0.1, weight_decay=0.5)
        optimizer.build([variable])
        apply = WAYS[way](optimizer)
        for n in range(3):
            apply([tensor([1.0, -n])])
        return variable.numpy()

    expected = run(keras.optimizers.RMSprop, "eager")
    np.testing.assert_allclose(run(RMSprop, way), expected, rtol=1e-5)


def test_an_overridden_assign_is_called_as_by_the_built_in():
    def noting(kind):
        class Noting(kind):
            def assign(self, variable, value):
                calls.append(("assign", tuple(variable.shape)))
                super().assign(variable, value)

            def assign_sub(self, variable, value):
                calls.append(("assign_sub", tuple(variable.shape)))
                super().assign_sub(variable, value)

        calls = []
        variables = [keras.Variable([1.0, 2.0]), keras.Variable([[3.0]])]
        optimizer = Noting(0.1, momentum=0.5)
        optimizer.build(variables)
        for _ in range(2):
            optimizer.apply([tensor([1.0, -1.0]), tensor([[2.0]])])
        return calls, [v.numpy() for v in variables]

    calls, weights = noting(RMSprop)
    expected_calls, expected = noting(keras.optimizers.RMSprop)
    assert calls == expected_calls
    assert_close(weights, expected, 1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hook", ["update_step", "assign_sub", "_backend_update_step"])
def test_weights_decay_whatever_the_update_is(hook, way):
    def run(kind, way):
        def update(self, grads, variables, learning_rate):
            for g, v in zip(grads, variables, strict=True):
                plain_descent(None, self, g, v, learning_rate)

        bodies = {
            "update_step": lambda self, *args: plain_descent(None, self, *args),
            "assign_sub": lambda self, v, x: kind.assign_sub(self, v, 0.5 * x),
            "_backend_update_step": update,
        }
        variable = keras.Variable([1.0, 2.0])
        optimizer = type("Own", (kind,), {hook: bodies[hook]})(0.1, weight_decay=0.5)
        optimizer.build([variable])
        apply = WAYS[way](optimizer)
        for n in range(3):
            apply([tensor([1.0, -n])])
        return variable.numpy()

    np.testing.assert_allclose(run(RMSprop, way), run(BUILT_IN, "eager"), rtol=1e-5)


@pytest.mark.parametrize("hook", ["_apply_weight_decay", "update_step"])
def test_weights_decay_with_the_rate_that_was_found(hook):
    def run(kind):
        variable, optimizer = (
            keras.Variable(np.ones(3)),
            kind(AutoLearningRate(initial=0.01), weight_decay=0.1),
        )
        for _ in range(10):
            optimizer.apply([tensor([1.0, 1.0, 1.0])], [variable])
        return variable.numpy(), optimizer.current_learning_rate

    def as_it_is(self, *args):
        getattr(RMSprop, hook)(self, *args)

    weights, rate = run(type("Own", (RMSprop,), {hook: as_it_is}))
    expected, of_expected = run(RMSprop)
    assert_close(weights, expected, 1e-4)
    assert rate == pytest.approx(of_expected, rel=2e-3)  # differences of weights


def test_the_rate_that_was_found_is_that_of_its_step():
    seen = []

    def looking(update_step, optimizer, gradient, variable, learning_rate):
        rates = optimizer.learning_rate, optimizer.current_learning_rate
        seen.append([float(rate) for rate in (learning_rate, *rates)])

    optimizer = of_class(RMSprop, looking)
    optimizer = type(optimizer)("auto")
    optimizer.apply([tensor([1.0])], [keras.Variable([1.0])])
    assert len({*seen[0]}) == 1
    assert seen[0][0] < 0.1
    assert float(optimizer.learning_rate) == 1.0


@pytest.mark.parametrize("hook", ["update_step", "assign", "_backend_update_step"])
def test_explain_names_what_is_its_own(hook):
    optimizer = type("Own", (RMSprop,), {hook: lambda self, *args: None})()
    optimizer.build([keras.Variable([1.0])])
    assert f"by its own `{hook}`" in optimizer.explain()
