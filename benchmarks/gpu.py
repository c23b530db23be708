"""Check and time one update on a GPU: this RMSprop and its peers.

    python benchmarks/gpu.py [--rounds N] [--cpu]

First, steps with several options are compared with `keras_rmsprop.reference`, on the
device. Then all are timed, with JAX, PyTorch and TensorFlow (compiled by XLA), as far
as they are installed for it; the figures go to `results/gpu.json` and to the page.

An update reads gradient, slot and weight and writes slot and weight: 20 bytes for each
float32 parameter. Its bandwidth is compared with that of a copy of a large array on the
device, by the same framework in the same process and round. Every competitor has a
process of its own and takes turns with the others, or with as many of them as have room
at the same time. A time is that of many updates in a row, waited for at the end, by
their number; a figure is the median over the rounds, with their range in brackets. What
fits into the GPU's cache can be faster than the copy.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import numpy as np
import report
import update
from figures import Figure, Part, spread
from sentences import between
from update import Step

MILLION = 2**20
OPTAX = "jax: optax"
JAX = ["jax: this", "jax: Keras", OPTAX]
CAPTURABLE = "torch: capturable"
TORCH = [
    *("torch: this", "torch: Keras", "torch: foreach", CAPTURABLE),
    "torch: compiled",
]
TENSORFLOW = ["tensorflow: this", "tensorflow: Keras"]
CORRECT, MOST_ERROR = "is it correct?", 1e-5
"""The case that is checked, not timed; and the error of a weight, over the largest."""
CHECKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True, "epsilon": 0.01},
    "weight decay": {"weight_decay": 0.1},
    "bias correction": {"bias_correction": True},
}
"""What is compared with the reference."""
PAGE, BEGIN = "distributed.md", "<!-- of `benchmarks/gpu.py` -->\n"
FILE = report.RESULTS / "gpu.json"
GOAL, GOAL_FROM = 90, 100
"""Percent of the copy's bandwidth, and from how many millions of parameters on."""
LEAST, AMPLE = 16, 40
"""Bytes a parameter: with less room there is no try; with more, none gets too tight."""
WARM_UP = 3
NO_GPU = """Nothing to measure: nvidia-smi tells of no GPU here.
On a machine that has one install `tensorflow[and-cuda]`, `jax[cuda13]` and optax, or
PyTorch for CUDA, or some of them, and run this again. With --cpu it runs here: to try
the program, not to measure."""


