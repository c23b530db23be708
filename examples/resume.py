"""Kill this program at any moment and start it again: it ends as if left alone.

    python examples/resume.py          # a loop of one's own
    python examples/resume.py --fit    # the same in `fit`

`train` is what to copy. It relies on three things: all that training changes is in the
checkpoint, `tf.train.CheckpointManager` gives up a checkpoint only when the next one is
whole, and which batch comes next follows from the number of saves.
"""

import argparse
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import quiet  # noqa: F401

# isort: split

import keras
import numpy as np
import tensorflow as tf

from keras_rmsprop import RMSprop

VOCABULARY, WORDS, BATCH_SIZE = 1000, 20, 32


def train(
    model: Any,
    batches: Callable[[int], Iterator[tuple[Any, Any]]],
    directory: Path,
    *,
    saves: int,
    steps: int,
    fit: bool = False,
) -> None:
    """Train a model, from its last checkpoint on if there is one.

    Args:
        model: The model, compiled.
        batches: From the number of a batch to it and those after it, without end.
        directory: Where the checkpoint is.
        saves: How often to save; training ends with the last.
        steps: The steps from one save to the next.
        fit: Whether to train with `fit`; its epochs then go from save to save.
    """
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.build(variables)
    # By itself a checkpoint would not hold the seeds of layers like Dropout.
    others = [v.value for v in model.non_trainable_variables]
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, others=others)
    manager = tf.train.CheckpointManager(checkpoint, str(directory), max_to_keep=1)
    manager.restore_or_initialize()
    done = int(checkpoint.save_counter)
    print(f"{'Resumed' if done else 'Started'} after {done} of {saves} saves.")

    rest = batches(done * steps)
    if fit:
        save = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: manager.save())
        plan = {"initial_epoch": done, "epochs": saves, "steps_per_epoch": steps}
        model.fit(rest, **plan, callbacks=[save], shuffle=False)
        return
    progress = keras.utils.Progbar(saves, unit_name="save")
    for n in range(done, saves):
        for x, y in itertools.islice(rest, steps):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(y=y, y_pred=model(x, training=True))
            optimizer.apply(tape.gradient(loss, variables), variables)
        manager.save()
        progress.update(n + 1, [("loss", float(loss))])


def shuffled(first: int) -> Iterator[tuple[Any, Any]]:
    """Yield the batches from this number on; each epoch has an order of its own."""
    rng = np.random.default_rng(0)
    x = rng.integers(VOCABULARY, size=(1600, WORDS))
    y = (rng.normal(size=VOCABULARY)[x].sum(axis=1, keepdims=True) > 0).astype("int32")
    for n in itertools.count(first):
        epoch, place = divmod(n, len(x) // BATCH_SIZE)
        order = np.random.default_rng(epoch).permutation(len(x))
        rows = order[place * BATCH_SIZE :][:BATCH_SIZE]
        yield x[rows], y[rows]


def main(arguments: Sequence[str] | None = None) -> Any:
    """Train a network to add up what words count, and return it."""
    parser = argparse.ArgumentParser(description="Train, and resume where it stopped.")
    parser.add_argument("--fit", action="store_true", help="train with `fit`")
    parser.add_argument("--saves", type=int, default=40, help="how often it saves")
    parser.add_argument("--steps", type=int, default=50, help="steps between saves")
    parser.add_argument("--directory", type=Path, default=Path("runs/resume"))
    options = vars(parser.parse_args(arguments))

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((WORDS,), dtype="int32"),
            keras.layers.Embedding(VOCABULARY, 16),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(RMSprop(0.01), "binary_crossentropy", metrics=["accuracy"])
    train(model, shuffled, **options)
    weights = b"".join(w.tobytes() for w in model.get_weights())
    print(f"Weights: {hashlib.sha256(weights).hexdigest()[:16]}, however often killed.")
    return model


if __name__ == "__main__":
    main()
