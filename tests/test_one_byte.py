"""Slots of one byte a number, in the optimizer: beside the reference, in files."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import BACKEND, WAYS, arrays, tensor
from test_blockwise import MOMENTUM, VELOCITY, neighbours

from keras_rmsprop import RMSprop, reference
from keras_rmsprop.state import State, as_array

SHAPE = 70, 61  # a block is cut off at the end


def made(shape=SHAPE, dtype="float32", name=None, **options):
    variable = keras.Variable(arrays([shape])[0], dtype=dtype, name=name)
    optimizer = RMSprop(0.01, slot_dtype="uint8", **options)
    optimizer.build([variable])
    return variable, optimizer


def gradient(t, shape=SHAPE):
    # Some elements are a thousand times as large as others.
    [x, scale] = arrays([shape] * 2, seed=t)
    return tensor(x * np.float32(10.0) ** np.clip(scale, -3, 1))


OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"bias_correction": True, "epsilon_inside_sqrt": False},
    {"initial_accumulator_value": 0.5},
]


@pytest.mark.one_in(5)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_the_reference_s_then_rounded(way, options):
    variable, optimizer = made(**options)
    apply, state = WAYS[way](optimizer), {}
    of_reference = {k: v for k, v in options.items() if k != "momentum"}
    for t in range(4):
        before, w = optimizer.get_state().slots[0], variable.numpy()
        state |= {"v": np.float64(before.velocity), "t": t}
        if before.momentum is not None:
            state["m"] = np.float64(before.momentum)
        apply([gradient(t)])
        expected = reference.step(
            w,
            gradient(t),
            state,
            alpha=0.01,
            epsilon=1e-7,
            momentum=options.get("momentum", 0.0),
            **of_reference,
        )
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-5)
        after = optimizer.get_state().slots[0]
        for slot, name in ((VELOCITY, "v"), (MOMENTUM, "m")):
            if after[slot] is not None:
                low, high = neighbours(state[name], slot)
                slack = 1e-5 * np.abs(state[name]).max()
                assert (np.abs(after[slot]) >= low - slack).all()
                assert (np.abs(after[slot]) <= high + slack).all()
                # Between two codes, each is met as often as the number is near it.
                exact, gap = np.abs(state[name]), high - low
                inner = (exact > low + slack) & (exact < high - slack)
                up, share = (
                    ((np.abs(x) - low)[inner] / gap[inner]).mean()
                    for x in (after[slot], exact)
                )
                assert abs(up - share) < 0.03 or inner.sum() < 1000


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("way", ["eager", "tf.function", "XLA"])
def test_other_dtypes_of_weights(way, dtype):
    variable, optimizer = made(dtype=dtype)
    twin = keras.Variable(arrays([SHAPE])[0], dtype=dtype)
    plain = RMSprop(0.01)
    plain.build([twin])
    apply = WAYS[way](optimizer)
    for t in range(3):
        apply([keras.ops.cast(gradient(t), dtype)])
        plain.apply([keras.ops.cast(gradient(t), dtype)])
    mine, theirs = (np.float64(as_array(v)) for v in (variable, twin))
    moved = np.abs(theirs - arrays([SHAPE])[0]).mean()
    assert np.abs(mine - theirs).mean() < 0.1 * moved


def test_bytes_a_parameter():
    shapes = [(784, 128), (2048, 2048), (2048, 2048), (1500, 1100)]
    variables = [keras.Variable(keras.ops.zeros(shape)) for shape in shapes]
    size = sum(int(np.prod(shape)) for shape in shapes)
    assert size > 10_000_000
    for momentum, most in ((0.0, 1.02), (0.9, 2.04)):
        optimizer = RMSprop(slot_dtype="uint8", momentum=momentum)
        optimizer.build(variables)
        kept = sum(v.numpy().nbytes for v in optimizer.variables)
        assert kept <= most * size


def test_which_variables_keep_float32():
    variables = [
        keras.Variable(keras.ops.zeros((64, 64)), name="kernel"),
        keras.Variable(keras.ops.zeros((64, 63)), name="small"),
        keras.Variable(keras.ops.zeros((100, 64)), name="embeddings"),
        keras.Variable(keras.ops.zeros((100, 64)), name="head"),
    ]
    kept = {}
    for others in (("embeddings",), ["head", "kern"], ()):
        optimizer = RMSprop(slot_dtype="uint8", float32_slots=others)
        optimizer.build(variables)
        kept[tuple(others)] = [str(v.dtype) for v in optimizer.variables[2:6]]
        text = " ".join(optimizer.explain().split())
        assert "1 float32 (fewer than 4096 elements): small (64, 63)" in text
    assert kept[("embeddings",)] == ["uint8", "float32", "float32", "uint8"]
    assert kept[("head", "kern")] == ["float32", "float32", "uint8", "float32"]
    assert kept[()] == ["uint8", "float32", "uint8", "uint8"]
    assert "3 uint8 (8 bits per element, in blocks): kernel (64, 64)" in text
    assert RMSprop(float32_slots=["a"]).get_config()["float32_slots"] == ("a",)
    with pytest.raises(TypeError, match="`float32_slots` must be a list of strings"):
        RMSprop(float32_slots="embeddings")


def test_centered_is_refused():
    with pytest.raises(ValueError, match="`centered` must be False"):
        RMSprop(slot_dtype="uint8", centered=True)


@pytest.mark.one_in(4)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_v_does_not_stall(way):
    # To the nearest, v would stay far below 1: a step adds a thousandth of it.
    _, optimizer = made(rho=0.999)
    apply = WAYS[way](optimizer)
    x = np.ones(SHAPE, "float32")
    x.flat[::256] = 3  # the scale of each block, that the others are not on a code
    for _ in range(500):
        apply([tensor(x)])
    v = optimizer.get_state().slots[0].velocity.astype("float64")
    expected = 1 - 0.999**500
    np.testing.assert_allclose(v[x == 1].mean(), expected, rtol=0.01)
    np.testing.assert_allclose(v[x == 1], expected, rtol=0.5)


@pytest.mark.slow
def test_nothing_becomes_nan_and_no_step_is_too_long():
    rng = np.random.default_rng(0)
    x = 10.0 ** rng.uniform(-30, 4, (16, 256))
    x[0], x[1], x[2] = 0, 1e-41, 1e-20
    x[3, 0], x[4, :5] = 1e18, -x[4, :5]
    variable = keras.Variable(np.zeros((16, 256), "float32"))
    optimizer = RMSprop(0.001, rho=0.9, epsilon=1e-30, slot_dtype="uint8")
    optimizer.build([variable])
    most = 0.001 / np.sqrt(1 - 0.9) * (1 + 1e-5)
    g = [tensor(np.float32(x * rng.choice([-1, 1], x.shape))) for _ in range(8)]
    before = variable.numpy()
    for t in range(10_000):
        optimizer.apply([g[t % 8] if t % 1000 else 1e3 * g[0]])
        if t % 100 == 0:
            optimizer.apply([g[1]])
            after = variable.numpy()
            assert np.isfinite(after).all()
        if t % 100 == 99:
            before = variable.numpy()
            optimizer.apply([g[2]])
            assert np.abs(variable.numpy() - before).max() <= most + 1e-6
    assert np.isfinite(optimizer.get_state().slots[0].velocity).all()


def test_an_element_whose_v_rounds_to_0_takes_no_longer_step():
    variable = keras.Variable(np.zeros((16, 256), "float32"))
    optimizer = RMSprop(0.001, rho=0.9, epsilon=1e-30, slot_dtype="uint8")
    optimizer.build([variable])
    x = np.full((16, 256), 1e-6, "float32")
    x[:, 0] = 1e3
    for _ in range(20):
        before = variable.numpy()
        optimizer.apply([tensor(x)])
        assert (optimizer.get_state().slots[0].velocity[:, 1:] == 0).mean() > 0.9
        moved = np.abs(variable.numpy() - before)
        assert moved.max() <= 0.001 / np.sqrt(1 - 0.9) * (1 + 1e-5)


def test_a_nan_stays_where_it_is():
    variable, optimizer = made((16, 256), momentum=0.9)
    g = np.ones((16, 256), "float32")
    g[3, 5] = np.nan
    optimizer.apply([tensor(g)])
    optimizer.apply([keras.ops.ones((16, 256))])
    assert np.isnan(variable.numpy()).sum() == 1


# In files, and in the state.


def stepped(variable, optimizer, steps):
    for t in steps:
        optimizer.apply([gradient(t)])
    return variable.numpy()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "kind",
    [
        *("file", "waits", "store", "tree"),
        pytest.param("checkpoint", marks=pytest.mark.tensorflow("`tf.train`")),
    ],
)
def test_resumes_to_the_same_bits(kind, tmp_path):
    def model():
        layers = [
            keras.Input((70,)),
            keras.layers.Dense(61, use_bias=False, name="dense"),
        ]
        made = keras.Sequential(layers, name="model")
        slots = {"momentum": 0.9, "slot_dtype": "uint8"}
        made.compile(RMSprop(0.01, name="optimizer", **slots), "mse")
        return made

    first = model()
    first.layers[0].kernel.assign(arrays([SHAPE])[0])
    first.optimizer.build(first.trainable_variables)
    stepped(first.layers[0].kernel, first.optimizer, range(3))
    keras.utils.set_random_seed(7)
    second, optimizer = model(), first.optimizer
    if kind == "file":
        first.save(tmp_path / "model.keras")
        second = keras.models.load_model(tmp_path / "model.keras")
    elif kind == "waits":
        first.save_weights(tmp_path / "model.weights.h5")
        second.load_weights(tmp_path / "model.weights.h5")
        assert not second.optimizer.built
        second.optimizer.build(second.trainable_variables)
    else:
        second.set_weights(first.get_weights())
        second.optimizer.build(second.trainable_variables)
    if kind == "store":  # one that has no attributes
        store = {}
        optimizer.save_own_variables(store)
        second.optimizer.load_own_variables(store)
    elif kind == "checkpoint":
        path = tf.train.Checkpoint(o=optimizer).save(str(tmp_path / "c"))
        tf.train.Checkpoint(o=second.optimizer).restore(path)
    elif kind == "tree":
        second.set_state_tree(first.get_state_tree())
    for t in (3, 4):
        expected = stepped(first.layers[0].kernel, optimizer, [t])
        found = stepped(second.layers[0].kernel, second.optimizer, [t])
        np.testing.assert_array_equal(found, expected)
    for mine, theirs in zip(
        second.optimizer.variables, optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


@pytest.mark.parametrize("slot_dtype", [None, "uint8"])
def test_weights_in_several_files(slot_dtype, tmp_path):
    def model():
        layers = [keras.layers.Dense(61) for _ in range(3)]
        made = keras.Sequential([keras.Input((70,)), *layers])
        made.compile(RMSprop(0.01, momentum=0.9, slot_dtype=slot_dtype), "mse")
        made.optimizer.build(made.trainable_variables)
        return made

    first, second = model(), model()
    for t in range(2):
        shapes = [v.shape for v in first.trainable_variables]
        first.optimizer.apply([gradient(t, shape) for shape in shapes])
    path = tmp_path / "model.weights.json"
    first.save_weights(path, max_shard_size=5e-5)
    assert len([*tmp_path.glob("*.h5")]) > 2
    second.load_weights(path)
    both = zip(first.optimizer.variables, second.optimizer.variables, strict=True)
    for one, other in both:
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_the_file_says_how_it_is_kept(tmp_path):
    import h5py

    model = keras.Sequential([keras.Input((70,)), keras.layers.Dense(61)])
    model.compile(RMSprop(slot_dtype="uint8"), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        saved = [dict(x.attrs) for x in file["optimizer/vars"].values()]
    [found] = [x for x in saved if "codes" in x]
    assert "blocks of 256" in found["codes"]
    assert (found["kind"], *found["shape"]) == ("velocity", 70, 61)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "dtypes", [(None, "uint8"), ("bfloat16", "uint8"), ("uint8", None)]
)
def test_files_of_other_slots(dtypes, tmp_path):
    def model(slot_dtype):
        made = keras.Sequential([keras.Input((70,)), keras.layers.Dense(61)])
        made.compile(RMSprop(0.01, momentum=0.9, slot_dtype=slot_dtype), "mse")
        made.optimizer.build(made.trainable_variables)
        return made

    first, second = map(model, dtypes)
    for t in range(3):
        first.optimizer.apply([gradient(t), keras.ops.ones(61)])
    first.save_weights(tmp_path / "model.weights.h5")
    second.load_weights(tmp_path / "model.weights.h5")
    one, other = (m.optimizer.get_state() for m in (first, second))
    assert other.iterations == 3
    for slot in (VELOCITY, MOMENTUM):
        expected = one.slots[0][slot]
        low, high = neighbours(expected, slot)
        assert other.slots[0][slot].dtype == "float32"
        error = np.abs(other.slots[0][slot] - expected)
        allowed = 0 if dtypes[1] is None else (high - low) / 2
        assert (error <= allowed + 1e-5 * high).all()
    again = model(dtypes[0])
    second.save_weights(tmp_path / "back.weights.h5")
    again.load_weights(tmp_path / "back.weights.h5")
    found = again.optimizer.get_state().slots[0]
    np.testing.assert_allclose(found.velocity, other.slots[0].velocity, rtol=0.01)


def test_state_is_of_float32():
    variable, optimizer = made(momentum=0.9)
    stepped(variable, optimizer, range(2))
    state = optimizer.get_state()
    v, m, _ = state.slots[0]
    assert (v.shape, v.dtype, m.shape) == (SHAPE, "float32", SHAPE)
    _, other = made(momentum=0.9)
    other.set_state(state)
    np.testing.assert_array_equal(other.get_state().slots[0].velocity, v)
    np.testing.assert_array_equal(other.get_state().slots[0].momentum, m)
    with pytest.raises(ValueError, match="expected shape"):
        other.set_state(State(1, [state.slots[0]._replace(velocity=np.ones(3))]))
    np.testing.assert_array_equal(other.get_state().slots[0].velocity, v)


# Beside what else there is.


@pytest.mark.tensorflow("sparse gradients")
def test_sparse_gradients_count_as_dense():
    options = {"float32_slots": ()}
    (a, sparse), (b, dense) = made((80, 60), **options), made((80, 60), **options)
    dense._offset.assign(sparse._offset)
    for t in range(3):
        values = tf.constant(arrays([(3, 60)], seed=t)[0])
        slices = tf.IndexedSlices(values, tf.constant([5, 70, 5]), (80, 60))
        sparse.apply([slices])
        dense.apply([tf.math.unsorted_segment_sum(values, slices.indices, 80)])
    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)
    assert "stored in blocks" in sparse._steps.why_all_rows(a)


def test_changed_and_unfrozen():
    variable, optimizer = made()
    stepped(variable, optimizer, range(2))
    v = optimizer.get_state().slots[0].velocity
    other = keras.Variable(arrays([SHAPE], seed=9)[0])
    optimizer.slot_dtype = None
    optimizer.apply([gradient(2), gradient(3)], [variable, other])
    kept = [str(x.dtype) for x in optimizer.variables if len(x.shape) == 2]
    assert sorted(kept) == ["float32", "uint8"]
    expected = 0.9 * v + 0.1 * np.square(as_array(gradient(2)))
    low, high = neighbours(expected, VELOCITY)
    found = optimizer.get_state().slots[0].velocity
    assert (found >= low * (1 - 1e-5)).all()
    assert (found <= high * (1 + 1e-5)).all()


def test_slots_that_are_made_later_are_kept_as_velocity_is():
    for first, later in (("uint8", None), (None, "uint8")):
        variable = keras.Variable(arrays([SHAPE])[0])
        other = keras.Variable(arrays([SHAPE], seed=9)[0])
        optimizer = RMSprop(0.01, slot_dtype=first)
        optimizer.build([variable])
        optimizer.apply([gradient(0)])
        optimizer.momentum, optimizer.slot_dtype = 0.9, later
        optimizer.apply([gradient(1), gradient(2)], [variable, other])
        one, two = optimizer.get_state().slots
        assert {x.shape for x in (*one[:2], *two[:2])} == {SHAPE}
        kept = [str(v.dtype) for v in optimizer.variables if len(v.shape) == 2]
        assert sorted(kept) == ["float32"] * 2 + ["uint8"] * 2
        text = " ".join(optimizer.explain().split())
        assert "1 uint8 (8 bits per element, in blocks): variable" in text
        assert "1 float32 (by an earlier `slot_dtype`): variable" in text


def test_centered_later_is_refused():
    optimizer = RMSprop(slot_dtype="uint8")
    optimizer.centered = True
    with pytest.raises(ValueError, match="`centered` must be False"):
        optimizer.build([keras.Variable(arrays([SHAPE])[0])])


def test_a_variable_in_float8_has_no_slots():
    variable, other = (keras.Variable(arrays([x])[0]) for x in (SHAPE, (3,)))
    other.overwrite_with_gradient = True
    optimizer = RMSprop(slot_dtype="uint8")
    optimizer.build([variable, other])
    optimizer.apply([gradient(0), keras.ops.ones(3)])
    assert optimizer.get_state().slots[1].velocity is None
    assert "1 nothing (as of float8 training)" in optimizer.explain()


def test_a_step_of_variables_in_float8_alone():
    variable = keras.Variable(arrays([(3,)])[0])
    variable.overwrite_with_gradient = True
    optimizer = RMSprop()
    for step in range(2):
        optimizer.apply([keras.ops.full((3,), step)], [variable])
        np.testing.assert_array_equal(variable.numpy(), [step] * 3)
    assert int(optimizer.iterations) == 2


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.portable
@pytest.mark.tensorflow("what XLA keeps")
@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_without_the_kernel_one_variable_at_a_time(way):
    """XLA decodes all slots of a program first: each variable has one of its own."""
    variables = [keras.Variable(keras.ops.zeros((1024, 1024))) for _ in range(3)]
    variables.append(keras.Variable(keras.ops.zeros((512, 8))))
    optimizer = RMSprop(0.01, slot_dtype="uint8")
    optimizer.build(variables)
    apply, g = WAYS[way](optimizer), [keras.ops.ones(v.shape) for v in variables]
    apply(g)
    assert "one after the other" in optimizer.explain()
    if way == "tf.function":
        graph = apply.get_concrete_function(g).graph
    else:
        [program] = optimizer._steps.programs._programs.values()
        assert not program.xla
        graph = program.concrete.graph
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    # The same program for the same shape, and each waits for the one before.
    names = [call.get_attr("f").name for call in calls]
    assert len({*names}) == len(names) - 2
    for before, call in itertools.pairwise(calls):
        assert before in call.control_inputs


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX tells what XLA keeps")
def test_one_program_decodes_one_variable_at_a_time():
    import jax

    def bytes_beside(number):
        variables = [keras.Variable(keras.ops.zeros((512, 512))) for _ in range(number)]
        optimizer = RMSprop(0.01, momentum=0.9, slot_dtype="uint8")
        optimizer.build(variables)
        state = [v.value for v in optimizer.variables]
        weights = [v.value for v in variables]
        jitted = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
        compiled = jitted.lower(state, weights, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = bytes_beside(2), bytes_beside(6)
    assert few >= 2 * 4 * 512 * 512  # v and momentum of one, in float32
    assert many < 1.2 * few


class Logged(RMSprop):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_momentum": 0.5},
        {"gradient_accumulation_steps": 2},
        {"global_clipnorm": 0.1, "skip_nonfinite": True},
        {"cautious": True, "momentum": 0.9},
        {"learning_rate": "auto"},
        {"loss_scale_factor": 8.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [RMSprop, Logged])
def test_stays_close_to_float32_with_other_options(kind, options):
    weights = []
    for slot_dtype in ("uint8", None):
        keras.utils.set_random_seed(0)
        variable = keras.Variable(arrays([SHAPE])[0])
        optimizer = kind(**{"learning_rate": 0.01, "slot_dtype": slot_dtype, **options})
        optimizer.build([variable])
        for t in range(6):
            optimizer.apply([gradient(0) * (1 + 0.1 * t)])
        weights.append(variable.numpy())
    moved = np.abs(weights[1] - arrays([SHAPE])[0])
    assert moved.max() > 0
    assert np.abs(weights[0] - weights[1]).mean() < 0.1 * moved.mean()


@pytest.mark.tensorflow("`tf.distribute`")
def test_under_a_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        keras.utils.set_random_seed(0)
        variable = keras.Variable(arrays([SHAPE])[0])
        optimizer = RMSprop(0.01, slot_dtype="uint8")
        optimizer.build([variable])
    g = gradient(0)
    tf.function(lambda: strategy.run(lambda: optimizer.apply([g])))()
    keras.utils.set_random_seed(0)
    twin, other = made()
    other.apply([g])
    np.testing.assert_allclose(variable.numpy(), twin.numpy(), rtol=1e-5)
