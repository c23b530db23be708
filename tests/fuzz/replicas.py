"""Random programs on two replicas: a step takes the gradients of both.

Without what Keras does on each replica by itself: clipping, sums over calls, skipping.
"""

import pytest
import tensorflow as tf
from drawing import NAMES, options
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from machine import IDS, SEED, Programs

CPU = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(CPU, two)
STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])  # one for all programs
ALONE = {"clipnorm", "clipvalue", "global_clipnorm", "skip_nonfinite"} | {
    "gradient_accumulation_steps"
}


class Replicas(RuleBasedStateMachine):
    """What `Programs` does, under a strategy."""

    @initialize(given=options())
    def begin(self, given):
        self.one = Programs()
        given = {k: v for k, v in given.items() if k not in ALONE}
        with STRATEGY.scope():
            self.one.begin(given=given, dtype="float32", constraint=None)

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
        ids=st.none() | IDS.filter(bool),
        seed=SEED,
    )
    def step(self, names, ids, seed):
        one = self.one
        both = [one.gradients(s, names, ids) for s in (seed, seed + 1)]
        (a, _), (b, _) = both
        one.oracle.apply({n: a[n].astype(float) + b[n] for n in names})
        variables = [one.weight(n) for n in names]

        def of_replica():
            i = tf.distribute.get_replica_context().replica_id_in_sync_group
            grads = [tf.where(i == 0, a[n], b[n]) for n in names]
            if ids is not None and "table" in names:
                rows = tf.where(i == 0, both[0][1], both[1][1])
                grads[names.index("table")] = one.slices(rows, ids)
            one.optimizer.apply(grads, variables)

        tf.function(lambda: STRATEGY.run(of_replica), autograph=False)()
        one.check_weights()

    @rule(rho=st.sampled_from([0.5, 0.9]))
    def change(self, rho):
        self.one.change({"rho": rho})

    @rule()
    def read(self):
        self.one.check_state()

    @rule()
    def set_own_state(self):
        self.one.set_own_state()

    def teardown(self):
        if hasattr(self, "one"):
            self.one.teardown()


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=-(-settings().max_examples // 4))
TestReplicas.pytestmark = [pytest.mark.filterwarnings("ignore")]
