"""What `bench.py` prints, draws and writes: tables, pictures and JSON."""

import dataclasses
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import figures
import picture
import sentences
from figures import PARTS, WAYS, Figure, Part, short, spread
from fit import KEPT, LARGE, SMALL, TABLE_JIT, TABLES, WIDTH
from harness import sentence
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table
from update import SETS, numbers

FIGURES = "bench.json"
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- of `make bench`{} -->\n", "<!-- end -->\n"
"""What stands around the tables in pages that are written by hand."""
PEERS = "best of torch foreach, optax"
UPDATE = "One update, {}: times of others over this; torch, optax over eager"
TIMES = {"time": "Milliseconds per step", "first": "Seconds to first step"}
SHOWN = {
    "embeddings": "Milliseconds per step, uniform ids, without XLA",
    "updates": UPDATE.format("plain"),
    "fit": "Milliseconds per step of fit, default",
}
"""The tables on the page, by their places; all of them are in `bench.md`."""
DRAWN = "MNIST network", "ResNet-50", "300 tiny", "4 x 4096 x 4096"
"""The sets of variables in the picture of updates."""
COLORS = {"this": "#2a78d6", "Keras": "#e8710a", "torch": "#1a9076"}
GREY = "#6b6a66"
LINE = 1.45
"""The height of a line of text beside the picture of embeddings, as a ratio."""
Rows = list[list[str]]
"""A table: the headings, then the rows."""
Pages = dict[str, Rows]
"""Tables under their titles."""


def tables(parts: Mapping[str, Part]) -> Pages:
    """Return tables of what was measured, without empty rows and columns."""
    pages = {"Targets": figures.targets(parts)}
    makers = {"update": _updates, "fit": _fits, "memory": _peaks}
    for name, part in parts.items():
        pages |= makers.get(name, _embeddings)(part)
    for name, part in parts.items():
        pages |= _before(name, part)
    tidied = {title: _tidy(*table) for title, table in pages.items()}
    return {title: table for title, table in tidied.items() if len(table) > 1}


def _tidy(headings: list[str], *rows: list[str]) -> Rows:
    full = [row for row in rows if any(row[1:])]
    columns = [i for i in range(len(headings)) if not i or any(row[i] for row in full)]
    return [[row[i] for i in columns] for row in (headings, *full)]


def _before(name: str, part: Part) -> Pages:
    """Return tables of this package beside that of another checkout."""
    pages: Pages = {}
    for of, title in TIMES.items():
        table = [["", "before", "this", "before / this", "in all rounds"]]
        for case in part.figures:
            this = case[0].replace("before", "this"), *case[1:]
            ratio = part.ratio(case, this, of)
            if case != this and ratio:
                changes = {"faster": ratio.low > 1, "slower": ratio.high < 1}
                several = ratio.low < ratio.high
                change = "".join(word for word, true in changes.items() if true)
                cells = part.text(case, of), part.text(this, of), str(ratio)
                row = [", ".join((*this[1:], this[0])), *cells, change * several]
                table.append(row)
        pages[f"{title}, {name}: before, and this"] = table
    return pages


def _updates(update: Part) -> Pages:
    pages: Pages = {}
    for how in update.hows:
        table = [["", *(f"Keras, {way}" for way in WAYS), PEERS, "torch compiled"]]
        for what in update.whats:
            others = update.fastest(figures.PEERS, what, how), "torch, compiled"
            pairs = [(f"Keras, {way}", f"this, {way}") for way in WAYS]
            pairs += [(who, "this, eager") for who in others]
            ratios = (update.ratio((a, what, how), (b, what, how)) for a, b in pairs)
            table.append([what, *(str(ratio or "") for ratio in ratios)])
        pages[UPDATE.format(how)] = table
    for what in update.whats:
        table = [["", *(h for how in update.hows for h in (f"{how}, ms", "x limit"))]]
        table[0] += ["everything / plain", "first step, s"]
        for who in update.whos:
            row = [who]
            for how in update.hows:
                times = update.ratio((who, what, how), ("limit", what, how))
                row += [update.text((who, what, how)), short(times and times.median)]
            grown = update.growth(who, what)
            first = update.text((who, what, update.hows[0]), "first")
            table.append([*row, short(grown and grown.median), first])
        size = f"{len(SETS[what])} variables, {numbers(what):,} numbers"
        pages[f"One update of {what}: {size}"] = table
    return pages


