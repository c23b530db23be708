"""What `bench.py` measured, and which targets hold."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from bench_fit import MODELS
from bench_update import OPTIONS, SETS
from harness import Spread, spread

PARTS = "update", "fit", "memory"
WAYS = "eager", "tf.function", "XLA"
LARGEST = "4 x 4096 x 4096"
"""The set whose memory is measured."""
LARGEST_BYTES = 4 * max(math.prod(shape) for shape in SETS[LARGEST])
TWINS = "axes as they come", "axes flattened"
PEERS = "torch, foreach", "optax, jit"
"""Of these the faster one counts."""
NOISE = 1.05
"""Up to this ratio of medians nobody is called slower."""
EAGER = {
    20: ["MNIST network", "160 small", "300 tiny"],
    8: ["ResNet-50", "depthwise"],
    4: [LARGEST],
}
"""How many times as fast as the built-in the eager update shall be on which sets."""
LIMIT = {1.6: ["16 M", LARGEST], 2.5: ["1 M"]}
"""Within how many times the limit an update shall be on which sets."""

Case = tuple[str, str, str]
"""Who, what and how; see `Figure`."""
Ratios = dict[str, Spread | None]
"""Ratios by the names of cases; None where one of the two failed."""


@dataclasses.dataclass
class Figure:
    """What was measured of one competitor."""

    who: str
    what: str
    """A set of variables, a model, or `"import"`."""
    how: str
    """The options of the optimizer, or those of `compile`."""
    values: dict[str, list[float]] | None = dataclasses.field(default_factory=dict)
    """A value a round: `time`, milliseconds of a step; `first`, seconds of the first;
    `state`, bytes a parameter; `peak`, bytes in a step. None where one failed."""

    def __str__(self) -> str:
        """Return a name for people."""
        return ", ".join(dict.fromkeys((self.what, self.how, self.who)))

    def add(self, measured: Mapping[str, float | None]) -> None:
        """Add the values of one round, as far as there are any."""
        assert self.values is not None
        for name, value in measured.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)


class Part:
    """Figures that were measured in one run, on one machine."""

    def __init__(self, machine: dict[str, Any], figures: Iterable[Figure]) -> None:
        self.machine = machine
        self.figures = {(f.who, f.what, f.how): f for f in figures}
        self.whos, self.whats, self.hows = (
            list(dict.fromkeys(case[i] for case in self.figures)) for i in range(3)
        )

    def values(self, case: Case, of: str = "time") -> list[float]:
        """Return what was measured, a value a round."""
        figure = self.figures.get(case)
        return figure.values.get(of, []) if figure and figure.values else []

    def fastest(self, whos: Iterable[str], what: str, how: str) -> str:
        """Return who has the least median."""

        def median(who: str) -> float:
            return statistics.median(self.values((who, what, how)) or [math.inf])

        return min(whos, key=median)

    def ratio(self, a: Case, b: Case, of: str = "time") -> Spread | None:
        """Return how many times `b` the figure `a` is, round by round."""
        pairs = zip(self.values(a, of), self.values(b, of), strict=False)
        ratios = [x / y for x, y in pairs]
        return spread(ratios) if ratios else None

    def growth(self, who: str, what: str) -> Spread | None:
        """Return how many times as long an update takes with everything on."""
        return self.ratio((who, what, "everything"), (who, what, "plain"))

    def ratios(
        self,
        a: str,
        b: str,
        whats: Sequence[str] = (),
        hows: Sequence[str] = (),
        of: str = "time",
    ) -> Ratios:
        """Return the ratios of two competitors in these cases, or in all there are."""
        return {
            ", ".join(dict.fromkeys((what, how))): self.ratio(
                (a, what, how), (b, what, how), of
            )
            for what, how in product(whats or self.whats, hows or self.hows)
            if (a, what, how) in self.figures and (b, what, how) in self.figures
        }


class Target(NamedTuple):
    """What the issue "Speed" aims at."""

    text: str
    ratios: Ratios
    bound: float | None
    """Which none of the ratios may pass; None if there is nothing to hold."""
    most: bool = True
    """Whether the bound is the highest value that holds, not the least."""
    beside: Ratios | None = None
    """The built-in's ratios."""

    def row(self) -> list[str]:
        """Return the row of a table: the text, the worst case, whether it holds."""
        seen = {name: x for name, x in self.ratios.items() if x}
        if not self.ratios:
            return [self.text, "not measured", ""]
        failed = [f"failed: {name}" for name in self.ratios if name not in seen]
        if not seen:
            return [self.text, "; ".join(failed), "no"]
        worst = (max if self.most else min)(seen, key=lambda name: seen[name].median)
        cells = [f"{seen[worst]} on {worst}"]
        if beside := (self.beside or {}).get(worst):
            cells.append(f"Keras {beside}")
        text = "; ".join([*cells, *failed])
        if self.bound is None:
            return [self.text, text, ""]
        margin = self.bound - seen[worst].median
        holds = not failed and (margin >= 0 if self.most else margin <= 0)
        return [self.text, text, "yes" if holds else "**no**"]


