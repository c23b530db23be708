"""The package as its users get it: the wheel, other backends, the files' order."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from stepping import python

import keras_rmsprop
from keras_rmsprop.kernel import tensorflow as kernel

pytestmark = pytest.mark.tensorflow("wheels, which are the same for all backends")

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # With the kernel for this TensorFlow alone: another takes a minute to build.
    command = ["make", "wheel", f"WHEELS={folder}", "OLDEST=none"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
# TensorFlow has none for 3.14.
@pytest.mark.parametrize(
    "version", ["3.11", pytest.param("3.13", marks=pytest.mark.rest)]
)
def test_wheel_trains_in_an_empty_environment(version, wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(("tests", "examples", "benchmarks"))]
    name = sys.executable if sys.version.startswith(version) else f"python{version}"
    # pyenv has a command for each of its Pythons, which runs if this names it.
    environ = os.environ | {"PYENV_VERSION": version}
    found = shutil.which(name)
    if not found or subprocess.run([found, "--version"], env=environ).returncode:
        pytest.skip(f"There is no Python {version} here")
    subprocess.run([found, "-m", "venv", tmp_path / "env"], env=environ, check=True)
    interpreter = tmp_path / "env/bin/python"
    pip = [interpreter, "-m", "pip", "install", "--quiet"]
    if found == sys.executable:
        # What it needs is here, and would take a minute to install.
        site = next((tmp_path / "env").glob("lib/*/site-packages"))
        (site / "here.pth").write_text(sysconfig.get_path("purelib"))
        pip += ["--no-deps", "--ignore-installed"]
    else:
        pip += ["-c", ROOT / "constraints.txt"]
    # Not from the project's folder, where pip may find the package already.
    subprocess.run([*pip, wheel], check=True, cwd=tmp_path)
    out = python(
        """
        import sys
        from importlib.resources import files
        import keras, keras_rmsprop, numpy as np
        assert keras_rmsprop.__file__.startswith(sys.prefix)
        assert (files(keras_rmsprop) / "py.typed").is_file()

        optimizer = keras_rmsprop.RMSprop(0.1)
        weight = keras.Variable([1.0])
        optimizer.apply([[2.0]], [weight])
        assert round(weight.numpy().item(), 4) == 0.6838

        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras_rmsprop.RMSprop(), loss="mse")
        x = np.ones((8, 3))
        losses = model.fit(x, x[:, :1] + 9, epochs=2, batch_size=8, verbose=0).history
        assert losses["loss"][1] < losses["loss"][0]
        from keras_rmsprop.kernel import tensorflow as kernel
        print(kernel.why_not() or "kernel", keras_rmsprop.__version__, end=" ")
        print("%d.%d" % sys.version_info[:2])
        """,
        executable=interpreter,
        cwd=tmp_path,
        XDG_CACHE_HOME=str(tmp_path),  # so the kernel is that of the wheel
    )
    assert (
        out == f"{kernel.why_not() or 'kernel'} {keras_rmsprop.__version__} {version}"
    )


@pytest.mark.slow
def test_wheel_has_sources_and_a_readme_that_stands_alone(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        [metadata] = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = files.read(metadata).decode().partition("\n\n")[2]
    sources = [*(ROOT / "keras_rmsprop/kernel").glob("*.[ch]*")]
    assert sources
    assert {f"keras_rmsprop/kernel/{path.name}" for path in sources} <= {*names}
    assert text.startswith("# keras_rmsprop")
    assert not re.search(r"\]\((?!https?:)", text)


def test_readme_names_the_versions_tested():
    readme, setup = ((ROOT / f).read_text() for f in ("README.md", "setup.cfg"))
    for name in ("Keras", "TensorFlow"):
        oldest, newest = (
            re.search(rf"^{name.lower()}==(\d+\.\d+)", (ROOT / f).read_text(), re.M)[1]
            for f in ("constraints-oldest.txt", "constraints.txt")
        )
        assert f"{name} {oldest} to {newest}" in readme
        assert f"{name.lower()}>={oldest}," in setup


def test_citation_names_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {keras_rmsprop.__version__}\n" in text


def test_changelog_names_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(keras_rmsprop.__version__)}\b", changelog, re.M)
