"""A learning rate range test: a few steps show at which rates the loss falls."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_rmsprop import checks
from keras_rmsprop.callback_base import Callback, inner
from keras_rmsprop.state import as_array, copied, sync

WORSE, BATCHES = 4.0, 5
"""The test ends when the mean of the last BATCHES losses is WORSE times the first."""
FEWEST_STEPS = 20


class LearningRateFinder(Callback):
    r"""Find a learning rate: raise it step by step, and see when the loss falls.

    The first `steps` batches of `fit` are the test: step $k$ is taken with the rate
    `lowest` $\cdot$ (`highest` / `lowest`)$^{k / (\text{steps} - 1)}$. It ends early if
    the loss is not finite, or over five batches is four times the first one. Then
    the model and the optimizer are restored bit-for-bit: weights, slots, averages,
    statistics, seeds and the learning rate. `fit` stops there, so call it again to
    train; with `train=True` it continues with the suggested rate. If `fit` is
    interrupted during the test, the next `fit` with this callback puts them back.

    It suggests a third of the rate at which the smoothed loss is lowest. That is a
    starting point: the best rate for a long training may be larger or smaller.

    It works with any Keras optimizer whose learning rate is a number. `RMSprop("auto")`
    needs none.

    Args:
        lowest: The first rate, > 0. Defaults to `1e-6`.
        highest: The last rate, > `lowest`. Defaults to `1.0`.
        steps: Number of batches, at least 20. If an epoch has fewer, `fit` must have
            more epochs. Defaults to `100`.
        train: Whether to continue with the suggested rate; else `fit` stops after the
            test, and the rate is what it was. Defaults to `False`.

    Attributes:
        rates: The rates tried, a list.
        losses: The loss of each batch, a list.
        suggestion: The suggested rate; None if the loss never fell.

    Raises:
        ValueError: An argument is out of its range, or the optimizer's learning rate is
            a schedule or estimated in training.
        TypeError: An argument is not of its type.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_rmsprop import RMSprop
        >>> from keras_rmsprop.callbacks import LearningRateFinder
        >>> keras.utils.set_random_seed(0)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(RMSprop(), "mse")
        >>> x = np.random.default_rng(0).normal(size=(800, 4))
        >>> finder = LearningRateFinder()
        >>> history = model.fit(
        ...     x, x @ [1, 2, 3, 4], batch_size=8, verbose=0, callbacks=[finder]
        ... )
        >>> len(finder.rates), 1e-3 < finder.suggestion < 1
        (100, True)

    Reference:
        - [Smith, 2015](https://arxiv.org/abs/1506.01186), section 3.3.
    """

    def __init__(
        self,
        lowest: float = 1e-6,
        highest: float = 1.0,
        steps: int = 100,
        train: bool = False,
    ) -> None:
        super().__init__()
        self.lowest = checks.number("lowest", lowest, checks.POSITIVE)
        above = checks.Range(lambda x: self.lowest < x < math.inf, f"> {lowest}")
        self.highest = checks.number("highest", highest, above)
        self.steps = checks.integer("steps", steps, FEWEST_STEPS)
        self.train = checks.flag("train", train)
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.suggestion: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._before: Any = None
        self._waits = self._running = False
        self._mean = 0.0, 0.0  # the sum of the losses so far, and their weight

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin, if the model is built; else after the first batch, which builds it."""
        if self._before is not None:
            self._put_back()  # what an interrupted test left
        self._check()
        self.rates, self.losses, self.suggestion = [], [], None
        self._waits, self._running = True, False
        self._begin()

    def _begin(self) -> None:
        """Copy what is to be put back."""
        model, optimizer = self.model, self.model.optimizer
        if not model.trainable_variables:
            return
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        sync(self.model)
        # If `fit` ends here, what it has measured stays.
        left = {id(v) for v in ([] if self.train else model.metrics_variables)}
        every = [*model.variables, *optimizer.variables]
        variables = [v for v in every if id(v) not in left]
        self._before = optimizer, [(v, copied(v)) for v in variables]
        self._waits, self._running = False, True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note that Keras' mean of the losses starts again."""
        self._mean = 0.0, 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Raise the rate."""
        if self._waits:
            self._begin()
        if self._running:
            share = len(self.rates) / (self.steps - 1)
            rate = self.lowest * (self.highest / self.lowest) ** share
            sync(self.model)
            self.model.optimizer.learning_rate = rate
            self.rates.append(rate)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Note the loss, and end the test if it is time."""
        if not (self._running or self._waits):
            return
        loss = self._loss(logs or {})
        if self._waits:
            return
        self.losses.append(loss)
        away = not math.isfinite(loss)
        if len(self.losses) > FEWEST_STEPS:
            away |= not np.median(self.losses[-BATCHES:]) <= _worst(self.losses)
        if away or len(self.losses) == self.steps:
            self._finish()

    def _loss(self, logs: Mapping[str, Any]) -> float:
        """Return the loss of the last batch; what Keras tells is the epoch's mean."""
        sync(self.model)
        means = [m for m in self.model.metrics if m.name == "loss"]
        if not means or not hasattr(means[0], "total"):
            return float(logs.get("loss", math.nan))
        before = self._mean
        now = self._mean = _number(means[0].total), _number(means[0].count)
        if now[1] == before[1]:  # a `train_step` of its own has another way
            return float(logs.get("loss", math.nan))
        return (now[0] - before[0]) / (now[1] - before[1])

    def on_train_end(self, logs: Any = None) -> None:
        """Put back what the end of `fit` changed."""
        if self._running or self._waits:
            warnings.warn(
                f"The test of learning rates has seen {len(self.losses)} of "
                f"{self.steps} batches: give `fit` more epochs, or take fewer `steps`.",
                stacklevel=2,
            )
            self._finish()
        if not self.train:
            self._put_back()
        self._before = None

    def _check(self) -> None:
        optimizer = inner(self.model.optimizer)[0]
        rate = optimizer.get_config().get("learning_rate")
        kind = rate.get("class_name") if isinstance(rate, dict) else None
        if kind == "AutoLearningRate":
            raise ValueError(
                '`LearningRateFinder` is not needed with `learning_rate="auto"`, which '
                "estimates the rate. Remove the callback."
            )
        if not isinstance(rate, float):
            raise ValueError(
                "`LearningRateFinder` needs an optimizer whose learning rate is a "
                f"number. Received: learning_rate={kind or rate}"
            )

    def _finish(self) -> None:
        """End the test."""
        self._waits = self._running = False
        self._put_back()
        self.suggestion = suggested(self.rates[: len(self.losses)], self.losses)
        if not self.train:
            self.model.stop_training = True
        elif self.suggestion is not None:
            self.model.optimizer.learning_rate = self.suggestion

    def _put_back(self) -> None:
        if self._before is None:
            return
        sync(self.model)
        optimizer, values = self._before
        _ = optimizer.variables  # whoever writes to them asks for them first
        for variable, value in values:
            variable.assign(copied(value))

    def plot(self) -> Any:
        """Draw the loss over the learning rate, with the suggested rate.

        Both axes are logarithmic, unless a loss is not positive. Losses more than four
        times the first ones are cut off.

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: There are no losses yet.
        """
        if not self.losses:
            raise ValueError(
                "`LearningRateFinder` has seen no batch yet. Pass it to `fit` first, "
                "as `model.fit(..., callbacks=[finder])`."
            )
        from matplotlib.figure import Figure

        figure = Figure((7, 4.5), layout="constrained")
        axes = figure.subplots()
        rates = self.rates[: len(self.losses)]
        axes.plot(rates, self.losses, ".", color="0.6", label="loss of a batch")
        axes.plot(rates, smoothed(self.losses), color="C0", label="smoothed")
        if self.suggestion is not None:
            label = f"suggested: {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color="C1", linestyle="--", label=label)
        is_positive = min(self.losses) > 0
        axes.set(xscale="log", yscale="log" if is_positive else "linear")
        axes.set(xlabel="learning rate", ylabel="loss")
        if math.isfinite(worst := float(_worst(self.losses))):
            axes.set_ylim(top=worst)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def smoothed(losses: ArrayLike, width: int = 15) -> NDArray[np.float64]:
    """Return running means of losses, weighted by a bell curve.

    Args:
        losses: One for each step.
        width: The number of steps that the bell covers; odd.
    """
    y = np.asarray(losses, "float64")
    bell = np.hanning(width + 2)[1:-1]
    middle = slice(width // 2, width // 2 + len(y))
    weights = np.convolve(np.ones_like(y), bell)[middle]
    return np.convolve(y, bell)[middle] / weights


def suggested(rates: ArrayLike, losses: ArrayLike) -> float | None:
    """Return a third of the rate where the smoothed loss is lowest.

    Return None if that is the first rate.

    Args:
        rates: Learning rates, rising.
        losses: The loss of each.
    """
    y = np.asarray(losses, "float64")
    if not y.size:
        return None
    # One loss that is a thousand times the others must not weigh on its neighbours.
    lowest = int(np.argmin(smoothed(np.fmin(y, _worst(y)))))
    return float(np.asarray(rates)[lowest]) / 3 if lowest else None


def _worst(losses: ArrayLike) -> Any:
    """Return the loss at which a test ends."""
    first = np.mean(np.asarray(losses)[:FEWEST_STEPS])
    return first + (WORSE - 1) * np.abs(first)


def _number(x: Any) -> float:
    return float(as_array(x))
