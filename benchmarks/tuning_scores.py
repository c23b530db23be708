"""What competitors of `tuning.py` reached, each at the rate that counts."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from tuning_competitors import DEFAULT, GRID, Result, Run
from tuning_tasks import EVERY, HELD_OUT, Task

AUTO = '"auto"'
Results = Mapping[Run, Result]


class Score(NamedTuple):
    """Mean and spread over the seeds at one rate; NaN where a training failed."""

    mean: float
    low: float
    high: float
    rate: float
    seeds: int


def score(
    results: Results, task: str, who: str, rate: float, field: str = "value"
) -> Score | None:
    """Return what a competitor reached at one rate, if it ran.

    Args:
        results: What ran.
        task: The network.
        who: The competitor.
        rate: The learning rate.
        field: Which of a result's numbers.
    """
    got = [
        (getattr(result, field), result.rate)
        for given, result in results.items()
        if (given.task, given.competitor, given.rate) == (task, who, rate)
    ]
    if not got:
        return None
    values, rates = np.array(got).T
    values = values * EVERY[task].factor
    mean, low, high = (float(f(values)) for f in (np.mean, np.min, np.max))
    return Score(mean, low, high, float(np.median(rates)), len(values))


def rank(task: Task, found: Score) -> float:
    """Return a number that is greater the better a score is."""
    if not math.isfinite(found.mean):
        return -math.inf
    return found.mean if task.metric == "accuracy" else -found.mean


def best(results: Results, task: str, who: str) -> Score | None:
    """Return a competitor's best rate, by the mean over the seeds.

    A rate counts if it ran with two seeds, where any did; and if it is no end of what
    was tried: beyond it there may be a better one.
    """
    scores = {r: s for r in GRID if (s := score(results, task, who, r)) is not None}
    seeds = min(2, max((s.seeds for s in scores.values()), default=0))
    whole = [s for s in scores.values() if s.seeds >= seeds]
    top = max(whole, key=lambda s: rank(EVERY[task], s), default=None)
    return top if top and top.rate not in (min(scores), max(scores)) else None


def at(who: str, rate: float) -> Callable[..., Score | None]:
    """Return what finds a competitor's score at a rate."""
    return lambda results, task: score(results, task, who, rate)


def of_best(who: str) -> Callable[..., Score | None]:
    """Return what finds a competitor's best score."""
    return lambda results, task: best(results, task, who)


class Column(NamedTuple):
    """One of those compared: how its score is found, and how it is drawn."""

    find: Callable[..., Score | None]
    color: str = ""
    marker: str = ""
    filled: bool = True


COLUMNS = {
    AUTO: Column(at("auto", 1.0), "#2a78d6"),
    "RMSprop, default": Column(at("constant", DEFAULT), "#e8710a", "o", False),
    "RMSprop, best rate": Column(of_best("constant"), "#e8710a", "o"),
    "Adam, best rate": Column(of_best("adam"), "#4b4a46", "s"),
    "Adam, best rate, linear decay": Column(of_best("adam decay"), "#9b3fb5", "D"),
    "AdamW, best rate, linear decay": Column(
        of_best("adamw decay"), "#9b3fb5", "D", False
    ),
    "ScheduleFreeAdamW, default": Column(
        at("schedule free", 0.0025), "#1a9076", "^", False
    ),
    "ScheduleFreeAdamW, best rate": Column(of_best("schedule free"), "#1a9076", "^"),
}
MORE = {
    "RMSprop, best rate, linear decay": Column(of_best("decay")),
    "this, best rate, EMA": Column(of_best("average")),
    "Prodigy": Column(at("prodigy", 1.0)),
}
"""In the JSON only."""


def found(results: Results, task: str, name: str) -> Score | None:
    """Return the score of a column, if it is there."""
    score_: Score | None = (COLUMNS | MORE)[name].find(results, task)
    return score_


def shown(results: Results) -> list[str]:
    """Return the tasks that "auto" trained."""
    return [name for name in EVERY if found(results, name, AUTO)]


def title(name: str) -> str:
    """Return what a task is called and what counts; a star where it was held out."""
    task = EVERY[name]
    unit = "%" if task.metric == "accuracy" else "loss"
    if task.metric == "loss" and task.factor != 1:
        unit += f" × {task.factor:g}"
    return f"{task.title}{' *' * (name in HELD_OUT)}, {unit}"


def worse(task: str, value: float) -> float:
    """Return a loss, or an error in percent."""
    return 100 - value if EVERY[task].metric == "accuracy" else value
