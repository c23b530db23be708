"""What runs a step: one module per backend, each with the functions of `plain.py`."""

from types import ModuleType

import keras

if keras.backend.backend() == "tensorflow":
    from keras_rmsprop.backends import tensorflow

    current: ModuleType = tensorflow
else:
    from keras_rmsprop.backends import plain

    current = plain
