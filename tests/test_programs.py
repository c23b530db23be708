"""The XLA-compiled step: traced once, up to date, and equal to the plain way."""

import gc
import json
import operator
import re
import traceback
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import arrays, assert_close, python, train

from keras_rmsprop import RMSprop
from keras_rmsprop.backends import programs
from keras_rmsprop.backends.programs import XLA_IN_GRAPH_ELEMENTS

pytestmark = pytest.mark.tensorflow("programs of eager steps")


class Traces:
    count = 0


class Counting(RMSprop):
    """Counts how often Python takes a step: once for each trace of it."""

    @property
    def traces(self):
        return self._traced.count

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._traced = traced = Traces()  # what changes inside it is no new attribute
        take = self._steps.take

        def counted(*args, **kwargs):
            traced.count += 1
            take(*args, **kwargs)

        self._steps.take = counted


def gradient(*values):
    return [tf.constant(v) for v in values]


def test_one_trace_for_repeated_calls():
    optimizer = Counting()
    train(optimizer, steps=10)
    assert optimizer.traces == 1


def test_other_gradients_are_another_trace_and_each_is_kept():
    a, b = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = Counting()
    optimizer.build([a, b])
    for _ in range(3):
        optimizer.apply(gradient([1.0], [1.0]))
        optimizer.apply(gradient([1.0]), [b])
        optimizer.apply([tf.constant([1.0], "float64")], [b])
    assert optimizer.traces == 3
    assert optimizer.iterations.numpy() == 9


def test_the_programs_in_use_are_kept(monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 2)
    weight = keras.Variable([1.0])
    optimizer = Counting()
    for clipnorm in (None, 1.0, None, 2.0, None, 3.0, None):
        optimizer.clipnorm = clipnorm
        optimizer.apply([tf.constant([1.0])], [weight])
    assert optimizer.traces == 4  # None was traced once


def test_learning_rate_assigned_later_takes_effect_without_a_trace():
    variable = keras.Variable([0.0])
    optimizer = Counting(0.5, rho=0.0)  # each step is learning_rate * sign(gradient)
    for rate in [0.5, 0.25, 2]:
        optimizer.learning_rate = rate
        before = variable.numpy()
        optimizer.apply(gradient([1.0]), [variable])
        np.testing.assert_allclose(before - variable.numpy(), [rate], rtol=1e-6)
    assert optimizer.traces == 1


def test_any_schedule_takes_effect_without_a_trace():
    class FromPython(keras.optimizers.schedules.LearningRateSchedule):
        rate = 0.5

        def __call__(self, step):
            return self.rate if step < 2 else self.rate / 10

    schedule = FromPython()
    variable = keras.Variable([0.0])
    optimizer = Counting(schedule, rho=0.0)
    steps = []
    for rate in [0.5, 0.25, 0.25]:
        schedule.rate = rate
        before = variable.numpy()
        optimizer.apply(gradient([1.0]), [variable])
        steps.append(float((before - variable.numpy())[0]))
    np.testing.assert_allclose(steps, [0.5, 0.25, 0.025], rtol=1e-5)
    assert optimizer.traces == 1


def test_callable_is_called_once_at_every_step():
    rates = iter([0.5, 0.25, 1])
    variable = keras.Variable([0.0])
    optimizer = Counting(lambda: next(rates), rho=0.0)
    for rate in [0.5, 0.25, 1]:
        before = variable.numpy()
        optimizer.apply(gradient([1.0]), [variable])
        np.testing.assert_allclose(before - variable.numpy(), [rate], rtol=1e-6)
    assert optimizer.traces == 1


def test_callables_may_return_what_they_like():
    kinds = [
        0.5,
        tf.constant(0.5, "float64"),
        keras.Variable(0.25),
        keras.Variable(1.0),
    ]
    rates = iter(kinds)
    variable = keras.Variable([0.0])
    optimizer = RMSprop(lambda: next(rates), rho=0.0)
    for rate in [0.5, 0.5, 0.25, 1]:
        before = variable.numpy()
        optimizer.apply(gradient([1.0]), [variable])
        np.testing.assert_allclose(before - variable.numpy(), [rate], rtol=1e-6)


