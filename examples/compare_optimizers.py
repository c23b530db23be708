"""Compare optimizers on MNIST: after as many epochs, and after as much time.

    python examples/compare_optimizers.py --epochs 3 --data sample

With each seed all start from the same weights and see the same batches. No rate was
tuned: the table says where each is from. `make tuning` compares whole grids of rates.
"""

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mnist_data
import mnist_report
import mnist_train
import numpy as np
from command_line import OptionParser, announce_short, folder, quiet_start, whole
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich import box, progress
from rich.console import Console
from rich.table import Table

# Keras is imported where it is used: `--help` and a mistyped option need no TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

OURS, THEIRS = "this RMSprop", "Keras' RMSprop"


@dataclass
class Rival:
    """An optimizer to compare, and what it did.

    Attributes:
        make: Makes it.
        rate: Its learning rate, and where that is from.
        color: Of Okabe's and Ito's, which the colour-blind tell apart.
        line: Marker and line, as matplotlib writes them.
        runs: By seed; validation is the test.
    """

    make: Callable[[], Any]
    rate: str
    color: str
    line: str
    runs: list[mnist_report.Run] = field(default_factory=list)

    @property
    def accuracy(self) -> NDArray[Any]:
        """Test accuracy in percent: (seeds, epochs)."""
        return 100 * np.array([run.history["val_accuracy"] for run in self.runs])

    @property
    def seconds(self) -> NDArray[Any]:
        """When each epoch ended, if all are as long as the median one."""
        median = statistics.median(run.seconds_an_epoch for run in self.runs)
        return median * np.arange(1, self.accuracy.shape[1] + 1)

    def at(self, seconds: float) -> NDArray[Any]:
        """Return the test accuracy of each seed at a time.

        Args:
            seconds: Between two epochs it is read off the line that joins them.
        """
        return np.array([np.interp(seconds, self.seconds, a) for a in self.accuracy])


Rivals = dict[str, Rival]


def make_rivals() -> Rivals:
    """Return the optimizers to compare, by name."""
    from keras.optimizers import SGD, Adadelta, Adagrad, Adam
    from keras.optimizers import RMSprop as BuiltIn

    from keras_rmsprop import RMSprop

    def momentum() -> Any:
        return RMSprop(0.0001, momentum=0.9)

    def auto() -> Any:
        return RMSprop("auto")

    def sgd_momentum() -> Any:
        return SGD(0.01, momentum=0.9)

    def adadelta() -> Any:
        return Adadelta(1.0, rho=0.95, epsilon=1e-6)

    default = "0.001, Keras' default"
    tenth = "a tenth of that without"  # momentum 0.9 repeats each step ten times
    rest = "found; averaged weights"
    return {
        OURS: Rival(lambda: RMSprop(), default, "#56b4e9", "o-"),
        f"{OURS}, momentum": Rival(momentum, f"0.0001, {tenth}", "#0072b2", "s-"),
        f"{OURS}, auto": Rival(auto, rest, "#d55e00", "D-"),
        THEIRS: Rival(lambda: BuiltIn(), default, "#000000", "o--"),
        "SGD": Rival(lambda: SGD(0.1), "0.1, customary", "#8a8a8a", "v-"),
        "SGD, momentum": Rival(sgd_momentum, f"0.01, {tenth}", "#8a8a8a", "^:"),
        "Adagrad": Rival(lambda: Adagrad(0.01), "0.01, PyTorch's", "#e69f00", "<-"),
        "Adadelta": Rival(adadelta, "1.0, its paper's", "#009e73", ">-"),
        "Adam": Rival(lambda: Adam(), default, "#cc79a7", "P-"),
    }


