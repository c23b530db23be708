"""What the benchmarks share: processes that take turns, and what the machine is."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich import progress

Key = TypeVar("Key")
PACKAGES = ("keras_rmsprop", "keras", "tensorflow", "numpy")


class Spread(NamedTuple):
    """What several rounds measured."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the median and, in brackets, how far the rounds lie apart."""
        low, median, high = (f"{x:.3g}" for x in (self.low, self.median, self.high))
        return median if low == high else f"{median} ({low}-{high})"


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and most of some values.

    Args:
        values: One value a round.
    """
    return Spread(statistics.median(values), min(values), max(values))


def in_turns(
    commands: Mapping[Key, Sequence[str]], rounds: int
) -> dict[Key, list[Any]]:
    """Run each command in each round, one at a time, and return what they print.

    Args:
        commands: Command lines that print one JSON value as their last line.
        rounds: How often every command runs. As they take turns, whatever else the
            machine does meanwhile befalls all of them.

    Returns:
        Under each key a value a round.

    Raises:
        RuntimeError: A command failed; the message ends with what it complained of.
    """
    results: dict[Key, list[Any]] = {key: [] for key in commands}
    turns = [key for _ in range(rounds) for key in commands]
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=len(turns))
        for key in turns:
            bar.update(task, description=str(key))
            done = subprocess.run(commands[key], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{key} failed:\n{done.stderr[-2000:]}")
            results[key].append(json.loads(done.stdout.splitlines()[-1]))
            bar.advance(task)
    return results


def machine() -> dict[str, Any]:
    """Return what the figures depend on: the machine, its load and the versions."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory("MemTotal") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def sentence(machine: dict[str, Any]) -> str:
    """Return a description of the machine in one line.

    Args:
        machine: What `machine` returned.
    """
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in machine.items() if v)


def memory(what: str) -> float:
    """Return a number of bytes from `/proc/meminfo`, NaN where there is none.

    Args:
        what: `"MemTotal"` or `"MemAvailable"`.
    """
    return 1024 * float(_proc("meminfo", what, "nan").split()[0])


def _cpu() -> str:
    return _proc("cpuinfo", "model name", platform.processor() or platform.machine())


def _proc(file: str, name: str, default: str) -> str:
    """Return what a file of `/proc`, where there is one, has under a name."""
    path = Path("/proc") / file
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return default


def _commit() -> str:
    """Return the commit of this checkout, with a + where files differ from it."""
    here = str(Path(__file__).parent)
    git = ["git", "--no-optional-locks", "-C", here]
    describe = [*git, "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        out = subprocess.check_output(describe, stderr=subprocess.DEVNULL, text=True)
        return out.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
