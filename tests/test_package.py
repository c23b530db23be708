"""The package as its users get it: the wheel, other backends, the files' order."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stepping import python

import keras_rmsprop

ROOT = Path(__file__).parent.parent


def test_jax_backend_trains_and_the_import_needs_no_tensorflow():
    out = python(
        """
        import sys
        import keras, numpy as np
        import keras_rmsprop
        from keras_rmsprop import RMSprop, reference
        assert "tensorflow" not in sys.modules

        def losses(optimizer):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            model.compile(optimizer, "mse")
            x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
            return model.fit(x, x[:, :2], epochs=3, verbose=0).history["loss"]

        options = {"momentum": 0.9, "centered": True, "weight_decay": 0.01}
        ours = losses(RMSprop(0.01, **options))
        theirs = losses(keras.optimizers.RMSprop(0.01, **options))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        low = losses(RMSprop(0.01, slot_dtype="bfloat16"))
        np.testing.assert_allclose(low, losses(RMSprop(0.01)), rtol=0.05)

        options = dict(
            initial_scale=0.5, eps_in_sqrt=False, eps=1e-3, centered=True,
            momentum=0.5, nesterov=True, bias_correction=True,
        )
        optimizer = keras_rmsprop.dialects.optax(0.1, **options)
        w, gradients = keras.Variable([1.0, -2.0]), np.float32([[1, 2], [3, -1]])
        expected, state = w.numpy(), {}
        for g in gradients:
            optimizer.apply([g], [w])
            expected = reference.step(
                expected, g, state, alpha=0.1, epsilon=1e-3, centered=True,
                momentum=0.5, nesterov=True, bias_correction=True,
                epsilon_inside_sqrt=False, initial_accumulator_value=0.5,
            )
        np.testing.assert_allclose(w.numpy(), expected, rtol=1e-5)
        optimizer = keras_rmsprop.dialects.torch(0.1, weight_decay=0.5)
        w.assign([1.0, -2.0])
        expected, state = w.numpy(), {}
        for g in gradients:
            optimizer.apply([g], [w])
            expected = reference.step(
                expected, g, state, alpha=0.1, beta=0.99, epsilon=1e-8,
                weight_decay=0.5, decoupled_weight_decay=False,
                epsilon_inside_sqrt=False,
            )
        np.testing.assert_allclose(w.numpy(), expected, rtol=1e-5)
        print(keras.backend.backend(), ours[-1] < ours[0])
        """,
        KERAS_BACKEND="jax",
    )
    assert out == "jax True"


@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "keras_rmsprop/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "examples", "benchmarks"))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    interpreter = tmp_path / "env/bin/python"
    pip = [interpreter, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True)
    out = python(
        """
        import keras, keras_rmsprop
        optimizer = keras_rmsprop.RMSprop(0.1)
        weight = keras.Variable([1.0])
        optimizer.apply([[2.0]], [weight])
        print(keras_rmsprop.__version__, round(weight.numpy().item(), 4))
        """,
        executable=interpreter,
        cwd=tmp_path,
    )
    assert out == f"{keras_rmsprop.__version__} 0.6838"


def test_changelog_names_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(keras_rmsprop.__version__)}\b", changelog, re.M)


def test_arrows_run_one_way():
    def imports(path):
        return {
            node.module if isinstance(node, ast.ImportFrom) else name.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }

    package = ROOT / "keras_rmsprop"
    for name in ("rule.py", "rounding.py", "checks.py"):
        used = imports(package / name)
        assert not [n for n in used if n.startswith(("keras_rmsprop", "tensorflow"))]
    for path in package.rglob("*.py"):
        assert "keras_rmsprop.reference" not in imports(path)
    for path in (package / "tensorflow").glob("*.py"):
        assert not {"keras_rmsprop.rmsprop", "keras_rmsprop.slots"} & imports(path)