def test_a_schedule_in_place_of_a_number():
    variable = keras.Variable([0.0])
    optimizer = RMSprop(0.5, rho=0.0)
    optimizer.apply(gradient([1.0]), [variable])
    optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    optimizer.apply(gradient([1.0]), [variable])  # iteration 1: 0.1 * 0.5
    np.testing.assert_allclose(variable.numpy(), [-0.55], rtol=1e-5)


def test_a_hyperparameter_assigned_later_takes_effect():
    variable = keras.Variable([0.0])
    optimizer = RMSprop(1.0, rho=0.0)
    optimizer.apply(gradient([1.0]), [variable])
    optimizer.epsilon = 3.0
    optimizer.apply(gradient([1.0]), [variable])
    np.testing.assert_allclose(variable.numpy(), [-1.5], rtol=1e-6)


def test_an_exclusion_or_a_constraint_set_later_takes_effect():
    variable = keras.Variable([1.0], name="kernel")
    optimizer = RMSprop(1.0, weight_decay=0.5)
    optimizer.apply(gradient([0.0]), [variable])
    np.testing.assert_allclose(variable.numpy(), [0.5])
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    optimizer.apply(gradient([0.0]), [variable])
    np.testing.assert_allclose(variable.numpy(), [0.5])
    variable.constraint = keras.constraints.NonNeg()
    optimizer.apply(gradient([1.0]), [variable])
    np.testing.assert_allclose(variable.numpy(), [0.0])


def test_the_number_of_programs_is_bounded(monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 3)
    variable = keras.Variable([1.0])
    optimizer = RMSprop()
    optimizer.build([variable])
    for n in range(5):
        optimizer.epsilon = 1.0 + n
        optimizer.apply(gradient([1.0]))
    assert len(optimizer._steps.programs._programs) == 3


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "global_clipnorm": 1.0, "weight_decay": 0.1}]
)
def test_compiled_and_plain_agree(options):
    plain = train(RMSprop(**options, jit_compile=False))
    assert_close(train(RMSprop(**options)), plain, 1e-6)


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "clipnorm": 1.0}])
def test_a_cluster_in_a_graph_agrees(options):
    plain = train(RMSprop(**options, jit_compile=False), way="tf.function")
    cluster = RMSprop(**options, jit_compile=True)
    assert_close(train(cluster, way="tf.function"), plain, 1e-6)


def test_direct_and_public_calls_agree(monkeypatch):
    # Not a short program, which is called in no such way.
    direct = train(RMSprop(momentum=0.9, jit_compile=True))
    calls = []
    monkeypatch.setattr(programs._Program, "_call_inner", lambda *_: calls.append(1))
    assert_close(train(RMSprop(momentum=0.9, jit_compile=True)), direct, 0)
    assert len(calls) == 20


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quick_and_public_kinds_agree(shape, dtype):
    x = keras.ops.zeros(shape, dtype)
    found, kind = programs.quick_kind(x)
    assert (tuple(found), tf.as_dtype(kind)) == (tuple(x.shape), x.dtype)


def test_without_the_quick_kind_the_public_one_serves():
    class Tensor:
        shape = tf.TensorShape([2, 3])
        dtype = tf.float16

    assert programs.quick_kind(Tensor()) == ((2, 3), tf.float16)


def test_gradients_of_other_shapes_are_refused_after_steps_with_the_right_ones():
    optimizer, variable = RMSprop(), keras.Variable([1.0, 2.0])
    optimizer.apply([tf.ones(2)], [variable])
    before = variable.numpy()
    for wrong in (tf.ones([2, 1]), tf.ones(3), tf.ones([], "float32")):
        with pytest.raises(ValueError, match="must have the shape of its variable"):
            optimizer.apply([wrong])
    np.testing.assert_array_equal(variable.numpy(), before)


