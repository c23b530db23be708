"""On JAX, several processes train as one process does with the whole batch."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed_jax_run import EPOCHS, RUNS

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "distributed_jax_run.py"


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(what, directory):
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    return [start(what, directory / f"{n}.npz", address, 2, n) for n in range(2)]


def finish(*processes):
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
    return outputs


def assert_same(directory, expected):
    """Check what both workers wrote: they agree to the bit, and with another run."""
    first, second = (np.load(directory / f"{n}.npz") for n in range(2))
    assert first.keys() == second.keys() == expected.keys()
    for key, x in expected.items():
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(second[key], first[key])
        np.testing.assert_allclose(first[key], x, rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.rest
def test_equals_one_process(tmp_path):
    finish(start("all", tmp_path / "one.npz"))
    expected = np.load(tmp_path / "one.npz")
    assert {key.rsplit(",", 1)[0] for key in expected} == set(RUNS)
    finish(*start_workers("all", tmp_path))
    assert_same(tmp_path, expected)


@pytest.mark.rest
def test_a_job_whose_worker_was_killed_resumes(tmp_path):
    (tmp_path / "one").mkdir()
    finish(start("resume", tmp_path / "one" / "0.npz"))
    first, second = start_workers("resume", tmp_path)
    try:
        for line in first.stdout:
            if line.startswith("Epoch 2"):
                os.kill(second.pid, signal.SIGKILL)
                break
        else:
            pytest.fail("The first worker did not get that far")
    finally:
        second.kill()
        first.kill()  # it would wait for the other one until a timeout
        first.wait()
    outputs = finish(*start_workers("resume", tmp_path))
    for output in outputs:
        [done] = re.findall(r"starts after (\d+) of", output)
        assert 2 <= int(done) < EPOCHS
    assert_same(tmp_path, np.load(tmp_path / "one" / "0.npz"))
