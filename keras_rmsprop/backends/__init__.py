"""What runs a step: one module per backend, each with the functions of `plain.py`."""

from types import ModuleType

import keras

match keras.backend.backend():
    case "tensorflow":
        from keras_rmsprop.backends import tensorflow as current
    case "torch":
        from keras_rmsprop.backends import torch as current
    case _:
        from keras_rmsprop.backends import plain as current
