"""`make fuzz`: how many programs, and which."""

import random

import pytest
from hypothesis import HealthCheck, Phase, settings


def pytest_addoption(parser):
    parser.addoption("--programs", type=int, default=200, help="how many programs")
    parser.addoption("--length", type=int, default=10, help="most rules in a program")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = random.randrange(10**6)
    settings.register_profile(
        "fuzz",
        max_examples=config.option.programs,
        stateful_step_count=config.option.length,
        deadline=None,
        derandomize=False,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
        suppress_health_check=[*HealthCheck],
    )
    settings.load_profile("fuzz")


def pytest_report_header(config):
    return (
        f"fuzz: {config.option.programs} programs, seed {config.option.hypothesis_seed}"
    )
