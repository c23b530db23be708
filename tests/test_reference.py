"""The oracle itself, against numbers worked out by hand."""

import ast
from pathlib import Path

import numpy as np
import pytest

from keras_rmsprop import reference


def test_two_steps_by_hand():
    # beta 0.5, g = 2: v = 0.5 * 4 = 2, then g = 1: v = 0.5 * 2 + 0.5 * 1 = 1.5.
    state = {}
    theta = reference.step(1.0, 2.0, state, alpha=0.1, beta=0.5, epsilon=0.0)
    assert theta == pytest.approx(1 - 0.2 / 2**0.5, rel=1e-15)
    theta = reference.step(theta, 1.0, state, alpha=0.1, beta=0.5, epsilon=0.0)
    assert theta == pytest.approx(1 - 0.2 / 2**0.5 - 0.1 / 1.5**0.5, rel=1e-15)
    assert state["v"] == 1.5


def test_epsilon_stands_inside_the_root():
    # v = 0.1 * 0 = 0, so the gradient is divided by sqrt(0.25), not by 0.25.
    theta = reference.step(0.0, 1e-9, {}, alpha=1.0, epsilon=0.25)
    assert theta == pytest.approx(-2e-9, rel=1e-12)


def test_momentum_and_centered_by_hand():
    # beta 0.5, g = 2: v = 2, mean = 1, variance = 1, update = 0.1 * 2 = 0.2; then
    # g = 0: v = 1, mean = 0.5, update = 0 and the sum is 0.9 * 0.2.
    state = {}
    options = {"alpha": 0.1, "beta": 0.5, "epsilon": 0.0, "centered": True}
    theta = reference.step(1.0, 2.0, state, momentum=0.9, **options)
    assert theta == pytest.approx(0.8, rel=1e-15)
    theta = reference.step(theta, 0.0, state, momentum=0.9, **options)
    assert theta == pytest.approx(0.8 - 0.18, rel=1e-15)


def test_nesterov_by_hand():
    # u = 0.1 * 1 / 1 = 0.1, m = 0.1, and the step is 0.5 * 0.1 + 0.1.
    options = {"alpha": 0.1, "beta": 0.0, "epsilon": 0.0, "momentum": 0.5}
    theta = reference.step(1.0, 1.0, {}, nesterov=True, **options)
    assert theta == pytest.approx(0.85, rel=1e-15)


def test_minimize_finds_the_minimum():
    target = np.array([3.0, -1.0])
    theta = reference.minimize(lambda t: 2 * (t - target), [0.0, 0.0], 2000, alpha=0.01)
    np.testing.assert_allclose(theta, target, atol=0.02)


def test_it_imports_numpy_and_nothing_of_ours():
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported == {"numpy", "numpy.typing", "collections.abc", "typing"}
