"""Numbers in a byte each, beside a table of what the codes stand for."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stepping import examples

from keras_rmsprop import bits, blockwise
from keras_rmsprop.codecs import Blockwise, Draw

VELOCITY, MOMENTUM = 0, 1
WIDTH = blockwise.BLOCK + blockwise.SCALE


def table(signed):
    """Return what each code stands for at a scale of 1, group after group."""
    shares = [0.0]
    for group in range(6 if signed else 7):
        low = 8.0 ** (group - (6 if signed else 7))
        codes = 2 ** (group + 1)
        shares += [low + 7 * low * k / codes for k in range(codes)]
    return np.array([*shares, 1.0])


TABLES = {VELOCITY: table(False), MOMENTUM: table(True)}


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def rows_of(codes, scale):
    """Return bytes as they are kept, given codes and a scale for each block."""
    scales = np.float32(scale).reshape(-1, 1).view(np.uint8)
    return np.concatenate([np.uint8(codes), scales], axis=1)


@pytest.mark.parametrize("scale", [1.0, 0.37, 3e5, 2.0**-100])
def test_codes_stand_for_what_the_table_says(scale):
    codes = np.arange(256)
    found = numpy(blockwise.decoded(rows_of([codes], [scale]), signed=False))
    np.testing.assert_array_equal(
        found[0], np.float32(TABLES[VELOCITY]) * np.float32(scale)
    )
    signed = numpy(blockwise.decoded(rows_of([codes], [scale]), signed=True))[0]
    magnitudes = np.float32(TABLES[MOMENTUM]) * np.float32(scale)
    np.testing.assert_array_equal(signed[:128], magnitudes)
    np.testing.assert_array_equal(signed[129:], -magnitudes[:0:-1])


@pytest.mark.parametrize("scale", [1.0, 0.37, 3e5, 2.0**-60])
@pytest.mark.parametrize("draw", [0, blockwise.NEAREST])
def test_what_a_code_stands_for_gets_that_code(scale, draw):
    codes = np.random.default_rng(0).permutation(256)[None]
    kept = rows_of(codes, [scale])
    numbers = blockwise.decoded(kept, signed=False)
    np.testing.assert_array_equal(
        numpy(blockwise.encoded(numbers, draw, signed=False)), kept
    )
    codes[codes == 128] = 0  # the only byte that is none
    kept = rows_of(codes, [scale])
    numbers = blockwise.decoded(kept, signed=True)
    np.testing.assert_array_equal(
        numpy(blockwise.encoded(numbers, draw, signed=True)), kept
    )


def kept(x, slot, draw=None):
    """Return numbers after they were kept."""
    codec = Blockwise()
    stored = codec.encode(x, "uint8", draw, slot)
    assert tuple(stored.shape) == codec.shape(x.shape)
    return numpy(codec.decode(stored, "float32", x.shape, slot))


def neighbours(x, slot):
    """Return the codes' numbers below and above each element, by the table."""
    flat = np.abs(np.float64(x)).ravel()
    padded = np.pad(flat, (0, -flat.size % 256)).reshape(-1, 256)
    scale = padded.max(axis=1, keepdims=True, initial=0)
    share = np.divide(padded, scale, out=np.zeros_like(padded), where=scale > 0)
    above = np.searchsorted(TABLES[slot], share)
    low, high = TABLES[slot][np.maximum(above - 1, 0)], TABLES[slot][above]
    return ((y * scale).ravel()[: flat.size].reshape(x.shape) for y in (low, high))


FLOATS = st.floats(2.0**-90, 2.0**100, width=32) | st.just(0.0)


