"""What `tuning.py` prints and writes."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import harness
import picture
import sentences
import tuning_picture
from rich import box
from rich.console import Console
from rich.table import Table
from tuning_scores import AUTO, COLUMNS, MORE, Results, found, rank, shown, title
from tuning_tasks import EVERY, HELD_OUT

HERE = Path(__file__).parent
FIGURES = HERE / "results" / "tuning.json"
PICTURE = HERE / "results" / "tuning.png"
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
BEGIN, END = "<!-- benchmark:tuning {} -->\n", "<!-- /benchmark -->\n"
MNIST = 98.1


def rows(results: Results) -> list[list[str]]:
    """Return the table of means: the headings, then a row each task, its best bold."""
    # A long word makes a column wide, and the table has to fit a page.
    headings = [c.replace("ScheduleFreeAdamW", "schedule-free AdamW") for c in COLUMNS]
    table = [["", *headings]]
    for name in shown(results):
        scores = [found(results, name, column) for column in COLUMNS]
        top = max(rank(EVERY[name], s) for s in scores if s)
        table.append([title(name)])
        for s in scores:
            text = "" if s is None else "failed"
            if s and math.isfinite(s.mean):
                text = f"{s.mean:.4g}" if s.mean < 1e4 else f"{s.mean:.0f}"
                if rank(EVERY[name], s) == top:
                    text = f"**{text}**"
            table[-1].append(text)
    return table


def markdown(table: list[list[str]]) -> str:
    """Return a table as it is on a page."""
    lines = ["| " + " | ".join(line) + " |\n" for line in table]
    lines.insert(1, "|:--" + "|--:" * (len(table[0]) - 1) + "|\n")
    return "".join(lines)


class Goal(NamedTuple):
    """What "auto" shall hold against the best of others.

    Attributes:
        words: Who they are.
        names: Their columns.
        exceptions: On how many of so many tasks it may be behind.
        within: By how much there: percent of the loss, and points.
    """

    words: str
    names: list[str]
    exceptions: Callable[[int], int] = lambda tasks: 0
    within: tuple[float, float] = (0, 0)


class Behind(NamedTuple):
    """How far "auto" is behind on a task; negative where it is ahead."""

    task: str
    much: float

    @property
    def text(self) -> str:
        """Name the task, and how far."""
        unit = " points" if EVERY[self.task].metric == "accuracy" else " %"
        much = f"{self.much:.2g}" if self.much < 100 else f"{self.much:.0f}"
        return f"{EVERY[self.task].title} ({much}{unit})"

    def within(self, share: float, points: float) -> bool:
        """Return whether it is no further than percents of a loss, or points."""
        accuracy = EVERY[self.task].metric == "accuracy"
        return self.much <= (points if accuracy else share)


def behind(results: Results, names: list[str]) -> list[Behind]:
    """Return how far "auto" is behind the best of the named on each task.

    That is in points of accuracy, or in percent of the other's loss.
    """
    measured = []
    for task in shown(results):
        mine = found(results, task, AUTO)
        others = [s for name in names if (s := found(results, task, name))]
        if mine is None or len(others) < len(names):
            continue
        other = max(others, key=lambda s: rank(EVERY[task], s))
        if not math.isfinite(other.mean):
            measured.append(Behind(task, -math.inf))
        elif EVERY[task].metric == "accuracy":
            measured.append(Behind(task, other.mean - mine.mean))
        else:
            measured.append(Behind(task, 100 * (mine.mean / other.mean - 1)))
    return [b._replace(much=math.inf) if math.isnan(b.much) else b for b in measured]


def verdicts(results: Results) -> list[str]:
    """Say what shall hold, and whether it does, by count."""
    against: list[Goal] = [
        Goal("the built-in at its default rate", ["RMSprop, default"]),
        Goal(
            "the better of RMSprop and Adam at their best constant rates",
            ["RMSprop, best rate", "Adam, best rate"],
            lambda tasks: 2,
            (3, 0.3),
        ),
        Goal(
            "Adam at its best rate with linear decay",
            ["Adam, best rate, linear decay"],
            lambda tasks: tasks // 3,
            (5, 0.5),
        ),
    ]
    counted = []
    for words, names, exceptions, bound in against:
        all_ = behind(results, names)
        if not all_:
            continue
        lost = sorted((b for b in all_ if b.much > 0), key=lambda b: b.text)
        held = [b for b in all_ if b.task in HELD_OUT]
        ahead = len(held) - sum(b.much > 0 for b in held)
        far = [b for b in lost if not b.within(*bound)]
        most = exceptions(len(all_))
        holds = len(lost) <= most and not far
        goal = f"all but {most}" if most else "all"
        goal += f", there within {bound[0]:g} % or {bound[1]} points" * any(bound)
        counted.append(
            f"At least as good as {words} on {len(all_) - len(lost)} of {len(all_)} "
            f"tasks ({ahead} of {len(held)} held out). "
            f"Goal: {goal}; {'reached' if holds else '**missed**'}."
            + f" Behind: {'; '.join(b.text for b in lost)}."
            * bool(lost)
        )
    mine = found(results, "mnist", AUTO)
    if mine:
        word = "reached" if mine.mean >= MNIST else "**missed**"
        counted.append(
            f"MNIST, three epochs: {mine.mean:.2f} % ({mine.low:.2f} to "
            f"{mine.high:.2f}, {mine.seeds} seeds). Goal: {MNIST}; {word}."
        )
    return [*counted, seeds(results)]


def seeds(results: Results) -> str:
    """Say of how many seeds the means are."""
    counts: Counter[int] = Counter()
    for task in shown(results):
        for name in COLUMNS:
            score = found(results, task, name)
            if score and name != AUTO:
                counts[score.seeds] += 1
    mine = {s.seeds for task in shown(results) if (s := found(results, task, AUTO))}
    others = (
        f"{n} of {many} seed{'s' * (many > 1)}" for many, n in sorted(counts.items())
    )
    return (
        f"Seeds: {AUTO} has {' or '.join(map(str, sorted(mine)))}. Of the others' "
        f"{sum(counts.values())} means are {', '.join(others)}."
    )


def ranking(results: Results) -> list[str]:
    """Say which of RMSprop and Adam is better with a constant rate, by count."""
    better: dict[str, list[str]] = {"RMSprop": [], "Adam": []}
    for task in shown(results):
        one, other = (found(results, task, f"{who}, best rate") for who in better)
        if one and other:
            ahead = rank(EVERY[task], one) > rank(EVERY[task], other)
            better["RMSprop" if ahead else "Adam"].append(EVERY[task].title)
    many = sum(map(len, better.values()))
    return [
        f"{who} is better on {len(names)} of {many}: {'; '.join(names)}."
        for who, names in better.items()
    ]


def show(results: Results) -> None:
    """Print the table and whether "auto" holds what it shall."""
    head, *lines = rows(results)
    table = Table(*head, box=box.SIMPLE)
    for line in lines:
        table.add_row(*line)
    Console(width=160).print(table)
    for sentence in [*verdicts(results), *ranking(results)]:
        print(sentence)


def publish(results: Results) -> None:
    """Write figures and picture, and the means and verdicts to the pages."""
    harness.fix_threads()
    columns = COLUMNS | MORE
    written = {
        "machine": harness.machine(),
        "verdicts": verdicts(results),
        "ranking": ranking(results),
        "table": rows(results),
        "tasks": {
            name: {
                "title": title(name),
                "held out": name in HELD_OUT,
                **{
                    column: found_._asdict()
                    for column in columns
                    if (found_ := found(results, name, column))
                },
            }
            for name in shown(results)
        },
    }
    text = json.dumps(written, indent=1, ensure_ascii=False, allow_nan=True)
    FIGURES.write_text(text + "\n")
    tuning_picture.draw(results, PICTURE)
    picture.main()
    for page in PAGES:
        if (text := filled(page.read_text(), written)) != page.read_text():
            page.write_text(text)


def filled(page: str, written: Mapping[str, Any]) -> str:
    """Return a page with the table, the sentences and the means of `publish`.

    A mean inside a sentence stands between comments, as `sentences.py` has them:

        <!-- figure tuning: TASK; COLUMN -->98.1<!-- end figure -->
    """
    parts = {
        name: "".join(f"- {sentence}\n" for sentence in written[name])
        for name in ("verdicts", "ranking")
    }
    parts["table"] = markdown(written["table"])
    for name, part in parts.items():
        begin = BEGIN.format(name)
        if begin in page:
            page = sentences.between(page, begin, END, part)

    def mean(match: re.Match[str]) -> str:
        begin, name, query, end = match.groups()
        if name != "tuning":
            return match[0]
        task, column = query.split("; ")
        return f"{begin}{written['tasks'][task][column]['mean']:.4g}{end}"

    return sentences.MARKED.sub(mean, page)
