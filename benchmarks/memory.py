"""What slots of fewer bytes cost: bytes a parameter, and how well they train.

    python benchmarks/memory.py [--seeds N] [--scale S]

Some networks of `tuning_tasks.py` are trained with the same rates and seeds, with slots
in float32, in bfloat16 and in bytes. Every result is written at once. The times of a
step are those of `bench.py --only memory`.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import tuning
from sentences import between
from tuning_competitors import Competitor, MakeOptimizer, Result, Run

HERE = Path(__file__).parent
RUNS = HERE / "results" / "memory_runs.jsonl"
FIGURES, PICTURE = (HERE / "results" / f"memory.{kind}" for kind in ("json", "png"))
PAGE = HERE.parent / "docs" / "memory.md"
BEGIN, END = "<!-- benchmark:memory -->\n", "<!-- /benchmark -->\n"
RATES = {"mnist": 0.00316, "cnn": 0.00316, "gru": 0.01, "text": 0.00316}
"""The built-in's best rates, by `tuning.py`."""
OF_ADAFACTOR = 0.00316, 0.01, 0.0316
ELEMENTS = [(2048, 2048), (2048, 2048), (1024, 2048)]
"""Of a model of ten million parameters in matrices."""
OF_BITSANDBYTES = "1.002 to 1.016"
"""By its sources: a float32 for each 2048 codes in older versions, each 256 in newer.
It runs on GPUs only, so it trains nothing here."""
KEPT = {
    "v in uint8": ("uint8", 0),
    "momentum in uint8": ("uint8", 1),
    "bfloat16": ("bfloat16", 0),
}
"""Dtype, and which slot."""
DECADES = 7
WITHIN = {"accuracy": 0.2, "loss": 0.01}
"""How far from float32 the mean of a test may be: points, or a share of the loss."""


def ours(slot_dtype: Any, auto: bool = False) -> MakeOptimizer:
    """Return what makes this RMSprop with slots of a dtype."""

    def make(rate: float, steps: int) -> Any:
        from keras_rmsprop import RMSprop

        return RMSprop("auto" if auto else rate, slot_dtype=slot_dtype)

    return make


def of_keras(name: str) -> MakeOptimizer:
    """Return what makes an optimizer of Keras."""

    def make(rate: float, steps: int) -> Any:
        import keras

        return getattr(keras.optimizers, name)(rate)

    return make


COMPETITORS = {
    "float32": Competitor("this, float32", ours(None)),
    "bfloat16": Competitor("this, bfloat16", ours("bfloat16")),
    "uint8": Competitor("this, uint8", ours("uint8")),
    **{
        f"auto, {dtype}": Competitor(
            f'this, "auto", {dtype}',
            ours(None if dtype == "float32" else dtype, auto=True),
            averages=True,
        )
        for dtype in ("float32", "bfloat16", "uint8")
    },
    "adam": Competitor("Keras' Adam", of_keras("Adam")),
    "adafactor": Competitor("Keras' Adafactor", of_keras("Adafactor")),
}
TWINS = {
    f"{kind}{dtype}": f"{kind}float32"
    for kind in ("", "auto, ")
    for dtype in ("bfloat16", "uint8")
}
"""Whose result theirs is to be."""


def rates(task: str, who: str) -> tuple[float, ...]:
    """Return the rates that a competitor trains with."""
    if who.startswith("auto"):
        return (1.0,)  # a factor
    return OF_ADAFACTOR if who == "adafactor" else (RATES[task],)


def bytes_a_parameter(make: Callable[[float, int], Any]) -> float:
    """Return the bytes that an optimizer keeps, counted from its variables."""
    import keras

    optimizer = make(0.001, 1)
    optimizer.build([keras.Variable(keras.ops.zeros(shape)) for shape in ELEMENTS])
    kept = sum(v.numpy().nbytes for v in optimizer.variables)
    return float(kept / sum(map(math.prod, ELEMENTS)))


def score(results: Mapping[Run, Result], task: str, who: str) -> Any:
    """Return the best rate's `tuning_scores.Score`, or None if it did not run."""
    import tuning_scores
    import tuning_tasks

    found = [tuning_scores.score(results, task, who, x) for x in rates(task, who)]
    task_ = tuning_tasks.EVERY[task]
    return max(
        (x for x in found if x is not None),
        key=lambda x: tuning_scores.rank(task_, x),
        default=None,
    )


def verdict(results: Mapping[Run, Result], task: str, who: str) -> str:
    """Return how far a competitor is from its twin, in words; bold if too far."""
    import tuning_tasks

    mine, theirs = (score(results, task, x) for x in (who, TWINS[who]))
    if mine is None or theirs is None:
        return ""
    metric = tuning_tasks.EVERY[task].metric
    difference = mine.mean - theirs.mean
    if metric == "loss":
        difference /= theirs.mean
        worse, text = difference, f"{100 * difference:+.2f} %"
    else:
        worse, text = -difference, f"{difference:+.2f}"
    return text if worse <= WITHIN[metric] else f"**{text}**"


