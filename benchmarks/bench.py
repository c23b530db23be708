"""Measure updates, whole `fit` steps and memory, next to the built-in and the peers.

    python benchmarks/bench.py [--quick] [--rounds N] [--threads N] [--only PART]

Each competitor has a process of its own, and all take turns, round by round. A figure
is the median over the rounds, with their range in brackets.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import bench_report
import harness
from bench_figures import LARGEST, PARTS, Figure, Part
from bench_fit import IMPORTS, MODELS, OPTIMIZERS
from bench_update import COMPETITORS, OPTIONS, SETS
from rich import progress

JIT = {"default": None, "jit_compile=True": True}
PEERS = "torch", "jax", "optax", "numba"
FIRST_STEPS = 4
"""In how many rounds a model is made, and compiled, anew; but for the quick run."""
LARGE_ROUNDS = 3
"""In how many rounds a set is measured for which every process starts anew."""
QUICK_SETS = "MNIST network", "160 small", "16 M"
QUICK_MODELS = "MNIST network", "wide"
SLOW = "torch, compiled"
"""Compiles for a minute; not for the quick run."""


class Turn(NamedTuple):
    """What is done while nothing else is."""

    name: str
    seconds: float
    """About how long it takes."""
    do: Callable[[], None]


class Crew:
    """The workers of one part, by the names of their competitors; see `Worker`."""

    def __init__(self, program: str, **environment: str) -> None:
        self.figures: list[Figure] = []
        self.complaints: list[str] = []
        self._command = [sys.executable, str(Path(__file__).with_name(program))]
        self._environment = environment
        self._workers: dict[str, harness.Worker] = {}

    def figures_of(self, whos: Sequence[str], what: str, how: str) -> list[Figure]:
        """Return figures that are to be filled, one a competitor."""
        new = [Figure(who, what, how) for who in whos]
        self.figures += new
        return new

    def turn(self, figure: Figure, cost: float, do: str, **request: Any) -> Turn:
        """Return a turn in which the competitor's worker measures something."""

        def ask() -> Any:
            if figure.who not in self._workers:
                command = [*self._command, figure.who]
                worker = harness.Worker(command, **self._environment)
                self._workers[figure.who] = worker
            return self._workers[figure.who].ask(do=do, **request)

        return Turn(str(figure), cost, partial(self._add, figure, do, ask))

    def run(self, figure: Figure, cost: float, *arguments: str) -> Turn:
        """Return a turn in which a process of its own prints the seconds it took."""
        ask = partial(harness.printed, [*self._command, *arguments])
        return Turn(str(figure), cost, partial(self._add, figure, "first", ask))

    def stop(self, *whos: str) -> None:
        """End the workers of these competitors, or all."""
        for who in whos or list(self._workers):
            if worker := self._workers.pop(who, None):
                worker.stop()

    def _add(self, figure: Figure, of: str, measure: Callable[[], Any]) -> None:
        """Add what is measured to a figure, unless something failed for it."""
        if figure.values is None:
            return
        try:
            answer = measure()
            figure.add(answer if isinstance(answer, dict) else {of: answer})
        except RuntimeError as error:
            figure.values = None
            self.stop(figure.who)
            self.complaints.append(f"{figure}: {error}")


Plan = dict[str, tuple[Crew, list[Turn]]]


