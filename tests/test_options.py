"""One table of options: each equals the built-in, in every way to take a step."""

import keras
import numpy as np
import pytest
from stepping import BACKEND, SHAPES, WAYS, arrays, assert_close, tensor, train

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


# Elsewhere it is the built-in that is less exact: in averages of the weights, and on
# PyTorch in norms and weight decay, which are those of float32.
# as float32 is in norms and weight decay.
RTOL = {"float32": 1e-5, "float64": 1e-12 if BACKEND == "tensorflow" else 1e-9}
AS_FLOAT32 = {"global_clipnorm", "weight_decay"} if BACKEND == "torch" else set()


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [
        *((name, "float64", "eager") for name in OPTIONS),
        ("defaults", "float32", "eager"),
        *(("everything", "float32", way) for way in WAYS),
        *((name, "float64", "XLA") for name in ["momentum, centered", "schedule"]),
        *(
            (name, "float64", "XLA")
            for name in ["global_clipnorm", "accumulation, EMA"]
        ),
    ],
)
def test_equals_the_built_in(name, dtype, way):
    expected = train(keras.optimizers.RMSprop(**OPTIONS[name]), dtype=dtype)
    result = train(RMSprop(**OPTIONS[name]), dtype=dtype, way=way)
    rtol = 1e-6 if AS_FLOAT32 & {*OPTIONS[name]} else RTOL[dtype]
    assert_close(result, expected, rtol if dtype == "float64" else RTOL[dtype])


# What the built-in does not have; the peers of test_dialects.py have it.
DIALECTS = {
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, centered": {"momentum": 0.9, "nesterov": True, "centered": True},
    "epsilon outside": {"epsilon_inside_sqrt": False},
    "epsilon outside, centered": {"epsilon_inside_sqrt": False, "centered": True},
    "v starts at 1": {"initial_accumulator_value": 1.0},
    "bias correction": {"bias_correction": True},
    "bias correction, rho 0": {"bias_correction": True, "rho": 0.0},
    "bias correction, centered": {"bias_correction": True, "centered": True},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "learning rate late": {"momentum": 0.9, "lr_in_momentum": False},
    "maximize": {"maximize": True},
    "maximize, L2": {
        "maximize": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
    },
    "cautious": {"momentum": 0.9, "cautious": True},
    "cautious, without momentum": {"cautious": True},
    "everything": {
        "rho": 0.8,
        "momentum": 0.5,
        "centered": True,
        "weight_decay": 0.1,
        "epsilon_inside_sqrt": False,
        "initial_accumulator_value": 0.5,
        "bias_correction": True,
        "nesterov": True,
        "lr_in_momentum": False,
        "decoupled_weight_decay": False,
        "maximize": True,
        "cautious": True,
    },
}


def in_reference(options):
    """Return the options in the words of `reference.step`."""
    return {"beta": 0.9, "epsilon": 1e-3} | {
        {"rho": "beta"}.get(name, name): value for name, value in options.items()
    }


@pytest.mark.float64
@pytest.mark.one_in(5)
@pytest.mark.parametrize("way", ["eager", "tf.function"])  # the first one is XLA, too
@pytest.mark.parametrize("options", DIALECTS.values(), ids=DIALECTS)
def test_equals_the_reference(options, way):
    # Two learning rates: what is left of the first one shows where it enters.
    rates = np.float32([0.1, 0.03]).astype(float)
    schedule = schedules.PiecewiseConstantDecay([9], rates.tolist())
    optimizer = RMSprop(schedule, **{"epsilon": 1e-3} | options)
    weights, _ = train(optimizer, dtype="float64", way=way)
    expected, states = arrays(dtype="float64"), [{} for _ in SHAPES]
    for t in range(20):
        gradients = arrays(dtype="float64", seed=t + 1)
        expected = [
            reference.step(
                w, g, state, alpha=rates[int(t > 9)], **in_reference(options)
            )
            for w, g, state in zip(expected, gradients, states, strict=True)
        ]
    assert_close(weights, expected, 1e-12 if BACKEND == "tensorflow" else 1e-11)


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
            optimizer.apply([tensor([0.1, 0.2])] * 2, variables)
        return [v.numpy() for v in variables]

    options = {"learning_rate": 0.1, "weight_decay": 0.5}
    expected = run(keras.optimizers.RMSprop(**options))
    assert_close(run(RMSprop(**options)), expected, 1e-6)
    decayed = run(RMSprop(**options), exclude={})
    assert not np.allclose(decayed, expected)


def test_empty_matrices_which_the_built_in_cannot_step():
    variable = keras.Variable(np.zeros((0, 3), "float32"))
    RMSprop().apply([np.zeros((0, 3), "float32")], [variable])
    if BACKEND == "tensorflow":
        with pytest.raises(Exception, match="Biases must be 1D"):
            keras.optimizers.RMSprop().apply([np.zeros((0, 3), "float32")], [variable])
