"""Time `fit` steps with an embedding: this RMSprop, the built-in, a floor and PyTorch.

    python benchmarks/embedding.py [--quick] [--rounds N] [--torch-python PATH]

The model is Embedding -> GlobalAveragePooling1D -> Dense, the optimizers are as they
come. Each trains in processes of its own, in turns with the others. A figure is the
median over the rounds of each round's median, with the rounds' range in brackets.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import embedding_report
import harness
from embedding_report import COMPETITORS, LARGE, SMALL, WAYS, Case, Results
from embedding_step import ROW

SIZES = SMALL, 10_000, 100_000, LARGE, 4_000_000


def main() -> None:
    """Run the rounds and print the tables; write them and the picture unless quick."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="two sizes, one round; writes nothing")
    add("--rounds", type=int, default=3, help="how often each one runs")
    add("--torch-python", default=sys.executable, help="interpreter that has PyTorch")
    add("--publish", action="store_true", help="page and picture anew; no measuring")
    options = parser.parse_args()
    if options.publish:
        embedding_report.publish()
        return

    torch = torch_version(options.torch_python)
    machine = harness.machine() | {"torch": torch}
    print(harness.sentence(machine))
    if not torch:
        print(f"Without torch SparseAdam: {options.torch_python} has no PyTorch")
    room = harness.memory("MemAvailable") / (8 * ROW)  # the built-in takes 6 tables
    sizes = [size for size in SIZES if not size > room]
    if len(sizes) < len(SIZES):
        print(f"Up to {sizes[-1]:,} rows: for more there is not enough memory")
    cases = [
        Case(competitor, size, xla)
        for size in ([SMALL, LARGE] if options.quick else sizes)
        for xla in WAYS
        for competitor in COMPETITORS
        if competitor != "torch" or (torch and not xla)
    ]
    if options.quick:
        results = measure(cases, options.torch_python, 1, {"uniform": 5})
        embedding_report.show(results)
        return
    steps = {"uniform": 15, "zipf": 15}
    results = measure(cases, options.torch_python, options.rounds, steps)
    by_malloc = (c._replace(malloc=True) for c in cases if c.competitor == "ours")
    results.peaks.update(measure(by_malloc, sys.executable, 1, {"uniform": 2}).peaks)
    embedding_report.show(results)
    embedding_report.save(results, machine)
    embedding_report.publish()


def torch_version(python: str) -> str | None:
    """Return the version of PyTorch that an interpreter has, if any.

    Args:
        python: The interpreter.
    """
    command = [python, "-c", "import torch; print(torch.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def measure(
    cases: Iterable[Case], torch_python: str, rounds: int, steps: dict[str, int]
) -> Results:
    """Run the cases in turns.

    Args:
        cases: What to run.
        torch_python: The interpreter that has PyTorch.
        rounds: How often each one runs.
        steps: How many steps are timed, by the kind of ids.
    """
    commands = {}
    for case in cases:
        python = torch_python if case.competitor == "torch" else sys.executable
        step = Path(__file__).with_name("embedding_step.py")
        settings = json.dumps(case._asdict() | {"steps": steps})
        commands[case] = [python, str(step), settings]
    results = harness.in_turns(commands, rounds)
    return Results(
        {
            (case, kind): [statistics.median(r["times"][kind]) for r in results[case]]
            for case, kind in itertools.product(results, steps)
        },
        {case: [r["peak"] or math.nan for r in results[case]] for case in results},
    )


if __name__ == "__main__":
    main()
