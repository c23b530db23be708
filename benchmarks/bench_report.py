"""What `bench.py` prints, draws and writes."""

import dataclasses
import json
import math
from itertools import product
from pathlib import Path

from bench_figures import (
    EAGER,
    LARGEST_BYTES,
    PARTS,
    PEERS,
    WAYS,
    Figure,
    Part,
    targets,
)
from bench_update import SETS
from harness import Spread, sentence, short, spread
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
README = Path(__file__).parents[1] / "README.md"
FRAME = "<!-- of `make bench` -->\n", "<!-- end -->\n"
"""What stands around its table in the README."""
COLORS = {"this": "#2a78d6", "Keras": "#e8710a", "torch": "#1a9076"}
GREY = "#6b6a66"
INTRODUCTION = """\
# Benchmarks

`python benchmarks/bench.py` measured the figures of this page and wrote all of it: edit
the script, not the page. Each competitor runs in a process of its own, warmed up, with
as many threads as the others, and all take turns, round by round. A round gives the
median of its steps; a figure is the median of the rounds, with their range in brackets.
A ratio is taken within each round first. "This" is keras_rmsprop, "the limit" a fused
loop over the same numbers at the speed of memory, in numba; "everything" is momentum,
centering, clipping by the global norm and weight decay together. Two within 5 % of
each other count as equally fast; all other targets must hold as the figures stand.

"""

Pages = dict[str, list[list[str]]]
"""Tables under their titles: the headings, then the rows."""


def tables(results: dict[str, Part]) -> Pages:
    """Return tables of what was measured.

    Args:
        results: The parts, as far as they were measured.
    """
    pages: Pages = {"Targets": targets(results)}
    if "update" in results:
        pages |= _ratios(results["update"]) | _updates(results["update"])
    if "fit" in results:
        pages |= _fit(results["fit"])
    if "memory" in results:
        pages |= _memory(results["memory"])
    return pages


def _ratios(update: Part) -> Pages:
    pages: Pages = {}
    for how in update.hows:
        keras = [f"Keras, {way}" for way in WAYS]
        table = [["", *keras, "best of torch foreach, optax", "torch compiled"]]
        for what in update.whats:
            mine = [(f"this, {way}", what, how) for way in WAYS]
            others = [*keras, update.fastest(PEERS, what, how), "torch, compiled"]
            pairs = zip(others, [*mine, mine[0], mine[0]], strict=True)
            cells = (_text(update.ratio((who, what, how), me)) for who, me in pairs)
            table.append([what, *cells])
        title = f"One update, {how}: times of others over this; torch, optax over eager"
        pages[title] = table
    return pages


def _updates(update: Part) -> Pages:
    pages: Pages = {}
    for what in update.whats:
        table = [["", *(h for how in update.hows for h in (f"{how}, ms", "x limit"))]]
        table[0] += ["everything / plain", "first step, s"]
        for who in update.whos:
            row = [who]
            for how in update.hows:
                case = who, what, how
                times = update.ratio(case, ("limit", what, how))
                row += [_cell(update, case), _text(times and times.median)]
            grown = update.growth(who, what)
            first = _cell(update, (who, what, update.hows[0]), "first")
            table.append([*row, _text(grown and grown.median), first])
        sizes = [math.prod(shape) for shape in SETS[what]]
        title = f"One update of {what}: {len(sizes)} variables, {sum(sizes):,} numbers"
        pages[title] = table
    return pages


def _fit(fit: Part) -> Pages:
    pages: Pages = {}
    for of, name in (
        ("time", "Milliseconds a step"),
        ("first", "Seconds to first step"),
    ):
        for how in fit.hows:
            table = [["", *fit.whos, "this / Keras"]]
            for what in fit.whats:
                cases = [(who, what, how) for who in fit.whos]
                cells = [_cell(fit, case, of) for case in cases]
                ratio = fit.ratio(("this", what, how), ("Keras", what, how), of)
                if any(cells):
                    table.append([what, *cells, _text(ratio)])
            if how != "import":
                pages[f"{name} of fit, {how}"] = table
            elif of == "first":
                pages["Seconds of the import"] = table
    return pages


def _memory(memory: Part) -> Pages:
    table = [[""]]
    for how in memory.hows:
        table[0] += [f"{how}: state, bytes", "peak, MiB", "x largest variable"]
    for who in memory.whos:
        row = [who]
        for how in memory.hows:
            [what] = memory.whats
            peak = memory.values((who, what, how), "peak") or [math.nan]
            row.append(_cell(memory, (who, what, how), "state"))
            row += [short(peak[0] / size) for size in (2**20, LARGEST_BYTES)]
        table.append(row)
    return {f"State a parameter, and memory that a step adds, {memory.whats[0]}": table}


def _text(value: Spread | float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, Spread) else short(value)


def _cell(part: Part, case: tuple[str, str, str], of: str = "time") -> str:
    values = part.values(case, of)
    if values:
        return str(spread(values))
    return "failed" if case in part.figures else ""


