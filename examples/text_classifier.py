"""Tell from a docstring which library it is from: bag of words, with an embedding.

The text is real and installed already: the docstrings of NumPy, SciPy, pandas and
scikit-learn. This RMSprop and the built-in train the same network on the same batches.
"""

import importlib
import inspect
import pkgutil
import re
import time
import warnings
from typing import Any, NamedTuple

import quiet  # noqa: F401

# isort: split

import keras
import numpy as np

from keras_rmsprop import RMSprop

LIBRARIES = ("numpy", "scipy", "pandas", "sklearn")
VOCABULARY, WIDTH, WORDS, BATCH_SIZE, EPOCHS = 50_000, 64, 60, 64, 3


class Result(NamedTuple):
    """What one optimizer reached, and how long a step took it."""

    name: str
    accuracy: float
    milliseconds: float


class StepTimes(keras.callbacks.Callback):
    """Takes the time of every step."""

    def on_train_begin(self, logs: Any = None) -> None:
        """Start."""
        self.times: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Remember when the step began."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Note how long it took."""
        self.times.append(1e3 * (time.perf_counter() - self.start))


def docstrings(library: str) -> set[str]:
    """Return the docstrings of a library's public modules, without its own name."""
    found = set()
    package = importlib.import_module(library)
    for module in pkgutil.iter_modules(package.__path__, library + "."):
        if re.search(r"\._|test|conftest|setup|distutils|f2py", module.name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = vars(importlib.import_module(module.name)).values()
            except ImportError:
                continue
            for thing in [*content, *vars(package).values()]:
                members = vars(thing).values() if inspect.isclass(thing) else ()
                for item in (thing, *members):
                    if callable(item) and str(item.__doc__).count(" ") > 20:
                        found.add(str(item.__doc__))
    names = re.compile("|".join([*LIBRARIES, r"\bnp\b", r"\bpd\b", "scikit"]), re.I)
    return {names.sub("", text) for text in found}


def main() -> list[Result]:
    """Train with both optimizers, print and return what they reached."""
    keras.utils.set_random_seed(0)
    texts, labels = [], []
    for label, library in enumerate(LIBRARIES):
        own = sorted(docstrings(library))
        texts += own
        labels += [label] * len(own)
    order = np.random.default_rng(0).permutation(len(texts))
    held_out = len(texts) // 5

    words = keras.layers.TextVectorization(VOCABULARY, output_sequence_length=WORDS)
    shuffled = np.array(texts)[order]
    words.adapt(shuffled[held_out:])
    x, y = np.asarray(words(shuffled)), np.array(labels)[order]
    model = keras.Sequential(
        [
            keras.Input((WORDS,), dtype="int64"),
            keras.layers.Embedding(VOCABULARY, WIDTH),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(len(LIBRARIES), activation="softmax"),
        ]
    )
    start = model.get_weights()
    share = np.bincount(y).max() / len(y)
    print(f"{len(x)} docstrings of {', '.join(LIBRARIES)}; an embedding of ", end="")
    print(
        f"{VOCABULARY:,} x {WIDTH}.\nAlways guessing the most frequent: {share:.1%}.\n"
    )
    print(f"{'optimizer':<26}test accuracy   ms per step")
    results = []
    for kind in (RMSprop, keras.optimizers.RMSprop):
        keras.utils.set_random_seed(0)
        model.set_weights(start)
        model.compile(
            kind(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"]
        )
        steps = StepTimes()
        model.fit(
            x[held_out:],
            y[held_out:],
            batch_size=BATCH_SIZE,
            epochs=EPOCHS,
            verbose=0,
            callbacks=[steps],
        )
        _, accuracy = model.evaluate(x[:held_out], y[:held_out], verbose=0)
        package = "keras_rmsprop" if kind is RMSprop else "keras.optimizers"
        median = float(np.median(steps.times[5:]))
        results.append(Result(f"{package}.{kind.__name__}", accuracy, median))
        print(f"{results[-1].name:<26}{accuracy:13.1%}{median:12.1f}")
    print(f"\nTimes faster: {results[1].milliseconds / results[0].milliseconds:.1f}")
    return results


if __name__ == "__main__":
    from command_line import OptionParser

    OptionParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    main()
