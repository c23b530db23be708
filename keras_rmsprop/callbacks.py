"""Callbacks for `fit`. They use what every Keras optimizer offers, nothing private."""

import weakref
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_rmsprop.batch_norm import Averaged
from keras_rmsprop.batch_norm import recompute_batch_norm as recompute_batch_norm
from keras_rmsprop.callback_base import Callback, described, inner, list_of
from keras_rmsprop.ema_share import begin_of
from keras_rmsprop.monitoring import Monitor as Monitor
from keras_rmsprop.range_test import LearningRateFinder as LearningRateFinder
from keras_rmsprop.state import as_array, copied, sync


class _Held(NamedTuple):
    """The weights to go on from, while a model has their averages instead."""

    variables: list[Any]
    raw: list[Any]
    averages: list[Any]

    def put_back(self) -> None:
        for variable, value in zip(self.variables, self.raw, strict=True):
            variable.assign(value)

    def is_in_place(self) -> bool:
        """Whether the model still has exactly these averages."""
        pairs = zip(self.variables, self.averages, strict=True)
        return all(np.array_equal(as_array(v), as_array(a)) for v, a in pairs)


_held: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()
"""By model, not by callback: after an interrupted `fit` there may be another one."""


class _LeavesAfterBatch(keras.callbacks.Callback):
    """Stands last in the list, where the weights are put back after each batch."""

    def __init__(self, average: "AverageForEvaluation") -> None:
        super().__init__()
        self._average = average

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Put the weights back."""
        self._average.leave()


class AverageForEvaluation(Callback):
    """With `use_ema`, evaluate and save the averages, but train the weights.

    Keras puts the averages of the weights into the model when `fit` ends. Until then it
    validates and saves the current weights. With this callback, validation,
    `ModelCheckpoint`, `EarlyStopping(restore_best_weights=True)` and all else that
    reads the model at the end of an epoch see the averages. Then training continues
    from the weights, bit-for-bit: they are copied and put back.

    The moving statistics of `BatchNormalization` would not fit averaged weights. So the
    callback averages them, too, at the same rate. When `fit` ends the model has both.

    Its position in the list of callbacks does not matter: it runs before all others,
    except `BackupAndRestore` and `Monitor`, which need the weights themselves.

    It works with any Keras optimizer that has `use_ema=True`, also inside a
    `LossScaleOptimizer`, on every backend and under `tf.distribute`. It also works
    with `evaluate(..., callbacks=[AverageForEvaluation()])` and `predict`.

    What to know:

    - While the averages are in the model, there are one or two more copies of the
      weights in memory.
    - If a callback saves every few batches (`save_freq` is a number), the weights are
      copied and the averages put in after every batch.
    - If `fit` is interrupted while the averages are in the model, they stay there until
      the next `fit` with this callback, or until `put_back`.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_rmsprop import RMSprop
        >>> from keras_rmsprop.callbacks import AverageForEvaluation
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(RMSprop(use_ema=True, ema_warmup=True), "mse")
        >>> x, y = np.ones((8, 2)), np.ones((8, 1))
        >>> callbacks = [
        ...     keras.callbacks.EarlyStopping(restore_best_weights=True),
        ...     AverageForEvaluation(),
        ... ]
        >>> history = model.fit(
        ...     x, y, validation_data=(x, y), callbacks=callbacks, epochs=2, verbose=0
        ... )
        >>> sorted(history.history)
        ['loss', 'val_loss']
    """

    async_safe = True
    """After a batch it does nothing, unless another callback is not safe, either."""
    averages_statistics = True
    """So `RMSprop("auto")` need not compute them when `fit` ends."""

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self._after_batches = False
        self._depth = 0
        self._holds = False
        self._in_epoch_end = False
        self._statistics: Averaged | None = None
        self._done = self._counted = 0

    def put_back(self) -> None:
        """Give the model its own weights again, if it has the averages.

        This is needed only after a `fit` that was interrupted. Weights that were
        changed since then stay as they are.
        """
        self._forget()
        if self.model is None:
            raise ValueError("`put_back` needs a model: it is that of the last `fit`.")
        held = _held.pop(self.model, None)
        if held is not None and held.is_in_place():
            held.put_back()

    def on_train_begin(self, logs: Any = None) -> None:
        """Put back what an interrupted run left, and become the first callback."""
        self._check()
        self.put_back()
        caller = list_of(self)
        if caller is None:
            return
        others = [c for c in caller.callbacks if c is not self]
        early = [c for c in others if _needs_raw_weights(c)]
        late = [c for c in others if not _needs_raw_weights(c)]
        saves = any(getattr(c, "save_freq", "epoch") != "epoch" for c in late)
        self._after_batches = saves
        # A new list: the caller goes through the old one at this moment.
        last = [_LeavesAfterBatch(self)] if saves else []
        caller.callbacks = [*early, self, *late, *last]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Let the averages of statistics follow what the last batches left."""
        self._count(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Put the averages in, if a callback may save them."""
        self._done = batch + 1
        if self._after_batches:
            self._enter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Put the averages in for other callbacks; after the last epoch, for good."""
        if not self._in_epoch_end:
            self._in_epoch_end = True
            self._enter()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Put the weights back."""
        if self._statistics is None:  # after `BackupAndRestore` has restored, if it has
            [optimizer, *_] = _averaging(self.model.optimizer)
            updates = int(as_array(optimizer.iterations)) if optimizer.built else 0
            self._statistics = Averaged(self.model, optimizer, updates)
        self._done = self._counted = 0
        if self._in_epoch_end:
            self._in_epoch_end = False
            self.leave()

    def on_train_end(self, logs: Any = None) -> None:
        """Let go of the weights: the model has the averages for good."""
        self._forget()
        _held.pop(self.model, None)

    def on_test_begin(self, logs: Any = None) -> None:
        """Put the averages in."""
        self._check()
        self._enter()

    def on_test_end(self, logs: Any = None) -> None:
        """Put the weights back."""
        self.leave()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the averages in."""
        self._check()
        self._enter()

    def on_predict_end(self, logs: Any = None) -> None:
        """Put the weights back."""
        self.leave()

    def _check(self) -> None:
        optimizer = self.model.optimizer
        if not _averaging(optimizer):
            raise ValueError(
                "`AverageForEvaluation` needs an optimizer with `use_ema=True`. "
                f"Received: {described(optimizer)} of the model {self.model.name!r}"
            )

    def _enter(self) -> None:
        """Put the averages in, if they are not there yet."""
        self._depth += 1
        model = self.model
        if self._holds or not _has_averages(model.optimizer):
            return
        if model in _held and _held[model].is_in_place():
            return  # another callback has put them in
        sync(model)
        # Training ends this way, so the warm-up begins again: that is put back, too.
        begins = [begin_of(one) for one in _averaging(model.optimizer)]
        weights, statistics = model.trainable_variables, self._statistics
        variables = [*weights, *(x for x in begins if x is not None)]
        raw = [copied(v) for v in variables]
        model.optimizer.finalize_variable_values(weights)
        averages = [copied(v) for v in variables]
        if statistics is not None:
            self._count(self._done)
            variables = [*variables, *statistics.variables]
            raw += [copied(v) for v in statistics.variables]
            values = statistics.values()
            averages += values
            for variable, value in zip(statistics.variables, values, strict=True):
                variable.assign(copied(value))
        if keras.backend.backend() == "jax":
            # A weight may share its average's buffer, and would give that away.
            for variable, value in zip(variables, averages, strict=True):
                variable.assign(copied(value))
        _held[model] = _Held(variables, raw, averages)
        self._holds = True

    def _count(self, batches: int) -> None:
        """Let the averages of statistics follow the batches of an epoch so far."""
        if self._statistics is not None:
            self._statistics.follow(batches - self._counted)
            self._counted = batches

    def leave(self) -> None:
        """Put the weights back, if nothing else needs the averages in the model."""
        self._depth -= 1
        if self._depth == 0 and self._holds:
            self._holds = False
            _held.pop(self.model).put_back()


def _has_averages(optimizer: Any) -> bool:
    """Whether there was a step: until then there are no averages to put in."""
    return all(o.built and as_array(o.iterations) > 0 for o in inner(optimizer))


def _averaging(optimizer: Any) -> list[Any]:
    """Return the optimizers, of a wrapper or the one itself, that average weights."""
    return [one for one in inner(optimizer) if getattr(one, "use_ema", False)]


def _needs_raw_weights(callback: Any) -> bool:
    return isinstance(callback, keras.callbacks.BackupAndRestore | Monitor)
