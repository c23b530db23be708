"""What `embedding.py` prints, draws and writes."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from embedding_step import BATCH, IDS_EACH, ROW, WIDTH
from harness import Spread, sentence, spread
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
FIGURES = HERE / "results" / "embedding.json"
PAGE = HERE.parent / "docs" / "embeddings.md"
BEGIN, END = "<!-- benchmark:embedding -->\n", "<!-- /benchmark -->\n"

SMALL, LARGE = 1_000, 1_000_000
"""Sizes of the table, in rows, that are compared with each other."""
WAYS = {False: "without XLA", True: "with XLA"}

Pages = dict[str, list[list[str]]]
"""Tables under their titles: the headings, then the rows."""


class Competitor(NamedTuple):
    """Who is measured, and the bytes kept of a row: the weights and their state."""

    name: str
    row: int
    color: str


COMPETITORS = {
    "ours": Competitor("keras_rmsprop", 2 * ROW + 4, "#2a78d6"),  # v and the clock
    "built-in": Competitor("built-in", 2 * ROW, "#e8710a"),
    "torch": Competitor("torch SparseAdam", 3 * ROW, "#1a9076"),
    "floor": Competitor("gradients only", ROW, "#6b6a66"),
}


class Case(NamedTuple):
    """What one process does."""

    competitor: str
    size: int
    xla: bool
    malloc: bool = False
    """Whether TensorFlow shall take its memory from malloc."""

    def __str__(self) -> str:
        """Return a name for people."""
        name = COMPETITORS[self.competitor].name
        return f"{name}, {WAYS[self.xla]}{', malloc' * self.malloc}"


class Results(NamedTuple):
    """What was measured, a value a round."""

    times: dict[tuple[Case, str], list[float]]
    """Milliseconds of a step, by case and kind of ids."""
    peaks: dict[Case, list[float]]
    """Bytes that memory grew by, from before the table was made."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of ids."""
        return list(dict.fromkeys(kind for _, kind in self.times))

    def ratio(self, a: Case, b: Case, kind: str) -> Spread:
        """Return how many times as long as in `b` a step takes in `a`."""
        pairs = zip(self.times[a, kind], self.times[b, kind], strict=True)
        return spread([x / y for x, y in pairs])

    def memory(self, case: Case) -> float:
        """Return the memory that rows take, over what is kept of them.

        The rows are those beyond the small table's, and so is the memory: the program
        and the batches need some, too.
        """
        small, large = (
            statistics.median(self.peaks[case._replace(size=size)])
            for size in (SMALL, case.size)
        )
        return (large - small) / (case.size - SMALL) / COMPETITORS[case.competitor].row


def tables(results: Results) -> Pages:
    """Return tables of what was measured.

    Args:
        results: What was measured.
    """
    sizes = sorted({case.size for case in results.peaks})
    names = [competitor.name for competitor in COMPETITORS.values()]
    pages: Pages = {}
    ratios = [
        ["", "built-in / keras_rmsprop", f"keras_rmsprop / itself at {SMALL:,} rows"]
    ]
    for xla, way in WAYS.items():
        for kind in results.kinds:
            page = [["rows", *names]]
            for size in sizes:
                cases = [Case(competitor, size, xla) for competitor in COMPETITORS]
                times = [results.times.get((case, kind)) for case in cases]
                cells = (str(spread(values)) if values else "" for values in times)
                page.append([f"{size:,}", *cells])
            pages[f"Milliseconds a step, {kind} ids, {way}"] = page
            ours = Case("ours", LARGE, xla)
            faster = results.ratio(ours._replace(competitor="built-in"), ours, kind)
            slower = results.ratio(ours, ours._replace(size=SMALL), kind)
            ratios.append([f"{kind} ids, {way}", str(faster), str(slower)])
    pages[f"Times at {LARGE:,} rows, as ratios"] = ratios
    large = [size for size in sizes if size >= LARGE]
    memory = [["", *(f"{size:,} rows" for size in large)]]
    for case in results.peaks:
        if case.size == LARGE:
            shares = (results.memory(case._replace(size=size)) for size in large)
            memory.append([str(case), *(f"{share:.3f}" for share in shares)])
    pages["Peak memory for the rows, over what is kept of them"] = memory
    return pages


def show(results: Results) -> None:
    """Print the tables.

    Args:
        results: What was measured.
    """
    console = Console(width=100)
    for title, (headings, *rows) in tables(results).items():
        table = Table(box=box.SIMPLE_HEAD)
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(f"[bold]{title}[/]", table)


def save(results: Results, machine: dict[str, Any]) -> None:
    """Write the figures.

    Args:
        results: What was measured.
        machine: Where.
    """
    model = {"width": WIDTH, "batch": BATCH, "ids_each": IDS_EACH}
    figures = [
        case._asdict()
        | {f"{kind}_ms": results.times.get((case, kind)) for kind in results.kinds}
        | {"peak_bytes": [peak for peak in peaks if not math.isnan(peak)]}
        for case, peaks in results.peaks.items()
    ]
    report = {"machine": machine, "model": model, "figures": figures}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(report, indent=1) + "\n")


def publish() -> None:
    """Draw the picture and write the tables of the page in `docs/` from the figures."""
    report = json.loads(FIGURES.read_text())
    results = Results({}, {})
    for figure in report["figures"]:
        case = Case(*(figure[field] for field in Case._fields))
        results.peaks[case] = figure["peak_bytes"] or [math.nan]
        for name, times in figure.items():
            if name.endswith("_ms") and times:
                results.times[case, name.removesuffix("_ms")] = times
    draw(FIGURES.with_suffix(".png"), results)
    where = sentence(report["machine"])
    text = f"Measured by `python benchmarks/embedding.py` on: {where}.\n"
    for title, (headings, *rows) in tables(results).items():
        rule = [":--", *["--:"] * (len(headings) - 1)]
        text += f"\n{title}:\n\n"
        for cells in (headings, rule, *rows):
            text += f"| {' | '.join(cells)} |\n"
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1])


def draw(path: Path, results: Results) -> None:
    """Draw the time of a step over the rows of the table.

    Args:
        path: The PNG to write.
        results: What was measured.
    """
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    styles = dict(zip(results.kinds, ("-", "--"), strict=False))
    for axes, xla in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for key, (name, _, color) in COMPETITORS.items():
            for kind, style in styles.items():
                line = {
                    case.size: spread(times)
                    for (case, ids), times in results.times.items()
                    if (case.competitor, case.xla, ids) == (key, xla, kind)
                }
                if not line:
                    continue
                medians, lows, highs = zip(*line.values(), strict=True)
                marker = {"marker": "o", "ms": 4} if style == "-" else {}
                axes.loglog(list(line), medians, style, color=color, lw=1.8, **marker)
                axes.fill_between(
                    list(line), lows, highs, color=color, alpha=0.15, lw=0
                )
                if style == "-":
                    at = {"xytext": (8, 0), "textcoords": "offset points"}
                    end = (max(line), medians[-1])
                    axes.annotate(
                        name, end, **at, va="center", color=color, weight="bold"
                    )
        axes.set_title(WAYS[xla], loc="left")
        axes.set_xlabel("rows of the table")
        axes.grid(color="#e4e3df")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("milliseconds a step")
    figure.suptitle("Embedding(rows, 64) in `fit`", x=0.015, ha="left", size=15)
    lines = [Line2D([], [], color="#6b6a66", ls=style) for style in styles.values()]
    labels = [f"{kind} ids" for kind in styles]
    figure.legend(lines, labels, loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
