"""How a step is taken on PyTorch: beside torch's own; in blocks, as the plain way."""

import numpy as np
import pytest
from stepping import BACKEND, arrays, tensor

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="only on PyTorch")

if BACKEND == "torch":
    import keras
    import torch

    from keras_rmsprop import RMSprop
    from keras_rmsprop.backends.base import Backend
    from keras_rmsprop.backends.torch import Torch

SHAPES = [(), (5,), (0,), (3, 3, 2, 4), (70, 90), (9, 2**16)]
"""The last one is in several blocks."""


def made(kind, dtype="float32", shapes=SHAPES, **options):
    keras.utils.set_random_seed(0)
    variables = [keras.Variable(x, dtype=dtype) for x in arrays(shapes)]
    optimizer = kind(**{"learning_rate": 0.01, **options})
    optimizer.build(variables)
    return variables, optimizer


def steps(variables, optimizer, number=4):
    for seed in range(1, number + 1):
        gradients = arrays([v.shape for v in variables], seed=seed)
        pairs = zip(gradients, variables, strict=True)
        optimizer.apply([tensor(g, v.dtype) for g, v in pairs])
    return [v.value.detach().float().numpy() for v in variables + optimizer.variables]


OPTIONS = [
    {},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"centered": True, "epsilon": 1e-3, "global_clipnorm": 1.0},
    {"momentum": 0.9, "cautious": True, "bias_correction": True},
    {"decoupled_weight_decay": False, "weight_decay": 0.1, "maximize": True},
    {"slot_dtype": "bfloat16", "momentum": 0.5},
    {"slot_dtype": "uint8", "momentum": 0.5},
    {"use_ema": True, "gradient_accumulation_steps": 2},
    {"learning_rate": "auto"},
]


@pytest.mark.portable
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_equals_the_plain_way(dtype, options, monkeypatch):
    found = steps(*made(RMSprop, dtype, **options))
    monkeypatch.setattr(Torch, "update", Backend.update)
    expected = steps(*made(RMSprop, dtype, **options))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("jit_compile", ["auto", False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_equals_torch(momentum, centered, jit_compile):
    options = {"momentum": momentum, "centered": centered}
    own = {"epsilon_inside_sqrt": False, "lr_in_momentum": False}
    own["jit_compile"] = jit_compile
    variables, optimizer = made(RMSprop, epsilon=1e-3, **options, **own)
    found = steps(variables, optimizer)
    parameters = [torch.nn.Parameter(torch.tensor(x)) for x in arrays(SHAPES)]
    peer = torch.optim.RMSprop(parameters, 0.01, 0.9, 1e-3, foreach=True, **options)
    for seed in range(1, 5):
        for p, g in zip(parameters, arrays(SHAPES, seed=seed), strict=True):
            p.grad = torch.tensor(g)
        peer.step()
    for got, want in zip(found[: len(SHAPES)], parameters, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_slots_stay_where_they_are():
    variables, optimizer = made(RMSprop, momentum=0.9)
    places = [v.value.data_ptr() for v in variables + optimizer.variables]
    kept = [v.value for v in optimizer.variables if v.shape]
    steps(variables, optimizer)
    assert [v.value.data_ptr() for v in variables] == places[: len(variables)]
    for value, variable in zip(
        kept, (v for v in optimizer.variables if v.shape), strict=True
    ):
        assert value is variable.value


def test_a_variable_twice_is_updated_twice():
    [variable], optimizer = made(RMSprop, shapes=[(5,)])
    optimizer.apply([tensor([1.0] * 5), tensor([2.0] * 5)], [variable, variable])
    [twin], builtin = made(keras.optimizers.RMSprop, shapes=[(5,)])
    for g in (1.0, 2.0):
        builtin.apply([tensor([g] * 5)], [twin])
    np.testing.assert_allclose(*(v.value.detach().numpy() for v in (variable, twin)))


@pytest.mark.portable  # a step as a function has no kernel
def test_a_step_as_a_function_changes_nothing():
    variables, optimizer = made(RMSprop)
    before = [v.value.detach().clone() for v in variables + optimizer.variables]
    state = [v.value for v in optimizer.variables]
    gradients = [tensor(g) for g in arrays(SHAPES, seed=1)]
    new, _ = optimizer.stateless_apply(state, gradients, [v.value for v in variables])
    for old, variable in zip(before, variables + optimizer.variables, strict=True):
        assert torch.equal(old, variable.value)
    expected = steps(variables, optimizer, number=1)
    for got, want in zip(new, expected, strict=False):
        np.testing.assert_array_equal(got.detach().numpy(), want)


@pytest.mark.portable
def test_explains():
    _, optimizer = made(RMSprop)
    text = " ".join(optimizer.explain().split())
    assert "4 concatenated with others" in text
    assert "2 in blocks" in text
