"""What the main program shows and writes, `examples/mnist_report.py`."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist_report
from mnist_data import Digits

OURS, THEIRS = "keras_rmsprop.RMSprop", "keras.optimizers.RMSprop"
AUTO = "auto with EMA weights"


@pytest.fixture
def digits():
    images, labels = np.zeros((3, 784), np.float32), np.arange(3)
    return Digits("MNIST sample", images, labels, images, labels)


def make_run(optimizer, *values):
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    history = {name: list(values) for name in names}
    history["learning_rate"] = [0.001] * len(values)
    return mnist_report.Run(
        optimizer, history, [3.0, 1.0, 2.0], 0.5, values[-1], 0.9, 7
    )


def test_difference():
    runs = [make_run(OURS, 2.0, 1.01, 1.0), make_run(THEIRS, 2.0, 1.0, 1.001)]
    difference, epoch = mnist_report.loss_difference(runs)
    assert difference == pytest.approx(0.01)
    assert epoch == 2
    words = mnist_report.difference_in_words(runs)
    assert words.endswith("differ by at most 1.0e-02 (relative), in epoch 2.")
    assert "equal to the last digit" in mnist_report.difference_in_words(runs[:1] * 2)


def test_median_leaves_the_first_epoch_out():
    run = make_run(OURS, 1.0)
    assert run.seconds_an_epoch == 1.5
    assert replace(run, seconds=[3.0]).seconds_an_epoch == 3.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_reported(value, digits, tmp_path, capsys):
    runs = [make_run(name, 1.0, value, value) for name in (OURS, THEIRS, AUTO)]
    mnist_report.write(tmp_path, {"output": tmp_path}, digits, runs)
    mnist_report.show(tmp_path, digits, runs)
    assert "Training diverged" in capsys.readouterr().out
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary["results"][OURS]["test_loss"] is None
    assert summary["loss_difference"]["relative"] is None


def test_reason_with_brackets_is_printed_as_it_is(digits, capsys):
    mnist_report.announce(replace(digits, why_not_all="[Errno 13] [/b]"))
    assert "[Errno 13] [/b]" in capsys.readouterr().out
