"""The step of any backend, one variable after the other, beside the reference."""

import keras
import numpy as np
import pytest

from keras_rmsprop import reference, rule
from keras_rmsprop.backends.base import Backend, widened
from keras_rmsprop.codecs import Draw
from keras_rmsprop.rule import Slots
from keras_rmsprop.update import Constants, Update, update_in_turn, update_one

pytestmark = pytest.mark.float64

portable = Backend()


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
    step = Constants(formula, variable(0.1), Draw(None, count), decoupled)
    for _ in range(3):
        g = rng.normal(size=5)
        gradient = keras.ops.convert_to_tensor(g)
        update_in_turn(
            [Update(weights, gradient, slots, decay)], step, in_one_program=False
        )
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
    step = Constants(rule.Options(rho=0.0), rate, Draw(0, 0))
    taken, new = step.change(gradient, weights, one.slots, dtype=one.dtype, decay=0.5)
    assert dtype_of(taken) == dtype_of(new.velocity) == computed
    update_one(one, step)
    assert (dtype_of(weights), dtype_of(slot)) == (of_weights, kept)
    np.testing.assert_allclose(np.asarray(weights.numpy(), float), [0.5], rtol=1e-5)


def test_the_mean_is_handed_on():
    asked = []

    def mean(x):
        asked.append(x)
        return keras.ops.ones((), x.dtype)

    options = rule.Options(momentum=0.5, cautious=True)
    # The count is read for the bias correction alone.
    step = Constants(options, variable(0.5), Draw(None, step=None))
    x = keras.ops.ones(2, "float64")
    step.change(x, None, Slots(x, x), dtype="float64", mean=mean)
    assert len(asked) == 1


def test_constants_that_are_tensors_are_cast():
    options = rule.Options(rho=keras.ops.convert_to_tensor(0.5, "float32"), epsilon=0.0)
    x = keras.ops.ones(2, "float64")
    step = Constants(options, variable(0.5), Draw(None, 0))
    taken, new = step.change(x, None, Slots(x * 3), dtype="float64")
    np.testing.assert_allclose(new.velocity, [2.0] * 2, rtol=1e-12)
    np.testing.assert_allclose(taken, [0.5 / 2**0.5] * 2, rtol=1e-12)
    decay = keras.ops.convert_to_tensor(1.0, "float32")
    step = Constants(options, 1.0, Draw(None, 0), decoupled_weight_decay=False)
    taken, new = step.change(x, x * 2, Slots(x * 3), dtype="float64", decay=decay)
    # The gradient is 1 + 1 * 2, so v is 1.5 + 4.5.
    np.testing.assert_allclose(new.velocity, [6.0] * 2, rtol=1e-12)
    np.testing.assert_allclose(taken, [3 / 6**0.5] * 2, rtol=1e-12)


def test_assigned_by_functions_that_are_given():
    weights, slots = variable([1.0]), Slots(variable([0.0]), None, variable([0.0]))
    one = Update(weights, keras.ops.ones(1, "float64"), slots)
    step = Constants(rule.Options(rho=0.0), variable(0.5), Draw(None, 0))
    set_to, taken = [], []
    update_one(
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
    gradient = portable.as_gradient(given, variable([1.0], "float16"))
    assert keras.ops.is_tensor(gradient)
    assert dtype_of(gradient) == "float16"


def test_what_is_a_tensor_or_none_stays_as_it_is():
    for given in (None, keras.ops.ones(1)):
        assert portable.as_gradient(given, variable([1.0])) is given
    with pytest.raises((TypeError, ValueError)):
        portable.as_gradient("a", variable([1.0]))


def test_a_gradient_of_no_floating_dtype_is_refused():
    for dtype in ("int32", "bool"):
        with pytest.raises(TypeError, match=f"Received: {dtype} for variable 'w'"):
            portable.check(keras.ops.ones(1, dtype), variable([1.0], name="w"))
    imaginary = portable.as_gradient(np.array([1j]), variable([1.0]))
    with pytest.raises(TypeError, match="Received: complex128"):
        portable.check(imaginary, variable([1.0]))
    with pytest.raises(TypeError, match="come with variables"):
        portable.check(keras.ops.ones(1), keras.ops.ones(1))


@pytest.fixture(params=["float32", "float16"])
def floatx(request):
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx("float32")


@pytest.mark.usefixtures("floatx")
def test_gradients_are_widened_where_they_are_narrow():
    for narrow in ("float16", "bfloat16"):
        wide = widened(keras.ops.ones(1, narrow))
        assert dtype_of(wide) == "float32"
    for dtype in ("float32", "float64"):
        gradient = keras.ops.ones(1, dtype)
        assert widened(gradient) is gradient
    given = [None, keras.ops.ones(1, "float16")]
    grads, rows, asserts = portable.widened(given, [], {}, kernel=False)
    assert grads[0] is None
    assert dtype_of(grads[1]) == "float32"
    assert (rows, asserts) == ([None, None], [])


def test_a_gradient_of_another_shape_is_refused():
    weights = variable([1.0, 2.0], name="w")
    portable.check(keras.ops.ones(2), weights)
    portable.check(None, weights)
    with pytest.raises(ValueError, match="gradient") as e:
        portable.check(keras.ops.ones((2, 1)), weights)
    assert str(e.value) == (
        "A gradient must have the shape of its variable. Received: "
        "shape (2, 1) for variable 'w' of shape (2,)"
    )


def test_what_only_tensorflow_has_is_not_here():
    clocks = portable.clocks(None)
    assert (len(clocks), len(clocks.refused)) == (0, 0)
    for context in (
        portable.outside_functions(),
        portable.scope("my opt", convertible=False),
        portable.beside(None, None),
        portable.after([1]),
    ):
        with context as nothing:
            assert nothing is None
    gradient = keras.ops.ones(1)
    assert portable.is_for_kernel([], None) is False
    assert portable.has_kernel([]) is False
    assert portable.why_no_kernel() == ""
    assert portable.scale_of_global_norm([gradient], 1.0, kernel=True) is None
    assert portable.clipped_by_norm([gradient], 1.0, None) is None
    assert portable.all_finite([gradient], kernel=True)
    assert not portable.all_finite([gradient, gradient / 0], kernel=True)
    assert portable.has_slices([gradient]) is False
    assert portable.is_slices(gradient) is False
    assert portable.is_eager() is True
    way = portable.way(Update(None, None, Slots(None)), None)
    assert way == ("on its own", "operation by operation")
    kinds = portable.kinds_of_steps(None, [])
    assert kinds == {"A step is part of the program that Keras' backend makes": True}


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_jax_compiles_with_xla(name, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: name)
    assert portable.inside_xla() is (name == "jax")


def test_a_step_is_taken_stage_by_stage():
    calls = []

    class Steps:
        def take(self, *args):
            calls.append(args)

    grads, variables = [1], [2]
    portable.run(Steps(), grads, variables)
    assert calls == [(grads, variables)]


@pytest.mark.parametrize("holds", [True, False])
def test_either(holds):
    x, y = variable([1.0]), variable([2.0])
    condition = keras.ops.convert_to_tensor(holds)
    portable.either(condition, lambda: x.assign([3.0]), lambda: y.assign([4.0]), [x, y])
    expected = ([3.0], [2.0]) if holds else ([1.0], [4.0])
    assert (x.numpy().tolist(), y.numpy().tolist()) == expected
