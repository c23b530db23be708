"""On PyTorch, in a process of its own: which backend Keras has is settled on import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
