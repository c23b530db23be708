"""RMSprop for Keras: a drop-in replacement with an automatic learning rate."""

from keras_rmsprop import callbacks, dialects, transfer
from keras_rmsprop.auto_rate import AutoLearningRate
from keras_rmsprop.dialects import textbook as rmsprop_optimizer
from keras_rmsprop.optimizer import RMSprop

__all__ = [
    "AutoLearningRate",
    "RMSprop",
    "callbacks",
    "dialects",
    "rmsprop_optimizer",
    "transfer",
]
__version__ = "1.0.0"
