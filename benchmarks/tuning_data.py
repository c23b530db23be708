"""What the networks of `tuning_tasks.py` learn from: data that is there offline.

Digits are MNIST's (or the sample's 5000), text is the source of Python's own library,
the rest is drawn from a seeded generator. Nothing is downloaded.
"""

import functools
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import mnist_data

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LETTERS, LINE = 96, 48  # printable ASCII and the line feed; letters a sequence
WORDS, WINDOW = 8000, 32  # words in the table; words a piece of text
PACKAGES = (
    *("asyncio", "concurrent", "ctypes", "email", "html", "http", "importlib", "json"),
    *("logging", "multiprocessing", "sqlite3", "unittest", "xml"),
)


class Data(NamedTuple):
    """Examples to train on and others to test on."""

    x: NDArray[Any]
    y: NDArray[Any]
    test_x: NDArray[Any]
    test_y: NDArray[Any]


@functools.cache
def all_digits() -> mnist_data.Digits:
    """Return MNIST, read once."""
    return mnist_data.load("auto", seed=0)


def digits(train: int = 60_000) -> Data:
    """Return digits as rows of pixels: 60 000, or 4000 where MNIST cannot be had."""
    all_ = all_digits()
    x, y = all_.train_images[:train], all_.train_labels[:train]
    return Data(x, y, all_.test_images, all_.test_labels)


def some_digits() -> Data:
    """Return 20 000 digits."""
    return digits(20_000)


def pictures(test: int = 10_000) -> Data:
    """Return 20 000 digits as pictures of one channel."""
    x, y, test_x, test_y = digits(20_000)
    x, test_x = (images.reshape(-1, 28, 28, 1) for images in (x, test_x[:test]))
    return Data(x, y, test_x, test_y[:test])


def fewer_pictures() -> Data:
    """Return 20 000 digits as pictures, and 4000 for the test."""
    return pictures(4000)


def same_digits() -> Data:
    """Return 20 000 digits, each its own target."""
    x, _, test_x, _ = digits(20_000)
    return Data(x, x, test_x, test_x)


def hundreds() -> Data:
    """Return ten numbers each and a smooth function of them, in the hundreds."""
    random = np.random.default_rng(0)
    x = random.standard_normal((12_000, 10)).astype("float32")
    inner = x @ random.standard_normal((10, 6)) / 2
    y = 300 + 150 * np.sin(inner[:, :3]).sum(1) + 60 * inner[:, 3] * inner[:, 4]
    y = (y + 30 * inner[:, 5] + 5 * random.standard_normal(len(x)))[:, None]
    y = y.astype("float32")
    return Data(x[:8000], y[:8000], x[8000:], y[8000:])


@functools.cache
def letters() -> Data:
    """Return lines of Python's own library as numbers, and each line a letter on."""
    files = sorted(LIBRARY.glob("[a-h]*.py"))
    text = "".join(file.read_text("utf-8", "ignore") for file in files)
    codes = np.frombuffer(text.encode("ascii", "ignore"), "uint8").astype("int32")
    codes = np.where(codes == ord("\n"), LETTERS - 1, codes - ord(" "))
    codes = codes[(codes >= 0) & (codes < LETTERS)]
    lines = codes[: len(codes) // (LINE + 1) * (LINE + 1)].reshape(-1, LINE + 1)
    lines = np.random.default_rng(0).permutation(lines)
    x, y = lines[:, :-1], lines[:, 1:]
    return Data(x[1000:], y[1000:], x[:1000], y[:1000])


@functools.cache
def sources() -> Data:
    """Return pieces of Python's own packages as word numbers, and which package."""
    pieces, labels = [], []
    for label, package in enumerate(PACKAGES):
        for file in sorted((LIBRARY / package).rglob("*.py")):
            if "test" in file.parts or "tests" in file.parts:
                continue
            words = re.findall(r"[a-z]{2,}", file.read_text("utf-8", "ignore").lower())
            words = [word for word in words if word not in PACKAGES]
            starts = range(0, len(words) - WINDOW, WINDOW // 2)
            pieces += [words[start : start + WINDOW] for start in starts]
            labels += [label] * len(starts)
    counts = Counter(word for piece in pieces for word in piece)
    known = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 1), 1)}
    x = np.array([[known.get(word, 0) for word in piece] for piece in pieces], "int32")
    y = np.array(labels)
    # Neighbours share words: what is tested comes in blocks of 64 pieces.
    held_out = np.arange(len(x)) // 64 % 6 == 0
    return Data(x[~held_out], y[~held_out], x[held_out], y[held_out])


@functools.cache
def ratings() -> Data:
    """Return pairs of a user and a thing, and the rating; few are rated often."""
    random = np.random.default_rng(0)
    users, things = random.standard_normal((2, 2000, 4))
    pairs = (2000 * random.random((60_000, 2)) ** 2).astype("int32")
    y = 3 + (users[pairs[:, 0]] * things[pairs[:, 1]]).sum(1) / 2
    y = (y + 0.3 * random.standard_normal(len(y)))[:, None].astype("float32")
    return Data(pairs[5000:], y[5000:], pairs[:5000], y[:5000])


