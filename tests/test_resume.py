"""Runs that are killed or stopped, and started again, end with the same bits."""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import runpy
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import JIT
from tensorflow.python.eager import context

from keras_rmsprop import RMSprop

EXAMPLE = Path(__file__).parent.parent / "examples" / "resume.py"
sys.path.insert(0, str(EXAMPLE.parent))

SAVES, STEPS, KILLS = 30, 2, 5
"""Saves of a run, steps from save to save, and kills that a run has to survive."""

# Each life of a run is forked from a process that has imported TensorFlow: a process of
# its own would need 6 s for that. It is sound, as TensorFlow starts threads with its
# first op, and importing runs none; `live` checks that. The threads that there are
# belong to OpenBLAS and jemalloc, which take care of forks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tensorflow", "keras", "keras_rmsprop"])


def compiled(layers, options):
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1)])
    model.compile(RMSprop(0.01, **options), "mse", jit_compile=JIT)
    return model


def dense(**options):
    layers = [keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization()]
    return compiled(layers, options)


def tokens(**options):
    layers = [keras.layers.Embedding(50, 4), keras.layers.GlobalAveragePooling1D()]
    return compiled(layers, options)


def batches(first, nan_every=None):
    for n in itertools.count(first):
        rng = np.random.default_rng(n)
        x = np.minimum(rng.zipf(1.3, (16, 6)) - 1.0, 49)
        y = (x == 3).sum(axis=1, keepdims=True).astype("float32")
        yield x, y * np.nan if nan_every and n % nan_every == 1 else y


def run(directory, model, *, fit=False, nan_every=None):
    train = runpy.run_path(str(EXAMPLE))["train"]
    data = functools.partial(batches, nan_every=nan_every)
    train(model, data, directory, saves=SAVES, steps=STEPS, fit=fit)
    return model


def run_example(directory, *options):
    main = runpy.run_path(str(EXAMPLE))["main"]
    sizes = f"--saves={SAVES}", f"--steps={STEPS}"
    return main([f"--directory={directory}", *sizes, *options])


MOMENTS = {"momentum": 0.9, "centered": True, "use_ema": True}

RUNS = {
    "dense": lambda path: run(path, dense()),
    "embedding": lambda path: run(path, tokens()),
    "moments": lambda path: run(
        path, dense(**MOMENTS, ema_overwrite_frequency=7), fit=True
    ),
    "accumulation": lambda path: run(path, dense(gradient_accumulation_steps=4)),
    "skip_nonfinite": lambda path: run(path, dense(skip_nonfinite=True), nan_every=5),
    "example": lambda path: run_example(path, "--fit"),
}


def state(model):
    """Return all that training changes."""
    found = {}
    model.optimizer.save_own_variables(found)
    return found | {f"model_{n}": v.numpy() for n, v in enumerate(model.variables)}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        assert np.isfinite(expected[key]).all()
        assert got[key].tobytes() == expected[key].tobytes(), key


def live(name, directory, times):
    """Train to the end, as a process; send when a save begins and when it is done."""
    assert context._context is None, "TensorFlow was running before the fork"
    sys.stdout = sys.stderr = (directory / "log").open("a", buffering=1)
    save = tf.train.CheckpointManager.save

    def watched(manager):
        times.send(time.monotonic())
        save(manager)
        times.send(time.monotonic())

    tf.train.CheckpointManager.save = watched
    keras.utils.set_random_seed(0)
    np.savez(directory / "end.npz", **state(RUNS[name](directory)))


def life(name, directory, rng=None, *, in_a_save=False):
    """Start a run, and kill it at a random moment if there is a generator.

    It has saved once by then, or a run might never end. Return what it was doing:
    "saving", "training", or "ended".
    """
    directory.mkdir(exist_ok=True)
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=live, args=(name, directory, sender))
    process.start()
    sender.close()
    wanted, times = rng and 2 * rng.integers(1, 5) + 1, []
    with contextlib.suppress(EOFError):
        while receiver.poll(120):
            times.append(receiver.recv())
            if len(times) == wanted:
                # A save has begun. Wait for less than one took, or one and the steps.
                span = times[-2 if in_a_save else -1] - times[-3]
                time.sleep(rng.uniform() * span)
                process.kill()
        process.kill()
        pytest.fail("It hangs.")
    process.join()
    if process.exitcode == 0:
        return "ended"
    killed = wanted and process.exitcode == -signal.SIGKILL
    assert killed, (directory / "log").read_text()[-3000:]
    return "saving" if len(times) % 2 else "training"


@pytest.mark.slow
@pytest.mark.one_in(4)
@pytest.mark.tensorflow("`tf.train.CheckpointManager`")
@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_with_the_same_bits(name, tmp_path):
    killed, alone = tmp_path / "killed", tmp_path / "left alone"
    rng = np.random.default_rng(list(name.encode()))
    ends = collections.Counter()
    while ends.total() < KILLS or not ends["saving"]:
        ends[life(name, killed, rng, in_a_save=ends.total() % 2 == 0)] += 1
        assert not ends["ended"]
    print(name, "was killed:", dict(ends))
    for directory in (killed, killed, alone):  # from the end, too
        assert life(name, directory) == "ended"
    log = (killed / "log").read_text()
    assert log.count("Started after 0 of") == 1
    assert log.count("Resumed after") == ends.total() + 1
    with np.load(killed / "end.npz") as got, np.load(alone / "end.npz") as want:
        assert_same_bits(got, want)


def made(make):
    keras.utils.clear_session(free_memory=False)  # for the same names
    keras.utils.set_random_seed(0)
    return make()


def fit(model, **options):
    x, y = map(np.concatenate, zip(*itertools.islice(batches(0), 3), strict=True))
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, **options)


def from_a_backup(make, path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            if (self.epoch, batch) == (2, 1):
                raise KeyboardInterrupt

    backup = functools.partial(keras.callbacks.BackupAndRestore, path)
    with pytest.raises(KeyboardInterrupt):
        fit(made(make), epochs=4, callbacks=[backup(), Stop()])
    model, undisturbed = made(make), made(make)
    fit(model, epochs=4, callbacks=[backup()])
    other = keras.callbacks.BackupAndRestore(path / "other")
    fit(undisturbed, epochs=4, callbacks=[other])
    return model, undisturbed


def from_weights(make, path):
    path = path / "m.weights.h5"
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    undisturbed = made(make)
    fit(undisturbed, epochs=2, callbacks=[save])
    model = made(make)
    model.load_weights(path)
    for each in (model, undisturbed):
        fit(each, epochs=4, initial_epoch=2)
    return model, undisturbed


def from_a_keras_file(make, path):
    path = path / "m.keras"
    undisturbed = made(make)
    fit(undisturbed, epochs=2, callbacks=[keras.callbacks.ModelCheckpoint(path)])
    model = keras.models.load_model(path)
    for each in (model, undisturbed):
        fit(each, epochs=4, initial_epoch=2)
    return model, undisturbed


@pytest.mark.one_in(20)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(tokens, id="embedding"),
        pytest.param(
            functools.partial(dense, **MOMENTS, gradient_accumulation_steps=4),
            id="moments and accumulation",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("resumed", [from_a_backup, from_weights, from_a_keras_file])
def test_stopped_runs_end_with_the_same_bits(make, resumed, tmp_path):
    # Saving brings the rows of tables up to date, which rounds: the undisturbed run
    # saves as well.
    model, undisturbed = resumed(make, tmp_path)
    assert_same_bits(state(model), state(undisturbed))
