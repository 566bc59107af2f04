"""The host's memory: what a process frees and will soon want again."""

import ctypes
import glob

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")  # GPUs, and chips of Cloud TPUs
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory(platforms: str | None) -> bool:
    """Has this process keep what it frees, if JAX will compute on the CPU. To be called before JAX starts.

    XLA's buffers on the CPU come from malloc. Those of a step are large, so that glibc returns each to the kernel, which has to
    clear fresh pages for the next step: a fifth of the time of a small experiment's steps, and more (docs/benchmarks.md).
    With an accelerator buffers are not here, and the threads that read data are better off with arenas of their own.

    Args:
        platforms: where JAX is to look for devices, as JAX_PLATFORMS says; None if it does not.

    Returns:
        Whether it was done: not with an accelerator, nor without glibc.
    """
    on_cpu = platforms == "cpu" if platforms else not any(glob.glob(pattern) for pattern in _ACCELERATORS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not on_cpu or mallopt is None:
        return False
    # Arenas of threads are too small for large arrays, which would go to the kernel all the same.
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_THRESHOLD, 2**30), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)])
