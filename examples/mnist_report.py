"""What `mnist_train.py` shows and writes."""

import csv
import importlib.metadata
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from mnist_data import Digits
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

SEARCHING = 100
"""In fewer steps "auto" has hardly found its learning rate."""

BLUE, ORANGE, GREY = "#2a78d6", "#e8710a", "#6b6a66"


@dataclass(frozen=True)
class Run:
    """What one optimizer did.

    Attributes:
        optimizer: Its name.
        history: Loss and accuracy, in training and validation, and the learning rate in
            use, one number an epoch.
        seconds: How long each epoch took, validation included.
        first_step: Seconds until the first batch was trained: mostly tracing. Whoever
            comes first in the program waits for TensorFlow's own start too.
        test_loss: Mean loss on the test digits.
        test_accuracy: Share of the test digits that are classified correctly.
        steps: How many batches were trained.
    """

    optimizer: str
    history: dict[str, list[float]]
    seconds: list[float]
    first_step: float
    test_loss: float
    test_accuracy: float
    steps: int

    @property
    def seconds_an_epoch(self) -> float:
        """The median epoch; the first, which compiles, counts only if it is alone."""
        return statistics.median(self.seconds[1:] or self.seconds)


def loss_difference(runs: Sequence[Run]) -> tuple[float, int]:
    """Return where the training losses of the first two runs differ most.

    Args:
        runs: The runs.

    Returns:
        The difference, relative to the second run's loss, and its epoch (from 1). It is
        NaN where a loss is.
    """
    ours, theirs = (np.array(run.history["loss"]) for run in runs[:2])
    with np.errstate(invalid="ignore"):  # both infinite
        differences = np.abs(ours - theirs) / np.maximum(theirs, np.finfo(float).tiny)
    return float(differences.max()), int(differences.argmax()) + 1


def difference_in_words(runs: Sequence[Run]) -> str:
    """Return one sentence that says how far the first two loss curves lie apart.

    Args:
        runs: The runs.
    """
    difference, epoch = loss_difference(runs)
    if not math.isfinite(difference):
        return "Training diverged: the loss curves cannot be compared."
    if difference == 0:
        return "The two training losses are equal to the last digit, in every epoch."
    return (
        f"The two training losses differ by at most {difference:.1e} (relative), "
        f"in epoch {epoch}."
    )


def announce(digits: Digits) -> None:
    """Print which digits these are, loudly where they are not those looked for.

    Args:
        digits: The digits.
    """
    console = Console()
    sizes = (
        f"{len(digits.train_labels):,} digits to train on, "
        f"{len(digits.test_labels):,} for the test"
    )
    if digits.why_not_all is None:
        console.print(f"\n[bold]Data:[/] {digits.source}, {sizes}")
        return
    text = (
        f"[bold]This is not all of MNIST, but a sample: {sizes}.[/]\n"
        "After ten epochs expect an accuracy of 92 to 93 % instead of 97.5 %.\n\n"
        + escape(digits.why_not_all)
    )
    console.print(Panel(text, title="A sample only", border_style="yellow"))


