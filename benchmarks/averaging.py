"""How long should the EMA of "auto" remember? Longer runs than those of `tuning.py`.

    python benchmarks/averaging.py [--publish]

Each training ends with the weights, with their EMA, and with batch normalization's
statistics computed again for the EMA. Every result is written at once.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tuning
from sentences import between
from tuning_competitors import Competitor

HERE = Path(__file__).parent
RUNS = HERE / "results" / "averaging_runs.jsonl"
PAGE = HERE.parent / "docs" / "averaging.md"
BEGIN, END = "<!-- benchmark:averaging -->\n", "<!-- /benchmark -->\n"
STEPS = [
    ("noisy", 400),
    ("noisy", 2000),
    ("noisy", 8000),
    ("resnet", 2000),
    ("mnist", 20_000),
    ("heavy", 20_000),
    ("regression", 20_000),
    ("gru", 6000),
]
"""Of which task of `tuning_tasks.py` how many."""
WITH_STATISTICS = "noisy", "resnet"
"""Those with batch normalization."""
SHORT, LONG = MOMENTA = 0.99, 0.9999
SEEDS = 3


class Run(NamedTuple):
    """One training, and what the test says at its end: the metric, or the loss, too."""

    task: str
    steps: int
    momentum: float
    seed: int
    value: float = 0.0
    loss: float = 0.0
    raw: float = 0.0
    """The metric of the weights themselves."""
    as_is: tuple[float | None, float] = (None, 0.0)
    """Accuracy and loss of the EMA before statistics are computed again."""


def trained(run: Run) -> Run:
    """Return a training with its results."""
    import tuning_tasks

    from keras_rmsprop import RMSprop, batch_norm

    task = tuning_tasks.EVERY[run.task]
    data, before = task.data(), {}
    recompute = batch_norm.recompute_after

    def noting(fit: Any, steps: int) -> str:
        test = data.test_x, data.test_y
        before.update(
            fit["self"].evaluate(*test, batch_size=500, verbose=0, return_dict=True)
        )
        return recompute(fit, steps)

    def make(rate: float, steps: int) -> Any:
        return RMSprop("auto", ema_momentum=run.momentum)

    who = Competitor("", make, averages=True)
    with mock.patch.object(batch_norm, "recompute_after", noting):
        result = tuning.run(task, who, run.seed, 1.0, run.steps / task.steps)
    as_is = before.get("accuracy"), before["loss"]
    return run._replace(
        value=result.value, loss=result.loss, raw=result.raw, as_is=as_is
    )


def table(runs: list[Run]) -> Iterator[list[str]]:
    """Yield the headings, then a row for each task and number of steps."""
    import tuning_tasks

    yield ["", "steps", "weights", f"EMA {SHORT}", f"{LONG}", "as it is"]
    for name, steps in STEPS:
        task = tuning_tasks.EVERY[name]
        is_accuracy = task.metric == "accuracy"
        of = {m: [r for r in runs if r[:3] == (name, steps, m)] for m in MOMENTA}

        def cell(values: Any, losses: Any = (), task: Any = task) -> str:
            text = f"{task.factor * np.mean(values):.4g}"
            return f"{text}, {np.mean(losses):.3g}" if len(losses) else text

        row = [task.title, f"{steps:,}"]
        row.append(cell([r.raw for r in of[LONG]]))
        for m in MOMENTA:
            losses = [r.loss for r in of[m]] if is_accuracy else []
            row.append(cell([r.value for r in of[m]], losses))
        as_is = [r.as_is for r in of[LONG] if name in WITH_STATISTICS]
        last = cell([x[0] for x in as_is], [x[1] for x in as_is]) if as_is else ""
        yield [*row, last]


def main() -> None:
    """Train what is missing, print the table, publish it if it is whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="no training")
    publish = parser.parse_args().publish
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    done = {Run(*json.loads(line))[:4]: Run(*json.loads(line)) for line in lines}
    wanted = [(*x, m, seed) for seed in range(SEEDS) for x in STEPS for m in MOMENTA]
    for key in wanted:
        if key not in done and not publish:
            done[key] = trained(Run(*key))
            with RUNS.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(*done[key], flush=True)
    if all(key in done for key in wanted):
        import tuning_report  # and with it Keras

        text = tuning_report.markdown([*table([done[key] for key in wanted])])
        sys.stdout.write(text)
        PAGE.write_text(between(PAGE.read_text(), BEGIN, END, text))


if __name__ == "__main__":
    main()
