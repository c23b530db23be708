"""What XLA makes of a step: how often it passes over memory, and what it must not do.

That is the same on a CPU and on a GPU, where there is none to measure on.
"""

import math
import re
from typing import NamedTuple

import keras
import pytest
import tensorflow as tf

from keras_rmsprop import RMSprop, tables

pytestmark = pytest.mark.tensorflow("it is read from TensorFlow's XLA")

DENSE, ROWS, WHOLE = "dense", "rows", "whole table"
SHAPE, COUNT = (2048, 64), 128
READ_ONLY = "learning_rate", "learning_rate_factor", "rounding_offset", "ema_begin"


class Case(NamedTuple):
    """A kind of gradient, options, and what XLA may make of them."""

    kind: str
    options: dict
    passes: int
    """The loops that write an eighth of the variable, as sums over it do, or more.

    With "auto" one of them runs after `fit` has ended only."""
    conditions: int = 0
    """Those of each step, not those within what is rarely done."""


AUTO = {"learning_rate": "auto"}
CASES = [
    Case(DENSE, {}, passes=2),
    Case(DENSE, {"momentum": 0.9}, passes=3),
    Case(DENSE, {"centered": True}, passes=3),
    Case(DENSE, {"global_clipnorm": 1.0}, passes=3),
    Case(DENSE, {"weight_decay": 0.1}, passes=2),
    Case(DENSE, {"use_ema": True}, passes=3),
    Case(DENSE, {**AUTO, "momentum": 0.0, "use_ema": False}, passes=4, conditions=2),
    Case(DENSE, {**AUTO, "momentum": 0.0}, passes=5, conditions=2),
    Case(DENSE, AUTO, passes=7, conditions=2),
    Case(DENSE, {"slot_dtype": "uint8"}, passes=3),
    Case(DENSE, {"skip_nonfinite": True}, passes=3, conditions=1),
    Case(ROWS, {}, passes=2),
    Case(ROWS, {"centered": True}, passes=3),
    Case(ROWS, {"use_ema": True}, passes=4, conditions=2),
    Case(ROWS, {**AUTO, "use_ema": False}, passes=4, conditions=3),
    Case(ROWS, AUTO, passes=5, conditions=5),
    Case(ROWS, {"skip_nonfinite": True}, passes=2, conditions=1),
    Case(WHOLE, {}, passes=4),
    Case(WHOLE, {"momentum": 0.9}, passes=5),
]


def optimized(case, monkeypatch):
    """Return the program, and the names of the variables that a step may write."""
    monkeypatch.setattr(tables, "DENSE_RATIO", 10**9 if case.kind == WHOLE else 0)
    table = keras.Variable(tf.zeros(SHAPE), name="table")
    optimizer = RMSprop(**case.options)
    optimizer.build([table])
    given = [tf.ones(SHAPE)]
    if case.kind != DENSE:
        given = [tf.ones([COUNT, *SHAPE[1:]]), tf.zeros([COUNT], tf.int32)]

    def apply(*given):
        whole = len(given) == 1
        optimizer.apply([given[0] if whole else tf.IndexedSlices(*given)], [table])

    step = tf.function(apply, jit_compile=True, autograph=False)
    step(*given)  # makes the clock
    program = step.experimental_get_compiler_ir(*given)(stage="optimized_hlo")
    names = [v.name for v in optimizer.variables]
    if 0 in optimizer._clocks:
        names += ["updates", "last"]
        names += ["sum"] if case.options.get("learning_rate") == "auto" else []
        names += ["updates", "last", "first"] if optimizer.use_ema else []
    return program, names


def computations(program):
    """Return the lines of each computation, without their metadata, by its name."""
    found, name = {}, ""
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%(\S+) .*\{$", line)
        if start:
            name = "ENTRY" if start[1] else start[2]
        found.setdefault(name, []).append(line.partition(", metadata=")[0])
    return found


def is_large(line):
    """Whether what an instruction writes is a part of a table that counts."""
    result = line.partition(" = ")[2].partition(" ")[0]
    shapes = re.findall(r"\[([\d,]+)\]", result)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    return max(sizes, default=0) >= math.prod(SHAPE) // 8


@pytest.mark.slow
@pytest.mark.one_in(8)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}, {c.options}")
def test_what_xla_makes_of_a_step(case, monkeypatch):
    program, names = optimized(case, monkeypatch)
    parts = computations(program)
    lines = [line for part in parts.values() for line in part]
    # What is rarely done stands in the second branch, and there alone may be copies.
    conditions = [line for line in lines if " conditional(" in line]
    rare = {re.search(r"false_computation=%([^\s,]+)", x)[1] for x in conditions}
    often = [x for name, part in parts.items() if name not in rare for x in part]
    assert len([x for x in often if x in conditions]) <= case.conditions
    assert not [x for x in often if " copy(" in x and is_large(x)]
    passes = [x for x in often if " fusion(" in x and is_large(x)]
    assert 2 <= len(passes) <= case.passes
    # All state is written in place: each of its buffers is that of the result, too.
    written = 1 + len([name for name in names if name not in READ_ONLY])
    assert program.partition("\n")[0].count("-alias)") == written
    # Nothing waits for the host, no row is sorted, and one number a row is in float64.
    for word in ("infeed", "outfeed", "send", "recv", "sort", "custom-call", "while"):
        assert not [line for line in lines if f" {word}(" in line]
    doubles = {x for line in lines for x in re.findall(r"f64\[([\d,]*)\]", line)}
    assert doubles <= {"", f"{COUNT},1", f"{COUNT}", f"{SHAPE[0]}"}


def test_xla_joins_few_small_variables():
    # The more are joined, the longer it compiles for each.
    variables = [keras.Variable(tf.ones(5)) for _ in range(20)]
    optimizer = RMSprop("auto")
    optimizer.build(variables)

    def apply(*gradients):
        optimizer.apply([*gradients], variables)

    step = tf.function(apply, jit_compile=True, autograph=False)
    given = [tf.ones(5)] * len(variables)
    program = step.experimental_get_compiler_ir(*given)(stage="hlo")
    sizes = re.findall(r" = f32\[(\d+)\]\{0\} concatenate", program)
    assert max(map(int, sizes)) == 8 * 5
