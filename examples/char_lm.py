"""A recurrent network learns to write like Python's documentation, letter by letter.

    python examples/char_lm.py

The text is that of `help()`, which every Python has. RMSprop is centered and has
momentum, as in Graves' paper on generating sequences. How well the network guesses is
measured on text that it has not seen.
"""

import lzma
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import quiet  # noqa: F401

# isort: split

import keras
import numpy as np
from command_line import example_parser
from numpy.typing import NDArray

from keras_rmsprop import RMSprop

LENGTH, BATCH_SIZE, UNITS, LEARNING_RATE = 64, 64, 160, 1.5e-3
SURER = 1.4  # the sample is drawn by the odds to this power: fewer odd letters


class Bits(NamedTuple):
    """How many bits it takes to say an unseen letter, with one help or another."""

    frequencies: float
    xz: float
    network: float


def network(letters: int, steps: int) -> Any:
    """Return the network: from letters to the odds of each next one.

    Args:
        letters: How many different ones there are.
        steps: How many it is trained for; the learning rate falls to nothing.
    """
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(letters, 32),
            keras.layers.GRU(UNITS, return_sequences=True),
            keras.layers.Dense(letters, activation="softmax"),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    graves = RMSprop(rate, rho=0.95, momentum=0.9, centered=True)
    model.compile(graves, "sparse_categorical_crossentropy")
    return model


def batches(ids: NDArray[Any], rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """Yield pieces of the text from random places, and the same one letter later."""
    while True:
        starts = rng.integers(len(ids) - LENGTH, size=(BATCH_SIZE, 1))
        pieces = ids[starts + np.arange(LENGTH + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


def write(model: Any, ids: NDArray[Any], count: int, rng: np.random.Generator) -> Any:
    """Return the letters that the network writes after others.

    Args:
        model: The network.
        ids: What comes before, at least `LENGTH` letters.
        count: How many to write.
        rng: Draws each letter by the odds.
    """
    for _ in range(count):
        odds = model.predict_on_batch(ids[None, -LENGTH:])[0, -1].astype("float64")
        odds **= SURER
        ids = np.append(ids, rng.choice(len(odds), p=odds / odds.sum()))
    return ids[-count:]


def main(arguments: Sequence[str] | None = None) -> Bits:
    """Train, print a sample, and return how well the network guesses."""
    parser = example_parser(
        "char_lm",
        "A recurrent network learns to write like Python's documentation.",
        steps=800,
        short=3,
        unit=f"batches of {BATCH_SIZE} pieces of {LENGTH} letters",
        gives="2.2 bits per character, after two minutes",
    )
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    lines = "\n\n".join(topics.values()).splitlines()
    text = "\n".join(line for line in lines if not {"|", "+"} & {*line})  # no tables
    letters, ids = np.unique(list(text), return_inverse=True)
    train, test = np.split(ids, [len(ids) * 9 // 10])

    model = network(len(letters), options.steps)
    print(f"{len(train):,} letters of Python's help to learn from:")
    model.fit(batches(train, rng), steps_per_epoch=options.steps, shuffle=False)

    rows = len(test) // (LENGTH + 1)
    pieces = test[: rows * (LENGTH + 1)].reshape(rows, -1)
    loss = model.evaluate(pieces[:, :-1], pieces[:, 1:], verbose=0)
    share = np.bincount(train, minlength=len(letters)) + 1
    packed = [len(lzma.compress(t.encode())) for t in (text, text[: len(train)])]
    bits = Bits(
        frequencies=-np.log2(share / share.sum())[test].mean(),
        xz=8 * (packed[0] - packed[1]) / len(test),
        network=loss / np.log(2),
    )
    print(f"\nBits per character, on {len(test):,} held-out ones:\n")
    print(f"  by how frequent each letter is  {bits.frequencies:.2f}")
    print(f"  by xz, after the same text      {bits.xz:.2f}")
    print(f"  by this network                 {bits.network:.2f}")

    sample = "".join(letters[write(model, test[-LENGTH:], 400, rng)])
    print(f"\nA sample:\n\n{sample}\n")
    (options.output / "sample.txt").write_text(sample + "\n")
    print(f"Written to {options.output}: sample.txt")
    return bits


if __name__ == "__main__":
    main()
