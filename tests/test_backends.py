"""Steps as data on two backends, and programs around a toy step: no optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rmsprop import rule
from keras_rmsprop.backends import current as backend
from keras_rmsprop.backends import layouts, programs
from keras_rmsprop.codecs import Draw
from keras_rmsprop.rule import Slots
from keras_rmsprop.update import Constants, Update, update_in_turn

pytestmark = pytest.mark.tensorflow("its backend beside that of the others")

SHAPES = [(3, 4), (7,), (), (layouts.SMALL_ELEMENTS + 1,), (2048, 8)]


def updates(decays=(None,), dtype="float32"):
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.uniform(0.5, 1, shape).astype(dtype)

    return [
        Update(
            tf.Variable(draw(shape)),
            tf.constant(draw(shape)),
            # v is larger than a^2, or its root would be mere rounding.
            Slots(*(tf.Variable(draw(shape) + n) for n in (1, 0, 0))),
            decays[i % len(decays)],
        )
        for i, shape in enumerate(SHAPES)
    ]


def values(several):
    return [x.numpy() for one in several for x in (one.variable, *one.slots)]


OPTIONS = rule.Options(momentum=0.9, nesterov=True)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("xla", [None, False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("options", [OPTIONS, OPTIONS._replace(cautious=True)])
def test_both_backends_agree(xla, decoupled, options):
    def step():
        return Constants(options, 0.1, Draw(None, count), decoupled)

    count = tf.Variable(3)
    one, other = updates((None, 0.5)), updates((None, 0.5))
    update_in_turn(one, step(), in_one_program=False)

    def run():
        backend.update(other, step(), in_program=True)

    (run if xla is None else tf.function(run, jit_compile=xla))()
    for got, want in zip(values(other), values(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_plain_step_in_numpy():
    one = updates((0.5,))[0]
    w, g, (v, m, a) = one.variable.numpy(), one.gradient.numpy(), one.slots
    v, a = 0.9 * v + 0.1 * g**2, 0.9 * a + 0.1 * g
    m = 0.9 * m + 0.2 * g / np.sqrt(v - a**2 + 1e-7)
    update_in_turn(
        [one],
        Constants(rule.Options(momentum=0.9), 0.2, Draw(None, 0)),
        in_one_program=False,
    )
    expected = [w - m - 0.2 * 0.5 * w, v, m, a]
    for got, want in zip(values([one]), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_ways():
    count = tf.Variable(0)
    step = Constants(OPTIONS, 0.1, Draw(None, count))
    small, _, _, large, thin = updates()
    eager = [backend.way(one, step) for one in (small, large, thin)]
    assert [way.name for way in eager] == [
        "concatenated with others",
        "on its own",
        "on its own",
    ]
    cautious = Constants(OPTIONS._replace(cautious=True), 0.1, Draw(None, count))
    assert backend.way(small, cautious).name == "on its own"
    assert backend.way(small._replace(rows=()), step).name == "by rows"


class Toy:
    """Takes a step; counts how often it is traced and how often it runs plainly."""

    def __init__(self):
        self.weight = keras.Variable([1.0, 2.0])
        self.scale = 1.0
        self.traces = self.plain = 0
        self.programs = programs.Programs()
        self.xla = False
        self.settings = 0
        self.learning_rate = 0.5

    @property
    def jit_compile(self):
        return True if self.xla else "auto"

    def take(self, grads, variables, rate=None, in_program=False):
        self.traces += in_program
        self.plain += not in_program
        for g, variable in zip(grads, variables, strict=True):
            if g is not None:
                g = tf.convert_to_tensor(g)
                variable.assign_sub(self.scale * rate * g)

    def prepare(self, grads, variables):
        return [self.weight]

    def attributes(self):
        return {"settings": self.settings}

    def also_constant(self):
        return ()

    def is_for_kernel(self, variables):
        return False

    def calls_users_python(self, variables):
        return False

    def has_blocks(self):
        return False

    def run(self, *grads, settings=0, rate=0.5):
        self.settings, self.learning_rate = settings, rate
        self.programs.forget_attributes()
        grads = [*grads] or [tf.ones(2)]
        self.programs.run(self, grads, [self.weight] * len(grads))
        return self.weight.numpy()


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(programs.Programs, "compiled", 0)
    return Toy()


def kept(toy):
    return [*toy.programs._programs.values()]


def test_one_trace_for_what_repeats(toy):
    for rate in (0.5, 0.25):
        toy.run(rate=rate)
    np.testing.assert_allclose(toy.weight, [0.25, 1.25])
    assert (toy.traces, toy.plain) == (1, 0)


def test_a_rate_that_is_a_variable_is_read_in_the_program(toy):
    rate = keras.Variable(0.5)
    toy.run(rate=rate)
    rate.assign(0.25)
    toy.run(rate=rate)
    np.testing.assert_allclose(toy.weight, [0.25, 1.25])
    toy.run(rate=keras.Variable(1.0))
    np.testing.assert_allclose(toy.weight, [-0.75, 0.25])
    assert toy.traces == 2


def test_all_that_a_trace_holds_is_in_its_key(toy):
    toy.run()
    toy.scale = 2.0
    np.testing.assert_allclose(toy.run(settings=1), [-0.5, 0.5])
    toy.run(tf.ones(2), None)
    toy.run(None, tf.ones(2))
    assert toy.traces == 4
    toy.run(None, tf.ones(2))
    assert toy.traces == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda toy: setattr(toy, "weight", keras.Variable(toy.weight)),
        lambda toy: setattr(toy.weight, "constraint", keras.constraints.NonNeg()),
    ],
)
def test_another_variable_or_constraint_is_another_program(toy, change):
    toy.run()
    change(toy)
    toy.run()
    assert toy.traces == 2


def test_kinds_of_gradients_are_told_apart(toy):
    of_float64 = tf.ones(2, "float64")
    kinds = [
        [tf.ones(2)],
        [tf.ones(1)],
        [of_float64],
        [None],
        [tf.IndexedSlices(tf.ones([1]), tf.constant([0]))],
        [tf.IndexedSlices(tf.ones([1]), tf.constant([0], "int64"))],
        [tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]))],
        [tf.IndexedSlices(tf.ones([1], "float64"), tf.constant([0]))],
    ]
    found = [tuple(programs.flattened(grads)[1]) for grads in kinds]
    assert len({*found}) == len(kinds)
    # The number of rows is none of it.
    two = tf.IndexedSlices(tf.ones([2]), tf.constant([0, 1]))
    tensors, of_two = programs.flattened([two])
    assert tuple(of_two) == found[4]
    assert [*map(id, tensors)] == [id(two.values), id(two.indices)]


def test_after_the_first_few_only_what_repeats_is_traced(toy):
    for n in range(programs.EAGER_TRACES + 3):
        toy.run(settings=n)
    assert (toy.traces, toy.plain) == (programs.EAGER_TRACES, 3)
    toy.run(settings=n)
    toy.run(settings=n)
    assert (toy.traces, toy.plain) == (programs.EAGER_TRACES + 1, 3)
    np.testing.assert_allclose(toy.weight, np.array([1, 2]) - 0.5 * 9)


def test_the_most_programs_and_those_in_use_stay(toy, monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 3)
    for n in (0, 1, 0, 2, 0, 3):
        toy.run(settings=n)
        assert len(kept(toy)) <= 3
    traces = toy.traces
    toy.run(settings=0)
    assert toy.traces == traces
    toy.run(settings=1)
    assert toy.traces == traces + 1


def test_the_last_program_that_xla_compiles(toy, monkeypatch):
    monkeypatch.setattr(programs, "XLA_PROGRAMS", 2)
    for n in range(4):
        toy.xla = programs.is_xla_left()
        toy.run(settings=n)
    assert [program.xla for program in kept(toy)] == [True, True, False, False]
    for program in kept(toy):
        compiled = program.concrete.function_def.attr["_XlaMustCompile"].b
        assert compiled is program.xla


def test_rows_are_not_compiled(toy):
    toy.xla = True
    toy.weight.assign([3.0, 5.0])
    rows = tf.IndexedSlices(tf.constant([2.0, 4.0]), tf.constant([0, 1]), [2])
    assert programs.has_slices([None, tf.ones(2), rows])
    assert not programs.has_slices([None, tf.ones(2)])
    take = toy.take

    def scattered(grads, *others, **options):
        dense = tf.math.unsorted_segment_sum(grads[0].values, grads[0].indices, 2)
        take([dense], *others, **options)

    toy.take = scattered
    np.testing.assert_allclose(toy.run(rows), [2, 3])
    fewer = tf.IndexedSlices(tf.constant([2.0]), tf.constant([1]))
    np.testing.assert_allclose(toy.run(fewer), [2, 2])
    assert toy.traces == 1
    assert not kept(toy)[0].xla


def test_both_ways_to_call_a_program_agree(toy, monkeypatch):
    inner = toy.run(settings=0)
    (program,) = kept(toy)
    assert program._call_inner([tf.zeros(2), tf.constant(0.5)])
    monkeypatch.setattr(programs._Program, "_call_inner", lambda *_: False)
    toy.weight.assign([1.0, 2.0])
    np.testing.assert_array_equal(toy.run(settings=0), inner)
    assert toy.traces == 1


def test_a_program_runs_where_its_variables_are(toy):
    toy.run()
    (program,) = kept(toy)
    assert program.device == toy.weight.handle.device


def test_settings_are_equal_where_all_attributes_are():
    settings = programs.Settings()
    given = {"rho": 0.9, "name": "a", "layers": [1]}
    assert settings.number(given) == settings.number(dict(given)) == 0
    others = [
        given | {"rho": 0.5},
        given | {"rho": 1},
        given | {"rho": 1.0},  # equal, but no integer
        given | {"rho": True},
        given | {"layers": [1]},  # equal, but another list
        given | {"more": None},
        {"other": 0.9, "name": "a", "layers": given["layers"]},
    ]
    assert [*map(settings.number, others)] == [1, 2, 3, 4, 5, 6, 7]
    assert settings.number(given | {"_self_tracked": object()}) == 0


def test_the_most_settings_and_those_in_use_stay(monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 3)
    settings = programs.Settings()
    given = [0, 1, 2, 0, 3, 2, 0, 1]  # the 3 is one too many, and 1 is the oldest
    numbers = [settings.number({"x": x}) for x in given]
    assert numbers == [0, 1, 2, 0, 3, 2, 0, 4]
    assert settings.number({"x": 3}) == 5


def test_a_dropped_list_does_not_leave_its_number_to_another():
    settings = programs.Settings()
    numbers = {settings.number({"x": [n]}) for n in range(50)}
    assert len(numbers) == 50


def test_what_lives_as_long_as_its_program(toy):
    toy.weight.constraint = keras.constraints.NonNeg()
    toy.run()
    (program,) = kept(toy)
    variables, constraints, rate = program.owners
    assert variables[0] is toy.weight
    assert constraints == [toy.weight.constraint]
    assert rate is None


def test_norms_are_taken_in_parts_that_xla_runs_in_parallel():
    g = tf.random.normal([64, 16], seed=1)
    for given in ((1.0, None), (None, 1.0)):
        function = tf.function(
            lambda g, given=given: backend.clipped_by_norm([g], *given)[0],
            jit_compile=True,
        )
        (norm,) = {x for x in given if x}
        np.testing.assert_allclose(function(g), g / tf.norm(g) * norm, rtol=1e-5)
        graph = function.get_concrete_function(g).graph
        sums = [op for op in graph.get_operations() if op.type == "Sum"]
        assert [op.inputs[0].shape.num_elements() for op in sums] == [64 * 16 // 8]
