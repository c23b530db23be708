"""What `test_torch.py` checks, in a process whose backend is PyTorch."""

import doctest
import json
import random
import traceback
import warnings
from unittest import mock

import keras
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keras_rmsprop import RMSprop, reference
from keras_rmsprop.backends import recording, statements
from keras_rmsprop.backends import torch as backend

SHAPES = [(), (5,), (0,), (3, 3, 2, 4), (50, 100), (3, 60_000)]
OPTIONS = [
    {},
    {"momentum": 0.9, "bias_correction": True},
    {"momentum": 0.9, "nesterov": True, "centered": True},
    {"momentum": 0.9, "lr_in_momentum": False, "maximize": True},
    {"momentum": 0.5, "cautious": True},
    {"epsilon_inside_sqrt": False, "initial_accumulator_value": 0.5},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
]
"""Those that `reference.step` has, too."""
OTHERS = [
    {"clipnorm": 0.1},
    {"clipvalue": 0.1, "loss_scale_factor": 8.0},
    {"global_clipnorm": 0.1, "weight_decay": 0.1, "momentum": 0.9, "centered": True},
    {"use_ema": True, "ema_momentum": 0.5, "ema_warmup": True},
    {"use_ema": True, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2, "momentum": 0.5},
    {"gradient_accumulation_steps": 3, "use_ema": True},
    {"skip_nonfinite": True},
    {"slot_dtype": "bfloat16", "momentum": 0.9},
    {"slot_dtype": "float64", "centered": True},
    {"slot_dtype": "float32"},
    {"learning_rate": "auto"},
    {"learning_rate": "auto", "use_ema": True, "global_clipnorm": 0.1},
    {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)},
]
STEPS = 10


def normal(shapes=SHAPES, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=s)).to(getattr(torch, dtype)) for s in shapes]


def variables(shapes=SHAPES, dtype="float32"):
    return [keras.Variable(x, dtype=dtype) for x in normal(shapes, dtype=dtype)]


def train(dtype="float32", steps=STEPS, shapes=SHAPES, **options):
    """Return the optimizer, and the weights and slots after some steps."""
    random.seed(0)
    weights = variables(shapes, dtype)
    optimizer = RMSprop(**{"learning_rate": 0.01} | options)
    optimizer.build(weights)
    for seed in range(1, steps + 1):
        optimizer.apply(normal(shapes, seed, dtype), weights)
    return optimizer, [np.array(x.value.detach().double()) for x in all_of(optimizer)]


def all_of(optimizer):
    return [*optimizer._trainable_variables, *optimizer.variables]


def records(optimizer):
    return [r for kind in optimizer._runner._kinds.values() for r in kind.records]


def refuse(*_):
    raise AssertionError("not from a record")


def only_records(optimizer):
    """Let an optimizer fail where it takes a step in any other way."""
    optimizer.__dict__["_take"] = refuse


def assert_same(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def pairs_of_both_ways():
    for options in [*OPTIONS, *OTHERS]:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            if dtype != "float32" and "learning_rate" in options:
                continue
            optimizer, found = train(dtype, **options)
            assert records(optimizer) or "ema_overwrite_frequency" in options, options
            plain, expected = train(dtype, jit_compile=False, **options)
            assert not records(plain)
            yield dtype, options, found, expected


def check_records_that_are_not_fused_give_just_what_the_plain_way_gives():
    with mock.patch.object(statements, "fused", lambda lines, *_: lines):
        for _, _, found, expected in pairs_of_both_ways():
            assert_same(found, expected)


def check_records_round_otherwise_at_most():
    digits = {"bfloat16": 2e-2, "float16": 2e-3}
    for dtype, options, found, expected in pairs_of_both_ways():
        rtol = 2e-2 if "slot_dtype" in options else digits.get(dtype, 2e-5)
        for x, y in zip(found, expected, strict=True):
            scale = np.abs(y).max(initial=1e-30)
            np.testing.assert_allclose(
                x, y, rtol=0, atol=rtol * scale, err_msg=f"{dtype} {options}"
            )


def check_single_numbers():
    for shape in ((), (1,)):
        for options in OPTIONS:
            optimizer, found = train(shapes=[shape], **options)
            assert records(optimizer)
            _, expected = train(shapes=[shape], jit_compile=False, **options)
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5)