@pytest.mark.portable
def test_fit_of_a_large_model_holds_one_xla_cluster_and_small_ones_none():
    def clusters(size, **options):
        variable = keras.Variable(np.zeros(size, "float32"))
        optimizer = RMSprop(**options)
        optimizer.build([variable])
        step = tf.function(lambda g: optimizer.apply([g]), autograph=False)
        graph = step.get_concrete_function(tf.TensorSpec(size)).graph
        return sum("Call" in op.type for op in graph.get_operations())

    assert clusters(XLA_IN_GRAPH_ELEMENTS) == 1
    assert clusters(XLA_IN_GRAPH_ELEMENTS - 1) == 0
    assert clusters(3, jit_compile=True) == 1
    assert clusters(XLA_IN_GRAPH_ELEMENTS, jit_compile=False) == 0


def test_changed_learning_rate_in_fit():
    variable_of = lambda m: m.trainable_variables[0].numpy().item()  # noqa: E731
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(RMSprop(0.5, rho=0.0), loss=lambda y, p: p)  # the gradient is x = 1
    x = np.ones((1, 1), "float32")
    for rate in [0.5, 0.25]:
        model.optimizer.learning_rate = rate
        before = variable_of(model)
        model.fit(x, x, verbose=0)
        assert before - variable_of(model) == pytest.approx(rate, rel=1e-5)


@pytest.mark.slow
@pytest.mark.one_in(10)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_fit_equals_the_built_in(jit_compile, run_eagerly):
    if jit_compile and run_eagerly:
        pytest.skip("Keras refuses the two together")

    def losses(optimizer):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)]
        )
        model.compile(
            optimizer, "mse", jit_compile=jit_compile, run_eagerly=run_eagerly
        )
        x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
        history = model.fit(x, x[:, :1] ** 2, epochs=3, batch_size=16, verbose=0)
        return [np.array(history.history["loss"]), *model.get_weights()]

    options = {"learning_rate": 0.01, "momentum": 0.5, "clipnorm": 1.0}
    expected = losses(keras.optimizers.RMSprop(**options))
    assert_close(losses(RMSprop(**options)), expected, 1e-4)


def test_partially_trainable_model_in_a_custom_loop():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)]
    )
    model.layers[0].trainable = False
    frozen = model.layers[0].kernel.numpy()
    optimizer = RMSprop(0.01)
    x = tf.constant(arrays([(8, 2)])[0])
    losses = []
    for _ in range(30):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - 1) ** 2)
        variables = model.trainable_variables
        optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), frozen)


def test_step_inside_a_persistent_tape():
    variable = keras.Variable([2.0])
    with tf.GradientTape(persistent=True) as tape:
        loss = variable.value**2
        RMSprop(0.1).apply([tape.gradient(loss, variable.value)], [variable])
        second = variable.value**3
    np.testing.assert_allclose(
        tape.gradient(second, variable.value), 3 * variable.numpy() ** 2, rtol=1e-6
    )


def test_functions_run_eagerly_for_debugging():
    expected = train(RMSprop(), steps=3)
    tf.config.run_functions_eagerly(True)
    try:
        optimizer = Counting()
        assert_close(train(optimizer, steps=3), expected, 1e-6)
    finally:
        tf.config.run_functions_eagerly(False)
    assert optimizer.traces == 3


