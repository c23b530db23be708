"""What runs a step: an object for each backend of Keras, of the class in `base.py`."""

import keras

from keras_rmsprop.backends.base import Backend

current: Backend
if keras.backend.backend() == "tensorflow":
    from keras_rmsprop.backends.tensorflow import TensorFlow

    current = TensorFlow()
elif keras.backend.backend() == "torch":
    from keras_rmsprop.backends.torch import Torch

    current = Torch()
else:
    current = Backend()
