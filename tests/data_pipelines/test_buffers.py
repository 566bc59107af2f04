import gc

import numpy as np
import pytest

from data_pipelines import buffers

MIB = 2**20


@pytest.fixture(autouse=True)
def none_free(monkeypatch):
    monkeypatch.setattr(buffers, "_free", [])


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def free_mib() -> list[int]:
    return [len(block) // MIB for block in buffers._free]


def test_memory_is_used_again_once_the_last_view_is_gone():
    array = buffers.empty((64, 1024, 1024))
    assert array.shape == (64, 1024, 1024) and array.dtype == np.uint8 and array.flags.writeable and array.flags.c_contiguous
    first, row = address(array), array[1, ::2]
    row[:] = 7
    del array
    gc.collect()
    other = buffers.empty((64, 1024, 1024))
    other[:2] = 1
    assert address(other) != first and (row == 7).all()
    del row
    assert address(buffers.empty((40, 1024, 1024))) == first  # a smaller one fits


def test_kept_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(buffers, "_KEPT", 200 * MIB)
    arrays = [buffers.empty((64, 1024, 1024)) for _ in range(4)]
    arrays.clear()
    assert free_mib() == [64, 64, 64]
    window = buffers.empty((32, 1024, 1024))  # a window does not take a batch, but its place
    assert free_mib() == [64, 64]
    del window
    assert free_mib() == [64, 64, 32]
    buffers.empty((4, 4))
    assert free_mib() == [64, 64, 32]  # small ones are not kept
