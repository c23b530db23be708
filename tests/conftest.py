import os
from importlib import import_module
from importlib.util import find_spec
from zlib import crc32

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
from hypothesis import settings

# Keras is imported where it is used, as it takes seconds: the process that only hands
# out the tests to others does without.

# A plugin for `make test-keras`, which imports torch, and what `make fuzz` runs.
collect_ignore = ["keras_suite.py", "fuzz", "typed"]
if find_spec("keras_tuner") is None:
    collect_ignore.append("clients")  # for `make test-clients`

DOCTESTS = {
    "keras_rmsprop.optimizer.RMSprop.explain": "the ways of its steps",
}
"""Examples in the package that are about TensorFlow, and what of it."""

# Compiling takes as long as it takes, and an example found is an example kept.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def kernel():
    """Return the module of the backend's kernel; `None` on JAX, which has none."""
    from stepping import BACKEND

    if BACKEND == "jax":
        return None
    return import_module(f"keras_rmsprop.kernel.{BACKEND}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Skip what the backend does not have. Leave one in n of `one_in(n)` to every day.

    The others are the rest, but for the first case. Which is drawn from their names:
    every n-th could be those of one option.
    """
    seen = set()
    for item in items:
        if why := why_not_here(item):
            item.add_marker(pytest.mark.skip(reason=why))
        mark = item.get_closest_marker("one_in")
        if mark is not None:
            drawn = crc32(item.name.encode()) % mark.args[0] == 0
            if item.function in seen and not drawn:
                item.add_marker(pytest.mark.rest)
            seen.add(item.function)


def why_not_here(item):
    """Return why another backend than TensorFlow cannot run a test; "" if it can."""
    from stepping import BACKEND, WAYS

    if BACKEND == "tensorflow":
        return ""
    mark = item.get_closest_marker("tensorflow")
    if mark is not None:
        return f"only on TensorFlow: {mark.args[0]}"
    if item.name in DOCTESTS:
        return f"only on TensorFlow: {DOCTESTS[item.name]}"
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if given.get("way", "eager") not in WAYS:
        return f"only on TensorFlow: {given['way']}"
    if BACKEND == "torch" and given.get("jit_compile") is True:
        return "PyTorch compiles for too long"
    return ""


@pytest.fixture(autouse=True)
def _portable(request, monkeypatch):
    if request.node.get_closest_marker("portable") and kernel():
        monkeypatch.setattr(kernel(), "_loaded", lambda: (None, "none in this test"))


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    import keras

    if keras.backend.backend() == "tensorflow":
        from keras_rmsprop.backends.programs import Programs

        # XLA compiles for one test whatever it compiled for others.
        monkeypatch.setattr(Programs, "compiled", 0)
    keras.utils.clear_session(free_memory=False)  # its garbage collection takes 0.4 s
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _float64(request):
    """Let JAX have float64 where a test is about it; most users do without."""
    from stepping import BACKEND

    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    marked = request.node.get_closest_marker("float64")
    if BACKEND != "jax" or not (marked or given.get("dtype") == "float64"):
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
