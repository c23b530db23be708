"""The networks of `tuning_tasks.py`; their weights come from Keras' random seed."""

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from tuning_data import LETTERS, LINE, PACKAGES, WINDOW, WORDS, Data, halves


def mlp(*units: int, inputs: int, outputs: int, activation: str = "relu") -> Any:
    """Return a plain network of dense layers."""
    hidden = [layers.Dense(n, activation=activation) for n in units]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def net(*units: int, **options: Any) -> Callable[[], Any]:
    """Return what builds a plain network."""
    return functools.partial(mlp, *units, **options)


def cnn(classes: int = 10, channels: tuple[int, int] = (12, 24)) -> Any:
    """Return two convolutions and a dense layer."""
    first, second = channels
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(first, 3, strides=2, activation="relu"),
            layers.Conv2D(second, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes),
        ]
    )


def resnet() -> Any:
    """Return a residual network with batch normalisation."""
    x = inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(16, 3, strides=2, use_bias=False)(x)
    for channels in (16, 16, 32):
        y = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))
        stride = channels // x.shape[-1]
        keep = dict(padding="same", use_bias=False)
        y = layers.Conv2D(channels, 3, strides=stride, **keep)(y)
        y = layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(y))
        y = layers.Conv2D(channels, 3, **keep)(y)
        if stride > 1:
            x = layers.Conv2D(channels, 1, strides=stride, **keep)(x)
        x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def gru() -> Any:
    """Return a recurrent network that says the next letter."""
    return keras.Sequential(
        [
            keras.Input((LINE,), dtype="int32"),
            layers.Embedding(LETTERS, 32),
            layers.GRU(96, return_sequences=True),
            layers.Dense(LETTERS),
        ]
    )


def attended(x: Any, width: int, heads: int, causal: bool = False) -> Any:
    """Return what a block of a transformer makes of `x`."""
    y = layers.LayerNormalization()(x)
    attention = layers.MultiHeadAttention(heads, width // heads)
    x = x + attention(y, y, use_causal_mask=causal)
    y = layers.LayerNormalization()(x)
    y = layers.Dense(4 * width, activation="gelu")(y)
    return x + layers.Dense(width)(y)


def transformer(width: int = 64, heads: int = 4, blocks: int = 2) -> Any:
    """Return a transformer that says the next letter."""
    inputs = keras.Input((LINE,), dtype="int32")
    places = 0 * inputs + np.arange(LINE, dtype="int32")
    x = layers.Embedding(LETTERS, width)(inputs)
    x = x + layers.Embedding(LINE, width)(places)
    for _ in range(blocks):
        x = attended(x, width, heads, causal=True)
    return keras.Model(inputs, layers.Dense(LETTERS)(layers.LayerNormalization()(x)))


def classifier() -> Any:
    """Return a table of words, the mean of their rows, and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((WINDOW,), dtype="int32"),
            layers.Embedding(WORDS, 32),
            layers.GlobalAveragePooling1D(),
            layers.Dense(32, activation="relu"),
            layers.Dense(len(PACKAGES)),
        ]
    )


def factors() -> Any:
    """Return a product of two tables' rows, with a bias each."""
    pairs = keras.Input((2,), dtype="int32")
    user, thing = pairs[:, 0], pairs[:, 1]
    x = layers.Dot(1)(
        [layers.Embedding(2000, 8)(user), layers.Embedding(2000, 8)(thing)]
    )
    x = x + layers.Embedding(2000, 1)(user) + layers.Embedding(2000, 1)(thing)
    return keras.Model(pairs, layers.Dense(1)(x))


@functools.cache
def learned() -> list[Any]:
    """Return the weights of a CNN that knows the digits 0 to 4."""
    keras.utils.set_random_seed(0)
    model, (low, _) = cnn(5, (16, 32)), halves()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(low.x, low.y, batch_size=64, epochs=3, verbose=0)
    return model.get_weights()


def other_digits() -> Data:
    """Return digits that `learned` never saw, after it has learned."""
    learned()  # now, not in `build`, whose random numbers it would take
    return halves()[1]


def pretrained() -> Any:
    """Return the network of `learned` with a last layer that is new."""
    model = cnn(5, (16, 32))
    old = learned()[:-2]
    model.set_weights([*old, *model.get_weights()[len(old) :]])
    return model


def with_dropout() -> Any:
    """Return dense layers with batch normalisation and dropout."""
    hidden = []
    for _ in range(2):
        hidden += [layers.Dense(128, use_bias=False), layers.BatchNormalization()]
        hidden += [layers.Activation("relu"), layers.Dropout(0.3)]
    return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])


def lstm() -> Any:
    """Return a recurrent network that says the next value."""
    return keras.Sequential(
        [keras.Input((30, 1)), layers.LSTM(32), layers.Dense(1)],
    )


def vit(width: int = 32, heads: int = 2, blocks: int = 2) -> Any:
    """Return a vision transformer of 16 patches of 7 x 7 pixels."""
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(width, 7, strides=7)(inputs)
    x = layers.Reshape((16, width))(x)
    places = keras.ops.zeros_like(x[:, :, 0], "int32") + np.arange(16, dtype="int32")
    x = x + layers.Embedding(16, width)(places)
    for _ in range(blocks):
        x = attended(x, width, heads)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def unet() -> Any:
    """Return a U-Net of three sizes that says of each pixel whose it is."""

    def convolved(x: Any, channels: int) -> Any:
        return layers.Conv2D(channels, 3, padding="same", activation="relu")(x)

    inputs = keras.Input((28, 28, 1))
    first = convolved(inputs, 8)
    second = convolved(layers.MaxPooling2D()(first), 16)
    x = convolved(layers.MaxPooling2D()(second), 32)
    x = convolved(layers.Concatenate()([layers.UpSampling2D()(x), second]), 16)
    x = convolved(layers.Concatenate()([layers.UpSampling2D()(x), first]), 8)
    return keras.Model(inputs, layers.Conv2D(2, 1)(x))


def word_weights() -> Any:
    """Return a weight for each word and class, and their sums: a convex problem."""
    words = keras.Input((30,), dtype="int32")
    x = layers.Embedding(20_000, 2, embeddings_initializer="zeros")(words)
    return keras.Model(words, keras.ops.sum(x, axis=1))


def categories() -> Any:
    """Return a table's rows for eight categories, side by side, and dense layers."""
    return keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            layers.Embedding(8 * 1500, 8),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(2),
        ]
    )
