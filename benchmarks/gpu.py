"""Time one update on a GPU, with JAX and PyTorch: this RMSprop and its peers.

    python benchmarks/gpu.py [--rounds N] [--cpu]

An update reads gradient, slot and weight and writes slot and weight: 20 bytes for each
float32 parameter. Its bandwidth is compared with that of a copy of a large array on the
device, by the same framework in the same process and round. Every competitor has a
process of its own and takes turns with the others, or with as many of them as have room
at the same time. A time is that of many updates in a row, waited for at the end, by
their number; a figure is the median over the rounds, with their range in brackets. What
fits into the GPU's cache can be faster than the copy. TensorFlow takes no part.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
from rich import box, progress
from rich.console import Console
from rich.table import Table

FIGURES = Path(__file__).parent / "results" / "gpu.json"
OURS, BUILT_IN, OPTAX = "keras_rmsprop", "built-in", "optax"
FOREACH, COMPILED = "torch.optim", "torch.optim, compiled"
COMPETITORS = {
    "jax": (OURS, BUILT_IN, OPTAX),
    "torch": (OURS, BUILT_IN, FOREACH, COMPILED),
}
MILLION = 2**20
GOAL, GOAL_FROM = 90, 100
"""Percent of the copy's bandwidth, and from how many millions of parameters on."""
LEAST, AMPLE = 16, 40
"""Bytes a parameter: with less room there is no try; with more, none gets too tight."""
WARM_UP = 3
NO_GPU = """Nothing to measure: neither JAX nor PyTorch sees a GPU here.
On a machine that has one install `jax[cuda13]` and optax, or PyTorch for CUDA, or both,
and run this again. With --cpu it runs here: to try the program, not to measure."""

Run = Callable[[int], None]
"""Takes so many steps and waits until the device has done them."""
Results = dict[tuple[str, str], list[tuple[float, float] | None]]
"""By framework and name each round's milliseconds of an update and of a copy, or None
if there was no room."""


class Case(NamedTuple):
    """Which variables are updated, how much is copied, and about how long for."""

    millions: int
    many: bool
    copied: int = 64 * MILLION
    seconds: float = 0.3

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes: four equal matrices, or 200 of mixed sizes with their biases."""
        if not self.many:
            return [(self.millions * MILLION // 4096, 1024)] * 4
        sides = [(1 + i % 4, 1 + i // 4 % 4) for i in range(200)]
        unit = math.sqrt(self.millions * MILLION / sum(a * b for a, b in sides))
        unit = 4 * round(unit / 4)
        return [s for a, b in sides for s in ((unit * a, unit * b), (unit * b,))]

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(map(math.prod, self.shapes))

    def __str__(self) -> str:
        """Return a name for people."""
        return f"{self.parameters:,} parameters in {len(self.shapes)} variables"


def main() -> None:
    """Measure what there is room for, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="how often each one is measured")
    add("--cpu", action="store_true", help="one size, on the CPU; writes nothing")
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if options.cpu:
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    seen = {name: ask_for_device(name) for name in COMPETITORS}
    usable = {k: v for k, v in seen.items() if v.get("gpu") or (v and options.cpu)}
    if not usable:
        print(NO_GPU)
        return
    machine = harness.machine() | {"driver": driver()}
    for about in usable.values():
        machine |= about
    memory = 2**30 * (machine["gpu_gib"] or math.inf)
    print(harness.sentence(machine))
    for name in seen.keys() - usable:
        print(f"Without {name}: it is not installed or sees no GPU")
    print(f"The goal: {GOAL} % of the copy from {GOAL_FROM} M parameters on\n")

    cases = [Case(size, many) for size in (1, 25, 100, 1024) for many in (False, True)]
    if options.cpu:
        cases = [case._replace(copied=4 * MILLION, seconds=0.02) for case in cases[:2]]
    competitors = [(k, name) for k in usable for name in COMPETITORS[k]]
    figures: list[dict[str, Any]] = []
    for case in cases:
        if case.parameters * LEAST > memory:
            print(f"{case}: left out, the GPU has no room for them\n")
            continue
        room = memory / (case.parameters * AMPLE)
        together = max(1, int(min(room, len(competitors))))
        results = measure(case, competitors, options.rounds, together)
        show(case, results)
        of = {"parameters": case.parameters, "variables": len(case.shapes)}
        figures += (
            of | {"framework": framework, "name": name, "update_and_copy_ms": rounds}
            for (framework, name), rounds in results.items()
        )
        report = {"machine": machine, "copied": case.copied, "figures": figures}
        if not options.cpu:  # after every case, should a later one fail
            FIGURES.write_text(json.dumps(report, indent=1) + "\n")


