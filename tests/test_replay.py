"""Short programs, run operation by operation, beside the functions that they are."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close, train

from keras_rmsprop import RMSprop
from keras_rmsprop.backends import programs
from keras_rmsprop.backends.replay import MOST_OPERATIONS, replayed
from keras_rmsprop.kernel import tensorflow as kernel

pytestmark = pytest.mark.tensorflow("programs of eager steps")

needs_kernel = pytest.mark.skipif(not kernel.ops(), reason=kernel.why_not())


def traced(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return tf.function(function, autograph=False).get_concrete_function(*specs)


@pytest.fixture
def variable():
    return tf.Variable([1.0, 2.0])


def test_does_what_the_function_does(variable):
    def body(x, y):
        total = tf.add_n([x, y, variable * (tf.constant(2.0) + 1)])
        variable.assign_sub(tf.negative(total))

    concrete = traced(body, [2], [2])
    run = replayed(concrete)
    given = [tf.constant([1.0, -1.0]), tf.constant([0.5, 0.25])]
    concrete(*given)
    expected = variable.numpy()
    variable.assign([1.0, 2.0])
    run(given)
    np.testing.assert_array_equal(variable.numpy(), expected)


def test_only_one_operation_may_write(variable):
    """Else Ctrl-C between two of them would leave half a step."""
    count = tf.Variable(0)

    def body(x):
        variable.assign_sub(x)
        count.assign_add(1)

    assert replayed(traced(body, [2])) is None


def test_constants_are_computed_once(variable):
    def body(x):
        # 20 operations on constants are none.
        scale = tf.constant(1.0)
        for _ in range(20):
            scale = scale + 1.0
        variable.assign_add(scale * x)

    run = replayed(traced(body, [2]))
    assert len(run._operations) == 2
    run([tf.constant([1.0, 2.0])])
    np.testing.assert_array_equal(variable.numpy(), [22.0, 44.0])


def many(x):
    for _ in range(MOST_OPERATIONS + 1):
        x = x + 1.0


@pytest.mark.parametrize(
    "body",
    [
        many,
        lambda x: tf.cond(x[0] > 0, lambda: x, lambda: -x),
        lambda x: tf.split(x, 2),
        lambda x: tf.stack([x, tf.ones(2)]),
    ],
    ids=["many", "a branch", "two results", "known and unknown ones in a list"],
)
def test_others_stay_functions(body):
    assert replayed(traced(body, [2])) is None


def test_what_nobody_can_call_alone_stays_a_function(variable, monkeypatch):
    def body(x):
        variable.assign(x)

    monkeypatch.delattr(tf.raw_ops, "AssignVariableOp")
    assert replayed(traced(body, [2])) is None


OPTIONS = {
    "plain": {},
    "all slots": {"momentum": 0.9, "centered": True, "nesterov": True},
    "cautious": {"momentum": 0.9, "cautious": True},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "bias correction": {"bias_correction": True},
    "EMA": {"use_ema": True},
    "EMA, overwriting": {
        "use_ema": True,
        "ema_warmup": True,
        "ema_overwrite_frequency": 3,
    },
    "clipping": {"global_clipnorm": 1.0},
    "bfloat16": {"slot_dtype": "bfloat16"},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    },
    "callable": {"learning_rate": lambda: 0.01},
    "auto": {"learning_rate": "auto"},
    "auto, bfloat16": {"learning_rate": "auto", "slot_dtype": "bfloat16"},
}


@pytest.fixture
def functions(monkeypatch):
    """The calls of programs as functions."""
    calls, call = [], programs._Program._call_inner
    monkeypatch.setattr(
        programs._Program,
        "_call_inner",
        lambda *given: calls.append(given) or call(*given),
    )
    return calls


@pytest.mark.one_in(3)
@needs_kernel
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_the_same_to_the_last_bit(name, monkeypatch):
    found = train(RMSprop(**OPTIONS[name]))
    monkeypatch.setattr(programs, "replayed", lambda _: None)
    keras.utils.set_random_seed(0)
    assert_close(train(RMSprop(**OPTIONS[name])), found, 0)


@needs_kernel
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "all slots", "cautious", "L2", "schedule", "bias correction"),
        *("EMA", "auto", "auto, bfloat16"),
    ],
)
def test_a_step_of_the_kernel_is_short(name, functions):
    train(RMSprop(**OPTIONS[name]), steps=3)
    assert not functions


def test_what_xla_compiles_is_none(functions):
    train(RMSprop(jit_compile=True), steps=3)
    assert len(functions) == 3


@needs_kernel
def test_within_a_tape():
    variable, x = keras.Variable([1.0, 2.0]), tf.constant([3.0, 4.0])
    optimizer = RMSprop(0.1)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x * variable.value**2)
        [gradient] = tape.gradient(loss, [variable.value])
        optimizer.apply([gradient], [variable])
        after = tf.reduce_sum(x * variable.value)
    np.testing.assert_allclose(outer.gradient(after, x), variable.numpy())
    with tf.autodiff.ForwardAccumulator(x, tf.ones(2)) as forward:
        optimizer.apply([2 * x], [variable])
        after = tf.reduce_sum(x * variable.value)
    np.testing.assert_allclose(forward.jvp(after), sum(variable.numpy()), rtol=1e-6)
