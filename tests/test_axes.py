import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close

from keras_rmsprop import RMSprop
from keras_rmsprop.tensorflow import axes

SHORT = (64, 32, 3, 3)


def steps(optimizer, shape, jit_compile):
    rng = np.random.default_rng(0)
    variable = keras.Variable(rng.normal(size=shape).astype("float32"))
    optimizer.build([variable])
    step = tf.function(lambda g: optimizer.apply([g]), jit_compile=jit_compile)
    for _ in range(4):
        step(rng.normal(size=shape).astype("float32"))
    return [variable.numpy(), *(v.numpy() for v in optimizer.variables)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "centered": True, "global_clipnorm": 1.0, "use_ema": True},
        {"weight_decay": 0.1, "skip_nonfinite": True, "clipnorm": 1.0},
        {"gradient_accumulation_steps": 2, "slot_dtype": "bfloat16"},
    ],
)
def test_one_axis_gives_what_many_give(options):
    keras.utils.set_random_seed(0)
    plain = steps(RMSprop(0.01, jit_compile=False, **options), SHORT, False)
    keras.utils.set_random_seed(0)
    short = steps(RMSprop(0.01, **options), SHORT, True)
    # What is rounded at random may fall on the other side of a float32's last digit.
    assert_close(short, plain, 1e-2 if "slot_dtype" in options else 1e-5)


def test_against_the_built_in():
    options = {"momentum": 0.9, "weight_decay": 0.1}
    ours = steps(RMSprop(0.01, **options), SHORT, True)
    built_in = keras.optimizers.RMSprop(0.01, **options)
    assert_close(ours, steps(built_in, SHORT, False), 1e-5)


@pytest.mark.parametrize(
    ("shape", "one_axis"),
    [(SHORT, True), ((20_000, 10), True), ((64, 64, 8, 1), False), ((20_000,), False)],
)
def test_xla_computes_short_axes_as_one(shape, one_axis):
    optimizer = RMSprop()
    optimizer.build([keras.Variable(tf.ones(shape))])
    step = tf.function(lambda g: optimizer.apply([g]), jit_compile=True)
    program = step.experimental_get_compiler_ir(tf.ones(shape))("optimized_hlo")
    flat, as_it_is = (
        f"f32[{','.join(map(str, s))}]" in line
        for s in ([np.prod(shape)], shape)
        for line in [next(x for x in program.splitlines() if " rsqrt(" in x)]
    )
    assert flat is (one_axis or len(shape) == 1)
    assert as_it_is is (not one_axis)
    assert not axes.is_short(shape)  # as this is not under XLA
