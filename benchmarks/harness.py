"""The harness of all benchmarks: competitors in processes of their own take turns.

A program of competitors calls `serve` with a function `setup(who, what, how)`. It
returns what is `Ready` to be measured. A `Plan` says who is measured on what, and how
often; `measure` carries it out.
"""

import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from figures import Figure

HERE = Path(__file__).parent
PORTABLE = "portable"
"""Competitors with this in front are this package without its kernel."""
ON_TORCH = ", torch"
"""Competitors with this at the end are on Keras' PyTorch backend."""
SHARE = 0.05
"""Of the machine's memory: a process that has more starts anew with the next case."""
PACKAGES = ("keras_rmsprop", "keras", "tensorflow", "numpy")


class Ready(NamedTuple):
    """A competitor that is set up for a case, and warmed up."""

    facts: dict[str, float]
    """What is known already, such as the seconds of the first step."""
    measures: Mapping[str, Callable[[float], float | None]]
    """What can be measured, each in about so many seconds."""


class Plan(NamedTuple):
    """Competitors that are measured on some cases."""

    program: str
    """The file of their `setup`."""
    whos: Sequence[str]
    whats: Sequence[str]
    hows: Sequence[str]
    rounds: int
    seconds: float = 0.3
    """About how long one is measured in one round."""
    setups: int = 1
    """How often each one is set up before all are measured in turns."""
    measures: Sequence[str] = ("time",)
    fresh: bool = False
    """Whether each one is set up and measured by a process that starts anew."""
    environment: Mapping[str, str] = {}
    """Of the processes."""

    def turns(self) -> Iterator[tuple[Figure, list[dict[str, Any]]]]:
        """Yield figures, and what is asked of their competitors next."""
        measure = {"measures": self.measures, "seconds": self.seconds}
        for what, how in product(self.whats, self.hows):
            figures = [Figure(who, what, how) for who in self.whos]
            for f in in_order(figures, self.rounds if self.fresh else self.setups):
                setup = {"what": f.what, "how": f.how}
                yield f, [setup, measure] if self.fresh else [setup]
            for f in in_order(figures, 0 if self.fresh else self.rounds):
                yield f, [measure]


def in_order(figures: list[Figure], rounds: int) -> Iterator[Figure]:
    """Yield all figures in each round, in turns from the first and from the last."""
    for r in range(rounds):
        yield from figures[:: -1 if r % 2 else 1]


def measure(
    plans: Sequence[Plan], match: str = "", before: Path | None = None
) -> list[Figure]:
    """Carry out plans, one after the other, and return what was measured.

    Args:
        plans: Who is measured on what.
        match: Measure only what has this regular expression in its name.
        before: Another checkout, of which competitors named "before" take the package.
    """
    from rich import progress  # here, as a worker times an import

    turns = [
        (plan, [turn for turn in plan.turns() if re.search(match, str(turn[0]))])
        for plan in plans
    ]
    with progress.Progress(transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=sum(len(of_plan) for _, of_plan in turns))
        for plan, of_plan in turns:
            workers: dict[str, Worker] = {}
            for figure, requests in of_plan:
                bar.update(task, description=f"{figure!s:<50}")
                who, failed = figure.who, figure.values is None
                try:
                    for request in [] if failed else requests:
                        # All are in memory together, and few give back any.
                        if (
                            "what" in request
                            and who in workers
                            and workers[who].is_large()
                        ):
                            workers.pop(who).stop()
                        if who not in workers:
                            workers[who] = Worker(plan, who, before)
                        figure.add(workers[who].ask(request))
                except RuntimeError as error:
                    figure.values = None
                    bar.console.print(f"{figure}: {error}", markup=False)
                if who in workers and (plan.fresh or figure.values is None):
                    workers.pop(who).stop()
                bar.advance(task)
            for worker in workers.values():
                worker.stop()
    return list({id(f): f for _, of_plan in turns for f, _ in of_plan}.values())


