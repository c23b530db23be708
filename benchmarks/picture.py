"""Draw the picture of the README from what `bench.py` and `tuning.py` measured.

Both draw it when they have measured; `python benchmarks/picture.py` does, too.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
THIS, BUILT_IN, AVERAGED = "#2a78d6", "#e8710a", "#1a9076"


def main() -> None:
    """Draw two panels: a task of each kind, this and the built-in."""
    figure = Figure((9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_rates(left)
    draw_tables(right)
    for panel in (left, right):
        panel.grid(color="#e4e3df")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "short.png", dpi=110)


def draw_rates(panel: Any) -> None:
    """Draw the accuracy on MNIST over the learning rate, means over the seeds."""
    accuracy = defaultdict(list)
    for line in (RESULTS / "tuning_runs.jsonl").read_text().splitlines():
        (task, who, rate, _, scale), (value, *_) = json.loads(line)
        if task == "mnist" and scale == 1.0:
            accuracy[who, rate].append(100 * value)
    means = {key: float(np.mean(values)) for key, values in accuracy.items()}
    rates = sorted(rate for who, rate in means if who == "constant")
    level = means["auto", 1.0]
    for who, color in (("constant", BUILT_IN), ("average", AVERAGED)):
        values = [means[who, rate] for rate in rates]
        panel.semilogx(rates, values, "o-", color=color)
    panel.axhline(level, color=THIS, lw=2.5)
    panel.set_ylim(92, 99)
    panel.set_xlabel("learning rate")
    panel.set_title("MNIST: test accuracy, %", loc="left")
    write(panel, rates[0], level + 0.25, '"auto"', THIS)
    write(panel, 1.3e-3, 95.7, "fixed rate", BUILT_IN)
    write(panel, 1.4e-2, 97.0, "fixed rate,\nEMA weights", AVERAGED)


def draw_tables(panel: Any) -> None:
    """Draw the time of a step of `fit` over the size of an embedding."""
    report = json.loads((RESULTS / "bench.json").read_text())["embedding"]
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for figure in report["figures"]:
        who, what, how = (figure[key] for key in ("who", "what", "how"))
        if how == "uniform ids, without XLA" and who in ("this", "Keras"):
            size = int(what.split()[0].replace(",", ""))
            times[who][size] = float(np.median(figure["values"]["time"]))
    for who, color in (("Keras", BUILT_IN), ("this", THIS)):
        rows = sorted(times[who])
        panel.loglog(rows, [times[who][n] for n in rows], "o-", color=color, lw=2)
    panel.set_xlabel("rows of an embedding")
    panel.set_title("Step of fit, ms", loc="left")
    write(panel, 7e4, 60, "built-in", BUILT_IN)
    write(panel, 3e5, 8.5, "this", THIS)


def write(panel: Any, x: float, y: float, text: str, color: str) -> None:
    """Write beside a line, in its color."""
    panel.text(x, y, text, color=color, weight="bold", size=12)


if __name__ == "__main__":
    main()
