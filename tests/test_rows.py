"""Sparse gradients give what the dense gradients give, at the cost of their rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import assert_close, examples
from test_options import DIALECTS, in_reference
from test_programs import Counting

from keras_rmsprop import RMSprop, reference

pytestmark = pytest.mark.tensorflow("rows of embeddings")

BUILT_IN = keras.optimizers.RMSprop


def batches(rng, vocabulary, width, steps, size=20):
    """Return (ids, values) of each step: Zipf, so with many repeats, and long gaps."""
    found = []
    for _ in range(steps):
        n = rng.integers(0, size)
        ids = np.minimum(rng.zipf(1.3, n) - 1, vocabulary - 1)
        found.append((ids, rng.normal(size=(n, *width))))
    return found


def densified(ids, values, shape):
    gradient = np.zeros(shape)
    np.add.at(gradient, ids, values)
    return gradient


def train(
    optimizer, steps, shape, *, sparse, dtype="float32", id_dtype="int64", jit=None
):
    """Train a table and a dense variable beside it; return all that there is then."""
    rng = np.random.default_rng(1)
    table = keras.Variable(rng.normal(size=shape), dtype=dtype, name="table")
    other = keras.Variable(rng.normal(size=(3,)), dtype=dtype, name="bias")
    optimizer.build([table, other])
    apply = optimizer.apply
    if jit is not None:
        apply = tf.function(optimizer.apply, jit_compile=jit, reduce_retracing=True)
    for ids, values in steps:
        beside = tf.constant(rng.normal(size=(3,)), dtype)
        if sparse:
            gradient = tf.IndexedSlices(
                tf.constant(values, dtype), tf.constant(ids, id_dtype)
            )
        else:
            gradient = tf.constant(densified(ids, values, shape), dtype)
        apply([gradient, beside])
    # A last dense gradient brings all rows up to date: v shows all that was.
    last = rng.normal(size=shape)
    apply([tf.constant(last, dtype), tf.constant([0.1, 0.2, 0.3], dtype)])
    return [v.numpy() for v in [table, other, *optimizer.variables]]


OPTIONS = {
    "defaults": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "epsilon": 1e-2},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.3},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "weight decay": {"weight_decay": 0.1},
    "EMA": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss scale": {"loss_scale_factor": 64.0},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.PiecewiseConstantDecay(
            [3], [0.1, 0.01]
        )
    },
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("name", "jit"),
    [
        *((name, None) for name in OPTIONS),
        *((name, True) for name in ["defaults", "centered", "global_clipnorm", "EMA"]),
    ],
)
def test_every_option_equals_the_dense_built_in(name, jit):
    shape = (30, 4)
    steps = batches(np.random.default_rng(0), shape[0], shape[1:], 8)
    if jit:  # XLA wants one number of ids for one compilation: keep it quick
        steps = [(ids[:5], values[:5]) for ids, values in steps if len(ids) >= 5]
    options = {"learning_rate": 0.05, "epsilon": 1e-5} | OPTIONS[name]
    expected = train(BUILT_IN(**options), steps, shape, sparse=False, dtype="float64")
    result = train(
        RMSprop(**options), steps, shape, sparse=True, dtype="float64", jit=jit
    )
    assert_close(result, expected, 1e-10)


random_cases = given(
    vocabulary=st.integers(1, 500),
    width=st.sampled_from([(), (1,), (5,), (2, 3)]),
    steps=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float64"]),
    id_dtype=st.sampled_from(["int32", "int64"]),
    options=st.sampled_from([*OPTIONS.values()]),
    rho=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    seed=st.integers(0, 2**31),
)


def check_random_case(vocabulary, width, steps, dtype, id_dtype, options, rho, seed):
    shape = (vocabulary, *width)
    cases = batches(np.random.default_rng(seed), vocabulary, width, steps)
    options = {"learning_rate": 0.05, "epsilon": 1e-3} | options | {"rho": rho}
    expected = train(BUILT_IN(**options), cases, shape, sparse=False, dtype=dtype)
    optimizer = RMSprop(**options, jit_compile=False)
    result = train(optimizer, cases, shape, sparse=True, dtype=dtype, id_dtype=id_dtype)
    assert_close(result, expected, {"float32": 1e-5, "float64": 1e-10}[dtype])


@examples(30)
@random_cases
def test_random_cases_equal_the_dense_built_in(**case):
    check_random_case(**case)


@pytest.mark.rest
@settings(max_examples=300, derandomize=False, print_blob=True)
@random_cases
def test_many_random_cases_equal_the_dense_built_in(**case):
    check_random_case(**case)


def model_on_tokens(optimizer, *, dtype="float32", jit_compile=False, shared=False):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((6,), dtype="int32")
    table = keras.layers.Embedding(50, 4, dtype=dtype)
    x = table(tokens)
    if shared:  # two lookups of one table
        x = keras.layers.Concatenate()([x, table(tokens[:, ::-1] // 2)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(tokens, keras.layers.Dense(1, dtype="float32")(x))
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model


def tokens_and_targets(n=40):
    tokens = np.minimum(np.random.default_rng(0).zipf(1.3, (n, 6)) - 1, 49)
    return tokens.astype("int32"), (tokens == 3).sum(1, keepdims=True).astype("float32")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("jit_compile", "shared"), [(False, False), (False, True), (True, True)]
)
def test_fit_equals_the_one_hot_dense_model(jit_compile, shared):
    tokens, y = tokens_and_targets()
    model = model_on_tokens(
        RMSprop(0.01, clipnorm=1.0), jit_compile=jit_compile, shared=shared
    )
    # The same model with its table as a Dense layer's kernel on one-hot tokens.
    one_hot = keras.Input((6, 50))
    table = keras.layers.Dense(4, use_bias=False)
    x = table(one_hot)
    if shared:
        halved = keras.Input((6, 50))
        x = keras.layers.Concatenate()([x, table(halved)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    inputs = [one_hot, halved] if shared else one_hot
    twin = keras.Model(inputs, keras.layers.Dense(1)(x))
    twin.compile(BUILT_IN(0.01, clipnorm=1.0), "mse")
    twin.set_weights(model.get_weights())
    data = np.eye(50, dtype="float32")[tokens]
    if shared:
        data = [data, np.eye(50, dtype="float32")[tokens[:, ::-1] // 2]]
    fit = {"batch_size": 16, "epochs": 4, "verbose": 0, "shuffle": False}
    losses = model.fit(tokens, y, **fit).history["loss"]
    expected = twin.fit(data, y, **fit).history["loss"]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert_close(model.get_weights(), twin.get_weights(), 1e-4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("jit", [None, False], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "options",  # with momentum, L2 or caution the step is a dense one
    [
        DIALECTS["everything"],
        *(o for o in DIALECTS.values() if not {"momentum", "weight_decay"} & set(o)),
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_dialect_equals_the_dense_reference(options, jit):
    rng, shape = np.random.default_rng(0), (12, 3)
    steps = [(rng.integers(0, 12, 9), rng.normal(size=(9, 3))) for _ in range(7)]
    optimizer = RMSprop(0.25, **{"epsilon": 1e-3} | options)
    table, *_ = train(optimizer, steps, shape, sparse=True, dtype="float64", jit=jit)
    rng = np.random.default_rng(1)  # as `train` does
    expected, state = rng.normal(size=shape), {}
    rng.normal(size=(3,))
    gradients = []
    for ids, values in steps:
        rng.normal(size=(3,))
        gradients.append(densified(ids, values, shape))
    for gradient in [*gradients, rng.normal(size=shape)]:
        expected = reference.step(
            expected, gradient, state, alpha=0.25, **in_reference(options)
        )
    assert_close([table], [expected], 1e-12)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "XLA"])
def test_lazy_caution_asks_the_rows_of_the_batch_alone(jit):
    # Rows 1 and 2, each twice: XLA has two rows too many.
    options = {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": False}
    optimizer = RMSprop(0.25, **options, cautious=True, sparse_update="lazy")
    table = keras.Variable(np.ones((4, 3)), dtype="float64")
    optimizer.build([table])
    apply = tf.function(optimizer.apply, jit_compile=jit)
    rng, rows, state = np.random.default_rng(0), np.ones((2, 3)), {}
    for _ in range(6):
        values = rng.normal(size=(4, 3))
        apply([tf.IndexedSlices(tf.constant(values), tf.constant([1, 2, 1, 2]))])
        rows = reference.step(
            rows,
            values[:2] + values[2:],
            state,
            alpha=0.25,
            **in_reference(options | {"cautious": True, "epsilon": 1e-7}),
        )
    assert_close([table.numpy()[1:3]], [rows], 1e-12)
    np.testing.assert_array_equal(table.numpy()[[0, 3]], np.ones((2, 3)))


@pytest.mark.slow
def test_the_built_in_is_wrong_for_repeated_tokens():
    # The day Keras mends it this fails, and the documentation is to change.
    tokens, y = tokens_and_targets()
    weights = []
    for optimizer in [RMSprop(0.01), BUILT_IN(0.01)]:
        model = model_on_tokens(optimizer)
        model.fit(tokens, y, epochs=4, batch_size=16, verbose=0, shuffle=False)
        weights.append(model.get_weights()[0])
    assert np.abs(weights[0] - weights[1]).max() > 1e-2


@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
def test_batches_of_changing_size_are_one_trace(id_dtype):
    table = keras.Variable(np.ones((9, 2), "float32"))
    optimizer = Counting()
    for n in [3, 1, 0, 7, 200]:
        ids = tf.constant(np.arange(n) % 9, id_dtype)
        optimizer.apply([tf.IndexedSlices(tf.ones((n, 2)), ids)], [table])
    assert optimizer.traces == 1
    assert optimizer.iterations.numpy() == 5


def test_fit_traces_once_for_batches_of_changing_size():
    tokens, y = tokens_and_targets(40)
    optimizer = Counting()
    model = model_on_tokens(optimizer)
    model.fit(tokens, y, batch_size=16, epochs=2, verbose=0)  # batches of 16, 16, 8
    first = optimizer.traces
    model.fit(tokens[:33], y[:33], batch_size=16, epochs=2, verbose=0)
    assert optimizer.traces == first


def test_only_rows_with_a_gradient_are_written():
    # Rows that are silent keep even what arithmetic would change: here a NaN in v.
    table = keras.Variable(np.ones((4, 2), "float32"))
    optimizer = RMSprop(0.1)
    optimizer.build([table])
    v = optimizer.variables[2]
    v.assign(np.array([[0, 0], [0, 0], [np.nan, np.nan], [0, 0]], "float32"))
    optimizer.apply([tf.IndexedSlices([[1.0, 1.0]], [1])])
    np.testing.assert_array_equal(np.isnan(v.numpy())[:, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(table.numpy()[[0, 2, 3]], np.ones((3, 2)))
    assert (table.numpy()[1] < 1).all()


def test_a_clock_exists_only_after_a_sparse_gradient():
    table, bias = keras.Variable(np.ones((4, 2), "float32")), keras.Variable([0.0])
    optimizer, store = RMSprop(), {}
    optimizer.build([table, bias])
    optimizer.apply([tf.ones((4, 2)), tf.constant([1.0])])
    assert not list(optimizer._clocks)
    optimizer.apply([tf.IndexedSlices([[1.0, 1.0]], [1]), tf.constant([1.0])])
    clock = optimizer._clocks[0]
    assert clock.updates.numpy() == 1
    np.testing.assert_array_equal(clock.last.numpy(), [0, 1, 0, 0])
    assert clock.last.dtype == tf.int32
    v = 0.1 * 0.9 * np.ones((4, 2))  # of ones, and then with another of 1 in row 1
    v[1] += 0.1
    np.testing.assert_allclose(optimizer.variables[2].numpy(), v, rtol=1e-6)
    assert clock.updates.numpy() == 0  # read, all rows are up to date
    optimizer.save_own_variables(store)
    assert list(store) == ["0", "1", "2", "3"]


def test_the_clock_counts_updates_of_its_table_not_batches():
    table, bias = keras.Variable(np.ones((4, 2), "float32")), keras.Variable([0.0])
    optimizer = RMSprop()
    optimizer.build([table, bias])
    slices = tf.IndexedSlices([[1.0, 1.0]], [1])
    for variables in [[table, bias], [bias], [bias], [table, bias]]:
        optimizer.apply([slices, tf.constant([1.0])][-len(variables) :], variables)
    assert optimizer._clocks[0].updates.numpy() == 2
    assert optimizer.iterations.numpy() == 4


@pytest.mark.parametrize("rho", [0.9, 0.999, 0.999999])
def test_ten_million_updates_of_silence(rho):
    table = keras.Variable(np.ones((2, 1), "float32"))
    optimizer = RMSprop(0.0, rho=rho)
    slices = tf.IndexedSlices([[1.0]], [0])
    optimizer.apply([slices], [table])
    v = optimizer.variables[2]
    updates = optimizer._clocks[0].updates
    start = np.float64(v.numpy()[0, 0])
    updates.assign(10_000_001)
    optimizer.apply([tf.IndexedSlices([[0.0]], [0])])
    # What a float32 machine multiplies by is float32(rho), 10 million times and one.
    expected = start * np.float64(np.float32(rho)) ** 10_000_001
    np.testing.assert_allclose(v.numpy()[0, 0], expected, rtol=1e-5, atol=1e-38)
    assert updates.numpy() == 10_000_002


class TestLazy:
    def step(self, slices, **options):
        table = keras.Variable(np.ones((4, 2), "float32"))
        optimizer = RMSprop(0.1, sparse_update="lazy", **options)
        optimizer.build([table])
        for gradient in slices:
            optimizer.apply([gradient])
        return table.numpy(), optimizer

    @pytest.mark.parametrize(
        "options",
        [
            {"momentum": 0.9},
            {"weight_decay": 0.1},
            {"momentum": 0.9, "centered": True, "clipnorm": 1.0},
            {"use_ema": True},
        ],
    )
    def test_silent_rows_stay_whatever_the_options(self, options):
        slices = [tf.IndexedSlices([[1.0, 2.0]], [i]) for i in [1, 2, 1]]
        weights, optimizer = self.step(slices, **options)
        np.testing.assert_array_equal(weights[[0, 3]], np.ones((2, 2)))
        assert (weights[[1, 2]] < 1).all()
        if "use_ema" in options:
            average = next(v for v in optimizer.variables if "average" in v.path)
            np.testing.assert_array_equal(average.numpy()[[0, 3]], np.ones((2, 2)))
            assert (average.numpy()[[1, 2]] < 1).all()

    @pytest.mark.one_in(6)
    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["eager", "tf.function", "XLA"])
    @pytest.mark.parametrize(
        "name", ["a variable", "bytes", "a graph", "bytes, a graph", "sums, averages"]
    )
    def test_rows_without_a_gradient_never_move(self, name, way):
        rho = keras.Variable(0.5) if name == "a variable" else 0.5
        options = {"momentum": 0.9, "sparse_update": "lazy", "rho": rho}
        if "bytes" in name:
            options["slot_dtype"] = "uint8"
        if name == "sums, averages":
            options |= {"gradient_accumulation_steps": 2, "use_ema": True}
        table = keras.Variable(np.ones((600, 8), "float32"), name="table")
        optimizer = RMSprop(0.01, **options)
        optimizer.build([table])
        first = tf.function(optimizer.apply) if "graph" in name else optimizer.apply
        apply = optimizer.apply
        if way != "eager":
            apply = tf.function(apply, jit_compile=way == "XLA")
        for _ in range(2):
            first([tf.ones((600, 8))])
        before, v = table.numpy(), optimizer.get_state().slots[0].velocity
        for _ in range(2):
            apply([tf.IndexedSlices(tf.ones((1, 8)), tf.constant([3]))])
        moved = (table.numpy() != before).any(1)
        assert np.flatnonzero(moved).tolist() == [3]
        assert "table" in optimizer.explain().split("by rows")[1]
        # v of the others still shrinks.
        updates = 1 if name == "sums, averages" else 2
        state = optimizer.get_state().slots[0]
        rtol = 0.1 if "bytes" in name else 1e-6
        np.testing.assert_allclose(state.velocity[4], 0.5**updates * v[4], rtol=rtol)
        if "graph" in name:  # which knows no clock, and finds all rows up to date
            first([tf.zeros((600, 8))])
            state = optimizer.get_state().slots[0]
            np.testing.assert_allclose(state.velocity[4], 0.125 * v[4], rtol=rtol)

    def test_equals_exact_where_exact_needs_the_rows_only(self):
        rng = np.random.default_rng(0)
        shape, steps = (20, 3), batches(rng, 20, (3,), 6)
        exact = train(RMSprop(0.1), steps, shape, sparse=True)
        lazy = train(RMSprop(0.1, sparse_update="lazy"), steps, shape, sparse=True)
        assert_close(lazy, exact, 0)

    def test_equals_dense_where_all_rows_have_gradients(self):
        values = np.random.default_rng(0).normal(size=(5, 4, 2)).astype("float32")
        options = {"momentum": 0.9, "weight_decay": 0.1, "use_ema": True}
        weights, optimizer = self.step(
            [tf.IndexedSlices(v, [3, 0, 1, 2]) for v in values], **options
        )
        table = keras.Variable(np.ones((4, 2), "float32"))
        built_in = BUILT_IN(0.1, **options)
        for v in values:
            built_in.apply([tf.constant(v[[1, 2, 3, 0]])], [table])
        assert_close([weights], [table.numpy()], 1e-6)
        slots = zip(optimizer.variables, built_in.variables, strict=False)
        for ours, theirs in slots:
            assert_close([ours.numpy()], [theirs.numpy()], 1e-6)


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_tables(dtype):
    tokens, y = tokens_and_targets()
    start = model_on_tokens(RMSprop()).get_weights()
    weights = []
    for kind in [dtype, "float32"]:
        model = model_on_tokens(RMSprop(0.01), dtype=kind)
        model.set_weights(start)
        model.fit(tokens, y, epochs=3, batch_size=16, verbose=0, shuffle=False)
        weights.append(model.get_weights()[0].astype("float32"))
    assert_close(weights[:1], weights[1:], 5e-2)


@pytest.mark.slow
def test_an_index_outside_the_table_changes_nothing_under_xla():
    table = keras.Variable(np.ones((4, 2), "float32"))
    optimizer = RMSprop(0.1)
    optimizer.build([table])
    step = tf.function(
        lambda ids: optimizer.apply([tf.IndexedSlices(tf.ones((2, 2)), ids)]),
        jit_compile=True,
    )
    step(tf.constant([2, 4]))
    np.testing.assert_array_equal(table.numpy()[[0, 1, 3]], np.ones((3, 2)))
    assert (table.numpy()[2] < 1).all()


def test_loss_scale_optimizer_around_a_table():
    def run(inner, sparse):
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
        table = keras.Variable(np.ones((4, 1), "float32"))
        for scale in [4.0, float("inf"), 2.0]:
            values = scale * np.array([[1.0], [2.0]], "float32")
            gradient = tf.IndexedSlices(
                tf.constant(values), tf.constant([1, 1]), tf.constant([4, 1])
            )
            if not sparse:
                gradient = tf.constant(densified([1, 1], values, (4, 1)), "float32")
            optimizer.apply([gradient], [table])
        return [table.numpy(), optimizer.dynamic_scale.numpy()]

    assert_close(run(RMSprop(0.1), True), run(BUILT_IN(0.1), False), 1e-6)


class TestSaving:
    def trained(self, epochs, model=None):
        tokens, y = tokens_and_targets()
        model = model or model_on_tokens(RMSprop(0.01))
        model.fit(tokens, y, epochs=epochs, batch_size=16, verbose=0, shuffle=False)
        return model

    def state(self, model):
        return [v.numpy() for v in model.variables + model.optimizer.variables]

    def assert_same(self, model, expected):
        pairs = zip(self.state(model), self.state(expected), strict=True)
        for got, want in pairs:
            np.testing.assert_array_equal(got, want)

    @pytest.mark.slow
    def test_a_keras_file_resumes_to_the_same_bits(self, tmp_path):
        model = self.trained(2)
        model.save(tmp_path / "m.keras")
        resumed = keras.models.load_model(tmp_path / "m.keras")
        self.assert_same(self.trained(2, resumed), self.trained(2, model))

    @pytest.mark.slow
    def test_a_weights_file_resumes_to_the_same_bits(self, tmp_path):
        saved = self.trained(2)
        saved.save_weights(tmp_path / "m.weights.h5")
        model = model_on_tokens(RMSprop(0.01))
        model.optimizer.build(model.trainable_variables)
        model.load_weights(tmp_path / "m.weights.h5")
        self.assert_same(self.trained(2, model), self.trained(2, saved))

    @pytest.mark.slow
    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("build", [True, False])
    def test_a_checkpoint_resumes_to_the_same_bits(self, tmp_path, build):
        saved = self.trained(2)
        path = tf.train.Checkpoint(model=saved, optimizer=saved.optimizer).save(
            str(tmp_path / "ckpt")
        )
        model = model_on_tokens(RMSprop(0.01))
        if build:
            model.optimizer.build(model.trainable_variables)
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).restore(path)
        self.assert_same(self.trained(2, model), self.trained(2, saved))

    def test_a_file_without_clocks_makes_all_rows_current(self):
        table = keras.Variable(np.ones((4, 2), "float32"))
        optimizer, store = RMSprop(), {}
        optimizer.build([table])
        optimizer.save_own_variables(store)
        optimizer.apply([tf.IndexedSlices([[1.0, 1.0]], [1])])
        assert optimizer._clocks[0].updates.numpy() == 1
        optimizer.load_own_variables(store)
        assert optimizer._clocks[0].updates.numpy() == 0
        np.testing.assert_array_equal(optimizer._clocks[0].last.numpy(), np.zeros(4))

    def test_a_checkpoint_finds_the_clocks_by_their_table(self, tmp_path):
        def tables():
            optimizer = RMSprop(0.1)
            optimizer.build(
                [keras.Variable(np.ones((n, 1), "float32")) for n in (3, 5)]
            )
            return optimizer

        slices = tf.IndexedSlices([[1.0]], [2])
        optimizer = tables()
        a, b = optimizer._trainable_variables
        for variable in [b, b, a]:
            optimizer.apply([slices], [variable])
        path = tf.train.Checkpoint(o=optimizer).save(str(tmp_path / "ckpt"))
        other = tables()
        tf.train.Checkpoint(o=other).restore(path)
        # Before any step: the clocks are there, and all rows were up to date.
        assert {*other._clocks} == {0, 1}
        for i in (0, 1):
            assert int(other._clocks[i].updates) == 0
            assert not other._clocks[i].last.numpy().any()

    @pytest.mark.slow
    def test_the_state_of_a_wrapper_is_kept(self, tmp_path):
        wrapper = keras.optimizers.LossScaleOptimizer(
            RMSprop(0.01), initial_scale=4.0, dynamic_growth_steps=2
        )
        model = self.trained(2, model_on_tokens(wrapper))
        assert model.optimizer.dynamic_scale.numpy() == 4.0 * 2**3
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        assert loaded.optimizer.dynamic_scale.numpy() == 4.0 * 2**3
        self.assert_same(self.trained(1, loaded), self.trained(1, model))

    def test_a_state_of_another_model_is_not_loaded(self):
        optimizer, other, store = RMSprop(), RMSprop(), {}
        optimizer.build([keras.Variable(np.ones((4, 2), "float32"))])
        optimizer.apply([tf.IndexedSlices([[1.0, 1.0]], [1])])
        optimizer.save_own_variables(store)
        other.build([keras.Variable([1.0]), keras.Variable([2.0])])
        with pytest.warns(UserWarning, match="Skipping variable loading"):
            other.load_own_variables(store)
        assert not list(other._clocks)


class TestDenseAndSparseInTurn:
    """A table without a clock may be traced dense before it gets one."""

    STEPS = (False, True, False, True, True, False)

    def run(self, optimizer, apply_dense, apply_sparse):
        table = keras.Variable(np.ones((4, 2), "float32"))
        optimizer.build([table])
        for n, sparse in enumerate(self.STEPS):
            values, ids = np.array([[1.0 + n, 2.0]], "float32"), [n % 4]
            if sparse:
                apply_sparse([tf.IndexedSlices(tf.constant(values), tf.constant(ids))])
            else:
                dense = densified(ids, values, (4, 2)) + 0.5
                apply_dense([tf.constant(dense, "float32")])
        return table.numpy()

    def expected(self):
        optimizer = BUILT_IN(0.1)

        def apply_sparse(grads):
            optimizer.apply(
                [
                    tf.convert_to_tensor(
                        tf.IndexedSlices(
                            grads[0].values, grads[0].indices, tf.constant([4, 2])
                        )
                    )
                ]
            )

        return self.run(optimizer, optimizer.apply, apply_sparse)

    @pytest.mark.parametrize("jit_compile", ["auto", False])
    def test_eager(self, jit_compile):
        optimizer = RMSprop(0.1, jit_compile=jit_compile)
        result = self.run(optimizer, optimizer.apply, optimizer.apply)
        assert_close([result], [self.expected()], 1e-6)

    def test_in_two_functions(self):
        optimizer = RMSprop(0.1)
        dense, sparse = tf.function(optimizer.apply), tf.function(optimizer.apply)
        assert_close([self.run(optimizer, dense, sparse)], [self.expected()], 1e-6)


def test_the_same_table_twice_in_one_step():
    table = keras.Variable(np.ones((4, 1), "float32"))
    slices = [tf.IndexedSlices([[1.0]], [0]), tf.IndexedSlices([[1.0], [2.0]], [1, 0])]
    RMSprop(0.1).apply(slices, [table, table])
    twin = keras.Variable(np.ones((4, 1), "float32"))
    dense = [tf.constant([[1.0], [0], [0], [0]]), tf.constant([[2.0], [1], [0], [0]])]
    BUILT_IN(0.1).apply(dense, [twin, twin])
    assert_close([table.numpy()], [twin.numpy()], 1e-6)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
def test_repeats_are_summed_in_float32(options):
    # In float16 the sum of 40 slices of 2000 is infinite.
    table = keras.Variable(np.ones((4, 1)), dtype="float16")
    optimizer = RMSprop(0.1, **options)
    slices = tf.IndexedSlices(tf.fill([40, 1], tf.constant(2e3, "float16")), [0] * 40)
    optimizer.apply([slices], [table])
    assert np.isfinite(table.numpy()).all()
    np.testing.assert_allclose(optimizer.variables[2].numpy()[0], [0.1 * 8e4**2], 1e-5)


def test_lazy_state_with_ema_is_saved_in_a_checkpoint(tmp_path):
    table = keras.Variable(np.ones((4, 1), "float32"))
    optimizer = RMSprop(0.1, sparse_update="lazy", use_ema=True)
    optimizer.apply([tf.IndexedSlices([[1.0]], [1])], [table])
    assert tf.train.Checkpoint(o=optimizer).save(str(tmp_path / "ckpt"))
