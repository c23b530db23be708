"""A user's program, with types: it runs, and type checkers accept it."""

from pathlib import Path
from typing import Any, assert_type

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from keras_rmsprop import AutoLearningRate, RMSprop, dialects, reference, transfer
from keras_rmsprop.callbacks import AverageForEvaluation, LearningRateFinder, Monitor
from keras_rmsprop.state import State

QUIET: Any = 0  # which Keras does not annotate
Data = tuple[NDArray[np.float32], NDArray[np.float32]]


def data() -> Data:
    """Return inputs and targets of a linear function."""
    x = np.random.default_rng(0).normal(size=(160, 4)).astype(np.float32)
    return x, x[:, :1] * 2


def network() -> keras.Model:
    """Return a network of one layer."""
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


def rate_of_a_finder(train: Data) -> float:
    """Return the rate that a learning rate finder suggests."""
    model, finder = network(), LearningRateFinder(highest=10.0, steps=20)
    model.compile(RMSprop(), "mse")
    model.fit(*train, batch_size=8, verbose=QUIET, callbacks=[finder])
    assert_type(finder.suggestion, float | None)
    return finder.suggestion or 0.001


def fitted(train: Data, folder: Path) -> list[str]:
    """Return what a monitor says of a training with an automatic learning rate."""
    decay = keras.optimizers.schedules.CosineDecay(1.0, 40)
    optimizer = RMSprop(
        AutoLearningRate(factor=decay),
        weight_decay=0.01,
        use_ema=True,
        slot_dtype="bfloat16",
        skip_nonfinite=True,
    )
    monitor = Monitor(every=5, csv_file=folder / "readings.csv", show=False)
    model = network()
    model.compile(optimizer, "mse")
    callbacks = [monitor, AverageForEvaluation()]
    model.fit(*train, batch_size=8, epochs=2, verbose=QUIET, callbacks=callbacks)
    assert_type(optimizer.explain(), str)
    norms = [reading.gradient_norm for reading in monitor.readings]
    assert_type(norms, list[float])
    return monitor.findings


def trained_in_a_loop(train: Data, optimizer: RMSprop) -> State:
    """Return the state of an optimizer after a loop of one's own."""
    model = network()
    variables = model.trainable_variables

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        optimizer.apply(tape.gradient(loss, variables), variables)

    compiled = tf.function(step)
    optimizer.build(variables)
    for x, y in tf.data.Dataset.from_tensor_slices(train).batch(32):
        compiled(x, y)
    optimizer.learning_rate *= 0.5
    return optimizer.get_state()


class Halved(RMSprop):
    """A subclass that takes half of each gradient."""

    def update_step(
        self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
    ) -> None:
        """Update one variable."""
        super().update_step(gradient / 2, variable, learning_rate)


def main(folder: Path) -> None:
    """Train in each of these ways."""
    train = data()
    rate = rate_of_a_finder(train)
    findings = fitted(train, folder)
    assert_type(findings, list[str])
    for optimizer in RMSprop(rate), dialects.torch(lr=rate, alpha=0.9), Halved("auto"):
        state = trained_in_a_loop(train, optimizer)
        assert_type(state.iterations, int)
        optimizer.set_state(state)
    optimizer = dialects.torch(lr=rate)
    model = network()
    optimizer.build(model.trainable_variables)
    theirs = {"state": {}, "param_groups": [{"lr": rate, "params": [0, 1]}]}
    transfer.from_torch(optimizer, theirs, [(0, transfer.LINEAR), 1])
    theta = reference.minimize(lambda x: 2 * x, [1.0, -1.0], 10, alpha=0.1)
    assert_type(theta, NDArray[np.float64])


if __name__ == "__main__":
    main(Path.cwd())
