"""Small models, steps with given gradients, and what the built-in makes of them."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from stepping import BACKEND, tensor

ROWS = 12
"""The rows of the tables."""
JIT = BACKEND == "jax"
"""Whether to compile: TensorFlow and PyTorch take long to; JAX is slow without."""

no_fit_of_other_layers = pytest.mark.skipif(
    JIT, reason="on JAX `fit` trains the layers that the optimizer was built with"
)


def compiled(optimizer, inputs, layers, frozen=(), name=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([inputs, *layers], name=name)
    for layer in model.layers:
        layer.trainable = layer.name not in frozen
    model.compile(optimizer, "mse", jit_compile=JIT)
    return model


def dense_model(optimizer, units=(3, 3), names=("body", "head"), frozen=()):
    layers = map(keras.layers.Dense, units)
    named = [
        keras.layers.Dense(layer.units, name=name)
        for layer, name in zip(layers, names, strict=True)
    ]
    return compiled(optimizer, keras.Input((3,)), named, frozen)


def table_model(optimizer):
    layers = [
        keras.layers.Embedding(ROWS, 2, name="table"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(1, name="head"),
    ]
    # State trees go by paths, which begin with this name.
    return compiled(optimizer, keras.Input((4,), dtype="int32"), layers, name="model")


def numbers(model, batch=8):
    """Return inputs and targets for a model with numbers as inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *model.input_shape[1:]))
    y = rng.normal(size=(batch, *model.output_shape[1:]))
    return x.astype("float32"), y.astype("float32")


def gradient(model, variable, step, sparse=True):
    """Return the gradient for a variable of a model in a step.

    That of a table has slices for three of its rows, two for one of them; with
    `sparse=False`, and on other backends than TensorFlow, it is the dense gradient that
    these stand for.
    """
    position = [v is variable for v in model.weights].index(True)
    rng = np.random.default_rng([step, position])
    if not variable.path.endswith("embeddings"):
        return tensor(rng.normal(size=variable.shape), "float32")
    ids = rng.permutation(ROWS)[[0, 1, 2, 0]]
    values = rng.normal(size=(4, *variable.shape[1:])).astype("float32")
    if sparse and BACKEND == "tensorflow":
        shape = tf.constant([ROWS, 2])
        return tf.IndexedSlices(tf.constant(values), tf.constant(ids), shape)
    dense = np.zeros(variable.shape, "float32")
    np.add.at(dense, ids, values)
    return tensor(dense)


def take_steps(model, steps, sparse=True):
    """Update the trainable variables by the gradients for these steps."""
    variables = model.trainable_variables
    for step in steps:
        gradients = [gradient(model, v, step, sparse) for v in variables]
        model.optimizer.apply(gradients, variables)


class OneBuiltInEach:
    """The built-in on each weight of a model alone: no order can mislead it."""

    def __init__(self, model, make=None, **options):
        self.make = make or (lambda: keras.optimizers.RMSprop(**options))
        self.weights = [keras.Variable(v.numpy()) for v in model.weights]
        self.optimizers = {}

    def take_steps(self, model, steps):
        """Take the steps that `take_steps` takes with this model."""
        trainable = [
            any(v is t for t in model.trainable_variables) for v in model.weights
        ]
        for step in steps:
            for position, variable in enumerate(model.weights):
                if trainable[position]:
                    if position not in self.optimizers:
                        self.optimizers[position] = self.make()
                    dense = gradient(model, variable, step, sparse=False)
                    self.optimizers[position].apply([dense], [self.weights[position]])

    def start_anew(self, model, position):
        """Take over the weight at a position, and forget what was known of it."""
        self.weights[position] = keras.Variable(model.weights[position].numpy())
        self.optimizers.pop(position, None)

    def assert_equals(self, model):
        for variable, expected in zip(model.weights, self.weights, strict=True):
            np.testing.assert_allclose(
                variable.numpy(), expected.numpy(), 1e-5, 1e-6, err_msg=variable.path
            )


def save(model, path):
    (model.save if path.suffix == ".keras" else model.save_weights)(path)


@contextlib.contextmanager
def user_warnings():
    """Collect what users are warned of, but for Keras' own of layers."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    for warning in caught:
        message = str(warning.message)
        of_layers = "could not be loaded" in message and "RMSprop" not in message
        if warning.category is UserWarning and not of_layers:
            found.append(message)


def everything(model):
    """Return weights and state as arrays; to be read at the end of a run."""
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_same_bits(model, expected):
    for got, want in zip(everything(model), everything(expected), strict=True):
        np.testing.assert_array_equal(got, want)
