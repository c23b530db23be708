"""Under `tf.distribute` a run is that of one process with the whole batch."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed_run import EXAMPLE, RUNS

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow("`tf.distribute`")]

PROGRAM = Path(__file__).parent / "distributed_run.py"


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


FEW = "dense, everything", "table, everything", "skipped"


@pytest.mark.parametrize(
    "runs", [FEW, pytest.param(tuple(RUNS), marks=pytest.mark.rest)], ids=["few", "all"]
)
def test_equals_one_process(runs, tmp_path):
    # In one test, as all is compared with the same run.
    both = "one", "mirrored"
    finish(*(start(name, tmp_path / f"{name}.npz", *runs) for name in both))
    environments = runpy.run_path(str(EXAMPLE))["cluster"](2)
    finish(
        *(
            start(
                "workers",
                tmp_path / f"{n}.npz",
                *runs,
                TF_CONFIG=environment["TF_CONFIG"],
            )
            for n, environment in enumerate(environments)
        )
    )
    expected = np.load(tmp_path / "one.npz")
    assert {key.rsplit(",", 1)[0] for key in expected} == set(runs)
    for name in ("mirrored", "0", "1"):
        got = np.load(tmp_path / f"{name}.npz")
        assert got.keys() == expected.keys()
        for key, x in expected.items():
            assert np.isfinite(x).all()
            np.testing.assert_allclose(
                got[key], x, rtol=1e-6, atol=1e-6, err_msg=f"{name}, {key}"
            )
    for key, x in np.load(tmp_path / "0.npz").items():
        np.testing.assert_array_equal(np.load(tmp_path / "1.npz")[key], x)
    assert 2 in [x for key, x in expected.items() if "skip" in key and x.ndim == 0]


EAGER = """
import keras, numpy as np, tensorflow as tf
from keras_rmsprop import RMSprop

cpu, = tf.config.list_physical_devices("CPU")
two = 2 * [tf.config.LogicalDeviceConfiguration()]
tf.config.set_logical_device_configuration(cpu, two)
strategy = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())

def trained(rate, scale, scope, run, **options):
    with scope:
        table = keras.Variable(tf.ones((9, 2)), name="embeddings")
        optimizer = RMSprop(rate, use_ema=True, ema_momentum=0.9, **options)
        optimizer.build([table])

    def step(row):
        gradient = scale * tf.ones((9, 2))
        if row is not None:
            gradient = tf.IndexedSlices(gradient[:1], tf.constant([row]), [9, 2])
        optimizer.apply([gradient], [table])

    for row in 0, 1, 0, None, 1:
        run(step, [row])
    average, = (v for v in optimizer.variables if v.path.endswith("average"))
    return [getattr(v.value, "values", [v.value]) for v in (average, table)]

for rate in 0.05, "auto":
    for options in {}, {"ema_overwrite_frequency": 4}:
        one = trained(rate, 2.0, tf.device("CPU:0"), lambda f, x: f(*x), **options)
        both = trained(rate, 1.0, strategy.scope(), strategy.run, **options)
        for (x,), copies in zip(one, both):
            assert len(copies) == 2
            for copy in copies:
                np.testing.assert_allclose(copy, x, rtol=1e-6)
"""


@pytest.mark.rest
@pytest.mark.slow
def test_in_eager_replicas_all_rows_catch_up():
    process = subprocess.run(
        [sys.executable, "-c", EAGER], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]


def example(directory, *, kill=False):
    """Run the example and return its output; with `kill` one worker dies at work."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--epochs=4", f"--directory={directory}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if kill and line.startswith("Epoch 3"):
            workers = re.findall(r"Worker (\d+) starts", "".join(lines))
            os.kill(int(workers[1]), signal.SIGKILL)
    assert (process.wait() != 0) == kill, "".join(lines)
    return "".join(lines)


@pytest.mark.rest
def test_a_job_whose_worker_was_killed_resumes(tmp_path):
    weights = re.compile(r"Weights: \w+")  # both may be on one line
    expected = weights.findall(example(tmp_path / "undisturbed"))
    assert len(expected) == 2
    assert not weights.findall(example(tmp_path / "killed", kill=True))
    resumed = example(tmp_path / "killed")
    assert "starts after 2 of 4 epochs" in resumed
    assert weights.findall(resumed) == expected