def shapes(millions: int, mixed: bool) -> list[tuple[int, ...]]:
    """Return four equal matrices, or 200 of mixed sizes with their biases."""
    if not mixed:
        return [(millions * MILLION // 4096, 1024)] * 4
    sides = [(1 + i % 4, 1 + i // 4 % 4) for i in range(200)]
    unit = math.sqrt(millions * MILLION / sum(a * b for a, b in sides))
    unit = 4 * round(unit / 4)
    return [s for a, b in sides for s in ((unit * a, unit * b), (unit * b,))]


SETS = {
    f"{millions} M parameters{', mixed' * mixed}": shapes(millions, mixed)
    for millions in (1, 25, 100, 1024)
    for mixed in (False, True)
}


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
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    harness.fix_threads()
    found = {} if options.cpu else gpu()
    if not (found or options.cpu):
        print(NO_GPU)
        return
    machine = harness.machine("jax", "optax", "torch") | found
    print(harness.sentence(machine))
    if not is_correct():
        sys.exit("Not timed, as it is not correct.")
    print(f"The goal: {GOAL} % of the copy from {GOAL_FROM} M parameters on\n")

    memory = 2**20 * float(machine.get("gpu_mib", math.inf))
    how, seconds = ("4 M copied", 0.02) if options.cpu else ("64 M copied", 0.3)
    whos = [*JAX, *TORCH, *TENSORFLOW]
    if options.cpu:
        whos.remove(CAPTURABLE)  # for CUDA only
    for what in list(SETS)[: 2 if options.cpu else None]:
        if parameters(what) * LEAST > memory:
            print(f"{what}: left out, the GPU has no room for them\n")
            continue
        together = int(max(1, min(memory / (parameters(what) * AMPLE), len(whos))))
        crews = [whos[i : i + together] for i in range(0, len(whos), together)]
        plan = harness.Plan("gpu.py", [], [what], [how], options.rounds, seconds)
        plan = plan._replace(measures=("update", "copy"))
        figures = harness.measure([plan._replace(whos=crew) for crew in crews])
        part = Part(machine, figures)
        title = f"{parameters(what):,} parameters in {len(SETS[what])} variables"
        report.show({title: table(part, what, how)})
        if not options.cpu:  # after every set, should a later one fail
            report.save(FILE, what, part)
    if not options.cpu:
        page = report.DOCS / PAGE
        page.write_text(filled(page.read_text(), json.loads(FILE.read_text())))


def is_correct() -> bool:
    """Compare with the reference, print the errors, return whether all are small."""
    whos = [who for who in (*JAX, *TORCH, *TENSORFLOW) if who.endswith(": this")]
    plan = harness.Plan("gpu.py", whos, [CORRECT], list(CHECKED), 1, measures=())
    part = Part({}, harness.measure([plan]))
    rows, is_good = [["", *CHECKED]], True
    for who in whos:
        errors = [part.values((who, CORRECT, how), "error") for how in CHECKED]
        there = [error for [error] in filter(None, errors)]  # else: is not installed
        is_good = is_good and all(error <= MOST_ERROR for error in there)
        rows.append([who, *(f"{e[0]:.1e}" if e else "not there" for e in errors)])
    report.show({f"Error against the reference, at most {MOST_ERROR}": rows})
    return is_good


def filled(page: str, measured: dict[str, Any]) -> str:
    """Return a page with a table of what was measured, milliseconds an update."""
    parts = {
        what: Part(of["machine"], [Figure(**figure) for figure in of["figures"]])
        for what, of in measured.items()
    }
    first = next(iter(parts.values()))
    rows = [["", *first.whos]]
    for what, part in parts.items():
        [how] = part.hows
        cells = (part.text((who, what, how), "update") for who in first.whos)
        rows.append([what, *cells])
    text = f"{harness.sentence(first.machine)}\n\n{report.markdown({'': rows})}"
    return between(page, BEGIN, report.END, text)


def parameters(what: str) -> int:
    """Return how many there are in a set."""
    return sum(map(math.prod, SETS[what]))


def table(part: Part, what: str, how: str) -> report.Rows:
    """Return a table of what was measured."""
    rows = [["", "ms", "TB/s", "copy, TB/s", "% of copy", "ms / optax's", "goal"]]
    copied = int(how.split()[0]) * MILLION
    for who in part.whos:
        case = who, what, how
        updates, copies = part.values(case, "update"), part.values(case, "copy")
        if not updates:
            rows.append([who, "failed", "", "", "", "", ""])
            continue
        speeds = [20 * parameters(what) / ms / 1e9 for ms in updates]
        limits = [8 * copied / ms / 1e9 for ms in copies]
        shares = spread([100 * a / b for a, b in zip(speeds, limits, strict=True)])
        ratio = part.ratio(case, (OPTAX, what, how), "update")
        cells = spread(updates), spread(speeds), spread(limits), shares, ratio
        goal = ""
        if who.endswith(": this") and parameters(what) >= GOAL_FROM * MILLION:
            goal = "reached" if shares and shares.median >= GOAL else "missed"
        rows.append([who, *(str(cell or "") for cell in cells), goal])
    return rows


def gpu() -> dict[str, str]:
    """Return what the figures depend on, or nothing where there is no GPU."""
    if not (smi := shutil.which("nvidia-smi")):
        return {}
    query = [smi, "--query-gpu=name,memory.total,driver_version"]
    query.append("--format=csv,noheader,nounits")
    first = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return dict(zip(("gpu", "gpu_mib", "driver"), first.split(", "), strict=False))


def setup(who: str, what: str, how: str) -> harness.Ready:
    """Prepare updates and copies on the device, or compare with the reference."""
    framework, _, name = who.partition(": ")
    os.environ["KERAS_BACKEND"] = framework
    import keras

    if what == CORRECT:
        return harness.Ready({"error": error(framework, CHECKED[how])}, {})
    weights, gradients = (list(map(keras.random.normal, SETS[what])) for _ in "wg")
    source = keras.random.normal([int(how.split()[0]) * MILLION])
    if name in ("this", "Keras"):
        import keras_rmsprop

        module: Any = keras_rmsprop if name == "this" else keras.optimizers
        step, _ = KERAS[framework](module.RMSprop(), weights, gradients)
    else:
        case = update.Case(weights, gradients, {}, wait=False)
        peer = partial(update.with_torch, name)
        step, _ = (update.with_optax if framework == "jax" else peer)(case)
    copy, wait = COPIES[framework](source)
    if os.environ.get("JAX_PLATFORMS") != "cpu" and "cpu" in str(source.device).lower():
        raise RuntimeError(f"{framework} sees no GPU")

    def timed(step: Step, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            done = step()
        wait(done)
        return (time.perf_counter() - start) / steps

    def milliseconds(step: Step, seconds: float) -> float:
        timed(step, WARM_UP)
        return 1e3 * timed(step, max(3, round(seconds / timed(step, WARM_UP))))

    measures = {
        "update": partial(milliseconds, step),
        "copy": partial(milliseconds, copy),
    }
    return harness.Ready({}, measures)


def error(framework: str, options: dict[str, Any]) -> float:
    """Return how far the weights are from the reference's after some steps."""
    import keras

    from keras_rmsprop import RMSprop, reference

    rng, shape = np.random.default_rng(0), (257, 33)
    start, gradient = rng.standard_normal((2, *shape), "float32")
    given: dict[str, Any] = {"learning_rate": 0.05, "epsilon": 1e-3} | options
    tensor = keras.ops.convert_to_tensor
    step, weights = KERAS[framework](
        RMSprop(**given), [tensor(start)], [tensor(gradient)]
    )
    alpha = given.pop("learning_rate")
    expected: Any = start
    state: dict[str, Any] = {}
    for _ in range(5):
        step()
        expected = reference.step(expected, gradient, state, alpha=alpha, **given)
    found = keras.ops.convert_to_numpy(weights())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def keras_on_jax(
    optimizer: Any, weights: list[Any], gradients: list[Any]
) -> tuple[Step, Callable[[], Any]]:
    """Return the jitted update of a Keras optimizer, and its first weight."""
    import jax
    import keras

    variables = [keras.Variable(w) for w in weights]
    optimizer.build(variables)
    kept = [[v.value for v in vs] for vs in (variables, optimizer.variables)]

    def apply(kept: Any, gradients: Any) -> Any:
        return optimizer.stateless_apply(kept[1], gradients, kept[0])

    apply = jax.jit(apply, donate_argnums=0)

    def step() -> Any:
        kept[:] = apply(kept, gradients)
        return kept

    return step, lambda: kept[0][0]


def keras_on_torch(
    optimizer: Any, weights: list[Any], gradients: list[Any]
) -> tuple[Step, Callable[[], Any]]:
    """Return the update of a Keras optimizer, and its first weight."""
    import keras
    import torch

    variables = [keras.Variable(w) for w in weights]
    optimizer.build(variables)
    # Keras' `fit` has no gradients then, either.
    step = torch.no_grad()(partial(optimizer.apply, gradients, variables))
    return step, lambda: variables[0].value


def keras_on_tensorflow(
    optimizer: Any, weights: list[Any], gradients: list[Any]
) -> tuple[Step, Callable[[], Any]]:
    """Return the update of a Keras optimizer, compiled by XLA, and its first weight."""
    import keras
    import tensorflow as tf

    variables = [keras.Variable(w) for w in weights]
    optimizer.build(variables)
    apply = tf.function(optimizer.apply, jit_compile=True, autograph=False)
    return partial(apply, gradients), lambda: variables[0].value


def jax_copy(source: Any) -> tuple[Step, Callable[[Any], Any]]:
    """Return what copies an array, and what waits for the result of a step."""
    import jax

    # The result takes the place of what is donated, so that XLA has to copy.
    copied = jax.jit(
        lambda target, source: source.copy(), donate_argnums=0, keep_unused=True
    )
    kept = [source + 1]

    def copy() -> Any:
        kept[:] = [copied(*kept, source)]
        return kept

    return copy, jax.block_until_ready


def torch_copy(source: Any) -> tuple[Step, Callable[[Any], Any]]:
    """Return what copies a tensor, and what waits for all steps."""
    import torch

    def wait(done: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return partial((source + 1).copy_, source), wait


def tensorflow_copy(source: Any) -> tuple[Step, Callable[[Any], Any]]:
    """Return what copies a tensor, and what waits for all steps."""
    import tensorflow as tf

    target = tf.Variable(source + 1)
    copy = tf.function(lambda: target.assign(source), jit_compile=True)
    return copy, lambda done: tf.test.experimental.sync_devices()


KERAS = {
    "jax": keras_on_jax,
    "torch": keras_on_torch,
    "tensorflow": keras_on_tensorflow,
}
COPIES = {"jax": jax_copy, "torch": torch_copy, "tensorflow": tensorflow_copy}


if __name__ == "__main__":
    if len(sys.argv) == 2 and ": " in sys.argv[1]:  # a worker of this program
        harness.serve(setup)
    else:
        main()
