"""When a search for a learning rate begins again, and when it does not.

The oracle is a new optimizer which takes over the slots: its search begins from the
weights as they are, and it knows nothing of a past.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    JIT,
    assert_same_bits,
    dense_model,
    numbers,
    save,
    table_model,
    user_warnings,
)
from stepping import BACKEND, python, tensor

from keras_rmsprop import AutoLearningRate, RMSprop
from keras_rmsprop.callbacks import AverageForEvaluation

EMA = {"use_ema": True, "ema_momentum": 0.9}


def data(model, batch=48):
    if model.input_shape[1:] == (4,):  # a table's
        rng = np.random.default_rng(0)
        return rng.integers(0, 12, (batch, 4)), rng.normal(size=(batch, 1))
    return numbers(model, batch)


def fit(model, epochs=2, **options):
    options = {"batch_size": 8, "verbose": 0, "shuffle": False} | options
    return model.fit(*data(model), epochs=epochs, **options).history["loss"]


def steps_of(model):
    return model.optimizer._search.known().steps


def compile_again(model, loss="mse", optimizer=None):
    model.compile(optimizer or model.optimizer, loss, jit_compile=JIT)
    if JIT:
        model.optimizer.build(model.trainable_variables)  # `fit` does not on JAX


def freeze(model, frozen=True):
    model.layers[0].trainable = not frozen
    compile_again(model)


def replace(model):
    model.set_weights([w + 0.5 for w in model.get_weights()])


CHANGES = {
    "unfrozen": lambda model: freeze(model, False),
    "frozen": freeze,
    "compiled": lambda model: compile_again(model, "mae"),
    "replaced": replace,
}


PLAIN = {"momentum": 0.0, "use_ema": False}
"""Without what "auto" does besides: `set_state` would pass on old steps."""


def changed(make, change, **options):
    """Return a model that was trained and then changed, which is to be trained on."""
    model = make(RMSprop("auto", **PLAIN | options))
    if change == "unfrozen":
        freeze(model)
    fit(model)
    CHANGES[change](model)
    return model


@pytest.mark.slow
@pytest.mark.one_in(40)
@pytest.mark.parametrize("options", [{}, EMA, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("make", [dense_model, table_model])
@pytest.mark.parametrize("change", CHANGES)
def test_it_goes_on_as_a_new_optimizer_with_these_slots(make, change, options):
    if JIT and change == "frozen":
        pytest.skip("on JAX `fit` trains the layers that the optimizer was built with")
    model = changed(make, change, **options)
    twin = make(RMSprop("auto", **PLAIN | options))
    twin.set_weights(model.get_weights())
    new = twin.optimizer
    new.build(twin.trainable_variables)
    if change != "unfrozen":  # else there are slots of the head alone
        new.set_state(model.optimizer.get_state())
    else:
        old, state = model.optimizer.get_state(), new.get_state()
        names = [[p.partition("/")[2] for p in one.paths] for one in (old, state)]
        slots = dict(zip(names[0], old.slots, strict=True))
        assert len(slots) >= 2
        known = [slots.get(n, s) for n, s in zip(names[1], state.slots, strict=True)]
        steps = int(model.optimizer.iterations)
        new.set_state(state._replace(iterations=steps, slots=known))
    twin.layers[0].trainable = model.layers[0].trainable
    compile_again(twin, "mae" if change == "compiled" else "mse")
    np.testing.assert_allclose(fit(model), fit(twin), rtol=1e-3)
    known, new = model.optimizer._search.known(), twin.optimizer._search.known()
    assert known.steps == 12
    assert known.distance == pytest.approx(new.distance, rel=0.05)
    for a, b in zip(model.weights, twin.weights, strict=True):
        if not options.get("use_ema"):  # else the averages are of other pasts
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=5e-4)


@pytest.mark.slow
def test_old_steps_in_a_momentum_buffer_do_not_go_on():
    model = dense_model(RMSprop("auto", momentum=0.9))
    fit(model, epochs=20)
    compile_again(model, lambda y, p: 0.0 * keras.losses.mean_squared_error(y, p))
    before = model.get_weights()
    assert np.abs(model.optimizer._momentums[0].numpy()).max() > 1e-3
    fit(model, epochs=1)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.9, pytest.param(0.0, marks=pytest.mark.rest)])
def test_unfreezing_is_no_worse_than_beginning_anew(momentum):
    losses = []
    for new in True, False:
        model = dense_model(RMSprop("auto", momentum=momentum), units=(30, 3))
        x = np.random.default_rng(0).normal(size=(480, 3))
        y = np.sin(3 * x)
        freeze(model)
        model.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False)
        model.layers[0].trainable = True
        other = RMSprop("auto", momentum=momentum) if new else None
        compile_again(model, optimizer=other)
        history = model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        losses.append(history.history["loss"][0])
    assert losses[1] < 1.1 * losses[0]


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, EMA], ids=str)
def test_a_second_fit_goes_on(options):
    model = dense_model(RMSprop("auto", **options))
    fit(model)
    fit(model)
    fit(model, epochs=6, initial_epoch=4)
    fit(model, batch_size=4)  # traced anew
    model.evaluate(*data(model), verbose=0)
    _ = model.optimizer.variables
    fit(model, epochs=1)
    assert steps_of(model) == 12 + 12 + 12 + 24 + 6


@pytest.mark.slow
@pytest.mark.one_in(13)
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("options", [{}, EMA, {"momentum": 0.9}], ids=str)
def test_a_run_that_is_resumed_equals_one_that_never_stopped(tmp_path, options, suffix):
    model = dense_model(RMSprop("auto", **options))
    fit(model)
    path = tmp_path / f"model{suffix}"
    save(model, path)
    if suffix == ".keras":
        again = keras.models.load_model(path)
    else:
        again = dense_model(RMSprop("auto", **options))
        again.load_weights(path)
    for one in (model, again):
        fit(one)
        assert steps_of(one) == 24
    assert_same_bits(again, model)
    for one in (model, again):
        CHANGES["replaced"](one)
        fit(one)
        assert steps_of(one) == 12
    assert_same_bits(again, model)


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("change", ["compiled", "replaced"])
def test_a_restart_that_is_yet_to_come_is_saved(tmp_path, change):
    model = changed(dense_model, change, momentum=0.5)
    _ = model.optimizer.variables
    save(model, tmp_path / "model.weights.h5")
    again = dense_model(RMSprop("auto", **PLAIN | {"momentum": 0.5}))
    compile_again(again, "mae" if change == "compiled" else "mse")
    again.load_weights(tmp_path / "model.weights.h5")
    for one in (model, again):
        fit(one)
        assert steps_of(one) == 12
    assert_same_bits(again, model)


@pytest.mark.slow
def test_a_callback_that_shows_averages_restarts_nothing():
    model = dense_model(RMSprop("auto", **EMA))
    fit(model, epochs=3, callbacks=[AverageForEvaluation()], validation_split=0.5)
    fit(model, epochs=3, callbacks=[AverageForEvaluation()], validation_split=0.5)
    assert steps_of(model) == 6 * 3


@pytest.mark.slow
def test_it_can_be_prevented():
    for change in CHANGES:
        model = dense_model(RMSprop(AutoLearningRate(restarts=False)))
        if change == "unfrozen":
            freeze(model)
        fit(model)
        if not (JIT and change == "frozen"):
            CHANGES[change](model)
            fit(model)
            assert steps_of(model) == 24, change
    with pytest.raises(TypeError, match="`restarts` must be True or False"):
        AutoLearningRate(restarts="no")


def test_a_loop_of_ones_own():
    """Steps over parts go on; layers that are frozen, or unfrozen, begin again."""
    a, b = (keras.Variable(np.ones(3), dtype="float32") for _ in "ab")
    optimizer = RMSprop("auto")
    optimizer.build([a, b])

    def take(variables, steps):
        for _ in range(steps):
            optimizer.apply([tensor(v.numpy() - 3) for v in variables], variables)

    take([a, b], 5)
    for _ in range(3):
        take([a], 1)
        take([b], 1)
    assert optimizer._search.known().steps == 11
    a.trainable = False
    take([b], 5)
    assert optimizer._search.known().steps == 5
    a.trainable = True
    take([a, b], 4)
    assert optimizer._search.known().steps == 4
    np.testing.assert_array_less(np.abs(optimizer._search.firsts[0].numpy() - 1), 1)
    take([a, b, keras.Variable(np.ones(2))], 1)
    assert optimizer._search.known().steps == 1


@pytest.mark.one_in(3)
@pytest.mark.tensorflow("`tf.function`")
@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_a_graph_begins_again_in_its_next_step(jit):
    table = keras.Variable(np.ones((12, 2)), dtype="float32", name="table")
    optimizer = RMSprop("auto")
    optimizer.build([table])
    ids = tf.constant([1, 2, 5])
    target = 3.0

    def apply():
        rows = tf.gather(table.value, ids) - target
        optimizer.apply([tf.IndexedSlices(rows, ids)], [table])

    graph = tf.function(apply, jit_compile=jit)
    for _ in range(20):
        graph()
    assert optimizer._search.known().distance > 1e-4
    optimizer._search.restart()
    before = table.numpy()
    graph()
    known = optimizer._search.known()
    assert (known.steps, known.distance) == (1, np.float32(1e-5))
    np.testing.assert_array_equal(optimizer._search.firsts[0].numpy(), before)
    assert np.abs(table.numpy() - before).max() < 1e-4
    # A new search, which has seen one gradient only.
    sums = optimizer._search.sums[0].numpy()
    assert set(np.flatnonzero(sums[:, 0])) == {1, 2, 5}
    assert np.abs(sums).max() < 1e-3


@pytest.mark.slow
def test_accumulated_steps_begin_again():
    model = dense_model(RMSprop("auto", gradient_accumulation_steps=2))
    fit(model)
    compile_again(model)
    fit(model)
    assert steps_of(model) == 6


@pytest.mark.slow
@pytest.mark.tensorflow("`tf.GradientTape`")
def test_inside_a_loss_scale_optimizer():
    inner = RMSprop("auto")
    model = dense_model(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0))
    fit(model)
    fit(model)
    assert inner._search.known().steps == 24
    compile_again(model)
    fit(model)
    assert inner._search.known().steps == 12


@pytest.mark.rest
@pytest.mark.slow
def test_it_is_silent():
    with user_warnings() as caught:
        for change in CHANGES if not JIT else ("compiled", "replaced"):
            fit(changed(dense_model, change))
    assert not caught


@pytest.mark.skipif(BACKEND == "torch", reason="there, steps are eager")
def test_after_an_interruption_compile_restarts_it():
    model = dense_model(RMSprop("auto"))
    fit(model)

    def stop(batch, logs):
        raise KeyboardInterrupt

    stopper = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[stopper])
    assert steps_of(model) > 6
    compile_again(model)
    fit(model)
    assert steps_of(model) == 12


@pytest.mark.rest
@pytest.mark.tensorflow("`tf.distribute`")
def test_two_replicas_begin_again():
    out = python(
        """
        import keras, numpy as np, tensorflow as tf
        from keras_rmsprop import RMSprop
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 2,
        )
        x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = keras.Sequential([
                keras.Input((3,)), keras.layers.Dense(5), keras.layers.Dense(3)])
            optimizer = RMSprop("auto", momentum=0.5)
            steps = []
            for frozen, loss in (True, "mse"), (False, "mse"), (False, "mae"):
                model.layers[0].trainable = not frozen
                model.compile(optimizer, loss, jit_compile=False)
                for _ in range(2):
                    model.fit(x, x, batch_size=16, verbose=0)
                steps.append(optimizer._search.known().steps)
            model.set_weights([w + 0.5 for w in model.get_weights()])
            model.fit(x, x, batch_size=16, verbose=0)
            steps.append(optimizer._search.known().steps)
        print(steps)
        """
    )
    assert out.splitlines()[-1] == "[8.0, 8.0, 8.0, 4.0]"
