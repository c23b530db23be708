"""RMSprop for Keras: a drop-in optimizer that is right, fast and compiled with XLA."""

from keras_rmsprop.rmsprop import RMSprop, rmsprop_optimizer

__all__ = ["RMSprop", "rmsprop_optimizer"]
__version__ = "0.1.0"
