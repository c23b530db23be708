"""What holds between the backends of Keras: each runs in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stepping import python

BACKENDS = ["tensorflow", "jax", "torch"]
FOLDER = Path(__file__).parent

pytestmark = pytest.mark.tensorflow("a start: the others need not be started again")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def run(backend, program, *arguments):
    """Run a program on a backend; return the last line that it prints."""
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": backend},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.peers
@every_backend
def test_it_imports_no_other_backend(backend):
    pytest.importorskip(backend)
    out = python(
        """
        import sys
        import keras
        before = {*sys.modules}
        from keras_rmsprop import RMSprop, callbacks, dialects, reference, transfer
        weight, optimizer = keras.Variable([1.0, 2.0]), RMSprop("auto", use_ema=True)
        optimizer.apply([keras.ops.ones(2)], [weight])
        optimizer.get_state()
        new = {name.split(".")[0] for name in {*sys.modules} - before}
        print(*sorted(new & {"tensorflow", "jax", "torch", "optax", "tf_keras"}))
        """,
        KERAS_BACKEND=backend,
    )
    # Keras may have imported others already: those are not ours to answer for.
    assert {*out.split()} <= {backend}


@pytest.mark.rest
@pytest.mark.peers
def test_a_run_goes_on_with_every_backend(tmp_path):
    program = FOLDER / "exchange_run.py"
    expected = {b: json.loads(run(b, program, tmp_path)) for b in BACKENDS}
    for backend in BACKENDS:
        found = json.loads(run(backend, program, tmp_path, *BACKENDS))
        assert len(found) == 3 * (6 * 2 + 4)
        for key, losses in found.items():
            source, name, _ = key.split(", ")
            np.testing.assert_allclose(
                losses, expected[source][name], 1e-5, err_msg=f"{key} on {backend}"
            )


@pytest.mark.rest
@pytest.mark.peers
def test_the_first_epoch_of_mnist_is_the_same_on_every_backend(tmp_path):
    program = FOLDER.parent / "examples" / "mnist_train.py"
    losses = []
    for backend in BACKENDS:
        output = tmp_path / backend
        run(backend, program, "--data=sample", "--epochs=1", f"--output={output}")
        rows = (output / "history.csv").read_text().splitlines()[1:]
        losses.append([float(row.split(",")[2]) for row in rows[:2]])  # of given rates
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-3)
