"""The formula, against the reference and over what hypothesis can think of."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import BACKEND, assert_close

from keras_rmsprop import reference, rule

pytestmark = pytest.mark.float64

OPTIONS = {"rho": 0.9, "momentum": 0.0, "epsilon": 1e-7, "nesterov": False}


def run(gradients, dtype, *, lr=0.01, centered=False, **options):
    """Return the update of each step that `rule.step` takes."""
    zeros = keras.ops.zeros(gradients[0].shape, dtype)
    slots = rule.Slots(
        zeros, zeros if options["momentum"] else None, zeros if centered else None
    )
    updates = []
    lr = keras.ops.convert_to_tensor(np.asarray(lr, dtype))
    for g in gradients:
        g = keras.ops.convert_to_tensor(g, dtype)
        update, slots = rule.step(g, slots, lr, rule.Options(**options))
        updates.append(keras.ops.convert_to_numpy(update))
    return np.stack(updates)


def run_reference(gradients, *, lr=0.01, centered=False, **options):
    state, updates = {}, []
    for g in gradients:
        theta = reference.step(
            np.zeros_like(g),
            g,
            state,
            alpha=lr,
            beta=options["rho"],
            epsilon=options["epsilon"],
            momentum=options["momentum"],
            nesterov=options["nesterov"],
            centered=centered,
        )
        updates.append(-theta)
    return np.stack(updates)


@settings(max_examples=20 if BACKEND == "jax" else 100)  # which compiles for each shape
@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "float64"]),
    steps=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    lr=st.floats(1e-4, 1.0),
    rho=st.floats(0, 0.99),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    epsilon=st.sampled_from([1e-7, 1e-3, 1.0]),
    nesterov=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(shape, dtype, steps, scale, lr, seed, **options):
    rng = np.random.default_rng(seed)
    gradients = [scale * rng.normal(size=shape) for _ in range(steps)]
    if dtype == "float32":  # both start from the same numbers
        gradients = [g.astype(np.float32).astype(np.float64) for g in gradients]
        lr = float(np.float32(lr))
    assert_close(
        [run(gradients, dtype, lr=lr, **options)],
        [run_reference(gradients, lr=lr, **options)],
        rtol=1e-5 if dtype == "float32" else 1e-12,
    )


@pytest.mark.slow
@given(
    steps=st.integers(1, 20),
    rho=st.floats(0, 0.99),
    momentum=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_centered_equals_the_reference(steps, rho, momentum, seed):
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=(7,)) for _ in range(steps)]
    # With epsilon 1e-2 the rounding in v - a^2 stays small beside what it is added to.
    options = {"rho": rho, "momentum": momentum, "epsilon": 1e-2, "centered": True}
    options["nesterov"] = bool(seed % 2)
    assert_close(
        [run(gradients, "float64", **options)],
        [run_reference(gradients, **options)],
        rtol=1e-12,
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rho", [0.9, 0.99, 0.999])
def test_centered_stays_finite_where_gradients_are_constant(rho):
    # The variance is 0 and rounds to less: the built-in's root is NaN here.
    gradients = [np.full((3,), g) for g in [1e4] * 300]
    updates = run(gradients, "float32", centered=True, **OPTIONS | {"rho": rho})
    assert np.isfinite(updates).all()


@given(g=st.floats(-1e15, 1e15), lr=st.floats(0, 1))
def test_first_update_is_bounded(g, lr):
    # |u| <= lr / sqrt(1 - rho), whatever the gradient.
    [update] = run([np.array(g)], "float64", lr=lr, **OPTIONS)
    assert abs(update) <= lr / (1 - 0.9) ** 0.5 * (1 + 1e-12)
    assert update * g >= 0


def test_cautious_enlarges_by_a_thousand_at_most():
    # One of 4000 elements goes down: the others are skipped, this one is enlarged.
    g, m = np.full(4000, -1.0), np.full(4000, 5.0)
    g[7], m[7] = 1.0, 0.5
    options = {"momentum": 0.9, "cautious": True}
    slots = rule.Slots(*(keras.ops.convert_to_tensor(x) for x in (g**2, m)))
    taken, _ = rule.step(
        keras.ops.convert_to_tensor(g), slots, 0.1, rule.Options(**options)
    )
    state = {"v": g**2, "m": m, "t": 1}
    w = np.zeros(4000)
    expected = w - reference.step(w, g, state, alpha=0.1, epsilon=1e-7, **options)
    assert expected.nonzero()[0].tolist() == [7]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(taken), expected, rtol=1e-10)


def tensor(x, dtype="float64"):
    return keras.ops.convert_to_tensor(np.asarray(x, dtype))


EVERYTHING = {
    "momentum": 0.9,
    "nesterov": True,
    "centered": True,
    "epsilon_inside_sqrt": False,
    "bias_correction": True,
    "lr_in_momentum": False,
    "maximize": True,
    "cautious": True,
    "weight_decay": 0.5,
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        *({name: value, "momentum": 0.9} for name, value in EVERYTHING.items()),
        {"bias_correction": True, "centered": True},
        {"bias_correction": True, "beta": 0.0},
        {"lr_in_momentum": False},
        EVERYTHING,
    ],
    ids=str,
)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_each_option_as_in_the_reference(given, as_tensors):
    numbers = {"beta": 0.75, "epsilon": 0.01, "momentum": 0.0} | given
    own = dict(numbers, rho=numbers["beta"])
    decay, centered = own.pop("weight_decay", 0.0), own.pop("centered", False)
    del own["beta"]
    if as_tensors and own["rho"]:
        own |= {name: tensor(own[name]) for name in ("rho", "epsilon", "momentum")}
    zeros, rng, state = np.zeros(6), np.random.default_rng(0), {}
    slots = rule.Slots(
        tensor(zeros),
        tensor(zeros) if numbers["momentum"] else None,
        tensor(zeros) if centered else None,
    )
    w = rng.normal(size=6)
    for t in (1, 2, 3):
        g = rng.normal(size=6)
        g[t] = 0.0  # which neither goes up nor down
        taken, slots = rule.step(
            tensor(g),
            slots,
            tensor(0.3),
            rule.Options(**own),
            t=tensor(t),
            penalty=tensor(decay * w) if decay else None,
        )
        options = dict(numbers, centered=centered, decoupled_weight_decay=False)
        expected = w - reference.step(w, g, state, alpha=0.3, **options)
        np.testing.assert_allclose(taken, expected, rtol=1e-12)
        for slot, name in zip(slots, ("v", "m", "mean"), strict=True):
            if slot is not None:
                np.testing.assert_allclose(slot, state[name], rtol=1e-12)
    assert (slots.momentum is None) == (not numbers["momentum"])
    assert (slots.average_gradient is None) == (not centered)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_averages_are_of_gradients_up_to_half_the_root_of_the_largest(dtype):
    most = float(np.finfo(dtype).max) ** 0.5 / 2
    below, above = 0.75 * most, 3.0 * most

    def averages(g):
        zero = tensor([0.0], dtype)
        slots = rule.Slots(zero, None, zero)
        options = rule.Options(rho=0.5)
        _, new = rule.step(tensor([g], dtype), slots, tensor(1.0, dtype), options)
        return [float(slot[0]) for slot in (new.velocity, new.average_gradient)]

    for g, seen in ((below, below), (-below, -below), (above, most), (-above, -most)):
        np.testing.assert_allclose(averages(g), [seen**2 / 2, seen / 2], rtol=2e-3)


def test_cautious_takes_the_mean_it_is_given():
    slots = rule.Slots(tensor([0.0] * 5))
    options = rule.Options(rho=0.0, momentum=0.5, epsilon=1e-30, cautious=True)
    seen = []

    def mean(agrees):
        seen.append(np.asarray(agrees).tolist())
        return tensor(0.25)

    g = tensor([2.0, -3.0, 4.0, -5.0, 0.0])  # over its root each is 1 or -1, or 0
    slots = slots._replace(momentum=tensor([0.0, 0.0, -6.0, 6.0, 6.0]))
    taken, _ = rule.step(g, slots, tensor(1.0), options, mean=mean)
    np.testing.assert_allclose(taken, [4.0, -4.0, 0.0, 0.0, 0.0])
    assert seen == [[1.0, 1.0, 0.0, 0.0, 0.0]]


def test_slots_that_are_there():
    three, one = rule.Slots(1.0, 2.0, 3.0), rule.Slots(1.0)
    assert three.map(lambda x: x + 1) == rule.Slots(2.0, 3.0, 4.0)
    assert one.map(lambda x: x + 1) == rule.Slots(2.0, None, None)
    assert three.with_momentum_times(5) == rule.Slots(1.0, 10.0, 3.0)
    assert one.with_momentum_times(5) is one


def test_options_are_cast_where_they_are_tensors():
    given = rule.Options(rho=tensor(0.5), momentum=0.25, maximize=True)
    cast = given.cast("float16")
    assert keras.backend.standardize_dtype(cast.rho.dtype) == "float16"
    assert float(cast.rho) == 0.5
    assert all(x is y for x, y in zip(cast[1:], given[1:], strict=True))


def test_all_may_be_known_when_it_runs_only():
    x = keras.KerasTensor((3,), "float32")
    number = keras.KerasTensor((), "float32")
    options = rule.Options(number, number, number, bias_correction=True, cautious=True)
    slots = rule.Slots(x, x, x)
    taken, new = rule.step(x, slots, number, options, t=number, penalty=x)
    for result in (taken, *new):
        assert isinstance(result, keras.KerasTensor)
        assert (result.shape, result.dtype) == ((3,), "float32")
