"""Long runs, many threads, extreme numbers: nothing is disturbed, lost or infinite."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import LOOP, WAYS, arrays, assert_close, python, tensor
from test_programs import Counting

from keras_rmsprop import RMSprop

BUILT_IN = keras.optimizers.RMSprop


@pytest.mark.tensorflow("programs of eager steps, and its threads")
class TestThreads:
    """Each loop has an optimizer of its own, or its turn."""

    def loop(self, seed, steps=60):
        """Return a function that trains a table and a kernel, and what it trains."""
        table, kernel = (
            keras.Variable(a) for a in arrays([(20, 3), (3, 2)], seed=seed)
        )
        optimizer = RMSprop(0.01 * seed, centered=True)

        def run():
            rng = np.random.default_rng(seed)
            for n in range(steps):
                ids = tensor(rng.integers(0, 20, 1 + n % 5))
                with tf.GradientTape() as tape:
                    rows = tf.gather(table.value, ids)
                    loss = tf.reduce_sum((rows @ kernel.value - 1) ** 2)
                variables = [table, kernel]
                gradients = tape.gradient(loss, [v.value for v in variables])
                assert isinstance(gradients[0], tf.IndexedSlices)
                if n % 20 == 19:
                    optimizer.learning_rate = 0.01 * seed / n
                    optimizer.clipnorm = float(n)  # traces again, while others run
                optimizer.apply(gradients, variables)

        return run, lambda: [v.numpy() for v in [table, kernel, *optimizer.variables]]

    def fit(self, seed):
        """Return the same for `fit`."""
        keras.utils.set_random_seed(seed)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)]
        )
        model.compile(RMSprop(0.01, momentum=0.5 + 0.1 * seed), "mse")
        x = arrays([(64, 4)], seed=seed)[0]
        return (
            lambda: model.fit(x, x[:, :1], 16, 5, shuffle=False, verbose=0),
            lambda: [v.numpy() for v in model.variables + model.optimizer.variables],
        )

    @pytest.mark.slow
    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("kind", ["loop", "fit"])
    def test_optimizers_in_threads_do_not_disturb_each_other(self, kind):
        make, failed = getattr(self, kind), []
        alone = []
        for seed in (1, 2):
            run, result = make(seed)
            run()
            alone.append(result())

        def caught(run):
            try:
                barrier.wait()
                run()
            except BaseException as error:  # pytest does not see those of a thread
                failed.append(error)

        together = [make(seed) for seed in (1, 2)]
        barrier = threading.Barrier(len(together))
        threads = [threading.Thread(target=caught, args=(r,)) for r, _ in together]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for (_, result), expected in zip(together, alone, strict=True):
            assert_close(result(), expected, 1e-6)

    def test_two_loops_in_turn_are_one_trace_each(self):
        a, b = keras.Variable([1.0]), keras.Variable([1.0, 2.0])
        optimizer = Counting()
        optimizer.build([a, b])
        body = tf.function(lambda g: optimizer.apply([g], [b]))
        for _ in range(10):
            optimizer.apply([tensor([1.0])], [a])
            body(tensor([1.0, 1.0]))
        assert optimizer.traces == 2
        assert optimizer.iterations.numpy() == 20


@pytest.mark.rest
@pytest.mark.tensorflow("programs of eager steps")
def test_memory_is_flat():
    # Numbers are those after a warm-up, then what was added. In a process of its own.
    program = """
        import gc, itertools, os, warnings
        import keras, numpy as np, tensorflow as tf
        from keras_rmsprop import RMSprop
        from keras_rmsprop.backends import programs

        warnings.simplefilter("ignore")
        programs.MOST_PROGRAMS = 8

        def used():
            gc.collect()
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(gc.get_objects())

        table, bias = keras.Variable(np.ones((99, 4))), keras.Variable([1.0])
        optimizer = RMSprop()
        optimizer.build([table, bias])

        def steps(n):
            for i in range(n):
                k = i % 50
                slices = tf.IndexedSlices(tf.ones((k, 4)), tf.range(k))
                optimizer.apply([None if k % 5 else slices, tf.ones(1)])

        numbers = itertools.count()

        def retraces(n):
            for i in itertools.islice(numbers, n):
                optimizer.clipnorm = 1.0 + i
                sparse = tf.IndexedSlices(tf.ones((i % 9, 4)), tf.range(i % 9))
                dense = tf.ones((99, 4))
                optimizer.apply([
                    [sparse, tf.ones(1)], [dense, None], [None, tf.ones(1)]
                ][i % 3])

        for work, first, n in (steps, 2_000, 20_000), (retraces, 40, 200):
            work(first)
            before = used()
            for _ in range(5):
                work(n // 5)
                after = used()  # and no heap of garbage between
            print(after[0] - before[0], after[1] - before[1])
    """
    added = [[float(n) for n in line.split()] for line in python(program).splitlines()]
    for megabytes, objects in added:
        assert megabytes < 32
        assert objects < 1000  # a trace that is kept is some 400


@pytest.mark.rest
@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.tensorflow("XLA for both, or roundings differ")
@pytest.mark.parametrize("rho", [0.9, 0.99, 0.999])
def test_centered_stays_finite(rho):
    # All cases side by side in one variable: gradients of a size, with noise.
    size, noise = np.meshgrid([1e-3, 1.0, 1e4], [0, 1e-6, 1e-5, 1e-4, 1e-3, 1.0])
    stream = np.random.default_rng(0).normal(size=(10_000, *size.shape))
    stream = (size * (1 + noise * stream)).astype("float32")
    variables = [
        keras.Variable(np.zeros(size.shape), dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    twin = keras.Variable(np.zeros(size.shape), dtype="float32")
    # Both under XLA: near v = a^2 nothing is left but how each operation rounds.
    optimizer = RMSprop(rho=rho, centered=True, jit_compile=True)
    built_in = BUILT_IN(rho=rho, centered=True)
    optimizer.build(variables)
    built_in.build([twin])
    step = tf.function(lambda g: built_in.apply([g]), jit_compile=True)
    for gradient in stream:
        g = tensor(gradient)
        optimizer.apply([g, tf.cast(g, "bfloat16")])
        step(g)
    for v in variables + optimizer.variables:
        assert np.isfinite(v.numpy().astype("float32")).all()  # no NaN ever goes away
    healthy = np.isfinite(twin.numpy())
    assert healthy.all() == (rho == 0.999)  # else this would prove nothing
    assert healthy[noise == 1.0].all()
    np.testing.assert_allclose(
        variables[0].numpy()[healthy], twin.numpy()[healthy], rtol=1e-5
    )


class TestExtremes:
    @pytest.mark.one_in(3)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize(
        ("options", "way"),
        [
            *(({"momentum": 0.5, "bias_correction": True}, way) for way in WAYS),
            ({"clipnorm": 1.0}, "eager"),
        ],
    )
    def test_finite_gradients_give_finite_weights_and_slots(self, dtype, options, way):
        tiny, largest = tf.as_dtype(dtype).as_numpy_dtype(0), tf.as_dtype(dtype).max
        tiny = float(np.nextafter(tiny, tiny + 1))  # denormal
        sizes = np.array([0.0, tiny, 2.0**8 * tiny, 1.0, float(largest)])
        optimizer = RMSprop(0.1, **options)
        variable = keras.Variable(np.ones(2 * len(sizes)), dtype=dtype)
        optimizer.build([variable])
        apply = WAYS[way](optimizer)
        for sign in (1, 1, -1, 1, 0, 1):
            apply([tensor(sign * np.concatenate([sizes, -sizes]), dtype)])
        for v in [variable, *optimizer.variables]:
            assert np.isfinite(v.numpy().astype("float64")).all()

    @pytest.mark.one_in(4)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_the_largest_gradients_do_not_freeze_their_weights(self, dtype):
        # Their squares overflow float32, and infinite averages would stay for good.
        largest = float(tf.as_dtype(dtype).max)
        variable = keras.Variable([1.0, 1.0], dtype=dtype)
        optimizer = RMSprop(0.01)
        for _ in range(3):
            optimizer.apply([tensor([largest, -largest], dtype)], [variable])
        assert np.isfinite(variable.numpy().astype(float)).all()
        for _ in range(2000):  # averages shrink again, and steps grow
            optimizer.apply([tensor([1.0, 1.0], dtype)])
        v = optimizer.get_state().slots[0].velocity
        np.testing.assert_allclose(v, 1.0, rtol=1e-3)

    @pytest.mark.parametrize(
        ("options", "dtype", "way"),
        [
            ({"clipnorm": 1.0}, "float16", "eager"),
            ({"global_clipnorm": 1.0}, "float16", "eager"),
            ({"global_clipnorm": 1.0}, "bfloat16", "tf.function"),
            ({"loss_scale_factor": 1024.0}, "float16", "eager"),
            (
                {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
                "float16",
                "tf.function",
            ),
        ],
    )
    def test_low_precision_gradients_are_treated_in_float32(self, options, dtype, way):
        # The norm of 100 times 60 squared overflows float16 (in the built-in: NaN, or
        # no step at all). What was scaled up against underflow underflows.
        size = 2e-3 if "loss_scale_factor" in options else 60.0
        weights = {}
        for kind in (dtype, "float32"):
            variable = keras.Variable(np.ones(100), dtype=kind)
            optimizer = RMSprop(0.1, epsilon=1e-12, **options)
            optimizer.build([variable])
            apply = WAYS[way](optimizer)
            for n in range(4):
                g = keras.ops.cast(tensor(size * (1 + np.arange(100) % 7), dtype), kind)
                apply([g / tensor(1 + n, kind)])
            v = optimizer.get_state().slots[0].velocity
            weights[kind] = variable.numpy().astype("float32")
            weights[kind, "v"] = v
        assert_close([weights[dtype]], [weights["float32"]], 2e-2)
        assert_close([weights[dtype, "v"]], [weights["float32", "v"]], 2e-2)

    def test_many_small_gradients_accumulate_in_bfloat16(self):
        # In plain bfloat16 the sum stops at 256, the mean of 1000 ones at 0.256.
        variable = keras.Variable([1.0], dtype="bfloat16")
        optimizer = RMSprop(rho=0.0, gradient_accumulation_steps=1000)
        optimizer.build([variable])
        apply = LOOP(optimizer)
        for _ in range(1000):
            apply([tensor([1.0], "bfloat16")])
        v = optimizer.get_state().slots[0].velocity
        np.testing.assert_allclose(v, [1.0], rtol=1e-5)

    def test_loss_scaling_of_a_float16_variable(self):
        weights = []
        for kind in (RMSprop, BUILT_IN):
            optimizer = keras.optimizers.LossScaleOptimizer(
                kind(0.1), initial_scale=1024.0, dynamic_growth_steps=2
            )
            variable = keras.Variable([1.0, 2.0], dtype="float16")
            optimizer.build([variable])
            apply = LOOP(optimizer)
            for g in [[4.0, 8.0], [np.inf, 1.0], [2.0, -2.0], [0.0, 65504.0]]:
                apply([tensor(g, "float16")])
            weights.append([variable.numpy(), optimizer.dynamic_scale.numpy()])
        assert_close(*weights, 5e-3)  # the built-in's slots are float16
