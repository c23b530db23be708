"""An option that is assigned between two eager steps takes effect with the next one."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import arrays, assert_close, tensor

from keras_rmsprop import RMSprop, reference

BUILT_IN = keras.optimizers.RMSprop

# Of small variables an eager step is one program, of others one compiled by XLA, which
# takes long.
shapes_of_both_kinds = pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(3,), (2, 2)], id="small"),
        pytest.param([(3,), (65, 65)], id="large", marks=pytest.mark.slow),
    ],
)

EMA = {"use_ema": True, "ema_momentum": 0.9}

SHARED = {
    "learning_rate": ({}, 0.5),
    "learning_rate, a schedule": (
        {},
        keras.optimizers.schedules.InverseTimeDecay(0.5, 1, 0.5),
    ),
    "learning_rate, a callable": ({}, lambda: 0.5),
    "rho": ({}, 0.5),
    "momentum": ({"momentum": 0.5}, 0.9),
    "momentum, off": ({"momentum": 0.5}, 0.0),
    "epsilon": ({}, 0.5),
    "centered": ({"centered": True, "epsilon": 0.1}, False),
    "weight_decay": ({}, 0.5),
    "weight_decay, off": ({"weight_decay": 0.5}, None),
    "clipnorm": ({}, 0.5),
    "clipnorm, off": ({"clipnorm": 0.5}, None),
    "clipvalue": ({}, 0.2),
    "global_clipnorm": ({}, 0.5),
    "use_ema": (EMA, False),
    "ema_momentum": (EMA, 0.5),
    "ema_overwrite_frequency": (EMA, 2),
    "loss_scale_factor": ({}, 8.0),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, 3),
    "gradient_accumulation_steps, off": ({"gradient_accumulation_steps": 2}, None),
}
"""What the built-in has, too: what is given, and what the option becomes."""

OWN = {
    "epsilon_inside_sqrt": ({"epsilon": 0.1}, False),
    "bias_correction": ({}, True),
    "nesterov": ({"momentum": 0.5}, True),
    "lr_in_momentum": ({"momentum": 0.5}, False),
    "decoupled_weight_decay": ({"weight_decay": 0.5}, False),
    "maximize": ({}, True),
    "cautious": ({"momentum": 0.9}, True),
}
"""What the reference has."""

ELSEWHERE = {
    "jit_compile",  # changes no result
    "ema_warmup",  # in test_averages.py
    "skip_nonfinite",
    "sparse_update",
    "initial_accumulator_value",  # these two are read when the slots are made
    "slot_dtype",
    "float32_slots",  # in test_one_byte.py
    "name",
}
"""What has a test of its own here, or nothing to test."""


def test_no_option_is_forgotten():
    parameters = inspect.signature(RMSprop).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    assert names == {n.split(",")[0] for n in SHARED} | OWN.keys() | ELSEWHERE


def run(optimizer, changes, shapes, steps=8):
    """Take steps; before those in `changes` an option is assigned."""
    variables = [keras.Variable(a) for a in arrays(shapes)]
    for step in range(steps):
        for name, value in changes.get(step, {}).items():
            setattr(optimizer, name, value)
        gradients = [tensor(g) for g in arrays(shapes, seed=step + 1)]
        optimizer.apply(gradients, variables)
    return [v.numpy() for v in [*variables, *optimizer.variables]]


@pytest.mark.one_in(2)
@shapes_of_both_kinds
@pytest.mark.parametrize("case", SHARED)
def test_like_the_built_in(case, shapes):
    options, value = SHARED[case]
    changes = {3: {case.split(",")[0]: value}}
    ours, theirs = (
        run(optimizer(0.1, **options), changes, shapes)
        for optimizer in (RMSprop, BUILT_IN)
    )
    assert_close(ours, theirs, 1e-5)


@pytest.mark.one_in(2)
@shapes_of_both_kinds
@pytest.mark.parametrize("case", OWN)
def test_like_the_reference(case, shapes):
    options, value = OWN[case]
    changes = {3: {case: value}}
    found = run(RMSprop(0.1, **options), changes, shapes)
    expected, states = arrays(shapes), [{} for _ in shapes]
    options = {"epsilon": 1e-7, "alpha": 0.1, **options}
    for step in range(8):
        options |= changes.get(step, {})
        gradients = arrays(shapes, seed=step + 1)
        expected = [
            reference.step(w, g, state, **options)
            for w, g, state in zip(expected, gradients, states, strict=True)
        ]
    assert_close(found[: len(shapes)], expected, 1e-5)


@shapes_of_both_kinds
def test_jit_compile(shapes):
    changes = {2: {"jit_compile": True}, 4: {"jit_compile": False}}
    changes[6] = {"jit_compile": "auto"}
    assert_close(
        run(RMSprop(0.1), changes, shapes), run(BUILT_IN(0.1), {}, shapes), 1e-5
    )


@shapes_of_both_kinds
def test_back_and_forth(shapes):
    # A program that was traced before is not one with the option of the moment.
    changes = {step: {"rho": 0.5 + 0.2 * (step % 3)} for step in range(8)}
    changes[4]["epsilon"] = 0.1
    ours, theirs = (
        run(optimizer(0.1), changes, shapes) for optimizer in (RMSprop, BUILT_IN)
    )
    assert_close(ours, theirs, 1e-5)


@shapes_of_both_kinds
def test_skip_nonfinite(shapes):
    variables = [keras.Variable(a) for a in arrays(shapes)]
    optimizer = RMSprop(0.1, skip_nonfinite=True)
    bad = [np.full(shape, np.float32("nan")) for shape in shapes]
    optimizer.apply(bad, variables)
    assert all(np.isfinite(v.numpy()).all() for v in variables)
    optimizer.skip_nonfinite = False
    optimizer.apply(bad, variables)
    assert all(np.isnan(v.numpy()).all() for v in variables)
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.one_in(3)
@pytest.mark.tensorflow("rows of embeddings")
@pytest.mark.parametrize(
    ("before", "after"), [("exact", "lazy"), ("lazy", "exact")], ids=str
)
@pytest.mark.parametrize(
    "options", [{"momentum": 0.5}, {"weight_decay": 0.5}, {"centered": True}], ids=repr
)
def test_sparse_update(before, after, options):
    def take_steps(optimizer, table, steps):
        for step in steps:
            values = arrays([(2, 2)], seed=step)[0]
            ids = tensor([step % 4, step % 3])
            slices = tf.IndexedSlices(tensor(values), ids, tensor([6, 2]))
            optimizer.apply([slices], [table])

    table = keras.Variable(np.ones((6, 2), "float32"))
    optimizer = RMSprop(0.1, **options, sparse_update=before)
    take_steps(optimizer, table, range(5))
    fresh, twin = RMSprop(0.1, **options, sparse_update=after), keras.Variable(table)
    fresh.build([twin])
    fresh.set_state(optimizer.get_state())
    optimizer.sparse_update = after
    take_steps(optimizer, table, range(5, 9))
    take_steps(fresh, twin, range(5, 9))
    assert_close([table.numpy()], [twin.numpy()], 1e-5)


@pytest.mark.tensorflow("rows of embeddings")
def test_centered_off_and_on_again_with_rows_that_had_no_gradient():
    ids = [[0, 1, 2], [1], [1], [2], [0, 1, 2]]
    centered = [True, True, False, False, True]
    tables = [keras.Variable(np.ones((3, 2), "float32")) for _ in range(2)]
    ours, theirs = (
        kind(0.1, epsilon=0.1, centered=True) for kind in (RMSprop, BUILT_IN)
    )
    for step, (rows, value) in enumerate(zip(ids, centered, strict=True)):
        values = arrays([(len(rows), 2)], seed=step)[0]
        dense = np.zeros((3, 2), "float32")
        dense[rows] = values
        ours.centered = theirs.centered = value
        ours.apply([tf.IndexedSlices(tensor(values), tensor(rows))], tables[:1])
        theirs.apply([tensor(dense)], tables[1:])
    assert_close(*([v.numpy()] for v in tables), 1e-6)


GIVEN_LATER = [
    {"momentum": 0.5},
    {"centered": True, "epsilon": 0.1},
    {"use_ema": True},
    {"gradient_accumulation_steps": 2},
    {"initial_accumulator_value": 1.0},
    {"slot_dtype": "float64"},
    {"slot_dtype": "bfloat16"},
    {"skip_nonfinite": True},
]
"""What decides which variables an optimizer has."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", GIVEN_LATER, ids=repr)
def test_an_option_assigned_before_the_first_step_is_as_one_given(options):
    results = []
    for given, assigned in ((options, {}), ({}, options)):
        keras.utils.set_random_seed(0)
        optimizer = RMSprop(0.1, **given)
        results.append(run(optimizer, {0: assigned}, [(3,), (2, 2)]))
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)