def train(name: str, optimizer: Any, digits: mnist_data.Digits, **fit: Any) -> Any:
    """Train the network, test it after every epoch, and return what happened.

    Args:
        name: The optimizer's name.
        optimizer: The optimizer.
        digits: What to train and to test on.
        **fit: Arguments of `fit`.
    """
    import keras

    from keras_rmsprop.callbacks import AverageForEvaluation

    model = mnist_train.network()
    loss = "sparse_categorical_crossentropy"
    model.compile(optimizer, loss, metrics=["accuracy"])
    begun, stepped, ended = list[float](), list[float](), list[float]()

    def note(times: list[float]) -> Callable[..., None]:
        return lambda *_, **__: times.append(time.perf_counter())

    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=note(begun),
        on_train_batch_end=note(stepped),
        on_test_begin=note(ended),  # the test does not count as training
    )
    averages = [AverageForEvaluation()] if optimizer.use_ema else []
    history = model.fit(
        digits.train_images,
        digits.train_labels,
        validation_data=(digits.test_images, digits.test_labels),
        callbacks=[clock, *averages, *fit.pop("callbacks")],
        verbose=0,
        **fit,
    ).history
    return mnist_report.Run(
        optimizer=name,
        history=history,
        seconds=np.subtract(ended, begun).tolist(),
        first_step=stepped[0] - begun[0],
        test_loss=history["val_loss"][-1],
        test_accuracy=history["val_accuracy"][-1],
        steps=int(optimizer.iterations),
    )


def ahead(accuracies: dict[str, NDArray[Any]]) -> str:
    """Return in words who is best, by how much, and whether that says anything.

    Args:
        accuracies: By optimizer, of each seed, in percent.
    """
    first, second, *_ = sorted(accuracies, key=lambda name: -accuracies[name].mean())
    best, next_best = accuracies[first], accuracies[second]
    words = f"{first} is ahead: {best.mean():.2f} %, {second} {next_best.mean():.2f} %"
    if len(best) == 1:
        return f"{words}; one seed cannot say whether by chance."
    if best.min() > next_best.max():
        return f"{words}. Its worst seed beats the other's best."
    return f"{words}. The ranges of the seeds overlap."


def equal_time(rivals: Rivals) -> tuple[str, float]:
    """Return who is done first, and when: the time at which all are compared."""
    fastest = min(rivals, key=lambda name: rivals[name].seconds[-1])
    return fastest, rivals[fastest].seconds[-1]


def in_words(rivals: Rivals) -> list[str]:
    """Return what came out, a sentence or two each."""
    fastest, seconds = equal_time(rivals)
    at_once = {name: rival.at(seconds) for name, rival in rivals.items()}
    at_end = {name: rival.accuracy[:, -1] for name, rival in rivals.items()}
    ours, theirs = at_end[OURS], at_end[THEIRS]
    apart = abs(ours.mean() - theirs.mean())
    agree = "agree" if apart <= max(np.ptp(ours), np.ptp(theirs)) else "differ"
    pairs = zip(rivals[OURS].runs, rivals[THEIRS].runs, strict=True)
    loss = max(mnist_report.loss_difference(pair)[0] for pair in pairs)
    return [
        f"After {rivals[OURS].accuracy.shape[1]} epochs {ahead(at_end)}",
        f"After {seconds:.1f} s, when {fastest} is done, {ahead(at_once)}",
        f"At the end {OURS} and {THEIRS} {agree}: they are {apart:.2f} points apart. "
        f"Their training losses differ by {loss:.1g} (relative) at most.",
    ]


def table(rivals: Rivals) -> Table:
    """Return what came out as a table."""
    seconds = equal_time(rivals)[1]
    shown = Table("optimizer", "learning rate", box=box.MARKDOWN)
    for heading in ("test", "of seeds", f"at {seconds:.1f} s", "s/epoch", "1st step"):
        shown.add_column(heading, justify="right")
    for name, rival in rivals.items():
        end = rival.accuracy[:, -1]
        shown.add_row(
            name,
            rival.rate,
            f"{end.mean():.2f} %",
            f"{end.min():.2f}-{end.max():.2f}",
            f"{rival.at(seconds).mean():.2f} %",
            f"{rival.seconds[0]:.2f}",
            f"{statistics.median(run.first_step for run in rival.runs):.1f} s",
        )
    return shown