def times() -> dict[str, str]:
    """Return the milliseconds of an update of 16 M, as far as they were measured."""
    import report

    parts = report.load(report.RESULTS / report.FIGURES)
    if "memory" not in parts:
        return {}
    names = {
        "float32": ("this, eager", "plain"),
        "bfloat16": ("bfloat16, eager", "plain"),
        "uint8": ("uint8, eager", "plain"),
        "adam": ("Adam, eager", "plain"),
        "adafactor": ("Adafactor, eager", "plain"),
    }
    return {
        who: parts["memory"].text((name, "16 M", how))
        for who, (name, how) in names.items()
    }


def rows(results: Mapping[Run, Result]) -> list[list[str]]:
    """Return the table: the headings, then a row each competitor."""
    import tuning_tasks

    tasks = [t for t in RATES if any(run.task == t for run in results)]
    table = [["", "bytes per parameter"]]
    for task in tasks:
        of = tuning_tasks.EVERY[task]
        metric = "accuracy %" if of.metric == "accuracy" else "loss"
        table[0].append(f"{of.title}, {metric}")
    table[0].append("update of 16 M, ms")
    took = times()
    for who, competitor in COMPETITORS.items():
        cells = [competitor.name, f"{bytes_a_parameter(competitor.make):.3f}"]
        for task in tasks:
            found = score(results, task, who)
            text = ""
            if found is not None:
                mean, low, high = (f"{x:.4g}" for x in found[:3])
                text = f"{mean} ({low}-{high})"
            if who in TWINS:
                text += f"; {verdict(results, task, who)}"
            cells.append(text)
        table.append([*cells, took.get(who, "")])
    table.append(
        ["bitsandbytes' RMSprop8bit", OF_BITSANDBYTES, *(len(tasks) + 1) * [""]]
    )
    return table


def errors() -> dict[str, list[float]]:
    """Return relative errors of what is kept, by how, a value each power of ten.

    The first is of numbers from a tenth of the largest one in their block on. They are
    spread evenly over logarithms, and rounded at random. The error is the root of the
    mean square.
    """
    import keras
    import numpy as np

    from keras_rmsprop import codecs

    found: dict[str, list[float]] = {name: [] for name in KEPT}
    for decade in range(DECADES):
        x = np.geomspace(0.1, 1, 255 * 128) * 10.0**-decade
        x = np.random.default_rng(0).permutation(x).reshape(-1, 255)
        x = np.insert(x, 0, 1.0, axis=1).astype("float32")
        for name, (dtype, slot) in KEPT.items():
            codec = codecs.named(dtype)
            stored = codec.encode(x, dtype, codecs.Draw(0, 1), slot)
            kept = codec.decode(stored, "float32", x.shape, slot)
            error = (keras.ops.convert_to_numpy(kept) / x - 1)[:, 1:]
            found[name].append(float(np.sqrt(np.mean(error**2))))
    return found


def draw(found: Mapping[str, list[float]], path: Path) -> None:
    """Draw the errors, a group of bars each power of ten."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.9 / len(found)
    for i, ((name, values), color) in enumerate(
        zip(found.items(), ("#2a78d6", "#1a9076", "#6b6a66"), strict=True)
    ):
        places = [decade + (i - 1) * width for decade in range(DECADES)]
        bars = axes.bar(places, values, 0.92 * width, color=color, label=name)
        labels = [f"{100 * value:.2g}" if value < 1 else ">100" for value in values]
        axes.bar_label(bars, labels, size=7, color=color)
    ends = ["1", "0.1", "0.01", *(f"$10^{{-{n}}}$" for n in range(3, DECADES + 1))]
    axes.set_xticks(
        range(DECADES), [f"{ends[n + 1]} to {ends[n]}" for n in range(DECADES)]
    )
    axes.set_xlabel("number, as a share of the largest one in its block")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 4)
    axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
    axes.set_ylabel("relative error, root of the mean square")
    axes.grid(axis="y", color="#e4e3df")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train what is missing, print the table, publish it if it is whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the steps")
    parser.add_argument("--publish", action="store_true", help="no training")
    options = parser.parse_args()
    done = tuning.finished(RUNS)
    runs = [
        Run(task, who, rate, seed, options.scale)
        for seed in range(options.seeds)
        for task in RATES
        for who in COMPETITORS
        for rate in rates(task, who)
    ]
    if not options.publish:
        tuning.train([run for run in runs if run not in done], RUNS, COMPETITORS)
    import tuning_report  # and with it Keras

    results = {r: x for r, x in tuning.finished(RUNS).items() if r in {*runs}}
    table = rows(results)
    text = tuning_report.markdown(table)
    sys.stdout.write(text)
    if options.scale != 1 or len(results) < len(runs):
        return
    harness.fix_threads()
    found = errors()
    report = {"machine": harness.machine(), "table": table, "errors": found}
    FIGURES.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    draw(found, PICTURE)
    PAGE.write_text(between(PAGE.read_text(), BEGIN, END, text))


if __name__ == "__main__":
    main()
