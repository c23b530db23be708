import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close

from keras_rmsprop import RMSprop

pytestmark = pytest.mark.tensorflow("XLA programs")

SHORT = (64, 32, 3, 3)


def steps(optimizer):
    rng = np.random.default_rng(0)
    variable = keras.Variable(rng.normal(size=SHORT).astype("float32"))
    optimizer.build([variable])
    for _ in range(4):
        optimizer.apply([tf.constant(rng.normal(size=SHORT), "float32")])
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
    plain = steps(RMSprop(0.01, jit_compile=False, **options))
    keras.utils.set_random_seed(0)
    short = steps(RMSprop(0.01, **options))
    # What is rounded at random may fall on the other side of a float32's last digit.
    assert_close(short, plain, 1e-2 if "slot_dtype" in options else 1e-5)


def test_against_the_built_in():
    options = {"momentum": 0.9, "weight_decay": 0.1}
    ours = steps(RMSprop(0.01, **options))
    built_in = keras.optimizers.RMSprop(0.01, **options)
    assert_close(ours, steps(built_in), 1e-5)


@pytest.mark.parametrize(
    ("shape", "own", "one_axis"),
    [
        (SHORT, True, True),
        ((20_000, 10), True, True),
        (SHORT, False, False),  # beside a backward pass it would be slow
        ((64, 64, 8, 1), True, False),
        ((64, 16, 32), True, False),
        ((20_000,), True, False),
    ],
)
def test_programs_of_their_own_compute_short_axes_as_one(shape, own, one_axis):
    optimizer, variable = RMSprop(), keras.Variable(tf.ones(shape))
    optimizer.build([variable])

    @tf.function(jit_compile=True)
    def step(g):
        optimizer._take([g], [variable], optimizer.learning_rate, own)

    program = step.experimental_get_compiler_ir(tf.ones(shape))("optimized_hlo")
    root = next(line for line in program.splitlines() if " rsqrt(" in line)
    used = [np.prod(shape)] if one_axis else shape
    assert f"f32[{','.join(map(str, used))}]" in root
