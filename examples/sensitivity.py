"""How sensitive is RMSprop to its hyperparameters? Heat maps, and widths in decades.

    python examples/sensitivity.py --data sample

It trains the MNIST network over a grid of learning rates with other values of rho and
of epsilon, and then with what should make the choice easier. For `"auto"` there is no
rate to choose: its axis is `AutoLearningRate(initial)`, the one guess that is left.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mnist_data
import mnist_train
import numpy as np
from command_line import OptionParser, announce_short, folder, quiet_start, whole
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Keras is imported where it is used: `--help` and a mistyped option need no TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

RATES = tuple(float(f"{10 ** (k / 2 - 5):.2g}") for k in range(9))  # 1e-5 to 1e-1
RHOS = (0.0, 0.5, 0.9, 0.99, 0.999)
EPSILONS = (1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1e-1)
RHO, EPSILON = 0.9, 1e-7  # the defaults
GOAL = 0.97  # of the test digits


class Run(NamedTuple):
    """What a training was given."""

    rate: float
    rho: float = RHO
    epsilon: float = EPSILON
    variant: str = "plain"


Accuracies = dict[Run, float]
"""For each training, the share of the test digits classified correctly."""


def variants() -> dict[str, Callable[[float, int], Any]]:
    """Return, by name, what makes an optimizer of a rate and the number of steps."""
    from keras.optimizers.schedules import PolynomialDecay

    from keras_rmsprop import AutoLearningRate, RMSprop

    averages: dict[str, Any] = {
        "use_ema": True,
        "ema_momentum": 0.998,
        "ema_warmup": True,
    }
    return {
        "plain": lambda rate, _: RMSprop(rate),
        "bias correction": lambda rate, _: RMSprop(rate, bias_correction=True),
        "clipping": lambda rate, _: RMSprop(rate, global_clipnorm=1.0),
        "EMA": lambda rate, _: RMSprop(rate, **averages),
        "linear decay": lambda rate, n: RMSprop(PolynomialDecay(rate, n, 0.0)),
        "auto": lambda first, _: RMSprop(AutoLearningRate(first)),
    }


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """Yield the trainings: both grids, then the variants."""
    rates = RATES[4::4] if options.short else RATES
    rhos = (0.0, RHO) if options.short else RHOS
    epsilons = (EPSILON, 1e-1) if options.short else EPSILONS
    for rate in rates:
        yield from (Run(rate, rho=rho) for rho in rhos)
        yield from (Run(rate, epsilon=e) for e in epsilons if e != EPSILON)
        yield from (Run(rate, variant=v) for v in variants() if v != "plain")


def train(run: Run, digits: mnist_data.Digits, options: argparse.Namespace) -> float:
    """Train the network, and return the share of the test digits that it tells right.

    Args:
        run: What it is given.
        digits: What to train and to test on.
        options: How long, and the seed.
    """
    import keras

    from keras_rmsprop import RMSprop

    keras.utils.set_random_seed(options.seed)
    model = mnist_train.network()
    steps = options.epochs * -(-len(digits.train_labels) // options.batch_size)
    optimizer = variants()[run.variant](run.rate, steps)
    if run.variant == "plain":
        optimizer = RMSprop(run.rate, rho=run.rho, epsilon=run.epsilon)
    # A short training is over before XLA has compiled it.
    model.compile(
        optimizer,
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.fit(
        digits.train_images,
        digits.train_labels,
        batch_size=options.batch_size,
        epochs=options.epochs,
        verbose=0,
    )
    test = digits.test_images, digits.test_labels
    return float(model.evaluate(*test, batch_size=1000, verbose=0)[1])


def grid(accuracies: Accuracies, name: str) -> tuple[list[float], NDArray[Any]]:
    """Return the values of an option, and accuracies: (values, rates).

    Args:
        accuracies: Of all trainings.
        name: `"rho"` or `"epsilon"`.
    """
    default = Run(0.0)
    of_it = {
        run: accuracy
        for run, accuracy in accuracies.items()
        if run._replace(**{"rate": 0.0, name: getattr(default, name)}) == default
    }
    values = sorted({getattr(run, name) for run in of_it})
    rates = sorted({run.rate for run in of_it})
    run = default._replace
    rows = [[of_it[run(rate=r, **{name: v})] for r in rates] for v in values]
    return values, np.array(rows)


def curve(accuracies: Accuracies, variant: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the rates, and the accuracies of a variant with its other defaults."""
    pairs = [
        (run.rate, accuracy)
        for run, accuracy in accuracies.items()
        if run == Run(run.rate, variant=variant)
    ]
    rates, found = np.array(sorted(pairs)).T
    return rates, found


def width(rates: NDArray[Any], accuracies: NDArray[Any], goal: float) -> float:
    """Return over how many decades of rates a goal is reached, between the ends tried.

    Args:
        rates: Learning rates, rising.
        accuracies: What each reaches; in between a straight line is drawn.
        goal: The goal.
    """
    x = np.log10(rates)
    fine = np.linspace(x[0], x[-1], 10_001)
    reached = np.interp(fine, x, accuracies) >= goal
    return float(reached.mean() * (x[-1] - x[0]))


def in_words(accuracies: Accuracies) -> list[str]:
    """Return what came out, a sentence each."""
    lines = []
    for variant in dict.fromkeys(run.variant for run in accuracies):
        rates, found = curve(accuracies, variant)
        decades, best = width(rates, found, GOAL), int(np.argmax(found))
        what = "first guesses" if variant == "auto" else "learning rates"
        reach = f"{decades:.1f} of {np.log10(rates[-1] / rates[0]):.0f} decades of"
        lines.append(
            f"{variant}: {reach} {what} reach {GOAL:.0%}; best {found[best]:.2%} at "
            f"{rates[best]:g}, worst {found.min():.2%}."
        )
    return lines


