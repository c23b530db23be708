"""What a gradient may be."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


def tensor(gradient: Any, variable: Any) -> Any:
    """Return a gradient as a tensor or as slices of tensors, None as it is."""
    if isinstance(gradient, tf.Tensor) or gradient is None:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        values = tensor(gradient.values, variable)
        others = (gradient.indices, gradient.dense_shape)
        return tf.IndexedSlices(
            values, *(None if x is None else tf.convert_to_tensor(x) for x in others)
        )
    if isinstance(gradient, np.ndarray) and np.iscomplexobj(gradient):
        return tf.constant(gradient)  # to be refused; a cast would take the real part
    return tf.convert_to_tensor(keras.ops.convert_to_tensor(gradient, variable.dtype))


def check(gradient: Any, variable: Any) -> None:
    """Fail if a gradient does not fit its variable by its shape or dtype."""
    if gradient is None:
        return
    if not isinstance(variable, keras.Variable | tf.Variable):
        raise TypeError(
            f"Gradients must come with variables. Received: {type(variable).__name__}"
        )
    name, shape = variable.name, tuple(variable.shape)
    if not gradient.dtype.is_floating:
        raise TypeError(
            "A gradient must be of floating point numbers. "
            f"Received: {gradient.dtype.name} for variable {name!r}"
        )
    if not gradient.shape.is_compatible_with(shape):
        raise ValueError(
            "A gradient must have the shape of its variable. Received: "
            f"shape {tuple(gradient.shape)} for variable {name!r} of shape {shape}"
        )
    if not isinstance(gradient, tf.IndexedSlices):
        return
    values, ids = gradient.values, gradient.indices
    if (
        ids.dtype not in (tf.int32, tf.int64)
        or not ids.shape.is_compatible_with([None])
        or not values.shape.is_compatible_with([*ids.shape[:1], *shape[1:]])
        or not shape
    ):
        raise ValueError(
            "A sparse gradient must have int32 or int64 indices, and for each a row as "
            f"wide as the variable's. Received: {ids.dtype.name} indices of shape "
            f"{tuple(ids.shape)} and values of shape {tuple(values.shape)} for "
            f"variable {name!r} of shape {shape}"
        )