def check_records_give_what_the_reference_gives():
    for options in OPTIONS:
        weights = [np.array(x) for x in normal(dtype="float64")]
        states = [{} for _ in weights]
        for seed in range(1, STEPS + 1):
            gradients = [np.array(x) for x in normal(seed=seed, dtype="float64")]
            trios = zip(weights, gradients, states, strict=True)
            given = {"alpha": float(np.float32(0.01)), "beta": 0.9, "epsilon": 1e-7}
            weights = [reference.step(*trio, **given | options) for trio in trios]
        optimizer, found = train("float64", **options)
        assert records(optimizer)
        for x, y in zip(found, weights, strict=False):
            # Keras computes in float32 there.
            np.testing.assert_allclose(x, y, 1e-4, 1e-5, err_msg=str(options))


def check_records_give_what_torch_gives():
    for options, given in (
        ({}, {}),
        ({"centered": True}, {"centered": True}),
        ({"momentum": 0.9, "lr_in_momentum": False}, {"momentum": 0.9}),
        (
            {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
            {"weight_decay": 0.1, "maximize": True},
        ),
    ):
        optimizer, found = train(epsilon_inside_sqrt=False, epsilon=1e-4, **options)
        assert records(optimizer)
        parameters = [torch.nn.Parameter(x) for x in normal()]
        torchs = torch.optim.RMSprop(parameters, 0.01, 0.9, 1e-4, foreach=True, **given)
        for seed in range(1, STEPS + 1):
            for parameter, gradient in zip(parameters, normal(seed=seed), strict=True):
                parameter.grad = gradient
            torchs.step()
        for x, y in zip(found, parameters, strict=False):
            np.testing.assert_allclose(x, y.detach(), rtol=1e-4, atol=1e-5)


def check_dtypes_and_devices_may_be_mixed():
    def mixed(**options):
        weights = [
            keras.Variable(torch.ones(shape), dtype=dtype)
            for dtype in ("float32", "bfloat16", "float16", "float64")
            for shape in ((7,), (2000,), (100, 60))
        ]
        with keras.device("meta"):
            weights.append(keras.Variable(torch.ones(3, device="meta")))
        optimizer = RMSprop(0.01, momentum=0.5, **options)
        optimizer.build(weights)
        # Keras makes slots on its current device.
        for slots in (optimizer._velocities, optimizer._momentums):
            slots[-1]._value = torch.nn.Parameter(torch.ones(3, device="meta"))
        for seed in range(STEPS):
            grads = [
                torch.as_tensor(
                    np.random.default_rng(seed).normal(size=tuple(w.shape))
                ).to(w.value.dtype)
                for w in weights[:-1]
            ]
            grads.append(torch.ones(3, device="meta"))
            optimizer.apply(grads, weights)
        return optimizer, [np.array(w.value.detach().float()) for w in weights[:-1]]

    optimizer, found = mixed()
    assert records(optimizer)
    assert len(found) == 12
    alone, expected = [], []
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        del alone[:]
        for shape in ((7,), (2000,), (100, 60)):
            weight = keras.Variable(torch.ones(shape), dtype=dtype)
            one = RMSprop(0.01, momentum=0.5, jit_compile=False)
            for seed in range(STEPS):
                g = torch.as_tensor(np.random.default_rng(seed).normal(size=shape))
                one.apply([g.to(weight.value.dtype)], [weight])
            expected.append(np.array(weight.value.detach().float()))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-2)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made in its context."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        views = any(x.alias_info is not None for x in func._schema.returns)
        if isinstance(result, torch.Tensor) and not views:
            self.elements = max(self.elements, result.numel())
        return result


def check_large_variables_are_not_copied():
    shape, most = (1024, 1024), backend.BLOCK_ELEMENTS
    options = {"momentum": 0.9, "centered": True, "weight_decay": 0.1}
    optimizer, _ = train(shapes=[shape, (5,)], **options)
    only_records(optimizer)
    places = [x.value.data_ptr() for x in all_of(optimizer)]
    grads = normal([shape, (5,)])
    with Largest() as largest:
        optimizer.apply(grads, optimizer._trainable_variables)
    assert 0 < largest.elements <= most, largest.elements
    assert places == [x.value.data_ptr() for x in all_of(optimizer)]
    (record,) = records(optimizer)
    kept = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for name, x in record.__globals__.items()
        if name.startswith("p")
    }
    assert 0 < sum(kept.values()) <= 4 * 4 * most