@functools.cache
def halves() -> tuple[Data, Data]:
    """Return pictures of the digits 0 to 4, and 1000 of 5 to 9 with 5 classes, too."""
    all_ = pictures()
    train, test = all_.y < 5, all_.test_y < 5
    low = Data(all_.x[train], all_.y[train], all_.test_x[test], all_.test_y[test])
    high = Data(
        all_.x[~train][:1000],
        all_.y[~train][:1000] - 5,
        all_.test_x[~test],
        all_.test_y[~test] - 5,
    )
    return low, high


def mislabelled() -> Data:
    """Return 5000 digits, of which a quarter have a label drawn at random."""
    x, y, test_x, test_y = digits(5000)
    random, y = np.random.default_rng(0), y.copy()
    wrong = random.random(len(y)) < 0.25
    y[wrong] = random.integers(0, 10, wrong.sum())
    return Data(x, y, test_x, test_y)


@functools.cache
def cluttered() -> Data:
    """Return digits among specks of ink, and which pixels are the digit's."""
    random = np.random.default_rng(0)

    def mixed(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        others = np.roll(random.permutation(x), 14, axis=2)  # halves of other digits
        ink = others * (random.random(x.shape) < 0.6)
        noise = 0.2 * random.standard_normal(x.shape)
        return (np.maximum(x, ink) + noise).astype("float32"), x[..., 0] > 0.5

    all_ = pictures()
    x, y = mixed(all_.x[:8000])
    test_x, test_y = mixed(all_.test_x[:500])
    return Data(x, y.astype("int32"), test_x, test_y.astype("int32"))


@functools.cache
def waves() -> Data:
    """Return 30 values each of three noisy, damped waves, and the next one."""
    random, length = np.random.default_rng(0), 12_000
    waves_ = np.zeros((3, length))
    for wave, (period, damping) in zip(
        waves_, ((9, 0.995), (23, 0.99), (61, 0.98)), strict=True
    ):
        turn = 2 * damping * np.cos(2 * np.pi / period)
        noise = random.standard_normal(length)
        for t in range(2, length):
            wave[t] = turn * wave[t - 1] - damping**2 * wave[t - 2] + noise[t]
    series = (waves_ / waves_.std(1, keepdims=True)).sum(0)
    series = series + 0.3 * np.sin(3 * series)  # or a linear forecast would do
    windows = np.lib.stride_tricks.sliding_window_view(series, 31).astype("float32")
    x, y = windows[:, :-1, None], windows[:, -1:]
    return Data(x[:9000], y[:9000], x[9100::2], y[9100::2])


@functools.cache
def surface() -> Data:
    """Return 512 points of a smooth surface, without noise."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (2560, 2)).astype("float32")
    y = np.sin(4 * x[:, :1]) * np.cos(3 * x[:, 1:]) + x[:, :1] * x[:, 1:]
    return Data(x[:512], y[:512], x[512:], y[512:])


@functools.cache
def heavy_tails() -> Data:
    """Return a smooth function; what is learned has errors of Student's t(1.5)."""
    random = np.random.default_rng(0)
    x = random.standard_normal((12_000, 10)).astype("float32")
    y = np.tanh(x @ random.standard_normal((10, 5))).sum(1) + x[:, 0] * x[:, 1]
    y[:8000] += 0.5 * random.standard_t(1.5, 8000)
    y = y[:, None].astype("float32")
    return Data(x[:8000], y[:8000], x[8000:], y[8000:])


def zipf(random: np.random.Generator, many: int, shape: tuple[int, ...]) -> Any:
    """Return numbers below `many`, the small ones often, most of the others hardly."""
    chance = 1 / np.arange(1, many + 1)
    drawn = random.choice(many, shape, p=chance / chance.sum())
    return drawn.astype("int32")


@functools.cache
def bags() -> Data:
    """Return 30 words each of 20 000, and a class that their weights make likely."""
    random = np.random.default_rng(0)
    x = zipf(random, 20_000, (30_000, 30))
    logits = random.standard_normal(20_000)[x].sum(1) / 2
    y = (random.random(len(x)) < 1 / (1 + np.exp(-logits))).astype("int32")
    return Data(x[:25_000], y[:25_000], x[25_000:], y[25_000:])


@functools.cache
def clicks() -> Data:
    """Return eight categories each, of 1500 values a field, and whether one clicks."""
    random = np.random.default_rng(0)
    x = zipf(random, 1500, (160_000, 8))
    hidden = random.standard_normal((8, 1500, 3))[np.arange(8), x]  # (examples, 8, 3)
    alone, pairs = hidden[..., 0].sum(1), hidden[..., 1:]
    pairs = (pairs.sum(1) ** 2 - (pairs**2).sum(1)).sum(1) / 4
    y = (random.random(len(x)) < 1 / (1 + np.exp(1 - alone - pairs))).astype("int32")
    x = x + 1500 * np.arange(8, dtype="int32")
    return Data(x[5000:], y[5000:], x[:5000], y[:5000])
