"""Measure updates, `fit`, memory and embeddings, next to the built-in and the peers.

    python benchmarks/bench.py [--quick] [--only PART] [--against CHECKOUT]

Each competitor has a process of its own, and all take turns, round by round. A figure
is the median over the rounds, with their range in brackets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import fit
import harness
import report
import update
from figures import KEPT, LARGEST, PARTS, Part
from harness import Plan

PEERS = "torch", "jax", "optax", "numba"
QUICK_SETS = "MNIST network", "160 small", "16 M"
QUICK_MODELS = "MNIST network", "61 x 64", "3 x 2048", "conv net"
WATCHED = "MNIST network", "3 x 2048"
"""Models that are trained beside a `Monitor`, too."""
INSIDE_XLA = "this", "auto", "Keras"
"""Who competes in a `fit` that XLA compiles."""
FIRST_STEPS = 2
"""In how many rounds a model is made, and compiled, anew; but for the quick run."""
MALLOC = {"TF_ENABLE_ONEDNN_OPTS": "0"}
"""TensorFlow's other allocator keeps what it once had."""
LARGE_ROUNDS = 3
"""In how many rounds a set is measured for which every process starts anew."""
PROCESS_BYTES = 1e9
"""About what a process takes before there is any variable."""
SLOW = "torch, compiled"
"""Compiles for a minute; not for the quick run."""


