"""What the optimizer does to each layer, watched while `fit` runs."""

import csv
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_rmsprop import checks
from keras_rmsprop.callback_base import Callback, described, list_of
from keras_rmsprop.state import as_array, sync

STALLED, EXPLODING = 1e-7, 0.3
"""Change per step, relative to the weights: below the first, float32 weights do not
change; above the second, training fails."""
MOST_ELEMENTS = 2**15
"""Of a larger variable, only so many elements are read, evenly spaced."""
SETTLING = 10
"""After so many looks, no weight should change much in one step."""
FEWEST_STEPS, MOST_TIME = 100, 0.02
"""Least steps between readings, by default, and the most of the time that they take."""


class Reading(NamedTuple):
    """What was seen of one variable in one step."""

    step: int
    """The number of the step, from 1, over all that this monitor has watched."""
    variable: str
    """The path of the variable."""
    effective_rate: float
    """Median of eta / (root of v), where v > 0: the step for a gradient of 1."""
    effective_rate_low: float
    """Its first quartile."""
    effective_rate_high: float
    """Its third quartile."""
    update_ratio: float
    """Norm of the change in this step, over the norm of the weights before it.

    With `steps_per_execution`, a step's share of what they change together.
    """
    gradient_norm: float
    """Norm of the gradient, after clipping; NaN if there was no update.

    With `steps_per_execution`, the root of the mean square, later steps counting more.
    Of variables with more than 32,768 elements, this and the one above are estimates.
    """
    learning_rate: float
    """The learning rate in use, estimated or given."""
    skipped_steps: int
    """How many steps `skip_nonfinite` has skipped so far."""


