"""The programs in `examples/`."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

pytestmark = pytest.mark.tensorflow("programs written with it")

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, capsys, *arguments):
    """Return the result of a program's `main()` and what it printed."""
    result = runpy.run_path(str(EXAMPLES / name))["main"](*arguments)
    return result, capsys.readouterr().out


@pytest.mark.slow
def test_regression_learns_the_line(capsys):
    result, output = run("regression.py", capsys)
    for first, last, floor in zip(*result, strict=True):
        assert first > 10 * last
        assert last == pytest.approx(floor, rel=0.2)
    assert f"{result.last[0]:.4f}" in output


@pytest.mark.slow
def test_linear_regression_lands_on_the_same_theta(capsys):
    result, output = run("linear_regression.py", capsys)
    np.testing.assert_allclose(result.keras, result.numpy, rtol=0, atol=1e-9)
    # A constant alpha of 0.1 hops half of that to either side of the minimum.
    for theta in (result.numpy, result.keras):
        np.testing.assert_allclose(
            np.abs(theta - result.least_squares), 0.05, rtol=0, atol=1e-6
        )
    np.testing.assert_allclose(
        result.keras_decaying_alpha, result.least_squares, rtol=0, atol=1e-6
    )
    assert "land on the same theta" in output


@pytest.fixture
def run_used(capsys, monkeypatch, tmp_path):
    """Return a function that runs one of the examples of `docs/used.md`."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run_it(name, *options):
        return run(name, capsys, [*options, f"--output={tmp_path}"])

    return run_it


USED = {
    "wgan_digits.py": "digits.png",
    "dqn_cartpole.py": "returns.png",
    "policy_gradient.py": "returns.png",
    "char_lm.py": "sample.txt",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", USED)
def test_where_it_is_used(name, run_used, tmp_path):
    options = ["--data=sample"] if "wgan" in name else []
    numbers, output = run_used(name, "--short", *options)
    assert np.isfinite(numbers).all()
    assert len(numbers) >= 3
    assert output.splitlines()[-1] == f"Written to {tmp_path}: {USED[name]}"
    (written,) = tmp_path.iterdir()
    if written.suffix == ".png":
        height, width, _ = imread(written).shape
        assert 500 <= height < width <= 2000
    else:
        assert written.read_text().strip() in output


@pytest.mark.slow
def test_compare_optimizers(run_used, tmp_path):
    rivals, output = run_used("compare_optimizers.py", "--short")
    ends = [rival.accuracy[:, -1].mean() for rival in rivals.values()]
    assert 10 < ends[-1] < ends[0] <= 100
    assert ends == sorted(ends, reverse=True)
    files = ["comparison.json", "comparison.md", "comparison.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert output.splitlines()[-1] == f"Written to {tmp_path}: {', '.join(files)}"
    table = (tmp_path / "comparison.md").read_text()
    found = json.loads((tmp_path / "comparison.json").read_text())
    for name, rival in rivals.items():
        assert re.search(f"^[|] {name} .*{rival.accuracy[0, -1]:.2f} % ", table, re.M)
        assert len(found["runs"][name][0]["history"]["val_accuracy"]) == 2
    for sentence in found["words"]:
        assert sentence in table
    assert found["words"][0].startswith(f"After 2 epochs {next(iter(rivals))} is ahead")
    height, width, _ = imread(tmp_path / "comparison.png").shape
    assert 500 <= height < width <= 2000


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([97.0, 98.0], [97.5, 97.0], "The ranges of the seeds overlap."),
        ([97.0, 98.0], [96.5, 96.9], "Its worst seed beats the other's best."),
        ([97.0], [96.0], "one seed cannot say whether by chance."),
    ],
)
def test_compare_optimizers_says_what_a_lead_is_worth(
    first, second, verdict, monkeypatch
):
    monkeypatch.syspath_prepend(EXAMPLES)
    ahead = runpy.run_path(str(EXAMPLES / "compare_optimizers.py"))["ahead"]
    seeds = {"worse": np.array(second), "better": np.array(first)}
    words = ahead(seeds)
    assert words.startswith(f"better is ahead: {np.mean(first):.2f} %, worse ")
    assert words.endswith(verdict)


@pytest.mark.slow
def test_sensitivity(run_used, tmp_path):
    accuracies, output = run_used("sensitivity.py", "--short")
    names = [f"sensitivity.{ending}" for ending in ("json", "md", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert output.splitlines()[-1] == f"Written to {tmp_path}: {', '.join(names)}"
    written = json.loads((tmp_path / names[0]).read_text())
    assert len(written) == len(accuracies) == 16
    best = max(a for run, a in accuracies.items() if run.variant == "auto")
    assert best > 0.8
    assert f"best {best:.2%}" in (tmp_path / names[1]).read_text()
    height, width, _ = imread(tmp_path / names[2]).shape
    assert 500 <= height < width <= 2500


def test_the_width_in_decades(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    width = runpy.run_path(str(EXAMPLES / "sensitivity.py"))["width"]
    rates, found = np.array([1e-4, 1e-3, 1e-2]), np.array([0.96, 0.98, 0.96])
    assert width(rates, found, 0.97) == pytest.approx(1, abs=1e-3)
    assert width(rates, found, 0.99) == 0
    assert width(rates, found, 0.9) == pytest.approx(2)


@pytest.mark.slow
def test_policy_gradient_balances_the_pole(run_used):
    returns, output = run_used("policy_gradient.py", "--steps=40")
    assert np.mean(returns[-100:]) > 400 > 4 * np.mean(returns[:50])
    assert f"{np.mean(returns[-100:]):.0f}." in output


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("policy_gradient.py", "--steps=0"),
        ("policy_gradient.py", "--seed=x"),
        ("policy_gradient.py", "--output=/dev/null"),
        ("compare_optimizers.py", "--seeds=0"),
        ("compare_optimizers.py", "--data=mine"),
    ],
)
def test_complaints_are_one_line(name, option, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit, match="2"):
        run(name, capsys, [option])
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: error: argument --")
    assert error.count("\n") == 1
