"""Statistics of `BatchNormalization` for averaged weights.

The moving mean and variance are of the activations that the weights in training made.
Averaged weights make others. Statistics averaged at the same rate are near enough.
"""

import contextlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rmsprop import checks
from keras_rmsprop.ema_share import Momentum
from keras_rmsprop.rule import wide
from keras_rmsprop.state import as_array, copied, sync

BATCH = 32
"""The examples of a batch of an array, as in Keras."""
LEAST_BATCHES, MOST_BATCHES, SHARE = 10, 100, 10
"""At the end of `fit` statistics are of one batch for so many steps, which costs a few
percent of the time. Fewer than the least would be worse than the moving ones."""
STATISTICS = "moving_mean", "moving_variance"


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a model that have moving statistics."""
    layers = model._flatten_layers(include_self=False)
    return [x for x in layers if all(hasattr(x, name) for name in STATISTICS)]


def statistics_of(model: Any) -> list[Any]:
    """Return the variables that keep them."""
    return [getattr(x, name) for x in layers_of(model) for name in STATISTICS]


class Averaged:
    """Averages of a model's statistics, which follow at the rate of the weights'.

    Args:
        model: The model.
        optimizer: One with `use_ema`, which trains it.
        updates: How many updates it has taken.
    """

    def __init__(self, model: Any, optimizer: Any, updates: int) -> None:
        self.variables = statistics_of(model)
        self._averages = [ops.cast(copied(v), wide(v.dtype)) for v in self.variables]
        self._model, self._optimizer = model, optimizer
        self._calls = updates * _calls_an_update(optimizer)
        momentum = Momentum.of(optimizer)
        # When `fit` ends, it is later, before the last updates are followed here.
        begin = int(ops.convert_to_numpy(momentum.begin))
        self._momentum = momentum._replace(begin=begin)

    def follow(self, calls: int) -> None:
        """Let avg <- m avg + (1 - m) s, after so many more calls of the optimizer."""
        if not (self.variables and calls):
            return
        every = np.arange(self._calls, self._calls + calls)
        updates = every // _calls_an_update(self._optimizer)
        kept = float(np.prod(as_array(self._momentum.at(updates, "float32"))))
        self._calls += calls
        sync(self._model)
        self._averages = [  # so that a frozen layer's stay as they are, to the last bit
            copied(average + (1 - kept) * (ops.cast(variable, average.dtype) - average))
            for average, variable in zip(self._averages, self.variables, strict=True)
        ]

    def values(self) -> list[Any]:
        """Return the averages, in the dtypes of the statistics."""
        both = zip(self._averages, self.variables, strict=True)
        return [ops.cast(average, variable.dtype) for average, variable in both]


def _calls_an_update(optimizer: Any) -> int:
    return int(optimizer.gradient_accumulation_steps or 1)


def recompute_batch_norm(model: Any, data: Any, batches: int | None = 100) -> None:
    r"""Compute the statistics of `BatchNormalization` again, for the weights of now.

    Where weights were replaced, as by their average, the moving mean $\mu$ and variance
    $\sigma^2$ are still those of the old ones. They become the means, over batches
    $i = 1, \dots, n$, of the mean and variance that the layer finds in each:

    $$\mu = \frac 1 n \sum_i \mu_i, \qquad \sigma^2 = \frac 1 n \sum_i \sigma_i^2$$

    The model runs as in training; its weights, and what else it has, stay as they are.
    Layers that are frozen keep their statistics.

    Args:
        model: The model.
        data: Batches as for `fit`: a `tf.data.Dataset`, a `DataLoader` or anything else
            that yields inputs, or tuples of which they are the first. Or an array, or a
            dictionary of arrays.
        batches: How many to use at most; `None`: all. Defaults to `100`.

    Raises:
        ValueError: There is no batch, or `batches` is no integer >= 1.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_rmsprop.callbacks import recompute_batch_norm
        >>> layer = keras.layers.BatchNormalization()
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> recompute_batch_norm(model, np.array([[1.0], [3.0]]))
        >>> float(layer.moving_mean[0]), float(layer.moving_variance[0])
        (2.0, 1.0)
    """
    most = None if batches is None else checks.integer("batches", batches, 1)
    layers = layers_of(model)
    if not layers:
        return
    mine = {id(variable) for variable in statistics_of(model)}
    others = [v for v in model.non_trainable_variables if id(v) not in mine]
    before = [copied(v) for v in others]
    count = 0
    try:
        with _momenta(layers), _without_gradients():
            for batch in itertools.islice(_batches(data), most):
                for layer in layers:
                    layer.momentum = count / (count + 1)
                x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
                model(x, training=True)
                count += 1
    finally:
        for variable, value in zip(others, before, strict=True):
            variable.assign(value)
    if count == 0:
        raise ValueError(f"`data` must have at least one batch. Received: {data!r}")


def recompute_after(fit: Mapping[str, Any], steps: int) -> str:
    """Compute the statistics again where `fit` has given a model its averaged weights.

    This is done only where it is known how: with Keras' own training step, which calls
    the model with the inputs alone, on one replica, and with data that can be read
    again; else the message says so. `AverageForEvaluation` has averages of the
    statistics instead.

    Args:
        fit: The local variables of Keras' `fit`, when it ends.
        steps: How many steps it took.

    Returns:
        What a user should know, or nothing.
    """
    model = fit["self"]
    if (
        steps < LEAST_BATCHES * SHARE
        or not any(layer.trainable for layer in layers_of(model))
        or any(hasattr(c, "averages_statistics") for c in fit["callbacks"].callbacks)
        or not fit.get("training_finished", True)  # on JAX it ends after errors, too
    ):
        return ""
    statistics = statistics_of(model)
    before = [copied(v) for v in statistics]
    try:
        why, data = _why_not(model), None
        if not why:
            data = _read_again(fit["x"], fit["batch_size"] or BATCH)
            why = "the data can be read only once" if data is None else ""
        if data is not None:
            recompute_batch_norm(model, data, min(MOST_BATCHES, steps // SHARE))
    except Exception as error:  # of the data or the model: what was learned is kept
        for variable, value in zip(statistics, before, strict=True):
            variable.assign(value)
        why = str(error)
    if not why:
        return ""
    return (
        "The weights are averages now, and the statistics of `BatchNormalization` "
        f"could not be computed for them: {why}. Use `AverageForEvaluation`"
    )


def _why_not(model: Any) -> str:
    """Return why it is not known how a model computes its statistics, or nothing."""
    strategy = getattr(model, "distribute_strategy", None)
    if type(model).train_step is not keras.Model.train_step:
        return "the model has a `train_step` of its own"
    if getattr(strategy, "num_replicas_in_sync", 1) > 1:
        return "there are several replicas"
    if keras.distribution.distribution() is not None:
        return "there is a `keras.distribution`"
    return ""


def _read_again(data: Any, size: int) -> Iterable[Any] | None:
    """Return batches of what `fit` was given; None if that can be read only once.

    Of arrays it draws no random number, so that what follows is as it was without it.
    """
    arrays = keras.tree.flatten(data)
    if all(hasattr(x, "__array__") for x in arrays):
        count = -(-len(arrays[0]) // size)
        data = keras.tree.map_structure(ops.convert_to_numpy, data)
        # Of examples far apart: neighbors may be of one class.
        parts = (operator.itemgetter(slice(i, None, count)) for i in range(count))
        return ((keras.tree.map_structure(part, data),) for part in parts)
    if isinstance(data, keras.utils.PyDataset):
        return map(data.__getitem__, range(data.num_batches or MOST_BATCHES))
    return None if isinstance(data, Iterator) else data


def _batches(data: Any) -> Iterable[Any]:
    if not (isinstance(data, dict) or hasattr(data, "shape")):
        return iter(data)
    size = keras.tree.flatten(data)[0].shape[0]
    return (
        keras.tree.map_structure(lambda x: x[i : i + BATCH], data)  # noqa: B023
        for i in range(0, size, BATCH)
    )


@contextlib.contextmanager
def _momenta(layers: Sequence[Any]) -> Iterator[None]:
    """Put back what the layers have for momentum, which may be changed meanwhile."""
    before = [layer.momentum for layer in layers]
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def _without_gradients() -> Any:
    """Return a context in which PyTorch keeps nothing for gradients."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