def _fits(fit: Part) -> Pages:
    pages: Pages = {}
    for (of, title), how in product(TIMES.items(), fit.hows):
        table = [["", *fit.whos, "this / Keras"]]
        for what in fit.whats:
            cells = [fit.text((who, what, how), of) for who in fit.whos]
            ratio = fit.ratio(("this", what, how), ("Keras", what, how), of)
            table.append([what, *cells, str(ratio or "")])
        of_what = "import" if how == "import" else f"fit, {how}"
        pages[f"{title} of {of_what}"] = table
    return pages


def _peaks(memory: Part) -> Pages:
    table, what = [[""]], figures.LARGEST
    for how in memory.hows:
        table[0] += [f"{how}: state, bytes", "peak, MiB", "x largest variable"]
    for who in memory.whos:
        row = [who]
        for how in memory.hows:
            row.append(memory.text((who, what, how), "state"))
            peak = (*memory.values((who, what, how), "peak"), None)[0]
            sizes = 2**20, figures.LARGEST_BYTES
            row += ["" if peak is None else short(peak / size) for size in sizes]
        table.append(row)
    kept = [["", *(h for how in memory.hows for h in (f"{how}, ms", "state, bytes"))]]
    for who in memory.whos:
        row, what_kept = [who], figures.KEPT
        for how in memory.hows:
            case = who, what_kept, how
            row += [memory.text(case), memory.text(case, "state")]
        kept.append(row)
    return {
        f"State per parameter, and memory that a step adds, {what}": table,
        f"An eager update of {figures.KEPT}, by dtype of the slots": kept,
    }


def _embeddings(part: Part) -> Pages:
    pages: Pages = {}
    compared = [["", "Keras / this", f"this / itself at {SMALL}"]]
    for how in part.hows:
        table = [["", *part.whos]]
        for what in part.whats:
            table.append([what, *(part.text((who, what, how)) for who in part.whos)])
        pages[f"{TIMES['time']}, {how}"] = table
        this = "this", LARGE, how
        faster = part.ratio(("Keras", LARGE, how), this)
        slower = part.ratio(this, ("this", SMALL, how))
        compared.append([how, str(faster or ""), str(slower or "")])
    pages[f"Times at {LARGE}, as ratios"] = compared
    tables = [what for what in part.whats if what in TABLES]
    large = [what for what in tables if TABLES[what].rows >= TABLES[LARGE].rows]
    table = [["", *large]]
    for who, what, how in part.figures:
        if what == LARGE and part.values((who, what, how), "peak"):
            shares = (_share(part, who, what, how) for what in large)
            table.append([f"{who}, {how}", *map(short, shares)])
    return pages | {"Peak memory for the rows, over what is kept of them": table}


def _share(part: Part, who: str, what: str, how: str) -> float | None:
    """Return the memory that rows take, over what is kept of them.

    The rows are those beyond the small table's, and so is the memory: the program
    and the batches need some, too.
    """
    small, large = (spread(part.values((who, w, how), "peak")) for w in (SMALL, what))
    if not (small and large):
        return None
    rows = TABLES[what].rows - TABLES[SMALL].rows
    kept = KEPT[who.replace("before", "this")]
    return (large.median - small.median) / (rows * kept)


def show(pages: Pages) -> None:
    """Print tables."""
    console = Console(width=128)
    for title, (headings, *rows) in pages.items():
        table = Table(box=box.SIMPLE_HEAD)
        for i, heading in enumerate(headings):
            justify: Any = "right" if i and title != "Targets" else "left"
            table.add_column(heading, justify=justify, no_wrap=i == 0)
        for row in rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(f"[bold]{title}[/]", table)


def markdown(pages: Pages) -> str:
    """Return tables as they are on a page."""
    text = ""
    for title, (headings, *rows) in pages.items():
        rule = [":--", *[":--" if title == "Targets" else "--:"] * (len(headings) - 1)]
        text += f"\n{_heading(title)}\n\n" if title else ""
        for cells in (headings, rule, *rows):
            text += f"| {' | '.join(cells)} |\n"
    return text


def _heading(title: str) -> str:
    return f"### {title}" if title == "Targets" else f"**{title}**"