def check_what_is_assigned_takes_effect():
    def run(jit_compile):
        weights = variables()
        optimizer = RMSprop(0.01, weight_decay=0.1, jit_compile=jit_compile)
        for seed in range(6 * STEPS):
            if seed == STEPS:
                optimizer.learning_rate = 0.5
            if seed == 2 * STEPS:
                optimizer.rho = 0.5
            if seed == 3 * STEPS:
                optimizer.learning_rate = keras.Variable(0.2)
            if seed == 4 * STEPS:
                for weight in weights:
                    weight.value.data = weight.value.detach() + 1
                weights[1].constraint = keras.constraints.NonNeg()
            if seed == 5 * STEPS:
                weights[1].assign(weights[1] * 2)
                optimizer.learning_rate.assign(0.1) if hasattr(
                    optimizer.learning_rate, "assign"
                ) else None
            optimizer.apply(normal(seed=seed), weights)
        return [np.array(x.value.detach()) for x in all_of(optimizer)]

    with mock.patch.object(statements, "fused", lambda lines, *_: lines):
        assert_same(run("auto"), run(False))


def check_callables_give_the_rate_at_each_step():
    rates = iter([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    weight = keras.Variable([0.0])
    optimizer = RMSprop(lambda: next(rates), rho=0.0)
    for _ in range(7):
        optimizer.apply([torch.ones(1)], [weight])
    np.testing.assert_allclose(weight.numpy(), [-12.7], rtol=1e-5)
    assert records(optimizer)


def check_what_python_computes_is_not_recorded():
    class Halved(keras.constraints.Constraint):
        def __call__(self, w):
            return w.numpy() / 2

    class Counted(keras.constraints.Constraint):
        count = 0

        def __call__(self, w):
            self.count += 1
            return w * 0 + self.count

    for constraint, expected in ((Halved(), None), (Counted(), STEPS)):
        for shape in ((), (3,)):
            weight = keras.Variable(torch.ones(shape))
            weight.constraint = constraint
            constraint.count = 0
            optimizer = RMSprop(0.1, rho=0.0)
            value = 1.0
            for _ in range(STEPS):
                optimizer.apply([torch.ones(shape)], [weight])
                value = (value - 0.1) / 2
            np.testing.assert_allclose(
                weight.numpy(), value if expected is None else expected, rtol=1e-5
            )
            assert not records(optimizer)


def check_conditions_are_looked_at_again():
    weights = variables([(5,), (2000,)])
    optimizer = RMSprop(0.1, skip_nonfinite=True)
    for _ in range(STEPS):
        optimizer.apply([torch.ones(5), torch.ones(2000)], weights)
    assert records(optimizer)
    before = [np.array(x.value.detach()) for x in all_of(optimizer)]
    optimizer.apply([torch.ones(5), torch.full((2000,), torch.nan)], weights)
    assert int(optimizer.skipped_steps) == 1
    optimizer.skipped_steps.assign(0)
    assert_same([np.array(x.value.detach()) for x in all_of(optimizer)], before)


def check_wrong_gradients_change_nothing():
    optimizer, before = train()
    weights = optimizer._trainable_variables
    for wrong in (torch.ones(4), torch.ones((1, 5)), [1.0]):
        grads = normal()
        grads[1] = wrong
        with pytest.raises(ValueError, match="must have the shape of its variable"):
            optimizer.apply(grads, weights)
    assert_same([np.array(x.value.detach()) for x in all_of(optimizer)], before)


def check_variables_without_a_gradient_stay():
    weights = variables([(5,), (3,)])
    optimizer = RMSprop(0.1)
    optimizer.build(weights)
    before = weights[0].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            optimizer.apply([None, torch.ones(3)], weights)
    assert records(optimizer)
    assert_same(
        [weights[0].numpy(), optimizer._velocities[0].numpy()], [before, 0 * before]
    )
    weights[1].trainable = False  # as of a frozen layer
    for _ in range(STEPS):
        optimizer.apply([torch.ones(5)], weights[:1])
    expected = keras.Variable(before)
    one = keras.optimizers.RMSprop(0.1)
    for _ in range(STEPS):
        one.apply([torch.ones(5)], [expected])
    np.testing.assert_allclose(weights[0].numpy(), expected.numpy(), rtol=1e-5)


def check_weight_decay_excludes():
    weights = [keras.Variable(torch.ones(5), name=n) for n in ("kernel", "bias")]
    optimizer = RMSprop(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    for _ in range(STEPS):
        optimizer.apply([torch.zeros(5)] * 2, weights)
        optimizer.apply([torch.zeros(5), torch.zeros(5)], weights)
    assert records(optimizer)
    np.testing.assert_allclose(weights[0].numpy(), [0.95 ** (2 * STEPS)] * 5, rtol=1e-5)
    assert_same([weights[1].numpy()], [np.ones(5)])


def check_subclasses_take_steps_in_their_own_way():
    calls = []

    class Own(RMSprop):
        def update_step(self, gradient, variable, learning_rate):
            calls.append(variable)
            super().update_step(gradient, variable, learning_rate)

    class Assigns(RMSprop):
        def assign_sub(self, variable, value):
            calls.append(variable)
            super().assign_sub(variable, value)

    _, expected = train(jit_compile=False)
    for made in (Own, Assigns):
        del calls[:]
        weights, optimizer = variables(), made(0.01)
        for seed in range(1, STEPS + 1):
            optimizer.apply(normal(seed=seed), weights)
        assert len(calls) == STEPS * len(weights)
        found = [np.array(x.value.detach().double()) for x in all_of(optimizer)]
        assert_same(found, expected)


def check_custom_loops_need_no_context():
    layer = keras.layers.Dense(3)
    layer.build((4,))
    weights, optimizer = layer.trainable_variables, RMSprop(0.01)
    losses = []
    for _ in range(10 * STEPS):
        loss = (layer(torch.ones((2, 4))) ** 2).mean()
        for weight in weights:
            weight.value.grad = None
        loss.backward()
        optimizer.apply([w.value.grad for w in weights], weights)
        losses.append(float(loss.detach()))
    assert records(optimizer)
    assert losses[-1] < 0.1 * losses[0]
    assert all(w.value.is_leaf and w.value.requires_grad for w in weights)


def check_fit_gives_what_the_built_in_gives():
    def losses(optimizer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile(optimizer, "mse")
        x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
        history = model.fit(x, x[:, :3], batch_size=8, epochs=4, verbose=0)
        return history.history["loss"]

    for options in ({}, {"momentum": 0.5, "use_ema": True, "clipnorm": 1.0}):
        optimizer = RMSprop(0.01, **options)
        found = losses(optimizer)
        assert records(optimizer)
        expected = losses(keras.optimizers.RMSprop(0.01, **options))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def check_a_compiled_loop_takes_plain_steps():
    weights, optimizer = variables([(5,)]), RMSprop(0.1)
    optimizer.build(weights)
    step = torch.compile(lambda g: optimizer.apply([g], weights), backend="eager")
    expected, plain = variables([(5,)]), RMSprop(0.1, jit_compile=False)
    for seed in range(3):
        step(normal([(5,)], seed)[0])
        plain.apply(normal([(5,)], seed), expected)
    assert not records(optimizer)
    np.testing.assert_allclose(weights[0].numpy(), expected[0].numpy(), rtol=1e-6)


def check_a_stateless_step_leaves_variables_alone():
    weights, optimizer = variables([(5,)]), RMSprop(0.1)
    optimizer.build(weights)
    before = weights[0].numpy()
    found, _ = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], [torch.ones(5)], [weights[0].value]
    )
    assert_same([weights[0].numpy()], [before])
    np.testing.assert_allclose(found[0].detach(), before - 0.1 / 0.1**0.5, rtol=1e-4)


def check_what_explain_says():
    optimizer, _ = train(jit_compile="auto")
    text = optimizer.explain()
    assert "repeats what an earlier one has recorded" in text
    assert "4 end to end with others" in text
    assert "2 in blocks" in text
    optimizer.jit_compile = False
    assert "6 on its own" in optimizer.explain()


def check_examples_run():
    assert doctest.testmod(recording).attempted
    assert not doctest.testmod(recording).failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for name, check in [*globals().items()]:
        if name.startswith("check_"):
            try:
                check()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))
