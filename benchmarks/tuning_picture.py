"""The picture of `tuning.py`: everyone beside "auto"."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tuning_scores import AUTO, COLUMNS, Results, found, shown, worse
from tuning_tasks import EVERY, HELD_OUT

EDGE = 0.4, 5.0
"""How far the axis goes."""


def draw(results: Results, file: Path) -> None:
    """Draw a row a task: how many times the loss or error of "auto" the others have."""
    tasks = shown(results)
    figure = Figure((9, 1.8 + 0.4 * len(tasks)), layout="constrained")
    panel = figure.subplots()
    places = [
        -row - 0.9 * (name in HELD_OUT) for row, name in enumerate(tasks)
    ]  # those held out stand apart
    offsets = np.linspace(0.3, -0.3, len(COLUMNS) - 1)
    for place, name in zip(places, tasks, strict=True):
        mine = found(results, name, AUTO)
        assert mine is not None
        base = worse(name, mine.mean)
        spread = [worse(name, value) / base for value in (mine.low, mine.high)]
        panel.plot(spread, 2 * [place], color=COLUMNS[AUTO].color, lw=11, alpha=0.3)
        for (other, column), offset in zip(
            [*COLUMNS.items()][1:], offsets, strict=True
        ):
            theirs = found(results, name, other)
            if theirs is None:
                continue
            ratio = worse(name, theirs.mean) / base
            ratio = ratio if math.isfinite(ratio) else math.inf
            marker = ">" if ratio > EDGE[1] else "<" if ratio < EDGE[0] else ""
            panel.plot(
                [min(max(ratio, EDGE[0]), EDGE[1])],
                [place + offset],
                marker or column.marker,
                color=column.color,
                markerfacecolor=column.color if column.filled else "white",
                clip_on=False,
                ms=6,
            )
    finish(figure, panel, places, tasks)
    figure.savefig(file, dpi=110)


def finish(figure: Any, panel: Any, places: list[float], tasks: list[str]) -> None:
    """Give the picture its axes, headings and legend."""
    blue = COLUMNS[AUTO].color
    panel.axvline(1, color=blue, lw=1.5, zorder=0)
    panel.set_xscale("log")
    panel.set_xlim(*EDGE)
    ticks = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_yticks(places, [EVERY[name].title for name in tasks])
    panel.set_ylim(places[-1] - 0.6, places[0] + 1.0)
    panel.tick_params(length=0)
    panel.grid(axis="x", color="#e4e3df")
    panel.hlines(places, *EDGE, color="#e4e3df", lw=0.6, zorder=0)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_xlabel(f"times the loss, or the error, of RMSprop({AUTO})")
    held = [p for p, name in zip(places, tasks, strict=True) if name in HELD_OUT]
    note: dict[str, Any] = dict(style="italic", size=9, color="#6b6a66", va="center")
    panel.text(EDGE[0] * 1.02, places[0] + 0.7, "these served to make choices", **note)
    if held:
        panel.text(EDGE[0] * 1.02, held[0] + 0.75, "held out", **note)
    handles = [
        Line2D([], [], color=blue, lw=9, alpha=0.3, label=f"{AUTO}, its seeds"),
        *(
            Line2D(
                *([], []),
                ls="",
                marker=column.marker,
                color=column.color,
                markerfacecolor=column.color if column.filled else "white",
                label=name,
            )
            for name, column in COLUMNS.items()
            if column.marker
        ),
        Line2D([], [], ls="", marker=">", color="#6b6a66", label="further out (or <)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