def save(path: Path, name: str, part: Part) -> None:
    """Write the figures of a part, in place of those of an earlier run."""
    path.parent.mkdir(exist_ok=True, parents=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    measured = [dataclasses.asdict(figure) for figure in part.figures.values()]
    report[name] = {"machine": part.machine, "figures": measured}
    path.write_text(json.dumps(report, indent=1) + "\n")


def load(path: Path) -> dict[str, Part]:
    """Return the parts that were saved."""
    report = json.loads(path.read_text())
    return {
        name: Part(of["machine"], [Figure(**figure) for figure in of["figures"]])
        for name, of in sorted(report.items(), key=lambda item: PARTS.index(item[0]))
    }


def publish(folder: Path) -> dict[str, Part]:
    """Draw the pictures and write the pages; return the figures that they show.

    Args:
        folder: Where the figures are; any but the usual one gets the pages, too.
    """
    parts, page = load(folder / FIGURES), DOCS / "benchmarks.md"
    machines = (f"- {name}: {sentence(of.machine)}\n" for name, of in parts.items())
    found = tables(parts)
    text = "# All tables of `make bench`\n\nMeasured on:\n\n" + "".join(machines)
    pages = {folder / "bench.md": text + markdown(found), page: page.read_text()}
    for place, title in SHOWN.items():
        if title in found:
            begin, table = BEGIN.format(f": {place}"), markdown({"": found[title]})
            pages[page] = sentences.between(pages[page], begin, END, table)
    if "embedding" in parts:
        draw_embeddings(folder / "embedding.png", parts["embedding"])
    if "update" in parts:
        draw_updates(folder / "bench.png", parts["update"])
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        pages[page] = sentences.filled(pages.get(page) or page.read_text(), parts)
    for page, text in pages.items():
        if folder == RESULTS or not page.exists() or text != page.read_text():
            (page if folder == RESULTS else folder / page.name).write_text(text)
    if folder == RESULTS:
        picture.main()
    return parts


def draw_updates(path: Path, update: Part) -> None:
    """Draw the times of one update, a panel for each of some sets."""
    whos = [who for who in update.whos if who != "limit"][::-1]
    picture = Picture(figsize=(9, 10), layout="constrained")
    panels = picture.subplots(2, 2, sharey=True, squeeze=False).flat
    for axes, what in zip(panels, DRAWN, strict=True):
        _style(axes, what)
        axes.axvline(1, color=GREY, lw=1)
        for (y, who), how in product(enumerate(whos), update.hows):
            if times := update.ratio((who, what, how), ("limit", what, how)):
                face = _color(who) if how == update.hows[0] else "white"
                axes.plot(times[1:], (y, y), color=_color(who))
                axes.plot(times.median, y, "o", color=_color(who), mfc=face)
        axes.set_xscale("log")
        axes.set_yticks(range(len(whos)), whos)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        for label in axes.get_yticklabels():
            label.set_color(_color(label.get_text()))
            label.set_weight("bold" if label.get_text().startswith("this") else None)
    dots = [
        Line2D([], [], ls="", marker="o", color=GREY, mfc=face, label=how)
        for how, face in zip(update.hows, (GREY, "white"), strict=False)
    ]
    _save(picture, path, "Time of one update, as a multiple of the limit", dots)


def draw_embeddings(path: Path, part: Part) -> None:
    """Draw the time of a step over the rows of the table."""
    picture = Picture(figsize=(9, 4.6), layout="constrained")
    styles = {"uniform ids": "-", "zipf ids": "--"}
    for axes, way in zip(picture.subplots(1, 2, sharey=True), TABLE_JIT, strict=True):
        _style(axes, way)
        ends: dict[str, float] = {}
        for who, (kind, style) in product(part.whos, styles.items()):
            times = {
                TABLES[what].rows: spread(part.values((who, what, f"{kind}, {way}")))
                for what in part.whats
                if what in TABLES
            }
            rows = [size for size, x in times.items() if x]
            if not rows:
                continue
            medians, lows, highs = zip(*filter(None, times.values()), strict=True)
            dot = {"marker": "o", "ms": 4} if style == "-" else {}
            axes.loglog(rows, medians, style, color=_color(who), lw=1.8, **dot)
            axes.fill_between(rows, lows, highs, color=_color(who), alpha=0.15, lw=0)
            if style == "-":
                ends[who] = medians[-1]
        height = 0.0
        for who in sorted(ends, key=ends.__getitem__):
            height = max(ends[who], height * LINE)  # no name on top of another
            at = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            end = rows[-1], height
            axes.annotate(who, end, **at, color=_color(who), weight="bold")
        axes.set_xlabel("rows of the table")
    picture.axes[0].set_ylabel("milliseconds per step")
    lines = [
        Line2D([], [], color=GREY, ls=style, label=kind)
        for kind, style in styles.items()
    ]
    _save(picture, path, f"A step of fit with Embedding(rows, {WIDTH})", lines)


def _color(who: str) -> str:
    return COLORS.get(who.replace(",", "").split()[0], GREY)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", size=11)
    axes.grid(color="#e4e3df")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(picture: Picture, path: Path, title: str, legend: list[Line2D]) -> None:
    picture.suptitle(title, x=0.015, ha="left", size=15)
    picture.legend(handles=legend, loc="outside upper right", ncols=2, frameon=False)
    picture.savefig(path, dpi=150)
