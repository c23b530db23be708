"""What `tuning.py` prints, draws and writes."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import picture
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from tuning_competitors import COMPETITORS, DEFAULT, RATES, Result, Run
from tuning_tasks import HELD_OUT, TASKS, Task

HERE = Path(__file__).parent
FIGURES = HERE / "results" / "tuning.json"
PICTURE = HERE / "results" / "tuning.png"
ALL = HERE / "results" / "tuning.md"
HEADING = """# All results of `make tuning`

A cell: the mean over the seeds; in brackets the lowest and the highest; after "at" the
best rate, or with "auto" the rate at the end.

"""
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmark:tuning -->\n", "<!-- /benchmark -->\n"
COLORS = {"constant": "#e8710a", "decay": "#c9a227", "adam": "#6b6a66"}
COLORS |= {"average": "#1a9076", "auto": "#2a78d6", "prodigy": "#9b3fb5"}
EVERY = TASKS | HELD_OUT
Results = Mapping[Run, Result]


class Score(NamedTuple):
    """Mean and spread over the seeds at one rate; NaN where a training failed."""

    mean: float
    low: float
    high: float
    rate: float
    seeds: int


def score(
    results: Results, task: str, who: str, rate: float, field: str = "value"
) -> Score | None:
    """Return what a competitor reached at one rate, if it ran.

    Args:
        results: What ran.
        task: The network.
        who: The competitor.
        rate: The learning rate.
        field: Which of a result's numbers.
    """
    got = [
        (getattr(result, field), result.rate)
        for given, result in results.items()
        if (given.task, given.competitor, given.rate) == (task, who, rate)
    ]
    if not got:
        return None
    values, rates = np.array(got).T
    values = values * EVERY[task].factor
    mean, low, high = (float(f(values)) for f in (np.mean, np.min, np.max))
    return Score(mean, low, high, float(np.median(rates)), len(values))


def rank(task: Task, found: Score) -> float:
    """Return a number that is greater the better a score is."""
    if not math.isfinite(found.mean):
        return -math.inf
    return found.mean if task.metric == "accuracy" else -found.mean


def best(results: Results, task: str, who: str) -> Score | None:
    """Return a competitor's best rate, by the mean over the seeds.

    Where only some rates were tried with all seeds, the others do not count.
    """
    rates = COMPETITORS[who].rates
    scores = [s for r in rates if (s := score(results, task, who, r)) is not None]
    seeds = max((s.seeds for s in scores), default=0)
    whole = [s for s in scores if s.seeds == seeds]
    return max(whole, key=lambda s: rank(EVERY[task], s), default=None)


def at(who: str, rate: float, field: str = "value") -> Callable[..., Score | None]:
    """Return what finds a competitor's score at a rate."""
    return lambda results, task: score(results, task, who, rate, field)


def of_best(who: str) -> Callable[..., Score | None]:
    """Return what finds a competitor's best score."""
    return lambda results, task: best(results, task, who)


COLUMNS: dict[str, Callable[..., Score | None]] = {
    "built-in, default": at("constant", DEFAULT),
    "built-in, best rate": of_best("constant"),
    "built-in, best rate, linear decay": of_best("decay"),
    "Adam, default": at("adam", DEFAULT),
    "Adam, best rate": of_best("adam"),
    "this, default rate, EMA": at("average", DEFAULT),
    "this, best rate, EMA": of_best("average"),
    'this, "auto"': at("auto", 1.0, "raw"),
    'this, "auto", EMA': at("auto", 1.0),
    "Prodigy": at("prodigy", 1.0),
}


def rows(results: Results) -> list[list[str]]:
    """Return the table: the headings, then a row each competitor."""
    tasks = [name for name in EVERY if any(given.task == name for given in results)]
    heads = [
        f"{t.title}, {'accuracy %' if t.metric == 'accuracy' else 'loss'}"
        + (f" × {t.factor:g}" if t.metric == "loss" and t.factor != 1 else "")
        for t in map(EVERY.__getitem__, tasks)
    ]
    table = [["", *heads]]
    for name, find in COLUMNS.items():
        cells = []
        for task in tasks:
            found = find(results, task)
            cells.append(cell(found) if found else "")
        table.append([name, *cells])
    return table


def cell(found: Score) -> str:
    """Return the mean, the range over the seeds in brackets, and the rate."""
    if not math.isfinite(found.mean):
        return "failed"
    mean, low, high = (f"{number:.4g}" for number in found[:3])
    range_ = f" ({low}-{high})" if found.seeds > 1 else " (one seed)"
    return f"{mean}{range_} at {found.rate:.2g}"