def main() -> None:
    """Measure, print the tables, and write them and the picture unless quick."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases; writes nothing")
    add("--rounds", type=int, help="how often each is timed (default: 5; quick: 2)")
    add("--threads", type=int, default=harness.cores(), help="(default: all cores)")
    add("--only", choices=PARTS, help="this part; keeps the others")
    add("--publish", action="store_true", help="page and picture anew; no measuring")
    add("--seconds", type=float, default=0.3, help=argparse.SUPPRESS)
    add("--folder", type=Path, default=bench_report.RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        bench_report.publish(options.folder)
        return

    harness.fix_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    machine = harness.machine(*PEERS)
    machine |= {"threads": options.threads, "rounds": rounds}
    print(harness.sentence(machine))
    parts = plan(options.quick, rounds, options.seconds)
    if options.only:
        parts = {part: parts[part] for part in parts if part == options.only}
    results = {}
    for part, crew in run(parts):
        results[part] = Part(machine, crew.figures)
        if not options.quick:
            bench_report.save(options.folder, part, results[part])
    if not options.quick:
        results = bench_report.publish(options.folder)
    bench_report.show(results)
    print(*(text for crew, _ in parts.values() for text in crew.complaints), sep="\n\n")


def plan(quick: bool, rounds: int, seconds: float) -> Plan:
    """Return who does what in each part."""
    update, fit = Crew("bench_update.py"), Crew("bench_fit.py")
    if quick:
        turns = updates(update, QUICK_SETS, quick, rounds, seconds / 2)
        fits = fit_steps(fit, QUICK_MODELS, ["default"], rounds, 1, seconds)
        return {"update": (update, list(turns)), "fit": (fit, list(fits))}
    # TensorFlow's other allocator keeps what it once had.
    memory = Crew("bench_update.py", TF_ENABLE_ONEDNN_OPTS="0")
    small = [name for name in SETS if not too_large(name)]
    large = [name for name in SETS if too_large(name)]
    turns = updates(update, small, quick, rounds, seconds)
    alone = updates_alone(update, large, min(rounds, LARGE_ROUNDS), seconds)
    firsts = min(rounds, FIRST_STEPS)
    fits = fit_steps(fit, MODELS, JIT, rounds, firsts, 2 * seconds)
    return {
        "update": (update, [*turns, *alone]),
        "fit": (fit, [*imports(fit, rounds + 2), *fits]),
        "memory": (memory, list(peaks(memory))),
    }


def too_large(set_name: str) -> bool:
    """Return whether not all competitors can have a set in memory at once."""
    numbers = sum(math.prod(shape) for shape in SETS[set_name])
    most = 4 * (2 + 3) * numbers * len(COMPETITORS)  # weights, gradients, three slots
    return most > harness.memory("MemAvailable") / 2


def updates(
    crew: Crew, sets: Iterable[str], quick: bool, rounds: int, seconds: float
) -> Iterator[Turn]:
    """Yield the turns of updates by workers that all stay."""
    whos = [who for who in COMPETITORS if not (quick and who == SLOW)]
    hows = ["plain"] if quick else list(OPTIONS)
    for what, how in product(sets, hows):
        figures = crew.figures_of(whos, what, how)
        for f in figures:
            cost = 60 if f.who == SLOW else 5
            yield crew.turn(f, cost, "prepare", set_name=what, options=how)
        for f in in_order(figures, rounds):
            yield crew.turn(f, 2 * seconds, "time", seconds=seconds)
    yield Turn("", 0, crew.stop)  # TensorFlow would keep the memory it once had


def updates_alone(
    crew: Crew, sets: Iterable[str], rounds: int, seconds: float
) -> Iterator[Turn]:
    """Yield the turns of updates by workers that start anew in each round."""
    for what in sets:
        figures = [crew.figures_of(list(COMPETITORS), what, how) for how in OPTIONS]
        for of_one in list(zip(*figures, strict=True)) * rounds:
            for f in of_one:
                yield crew.turn(f, 12, "prepare", set_name=what, options=f.how)
                yield crew.turn(f, 1, "time", seconds=seconds)
            yield Turn("", 0, partial(crew.stop, of_one[0].who))


def fit_steps(
    crew: Crew,
    models: Iterable[str],
    hows: Iterable[str],
    rounds: int,
    firsts: int,
    seconds: float,
) -> Iterator[Turn]:
    """Yield the turns of `fit`, the first step in so many rounds."""
    for what, how in product(models, hows):
        figures = crew.figures_of(list(OPTIMIZERS), what, how)
        for f in in_order(figures, firsts):
            yield crew.turn(f, 4, "prepare", model=what, jit=JIT[how])
        for f in in_order(figures, 2 * rounds):
            yield crew.turn(f, seconds, "time", seconds=seconds)


def in_order(figures: list[Figure], rounds: int) -> Iterator[Figure]:
    """Yield all figures in each round, in turns from the first and from the last."""
    for r in range(rounds):
        yield from figures[:: -1 if r % 2 else 1]


def imports(crew: Crew, rounds: int) -> Iterator[Turn]:
    """Yield the turns of the imports."""
    figures = crew.figures_of(["this", "Keras"], "import", "import")
    for f, module in [*zip(figures, IMPORTS, strict=True)] * rounds:
        yield crew.run(f, 5, "--import", module)


def peaks(crew: Crew) -> Iterator[Turn]:
    """Yield the turns of memory, each by a worker that starts anew."""
    whos = [who for who in COMPETITORS if who not in ("torch, plain", SLOW)]
    for how in OPTIONS:
        for f in crew.figures_of(whos, LARGEST, how):
            yield crew.turn(f, 12, "prepare", set_name=LARGEST, options=how)
            yield crew.turn(f, 1, "peak")
            yield Turn("", 0, partial(crew.stop, f.who))


def run(parts: Plan) -> Iterator[tuple[str, Crew]]:
    """Do all turns, with a bar, and yield each part when it is done."""
    total = sum(turn.seconds for _, turns in parts.values() for turn in turns)
    with progress.Progress(transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)
        for part, (crew, turns) in parts.items():
            try:
                for turn in turns:
                    bar.update(task, description=f"{turn.name:<50}")
                    turn.do()
                    bar.advance(task, turn.seconds)
            finally:
                crew.stop()
            yield part, crew


if __name__ == "__main__":
    main()
