"""What the benchmarks share: processes that take turns, and what the machine is."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
        low, median, high = map(short, (self.low, self.median, self.high))
        return median if low == high else f"{median} ({low}-{high})"


def short(value: float) -> str:
    """Return a number in about three digits.

    Args:
        value: The number.
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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
            results[key].append(printed(commands[key]))
            bar.advance(task)
    return results


def printed(command: Sequence[str]) -> Any:
    """Run a command and return the JSON value that it prints as its last line.

    Args:
        command: The command line.

    Raises:
        RuntimeError: It failed; the message ends with what it complained of.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Worker:
    """A process that measures when asked, so that many can take turns by the second.

    It runs a program that calls `serve`; what it complains of is kept for `ask`.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment,
        )

    def ask(self, **request: Any) -> Any:
        """Return the answer to a request; both are anything that JSON can say.

        Raises:
            RuntimeError: The process has ended; the message ends with its complaint.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            complaint = self._errors.read()[-2000:]
            raise RuntimeError(f"{self._process.args!r} failed:\n{complaint}")
        return json.loads(answer)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def serve(answer: Callable[..., Any]) -> None:
    """Answer the requests of a `Worker` until it stops asking.

    Args:
        answer: Takes what was asked as keyword arguments and returns the answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes where errors go
    for request in sys.stdin:
        print(json.dumps(answer(**json.loads(request))), file=answers, flush=True)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fix_threads(threads: int) -> None:
    """Let this process and those it starts use this many threads, on as many cores.

    Args:
        threads: At most the number of cores.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in (
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "TF_NUM_INTEROP_THREADS",
        "NPROC",  # of XLA in JAX
    ):
        os.environ[name] = str(threads)


def machine(*packages: str) -> dict[str, Any]:
    """Return what the figures depend on: the machine, its load and the versions.

    Args:
        *packages: Names of packages besides those of all benchmarks; the version of
            one that is not there is None.
    """
    found = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory("MemTotal") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: found.get(name) for name in (*PACKAGES, *packages)},
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
