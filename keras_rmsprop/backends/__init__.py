"""What runs a step: one module per backend, each with the functions of `plain.py`."""

from types import ModuleType

import keras

current: ModuleType
if keras.backend.backend() == "tensorflow":
    from keras_rmsprop.backends import tensorflow

    current = tensorflow
elif keras.backend.backend() == "torch":
    from keras_rmsprop.backends import torch

    current = torch
else:
    from keras_rmsprop.backends import plain

    current = plain
