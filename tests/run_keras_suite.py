"""Run Keras' own tests with this RMSprop and with the built-in one, and compare.

The tests come with the Keras wheel. Each side runs them in a process of its own, with
its RMSprop in the place of SGD, Adam and RMSprop (see `keras_suite.py`), so that the
class is all that differs. What passes with the built-in must pass with this one, and
what fails with both - many tests expect the numbers of SGD - must fail in the same line
with the same error and the same numbers. `keras_suite_exceptions.txt` lists what may
not, and why.
"""

import argparse
import collections
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
KERAS = Path(importlib.util.find_spec("keras").origin).parent / "src"
SIDES = {"this": "keras_rmsprop", "built-in": "keras.optimizers"}
FOLDERS = ["optimizers", "callbacks", "trainers", "saving", "models", "export"]
QUICK = [
    "optimizers",
    "callbacks",
    "saving/saving_lib_test.py",
    "saving/file_editor_test.py",
    "models/cloning_test.py",
    "models/variable_mapping_test.py",
    "trainers/trainer_test.py",
]
SLOW = """
csv_logger early_stopping lambda_callback model_checkpoint monitor tensorboard
sharding_efficientnet saved_module_paths
data_adapter evaluate fwd_pass_loss loss_scaling_prevents predict raggeds sparse_jax
steps_per_ val_split
"""
"""What `--quick` leaves out of these: tests with such names take most of the time."""
LEAST = {False: 1000, True: 400}
"""How many tests must run, with and without `--quick`."""
OPTIONS = """
-p keras_suite -p no:cacheprovider -p no:xdist
-c /dev/null -o python_files=*_test.py
-q -W ignore --tb=short --continue-on-collection-errors
"""
GOOD = ["passed with both", "failed alike", "skipped", "passed with this one only"]
BAD = ["failed with this one only", "failed in another way", "on one side only"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="what CI runs")
    parser.add_argument("--output", type=Path, default=Path("runs/keras_suite"))
    parser.add_argument("tests", nargs="*", help="files or test ids below keras/src")
    arguments = parser.parse_args()
    tests = arguments.tests or (QUICK if arguments.quick else FOLDERS)
    options = ["-k", f"not ({' or '.join(SLOW.split())})"] if arguments.quick else []
    options += [KERAS / test for test in tests]
    least = 1 if arguments.tests else LEAST[arguments.quick]
    exceptions = read_exceptions()

    start = time.monotonic()
    this, built_in = run(options, arguments.output)
    groups = collections.defaultdict(list)
    for name in {**built_in, **this}:
        groups[compared(this.get(name), built_in.get(name))].append(name)
    ran = sum(map(len, groups.values())) - len(groups["skipped"])
    listed, bad = [], []
    for name in (name for group in BAD for name in groups[group]):
        (listed if name in exceptions else bad).append(name)

    for group in [*GOOD, *BAD]:
        print(f"{len(groups[group]):6}  {group}")
    print(f"{len(listed):6}  of these listed as exceptions")
    print(f"{ran:6}  run, in {time.monotonic() - start:.0f} seconds")
    for name in listed:
        print(f"\n{name}\n    listed: {exceptions[name]}")
    for name in (name for group in GOOD for name in groups[group]):
        if name in exceptions:
            print(f"\n{name}\n    listed, but need not be")
    for name in bad:
        print(f"\n{name}")
        for side, results in zip(SIDES, (this, built_in), strict=True):
            result = results.get(name, {"outcome": "not there", "where": ""})
            print(f"    {side}: {result['outcome']} {result['where']}")
    if ran < least:
        print(f"\nToo few tests ran; there should be {least}.")
    if bad or ran < least:
        print(f"\nTracebacks: {arguments.output}/*.log")
        sys.exit(1)


def run(options, output):
    """Return the results of both sides, by the id of the test."""
    output.mkdir(parents=True, exist_ok=True)
    started = [start(side, options, output) for side in SIDES]
    results = []
    for side, process in zip(SIDES, started, strict=True):
        if process.wait() not in (0, 1):  # 1: some tests failed
            sys.exit(f"pytest of {side!r} did not end well: {output}/{side}.log")
        lines = (output / f"{side}.jsonl").read_text().splitlines()
        results.append({result["id"]: result for result in map(json.loads, lines)})
    return results


def start(side, options, output):
    """Start the tests of one side."""
    options = [*OPTIONS.split(), "--rootdir", KERAS, *options]
    options += ["--rmsprop", SIDES[side], "--results", output / f"{side}.jsonl"]
    python_path = os.pathsep.join(map(str, [TESTS, TESTS.parent]))
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONDONTWRITEBYTECODE": "1"}
    with open(output / f"{side}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *options],
            env=os.environ | environment | {"PYTHONPATH": python_path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def compared(this, built_in):
    """Return the group of a test, one of GOOD or BAD, by its two results."""
    if this is None or built_in is None:
        return "on one side only"
    outcomes = this["outcome"], built_in["outcome"]
    if outcomes == ("failed", "failed"):
        return "failed alike" if alike(this, built_in) else "failed in another way"
    return {
        ("passed", "passed"): "passed with both",
        ("skipped", "skipped"): "skipped",
        ("passed", "failed"): "passed with this one only",
        ("failed", "passed"): "failed with this one only",
    }.get(outcomes, "on one side only")


def alike(this, built_in):
    a, b = this["numbers"], built_in["numbers"]
    return (
        this["where"] == built_in["where"]
        and len(a) == len(b)
        and np.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    )


def read_exceptions():
    """Return the reasons why tests may fail, by the ids of the tests."""
    lines = (TESTS / "keras_suite_exceptions.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if line and line[0] != "#")


if __name__ == "__main__":
    main()
