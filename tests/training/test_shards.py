"""The files of a checkpoint of several processes hold values, whatever a device's layout."""

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from tinybert_jax.training import shards


def test_an_array_that_a_device_stores_transposed_is_read_as_it_was(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    transposed = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))
    array = jax.device_put(values, transposed)
    assert np.array(array).strides != values.strides  # the case that this test is about
    shards.write(tmp_path, shards.copy_parts([("w", array), ("v", jax.numpy.ones(3))]))
    sources = shards.open_arrays(tmp_path)
    assert np.array_equal(sources["w"].read((slice(None), slice(None))), values)
    assert np.array_equal(sources["w"].read((slice(1, 3), slice(2, 5))), values[1:3, 2:5])
    assert np.array_equal(sources["v"].read((slice(None),)), np.ones(3))
