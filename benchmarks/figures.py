"""What was measured: figures, their ratios, and which targets hold."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

PARTS = "update", "fit", "memory", "embedding"
WAYS = "eager", "tf.function", "XLA"
LARGEST = "4 x 4096 x 4096"
"""The set of variables whose memory is measured."""
KEPT = "16 M"
"""The set of variables that is updated with slots of fewer bytes."""
LARGEST_BYTES = 4 * 4096 * 4096
"""Of one of its variables."""
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
LIMIT = {1.3: ["16 M", LARGEST], 2.5: ["1 M"]}
"""Within how many times the limit an update shall be on which sets."""

FIT = {1.15: "MNIST network", 1.5: "wide", 1.1: "61 x 64"}
"""How many times as fast as the built-in the default `fit` shall be on which model."""
COMPILED = 1.3
"""Within how many times torch's compiled step an update shall be."""

BYTES = {
    "uint8, eager": ("this, eager", NOISE),
    "portable uint8, eager": ("portable, eager", 2),
}
"""Within how many times whose update those with slots of a byte a number shall be."""

TABLE = 60, 2, "1,000,000 rows", "1,000 rows"
"""The update of a table: how many times as fast as the built-in on the first one, and
within how many times its own time on the second one."""

AUTO = "MNIST network", "16 M", "3 x 2048"
"""Where a step whose learning rate is to be found must not cost much more."""

Case = tuple[str, str, str]
"""Who, what and how; see `Figure`."""


class Spread(NamedTuple):
    """What several rounds measured."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the median and, in brackets, how far the rounds lie apart."""
        low, median, high = map(short, (self.low, self.median, self.high))
        return median if low == high else f"{median} ({low}-{high})"


Ratios = dict[str, Spread | None]
"""Ratios by the names of cases; None where one of the two failed."""


