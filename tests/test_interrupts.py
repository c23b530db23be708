"""Ctrl-C while rows are brought up to date: all of it happens, or nothing."""

import os
import random
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import assert_close

import keras_rmsprop
from keras_rmsprop import RMSprop, sparse

pytestmark = pytest.mark.tensorflow("rows of embeddings")

PACKAGE = os.path.dirname(keras_rmsprop.__file__)
ROWS = 400
OPTIONS = {
    "v": {"initial_accumulator_value": 1.0},
    "all": {
        "learning_rate": "auto",
        "use_ema": True,
        "centered": True,
        "epsilon": 1e-3,
        "initial_accumulator_value": 1.0,
    },
}


class Interrupt(BaseException):
    """What the signal raises, as Ctrl-C raises `KeyboardInterrupt`."""


class Timer:
    """Interrupts a call after a while, at the next line of the package.

    Not inside a call of TensorFlow's: where its C++ reads Python values, an exception
    ends the process, whoever wrote the program.
    """

    def __init__(self):
        self.is_running = False

    def start(self, seconds):
        self.is_running = True
        # Then again and again: not from `fire`, which a slow machine would interrupt.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1e-4)

    def stop(self):
        self.is_running = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def fire(self, _, frame):
        if self.is_running and frame.f_code.co_filename.startswith(PACKAGE):
            self.is_running = False
            raise Interrupt


def read(optimizer):
    _ = optimizer.variables


def save(optimizer):
    optimizer.save_own_variables({})


def assign(optimizer):
    optimizer.rho = optimizer.rho  # rows follow the old one first


def made(options):
    table = keras.Variable(np.ones((ROWS, 3)), dtype="float32", name="embeddings")
    optimizer = RMSprop(**{"learning_rate": 1e-3, "rho": 0.99} | options)
    optimizer.build([table])
    return table, optimizer


def check(name, hits):
    """Interrupt so often; compare with an optimizer of which nobody reads the state."""

    rng, draw = np.random.default_rng(0), random.Random(0)
    (table, optimizer), (twin_table, twin) = made(OPTIONS[name]), made(OPTIONS[name])
    timer = Timer()
    before = signal.signal(signal.SIGALRM, timer.fire)
    counts, longest = dict.fromkeys((read, save, assign), 0), 1e-3
    try:
        for n in range(20 * hits):
            if sum(counts.values()) == hits:
                break
            ids = tf.constant(rng.integers(0, ROWS // 2, 4))
            row = tf.constant(rng.normal(size=(4, 3)), "float32")
            optimizer.apply([tf.IndexedSlices(row, ids)], [table])
            twin.apply([tf.IndexedSlices(row, ids)], [twin_table])
            action = draw.choice([*counts])
            begun = time.perf_counter()
            if n < 6:  # what is traced once
                action(optimizer)
                continue
            try:
                timer.start(draw.uniform(1e-6, longest))
                action(optimizer)
                timer.stop()
                longest = 0.9 * longest + 0.1 * (time.perf_counter() - begun)
            except Interrupt:
                counts[action] += 1
    finally:
        timer.stop()
        signal.signal(signal.SIGALRM, before)
    assert all(counts.values())
    assert sum(counts.values()) == hits
    state, expected = ([v.numpy() for v in o.variables] for o in (optimizer, twin))
    assert_close([table.numpy(), *state], [twin_table.numpy(), *expected], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_random_interrupts(name):
    check(name, 30)


@pytest.mark.rest
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_many_random_interrupts(name):
    check(name, 500)


def test_an_interrupt_between_writing_and_resetting(monkeypatch):
    table, optimizer = made(OPTIONS["all"])
    for _ in range(3):
        optimizer.apply([tf.IndexedSlices(tf.ones((1, 3)), [0])], [table])
    expected = optimizer.get_state()
    with monkeypatch.context() as patch:
        patch.setattr(sparse.Ticks, "reset", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _ = optimizer.variables
    assert_close(
        [*optimizer.get_state().slots[0]][::2], [*expected.slots[0]][::2], 1e-6
    )
    _ = optimizer.variables
    assert_close(
        [*optimizer.get_state().slots[0]][::2], [*expected.slots[0]][::2], 1e-6
    )