def targets(results: dict[str, Part]) -> list[list[str]]:
    """Return a table of what was aimed at, the worst case seen, and whether it holds.

    Args:
        results: The parts, as far as they were measured.
    """
    update, fit, memory = (results.get(part, Part({}, [])) for part in PARTS)
    of_all = (*_eager(update), *_compiled(update, fit), *_cost(update, fit, memory))
    return [["target", "worst case", "holds"], *(target.row() for target in of_all)]


def _eager(update: Part) -> Iterator[Target]:
    for how, (times, sets) in product(OPTIONS, EAGER.items()):
        text = f"eager, {how}: {times} x as fast as Keras ({', '.join(sets)})"
        ratios = update.ratios("Keras, eager", "this, eager", sets, [how])
        yield Target(text, ratios, times, most=False)
    against: dict[str, tuple[Sequence[str], float | None]] = {
        "not slower than the better of torch foreach and optax": (PEERS, NOISE),
        "the row to beat next, time over torch compiled": (["torch, compiled"], None),
    }
    for how, (text, (peers, bound)) in product(OPTIONS, against.items()):
        ratios = {}
        for what in update.whats:
            peer = update.fastest(peers, what, how)
            ratios |= update.ratios("this, eager", peer, [what], [how])
        yield Target(f"eager, {how}: {text}", ratios, bound)


def _compiled(update: Part, fit: Part) -> Iterator[Target]:
    for way, jit in (("tf.function", "default"), ("XLA", "jit_compile=True")):
        ratios = update.ratios(f"this, {way}", f"Keras, {way}")
        yield Target(f"{way}: not slower than Keras", ratios, NOISE)
        ratios = fit.ratios("this", "Keras", hows=[jit])
        yield Target(f"fit, {jit}: not slower than Keras", ratios, NOISE)
    ratios = fit.ratios("Keras", "this", ["wide"], ["default"])
    yield Target("fit, default: 1.3 x as fast as Keras (wide)", ratios, 1.3, False)
    ratios = update.ratios("Keras, tf.function", "this, tf.function", [LARGEST])
    text = f"tf.function: 2.5 x as fast as Keras ({LARGEST})"
    yield Target(text, ratios, 2.5, most=False)
    mine = [f for f in update.figures if f[:2] == ("this, XLA", TWINS[0])]
    ratios = {how: update.ratio((w, s, how), (w, TWINS[1], how)) for w, s, how in mine}
    yield Target("XLA: no axis order slower than its flattened twin", ratios, NOISE)


def _cost(update: Part, fit: Part, memory: Part) -> Iterator[Target]:
    for way, (times, sets) in product(WAYS, LIMIT.items()):
        text = f"{way}: within {times} x the limit ({', '.join(sets)})"
        yield Target(text, update.ratios(f"this, {way}", "limit", sets), times)
    whats = update.whats if len(update.hows) > 1 else []
    for way in WAYS:
        ratios, theirs = (
            {what: update.growth(f"{who}, {way}", what) for what in whats}
            for who in ("this", "Keras")
        )
        text = f"{way}: everything at most 2.5 x plain"
        yield Target(text, ratios, 2.5, beside=theirs)
    for text, whats in (("first step of fit", list(MODELS)), ("import", ["import"])):
        ratios = fit.ratios("this", "Keras", whats, of="first")
        yield Target(f"{text}: at most 1.2 x Keras", ratios, 1.2)
    ratios = {
        f"{who}, {how}": spread([x / LARGEST_BYTES for x in peak]) if peak else None
        for who, what, how in memory.figures
        if who.startswith("this")
        for peak in [memory.values((who, what, how), "peak")]
    }
    yield Target("a step allocates one largest variable at most", ratios, 1)
