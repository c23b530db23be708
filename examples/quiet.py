"""Imported before Keras, it keeps TensorFlow's first remarks off the terminal."""

import os

from command_line import quiet_start

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with quiet_start():
    import keras

    keras.ops.zeros(())  # looks for devices
