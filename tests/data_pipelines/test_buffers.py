import gc

import numpy as np
import pytest

from data_pipelines import buffers

SHAPE = (2, 1024, 1024)


@pytest.fixture(autouse=True)
def none_free(monkeypatch):
    monkeypatch.setattr(buffers, "_free", [])


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_the_last_view_is_gone():
    array = buffers.empty(SHAPE)
    assert array.shape == SHAPE and array.dtype == np.uint8 and array.flags.writeable and array.flags.c_contiguous
    first, row = address(array), array[1, ::2]
    row[:] = 7
    del array
    gc.collect()
    other = buffers.empty(SHAPE)
    other[:] = 1
    assert address(other) != first and (row == 7).all()
    del row
    assert address(buffers.empty((1, 1536, 1024))) == first  # a smaller one fits


def test_kept_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(buffers, "_KEPT", 5 * 2**20)
    arrays = [buffers.empty(SHAPE) for _ in range(4)]
    arrays.clear()
    assert [len(block) for block in buffers._free] == [2**21, 2**21]
    larger = buffers.empty((3, 1024, 1024))
    assert [len(block) for block in buffers._free] == [2**21]  # a larger one takes the place of one that did not fit
    del larger
    assert sorted(len(block) for block in buffers._free) == [2**21, 3 * 2**20]
    del arrays
    assert buffers.empty((4, 4)).base is None  # small arrays are not kept
