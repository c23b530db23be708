import operator

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from stepping import tensor

from keras_rmsprop.folding import folded


@given(st.integers(1, 40), st.data())
def test_each_element_counts(size, data):
    def everywhere(x):
        return all(ops.all(part) for part in folded(x, ops.logical_and))

    x = np.ones(size, bool)
    assert everywhere(tensor(x))
    x[data.draw(st.integers(0, size - 1))] = False
    assert not everywhere(tensor(x))


@pytest.mark.float64
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 9), (3, 3, 4, 2)])
def test_sums_are_those_of_all_elements(shape):
    x = np.random.default_rng(0).normal(size=shape)
    parts = folded(tensor(x), operator.add)
    np.testing.assert_allclose(sum(float(ops.sum(part)) for part in parts), np.sum(x))


@pytest.mark.tensorflow("`tf.function`")
def test_what_has_no_known_shape_is_left_alone():
    @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    def parts(x):
        return folded(x, operator.add)

    assert [part.shape for part in parts(tf.ones([3, 2]))] == [(3, 2)]