def draw(path: Path, title: str, rivals: Rivals) -> None:
    """Draw the test error: over epochs, over time, at the end."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))
    for row, (name, rival) in enumerate(rivals.items()):
        # Ours is broad: where it coincides with the built-in both can be seen.
        broad = {"lw": 7, "ms": 11, "alpha": 0.5} if name == OURS else {}
        errors = 100 - rival.accuracy
        for axes, x in ((left, range(1, errors.shape[1] + 1)), (middle, rival.seconds)):
            axes.plot(x, errors.mean(axis=0), rival.line, color=rival.color, **broad)
            band = errors.min(axis=0), errors.max(axis=0)
            axes.fill_between(x, *band, color=rival.color, alpha=0.12, lw=0)
        ends = errors[:, -1]
        right.plot(ends, [row] * len(ends), rival.line[0], color=rival.color, alpha=0.6)
        right.plot([ends.mean()] * 2, [row - 0.3, row + 0.3], color=rival.color, lw=3)
    fastest, seconds = equal_time(rivals)
    middle.axvline(seconds, color=mnist_report.GREY, ls="--", lw=1)
    where: Any = "data", "axes fraction"
    middle.annotate(f" {fastest} is done", (seconds, 1), xycoords=where)
    left.set_ylabel("test error, %", size=12)
    left.set_xlabel("epoch", size=12)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    middle.set_xlabel("seconds of training, without compiling", size=12)
    right.set_xlabel("at the end: a dot per seed, a bar for the mean", size=12)
    right.xaxis.set_major_formatter("{x:g} %")
    right.set_yticks(range(len(rivals)), list(rivals), size=12)
    right.invert_yaxis()
    for label, rival in zip(right.get_yticklabels(), rivals.values(), strict=True):
        label.set(color=rival.color, weight="bold")
    for axes in (left, middle):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.yaxis.set_minor_formatter("{x:g} %")
    for axes in (left, middle, right):
        which = "x" if axes is right else "y"
        axes.grid(axis=which, which="both", color="#e4e3df")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", size=15)
    words = "\n".join(in_words(rivals))
    figure.supxlabel(words, x=0.01, ha="left", color=mnist_report.GREY, size=12)
    figure.savefig(path, dpi=110)


def write(output: Path, title: str, rivals: Rivals) -> None:
    """Write the picture, the numbers and the table, and print the table."""
    draw(output / "comparison.png", title, rivals)
    runs = {name: [asdict(run) for run in rival.runs] for name, rival in rivals.items()}
    found = {"title": title, "words": in_words(rivals), "runs": runs}
    (output / "comparison.json").write_text(json.dumps(found, indent=2) + "\n")
    page = io.StringIO()
    console = Console(file=page, width=140)
    console.print(title, table(rivals), *in_words(rivals), sep="\n\n", soft_wrap=True)
    text = "\n".join(line.rstrip() for line in page.getvalue().splitlines())
    (output / "comparison.md").write_text(text + "\n")
    print(text)
    print(f"\nWritten to {output}: comparison.json, comparison.md, comparison.png")


def main(arguments: Sequence[str] | None = None) -> Rivals:
    """Compare, write what came out, and return it, the best first."""
    parser = OptionParser(
        prog="compare_optimizers.py",
        description="Compare optimizers on the MNIST network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=whole(1), default=5, help="times through the digits")
    add("--seeds", type=whole(1), default=3, help="how many times, from other weights")
    add("--batch-size", type=whole(1), default=128, help="digits per step")
    data = ("auto", "tfds", "sample")
    add("--data", choices=data, default="auto", help="as with mnist_train.py")
    short = "--epochs=2 --seeds=1 --data=sample: see that it runs"
    add("--short", action="store_true", help=short)
    add("--output", type=folder, default="runs/compare", help="folder for the results")
    options = parser.parse_args(arguments)
    if options.short:
        options.epochs, options.seeds, options.data = 2, 1, "sample"
        announce_short("five epochs of MNIST with three seeds, in some minutes")
    try:
        digits = mnist_data.load(options.data, 0)
    except mnist_data.MnistUnavailableError as error:
        parser.error(str(error))
    with quiet_start():
        import keras
    mnist_report.announce(digits)
    mnist_train.warm_up(digits)

    rivals = make_rivals()
    fit = {"epochs": options.epochs, "batch_size": options.batch_size}
    with progress.Progress(transient=True) as bar:
        task = bar.add_task("", total=options.epochs * options.seeds * len(rivals))
        step = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_, **__: bar.advance(task)
        )
        for seed in range(options.seeds):
            for name, rival in rivals.items():
                bar.update(task, description=f"seed {seed}, {name:<22}")
                keras.utils.set_random_seed(seed)
                run = train(name, rival.make(), digits, callbacks=[step], **fit)
                rival.runs.append(run)
    ranks = sorted(rivals, key=lambda name: -rivals[name].accuracy[:, -1].mean())
    rivals = {name: rivals[name] for name in ranks}

    title = f"{digits.source}, 784-128-128-10, batches of {options.batch_size}"
    write(options.output, f"{title}, seeds: {options.seeds}", rivals)
    return rivals


if __name__ == "__main__":
    main()
