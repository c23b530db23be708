"""Draw what the callbacks of `keras_rmsprop` show, in a few seconds each.

    python examples/callback_pictures.py --output docs/pictures

A small network learns 5000 digits of MNIST: with weight averaging, with the learning
rate finder, and watched by `Monitor` while it looks for its own rate.
"""

from collections.abc import Sequence
from typing import Any

import quiet  # noqa: F401

# isort: split

import keras
import mnist_data
from command_line import OptionParser, folder
from matplotlib.figure import Figure

from keras_rmsprop import RMSprop, callbacks

EPOCHS = 15


def train(digits: Any, optimizer: Any, *used: Any) -> dict[str, list[float]]:
    """Train a network and return its history.

    Args:
        digits: What to learn, `mnist_data.Digits`.
        optimizer: What to train with.
        *used: Callbacks.
    """
    keras.utils.set_random_seed(0)
    dense, names = keras.layers.Dense, ("hidden_1", "hidden_2")
    hidden = [dense(128, "relu", name=name) for name in names]
    layers = [keras.Input((784,)), *hidden, dense(10, name="digits")]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    history: dict[str, list[float]] = model.fit(
        digits.train_images,
        digits.train_labels,
        validation_data=(digits.test_images, digits.test_labels),
        epochs=EPOCHS,
        batch_size=64,
        verbose=0,
        callbacks=list(used),
    ).history
    return history


def draw_average(digits: Any) -> Figure:
    """Draw the validation accuracy with and without `AverageForEvaluation`."""
    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    labels = {
        "weights": [],
        "EMA weights, with AverageForEvaluation": [callbacks.AverageForEvaluation()],
    }
    for label, used in labels.items():
        optimizer = RMSprop(0.003, use_ema=True, ema_momentum=0.998, ema_warmup=True)
        history = train(digits, optimizer, *used)
        accuracy = [100 * x for x in history["val_accuracy"]]
        axes.plot(range(1, EPOCHS + 1), accuracy, ".-", label=label)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(90, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_auto(monitor: callbacks.Monitor, losses: list[float]) -> Figure:
    """Draw the learning rate of "auto" over the steps, beside the loss."""
    figure = Figure((8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = {reading.step: reading.learning_rate for reading in monitor.readings}
    left.loglog(list(rates), list(rates.values()))
    left.set(xlabel="step", title="learning rate of auto")
    right.semilogy(range(1, EPOCHS + 1), losses, ".-")
    right.set(xlabel="epoch", title="training loss")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Run the program and return the names of the pictures."""
    parser = OptionParser(description="Draw what the callbacks show.")
    parser.add_argument("--output", type=folder, default="runs/callbacks")
    options = parser.parse_args(arguments)
    digits = mnist_data.load("sample", 0)

    finder, monitor = callbacks.LearningRateFinder(), callbacks.Monitor(every=10)
    train(digits, RMSprop(), finder)
    history = train(digits, RMSprop("auto"), monitor)
    watched = monitor.plot()
    watched.set_size_inches(9, 4.5)
    pictures = {
        "average": draw_average(digits),
        "finder": finder.plot(),
        "monitor": watched,
        "auto": draw_auto(monitor, history["loss"]),
    }
    for name, figure in pictures.items():
        figure.savefig(options.output / f"{name}.png", dpi=110)
    print(f"Written to {options.output}: {', '.join(pictures)}")
    return list(pictures)


if __name__ == "__main__":
    main()
