"""The formula, against the reference and over what hypothesis can think of."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepping import assert_close

from keras_rmsprop import reference, rule

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
