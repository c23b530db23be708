"""What `tuning.py` trains: networks of many kinds, with data that is there offline.

"auto" was made, and its choices taken, with the networks of `TASKS`. Those of
`HELD_OUT` were in no choice; some of their kinds were, with other data and networks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tuning_data as data
import tuning_nets as nets
from tuning_data import Data

MSE, CROSS_ENTROPY = "mse", "sparse_categorical_crossentropy"


class Task(NamedTuple):
    """A network and what it shall learn.

    Attributes:
        title: What it is, in a few words.
        data: Returns the data, the same each time.
        build: Returns the network; its weights come from Keras' random seed.
        loss: `MSE`, or `CROSS_ENTROPY` of logits.
        metric: What counts, of the test: `"accuracy"` or `"loss"`.
        batch: Examples a step.
        steps: Steps in all.
        factor: What the result is multiplied with for the table.
    """

    title: str
    data: Callable[[], Data]
    build: Callable[[], Any]
    loss: str
    metric: str
    batch: int
    steps: int
    factor: float = 1


MNIST = nets.net(128, 128, inputs=784, outputs=10)
MLP = nets.net(64, 64, inputs=10, outputs=1)
DEEP = nets.net(*14 * [64], inputs=784, outputs=10, activation="tanh")
CODER = nets.net(128, 32, 128, inputs=784, outputs=784)
SMOOTH = nets.net(32, 32, inputs=2, outputs=1, activation="tanh")


def classes(title: str, x: Any, net: Any, batch: int, steps: int) -> Task:
    """Return a task whose accuracy counts, in percent."""
    return Task(title, x, net, CROSS_ENTROPY, "accuracy", batch, steps, 100)


def likely(title: str, x: Any, net: Any, batch: int, steps: int) -> Task:
    """Return a task of classes whose loss counts."""
    return Task(title, x, net, CROSS_ENTROPY, "loss", batch, steps)


def fit(title: str, x: Any, net: Any, batch: int, steps: int, factor: int = 1) -> Task:
    """Return a task whose squared error counts."""
    return Task(title, x, net, MSE, "loss", batch, steps, factor)


TASKS = {
    "mnist": classes("MNIST", data.digits, MNIST, 128, 1407),
    "regression": fit("regression", data.hundreds, MLP, 32, 3000),
    "cnn": classes("CNN", data.pictures, nets.cnn, 64, 936),
    "gru": likely("character GRU", data.letters, nets.gru, 32, 800),
    "text": classes("text, table", data.sources, nets.classifier, 64, 1200),
    "autoencoder": fit("autoencoder", data.same_digits, CODER, 64, 1500, 100),
    "transformer": likely("transformer", data.letters, nets.transformer, 32, 800),
    "deep": classes("14 tanh layers", data.some_digits, DEEP, 64, 1500),
    "ratings": fit("ratings, two tables", data.ratings, nets.factors, 256, 1500),
    "words": likely("30 of 20 000 words", data.bags, nets.word_weights, 64, 1200),
}
HELD_OUT = {
    "resnet": classes("ResNet", data.fewer_pictures, nets.resnet, 32, 300),
    "finetune": classes("fine-tuning", nets.other_digits, nets.pretrained, 32, 600),
    "lstm": fit("LSTM forecast", data.waves, nets.lstm, 32, 800, 100),
    "vit": classes("small ViT", data.fewer_pictures, nets.vit, 64, 500),
    "noisy": classes(
        "wrong labels, BN, dropout", data.mislabelled, nets.with_dropout, 64, 1500
    ),
    "full": fit("full batch", data.surface, SMOOTH, 512, 1500, 1000),
    "unet": likely("U-Net", data.cluttered, nets.unet, 16, 300),
    "heavy": fit("heavy-tailed noise", data.heavy_tails, MLP, 32, 2000),
    "clicks": likely("clicks, eight fields", data.clicks, nets.categories, 128, 1200),
}
EVERY = TASKS | HELD_OUT