def _some(x: NDArray[Any] | None) -> NDArray[np.float64] | None:
    """Return some elements of an array, or all of a small one, as a flat array."""
    if x is None:
        return None
    step = -(-x.size // MOST_ELEMENTS)
    while step > 1 and math.gcd(step, x.shape[-1]) > 1:
        step += 1  # else they would be of a few columns only
    return x.ravel()[::step].astype("float64")


def _norm(x: NDArray[np.float64]) -> float:
    # Not NumPy's: its BLAS has threads, which get into the way of the next step.
    return math.sqrt(np.square(x).sum())


class Monitor(Callback):
    r"""Watch what RMSprop does to each variable, and say what looks wrong.

    Once the optimizer is built, it compares the weights and $v$ before and after a
    step, every few batches. That gives the change of the weights and, from
    $v' = \rho v + (1 - \rho) g^2$, the norm of the gradient $g$. In between it does
    nothing. At the end of an epoch it puts the learning rate
    in use into the logs, as `current_learning_rate`: for the progress bar, the history,
    `CSVLogger`, `TensorBoard` and all other callbacks, wherever it stands in their
    list. (What Keras' own log as `learning_rate` is the factor, with `"auto"`.)

    Args:
        every: Number of batches between readings; or `None`: 100, or more where they
            would take more than a fiftieth of the time. Defaults to `None`.
        csv_file: A file to write the readings to, one line each; or `None`.
        log_dir: A folder for TensorBoard; or `None`. Needs TensorFlow.
        show: Whether to print what looks wrong, once for each variable. Defaults to
            `True`.

    Attributes:
        readings: A list of `Reading`.
        findings: What looked wrong, in words, in the order in which it was noticed.

    Raises:
        ValueError: `every` is not an integer >= 1, or the optimizer is not this
            package's RMSprop.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_rmsprop import RMSprop
        >>> from keras_rmsprop.callbacks import Monitor
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> model.compile(RMSprop("auto"), "mse")
        >>> monitor = Monitor(every=4)
        >>> x = np.ones((32, 2))
        >>> history = model.fit(x, x, batch_size=4, verbose=0, callbacks=[monitor])
        >>> sorted(history.history)
        ['current_learning_rate', 'loss']
        >>> sorted({reading.variable.split("/")[-1] for reading in monitor.readings})
        ['bias', 'kernel']
    """

    def __init__(
        self,
        every: int | None = None,
        csv_file: str | Path | None = None,
        log_dir: str | Path | None = None,
        show: bool = True,
    ) -> None:
        super().__init__()
        self.every = None if every is None else checks.integer("every", every, 1)
        self.csv_file = None if csv_file is None else Path(csv_file)
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.show = show
        self.readings: list[Reading] = []
        self.findings: list[str] = []
        self._steps = 0
        self._next = 1
        self._seconds = 0.0  # of the last look
        self._steps_since = 0
        self._named: frozenset[tuple[str, str]] = frozenset()
        self._forget()

    def _forget(self) -> None:
        self._before: Any = None
        self._since = 0.0
        self._writer: Any = None

    @property
    def _optimizer(self) -> Any:
        optimizer = self.model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the optimizer, forget a look that was interrupted, and become first."""
        self._before, self._since = None, 0.0
        if not hasattr(self._optimizer, "current_learning_rate"):
            raise ValueError(
                "`Monitor` needs an RMSprop of keras_rmsprop. "
                f"Received: {described(self._optimizer)}"
            )
        caller = list_of(self)
        if caller is not None:  # a new list: it goes through the old one now
            others = [c for c in caller.callbacks if c is not self]
            caller.callbacks = [self, *others]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Look before a step, or at what the last one has done, if it is time."""
        # Not at the end of a batch: for that, Keras would wait for every single step.
        self._look_after()
        self._steps += int(getattr(self.model, "steps_per_execution", 1) or 1)
        if self._steps >= self._next and self._optimizer.built:
            start = time.perf_counter()
            self._next = self._steps + self._interval(start)
            self._before = self._seen()
            self._seconds = time.perf_counter() - start

    def _look_after(self) -> None:
        """Compare with what was seen before the last step, if anything was."""
        if self._before is None:
            return
        start = time.perf_counter()
        before, self._before = self._before, None
        self._compare(before, self._seen())
        self._since, self._steps_since = time.perf_counter(), self._steps
        self._seconds += self._since - start

    def _interval(self, now: float) -> int:
        """Return the number of steps to the next look."""
        if self.every is not None:
            return self.every
        steps = self._steps - self._steps_since
        each = (now - self._since) / steps if self._since and steps else math.inf
        return max(FEWEST_STEPS, math.ceil(self._seconds / MOST_TIME / each))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Compare, if it is time, and put the current learning rate into the logs."""
        self._look_after()
        if logs is not None:
            logs["current_learning_rate"] = self._rate()

    def on_train_end(self, logs: Any = None) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.flush()

    def _rate(self) -> float:
        rate = self._optimizer.current_learning_rate
        return math.nan if rate is None else rate  # there was no step

    def _seen(self) -> Any:
        sync(self.model)
        state = self._optimizer.get_state()
        velocities = [_some(slots.velocity) for slots in state.slots]
        weights = [_some(as_array(v)) for v in self._optimizer._trainable_variables]
        return state.iterations, state.paths, velocities, weights

    def _compare(self, before: Any, after: Any) -> None:
        optimizer, rate = self._optimizer, self._rate()
        iterations, paths, velocities, weights = after
        iterations_before, _, velocities_before, weights_before = before
        sizes = [v.shape for v in optimizer._trainable_variables]
        skipped = optimizer.skipped_steps
        skipped = skipped if isinstance(skipped, int) else int(as_array(skipped))
        added = []
        for i, path in enumerate(paths):
            v, was = velocities[i], velocities_before[i]
            if v is None or not v.size:
                continue
            effective = rate / self._root(v, iterations)
            low, median, high = np.quantile(effective, (0.25, 0.5, 0.75))
            way = _norm(weights[i] - weights_before[i])
            length = _norm(weights_before[i])
            rho, square = float(optimizer.rho), math.nan
            updates = iterations - iterations_before  # one, but for one execution
            if updates > 0:
                stands_for = math.prod(sizes[i]) / v.size
                fading = rho**updates
                square = max((v.sum() - fading * was.sum()) / (1 - fading), 0.0)
                square *= stands_for
                way /= updates
            added.append(
                Reading(
                    self._steps,
                    path,
                    *(float(median), float(low), float(high)),
                    way / (length + 1e-30),
                    math.sqrt(square),
                    rate,
                    skipped,
                )
            )
        self.readings = self.readings + added
        for reading in added:
            self._judge(reading)
        self._write(added)

    def _root(self, v: NDArray[Any], steps: int) -> NDArray[Any]:
        """Return what gradients are divided by, of some elements that had any."""
        optimizer = self._optimizer
        v = v[v > 0] if (v > 0).any() else v
        if optimizer.bias_correction and optimizer.rho:
            v = v / (1 - float(optimizer.rho) ** max(steps, 1))
        epsilon = float(optimizer.epsilon)
        if optimizer.epsilon_inside_sqrt:
            return np.sqrt(v + epsilon)
        return np.sqrt(v) + epsilon

    def _judge(self, reading: Reading) -> None:
        """Say in plain words what looks wrong, once for each variable."""
        path, ratio, norm = (
            reading.variable,
            reading.update_ratio,
            reading.gradient_norm,
        )
        text = ""
        if not math.isfinite(ratio) or norm == math.inf:
            text = f"{path} is no longer finite"
        elif norm == 0:
            text = f"{path} gets no gradient"
        elif not math.isnan(norm) and ratio < STALLED:
            text = f"{path} has stalled: a step changes it by {ratio:.1g} of itself"
        elif ratio > EXPLODING and reading.step > SETTLING * (
            self.every or FEWEST_STEPS
        ):
            text = f"{path} is exploding: a step changes it by {ratio:.1g} of itself"
        kind = text.removeprefix(path).split(":")[0]
        if text and (path, kind) not in self._named:
            self._named |= {(path, kind)}
            self.findings = [*self.findings, f"step {reading.step}: {text}"]
            if self.show:
                print(f"\n{self.findings[-1]}")

    def _write(self, readings: list[Reading]) -> None:
        if self.csv_file is not None:
            is_new = not self.csv_file.exists()
            self.csv_file.parent.mkdir(parents=True, exist_ok=True)
            with self.csv_file.open("a", newline="") as file:
                lines = csv.writer(file)
                if is_new:
                    lines.writerow(Reading._fields)
                lines.writerows(readings)
        if self.log_dir is not None:
            import tensorflow as tf

            if self._writer is None:
                self._writer = tf.summary.create_file_writer(str(self.log_dir))
            with self._writer.as_default(step=self._steps):
                for reading in readings:
                    for name in ("effective_rate", "update_ratio", "gradient_norm"):
                        value = getattr(reading, name)
                        tf.summary.scalar(f"{name}/{reading.variable}", value)
                if readings:
                    tf.summary.scalar("learning_rate", readings[0].learning_rate)

    def plot(self) -> Any:
        """Draw effective rate, update ratio and gradient norm over steps.

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: There is no reading yet.
        """
        if not self.readings:
            raise ValueError(
                "`Monitor` has seen no step yet. Pass it to `fit` first, as "
                "`model.fit(..., callbacks=[monitor])`; a short one needs `every=1`."
            )
        from matplotlib.figure import Figure

        figure = Figure((13, 4), layout="constrained")
        panels = figure.subplots(1, 3)
        titles = {
            "effective_rate": "effective rate",
            "update_ratio": "update ratio",
            "gradient_norm": "gradient norm",
        }
        for panel, (name, title) in zip(panels, titles.items(), strict=True):
            for path in dict.fromkeys(r.variable for r in self.readings):
                of_one = [r for r in self.readings if r.variable == path]
                steps = [r.step for r in of_one]
                panel.plot(steps, [getattr(r, name) for r in of_one], label=path)
                if name == "effective_rate":
                    low = [r.effective_rate_low for r in of_one]
                    high = [r.effective_rate_high for r in of_one]
                    panel.fill_between(steps, low, high, alpha=0.15)
            panel.set(yscale="log", xlabel="step", title=title)
            panel.grid(alpha=0.3)
        handles, labels = panels[0].get_legend_handles_labels()
        if len(labels) <= 12:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure
