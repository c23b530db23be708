"""A Wasserstein GAN draws digits: RMSprop where its paper asks for it.

    python examples/wgan_digits.py

Momentum made the critic of Arjovsky et al. unstable, so they trained with RMSprop. As
theirs, each step trains the critic five times, clips its weights, and trains the
generator once. Small dense networks and longer steps show digits in two minutes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quiet  # noqa: F401

# isort: split

import keras
import mnist_data
import numpy as np
import tensorflow as tf
from command_line import example_parser
from matplotlib.figure import Figure
from numpy.typing import NDArray

from keras_rmsprop import dialects

NOISE, BATCH_SIZE, CRITIC_STEPS, CLIP, LEARNING_RATE = 64, 64, 5, 0.03, 5e-4


class Clip(keras.constraints.Constraint):
    """Keeps weights small, and with them the slope of the critic."""

    def __call__(self, w: Any) -> Any:
        """Return the weights, none beyond the limit."""
        return keras.ops.clip(w, -CLIP, CLIP)


class WGAN(keras.Model):
    """A generator and its critic."""

    def __init__(self) -> None:
        super().__init__()
        dense, relu = keras.layers.Dense, keras.layers.LeakyReLU
        self.generator = keras.Sequential([keras.Input((NOISE,))])
        for units in (256, 512):
            for layer in (dense(units), relu()):
                self.generator.add(layer)
        self.generator.add(dense(mnist_data.PIXELS, activation="sigmoid"))
        self.critic = keras.Sequential([keras.Input((mnist_data.PIXELS,))])
        clip: dict[str, Any] = {"kernel_constraint": Clip(), "bias_constraint": Clip()}
        for units in (256, 128):
            self.critic.add(dense(units, **clip))
            self.critic.add(relu())
        self.critic.add(dense(1, **clip))
        # The paper's program is one of PyTorch; so this is PyTorch's RMSprop.
        self.critic_optimizer = dialects.torch(LEARNING_RATE)
        self.compile(dialects.torch(LEARNING_RATE))

    def noise(self) -> Any:
        """Return what the generator makes digits of."""
        return keras.random.normal((BATCH_SIZE, NOISE))

    def train_step(self, digits: Any) -> dict[str, Any]:
        """Train the critic on one batch after the other, then the generator."""
        weights = self.critic.trainable_variables
        for real in tf.split(digits, CRITIC_STEPS):
            drawn = self.generator(self.noise())
            with tf.GradientTape() as tape:
                worth = tf.reduce_mean(self.critic(real))
                loss = tf.reduce_mean(self.critic(drawn)) - worth
            self.critic_optimizer.apply(tape.gradient(loss, weights), weights)
        weights = self.generator.trainable_variables
        with tf.GradientTape() as tape:
            drawn = self.generator(self.noise())
            generator_loss = -tf.reduce_mean(self.critic(drawn))
        self.optimizer.apply(tape.gradient(generator_loss, weights), weights)
        return {"distance": -loss}


def draw(path: Path, digits: NDArray[Any], distances: Sequence[float]) -> None:
    """Draw digits that were generated, and how far the critic held them from real ones.

    Args:
        path: The PNG to write.
        digits: 64 images.
        distances: What the critic said, one number a step.
    """
    grid = digits.reshape(8, 8, 28, 28).swapaxes(1, 2).reshape(224, 224)
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(grid, cmap="gray_r")
    left.set_title(f"Generated, after {len(distances)} steps", loc="left", size=15)
    left.set_xlabel("64 digits of 28 x 28 pixels", size=12)
    left.set_xticks([])
    left.set_yticks([])
    right.set_title("How far from real digits", loc="left", size=15)
    right.plot(range(1, len(distances) + 1), distances, ".", ms=3, label="each step")
    right.set_yscale("log")
    right.set_xlabel("step (five of the critic, one of the generator)", size=12)
    right.set_ylabel("critic's estimate of the distance (its own unit)", size=12)
    right.grid(axis="y", color="#e4e3df")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=12, markerscale=4)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, draw, and return the critic's estimates of the distance."""
    parser = example_parser(
        "wgan_digits",
        "A Wasserstein GAN learns to draw digits.",
        steps=3000,
        short=5,
        unit="steps of the generator",
        gives="most of 64 digits can be read, after two minutes",
    )
    parser.add_argument(
        "--data",
        choices=("auto", "tfds", "sample"),
        default="auto",
        help="which digits, as with mnist_train.py",
    )
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(options.seed)
    try:
        digits = mnist_data.load(options.data, options.seed)
    except mnist_data.MnistUnavailableError as error:
        parser.error(str(error))
    data = tf.data.Dataset.from_tensor_slices(digits.train_images)
    data = data.shuffle(10_000).repeat().batch(CRITIC_STEPS * BATCH_SIZE)

    gan, distances = WGAN(), list[float]()
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: distances.append(float(logs["distance"]))
    )
    print(f"Learning to draw the digits of {digits.source}:")
    gan.fit(data, steps_per_epoch=options.steps, callbacks=[note], shuffle=False)

    drawn = gan.generator(gan.noise()).numpy()
    draw(options.output / "digits.png", drawn, distances)
    first, last = np.mean(distances[:100]), np.mean(distances[-100:])
    print(f"Distance, mean of 100 steps: {first:.2f} at first, {last:.2f} at last.")
    print(f"Written to {options.output}: digits.png")
    return distances


if __name__ == "__main__":
    main()
