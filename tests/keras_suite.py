"""A pytest plugin: Keras' own tests with an RMSprop in the place of SGD, Adam, RMSprop.

`pytest -p keras_suite --rmsprop keras_rmsprop --results FILE PATH...`; see
`run_keras_suite.py`, which runs both sides and compares.
"""

import contextlib
import importlib
import inspect
import json
import re
import sys

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  # before TensorFlow, as in Keras' conftest.py

import keras
import pytest
from keras.src import api_export, optimizers

REPLACED = [optimizers.SGD, optimizers.Adam, optimizers.RMSprop]
sys.modules["conftest"] = sys.modules[__name__]  # Keras' tests import `skip_if_backend`
MARKERS = "requires_trainable_backend", "multi_device", "no_pytest_xdist"


def pytest_addoption(parser):
    parser.addoption("--rmsprop", help="a module with an RMSprop", required=True)
    parser.addoption("--results", help="file for one line of JSON a report")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: one of Keras' own")
    rmsprop = importlib.import_module(config.getoption("rmsprop")).RMSprop
    print(f"In the place of SGD, Adam and RMSprop: {inspect.getfile(rmsprop)}")
    for replaced in REPLACED:
        is_rmsprop = replaced is optimizers.RMSprop
        replace(replaced, rmsprop if is_rmsprop else like(replaced, rmsprop))
    if path := config.getoption("results"):
        config.pluginmanager.register(Results(path))


def like(replaced, rmsprop):
    """Return the RMSprop with the name and the arguments of another class.

    What an RMSprop does not have, as `beta_1`, is passed by.
    """
    theirs = [*inspect.signature(replaced).parameters.values()]
    names = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Of Keras' class for both, so that both sides get the same.
    taken = {*inspect.signature(REPLACED[-1]).parameters}

    def __init__(self, *args, **kwargs):  # noqa: N807
        given = dict(zip(names, args, strict=False)) | kwargs
        given = {k: v for k, v in given.items() if k in taken or k not in names}
        given.setdefault("learning_rate", theirs[0].default)
        rmsprop.__init__(self, **given)

    of_class = {"__init__": __init__, "__module__": replaced.__module__}
    new = type(replaced.__name__, (rmsprop,), of_class)
    api_export.REGISTERED_OBJS_TO_NAMES[new] = f"keras.optimizers.{replaced.__name__}"
    return new


def replace(old, new):
    """Put a class in the place of another, wherever Keras holds it."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "keras"]
    for module in modules:
        for name, value in [*vars(module).items()]:
            if value is old:
                setattr(module, name, new)
    optimizers.ALL_OBJECTS.discard(old)
    optimizers.ALL_OBJECTS.add(new)
    optimizers.ALL_OBJECTS_DICT[old.__name__.lower()] = new
    names = api_export.REGISTERED_NAMES_TO_OBJS
    names[f"keras.optimizers.{old.__name__}"] = new


def skip_if_backend(backend, reason):
    return pytest.mark.skipif(keras.backend.backend() == backend, reason=reason)


def pytest_collection_modifyitems(items):
    alone = pytest.mark.skip(reason="needs several devices")
    for item in items:
        if "multi_device" in item.keywords:
            item.add_marker(alone)


@pytest.fixture(autouse=True)
def _same_start():
    """Give both sides the same numbers; what one test leaves behind, no other sees."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


class Results:
    """Writes what comes out as it comes, so that a crash leaves what there was."""

    def __init__(self, path):
        self.file = open(path, "w")  # noqa: SIM115  # as long as pytest runs

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.write(report, report.duration)

    def pytest_collectreport(self, report):
        if report.outcome != "passed":
            self.write(report, 0)

    def write(self, report, seconds):
        result = {"id": report.nodeid, "outcome": report.outcome, "where": ""}
        if report.failed:
            text = str(report.longrepr)
            if re.search(r"^E +(ModuleNotFound|Import)Error", text, re.MULTILINE):
                result["outcome"] = "skipped"  # a package that is not there
            result |= {"where": where(report), "numbers": numbers(text)}
        result["seconds"] = round(seconds, 3)
        print(json.dumps(result), file=self.file, flush=True)


def where(report):
    """Return the line of the test that failed, and the kind of error."""
    try:
        places = [e.reprfileloc for e in report.longrepr.reprtraceback.reprentries]
        error = report.longrepr.reprcrash.message.split(":")[0].split("\n")[0]
    except AttributeError:
        return "not collected"
    file = report.nodeid.split("::")[0].split("/")[-1]
    lines = [p.lineno for p in places if p and p.path.endswith(file)]
    return f"line {lines[-1] if lines else '?'}: {error}"


def numbers(text):
    """Return the numbers that a test found where it expected others."""
    found = re.findall(
        r"(\S+) \(ACTUAL\)"
        r"|ACTUAL: array\(([^\s,\[\]()]+)\)"
        r"|AssertionError: ([-.\d]+) !=",
        text,
    )
    return [float(a or b or c) for a, b, c in found]