def main() -> None:
    """Measure and print the tables; the full run writes them and the pictures, too."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases; writes nothing")
    add("--only", choices=PARTS, help="measure this part; keep the others")
    add("--rounds", type=int, help="how often each is timed (quick: 2; else: 5)")
    add("--seconds", type=float, default=0.3, help="of a round (default: %(default)s)")
    text = 'folder of another keras_rmsprop, which competes as "before"; writes nothing'
    add("--against", type=Path, metavar="CHECKOUT", help=text)
    text = (
        "only what has this in its name, as it is in '160 small, plain, this, eager' "
        "or '61 x 64, default, Keras'; writes nothing"
    )
    add("--match", default="", metavar="REGEX", help=text)
    add("--publish", action="store_true", help="pages and pictures anew; no measuring")
    text = "for the figures and, if it is not the usual one, the pages, too"
    add("--folder", type=Path, default=report.RESULTS, help=text)
    options = parser.parse_args()
    if options.publish:
        report.publish(options.folder)
        return
    if options.against and not (options.against / "keras_rmsprop").is_dir():
        parser.error(f"there is no keras_rmsprop in {options.against}")

    harness.fix_threads()
    few = options.quick and not options.against
    options.rounds = options.rounds or (2 if few else 5)
    machine = harness.machine(*PEERS) | {"rounds": options.rounds}
    if options.against:
        machine["before"] = harness.commit(options.against)
    print(harness.sentence(machine))
    publish = not (options.quick or options.against or options.match)
    parts = {}
    for name in [options.only] if options.only else PARTS[: 2 if options.quick else 4]:
        plans = PLANS[name](options)
        if options.against:
            plans = [plan._replace(whos=with_before(plan.whos)) for plan in plans]
        figures = harness.measure(plans, options.match, options.against)
        parts[name] = Part(machine, figures)
        if publish:
            report.save(options.folder / report.FIGURES, name, parts[name])
    shown = report.publish(options.folder) if publish else parts
    report.show(report.tables(shown))


def with_before(whos: Sequence[str]) -> list[str]:
    """Return competitors, each of this package followed by the one from before."""
    pairs = ((who, who.replace("this", "before")) for who in whos)
    return list(dict.fromkeys(who for pair in pairs for who in pair))


def updates(options: argparse.Namespace) -> list[Plan]:
    """Return the plans of updates: for sets that fit into memory together, and not."""
    whos, sets, hows = list(update.COMPETITORS), list(update.SETS), list(update.OPTIONS)
    rounds, seconds = options.rounds, options.seconds
    if options.quick:
        whos.remove(SLOW)
        sets, seconds = list(QUICK_SETS), seconds / 2
        if options.against:  # both options, but no peers
            whos = [who for who in whos if who.startswith(("this", "Keras"))]
        else:
            hows = ["plain"]
    # In two groups, as all of a group are in memory together.
    in_graphs = [who for who in whos if who.endswith(("tf.function", "XLA"))]
    eager = [who for who in whos if who not in in_graphs]
    # Weights, gradients and three slots, and as much again for a step.
    free = harness.memory("MemAvailable") - PROCESS_BYTES * len(eager)
    most = free / (2 * 4 * 5 * len(eager))
    large = [name for name in sets if update.numbers(name) > most]
    small = [name for name in sets if name not in large]
    few = min(rounds, LARGE_ROUNDS)
    return [
        plan
        for group in (eager, in_graphs)
        for plan in (
            Plan("update.py", group, small, hows, rounds, seconds),
            Plan("update.py", group, large, hows, few, seconds, fresh=True),
        )
    ]


def fits(options: argparse.Namespace) -> list[Plan]:
    """Return the plans of imports and of `fit`."""
    rounds, firsts = options.rounds, min(options.rounds, FIRST_STEPS)
    if options.quick:
        jits, whos = ["default"], ["this", "auto", "Keras"]
        return [Plan("fit.py", whos, QUICK_MODELS, jits, 2 * rounds, options.seconds)]
    imports = Plan("fit.py", list(fit.IMPORTS), ["import"], ["import"], rounds + 2)
    whos = [who for who in fit.OPTIMIZERS if who != fit.MONITOR]
    models, (default, xla) = list(fit.MODELS), fit.JIT
    seconds = 2 * options.seconds
    fits = Plan("fit.py", whos, models, [default], 2 * rounds, seconds, setups=firsts)
    return [
        imports._replace(measures=(), fresh=True),
        fits,
        fits._replace(whos=INSIDE_XLA, hows=[xla]),
        Plan("fit.py", ["this", fit.MONITOR], WATCHED, ["mean, default"], rounds, 16),
    ]


def peak(
    program: str, whos: list[str], whats: list[str], hows: list[str], **environment: str
) -> Plan:
    """Return a plan of memory, which is measured in processes that start anew."""
    plan = Plan(program, whos, whats, hows, rounds=1, measures=("peak",), fresh=True)
    return plan._replace(environment=environment)


def peaks(options: argparse.Namespace) -> list[Plan]:
    """Return the plans of the memory of updates, and of slots of fewer bytes."""
    whos = [who for who in update.COMPETITORS if who not in ("torch, plain", SLOW)]
    ours = [who for who in update.KEEPERS if not who.startswith("Ada")]
    times = Plan("update.py", ours, [KEPT], ["plain"], options.rounds, options.seconds)
    peaks = peak("update.py", whos, [LARGEST], list(update.OPTIONS), **MALLOC)
    others = [who for who in ours if who not in whos]
    return [
        times._replace(whos=list(update.KEEPERS)),
        times._replace(hows=list(update.MOMENTUM)),
        peaks,
        peaks._replace(whos=others, hows=["plain"]),
        peaks._replace(whos=ours, hows=list(update.MOMENTUM)),
    ]


def embeddings(options: argparse.Namespace) -> list[Plan]:
    """Return the plans of embeddings: the times, and the memory."""
    rows = {name: task.rows for name, task in fit.TABLES.items()}
    room = harness.memory("MemAvailable") / fit.ROW  # the built-in takes 6 tables
    tables = [name for name in rows if not rows[name] > room / 8]
    if options.quick:
        tables = [name for name in tables if name in (fit.SMALL, fit.LARGE)]
    compared = [t for t in tables if t == fit.SMALL or rows[t] >= rows[fit.LARGE]]
    kinds = "uniform", "zipf"
    alone = Plan(
        "fit.py",
        ["this", harness.PORTABLE, "Keras"],
        [name for name in tables if rows[name] <= rows[fit.LARGE]],
        [f"{kind} ids, {fit.UPDATE}" for kind in kinds],
        options.rounds,
    )
    plans = [alone._replace(seconds=options.seconds)]
    some = [name for name in fit.UNDER_XLA if not options.quick or "128" in name]
    hows = [f"{kind} ids, {fit.XLA_UPDATE}" for kind in kinds]
    plans.append(Plan("fit.py", ["this", "Keras"], some, hows, options.rounds))
    whos = ["this", *fit.TABLE_OPTIONS]
    for fresh in (False, True):
        some = [t for t in tables if t != fit.SMALL and (rows[t] > room / 32) is fresh]
        each = Plan(
            "fit.py", whos, some, [fit.EACH_OPTION], options.rounds, fresh=fresh
        )
        plans.append(each._replace(seconds=2 * options.seconds))
    for way in fit.TABLE_JIT:
        # PyTorch has no XLA.
        whos = [who for who in fit.KEPT if who != fit.TORCH or way == "without XLA"]
        hows = [f"{kind} ids, {way}" for kind in kinds]
        for fresh in (False, True):
            some = [name for name in tables if (rows[name] > room / 32) is fresh]
            plan = Plan("fit.py", whos, some, hows, options.rounds, fresh=fresh)
            plans.append(plan._replace(seconds=2 * options.seconds))
        plans.append(peak("fit.py", whos, compared, [way]))
        plans.append(peak("fit.py", ["this"], compared, [f"malloc, {way}"], **MALLOC))
    return plans


PLANS = {"update": updates, "fit": fits, "memory": peaks, "embedding": embeddings}


if __name__ == "__main__":
    main()
