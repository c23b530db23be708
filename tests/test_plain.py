"""The step of any backend, one variable after the other, beside the reference."""

import contextlib

import keras
import numpy as np
import pytest

from keras_rmsprop import reference, rule
from keras_rmsprop.backends import plain
from keras_rmsprop.backends.plain import Step, Update
from keras_rmsprop.codecs import Draw
from keras_rmsprop.rule import Slots

pytestmark = pytest.mark.float64


def variable(x, dtype="float64", **options):
    return keras.Variable(np.asarray(x), dtype=dtype, trainable=False, **options)


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


@pytest.mark.parametrize("decay", [None, 0.25])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "maximize": True, "bias_correction": True},
        {"momentum": 0.9, "cautious": True, "epsilon_inside_sqrt": False},
    ],
    ids=str,
)
def test_steps_as_in_the_reference(decay, decoupled, options):
    rng, state, count = np.random.default_rng(0), {}, variable(0, "int32")
    w = rng.normal(size=5)
    weights, slots = variable(w), Slots(variable([0.0] * 5), variable([0.0] * 5))
    formula = rule.Options(rho=0.75, epsilon=0.01, **options)
    # A rate that float32 does not have, in a variable that does.
    step = Step(formula, variable(0.1), Draw(None, count), decoupled)
    for _ in range(3):
        g = rng.normal(size=5)
        gradient = keras.ops.convert_to_tensor(g)
        plain.update([Update(weights, gradient, slots, decay)], step)
        w = reference.step(
            w,
            g,
            state,
            alpha=0.1,
            beta=0.75,
            epsilon=0.01,
            weight_decay=decay or 0.0,
            decoupled_weight_decay=decoupled,
            **options,
        )
        count.assign_add(1)
        np.testing.assert_allclose(weights.numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(slots.velocity.numpy(), state["v"], rtol=1e-12)
        np.testing.assert_allclose(slots.momentum.numpy(), state["m"], rtol=1e-12)


@pytest.mark.parametrize(
    ("of_weights", "kept", "computed"),
    [
        ("float16", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float64", "float32", "float64"),
        ("float32", "float64", "float64"),
    ],
)
def test_a_step_is_computed_in_the_widest_dtype(of_weights, kept, computed):
    weights, slot = variable([1.0], of_weights), variable([0.0], kept)
    gradient = keras.ops.ones(1, "float16")
    one = Update(weights, gradient, Slots(slot))
    assert one.dtype == computed
    rate = variable(0.5, "float32")
    step = Step(rule.Options(rho=0.0), rate, Draw(0, 0))
    taken, new = step.taken(gradient, weights, one.slots, dtype=one.dtype, decay=0.5)
    assert dtype_of(taken) == dtype_of(new.velocity) == computed
    plain.update_one(one, step)
    assert (dtype_of(weights), dtype_of(slot)) == (of_weights, kept)
    np.testing.assert_allclose(np.asarray(weights.numpy(), float), [0.5], rtol=1e-5)


def test_the_mean_is_handed_on():
    asked = []

    def mean(x):
        asked.append(x)
        return keras.ops.ones((), x.dtype)

    options = rule.Options(momentum=0.5, cautious=True)
    # The count is read for the bias correction alone.
    step = Step(options, variable(0.5), Draw(None, step=None))
    x = keras.ops.ones(2, "float64")
    step.taken(x, None, Slots(x, x), dtype="float64", mean=mean)
    assert len(asked) == 1


def test_constants_that_are_tensors_are_cast():
    options = rule.Options(rho=keras.ops.convert_to_tensor(0.5, "float32"), epsilon=0.0)
    x = keras.ops.ones(2, "float64")
    step = Step(options, variable(0.5), Draw(None, 0))
    taken, new = step.taken(x, None, Slots(x * 3), dtype="float64")
    np.testing.assert_allclose(new.velocity, [2.0] * 2, rtol=1e-12)
    np.testing.assert_allclose(taken, [0.5 / 2**0.5] * 2, rtol=1e-12)
    decay = keras.ops.convert_to_tensor(1.0, "float32")
    step = Step(options, 1.0, Draw(None, 0), decoupled_weight_decay=False)
    taken, new = step.taken(x, x * 2, Slots(x * 3), dtype="float64", decay=decay)
    # The gradient is 1 + 1 * 2, so v is 1.5 + 4.5.
    np.testing.assert_allclose(new.velocity, [6.0] * 2, rtol=1e-12)
    np.testing.assert_allclose(taken, [3 / 6**0.5] * 2, rtol=1e-12)


def test_assigned_by_functions_that_are_given():
    weights, slots = variable([1.0]), Slots(variable([0.0]), None, variable([0.0]))
    one = Update(weights, keras.ops.ones(1, "float64"), slots)
    step = Step(rule.Options(rho=0.0), variable(0.5), Draw(None, 0))
    set_to, taken = [], []
    plain.update_one(
        one, step, lambda *args: set_to.append(args), lambda *args: taken.append(args)
    )
    assert [slot for slot, _ in set_to] == [slots.velocity, slots.average_gradient]
    assert [float(value[0]) for _, value in set_to] == [1.0, 1.0]
    assert [v for v, _ in taken] == [weights]
    assert dtype_of(taken[0][1]) == "float64"
    assert weights.numpy() == [1.0]
    assert slots.velocity.numpy() == [0.0]


@pytest.mark.parametrize("given", [[1.0], (1.0,), np.ones(1), 1, 1.0, np.float32(1)])
def test_numbers_become_gradients(given):
    gradient = plain.as_gradient(given, variable([1.0], "float16"))
    assert keras.ops.is_tensor(gradient)
    assert dtype_of(gradient) == "float16"


def test_what_is_a_tensor_or_none_stays_as_it_is():
    for given in (None, keras.ops.ones(1)):
        assert plain.as_gradient(given, variable([1.0])) is given
    with pytest.raises((TypeError, ValueError)):
        plain.as_gradient("a", variable([1.0]))


def test_a_gradient_of_no_floating_dtype_is_refused():
    for dtype in ("int32", "bool"):
        with pytest.raises(TypeError, match=f"Received: {dtype} for variable 'w'"):
            plain.check(keras.ops.ones(1, dtype), variable([1.0], name="w"))
    imaginary = plain.as_gradient(np.array([1j]), variable([1.0]))
    with pytest.raises(TypeError, match="Received: complex128"):
        plain.check(imaginary, variable([1.0]))
    with pytest.raises(TypeError, match="come with variables"):
        plain.check(keras.ops.ones(1), keras.ops.ones(1))


@pytest.fixture(params=["float32", "float16"])
def floatx(request):
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx("float32")


@pytest.mark.usefixtures("floatx")
def test_gradients_are_widened_where_they_are_narrow():
    for narrow in ("float16", "bfloat16"):
        wide = plain.widened(keras.ops.ones(1, narrow))
        assert dtype_of(wide) == "float32"
    for dtype in ("float32", "float64"):
        gradient = keras.ops.ones(1, dtype)
        assert plain.widened(gradient) is gradient
    grads, rows, asserts = plain.as_taken([None, keras.ops.ones(1, "float16")], [], [])
    assert grads[0] is None
    assert dtype_of(grads[1]) == "float32"
    assert (rows, asserts) == ([None, None], [])


def test_a_gradient_of_another_shape_is_refused():
    weights = variable([1.0, 2.0], name="w")
    plain.check(keras.ops.ones(2), weights)
    plain.check(None, weights)
    with pytest.raises(ValueError, match="gradient") as e:
        plain.check(keras.ops.ones((2, 1)), weights)
    assert str(e.value) == (
        "A gradient must have the shape of its variable. Received: "
        "shape (2, 1) for variable 'w' of shape (2,)"
    )


def test_what_only_tensorflow_has_is_not_here():
    clocks = plain.clocks(lambda: [], lambda: None)
    assert (len(clocks), len(clocks.refused)) == (0, 0)
    assert plain.outside_functions is contextlib.nullcontext
    with plain.after([1]) as nothing:
        assert nothing is None
    gradient = keras.ops.ones(1)
    assert plain.is_for_kernel([], None) is False
    assert plain.why_no_kernel() == ""
    assert plain.scale_of_global_norm([gradient], 1.0, []) is None
    assert plain.all_finite([gradient], [])
    assert not plain.all_finite([gradient, gradient / 0], [])
    assert plain.has_slices([gradient]) is False
    assert plain.is_slices(gradient) is False
    assert plain.is_eager() is True
    way = plain.way(Update(None, None, Slots(None)), None)
    assert way == ("on its own", "operation by operation")
    kinds = plain.kinds_of_steps([], True, False)
    assert kinds == {"A step is part of what Keras' backend makes of it:": {}}


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_jax_compiles_with_xla(name, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: name)
    assert plain.inside_xla() is (name == "jax")


def test_a_step_runs_here_and_now():
    calls = []
    runner = plain.Runner()
    runner.forget_settings()
    grads, variables = [1], [2]
    runner.run(lambda *args: calls.append(args), grads, variables, None)
    assert calls == [(grads, variables)]
