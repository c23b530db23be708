import os
from zlib import crc32

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
from hypothesis import settings

from keras_rmsprop import kernel
from keras_rmsprop.backends.programs import Programs

# A plugin for `make test-keras` that imports torch; not to be searched for doctests.
collect_ignore = ["keras_suite.py"]

# Compiling takes as long as it takes, and an example found is an example kept.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_report_header():
    """Say whether the tests of steps run with the kernel or without it."""
    return f"kernel: {kernel.why_not() or 'there'}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of tests with `one_in(n)`, leave the first case and one in n to every day.

    The others are the rest. Which is drawn from their names: every n-th could be those
    of one option.
    """
    seen = set()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None:
            drawn = crc32(item.name.encode()) % mark.args[0] == 0
            if item.function in seen and not drawn:
                item.add_marker(pytest.mark.rest)
            seen.add(item.function)


@pytest.fixture(autouse=True)
def _portable(request, monkeypatch):
    if request.node.get_closest_marker("portable"):
        monkeypatch.setattr(kernel, "_loaded", lambda: (None, "none in this test"))


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    # XLA compiles for one test whatever it compiled for others.
    monkeypatch.setattr(Programs, "compiled", 0)
    keras.utils.clear_session(free_memory=False)  # its garbage collection takes 0.4 s
    keras.utils.set_random_seed(0)
