"""The native step: against the rule, beside readers and other steps, and without it."""

import functools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from stepping import examples, python

from keras_rmsprop import AutoLearningRate, RMSprop, rule
from keras_rmsprop.backends import current as backend
from keras_rmsprop.codecs import Blockwise, Draw
from keras_rmsprop.estimate import Estimate, Sampled, find
from keras_rmsprop.kernel import DTYPES as TAKEN
from keras_rmsprop.kernel import SWITCH, build, files
from keras_rmsprop.kernel import tensorflow as kernel
from keras_rmsprop.rule import Slots
from keras_rmsprop.update import Constants, Update, update_in_turn

pytestmark = pytest.mark.tensorflow("the native kernel")

needs_kernel = pytest.mark.skipif(not kernel.ops(), reason=kernel.why_not())
"""The tests that do not need it run everywhere."""

SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 4), (9001,), (130, 70)]
SEVERAL_AXES = [(9, 60, 10), (3, 3, 40, 16), (5, 7, 130, 1), (3, 3, 3, 333)]
DTYPES = [(w, t) for t, of_weights in TAKEN.items() for w in of_weights]


def update_of(shape, weights, slots, options, rng, decay=None):
    """Return an update whose numbers are drawn."""

    def draw(dtype, low=False):
        x = rng.normal(size=shape)
        return tf.Variable(tf.cast(np.abs(x) if low else x, dtype))

    kept = Slots(
        draw(slots, low=True),
        draw(slots) if options.momentum else None,
        draw(slots) if rng.random() < 0.5 else None,
    )
    gradient = tf.cast(rng.normal(size=shape), slots)
    return Update(draw(weights), gradient, kept, decay)


def centered(slots):
    """Return slots with an average of the gradients that is small beside v."""
    average = tf.Variable(tf.zeros_like(slots.velocity) + 0.01)
    return slots._replace(average_gradient=average)


def with_same_slots(updates):
    """Return updates as they are in a step: all centered, or none."""
    if updates[0].slots.average_gradient is not None:
        return [one._replace(slots=centered(one.slots)) for one in updates]
    bare = [one.slots._replace(average_gradient=None) for one in updates]
    return [one._replace(slots=x) for one, x in zip(updates, bare, strict=True)]


def values(updates):
    return [
        tf.cast(v, "float64").numpy()
        for one in updates
        for v in (one.variable, *one.slots)
        if v is not None
    ]


def copied(updates):
    def copy(v):
        return tf.Variable(tf.identity(v))

    return [
        one._replace(variable=copy(one.variable), slots=one.slots.map(copy))
        for one in updates
    ]