def show(results: dict[str, Part]) -> None:
    """Print the tables.

    Args:
        results: The parts, as far as they were measured.
    """
    console = Console(width=128)
    for title, (headings, *rows) in tables(results).items():
        table = Table(box=box.SIMPLE_HEAD)
        for i, heading in enumerate(headings):
            left = i == 0 or title == "Targets"
            table.add_column(
                heading, justify="left" if left else "right", no_wrap=i == 0
            )
        for row in rows:
            if "not measured" not in row:
                table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(f"[bold]{title}[/]", table)


def save(folder: Path, name: str, part: Part) -> None:
    """Write the figures of a part, in place of those of an earlier run.

    Args:
        folder: Where `bench.json` is.
        name: The part.
        part: What was measured.
    """
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "bench.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    figures = [dataclasses.asdict(figure) for figure in part.figures.values()]
    report[name] = {"machine": part.machine, "figures": figures}
    path.write_text(json.dumps(report, indent=1) + "\n")


def publish(folder: Path) -> dict[str, Part]:
    """Draw the picture and write the page from the figures; return those.

    Args:
        folder: Where they are; any but the usual one gets the page, too.
    """
    report = json.loads((folder / "bench.json").read_text())
    results = {
        name: Part(
            report[name]["machine"], [Figure(**f) for f in report[name]["figures"]]
        )
        for name in PARTS
        if name in report
    }
    text = INTRODUCTION
    for name, part in results.items():
        text += f"- {name}: {sentence(part.machine)}\n"
    for title, (headings, *rows) in tables(results).items():
        right = ":--" if title == "Targets" else "--:"
        rule = [":--", *[right] * (len(headings) - 1)]
        text += f"\n{'## ' * (title == 'Targets')}{title}\n\n"
        for cells in (headings, rule, *rows):
            text += f"| {' | '.join(cells)} |\n"
        if title == "Targets" and "update" in results:
            draw(folder / "bench.png", results["update"])
            text += "\n![Times of one update](../benchmarks/results/bench.png)\n"
    page = PAGE if folder == RESULTS else folder / PAGE.name
    page.write_text(text)
    if folder == RESULTS and "update" in results:
        before, _, rest = README.read_text().partition(FRAME[0])
        table = _eager_table(results["update"]).join(FRAME)
        README.write_text(before + table + rest.partition(FRAME[1])[2])
    return results


def _eager_table(update: Part) -> str:
    whos = "Keras, eager", "this, eager", "torch, foreach", "optax, jit"
    names = "Keras", "this", "times faster (range)", "torch foreach", "optax, jitted"
    lines = [f"| variables | {' | '.join(names)} |", "|:--" + 5 * "|--:" + "|"]
    for what in (what for sets in EAGER.values() for what in sets):
        keras, mine, *peers = ((who, what, "plain") for who in whos)
        times = [
            f"{short(spread(values).median)} ms" if values else "failed"
            for values in map(update.values, (keras, mine, *peers))
        ]
        times.insert(2, _text(update.ratio(keras, mine)))
        lines.append(f"| {what} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, update: Part) -> None:
    """Draw the time of an update as a multiple of the limit, a panel for each set.

    Args:
        path: The PNG to write.
        update: What was measured.
    """
    whos = [who for who in update.whos if who != "limit"][::-1]
    rows = math.ceil(len(update.whats) / 3)
    picture = Picture(figsize=(11, 0.9 + 2.7 * rows), layout="constrained")
    panels = list(picture.subplots(rows, 3, sharey=True, squeeze=False).flat)
    for axes in panels[len(update.whats) :]:
        axes.remove()
    for axes, what in zip(panels, update.whats, strict=False):
        axes.axvline(1, color=GREY, lw=1)
        for (y, who), how in product(enumerate(whos), update.hows):
            times = update.ratio((who, what, how), ("limit", what, how))
            if times:
                color = COLORS.get(who.split(",")[0], GREY)
                face = color if how == update.hows[0] else "white"
                axes.plot(times[1:], (y, y), color=color)
                axes.plot(times.median, y, "o", color=color, mfc=face)
        axes.set_xscale("log")
        axes.set_title(what, loc="left", size=11)
        axes.set_yticks(range(len(whos)), whos)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(color="#e4e3df")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for label in axes.get_yticklabels():
            label.set_color(COLORS.get(label.get_text().split(",")[0], GREY))
            label.set_weight("bold" if label.get_text().startswith("this") else None)
    title = "Time of one update, as a multiple of the limit"
    picture.suptitle(title, x=0.015, ha="left", size=15)
    dots = [
        Line2D([], [], ls="", marker="o", color=GREY, mfc=face, label=how)
        for how, face in zip(update.hows, (GREY, "white"), strict=False)
    ]
    picture.legend(handles=dots, loc="outside upper right", ncols=2, frameon=False)
    picture.savefig(path, dpi=150)
