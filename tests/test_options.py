"""One table of options: each equals the built-in, in every way to take a step."""

import keras
import numpy as np
import pytest
from stepping import SHAPES, WAYS, arrays, assert_close, train

from keras_rmsprop import RMSprop, reference

schedules = keras.optimizers.schedules

OPTIONS = {
    "defaults": {},
    "learning rate 0": {"learning_rate": 0.0},
    "rho 0": {"rho": 0.0},
    "rho 0.99": {"rho": 0.99},
    "epsilon": {"epsilon": 1e-2},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "momentum, centered": {"momentum": 0.9, "centered": True},
    "weight decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.2},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "EMA": {"use_ema": True, "ema_momentum": 0.9},
    "EMA, overwritten": {
        "use_ema": True,
        "ema_momentum": 0.9,
        "ema_overwrite_frequency": 3,
    },
    "loss scale": {"loss_scale_factor": 1024.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, EMA": {
        "gradient_accumulation_steps": 3,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
    },
    "schedule": {
        "learning_rate": schedules.PiecewiseConstantDecay([5, 12], [0.1, 0.05, 0.01])
    },
    "callable": {"learning_rate": lambda: 0.05},
    "everything": {
        "learning_rate": schedules.PiecewiseConstantDecay([5, 12], [0.1, 0.05, 0.01]),
        "rho": 0.8,
        "momentum": 0.5,
        "epsilon": 1e-3,
        "centered": True,
        "weight_decay": 0.01,
        "global_clipnorm": 2.0,
        "use_ema": True,
        "ema_overwrite_frequency": 4,
        "loss_scale_factor": 8.0,
        "gradient_accumulation_steps": 2,
    },
}
RTOL = {"float32": 1e-5, "float64": 1e-12}


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_built_in(options, dtype):
    expected = train(keras.optimizers.RMSprop(**options), dtype=dtype)
    for way in ["eager", "XLA"] if dtype == "float64" else ["eager"]:
        optimizer = RMSprop(**options)
        assert_close(train(optimizer, dtype=dtype, way=way), expected, RTOL[dtype])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    "momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=repr
)
def test_equals_the_reference(momentum, centered, way):
    options = {"epsilon": 1e-3, "centered": centered} | momentum
    optimizer = RMSprop(0.01, **options)
    weights, _ = train(optimizer, dtype="float64", way=way)
    expected, states = arrays(dtype="float64"), [{} for _ in SHAPES]
    alpha = float(optimizer.learning_rate.numpy())  # 0.01 in float32
    for seed in range(1, 21):
        gradients = arrays(dtype="float64", seed=seed)
        expected = [
            reference.step(w, g, state, alpha=alpha, beta=0.9, **options)
            for w, g, state in zip(expected, gradients, states, strict=True)
        ]
    assert_close(weights, expected, 1e-12)


@pytest.mark.parametrize("exclude", [{"var_names": ["bias"]}, {"var_list": "first"}])
def test_weight_decay_exclusions(exclude):
    def run(optimizer, exclude=exclude):
        variables = [
            keras.Variable([1.0, -2.0], name="kernel"),
            keras.Variable([3.0, 4.0], name="bias"),
        ]
        if exclude == {"var_list": "first"}:
            optimizer.exclude_from_weight_decay(var_list=variables[:1])
        elif exclude:
            optimizer.exclude_from_weight_decay(**exclude)
        for _ in range(3):
            optimizer.apply([np.array([0.1, 0.2], "float32")] * 2, variables)
        return [v.numpy() for v in variables]

    options = {"learning_rate": 0.1, "weight_decay": 0.5}
    expected = run(keras.optimizers.RMSprop(**options))
    assert_close(run(RMSprop(**options)), expected, 1e-6)
    decayed = run(RMSprop(**options), exclude={})
    assert not np.allclose(decayed, expected)


def test_empty_matrices_which_the_built_in_cannot_step():
    variable = keras.Variable(np.zeros((0, 3), "float32"))
    RMSprop().apply([np.zeros((0, 3), "float32")], [variable])
    with pytest.raises(Exception, match="Biases must be 1D"):
        keras.optimizers.RMSprop().apply([np.zeros((0, 3), "float32")], [variable])