@pytest.mark.rest
@pytest.mark.slow
def test_variables_on_other_devices():
    # In a process of its own: the devices are set before TensorFlow starts.
    program = """
        import keras, numpy as np, tensorflow as tf
        from keras_rmsprop import RMSprop
        [cpu] = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)

        def run(kind, home, call):
            with tf.device(home[0]):
                a = keras.Variable([1.0, 2.0])
            with tf.device(home[1]):
                b = keras.Variable([[3.0], [4.0]])
                optimizer = kind(0.1)
                optimizer.build([a, b])
            for dense in [True, False, True]:
                gradient = tf.constant([[1.0], [0.0]])
                if not dense and kind is RMSprop:
                    gradient = tf.IndexedSlices([[1.0]], [0])
                with tf.device(call):
                    optimizer.apply([tf.ones(2), gradient], [a, b])
            return np.concatenate([a.numpy(), b.numpy()[:, 0]])

        for home in ["CPU:0", "CPU:0"], ["CPU:1", "CPU:1"], ["CPU:0", "CPU:1"]:
            for call in ["CPU:0", "CPU:1"]:
                ours = run(RMSprop, home, call)
                theirs = run(keras.optimizers.RMSprop, home, call)
                np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        print("equal")
    """
    assert python(program) == "equal"


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "centered": True, "global_clipnorm": 1.0},
        {"weight_decay": 0.1, "clipnorm": 1.0, "use_ema": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": False, "bias_correction": True},
    ],
)
def test_xla_updates_in_place(options):
    # A bound after the sum that is v made XLA compute v twice, from a copy.
    variable = keras.Variable(tf.ones([16, 256]))
    optimizer = RMSprop(**options)
    optimizer.build([variable])
    step = tf.function(lambda g: optimizer.apply([g]), jit_compile=True)
    program = step.experimental_get_compiler_ir(tf.ones([16, 256]))("optimized_hlo")
    assert "f32[16,256]" in program
    assert not re.search(r"f32\[(16,256|4096)\]\S* copy\(", program)


def test_a_constraint_changed_in_place_takes_effect():
    weights = []
    for kind in (RMSprop, keras.optimizers.RMSprop):
        variable = keras.Variable([1.0, 1.0])
        variable.constraint = keras.constraints.MaxNorm(1.0)
        optimizer = kind(1.0)
        for most in (1.0, 1.0, 2.0, 2.0):
            variable.constraint.max_value = most
            optimizer.apply([tf.constant([-1.0, -1.0])], [variable])
        weights.append(variable.numpy())
    np.testing.assert_allclose(*weights, rtol=1e-6)


def test_freezing_a_variable_counts_where_averages_replace_the_weights():
    weights = []
    for jit_compile in ("auto", False):
        a, b = keras.Variable([1.0]), keras.Variable([2.0])
        options = {"ema_momentum": 0.5, "ema_overwrite_frequency": 2}
        optimizer = RMSprop(0.1, use_ema=True, jit_compile=jit_compile, **options)
        optimizer.build([a, b])
        for n in range(6):
            if n == 3:
                b.assign([5.0])
                b.trainable = False
            optimizer.apply([tf.constant([1.0])], [a])
        weights.append([a.numpy(), b.numpy()])
    assert weights[0][1] == [5.0]
    np.testing.assert_allclose(*weights, rtol=1e-6)


@pytest.mark.slow
def test_what_is_assigned_at_each_step_is_not_kept_alive():
    class Logging(RMSprop):
        def apply(self, grads, trainable_variables=None):
            self.last = list(grads)
            super().apply(grads, trainable_variables)

    variable, optimizer, seen = keras.Variable([1.0]), Logging(), []
    for _ in range(20):
        gradient = tf.random.normal([1])
        seen.append(weakref.ref(gradient))
        optimizer.apply([gradient], [variable])
    del gradient
    gc.collect()
    assert sum(reference() is not None for reference in seen) <= 1


def test_objects_are_told_apart_though_ids_are_used_again():
    identities, seen = programs.Identities(), set()
    for _ in range(50):
        seen.add(identities.comparable(Traces()))
    assert len(seen) == 50
    one = Traces()
    assert identities.comparable(one) == identities.comparable(one)
    assert identities.comparable(1) != identities.comparable(True)
    assert identities.comparable((one, 2)) == identities.comparable((one, 2))