def markdown(table: list[list[str]]) -> str:
    """Return a table as it is on a page."""
    lines = ["| " + " | ".join(line) + " |\n" for line in table]
    lines.insert(1, "|:--" + "|--:" * (len(table[0]) - 1) + "|\n")
    return "".join(lines)


def show(results: Results) -> None:
    """Print the table and whether "auto" holds what it shall."""
    lines = rows(results)
    turned = [list(column) for column in zip(*lines, strict=True)]
    table = Table(*turned[0], box=box.SIMPLE)
    for line in turned[1:]:
        table.add_row(*line)
    Console(width=240).print(table)
    for sentence in verdicts(results):
        print(sentence)


def verdicts(results: Results) -> list[str]:
    """Say how often "auto" with the average beats default and best, and by how much."""
    sentences = []
    for name in ("built-in, default", "built-in, best rate"):
        behind, count = [], 0
        for task in TASKS:
            mine = COLUMNS['this, "auto", EMA'](results, task)
            other = COLUMNS[name](results, task)
            if mine and other:
                count += 1
                if rank(TASKS[task], mine) < rank(TASKS[task], other):
                    behind.append(f"{task} ({mine.mean:.4g} to {other.mean:.4g})")
        if count:
            ahead = count - len(behind)
            words = f'"auto" with EMA against {name}: ahead on {ahead} of {count}'
            sentences.append(
                words + (f"; behind on {', '.join(behind)}" * bool(behind))
            )
    return sentences


def draw(results: Results, file: Path) -> None:
    """Draw a panel per network: result over learning rate, and "auto" as a line."""
    tasks = [name for name in EVERY if any(given.task == name for given in results)]
    figure = Figure((9, 2.8 * -(-len(tasks) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(tasks) // 2), 2, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, tasks, strict=False):
        panel_of(panel, name, results)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    figure.savefig(file, dpi=110)


def panel_of(panel: Any, name: str, results: Results) -> None:
    """Draw one network's panel.

    Args:
        panel: Where to draw.
        name: The network.
        results: What ran.
    """
    task, shown = EVERY[name], []
    for who in ("constant", "decay", "adam", "average"):
        scores = [s for r in RATES if (s := score(results, name, who, r)) is not None]
        if scores:
            values = [s.mean for s in scores]
            style = {"color": COLORS[who], "marker": ".", "lw": 1.5}
            panel.plot(
                [s.rate for s in scores], values, label=COMPETITORS[who].name, **style
            )
            shown += values
    lines = (("auto", "value", "-", ", EMA"), ("auto", "raw", "--", ""))
    for who, field, dashes, more in (*lines, ("prodigy", "value", ":", "")):
        found = score(results, name, who, 1.0, field)
        if found and math.isfinite(found.mean):
            label = f'this, "auto"{more}' if who == "auto" else "Prodigy"
            panel.axhline(found.mean, color=COLORS[who], ls=dashes, label=label)
            shown.append(found.mean)
            if who == "auto" and more:
                panel.plot([found.rate], [found.mean], "o", color=COLORS[who])
    finite = np.array([value for value in shown if math.isfinite(value)])
    accuracy = task.metric == "accuracy"
    panel.set(xscale="log", xlabel="learning rate", title=task.title)
    panel.set_ylabel("test accuracy, %" if accuracy else "test loss")
    if not finite.size:
        return
    # The best half fills the panel; what failed runs out of it.
    if accuracy:
        top = finite.max()
        panel.set_ylim(top - 3 * max(top - np.median(finite), 0.5), top + 0.4)
    elif finite.max() > 20 * finite.min() > 0:
        panel.set_yscale("log")
    else:
        low = finite.min()
        reach = max(float(np.median(finite)) - low, 0.02 * low)
        panel.set_ylim(low - 0.3 * reach, low + 3 * reach)


def publish(results: Results) -> None:
    """Write figures, picture and tables: all of it, and the means to the page."""
    table = rows(results)
    harness.fix_threads()
    written = {
        "machine": harness.machine(),
        "verdicts": verdicts(results),
        "table": table,
    }
    FIGURES.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    draw(results, PICTURE)
    picture.main()
    turned = [list(column) for column in zip(*table, strict=True)]
    ALL.write_text(HEADING + markdown(turned))
    if BEGIN in (page := PAGE.read_text()):
        means = [table[0], *([row[0], *map(_mean, row[1:])] for row in table[1:])]
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + markdown(means) + END + rest.split(END, 1)[1])


def _mean(cell: str) -> str:
    """Return the mean of a cell, without range and rate."""
    return cell.split(" ")[0]
