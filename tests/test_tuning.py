"""What `make tuning` tries, and which rate it calls the best."""

import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("top", range(12))
@pytest.mark.parametrize("start", [0, 6, 11])
def test_climbs_until_the_neighbours_are_worse(load, top, start):
    tuning = load("tuning")
    assert len(tuning.GRID) == 12
    tried = []

    def score(rate):
        assert rate in tried
        return -abs(tuning.GRID.index(rate) - top)

    for rate in tuning.climb(start, score):
        tried.append(rate)
    around = tuning.GRID[max(top - 1, 0) : top + 2]
    assert {*around} <= {*tried}
    assert len({*tried}) == max(start, top) - min(start, top) + 3 - sum(
        place in (0, 11) for place in {start, top}
    )


def test_failed_trainings_end_the_climb(load):
    tuning = load("tuning")
    assert [*tuning.climb(6, lambda rate: -np.inf)] == [*tuning.GRID[5:8]]


def test_plans_what_is_missing_and_all_seeds_of_the_best(load):
    tuning = load("tuning")
    done = {}
    for run in tuning.plan_one("regression", "adam", 1, 1.0, done):
        assert run not in done
        loss = abs(np.log10(run.rate) + 1.5)  # the best is 0.0316
        done[run] = tuning.Result(loss, loss, loss, run.rate, 0)
    first = {run.rate for run in done}
    assert first == {0.001, 0.000316, 0.00316, 0.01, 0.0316, 0.1}
    again = list(tuning.plan_one("regression", "adam", 1, 1.0, done))
    assert again == []
    for run in tuning.plan_one("regression", "adam", 2, 1.0, done):
        done[run] = tuning.Result(abs(np.log10(run.rate) + 1.5), 0, 0, run.rate, 0)
    second = {run.rate for run in done if run.seed == 1}
    assert second == {0.001, 0.01, 0.0316, 0.1}


def test_an_end_of_what_was_tried_is_no_best_rate(load):
    tuning, scores = load("tuning"), load("tuning_scores")

    def results(*rates):
        return {
            tuning.Run("mnist", "adam", rate, seed, 1.0): tuning.Result(
                value, 0, 0, rate, 0
            )
            for rate, value in zip(tuning.GRID, rates, strict=False)
            for seed in range(2)
        }

    assert scores.best(results(0.5, 0.6, 0.7), "mnist", "adam") is None
    assert scores.best(results(0.7, 0.6, 0.5), "mnist", "adam") is None
    found = scores.best(results(0.5, 0.7, 0.6), "mnist", "adam")
    assert (found.mean, found.rate, found.seeds) == (70, tuning.GRID[1], 2)


def test_verdicts_count_what_is_behind_and_by_how_much(load):
    tuning, report = load("tuning"), load("tuning_report")

    def of(task, who, rate, value):
        run = tuning.Run(task, who, rate, 0, 1.0)
        return {run: tuning.Result(value, value, value, rate, 0)}

    results = of("mnist", "auto", 1.0, 0.97) | of("mnist", "constant", 0.001, 0.972)
    results |= of("gru", "auto", 1.0, 1.5) | of("gru", "constant", 0.001, 1.6)
    results |= of("vit", "auto", 1.0, 0.91) | of("vit", "constant", 0.001, 0.9)
    first, *_, last, seeds = report.verdicts(results)
    assert "on 2 of 3 tasks (1 of 1 held out)" in first
    assert first.endswith("all; **missed**. Behind: MNIST (0.2 points).")
    assert "97.00 %" in last
    assert "**missed**" in last
    assert seeds.endswith("Of the others' 3 means are 3 of 1 seed.")
    better = results | of("mnist", "auto", 1.0, 0.982)
    first, *_, last, seeds = report.verdicts(better)
    assert first.endswith("on 3 of 3 tasks (1 of 1 held out). Goal: all; reached.")
    assert last.endswith("Goal: 98.1; reached.")
