"""Memory for windows of frames, used again.

A window of 61 frames at 480×640 has 56 MB. The allocator returns such blocks to the system at once, and to have them mapped and
zeroed again for every window costs a fifth of the time of decoding it.
"""

import threading
import weakref

import numpy as np

_KEPT = 2**30  # bytes; what is given back beyond them is freed
_SMALL = 2**25  # bytes; up to here glibc keeps blocks itself, and ones of many sizes kept among them would fragment its heap

_free: list[np.ndarray] = []
_lock = threading.RLock()  # a garbage collection may give a block back while its thread takes another


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array with arbitrary content. Its memory is used again once it and all of its views are gone."""
    size = int(np.prod(shape))
    if size < _SMALL:
        return np.empty(shape, np.uint8)
    with _lock:
        fitting = [i for i, block in enumerate(_free) if size <= len(block) < 2 * size]  # not a batch for a window
        if fitting:
            block = _free.pop(min(fitting, key=lambda i: len(_free[i])))
        else:
            if _free:
                del _free[0]  # others make room, or every size ever asked for would stay
            block = np.empty(size, np.uint8)
    lease = _Lease(block)
    weakref.finalize(lease, _give_back, block).atexit = False
    return np.asarray(lease)[:size].reshape(shape)


class _Lease:
    """What an array and its views hold on to, for as long as one of them lives."""

    def __init__(self, block: np.ndarray):
        self.__array_interface__ = block.__array_interface__


def _give_back(block: np.ndarray) -> None:
    with _lock:
        if sum(map(len, _free)) + len(block) <= _KEPT:
            _free.append(block)