@needs_kernel
@given(
    dtypes=st.sampled_from(DTYPES),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    options=st.builds(
        rule.Options,
        rho=st.sampled_from([0.0, 0.9, 0.999]),
        momentum=st.sampled_from([0.0, 0.9]),
        epsilon=st.sampled_from([1e-7, 1e-30, 1.0]),
        epsilon_inside_sqrt=st.booleans(),
        bias_correction=st.booleans(),
        nesterov=st.booleans(),
        lr_in_momentum=st.booleans(),
        maximize=st.booleans(),
        cautious=st.booleans(),
    ),
    decay=st.sampled_from([None, 0.0, 0.01]),
    decoupled=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    share=st.sampled_from([None, 0.0, 0.7]),
    seed=st.integers(0, 2**31),
)
@examples(150)
def test_is_the_rule(dtypes, shapes, options, decay, decoupled, scale, share, seed):
    rng = np.random.default_rng(seed)
    weights, slots = dtypes
    decays = [decay if i % 2 == 0 else None for i in range(len(shapes))]
    updates = with_same_slots(
        [
            update_of(shape, weights, slots, options, rng, decay=d)
            for shape, d in zip(shapes, decays, strict=True)
        ]
    )
    expected = copied(updates)
    scale = None if scale is None else tf.constant(scale, "float64")
    step = Constants(options, 0.01, Draw(None, tf.constant(2)), decoupled, scale, True)
    assert not any(kernel.why_not_for(one, step) for one in updates)
    old = [rng.normal(size=shape) for shape in shapes]
    averages = [tf.Variable(x, dtype=weights) for x in old]
    if share is not None:
        step = step._replace(share=lambda dtype: tf.constant(share, dtype))
        updates = [
            one._replace(average=average)
            for one, average in zip(updates, averages, strict=True)
        ]
        assert {kernel.averages(one, step) for one in updates} == {weights == slots}
    if weights != slots or share is None:
        updates = [one._replace(average=None) for one in updates]
    kernel.update(updates, step)
    update_in_turn(expected, step, in_one_program=False)
    for one, x in zip(updates, old, strict=True):
        if one.average is not None:
            want = share * x + (1 - share) * one.variable.numpy()
            np.testing.assert_allclose(one.average.numpy(), want, rtol=1e-5, atol=1e-6)
    # What lies between two numbers of 16 bits may be rounded to either.
    rtol = {"float16": 2e-3, "bfloat16": 2e-2}.get(weights, 1e-6)
    rtol = 1e-13 if dtypes == ("float64", "float64") else rtol
    for got, want in zip(values(updates), values(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * 1e-2)


@needs_kernel
@pytest.mark.parametrize("weights", TAKEN["float32"])
def test_bfloat16_slots_are_rounded_by_the_same_draws(weights):
    rng = np.random.default_rng(0)
    options = rule.Options(momentum=0.9)
    sizes = [(20_001,), (3, 5)]  # the first one in several blocks
    updates = [update_of(x, weights, "bfloat16", options, rng) for x in sizes]
    updates = [one._replace(slots=centered(one.slots)) for one in updates]
    expected = copied(updates)
    draw = Draw(tf.constant(12345), tf.constant(70_000, "int64"))
    step = Constants(options, 0.01, draw, kernel=True)
    assert not any(kernel.why_not_for(one, step) for one in updates)
    kernel.update(updates, step)
    update_in_turn(expected, step, in_one_program=False)
    for got, want in zip(values(updates), values(expected), strict=True):
        # Where arithmetic is off by a bit, it may be rounded to the other side.
        assert np.mean(got == want) > 0.999
        np.testing.assert_allclose(got, want, rtol=2e-2)


@pytest.mark.slow
@needs_kernel
@given(
    weights=st.sampled_from(TAKEN["float32"]),
    sizes=st.lists(
        st.sampled_from([(), (0,), (256,), (257,), (3, 5), (130, 70), (20_001,)]),
        min_size=1,
        max_size=3,
    ),
    options=st.builds(
        rule.Options,
        rho=st.sampled_from([0.0, 0.9, 0.999]),
        momentum=st.sampled_from([0.0, 0.9]),
        epsilon=st.just(1e-7),
        epsilon_inside_sqrt=st.booleans(),
        bias_correction=st.booleans(),
        nesterov=st.booleans(),
        lr_in_momentum=st.booleans(),
        maximize=st.booleans(),
        cautious=st.booleans(),
    ),
    decay=st.sampled_from([None, 0.01]),
    share=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 2**31),
)
@examples(25)
def test_slots_in_bytes_get_the_same_codes(weights, sizes, options, decay, share, seed):
    rng = np.random.default_rng(seed)
    draw = Draw(tf.constant(12345), tf.constant(seed % 70_000, "int64"))
    codec, updates = Blockwise(), []
    for shape in sizes:
        one = update_of(shape, weights, "float32", options, rng, decay)
        scale = 10.0 ** rng.uniform(-3, 0, shape)
        coded = [
            None
            if slot is None
            else tf.Variable(codec.encode(slot * scale, "uint8", draw, number))
            for number, slot in enumerate(one.slots[:2])
        ]
        updates.append(one._replace(slots=Slots(*coded)))
    expected = copied(updates)
    step = Constants(options, 0.01, draw, kernel=True)
    assert not any(kernel.why_not_for(one, step) for one in updates)
    averages = [tf.Variable(rng.normal(size=shape), dtype=weights) for shape in sizes]
    if share is not None and weights == "float32":
        old = [average.numpy() for average in averages]
        with_share = step._replace(share=lambda dtype: tf.constant(share, dtype))
        both = zip(updates, averages, strict=True)
        updates = [one._replace(average=average) for one, average in both]
        kernel.update(updates, with_share)
        for one, x in zip(updates, old, strict=True):
            want = share * x + (1 - share) * one.variable.numpy()
            np.testing.assert_allclose(one.average.numpy(), want, rtol=1e-5, atol=1e-6)
    else:
        kernel.update(updates, step)
    update_in_turn(expected, step, in_one_program=False)
    rtol = {"float16": 2e-3, "bfloat16": 2e-2}.get(weights, 1e-5)
    for mine, theirs in zip(updates, expected, strict=True):
        got, want = (tf.cast(x.variable, "float64").numpy() for x in (mine, theirs))
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)
        for slot, twin in zip(mine.slots, theirs.slots, strict=True):
            if slot is None:
                continue
            codes, twins = (np.int32(x.numpy()[:, :256]) for x in (slot, twin))
            scales, others = (x.numpy()[:, 256:].copy() for x in (slot, twin))
            # Where arithmetic is off by a bit, it may be rounded to the other side.
            assert (codes != twins).sum() <= 2 + 0.001 * codes.size
            np.testing.assert_allclose(
                scales.view("float32"), others.view("float32"), rtol=1e-5
            )