def table(accuracies: Accuracies) -> Table:
    """Return the accuracies of the variants, a column a rate."""
    rates, _ = curve(accuracies, "plain")
    shown = Table("test accuracy, %", box=box.MARKDOWN)
    for heading in [*(f"{rate:g}" for rate in rates), "decades"]:
        shown.add_column(heading, justify="right")
    for variant in dict.fromkeys(run.variant for run in accuracies):
        _, found = curve(accuracies, variant)
        decades = width(rates, found, GOAL)
        shown.add_row(variant, *(f"{100 * a:.1f}" for a in found), f"{decades:.1f}")
    return shown


def draw(path: Path, title: str, accuracies: Accuracies) -> None:
    """Draw two heat maps, and the accuracy of the variants over the learning rate."""
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    panels = figure.subplot_mosaic("ab;cc")
    maps, right = (panels["a"], panels["b"]), panels["c"]
    rates, _ = curve(accuracies, "plain")
    labels = [f"{rate:g}" for rate in rates]
    for axes, name in zip(maps, ("rho", "epsilon"), strict=True):
        values, found = grid(accuracies, name)
        # Most happens near the top: colours by the error, on a logarithmic scale.
        errors = np.log10(np.clip(1 - found, 0.01, 0.9))
        axes.imshow(errors, cmap="viridis_r", vmin=-2, vmax=0, aspect="auto")
        for (row, column), accuracy in np.ndenumerate(found):
            bright = errors[row, column] < -1.3
            axes.text(
                *(column, row, f"{100 * accuracy:.1f}"),
                ha="center",
                va="center",
                color="black" if bright else "white",
                weight="bold" if accuracy >= GOAL else "normal",
                size=8,
            )
        axes.set_xticks(range(len(rates)), labels, rotation=45)
        axes.set_yticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(xlabel="learning rate", ylabel=name)
        axes.set_title(f"Test accuracy in %; bold: {GOAL:.0%} and more", loc="left")
    styles = ("o-k", "s-C0", "^-C2", "D-C1", "v-C4", "P--C3")
    for variant, style in zip(
        dict.fromkeys(run.variant for run in accuracies), styles, strict=True
    ):
        rates, found = curve(accuracies, variant)
        label = f"{variant}: {width(rates, found, GOAL):.1f} decades"
        right.plot(rates, 100 * (1 - found), style, label=label, ms=5)
    right.axhline(100 * (1 - GOAL), color="0.6", ls=":", zorder=0)
    right.set(xscale="log", yscale="log", xlabel="learning rate (auto: initial)")
    right.set_title("Test error, %", loc="left")
    ticks = (2, 3, 5, 10, 20, 50)
    right.set_yticks(ticks, [f"{tick}" for tick in ticks])
    right.yaxis.set_minor_formatter("")
    right.grid(alpha=0.3)
    right.legend(title=f"reach {GOAL:.0%} over", loc="upper center", frameon=False)
    figure.suptitle(title, x=0.01, ha="left", size=15)
    figure.savefig(path, dpi=130)


def option_parser() -> OptionParser:
    """Return the parser of the command line."""
    parser = OptionParser(
        prog="sensitivity.py",
        description="How sensitive is RMSprop to its hyperparameters, on MNIST?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=whole(1), default=3, help="epochs of each training")
    add("--batch-size", type=whole(1), default=128, help="digits per step")
    add("--data", choices=["auto", "tfds", "sample"], default="auto", help="digits")
    add("--seed", type=whole(0), default=0, help="decides all that is random")
    add("--short", action="store_true", help="a coarse grid, an epoch, a sample")
    add("--output", type=folder, default="runs/sensitivity", help="folder to write to")
    return parser


def main(arguments: Sequence[str] | None = None) -> Accuracies:
    """Train, write down what came out, and return what each training reached."""
    options = option_parser().parse_args(arguments)
    if options.short:
        options.epochs, options.data = 1, "sample"
        announce_short("135 trainings of three epochs, in a quarter of an hour")
    console = Console()
    try:
        digits = mnist_data.load(options.data, options.seed)
    except mnist_data.MnistUnavailableError as error:
        option_parser().error(str(error))
    with quiet_start():
        import keras

        runs = list(plan(options))
    accuracies: Accuracies = {}
    for run in track(
        runs, f"{len(runs)} trainings on {digits.source}", console=console
    ):
        accuracies[run] = train(run, digits, options)
        keras.utils.clear_session()  # its graphs would fill the memory
    shown, words = table(accuracies), in_words(accuracies)
    console.print(shown)
    console.print(*words, sep="\n", soft_wrap=True)
    to: Path = options.output
    files = [to / f"sensitivity.{ending}" for ending in ("json", "md", "png")]
    lines = [run._asdict() | {"accuracy": a} for run, a in accuracies.items()]
    files[0].write_text(json.dumps(lines, indent=1))
    with files[1].open("w") as file:
        Console(file=file, width=200).print(shown, "", *words, sep="\n")
    epochs = "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs"
    draw(files[2], f"RMSprop after {epochs} of {digits.source}", accuracies)
    names = ", ".join(file.name for file in files)
    console.print(f"Written to {to}: {names}", soft_wrap=True)
    return accuracies


if __name__ == "__main__":
    main()
