"""On PyTorch, in a process of its own: which backend Keras has is settled on import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stepping import python

RUN = Path(__file__).with_name("torch_run.py")
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def results():
    result = subprocess.run(
        [sys.executable, RUN],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "torch"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", re.findall(r"def (check_\w+)", RUN.read_text()))
def test_on_torch(results, name):
    assert not results[name], results[name]


def test_no_other_backend_is_imported():
    out = python(
        """
        import sys, keras
        before = {"jax", "tensorflow"} & {*sys.modules}
        import keras_rmsprop
        assert {"jax", "tensorflow"} & {*sys.modules} == before
        print("keras_rmsprop.backends.torch" in sys.modules)
        """,
        KERAS_BACKEND="torch",
    )
    assert out == "True"


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_other_backends_do_not_import_torch(backend):
    out = python(
        """
        import sys, keras_rmsprop
        print("torch" in sys.modules)
        """,
        KERAS_BACKEND=backend,
    )
    assert out == "False"