@pytest.mark.portable
def test_explain_says_which_way_each_variable_goes():
    table, kernel, bias = (
        keras.Variable(np.ones(shape, "float32"), name=name)
        for name, shape in (("table", (9, 4)), ("kernel", (80, 64)), ("bias", (64,)))
    )
    optimizer = RMSprop()
    with pytest.raises(ValueError, match="must be built"):
        optimizer.explain()
    slices = tf.IndexedSlices([[1.0] * 4], [2], [9, 4])
    variables = [table, kernel, bias]
    optimizer.apply([slices, tf.ones((80, 64)), tf.ones(64)], variables)
    eager, graph = optimizer.explain().split("In `fit`")
    assert "one program, compiled by XLA" in eager
    assert graph.endswith("State: float32.")
    assert re.search(r"1 by rows .* table \(9, 4\)", graph.replace("\n", " "))
    assert re.search(r"1 on its own .* kernel", graph.replace("\n", " "))
    assert re.search(r"1 concatenated .* bias", graph.replace("\n", " "))
    optimizer.momentum = 0.9
    optimizer._momentums = optimizer._velocities
    assert MOVES.search(optimizer.explain())
    assert "operation by operation" in RMSpropOfOnes.explained([kernel])


MOVES = re.compile(
    r"1 by all rows \(sparse gradients, but `momentum` moves rows without a\s+gradient"
)


@pytest.mark.parametrize("way", ["eager", "tf.function"])
def test_explain_says_why_a_table_is_dense(way):
    table = keras.Variable(np.ones((9, 4)), name="table")
    optimizer = RMSprop(momentum=0.9, slot_dtype="bfloat16")
    optimizer.build([table])
    apply = tf.function(optimizer.apply) if way == "tf.function" else optimizer.apply
    apply([tf.IndexedSlices(tf.ones((1, 4)), tf.constant([2]), tf.constant([9, 4]))])
    explained = optimizer.explain()
    assert MOVES.search(explained)
    assert explained.endswith("\nState: bfloat16.")


def test_explain_says_what_it_knows_of_the_learning_rate():
    average = {"use_ema": True, "ema_momentum": 0.998, "ema_warmup": True}
    optimizer = RMSprop("auto", momentum=0.9, nesterov=True, **average)
    optimizer.build([weight := keras.Variable([1.0])])
    assert "Estimated learning rate: not known before a step;" in optimizer.explain()
    optimizer.apply([[1.0]], [weight])
    assert optimizer.explain().splitlines()[-1] == (
        "Estimated learning rate: 1e-06; Nesterov momentum 0.9; "
        "EMA of the weights 0.998 with warm-up."
    )


class RMSpropOfOnes(RMSprop):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(keras.ops.ones_like(gradient), variable, learning_rate)

    @classmethod
    def explained(cls, variables):
        optimizer = cls()
        optimizer.build(variables)
        return optimizer.explain()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("call", ["apply", "apply_gradients"])
def test_autograph_converts_nothing_of_a_step(call):
    # Converting takes seconds; of the built-in it converts nothing, either.
    stacks = []

    class Own(RMSprop):
        def update_step(self, gradient, variable, learning_rate):
            stacks.append(traceback.extract_stack())
            super().update_step(gradient, variable, learning_rate)

    weights, optimizer = keras.Variable(tf.ones(3)), Own("auto")

    @tf.function
    def step(gradient):
        if call == "apply":
            optimizer.apply([gradient], [weights])
        else:
            optimizer.apply_gradients([(gradient, weights)])

    step(tf.ones(3))
    generated = [x.name for x in stacks[0] if "autograph_generated" in x.filename]
    assert "tf__step" in generated  # the user's own
    assert {x for x in generated if not x.endswith("_body")} == {"tf__step"}


