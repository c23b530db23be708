"""Who trains in `tuning.py`, at which rates, and what comes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

RATES = tuple(float(f"{10 ** (k / 2 - 4):.3g}") for k in range(7))  # 1e-4 to 1e-1
DEFAULT = 0.001

MakeOptimizer = Callable[[float, int], Any]
"""Makes an optimizer of a rate and the number of steps to come."""


class Competitor(NamedTuple):
    """Who trains.

    Attributes:
        name: For the table.
        make: Makes the optimizer.
        rates: The rates it tries; `(1.0,)` where it needs none.
        averages: Whether it ends with the average of its weights. Its result without
            the average is kept, too.
        backend: What of Keras it runs on.
    """

    name: str
    make: MakeOptimizer
    rates: tuple[float, ...] = (1.0,)
    averages: bool = False
    backend: str = "tensorflow"


def built_in(rate: float, steps: int) -> Any:
    """Return the built-in RMSprop with a constant rate."""
    import keras

    return keras.optimizers.RMSprop(rate)


def built_in_with_decay(rate: float, steps: int) -> Any:
    """Return the built-in RMSprop with a rate that falls to nothing in a line."""
    import keras

    decay = keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0)
    return keras.optimizers.RMSprop(decay)


def adam(rate: float, steps: int) -> Any:
    """Return Keras' Adam."""
    import keras

    return keras.optimizers.Adam(rate)


def averaged(rate: float, steps: int) -> Any:
    """Return this RMSprop with a constant rate and the average of the weights."""
    return ours(rate)


def automatic(rate: float, steps: int) -> Any:
    """Return this RMSprop with the rate found while training, and the average."""
    return ours("auto")


def ours(rate: Any) -> Any:
    """Return this RMSprop, with the average of the weights."""
    from keras_rmsprop import RMSprop

    return RMSprop(rate, use_ema=True, ema_momentum=0.998, ema_warmup=True)


def prodigy(rate: float, steps: int) -> Any:
    """Return optax' Prodigy as an optimizer of Keras on JAX."""
    from tuning_prodigy import Prodigy

    return Prodigy(learning_rate=rate)


COMPETITORS = {
    "constant": Competitor("built-in RMSprop", built_in, RATES),
    "decay": Competitor("built-in, linear decay", built_in_with_decay, RATES),
    "adam": Competitor("Adam", adam, RATES),
    "average": Competitor("this, EMA", averaged, RATES, averages=True),
    "auto": Competitor('this, "auto", EMA', automatic, averages=True),
    "prodigy": Competitor("Prodigy", prodigy, backend="jax"),
}


class Run(NamedTuple):
    """One training.

    Attributes:
        task: Which network.
        competitor: Who trains it.
        rate: The learning rate.
        seed: Of the weights and of the order of the examples.
        scale: What part of the steps.
    """

    task: str
    competitor: str
    rate: float
    seed: int
    scale: float


class Result(NamedTuple):
    """What a training came to; not finite where it failed.

    Attributes:
        value: The test's accuracy or loss, with the average where there is one.
        loss: The test's loss.
        raw: The value without the average.
        rate: The rate found at the end, or the one given.
        seconds: How long it took.
    """

    value: float
    loss: float
    raw: float
    rate: float
    seconds: float
