"""A small network learns a line from noisy points, with `rmsprop_optimizer`."""

from typing import NamedTuple

import quiet  # noqa: F401

# isort: split

import keras
import numpy as np

from keras_rmsprop import rmsprop_optimizer

EPOCHS, BATCH_SIZE, NOISE = 100, 32, 0.3


class Result(NamedTuple):
    """Mean squared errors: on the points learned from, on those kept back."""

    first: tuple[float, float]
    last: tuple[float, float]
    floor: tuple[float, float]
    """What the true line gets: the noise alone."""


def main() -> Result:
    """Train the network, print and return how well it did."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(200, 1))
    noise = rng.normal(scale=NOISE, size=x.shape)
    y = 2 * x + 1 + noise

    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(10, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    optimizer = rmsprop_optimizer(learning_rate=0.01, rho=0.9, epsilon=1e-8)
    model.compile(optimizer=optimizer, loss="mse")
    history = model.fit(
        x, y, epochs=EPOCHS, batch_size=BATCH_SIZE, validation_split=0.2, verbose=0
    ).history
    losses = list(zip(history["loss"], history["val_loss"], strict=True))
    squares = noise**2
    kept_back = len(x) // 5
    result = Result(
        first=losses[0],
        last=losses[-1],
        floor=(float(squares[:-kept_back].mean()), float(squares[-kept_back:].mean())),
    )

    names = ("after epoch 1", f"after epoch {EPOCHS}", "the true line")
    print(f"{len(x)} points on y = 2 x + 1 with noise; mean squared errors:\n")
    print(f"{'':<18}training  validation")
    for name, (training, validation) in zip(names, result, strict=True):
        print(f"{name:<18}{training:8.4f}{validation:12.4f}")
    print("\nThe true line errs by the noise alone: on new points no curve beats it.")
    return result


if __name__ == "__main__":
    from command_line import OptionParser

    OptionParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    main()
