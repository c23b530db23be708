"""Random programs: steps, changes and doors of state, in any order; see `oracle.py`.

`make fuzz` runs them. A program that fails is shrunk and printed as Python.
"""

import contextlib
import copy
import pickle
import tempfile
import warnings
from pathlib import Path

import hypothesis
import keras
import numpy as np
import pytest
from drawing import CHANGES, NAMES, NEED_SLOTS, ROWS, SHAPES, model_of, options, output
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import Oracle

from keras_rmsprop import RMSprop

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf

FROZEN_IS_LOST = True
"""A model that is loaded forgets the slots of frozen layers; see `known.py`."""

tensor = keras.ops.convert_to_tensor


# Elsewhere `fit` is the other way.
WAYS = ["eager", "function", "XLA"] if BACKEND == "tensorflow" else ["eager"]
IDS = st.lists(st.integers(0, ROWS - 1), max_size=4)
SEED = st.integers(0, 2**16)


class Programs(RuleBasedStateMachine):
    """One model and one optimizer, and what they must be."""

    @initialize(
        given=options(),
        dtype=st.sampled_from(["float32", "float64"][: 1 + (BACKEND != "jax")]),
        constraint=st.sampled_from([None, "non_neg"]),
    )
    def begin(self, given, dtype, constraint):
        self.dtype, self.kept = dtype, None
        self.rtol = 1e-6 if dtype == "float64" else 3e-4
        self.model = model_of(dtype, constraint)
        given, known = dict(given), dict(given)
        if given.get("learning_rate") == "schedule":
            schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 0.5)
            given["learning_rate"] = schedule
            known["learning_rate"] = lambda step: 0.1 / (1 + 0.5 * step)
        known.pop("jit_compile", None)
        self.use(RMSprop(**given))
        weights = {n: self.weight(n).numpy() for n in NAMES}
        self.oracle = Oracle(weights, known, resets_all=BACKEND != "jax")
        self.made = self.switched_on()
        self.oracle.not_negative = {"vector"} if constraint else set()
        self.build()  # else a step of other variables raises, as with the built-in

    # What the program has.

    def build(self):
        self.optimizer.build(self.model.trainable_variables)
        self.oracle.build([n for n in NAMES if n not in self.oracle.frozen])

    def use(self, optimizer):
        self.model.compile(optimizer=optimizer, loss=output, **self.compile_options())

    def compile_options(self):
        return {"jit_compile": False}

    @property
    def optimizer(self):
        return self.model.optimizer

    def weight(self, name):
        return self.model.get_layer(name).weights[0]

    def folder(self):
        return tempfile.TemporaryDirectory()

    # Steps.

    def gradients(self, seed, names, ids):
        """Return dense gradients by name, and rows of the table to sum to its one."""
        rng = np.random.default_rng(seed)
        dense = {n: rng.normal(size=SHAPES[n]).astype("float32") for n in names}
        rows = rng.normal(size=(len(ids or ()), 3)).astype("float32")
        if ids is not None and "table" in dense:
            dense["table"] *= 0
            np.add.at(dense["table"], ids, rows)
        return dense, rows

    @rule(
        way=st.sampled_from(WAYS),
        names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
        missing=st.sets(st.sampled_from(NAMES), max_size=1),
        ids=st.none() | IDS,
        seeds=st.lists(SEED, min_size=1, max_size=3),
        bad=st.booleans(),
    )
    def steps(self, way, names, missing, ids, seeds, bad):
        names = [n for n in names if n not in self.oracle.frozen]
        missing = missing if {*names} - missing else set()
        if not names:
            return
        variables = [self.weight(n) for n in names]
        step = self.stepping(way, variables)
        for i, seed in enumerate(seeds):
            dense, rows = self.gradients(seed, names, ids)
            able = {*names} - missing - ({"table"} if ids == [] else set())
            if bad and able and i == len(seeds) - 1 and self.oracle.skip_nonfinite:
                dense[min(able)][0] = np.nan
                if min(able) == "table":
                    rows[:1] = np.nan
            grads = {n: None if n in missing else dense[n] for n in names}
            self.oracle.apply(
                {n: g if g is None else g.astype(float) for n, g in grads.items()}
            )
            given = [g if g is None else tensor(g, self.dtype) for g in grads.values()]
            if ids is not None and grads.get("table") is not None:
                given[names.index("table")] = self.slices(rows, ids)
            step(given)
        self.check_weights()

    def slices(self, rows, ids):
        if BACKEND != "tensorflow":
            dense = np.zeros(SHAPES["table"], "float32")
            np.add.at(dense, ids, rows)
            return tensor(dense, self.dtype)
        return tf.IndexedSlices(
            tensor(rows, self.dtype), tf.constant(ids, "int32"), tf.constant([ROWS, 3])
        )

    def stepping(self, way, variables):
        def apply(grads):
            self.optimizer.apply(grads, variables)

        if way == "eager":
            return apply
        return tf.function(apply, jit_compile=way == "XLA", autograph=False)

    @rule(ids=IDS, seeds=st.lists(SEED, min_size=1, max_size=3), xla=st.booleans())
    def fit(self, ids, seeds, xla):
        names = [n for n in NAMES if n not in self.oracle.frozen]
        if not names or not ids:
            return
        x = [[], [], [], []]
        for seed in seeds:
            dense, rows = self.gradients(seed, NAMES, ids)
            for xs, a in zip(
                x, [ids, rows, dense["matrix"], dense["vector"]], strict=True
            ):
                xs.append(a)
            scale = self.oracle.loss_scale_factor or 1
            self.oracle.apply({n: scale * dense[n].astype(float) for n in names})
        self.oracle.end_fit()
        self.model.compile(optimizer=self.optimizer, loss=output, jit_compile=xla)
        x, y = [np.array(xs) for xs in x], np.zeros(len(seeds))
        self.model.fit(x, y, batch_size=1, shuffle=False, verbose=0)
        self.check_weights()

    # What changes between steps.

    @rule(change=CHANGES)
    def change(self, change):
        if callable(self.oracle.learning_rate):
            change = {k: v for k, v in change.items() if k != "learning_rate"}
        if any(name in NEED_SLOTS and name not in self.made for name in change):
            return  # too late, see `test_arguments.py`
        if self.oracle.centered and "bias_correction" in change:
            return  # no variance in the first step
        for name, value in change.items():
            setattr(self.optimizer, name, value)
            self.oracle.options[name] = value

    # One at most: an optimizer that knows none of those given refuses them, as Keras'.
    @rule(frozen=st.sets(st.sampled_from(NAMES), max_size=1))
    def freeze(self, frozen):
        for n in NAMES:
            self.model.get_layer(n).trainable = n not in frozen
        self.oracle.frozen = frozen
        self.use(self.optimizer)

    # StateIO of state.

    @rule()
    def read(self):
        self.check_state()

    @precondition(lambda self: self.optimizer.built)
    @rule()
    def set_own_state(self):
        self.optimizer.set_state(self.optimizer.get_state())
        oracle = self.oracle
        oracle.calls = oracle.iterations * (oracle.gradient_accumulation_steps or 1)
        if oracle.gradient_accumulation_steps:
            oracle.sums = {n: 0 * x for n, x in oracle.sums.items()}

    @precondition(lambda self: self.optimizer.built)
    @rule()
    def keep(self):
        variables = [v.numpy() for v in self.optimizer.variables]
        self.kept = (
            self.optimizer,
            variables,
            self.model.get_weights(),
            self.oracle.copy(),
        )

    @precondition(lambda self: self.kept and self.kept[0] is self.optimizer)
    @rule()
    def go_back(self):
        _, variables, weights, oracle = self.kept
        if {*oracle.v} == {*self.oracle.v}:  # no layer was trained that was not before
            self.optimizer.set_weights(variables)
            self.model.set_weights(weights)
            self.return_to(oracle)

    def return_to(self, oracle):
        """Let the oracle be what it was, with the options and frozen layers of now."""
        rate = oracle.learning_rate
        options, frozen = self.oracle.options, self.oracle.frozen
        self.oracle = oracle.copy()
        self.oracle.options, self.oracle.frozen = (
            options | {"learning_rate": rate},
            frozen,
        )

    def another(self):
        """Return a model and an optimizer of the same configuration, untrained."""
        optimizer = RMSprop.from_config(self.optimizer.get_config())
        model = keras.models.clone_model(self.model)
        model.set_weights([0 * w for w in self.model.get_weights()])
        for n in NAMES:
            model.get_layer(n).trainable = n not in self.oracle.frozen
        return model, optimizer

    @contextlib.contextmanager
    def door(self):
        """Go through a door that builds the optimizer for what is not frozen.

        What a warning says is lost may be lost.
        """
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            yield
        self.made = self.switched_on()
        self.oracle.build([n for n in NAMES if n not in self.oracle.frozen])
        if FROZEN_IS_LOST:
            self.oracle.forget(self.oracle.frozen)
        if not self.oracle.calls or any(
            self.optimizer.name in str(w.message) for w in said
        ):
            self.oracle.restart_as(self.found(), int(self.optimizer.iterations))
        self.check_weights()

    @rule(built=st.booleans())
    def weights_file(self, built):
        model, optimizer = self.another()
        with self.folder() as folder, self.door():
            path = Path(folder) / "model.weights.h5"
            self.model.save_weights(path)
            self.model = model
            self.use(optimizer)
            if built:
                optimizer.build(model.trainable_variables)
            self.model.load_weights(path)
            optimizer.build(model.trainable_variables)

    @rule()
    def whole_model(self):
        with self.folder() as folder, self.door():
            path = Path(folder) / "model.keras"
            self.model.save(path)
            self.model = keras.saving.load_model(path)

    @rule(pickled=st.booleans())
    def copied(self, pickled):
        with self.door():
            if pickled:
                self.model = pickle.loads(pickle.dumps(self.model))
            else:
                self.model = copy.deepcopy(self.model)

    @precondition(lambda _: BACKEND == "tensorflow")
    @rule(new=st.booleans(), seeds=st.lists(SEED, max_size=2))
    def checkpoint(self, new, seeds):
        oracle = self.oracle.copy()
        with self.folder() as folder:
            checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)
            path = checkpoint.write(f"{folder}/checkpoint")
            if new:
                model, optimizer = self.another()
                if self.optimizer.built:
                    optimizer.build([model.get_layer(n).weights[0] for n in oracle.v])
                self.model, self.made = model, self.switched_on()
                self.use(optimizer)
                checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
            elif oracle.v:
                self.steps("eager", [*oracle.v], set(), [1, 1, 2], seeds, False)
            checkpoint.read(path).expect_partial()
        self.return_to(oracle)
        self.check_weights()

    @rule()
    def new_optimizer(self):
        self.use(RMSprop.from_config(self.optimizer.get_config()))
        self.oracle.restart()
        self.build()
        self.made = self.switched_on()

    def switched_on(self):
        return {n for n in NEED_SLOTS if getattr(self.oracle, n)}

    # What must hold.

    def check(self, what, got, want):
        np.testing.assert_allclose(
            got, want, rtol=self.rtol, atol=self.rtol, err_msg=what
        )

    def check_weights(self):
        for n in NAMES:
            self.check(f"weight {n}", self.weight(n).numpy(), self.oracle.w[n])

    def check_state(self):
        oracle, optimizer = self.oracle, self.optimizer
        assert keras.ops.convert_to_numpy(optimizer.iterations) == oracle.iterations
        if not optimizer.built:
            return
        skipped = optimizer.skipped_steps  # a number, if none are ever skipped
        if not isinstance(skipped, int):
            skipped = skipped.numpy()
        assert skipped == oracle.skipped
        found = self.found()
        assert {*found} == {*oracle.v}
        for n, (v, m, a, average) in found.items():
            self.check(f"velocity of {n}", v, oracle.v[n])
            if oracle.momentum:
                self.check(f"momentum of {n}", m, oracle.m[n])
            if oracle.centered:
                self.check(f"average gradient of {n}", a, oracle.a[n])
            if oracle.use_ema and oracle.calls:
                self.check(f"average of {n}", average, oracle.average[n])

    def found(self):
        """Return the slots and the average of each weight that the optimizer knows."""
        names = {self.weight(n).path: n for n in NAMES}
        averages = {v.name: v.numpy() for v in self.optimizer.variables}
        state = self.optimizer.get_state()
        return {
            names[path]: (*slots, averages.get(path.replace("/", "_") + "_average"))
            for path, slots in zip(state.paths, state.slots, strict=True)
        }

    def teardown(self):
        if hasattr(self, "oracle"):
            self.check_weights()
            self.check_state()


@pytest.mark.parametrize("half", range(2))
@pytest.mark.filterwarnings("ignore")
def test_programs(half, pytestconfig):
    """Try half of the programs: a process each."""
    given = pytestconfig.option
    machine = type("Half", (Programs,), {})
    hypothesis.seed(f"{given.hypothesis_seed} {half}")(machine)
    half_of_them = hypothesis.settings(max_examples=-(-given.programs // 2))
    run_state_machine_as_test(machine, settings=half_of_them)