@needs_kernel
def test_numbers_may_be_tensors():
    rng = np.random.default_rng(0)
    options = rule.Options(momentum=0.9)
    updates = [update_of((5,), "float32", "float32", options, rng, decay=0.1)]
    expected = copied(updates)
    step = Constants(options, 0.01, Draw(None, 0), kernel=True)
    update_in_turn(expected, step, in_one_program=False)
    options = rule.Options(rho=tf.constant(0.9), momentum=tf.constant(0.9))
    rate = keras.Variable(0.01)
    updates = [updates[0]._replace(decay=tf.constant(0.1))]
    kernel.update(updates, step._replace(options=options, learning_rate=rate))
    for got, want in zip(values(updates), values(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize("centered", [True, False])
def test_what_is_not_finite_does_what_it_does_in_the_rule(bad, centered):
    options = rule.Options(momentum=0.5)
    rng = np.random.default_rng(0)
    one = update_of((40,), "float32", "float32", options, rng)
    average = tf.Variable(tf.zeros(40)) if centered else None
    one = one._replace(slots=one.slots._replace(average_gradient=average))
    gradient = np.zeros(40, "float32")
    gradient[7] = bad
    one = one._replace(gradient=tf.constant(gradient))
    expected = copied([one])
    step = Constants(options, 0.01, Draw(None, 0), kernel=True)
    kernel.update([one], step)
    update_in_turn(expected, step, in_one_program=False)
    for got, want in zip(values([one]), values(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@needs_kernel
@pytest.mark.parametrize("decoupled", [True, False])
def test_weights_that_are_not_finite_stay_out_of_the_slots(decoupled):
    rng = np.random.default_rng(0)
    one = update_of((40,), "float32", "float32", rule.Options(), rng, decay=0.1)
    one.variable.assign(np.where(np.arange(40) == 7, np.inf, 1.0))
    expected = copied([one])
    step = Constants(rule.Options(), 0.01, Draw(None, 0), decoupled, kernel=True)
    kernel.update([one], step)
    update_in_turn(expected, step, in_one_program=False)
    for got, want in zip(values([one]), values(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


OF_ALL_SIZES = (300, 40), (40,), (40, 3), (), (5000,)


def stepped(jit_compile, learning_rate=0.01, shapes=OF_ALL_SIZES, **options):
    """Return weights and state after steps on variables, and explain."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=s), dtype="float32") for s in shapes]
    optimizer = RMSprop(learning_rate, jit_compile=jit_compile, **options)
    for _ in range(4):
        grads = [tf.constant(rng.normal(size=s), "float32") for s in shapes]
        optimizer.apply(grads, variables)
    found = [v.numpy() for v in (*variables, *optimizer.variables)]
    return found, optimizer.explain()


@pytest.mark.one_in(6)
@needs_kernel
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "nesterov": True, "centered": True},
        {"weight_decay": 0.01, "global_clipnorm": 1.0, "bias_correction": True},
        {"global_clipnorm": 0.1, "skip_nonfinite": True},
        {"use_ema": True, "gradient_accumulation_steps": 2},
        {"global_clipnorm": 1.0, "gradient_accumulation_steps": 2, "maximize": True},
        {"momentum": 0.9, "cautious": True, "use_ema": True, "weight_decay": 0.1},
        {"learning_rate": "auto"},
        {"learning_rate": "auto", "use_ema": True, "global_clipnorm": 1.0},
        {"use_ema": True, "ema_momentum": 0.5},
        {"use_ema": True, "ema_warmup": True, "weight_decay": 0.1},
        {"use_ema": True, "ema_overwrite_frequency": 3, "skip_nonfinite": True},
    ],
)
def test_an_optimizer_that_uses_it_is_as_exact_as_one_that_does_not(options):
    found, text = stepped("auto", **options)
    assert "native kernel" in text
    expected, text = stepped(False, **options)
    assert "native kernel" not in text
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.one_in(3)
@needs_kernel
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "cautious": True},
        {"global_clipnorm": 1.0, "skip_nonfinite": True},
        {"learning_rate": "auto"},
    ],
    ids=str,
)
def test_threads_share_a_step(options):
    shapes = (400_000,), (7,), (600, 800), ()
    found, _ = stepped("auto", shapes=shapes, **options)
    expected, _ = stepped(False, shapes=shapes, **options)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.fixture
def calls(monkeypatch):
    """The number of variables in each call of the kernel."""
    calls = []
    update = kernel.update
    monkeypatch.setattr(
        kernel, "update", lambda *given: (calls.append(len(given[0])), update(*given))
    )
    return calls


@pytest.fixture
def as_written():
    """TensorFlow computes graphs as they are written."""
    rewriters = "arithmetic_optimization", "constant_folding"
    tf.config.optimizer.set_experimental_options(dict.fromkeys(rewriters, False))
    yield
    tf.config.optimizer.set_experimental_options(dict.fromkeys(rewriters, True))


@pytest.mark.one_in(2)
@needs_kernel
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"centered": True},
        {"momentum": 0.9, "centered": True},
        {"use_ema": True, "ema_overwrite_frequency": 3},
    ],
    ids=str,
)
def test_steps_are_the_built_ins_to_the_last_bit(options, in_graph, as_written):
    ended = []
    for made in (RMSprop, keras.optimizers.RMSprop):
        rng = np.random.default_rng(0)
        variables = [keras.Variable(rng.normal(size=n)) for n in ((90, 50), 3, 1)]
        optimizer = made(0.01, **options)
        optimizer.build(variables)
        step = tf.function(optimizer.apply) if in_graph else optimizer.apply
        for _ in range(5):
            grads = [
                tf.constant(rng.normal(size=v.shape), "float32") for v in variables
            ]
            step(grads)
        ended.append([v.numpy() for v in [*variables, *optimizer.variables]])
    for ours, theirs in zip(*ended, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.one_in(7)
@needs_kernel
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
def test_losses_of_fit_are_the_built_ins_to_the_last_bit(options, as_written):
    x, y = np.random.default_rng(0).normal(size=(2, 96, 3))
    found = []
    for made in (RMSprop, keras.optimizers.RMSprop):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(90, "relu"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((3,)), *layers])
        model.compile(made(0.01, **options), "mse")
        found.append(model.fit(x, y, 16, epochs=3, verbose=0).history["loss"])
    assert found[0] == found[1]


@needs_kernel
@pytest.mark.parametrize("how", ["eager", "tf.function", "fit", "XLA around it"])
def test_everywhere_but_inside_xla(how, calls):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = RMSprop(0.01)
    grads = [tf.ones(v.shape) for v in model.trainable_variables]
    if how == "fit":
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    else:
        optimizer.build(model.trainable_variables)
        apply = optimizer.apply
        if how != "eager":
            apply = tf.function(apply, jit_compile=how.startswith("XLA"))
        apply(grads)
    # `fit` traces twice.
    assert {*calls} == (set() if how.startswith("XLA") else {2})


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"learning_rate": "auto"}])
def test_xla_is_not_needed_where_it_does_all(options):
    optimizer = RMSprop(**options)
    variable = keras.Variable(np.zeros((300, 300)))
    optimizer.build([variable])
    assert "Eager: one program without XLA." in optimizer.explain()
    variable.constraint = keras.constraints.NonNeg()
    assert "compiled by XLA" in optimizer.explain()


@needs_kernel
def test_variables_of_several_dtypes_take_a_call_each(calls):
    dtypes = ["float32", "bfloat16", "float64", "float16", "float32"]
    variables = [keras.Variable(np.ones(5), dtype=d) for d in dtypes]
    optimizer = RMSprop(0.01)
    optimizer.apply([tf.ones(5, d) for d in dtypes], variables)
    assert sorted(calls) == [1, 1, 1, 2]
    for v in variables:
        np.testing.assert_allclose(v.numpy().astype(float), 1 - 0.01 / 0.1**0.5, 0.01)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"jit_compile": False}, "jit_compile=False"),
        ({"slot_dtype": "bfloat16"}, "dtypes"),
    ],
)
def test_what_it_leaves_to_the_rule(options, why):
    if not kernel.ops() and why != "jit_compile=False":
        pytest.skip(kernel.why_not())
    optimizer = RMSprop(**options)
    variable = keras.Variable(np.ones(5))
    optimizer.build([variable])
    [one] = optimizer._steps.without_gradients([variable])
    assert why in kernel.why_not_for(one, optimizer._steps.constants(0.1))
    optimizer.apply([tf.ones(5)])


@needs_kernel
def test_the_debugging_tools_see_each_operation():
    variable = keras.Variable(np.ones(5))
    optimizer = RMSprop()
    optimizer.build([variable])
    tf.debugging.enable_check_numerics()
    try:
        with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
            optimizer.apply([tf.constant([1, 1, np.nan, 1, 1], "float32")])
    finally:
        tf.debugging.disable_check_numerics()


@needs_kernel
def test_one_variable_given_twice_is_stepped_twice():
    found = []
    for kind in (RMSprop, keras.optimizers.RMSprop):
        variable = keras.Variable(np.ones(5), dtype="float32")
        optimizer = kind(0.01)
        optimizer.build([variable])
        optimizer.apply([tf.ones(5), 2 * tf.ones(5)], [variable, variable])
        found.append(variable.numpy())
    np.testing.assert_allclose(*found, rtol=1e-6)


# Beside readers, and other steps.


def variables_of_step(shape=(4,)):
    return [tf.Variable(tf.ones(shape)) for _ in "wv"]


def call(weights, velocity, gradient):
    one = Update(weights, gradient, Slots(velocity))
    step = Constants(rule.Options(), 0.01, Draw(None, 0), kernel=True)
    kernel.update([one], step)


@needs_kernel
def test_a_tensor_that_was_read_before_stays_as_it_is():
    weights, velocity = variables_of_step()
    before = weights.read_value(), velocity.read_value()
    call(weights, velocity, tf.ones(4))
    for tensor in before:
        np.testing.assert_array_equal(tensor, np.ones(4))
    assert not np.any(weights.numpy() == 1)


@needs_kernel
def test_a_gradient_may_be_the_weights():
    weights, velocity = variables_of_step()
    call(weights, velocity, weights.read_value())
    np.testing.assert_allclose(weights.numpy(), 1 - 0.01, rtol=1e-6)
    call(weights, velocity, velocity.read_value())
    np.testing.assert_allclose(velocity.numpy(), 1.0, rtol=1e-6)


@needs_kernel
def test_after_a_scatter():
    weights, velocity = variables_of_step((4, 2))
    update = tf.IndexedSlices(tf.ones((1, 2)), [1], [4, 2])
    weights.scatter_add(update)  # from now on readers copy
    before = weights.read_value()
    call(weights, velocity, tf.ones((4, 2)))
    weights.scatter_add(update)
    np.testing.assert_array_equal(before, [[1, 1], [2, 2], [1, 1], [1, 1]])
    step = 0.01 / np.sqrt(1 + 1e-7)
    np.testing.assert_allclose(
        weights.numpy()[:, 0], [1 - step, 3 - step, *[1 - step] * 2]
    )


@needs_kernel
@pytest.mark.parametrize("which", [0, 1])
def test_a_variable_of_another_shape_is_named_and_nothing_is_changed(which):
    good, bad = variables_of_step(), variables_of_step()
    bad[which] = tf.Variable(tf.ones(5), name="of_five", shape=[None])
    step = Constants(rule.Options(), 0.01, Draw(None, 0), kernel=True)
    updates = [Update(w, tf.ones(4), Slots(v)) for w, v in (good, bad)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"shape \[4\]"):
        kernel.update(updates, step)
    for v in (*good, *bad):
        np.testing.assert_array_equal(v.numpy(), np.ones(v.shape[0] or 5))


@needs_kernel
def test_a_variable_that_is_there_twice_is_refused():
    weights, velocity = variables_of_step()
    step = Constants(rule.Options(), 0.01, Draw(None, 0), kernel=True)
    one = Update(weights, tf.ones(4), Slots(velocity))
    for updates in ([one, one], [one._replace(slots=Slots(weights))]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="given twice"):
            kernel.update(updates, step)
    np.testing.assert_array_equal(weights.numpy(), np.ones(4))


@needs_kernel
def test_a_variable_without_a_value_is_named():
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weights = tf.compat.v1.get_variable("bare", (4,), use_resource=True)
        velocity = tf.compat.v1.get_variable("v", (4,), use_resource=True)
        call(weights, velocity, tf.ones(4))
        [operation] = [
            o for o in session.graph.get_operations() if o.type == "KerasRmspropStep"
        ]
        with pytest.raises(tf.errors.OpError, match="bare"):
            session.run(operation)


@needs_kernel
def test_readers_beside_a_writer_see_whole_steps():
    weights, velocity = variables_of_step((200_000,))
    velocity.assign(tf.zeros_like(velocity))
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            seen = weights.numpy()
            if seen.min() != seen.max():
                torn.append(seen)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        call(weights, velocity, tf.ones(200_000))
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


@needs_kernel
def test_two_optimizers_in_two_threads():
    def run(seed, found):
        rng = np.random.default_rng(seed)
        variables = [keras.Variable(rng.normal(size=s)) for s in ((300, 50), (50,))]
        optimizer = RMSprop(0.01)
        optimizer.build(variables)
        for _ in range(30):
            optimizer.apply([tf.constant(rng.normal(size=v.shape)) for v in variables])
        found[seed] = [v.numpy() for v in variables]

    alone, together = {}, {}
    for seed in (0, 1):
        run(seed, alone)
    threads = [threading.Thread(target=run, args=(s, together)) for s in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        for got, want in zip(together[seed], alone[seed], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@needs_kernel
def test_two_steps_of_the_same_variables_in_two_threads():
    # Of two that lock in another order, each would soon wait for the other.
    pairs = [variables_of_step((5,)) for _ in range(20)]
    step = Constants(rule.Options(rho=0.0), 0.5, Draw(None, 0), kernel=True)
    ones = [Update(w, tf.ones(5), Slots(v)) for w, v in pairs]
    steps = [
        tf.function(functools.partial(kernel.update, updates, step))
        for updates in (ones, ones[::-1])
    ]
    times = 2000

    def run(update):
        for _ in range(times):
            update()

    threads = [threading.Thread(target=run, args=(u,), daemon=True) for u in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    # With rho = 0 a step takes half: none may be lost.
    for weights, _ in pairs:
        np.testing.assert_allclose(weights.numpy(), 1 - 2 * times * 0.5, rtol=1e-4)


# Found by people who had not written it.


@pytest.mark.slow
def test_a_large_model_unfrozen_in_a_graph():
    variables = [keras.Variable(np.ones(n, "float32")) for n in (2**20, 3)]
    optimizer = RMSprop(0.01)
    optimizer.build(variables[:1])
    step = tf.function(lambda grads: optimizer.apply(grads, variables))
    step([tf.ones(v.shape) for v in variables])
    np.testing.assert_allclose(variables[1].numpy(), 1 - 0.01 / 0.1**0.5, rtol=1e-5)


@pytest.mark.parametrize("size", [5, 5000])
@pytest.mark.parametrize("name", ["loss_scale_factor", "global_clipnorm"])
def test_tensors_as_options(name, size):
    found = []
    for kind in (RMSprop, keras.optimizers.RMSprop):
        value = tf.constant(0.5) if "clip" in name else keras.Variable(0.5)
        variable = keras.Variable(np.ones(size, "float32"))
        optimizer = kind(0.01)
        optimizer.build([variable])
        setattr(optimizer, name, value)
        optimizer.apply([tf.ones(size)])
        found.append(variable.numpy())
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_without_it_if_told_so():
    optimizer = RMSprop(jit_compile=False, global_clipnorm=1.0, skip_nonfinite=True)
    optimizer.build([keras.Variable(np.ones(5))])
    step = tf.function(optimizer.apply).get_concrete_function([tf.TensorSpec(5)])
    assert "KerasRmsprop" not in str(step.graph.as_graph_def())


@needs_kernel
def test_gradients_are_scaled_before_whoever_looks_at_them():
    seen = []

    class Looks(RMSprop):
        def _backend_update_step(self, grads, variables, rate):
            seen.append(grads[0].numpy())
            super()._backend_update_step(grads, variables, rate)

    optimizer = Looks(0.01, global_clipnorm=1.0)
    tf.config.run_functions_eagerly(True)
    try:
        optimizer.apply([3 * tf.ones(4)], [keras.Variable(np.ones(4))])
    finally:
        tf.config.run_functions_eagerly(False)
    np.testing.assert_allclose(seen, [[0.5] * 4], rtol=1e-6)
    plain = RMSprop(0.01, global_clipnorm=1.0)
    plain.build([keras.Variable(np.ones(4))])
    [clipped] = plain._clip_gradients([3 * tf.ones(4)])
    np.testing.assert_allclose(clipped, [0.5] * 4, rtol=1e-6)


@needs_kernel
def test_a_gradient_whose_shape_is_wrong_at_last_changes_nothing():
    variable = keras.Variable(np.ones(5))
    optimizer = RMSprop()
    optimizer.build([variable])
    step = tf.function(
        lambda g: optimizer.apply([g]), input_signature=[tf.TensorSpec([None])]
    )
    before = [v.numpy() for v in (variable, *optimizer.variables)]
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        step(tf.ones(4))
    for v, was in zip((variable, *optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(v.numpy(), was)


@needs_kernel
def test_numbers_keep_their_digits_beside_tensors():
    found = []
    for rho in (0.9, keras.Variable(0.9, dtype="float64")):
        variable = keras.Variable(np.ones(5), dtype="float64")
        optimizer = RMSprop(0.01, epsilon=1e-60)
        optimizer.build([variable])
        optimizer.rho = rho
        optimizer.apply([tf.constant([0, 1, 2, 3, 4], "float64")])
        found.append(variable.numpy())
    np.testing.assert_allclose(*found, rtol=1e-13)


# Averages, and the search for a learning rate.


@needs_kernel
@pytest.mark.parametrize("how", ["eager", "tf.function"])
def test_averages_follow_in_the_same_call(how, monkeypatch):
    update = kernel.update
    seen = []

    def spy(updates, step):
        seen.extend(one.average for one in updates)
        update(updates, step)

    monkeypatch.setattr(kernel, "update", spy)
    variables = [keras.Variable(np.ones(5, dtype)) for dtype in ("float32", "float64")]
    variables.append(keras.Variable(np.ones(5), dtype="bfloat16"))  # follows later
    optimizer = RMSprop(0.5, rho=0.0, use_ema=True, ema_momentum=0.75)
    optimizer.build(variables)
    apply = tf.function(optimizer.apply) if how == "tf.function" else optimizer.apply
    grads = [tf.ones(5, v.dtype) for v in variables]
    before = [average.value.read_value() for average in optimizer._weight_averages]
    apply(grads)
    apply(grads)
    assert sum(average is None for average in seen) * 3 == len(seen)
    for average, was in zip(optimizer._weight_averages, before, strict=True):
        np.testing.assert_array_equal(was, np.zeros(5))
        # After the first step an average is what the weights are, 0.5; then they are 0.
        np.testing.assert_allclose(
            average.numpy().astype("float64"), 0.75 * 0.5, rtol=1e-5
        )


@needs_kernel
def test_whoever_averages_in_another_way_does_so_once():
    class Sees(RMSprop):
        def _update_model_variables_moving_average(self, variables):
            self.seen = [average.numpy() for average in self._weight_averages]
            super()._update_model_variables_moving_average(variables)

    optimizer = Sees(0.5, rho=0.0, use_ema=True, ema_momentum=0.75)
    variable = keras.Variable(np.ones(5))
    tf.config.run_functions_eagerly(True)
    try:
        for _ in range(2):
            optimizer.apply([tf.ones(5)], [variable])
    finally:
        tf.config.run_functions_eagerly(False)
    np.testing.assert_allclose(optimizer.seen, [[0.5] * 5], rtol=1e-5)
    np.testing.assert_allclose(
        optimizer._weight_averages[0].numpy(), 0.75 * 0.5, rtol=1e-5
    )


@pytest.mark.slow
@needs_kernel
@given(
    dtypes=st.sampled_from(DTYPES),
    shapes=st.lists(
        st.sampled_from([*SHAPES, (2000, 5), (5000,), *SEVERAL_AXES]),
        min_size=1,
        max_size=4,
    ),
    sample_every=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
@examples(50)
def test_the_search_with_it_finds_what_it_finds_without(
    dtypes, shapes, sample_every, seed
):
    rng = np.random.default_rng(seed)
    weights, sums = dtypes
    how = AutoLearningRate(1e-5, sample_every=sample_every)

    def part_of(shape):
        sample = how.sample(shape)
        first, s = (tf.Variable(tf.zeros(sample.shape, sums)) for _ in "12")
        variable = tf.Variable(tf.cast(rng.normal(size=shape), weights))
        momentum = tf.Variable(tf.cast(rng.normal(size=shape), sums))
        moves = rng.random() < 0.8
        return Sampled(
            variable, None, first, s, sample, momentum=momentum if moves else None
        )

    parts = [part_of(shape) for shape in shapes]
    others = [
        part._replace(first=tf.Variable(part.first), sums=tf.Variable(part.sums))
        for part in parts
    ]
    kept = [tf.Variable([*Estimate.at_first(1e-5)]) for _ in "12"]
    for _ in range(3):
        grads = [tf.cast(rng.normal(size=shape), sums) for shape in shapes]
        found = []
        for several, estimate, by in zip(
            (parts, others), kept, (kernel, None), strict=True
        ):
            several = [
                part._replace(gradient=g)
                for part, g in zip(several, grads, strict=True)
            ]
            if by:
                left = by.follow(several, 0.0, 1.0)[1]
                assert not left
            find(several, estimate, 1.0, how, kernel=by)
            found.append([estimate, *(v for p in several for v in (p.first, p.sums))])
        for got, want in zip(*found, strict=True):
            # The elements of s may cancel out.
            most = 0 if want is kept[1] else np.abs(want).max(initial=0)
            atol = 1e-12 + 1e-5 * most
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-4, atol=atol)
        for part in parts:
            part.variable.assign_sub(
                tf.cast(rng.normal(size=part.variable.shape), weights)
            )


@needs_kernel
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "momentum": st.sampled_from([0.0, 0.5]),
            "maximize": st.just(True),
            "lr_in_momentum": st.just(False),
            "global_clipnorm": st.just(0.1),
            "use_ema": st.just(False),
            "ema_warmup": st.just(False),
            "bias_correction": st.just(False),
            "slot_dtype": st.sampled_from(["bfloat16", "uint8"]),
            "weight_decay": st.just(0.1),
            "cautious": st.just(True),
        },
    ),
    how=st.fixed_dictionaries(
        {"initial": st.sampled_from([1e-5, 1e-2])},
        optional={
            "coefficient": st.just(2.0),
            "growth": st.just(1.1),
            "sample_every": st.sampled_from([1, 3]),
            "factor": st.just(0.5),
        },
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    moved=st.booleans(),
    seed=st.integers(0, 2**31),
)
@examples(40)
def test_a_search_in_the_update_is_one_before_it(options, how, dtype, moved, seed):
    """Two steps, the end of a `fit`, perhaps other weights, and two more."""
    found, shapes = [], [(7,), (130, 70)]
    if dtype == "float64":
        options.pop("slot_dtype", None)
    if dtype == "bfloat16":  # their averages follow later
        options["use_ema"] = False
    for may in True, False:
        calls, searches = [], kernel.searches

        def spy(*given, may=may, calls=calls, searches=searches):
            calls.append(may and searches(*given))
            return calls[-1]

        rng = np.random.default_rng(seed)
        optimizer = RMSprop(AutoLearningRate(**how), **options)
        variables = [keras.Variable(rng.normal(size=s), dtype=dtype) for s in shapes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "searches", spy)
            for step in range(4):
                pulls = [0.3 * tf.cast(v, dtype) for v in variables]
                grads = [rng.normal(size=g.shape) * 0.1 + g for g in pulls]
                optimizer.apply([tf.cast(g, dtype) for g in grads], variables)
                if step == 1:
                    optimizer.finalize_variable_values(variables)
                    known = optimizer._search.known()._replace(reach=0.01)
                    known = known if moved else known._replace(reach=0.0)
                    optimizer._search.estimate.assign([*known])
        assert set(calls) <= {may}  # not asked where the kernel has no part
        state = [*variables, optimizer._search.estimate, optimizer.iterations]
        if "slot_dtype" not in options:
            state += optimizer.variables
        found.append([v.numpy().astype("float64") for v in state])
    assert found[0][3] == 4
    # What is in bfloat16 may be rounded to a neighbour.
    rounds = dtype == "bfloat16" or "slot_dtype" in options
    for got, want in zip(*found, strict=True):
        most = np.abs(want).max(initial=0)
        atol = (0.02 if rounds else 1e-5) * most
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol)


@needs_kernel
def test_the_search_refuses_elements_that_are_not_there():
    how = AutoLearningRate(1e-5)
    sample = how.sample((5000,))
    variables = [tf.Variable(tf.zeros(n)) for n in (5000, *sample.shape, *sample.shape)]
    part = Sampled(variables[0], tf.ones(5000), *variables[1:], sample)
    sample.runs = sample.runs[0], sample.runs[1], sample.runs[2] + 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="looked at"):
        kernel.follow([part], 1.0, 0.9)
    for variable in variables:
        np.testing.assert_array_equal(variable.numpy(), np.zeros(variable.shape))


# Sums.


@needs_kernel
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**31),
)
def test_scale(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    for most in (0.5, 1e6):
        found = kernel.scale([tf.constant(a) for a in arrays], most)
        norm = np.sqrt(sum(np.square(a.astype("float64")).sum() for a in arrays))
        rtol = 1e-13 if dtype == "float64" else 1e-7
        np.testing.assert_allclose(found, most / max(norm, most), rtol=rtol)


@needs_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_global_norm_that_is_not_finite(bad):
    gradient = np.ones(9001, "float32")
    gradient[9000] = bad
    scale = backend.scale_of_global_norm([tf.constant(gradient)], 0.5, kernel=True)
    if bad == 3e38:  # Keras' own norm overflows; this one is a double
        assert float(scale) < 1e-38
    else:
        assert np.isnan(scale)
    assert bool(backend.all_finite([tf.constant(gradient)], kernel=True)) == (
        bad == 3e38
    )


# Getting it, or doing without.


@pytest.mark.slow
def test_without_it_all_works_and_explain_says_why():
    program = """
        import keras, numpy as np
        from keras_rmsprop import RMSprop
        v = keras.Variable(np.ones(5))
        optimizer = RMSprop(0.01)
        optimizer.apply([np.ones(5, "float32")], [v])
        print(float(v.numpy()[0]))
        print(optimizer.explain())
    """
    out = python(program, KERAS_RMSPROP_KERNEL="0")
    assert float(out.split()[0]) == pytest.approx(1 - 0.01 / 0.1**0.5, rel=1e-5)
    assert "native kernel" not in out
    assert "No kernel: KERAS_RMSPROP_KERNEL is 0" in out


def test_a_library_that_cannot_be_loaded_is_told_of_once(tmp_path, monkeypatch):
    with files.whole(tmp_path, "broken.so") as place:
        place.write_text("no library")
    monkeypatch.setattr(build, "found", lambda _: files.read(tmp_path / "broken.so"))
    monkeypatch.setattr(kernel, "_loaded", kernel._loaded.__wrapped__)
    monkeypatch.delenv(SWITCH, raising=False)
    with pytest.warns(UserWarning, match="broken.so cannot be loaded"):
        assert kernel.ops() is None


def test_a_library_that_cannot_be_looked_for_is_told_of(monkeypatch):
    def found(_):
        raise PermissionError("not yours")

    monkeypatch.setattr(build, "found", found)
    monkeypatch.setattr(kernel, "_loaded", kernel._loaded.__wrapped__)
    monkeypatch.delenv(SWITCH, raising=False)
    with pytest.warns(UserWarning, match="cannot be loaded: not yours"):
        assert "not yours" in kernel.why_not()


def test_it_is_built_for_this_version_only(monkeypatch):
    names = list(map(build.name, build.LIBRARIES))
    assert tf.version.VERSION in names[0]
    assert "tensorflow" not in names[1]
    monkeypatch.setattr(tf.version, "GIT_VERSION", "another")
    others = list(map(build.name, build.LIBRARIES))
    assert others[0] != names[0]
    assert others[1] == names[1]


@pytest.mark.parametrize(("compiler", "says"), [("false", "failed"), ("no-c++", "run")])
def test_a_build_that_fails_says_so_in_a_line(compiler, says, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RuntimeError, match=says):
        build.build(build.OPS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        build.build(build.OPS, tmp_path)


@needs_kernel
def test_a_library_is_copied_whole_or_not_at_all(tmp_path):
    library = build.found(build.OPS)
    copied = build.copy(library, tmp_path / "folder")
    assert files.read(copied).content == library.content == copied.read_bytes()
    assert build.copy(files.read(copied), copied.parent) == copied
    names = {library.path.name, f"{library.path.name}{files.NOTE}"}
    assert {path.name for path in copied.parent.iterdir()} == names
    with pytest.raises(RuntimeError, match="cannot be written to"):
        build.copy(library, copied)


def test_who_has_no_tensorflow_gets_the_other_library(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    program = f"""
        import sys
        sys.modules["tensorflow"] = None
        sys.path.insert(0, {str(Path(build.__file__).parents[2])!r})
        import types
        sys.modules["keras_rmsprop"] = package = types.ModuleType("keras_rmsprop")
        package.__path__ = [{str(Path(build.__file__).parents[1])!r}]
        sys.argv = ["kernel", "--force", "--folder", {str(tmp_path / "out")!r}]
        from keras_rmsprop.kernel.__main__ import main
        try:
            main()
        except SystemExit as error:
            print(error)
    """
    out = python(program, CXX=str(compiler))
    assert "Built the kernel" in out
    assert "No kernel, so steps take the portable way: TensorFlow cannot be" in out


@pytest.mark.slow
@needs_kernel
def test_building_it(tmp_path):
    # What would take long is done by a compiler that writes what it wrote before.
    compiler = tmp_path / "compiler"
    library = build.found(build.OPS)
    out = tmp_path / "a folder"
    script = """#!/bin/sh
        while [ "$1" != -o ]; do shift; done
        cp "$LIBRARY" "$2"
    """
    compiler.write_text(textwrap.dedent(script))
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "keras_rmsprop.kernel", "--force", "--folder", out],
        env=os.environ | {"CXX": str(compiler), "LIBRARY": str(library.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    names = list(map(build.name, build.LIBRARIES))
    assert done.stdout.splitlines() == [f"Built the kernel: {out / n}" for n in names]
    notes = [f"{name}{files.NOTE}" for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, *notes])
    assert files.read(out / names[0]).content == library.content


@pytest.mark.rest
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_its_arithmetic_under_sanitizers():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["make", "sanitize"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