class Worker:
    """The process of one competitor. It ends when this one does."""

    def __init__(self, plan: Plan, who: str, before: Path | None) -> None:
        package = before if before and who.startswith("before") else HERE.parent
        paths = (str(package.resolve()), os.environ.get("PYTHONPATH"))
        path = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        own = {"KERAS_RMSPROP_KERNEL": "0"} if who.startswith(PORTABLE) else {}
        own |= {"KERAS_BACKEND": "torch"} if who.endswith(ON_TORCH) else {}
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, HERE / plan.program, who.replace("before", "this")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, **path, **own, **plan.environment},
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the answer to a request; see `serve`.

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
            self._complaints.seek(0)
            raise RuntimeError(f"failed:\n{self._complaints.read()[-2000:]}")
        return json.loads(answer)

    def is_large(self) -> bool:
        """Whether the process has more than its share of the memory."""
        has = _memory_of_process("VmRSS", self._process.pid)
        return has > SHARE * memory("MemTotal")

    def stop(self) -> None:
        """Let the process end, as it does when nothing more can be asked."""
        self._process.communicate()
        self._complaints.close()


def serve(setup: Callable[[str, str, str], Ready]) -> None:
    """Be the process of a `Worker`, for the competitor that the command line names.

    Args:
        setup: Takes who, what and how; the last that it returned is measured.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes where errors go
    ready = Ready({}, {})
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, float | None]
        if "measures" in request:
            names, seconds = request["measures"], request["seconds"]
            answer = {name: ready.measures[name](seconds) for name in names}
        else:
            ready = Ready({}, {})  # its memory is free for the next
            gc.collect()
            ready = setup(sys.argv[1], request["what"], request["how"])
            answer = {**ready.facts}
        print(json.dumps(answer), file=answers, flush=True)


def milliseconds(step: Callable[[], Any], seconds: float, least: int) -> list[float]:
    """Return how long each step took, of at least so many and for about so long."""
    times: list[float] = []
    while len(times) < least or sum(times) < 1e3 * seconds:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


class Memory:
    """How far the memory of this process has grown since this was made, in bytes."""

    def __init__(self) -> None:
        self._before = _memory_of_process("VmRSS")

    def forget_peak(self) -> None:
        """Begin anew: `peak` is to be the highest that memory stands from now on."""
        if self._before:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float | None:
        """Return the highest growth, or None on a system that does not tell."""
        return _memory_of_process("VmHWM") - self._before if self._before else None


def fix_threads() -> None:
    """Let the processes that this one starts use a thread for each of its cores."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for name in (
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "TF_NUM_INTEROP_THREADS",
        "NPROC",  # of XLA in JAX
    ):
        os.environ[name] = str(cores)


def machine(*packages: str) -> dict[str, Any]:
    """Return what the figures depend on: the machine, its load and the versions.

    Args:
        *packages: Names of packages besides those of all benchmarks; the version of
            one that is not there is None.
    """
    found = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    cpu = _proc("cpuinfo", "model name", platform.processor() or platform.machine())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory("MemTotal") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: found.get(name) for name in (*PACKAGES, *packages)},
        "commit": commit(HERE),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
    }


def sentence(machine: dict[str, Any]) -> str:
    """Return a description of the machine in one line."""
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in machine.items() if v)


def memory(what: str) -> float:
    """Return the bytes of `MemTotal` or `MemAvailable`, NaN where none tells."""
    return 1024 * float(_proc("meminfo", what, "nan").split()[0])


def _memory_of_process(what: str, process: int | str = "self") -> int:
    return 1024 * int(_proc(f"{process}/status", what, "0").split()[0])


def _proc(file: str, name: str, default: str) -> str:
    """Return what a file of `/proc`, where there is one, has under a name."""
    path = Path("/proc") / file
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return default


def commit(folder: Path) -> str:
    """Return the commit of a checkout, with a + where files differ from it."""
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    describe = [*git, "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        out = subprocess.check_output(describe, stderr=subprocess.DEVNULL, text=True)
        return out.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