def measure(
    case: Case, competitors: Sequence[tuple[str, str]], rounds: int, together: int
) -> Results:
    """Let the competitors take turns.

    Args:
        case: What to measure.
        competitors: Their frameworks and names.
        rounds: How often each one is measured.
        together: How many have room on the device at the same time.
    """
    results: Results = {competitor: [] for competitor in competitors}
    for i in range(0, len(competitors), together):
        workers = {}
        try:
            for key in competitors[i : i + together]:
                command = [sys.executable, __file__, "work", json.dumps([*key, case])]
                workers[key] = harness.Worker(command, KERAS_BACKEND=key[0])
            turns = [*workers] * rounds
            for key in progress.track(turns, description=str(case), transient=True):
                if None not in results[key]:
                    results[key].append(workers[key].ask())
        finally:
            for worker in workers.values():
                worker.stop()
    return results


def show(case: Case, results: Results) -> None:
    """Print a table of what was measured.

    Args:
        case: What was measured.
        results: The measurements.
    """
    table = Table(box=box.SIMPLE_HEAD, title=str(case), title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("ms", "TB/s", "copy, TB/s", "% of copy", "ms / optax's", "goal"):
        table.add_column(heading, justify="right")
    optax = [r[0] for r in results.get(("jax", OPTAX), []) if r]
    for (framework, name), rounds in results.items():
        measured = [r for r in rounds if r]
        if len(measured) < len(rounds):
            table.add_row(f"{framework}: {name}", "no room")
            continue
        times = [update for update, _ in measured]
        speeds = [20 * case.parameters / update / 1e9 for update in times]
        copies = [8 * case.copied / copy / 1e9 for _, copy in measured]
        shares = [100 * a / b for a, b in zip(speeds, copies, strict=True)]
        ratios = [a / b for a, b in zip(times, optax, strict=False)]
        columns = (times, speeds, copies, shares, ratios)
        reached = harness.spread(shares).median >= GOAL
        table.add_row(
            f"{framework}: {name}",
            *(str(harness.spread(column)) if column else "" for column in columns),
            ("reached" if reached else "missed")
            if name == OURS and case.millions >= GOAL_FROM
            else "",
        )
    Console(width=130).print(table)


def ask_for_device(framework: str) -> dict[str, Any]:
    """Return what `device` does, by a process that then lets go of the GPU.

    Args:
        framework: `"jax"` or `"torch"`; nothing is returned if it is not installed.
    """
    command = [sys.executable, __file__, "device", framework]
    done = subprocess.run(command, capture_output=True, text=True)
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def device(framework: str) -> None:
    """Print the version of a framework, which GPU it sees, if any, and its GiB.

    Args:
        framework: `"jax"` or `"torch"`.
    """
    about: dict[str, Any] = {"gpu": None, "gpu_gib": None}
    if framework == "jax":
        import jax
        import optax

        about |= {"jax": jax.__version__, "optax": optax.__version__}
        first = jax.devices()[0]
        if first.platform == "gpu":
            about["gpu"] = first.device_kind
            about["gpu_gib"] = first.memory_stats()["bytes_limit"] / 2**30
    else:
        import torch

        about |= {"torch": torch.__version__}
        if torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
            about["gpu_gib"] = torch.cuda.mem_get_info()[0] / 2**30
    print(json.dumps(about))


def driver() -> str | None:
    """Return the version of NVIDIA's driver, if there is one."""
    if not (smi := shutil.which("nvidia-smi")):
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.partition("\n")[0]


def work(framework: str, name: str, case: Sequence[Any]) -> None:
    """Time updates and copies whenever a `Worker` asks.

    Args:
        framework: `"jax"` or `"torch"`, also Keras' backend.
        name: The competitor's.
        case: The fields of a `Case`.
    """
    of = Case(*case)
    make = {"jax": with_jax, "torch": with_torch}[framework]
    runs = functools.cache(lambda: make(name, of))

    def answer() -> list[float] | None:
        try:
            return [milliseconds(run, of.seconds) for run in runs()]
        except RuntimeError as error:
            if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
                raise
            return None

    harness.serve(answer)


def milliseconds(run: Run, seconds: float) -> float:
    """Return how long a step takes.

    Args:
        run: Takes the steps.
        seconds: About how long to take steps for.
    """

    def timed(steps: int) -> float:
        start = time.perf_counter()
        run(steps)
        return (time.perf_counter() - start) / steps

    timed(WARM_UP)
    return 1e3 * timed(max(3, round(seconds / timed(WARM_UP))))


def keras_optimizer(name: str, weights: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return this optimizer or Keras' own, and the variables that it is built with.

    Args:
        name: `OURS` or `BUILT_IN`.
        weights: The values of the variables.
    """
    import keras

    import keras_rmsprop

    variables = [keras.Variable(w) for w in weights]
    module: Any = keras_rmsprop if name == OURS else keras.optimizers
    optimizer = module.RMSprop()
    optimizer.build(variables)
    return optimizer, variables


def with_jax(name: str, case: Case) -> tuple[Run, Run]:
    """Return what updates and what copies.

    Args:
        name: The competitor's.
        case: What to update, and how much to copy.
    """
    import jax
    import keras
    import optax

    gradients, weights = (list(map(keras.random.normal, case.shapes)) for _ in "gw")
    source = keras.random.normal([case.copied])
    state: Any
    if name == OPTAX:
        rule = optax.rmsprop(1e-3, decay=0.9, eps=1e-7, eps_in_sqrt=True)
        state = weights, rule.init(weights)

        def update(state: Any, gradients: Any) -> Any:
            updates, slots = rule.update(gradients, state[1])
            return optax.apply_updates(state[0], updates), slots
    else:
        optimizer, variables = keras_optimizer(name, weights)
        state = tuple([v.value for v in vs] for vs in (variables, optimizer.variables))

        def update(state: Any, gradients: Any) -> Any:
            return optimizer.stateless_apply(state[1], gradients, state[0])

    def repeat(step: Any, state: Any, source: Any) -> Run:
        # The result takes the place of what is donated, so that XLA has to copy, too.
        step = jax.jit(step, donate_argnums=0, keep_unused=True)

        def run(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state = step(state, source)
            jax.block_until_ready(state)

        return run

    copy = repeat(lambda target, source: source.copy(), source + 1, source)
    return repeat(update, state, gradients), copy


def with_torch(name: str, case: Case) -> tuple[Run, Run]:
    """Return what updates and what copies.

    Args:
        name: See `with_jax`.
        case: See `with_jax`.
    """
    import keras
    import torch

    gradients, weights = (list(map(keras.random.normal, case.shapes)) for _ in "gw")
    source = keras.random.normal([case.copied])
    update: Callable[[], Any]
    if name in (FOREACH, COMPILED):
        weights = [torch.nn.Parameter(w) for w in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        options = {"lr": 1e-3, "alpha": 0.9, "eps": 1e-7, "foreach": True}
        update = torch.optim.RMSprop(weights, **options).step
        update = torch.compile(update) if name == COMPILED else update
    else:
        optimizer, variables = keras_optimizer(name, weights)
        update = functools.partial(optimizer.apply, gradients, variables)

    def repeat(step: Callable[[], Any]) -> Run:
        def run(steps: int) -> None:
            with torch.no_grad():  # as in Keras' `fit`
                for _ in range(steps):
                    step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return run

    return repeat(update), repeat(functools.partial((source + 1).copy_, source))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["device"]:
        device(sys.argv[2])
    else:
        main()