def show(output: Path, digits: Digits, runs: Sequence[Run]) -> None:
    """Print the results.

    Args:
        output: The folder with the files.
        digits: What was trained on.
        runs: What happened.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("optimizer", "data"):
        table.add_column(heading, no_wrap=True, vertical="bottom")
    for heading in (
        "test\naccuracy",
        "test\nloss",
        "seconds\nper epoch",
        "first\nstep",
    ):
        table.add_column(heading, justify="right", vertical="bottom")
    for run in runs:
        table.add_row(
            run.optimizer,
            digits.source,
            f"{run.test_accuracy:.2%}",
            f"{run.test_loss:.4f}",
            f"{run.seconds_an_epoch:.2f}",
            f"{run.first_step:.2f} s",
        )
    print()
    Console().print(table)
    logs = output / "tensorboard"
    if logs.exists():
        command = f"{sys.executable} -m tensorboard.main --logdir {logs}"
        print(f"\nTo see it in a browser: {command}")
    print(f"\n{difference_in_words(runs)}")
    found = runs[2].history["learning_rate"][-1]
    print(f'"auto" ended at a learning rate of {found:.4g}.')
    if runs[2].steps < SEARCHING:
        print(f"That was after only {runs[2].steps} steps: take more epochs.")
    files = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"Written to {output}: {files}")


def write(
    output: Path, options: dict[str, Any], digits: Digits, runs: Sequence[Run]
) -> None:
    """Write `history.csv`, `summary.json` and `comparison.png`.

    Args:
        output: The folder to write to.
        options: The options of the program.
        digits: What was trained on.
        runs: What happened.
    """
    import keras

    with (output / "history.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["optimizer", "epoch", *runs[0].history, "seconds"])
        for run in runs:
            columns = zip(*run.history.values(), run.seconds, strict=True)
            for epoch, values in enumerate(columns, 1):
                rows.writerow([run.optimizer, epoch, *values])

    difference, epoch = loss_difference(runs)
    packages = ("keras", keras.backend.backend(), "keras_rmsprop")
    summary = {
        "options": options | {"output": str(options["output"])},
        "data": {
            "source": digits.source,
            "train": len(digits.train_labels),
            "test": len(digits.test_labels),
            "why_not_all": digits.why_not_all,
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "results": {
            run.optimizer: {
                "test_accuracy": run.test_accuracy,
                "test_loss": _json(run.test_loss),
                "seconds_an_epoch": run.seconds_an_epoch,
                "first_step_seconds": run.first_step,
            }
            for run in runs
        },
        "loss_difference": {"relative": _json(difference), "epoch": epoch},
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(output / "comparison.png", digits, runs)


def _json(number: float) -> float | None:
    """Return `number`, or `None` for NaN and infinities, which JSON does not know."""
    return number if math.isfinite(number) else None


def draw(path: Path, digits: Digits, runs: Sequence[Run]) -> None:
    """Draw loss and accuracy of three runs, and the learning rates of two.

    The first run is a broad line and the second rings on it: where they coincide, both
    can be seen. The third chooses its own rate.

    Args:
        path: The PNG to write.
        digits: What was trained on.
        runs: The three.
    """
    epochs = range(1, len(runs[0].seconds) + 1)
    broad: dict[str, Any] = {"lw": 6, "alpha": 0.35, "solid_capstyle": "round"}
    if len(epochs) == 1:
        broad |= {"marker": "o", "ms": 15, "mew": 0}
    rings: dict[str, Any] = {"lw": 1, "ls": "--", "marker": "o", "ms": 5.5}
    rings |= {"mfc": "white", "mew": 1.5, "markevery": -(-len(epochs) // 20)}
    auto: dict[str, Any] = {"lw": 1.8, "marker": "D", "ms": 4}
    styles = broad, rings, auto

    margins = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(13, 5.4), layout=margins)
    *both, right = figure.subplots(1, 3)
    for axes, what in zip(both, ("loss", "accuracy"), strict=True):
        curves = {"training": (what, BLUE), "validation": (f"val_{what}", ORANGE)}
        last = {part: runs[0].history[key][-1] for part, (key, _) in curves.items()}
        lower = min(last, key=last.__getitem__)
        for part, (key, color) in curves.items():
            for run, style in zip(runs, styles, strict=True):
                axes.plot(epochs, run.history[key], color=color, **style)
            axes.annotate(
                part,
                (epochs[-1], last[part]),
                xytext=(12, 0),
                textcoords="offset points",
                va="top" if part == lower else "bottom",
                color=color,
                weight="bold",
            )
        axes.set_title(what.capitalize(), loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    for run, style in zip(runs, styles, strict=True):
        right.plot(epochs, run.history["learning_rate"], color=GREY, **style)
    right.set_title("Learning rate", loc="left")
    right.set_ylim(0)
    for axes in (*both, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, len(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y", color="#e4e3df")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"RMSprop on {digits.source}", x=0.015, ha="left", size=15)
    figure.legend(
        [Line2D([], [], color=GREY, **style) for style in styles],
        [run.optimizer for run in runs],
        loc="outside upper right",
        ncols=3,
        frameon=False,
    )
    figure.supxlabel(difference_in_words(runs), x=0.015, ha="left", color=GREY, size=11)
    figure.savefig(path, dpi=150)
