"""The main program, `examples/mnist_train.py`."""

import csv
import functools
import importlib.metadata
import io
import json
import math
import subprocess
import sys
import types
from contextlib import redirect_stdout
from pathlib import Path

import keras
import numpy as np
import pytest
from matplotlib.image import imread
from stepping import BACKEND

import keras_rmsprop

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist_data
import mnist_train

OURS, THEIRS = "keras_rmsprop.RMSprop", "keras.optimizers.RMSprop"
AUTO = "auto with EMA weights"
PROGRAM = Path(mnist_train.__file__)


@pytest.fixture(scope="module")
def sample():
    return mnist_data.sample(seed=0)  # takes seconds


def read_history(output):
    with (output / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(output, optimizer):
    rows = read_history(output)
    return [float(row["loss"]) for row in rows if row["optimizer"] == optimizer]


# The program, run once on the sample.


@pytest.fixture(scope="module")
def ran(sample, tmp_path_factory):
    """Return the output folder of a run and what the run printed."""
    output = tmp_path_factory.mktemp("new") / "folder"
    old = output / "tensorboard" / OURS / "train" / "events.out.tfevents.0.old"
    old.parent.mkdir(parents=True)
    old.touch()
    (output / "mine.txt").touch()
    arguments = ["--data", "sample", "--epochs", "2", "--output", str(output)]
    with (
        redirect_stdout(io.StringIO()) as printed,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(mnist_data, "sample", lambda seed: sample)
        assert mnist_train.main(arguments) == 0
    return output, printed.getvalue()


@pytest.mark.slow
def test_prints_bars_and_a_table(ran):
    output, printed = ran
    assert printed.count("Epoch 2/2") == 3
    lines = printed.splitlines()
    results = json.loads((output / "summary.json").read_text())["results"]
    for optimizer, result in results.items():
        (row,) = (line for line in lines if line.startswith(f"{optimizer} "))
        assert "MNIST sample" in row
        assert f"{result['test_accuracy']:.2%}" in row
        assert f"{result['test_loss']:.4f}" in row
        assert f"{result['seconds_an_epoch']:.2f}" in row
        assert f"{result['first_step_seconds']:.2f} s" in row
        assert len(row) <= 80
    assert lines[-4].startswith("The two training losses ")
    assert lines[-3].startswith('"auto" ended at a learning rate of ')
    assert lines[-2].startswith("That was after only ")
    assert lines[-1].startswith(f"Written to {output}: comparison.png, history.csv,")


@pytest.mark.slow
def test_history(ran):
    output, _ = ran
    rows = read_history(output)
    names = [(row["optimizer"], row["epoch"]) for row in rows]
    assert names == [(name, epoch) for name in (OURS, THEIRS, AUTO) for epoch in "12"]
    columns = {"loss", "accuracy", "val_loss", "val_accuracy", "seconds"}
    columns |= {"learning_rate"}
    assert set(rows[0]) == columns | {"optimizer", "epoch"}
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[:4] == pytest.approx([0.001] * 4)
    assert len({0.001, *rates[4:]}) == 3  # what was found, after each epoch
    assert all(float(row[column]) > 0 for row in rows for column in columns)


@pytest.mark.slow
def test_losses_agree(ran):
    output, _ = ran
    ours, theirs = losses(output, OURS), losses(output, THEIRS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert ours[1] < ours[0] < math.log(10)  # better than guessing


@pytest.mark.slow
def test_summary(ran):
    output, _ = ran
    summary = json.loads((output / "summary.json").read_text())
    assert summary["options"] == {
        "epochs": 2,
        "batch_size": 128,
        "learning_rate": 0.001,
        "rho": 0.9,
        "epsilon": 1e-7,
        "momentum": 0.0,
        "centered": False,
        "seed": 0,
        "data": "sample",
        "output": str(output),
    }
    assert summary["data"] == {
        "source": "MNIST sample",
        "train": 4000,
        "test": 1000,
        "why_not_all": None,
    }
    assert summary["versions"] == {
        "keras": keras.__version__,
        BACKEND: importlib.metadata.version(BACKEND),
        "keras_rmsprop": keras_rmsprop.__version__,
    }
    ours, theirs = (summary["results"][name] for name in (OURS, THEIRS))
    assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.005)
    assert ours["test_accuracy"] > 0.8
    assert 0 <= summary["loss_difference"]["relative"] <= 1e-6


@pytest.mark.slow
def test_picture(ran):
    output, _ = ran
    image = imread(output / "comparison.png")
    height, width, _ = image.shape
    assert 600 <= height < width <= 2000
    used = np.argwhere((image[..., :3] < 0.9).any(axis=-1))
    assert (np.ptp(used, axis=0) > [0.9 * height, 0.9 * width]).all()


@pytest.mark.slow
def test_model_loads_and_predicts(ran, sample):
    output, _ = ran
    model = keras.models.load_model(output / "model.keras")
    assert type(model.optimizer) is keras_rmsprop.RMSprop
    probabilities = model.predict(sample.test_images, verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(axis=1) == sample.test_labels).mean()
    summary = json.loads((output / "summary.json").read_text())
    assert accuracy == pytest.approx(summary["results"][OURS]["test_accuracy"])


@pytest.mark.slow
def test_tensorboard_logs_are_of_this_run_alone(ran):
    output, _ = ran
    for optimizer in (OURS, THEIRS, AUTO):
        for part in ("train", "validation"):
            (log,) = (output / "tensorboard" / optimizer / part).iterdir()
            assert log.stat().st_size > 0
    assert (output / "mine.txt").exists()


@pytest.mark.tensorflow("how it rewrites graphs")
@pytest.mark.parametrize("given", [None, True, False])
def test_tensorflow_rewrites_graphs_as_before(given, monkeypatch):
    kept = {} if given is None else {"arithmetic_optimization": given}
    folds = {"constant_folding": True}
    options = types.SimpleNamespace(
        get_experimental_options=lambda: {**kept},
        set_experimental_options=kept.update,
    )
    monkeypatch.setattr("tensorflow.config.optimizer", options)
    with mnist_train.as_written():
        assert kept == {"arithmetic_optimization": False, "constant_folding": False}
    assert kept == {"arithmetic_optimization": given is not False, **folds}


# Options.


def test_options_reach_both_optimizers(tmp_path):
    given = {"learning_rate": 0.01, "rho": 0.8, "epsilon": 1e-5, "momentum": 0.5}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    options = mnist_train.option_parser().parse_args(
        [*flags, "--centered", f"--output={tmp_path}"]
    )
    ours, theirs, auto = mnist_train.make_optimizers(options).values()
    assert type(ours) is type(auto) is keras_rmsprop.RMSprop
    found = auto.get_config()["learning_rate"]
    assert found == keras_rmsprop.RMSprop("auto").get_config()["learning_rate"]
    assert auto.use_ema
    assert isinstance(theirs, keras.optimizers.RMSprop)
    expected = pytest.approx(given | {"centered": True})
    for optimizer in (ours, theirs):
        config = optimizer.get_config()
        assert {name: config[name] for name in (*given, "centered")} == expected


def test_automatic_learning_rate_leaves_the_others_at_that_of_keras(tmp_path):
    options = mnist_train.option_parser().parse_args(
        ["--learning-rate=auto", f"--output={tmp_path}"]
    )
    ours, theirs, _ = mnist_train.make_optimizers(options).values()
    assert float(ours.learning_rate) == float(theirs.learning_rate)
    assert float(theirs.learning_rate) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs=0", "--epochs: must be a whole number from 1 to 4294967295. Rec"),
        ("--epochs=many", "--epochs: must be a whole number from 1 to 4294967295. Rec"),
        ("--batch-size=1.5", "--batch-size: must be a whole number from 1 to"),
        ("--seed=-1", "--seed: must be a whole number from 0 to 4294967295. Received"),
        (
            "--learning-rate=fast",
            "--learning-rate: invalid learning_rate value: 'fast'",
        ),
        ("--learning-rate=nan", "`learning_rate` must be finite and >= 0. Received"),
        ("--learning-rate=-1", "`learning_rate` must be finite and >= 0. Received"),
        ("--rho=1.5", "`rho` must be in [0, 1). Received: rho=1.5"),
        ("--momentum=-0.1", "`momentum` must be in [0, 1). Received: momentum=-0.1"),
        ("--epsilon=0", "`epsilon` must be finite and > 0. Received: epsilon=0.0"),
        ("--data=cifar", "--data: invalid choice: 'cifar'"),
        ("--output={file}", "--output: cannot write to {file}: File exists"),
        ("--output={file}/x", "--output: cannot write to {file}/x: Not a directory"),
        ("--speed=9", "unrecognized arguments: --speed=9"),
    ],
)
def test_bad_values_get_one_line(arguments, message, tmp_path, capfd):
    file = tmp_path / "file"
    file.touch()
    output = [] if "--output" in arguments else [f"--output={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        mnist_train.main([arguments.format(file=file), "--data=sample", *output])
    assert ended.value.code == 2
    printed, error = capfd.readouterr()
    assert printed == ""
    assert error.startswith("mnist_train.py: error: ")
    assert message.format(file=file) in error
    assert error.index("\n") == len(error) - 1


def test_program_starts_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, "--epochs", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mnist_train.py: error: argument --epochs: must be")
    assert done.stderr.count("\n") == 1


def test_help_names_every_option_and_needs_no_tensorflow(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", PROGRAM, "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    options = vars(mnist_train.option_parser().parse_args(["--output", str(tmp_path)]))
    assert len(options) == 10
    for option in options:
        assert f"\n  --{option.replace('_', '-')}" in done.stdout
    assert "tensorflow" not in done.stderr


# All of MNIST, and what happens without.


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No MNIST is prepared, and there is no network."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(mnist_data, "answers", lambda url: False)


@pytest.mark.slow
def test_offline_trains_on_the_sample(offline, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist_data, "sample", lambda seed: sample)
    output = tmp_path / "output"
    options = ["--epochs=1", "--momentum=0.9", "--centered", "--batch-size=500"]
    assert mnist_train.main([*options, f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "A sample only" in printed
    assert "This is not all of MNIST, but a sample: 4,000 digits" in printed
    data = json.loads((output / "summary.json").read_text())["data"]
    assert data["source"] == "MNIST sample"
    assert "t10k-labels-idx1-ubyte.gz does not answer" in data["why_not_all"]
    np.testing.assert_allclose(losses(output, OURS), losses(output, THEIRS), rtol=1e-3)


def test_offline_tfds_gets_one_line(offline, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        mnist_train.main(["--data=tfds", f"--output={tmp_path}"])
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("mnist_train.py: error: MNIST cannot be had.")
    assert error.count("\n") == 1


@functools.cache
def all_digits():
    try:
        return mnist_data.load("tfds", seed=0)
    except mnist_data.MnistUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.rest
def test_all_of_mnist(tmp_path, monkeypatch):
    digits = all_digits()
    monkeypatch.setattr(mnist_data, "load", lambda source, seed: digits)
    arguments = ["--data=tfds", "--seed=0", "--epochs=4", f"--output={tmp_path}"]
    assert mnist_train.main(arguments) == 0
    first_losses = [losses(tmp_path, name)[0] for name in (OURS, THEIRS)]
    assert first_losses[0] == pytest.approx(first_losses[1], rel=1e-3)
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    ours, theirs = (results[name]["test_accuracy"] for name in (OURS, THEIRS))
    assert ours >= 0.968
    assert abs(ours - theirs) <= 0.005


def accuracy_on_mnist(seed=0, policy="float32", epochs=2, most=None, **options):
    """Return the share of test digits that the network knows then."""
    digits = all_digits()
    keras.utils.set_random_seed(seed)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = mnist_train.network()
    finally:
        keras.config.set_dtype_policy(before)
    model.compile(
        keras_rmsprop.RMSprop(**options),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=True,
    )
    images, labels = digits.train_images[:most], digits.train_labels[:most]
    model.fit(images, labels, batch_size=128, epochs=epochs, verbose=0)
    return model.evaluate(digits.test_images, digits.test_labels, 1000, verbose=0)[1]


@pytest.mark.rest
@pytest.mark.slow
def test_slots_in_bfloat16_are_as_good_on_mnist():
    accuracies = [accuracy_on_mnist(slot_dtype=d) for d in (None, "bfloat16")]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.003)


@pytest.mark.rest
@pytest.mark.slow
def test_mixed_precision_is_as_good_on_mnist():
    means = {
        policy: np.mean([accuracy_on_mnist(seed, policy, 1, 20_000) for seed in (0, 1)])
        for policy in ("float32", "mixed_float16", "mixed_bfloat16")
    }
    assert means["float32"] > 0.91
    for mean in means.values():
        assert mean == pytest.approx(means["float32"], abs=0.005)