def test_slots_are_made_outside_a_trace():
    # The first trace of a function would hold a condition for each of them, and the
    # function would be traced again without.
    traces, weights, optimizer = [], keras.Variable(tf.ones(3)), RMSprop(momentum=0.9)

    @tf.function
    def step(gradient):
        traces.append(gradient)
        optimizer.apply([gradient], [weights])

    for _ in range(2):
        step(tf.ones(3))
    assert len(traces) == 1
    types = {operation.type for operation in traces[0].graph.get_operations()}
    assert not {"If", "StatelessIf"} & types


class UnitRows(keras.constraints.Constraint):
    def __call__(self, w):
        def shortened(row):
            if tf.norm(row) > 1:  # `tf.map_fn` lets AutoGraph convert this
                row /= tf.norm(row)
            return row

        return tf.map_fn(shortened, tf.convert_to_tensor(w))


@pytest.mark.parametrize("rows", [2, XLA_IN_GRAPH_ELEMENTS // 64])
def test_autograph_converts_what_is_the_users(rows):
    found = []
    for kind in (RMSprop, keras.optimizers.RMSprop):
        start = np.random.default_rng(0).normal(size=(rows, 64)).astype("float32")
        weights, optimizer = keras.Variable(start), kind(0.1)
        weights.constraint = UnitRows()
        optimizer.build([weights])
        tf.function(optimizer.apply)([tf.ones((rows, 64))])
        found.append(weights.numpy())
        if kind is RMSprop:
            assert "`tf.function`: part of the graph" in optimizer.explain()
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"learning_rate": "auto"}])
def test_a_later_trace_may_bring_tables_and_the_build(options):
    def variables():
        start = np.ones((5, 2), "float32")
        return [keras.Variable(start, name="embeddings") for _ in "ab"]

    rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), tf.constant([5, 2]))

    def trained(*, built, by_rows=True, run=lambda step: step):
        weights, optimizer = variables(), RMSprop(**options)
        if built:
            optimizer.build(weights)

        @run
        def step(which):
            if which is not None:
                g = rows if by_rows else tf.convert_to_tensor(rows)
                grads = [g if which == i else None for i in range(2)]
                optimizer.apply(grads, weights)

        for which in (None, 0, 1, 0, 1):
            step(which)
        return [w.numpy() for w in weights]

    expected = trained(built=True)
    for built in (True, False):
        found = trained(built=built, run=tf.function)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.portable
def test_xla_compiles_the_first_programs_of_a_process_and_those_it_is_told_to(
    monkeypatch,
):
    monkeypatch.setattr(programs, "XLA_PROGRAMS", 2)
    large = (80, 64)

    def is_compiled(**options):
        optimizer = RMSprop(**options)
        optimizer.apply([tf.ones(large)], [keras.Variable(tf.ones(large))])
        (program,) = optimizer._steps.programs._programs.values()
        return program.concrete.function_def.attr["_XlaMustCompile"].b

    assert [is_compiled() for _ in range(3)] == [True, True, False]
    assert is_compiled(jit_compile=True)
    optimizer = RMSprop()
    optimizer.build([keras.Variable(tf.ones(large))])
    assert "without XLA" in optimizer.explain()


def test_equal_numbers_are_the_same_wherever_they_come_from():
    identities = programs.Identities()
    for text in ("1.5", "[1.5, 2]"):
        one, other = (json.loads(text) for _ in "ab")
        one, other = (tuple(x) if isinstance(x, list) else x for x in (one, other))
        assert one is not other
        assert identities.comparable(one) == identities.comparable(other)


def test_a_constraint_may_be_a_function_without_attributes():
    weight = keras.Variable([-1.0, 2.0])
    weight.constraint = operator.abs
    RMSprop(0.1).apply([[1.0, 1.0]], [weight])
    np.testing.assert_allclose(
        weight.numpy(), [1 + 0.1 / 0.1**0.5, 2 - 0.1 / 0.1**0.5], rtol=1e-5
    )