@given(
    x=hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, min_side=0, max_side=40),
        elements=FLOATS,
        fill=FLOATS,
    ),
    slot=st.sampled_from([VELOCITY, MOMENTUM]),
    step=st.none() | st.integers(0, 2**20),
    seed=st.integers(0, 2**31),
)
@examples(100)
def test_the_error_is_that_of_the_nearest_codes(x, slot, step, seed):
    rng = np.random.default_rng(seed)
    if slot == MOMENTUM:
        x = x * np.float32(rng.choice([-1, 1], x.shape))
    # Blocks as they are in training: from a few powers of ten, too.
    x = x * np.float32(10.0 ** rng.uniform(-4, 4, x.shape))
    found = kept(x, slot, step if step is None else Draw(0, step))
    low, high = neighbours(x, slot)
    slack = 1e-5 * high
    assert (np.abs(found) >= low - slack).all()
    assert (np.abs(found) <= high + slack).all()
    assert (np.sign(found) * np.sign(x) >= 0).all()
    if step is None:  # to the nearest
        assert (np.abs(np.abs(found) - np.abs(x)) <= (high - low) / 2 + slack).all()


@pytest.mark.parametrize("slot", [VELOCITY, MOMENTUM])
def test_errors_by_group(slot):
    """The promise: half a step of the group, which the page shows by decade."""
    x = np.float32(np.geomspace(1e-5, 1, 200_000))
    x = np.insert(x.reshape(-1, 250), 0, 1.0, axis=1)  # the largest of each block
    x = np.pad(x, [(0, 0), (0, 5)])
    error = np.abs(kept(x, slot) / np.where(x > 0, x, 1) - 1)
    groups = 7 if slot == VELOCITY else 6
    for group in range(1, 5):
        inside = (x < 8.0 ** (1 - group)) & (x >= 8.0**-group)
        codes = 2 ** (groups - group + 1)
        promised = 3.5 / (codes + 3.5)
        assert error[inside].max() <= promised * 1.0001
        assert error[inside].max() > 0.9 * promised


@pytest.mark.parametrize("slot", [VELOCITY, MOMENTUM])
def test_random_rounding_is_right_on_average(slot):
    x = np.float32([1.0, 0.3, 0.0123, 1e-3, 2e-5, 3e-7, 1e-8, 0.0] * 32)
    x = x * (np.float32([1, -1] * 128) if slot == MOMENTUM else 1)
    found = [kept(np.tile(x, (512, 1)), slot, Draw(3, t)).mean(0) for t in range(9)]
    found = np.mean(found, axis=0)
    low, high = neighbours(x, slot)
    np.testing.assert_allclose(found, x, rtol=0, atol=0.03 * (high - low).max())
    assert (np.abs(found - x) <= 0.06 * (high - low) + 1e-9).all()


@pytest.mark.parametrize("slot", [VELOCITY, MOMENTUM])
def test_extremes_give_numbers(slot):
    blocks = {
        "zeros": np.zeros(256),
        "denormals": np.full(256, 1e-42),
        "one huge": np.r_[2.0**126, np.full(255, 1e-30)],
        "an infinity": np.r_[np.inf, np.full(255, 1e-36)],
        "a NaN": np.r_[np.nan, np.full(255, 1e-36)],
        "the least": np.full(256, 2.0**-126),
    }
    for name, x in blocks.items():
        for draw in (None, Draw(0, 1)):
            found = kept(np.float32(x), slot, draw)
            assert np.isfinite(found).all(), name
            usual = np.isfinite(x) & (np.abs(x) > 1e-35)
            if name != "one huge":
                np.testing.assert_array_equal(found[usual], np.float32(x)[usual])
    assert kept(np.float32(blocks["one huge"]), slot)[0] == 2.0**126


def test_draws_meet_all_evenly():
    x = np.zeros((256, 256), "float32")
    found = numpy(bits.draws(x, 0, 0, 0))
    np.testing.assert_array_equal(np.sort(found, axis=None), np.arange(bits.DRAWS))


def test_shapes_and_bytes():
    codec = Blockwise()
    for shape, blocks in [((), 1), ((0,), 0), ((256,), 1), ((257,), 2), ((20, 30), 3)]:
        assert codec.shape(shape) == (blocks, WIDTH)
        x = np.random.default_rng(0).uniform(0.5, 1, shape).astype("float32")
        np.testing.assert_allclose(kept(x, VELOCITY), x, rtol=0.03)
