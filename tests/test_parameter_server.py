"""Parameter servers: two workers step at the same time, and no step is lost."""

import pytest
from stepping import python

pytestmark = pytest.mark.tensorflow("parameter servers")

PROGRAM = """
    import os, socket
    import keras
    import numpy as np
    import tensorflow as tf
    from keras_rmsprop import RMSprop

    def free():
        with socket.socket() as place:
            place.bind(("", 0))
            return f"localhost:{{place.getsockname()[1]}}"

    cluster = tf.train.ClusterSpec({{"worker": [free(), free()], "ps": [free()]}})
    config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=4)
    servers = [
        tf.distribute.Server(cluster, job, i, "grpc", config)
        for job in cluster.jobs for i in range(cluster.num_tasks(job))
    ]
    strategy = tf.distribute.ParameterServerStrategy(
        tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    )
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        weight = keras.Variable(np.float32([1, 2, 3]))
        optimizer = {optimizer}
        optimizer.build([weight])

    @tf.function
    def step():
        def on_replica():
            optimizer.apply([tf.constant([1.0, -1.0, 2.0])], [weight])

        strategy.run(on_replica)

    for _ in range({steps}):
        coordinator.schedule(step)
    coordinator.join()
    print(int(optimizer.iterations.numpy()), *weight.numpy())
    print(flush=True)
    os._exit(0)  # the servers do not end
"""


@pytest.mark.slow
def test_all_steps_are_counted_and_go_the_right_way():
    made = "RMSprop(0.001, momentum=0.5)"
    out = python(PROGRAM.format(optimizer=made, steps=150))
    count, *weights = map(float, out.split())
    assert count == 150
    # Each of so many steps is 0.002 long, but for those that overwrote each other.
    moved = [1 - weights[0], weights[1] - 2, 3 - weights[2]]
    assert all(0.1 < x < 0.35 for x in moved)
