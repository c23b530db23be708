"""Linear regression by RMSprop: once in NumPy, once with Keras, on the same data.

The gradient of the mean squared error is `X.T @ (X @ theta - y) * 2 / n`: the NumPy
program spells it out, the Keras program leaves it to `tf.GradientTape`.
"""

from typing import NamedTuple

import quiet  # noqa: F401

# isort: split

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from keras_rmsprop import RMSprop, reference

Array = NDArray[np.float64]

ALPHA, BETA, EPSILON, ITERATIONS = 0.1, 0.9, 1e-8, 1000


class Result(NamedTuple):
    """Theta, a bias and a slope, as each way finds it."""

    least_squares: Array
    numpy: Array
    keras: Array
    keras_decaying_alpha: Array


def make_data(n: int = 100) -> tuple[Array, Array]:
    """Return X, a column of ones and one of x, and y = 0.5 + 0.25 x + noise.

    The minimum is a few steps from zero. From far away RMSprop comes as close to it
    as rounding lets it before it starts to hop, and rounding then decides which way:
    no two programs would end on the same side.
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 10, size=n)
    y = 0.5 + 0.25 * x + rng.normal(scale=0.5, size=n)
    return np.stack([np.ones(n), x], axis=1), y


def with_numpy(x: Array, y: Array, alpha: float) -> Array:
    """Return theta after RMSprop as most textbooks give it."""
    return reference.minimize(
        lambda theta: x.T @ (x @ theta - y) * 2 / len(y),
        np.zeros(2),
        ITERATIONS,
        alpha=alpha,
        beta=BETA,
        epsilon=EPSILON,
    )


def with_keras(x: Array, y: Array, optimizer: RMSprop) -> Array:
    """Return theta after a custom training loop."""
    theta = keras.Variable(np.zeros(2), dtype="float64")
    for _ in range(ITERATIONS):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.linalg.matvec(x, theta.value) - y) ** 2)
        optimizer.apply(tape.gradient(loss, [theta.value]), [theta])
    return theta.numpy()


def main() -> Result:
    """Find theta in every way, print and return it."""
    x, y = make_data()
    constant = RMSprop(ALPHA, rho=BETA, epsilon=EPSILON)
    decay = keras.optimizers.schedules.CosineDecay(ALPHA, ITERATIONS)
    result = Result(
        least_squares=np.linalg.lstsq(x, y)[0].astype(np.float64),
        # Keras keeps the learning rate in float32: NumPy takes the same number.
        numpy=with_numpy(x, y, alpha=float(constant.learning_rate)),
        keras=with_keras(x, y, constant),
        keras_decaying_alpha=with_keras(
            x, y, RMSprop(decay, rho=BETA, epsilon=EPSILON)
        ),
    )

    print(f"y = 0.5 + 0.25 x + noise, {len(y)} samples, {ITERATIONS} steps of RMSprop")
    print(f"with alpha {ALPHA}, beta {BETA}, epsilon {EPSILON}:\n")
    print(f"{'':<22}{'bias':>8}{'slope':>9}   off least squares by")
    for name, theta in result._asdict().items():
        off = theta - result.least_squares
        row = f"{name.replace('_', ' '):<22}{theta[0]:8.4f}{theta[1]:9.4f}"
        print(f"{row}   {off[0]:+9.1e} {off[1]:+9.1e}")
    apart = np.abs(result.keras - result.numpy).max()
    print(f"""
NumPy and Keras land on the same theta: {apart:.0e} apart. Both hop about least squares
for good, alpha / 2 = {ALPHA / 2} to either side: near the minimum every step turns the
gradient's sign and keeps its size, so sqrt(v) = |g| and the step is alpha, however
small g is. An alpha that decays to zero (here CosineDecay) ends the hopping.""")
    return result


if __name__ == "__main__":
    from command_line import OptionParser

    OptionParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    main()
