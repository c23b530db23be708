"""Mistakes that type checkers find: one in each line that says so."""

from keras_rmsprop import AutoLearningRate, RMSprop, dialects, transfer
from keras_rmsprop.callbacks import LearningRateFinder, Monitor

RMSprop(momentum="0.9")  # mistake
RMSprop(slot_dtype="int8")  # mistake
RMSprop(sparse_update="fast")  # mistake
RMSprop(0.001, 0.9, 0.0, 1e-7, False, clipnorm="1")  # mistake
AutoLearningRate(grow=1.02)  # mistake
dialects.torch(alhpa=[0.99], eps="tiny")  # mistake
Monitor(every=0.5)  # mistake
LearningRateFinder(1e-6, 1.0, "many")  # mistake
transfer.from_keras("model.keras", None)  # mistake
text: int = RMSprop().explain()  # mistake
