"""Who trains in `tuning.py`, at which rates, and what comes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

GRID = tuple(float(f"{10 ** (k / 2 - 4):.3g}") for k in range(-3, 9))  # to 1
START = 0.00316
DEFAULT = 0.001

MakeOptimizer = Callable[[float, int], Any]
"""Makes an optimizer of a rate and the number of steps to come."""


class Competitor(NamedTuple):
    """Who trains.

    Attributes:
        name: For the table.
        make: Makes the optimizer.
        default: Its default rate, which is tried in any case; 1 where it needs none.
        searched: Whether the best rate of `GRID` is looked for.
        like: Whose best rate is a good one to begin with.
        averages: Whether `fit` ends with an average of its weights. Its result without
            the average is kept, too.
        backend: What of Keras it runs on.
    """

    name: str
    make: MakeOptimizer
    default: float | None = 1.0
    searched: bool = False
    like: str = ""
    averages: bool = False
    backend: str = "tensorflow"


def of_keras(name: str, decay: bool = False) -> MakeOptimizer:
    """Return what makes an optimizer of Keras, with a constant or a falling rate.

    Args:
        name: Of its class.
        decay: Whether the rate falls to 0 in a line.
    """

    def make(rate: float, steps: int) -> Any:
        import keras

        falling = keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0)
        return getattr(keras.optimizers, name)(falling if decay else rate)

    return make


def averaged(rate: float, steps: int) -> Any:
    """Return this RMSprop with a constant rate and the average of the weights."""
    from keras_rmsprop import RMSprop

    return RMSprop(rate, use_ema=True, ema_momentum=0.998, ema_warmup=True)


def automatic(rate: float, steps: int) -> Any:
    """Return this RMSprop, which finds its rate."""
    from keras_rmsprop import RMSprop

    return RMSprop("auto")


def schedule_free(rate: float, steps: int) -> Any:
    """Return Keras' ScheduleFreeAdamW, repaired for TensorFlow."""
    from tuning_schedule_free import ScheduleFree

    return ScheduleFree(rate)


def prodigy(rate: float, steps: int) -> Any:
    """Return optax' Prodigy as an optimizer of Keras on JAX."""
    from tuning_prodigy import Prodigy

    return Prodigy(learning_rate=rate)


COMPETITORS = {
    "auto": Competitor('this, "auto"', automatic, averages=True),
    "constant": Competitor("built-in RMSprop", of_keras("RMSprop"), DEFAULT, True),
    "adam": Competitor("Adam", of_keras("Adam"), DEFAULT, True),
    "adam decay": Competitor(
        "Adam, linear decay", of_keras("Adam", True), None, True, "adam"
    ),
    "schedule free": Competitor(
        "ScheduleFreeAdamW", schedule_free, 0.0025, True, "adam decay", True
    ),
    "adamw decay": Competitor(
        "AdamW, linear decay", of_keras("AdamW", True), None, True, "adam decay"
    ),
    "average": Competitor("this, EMA", averaged, DEFAULT, True, "constant", True),
    "decay": Competitor(
        "built-in, linear decay", of_keras("RMSprop", True), None, True, "constant"
    ),
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