def short(value: float | None) -> str:
    """Return a number in about three digits, and nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> Spread | None:
    """Return median, least and most of one value a round, if there are any."""
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values))


@dataclasses.dataclass
class Figure:
    """What was measured of one competitor."""

    who: str
    what: str
    """A set of variables, a model, the rows of a table, or `"import"`."""
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

    def text(self, case: Case, of: str = "time") -> str:
        """Return what was measured for people, empty if it was not to be."""
        failed = case in self.figures and self.figures[case].values is None
        return "failed" if failed else str(spread(self.values(case, of)) or "")

    def fastest(self, whos: Iterable[str], what: str, how: str) -> str:
        """Return who has the least median."""
        medians = {who: spread(self.values((who, what, how))) for who in whos}
        return min(medians, key=lambda who: medians[who] or Spread(math.inf, 0, 0))

    def ratio(self, a: Case, b: Case, of: str = "time") -> Spread | None:
        """Return how many times `b` the figure `a` is, round by round."""
        pairs = zip(self.values(a, of), self.values(b, of), strict=False)
        return spread([x / y for x, y in pairs])

    def growth(self, who: str, what: str) -> Spread | None:
        """Return how many times as long an update takes with everything on."""
        return self.ratio((who, what, "everything"), (who, what, "plain"))

    def ratios(
        self,
        a: str,
        b: str,
        whats: Sequence[str] | None = None,
        hows: Sequence[str] | None = None,
        of: str = "time",
    ) -> Ratios:
        """Return the ratios of two competitors in these cases, or in all there are."""
        return {
            ", ".join(dict.fromkeys((what, how))): self.ratio(
                (a, what, how), (b, what, how), of
            )
            for what in (self.whats if whats is None else whats)
            for how in (self.hows if hows is None else hows)
            if (a, what, how) in self.figures and (b, what, how) in self.figures
        }


def targets(parts: Mapping[str, Part]) -> list[list[str]]:
    """Return a table of what was aimed at, the worst case seen, and whether it holds.

    Args:
        parts: What was measured, as far as it was.
    """
    update, fit, memory, tables = (parts.get(part, Part({}, [])) for part in PARTS)
    rows = (
        *_eager(update),
        *_on_torch(update),
        *_compiled(update, fit),
        *_cost(update, fit, memory),
        *_tables(tables),
    )
    return [["target", "worst case", "holds"], *rows]


def _target(
    text: str,
    ratios: Ratios,
    bound: float | None,
    least: bool = False,
    beside: Ratios | None = None,
) -> list[str]:
    """Return a row: what is aimed at, the worst case with the built-in's, the verdict.

    The bound is the highest ratio that holds, or the least; None if any does.
    """
    seen = {name: ratio for name, ratio in ratios.items() if ratio}
    cells = [f"failed: {name}" for name in ratios if name not in seen]
    holds = not cells
    if seen:
        worst = (min if least else max)(seen, key=lambda name: seen[name].median)
        if keras := (beside or {}).get(worst):
            cells.insert(0, f"Keras {keras}")
        cells.insert(0, f"{seen[worst]} on {worst}")
        if bound is not None:
            margin = bound - seen[worst].median
            holds = holds and (margin <= 0 if least else margin >= 0)
    verdict = "" if bound is None or not ratios else "yes" if holds else "**no**"
    return [text, "; ".join(cells), verdict]


Targets = Iterator[list[str]]


def _eager(update: Part) -> Targets:
    for how, (times, sets) in product(update.hows, EAGER.items()):
        text = f"eager, {how}: {times} x as fast as Keras ({', '.join(sets)})"
        ratios = update.ratios("Keras, eager", "this, eager", sets, [how])
        yield _target(text, ratios, times, least=True)
    against: dict[str, tuple[Sequence[str], float]] = {
        "not slower than the better of torch foreach and optax": (PEERS, NOISE),
        f"within {COMPILED} x torch compiled": (["torch, compiled"], COMPILED),
    }
    for how, (text, (peers, bound)) in product(update.hows, against.items()):
        ratios = {}
        for what in update.whats:
            peer = update.fastest(peers, what, how)
            ratios |= update.ratios("this, eager", peer, [what], [how])
        yield _target(f"eager, {how}: {text}", ratios, bound)


def _on_torch(update: Part) -> Targets:
    for how in update.hows:
        ratios = update.ratios("this, torch", "torch, foreach", hows=[how])
        text = f"on PyTorch, {how}: not slower than torch foreach"
        yield _target(text, ratios, NOISE)


def _compiled(update: Part, fit: Part) -> Targets:
    for way, jit in (("tf.function", "default"), ("XLA", "jit_compile=True")):
        ratios = update.ratios(f"this, {way}", f"Keras, {way}")
        yield _target(f"{way}: not slower than Keras", ratios, NOISE)
        ratios = fit.ratios("this", "Keras", hows=[jit])
        yield _target(f"fit, {jit}: not slower than Keras", ratios, NOISE)
    for times, model in FIT.items():
        ratios = fit.ratios("Keras", "this", [model], ["default"])
        text = f"fit, default: {times} x as fast as Keras ({model})"
        yield _target(text, ratios, times, least=True)
    ratios = update.ratios("Keras, tf.function", "this, tf.function", [LARGEST])
    text = f"tf.function: 2.5 x as fast as Keras ({LARGEST})"
    yield _target(text, ratios, 2.5, least=True)
    mine = [f for f in update.figures if f[:2] == ("this, XLA", TWINS[0])]
    ratios = {how: update.ratio((w, s, how), (w, TWINS[1], how)) for w, s, how in mine}
    yield _target("XLA: no axis order slower than its flattened twin", ratios, NOISE)


def _cost(update: Part, fit: Part, memory: Part) -> Targets:
    for way, (times, sets) in product(WAYS, LIMIT.items()):
        text = f"{way}: within {times} x the limit ({', '.join(sets)})"
        yield _target(text, update.ratios(f"this, {way}", "limit", sets), times)
    for part, pair in (
        (update, ("auto, eager", "this, eager")),
        (fit, ("auto", "this")),
    ):
        ratios = part.ratios(*pair, AUTO)
        yield _target('a rate to be found ("auto"): at most 1.6 x plain', ratios, 1.6)
    ratios = fit.ratios("this, Monitor", "this")
    yield _target("watched by Monitor: at most 1.05 x plain", ratios, 1.05)
    whats = update.whats if len(update.hows) > 1 else []
    for way in WAYS:
        mine, theirs = (
            {what: update.growth(f"{who}, {way}", what) for what in whats}
            for who in ("this", "Keras")
        )
        text = f"{way}: everything at most 2.5 x plain"
        yield _target(text, mine, 2.5, beside=theirs)
    models = [what for what in fit.whats if what != "import"]
    for text, whats in (("first step of fit", models), ("import", ["import"])):
        ratios = fit.ratios("this", "Keras", whats, of="first")
        yield _target(f"{text}: at most 1.2 x Keras", ratios, 1.2)
    for who, way in product(("this", "auto"), WAYS):
        ratios = update.ratios(f"{who}, {way}", f"Keras, {way}", of="first")
        text = f"first step of an update, {way}, {who}: at most 1.2 x Keras"
        yield _target(text, ratios, 1.2)
    ratios = {
        f"{case[0]}, {case[2]}": spread(
            [peak / LARGEST_BYTES for peak in memory.values(case, "peak")]
        )
        for case in memory.figures
        if case[0].startswith(("this", "uint8", "portable uint8"))
        and case[1] == LARGEST
    }
    yield _target("a step allocates one largest variable at most", ratios, 1)
    for who, (other, bound) in BYTES.items():
        ratios = memory.ratios(who, other, [KEPT])
        yield _target(f"{who}: within {bound} x {other} ({KEPT})", ratios, bound)


def _tables(tables: Part) -> Targets:
    times, most, large, small = TABLE
    updates = [how for how in tables.hows if how.endswith("an update")]
    ratios = tables.ratios("Keras", "this", [large], updates)
    text = f"an update of {large}: {times} x as fast as Keras"
    yield _target(text, ratios, times, least=True)
    ratios = {
        how: tables.ratio(("this", large, how), ("this", small, how)) for how in updates
    }
    yield _target(f"an update of {large}: within {most} x {small}", ratios, most)
    hows = [how for how in tables.hows if how.endswith("an update with XLA")]
    for of, text, bound in (
        ("time", "not slower than Keras", NOISE),
        ("first", "the first one at most 1.2 x Keras", 1.2),
    ):
        ratios = tables.ratios("this", "Keras", hows=hows, of=of)
        yield _target(f"an update of a table with XLA: {text}", ratios, bound)
    how, first = "mean, without XLA", "10,000 rows"
    ratios = {
        f"{what}, {who}": tables.ratio((who, what, how), (who, first, how))
        for who, what, of in tables.figures
        if of == how and what != first
    }
    yield _target(f"fit, any option: within 1.5 x its own at {first}", ratios, 1.5)
