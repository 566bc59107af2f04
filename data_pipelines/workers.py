"""Worker processes that leave nothing behind."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from mimic_video.errors import ConfigError


@contextlib.contextmanager
def worker_processes(count: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that end with this one, whatever ends it; what they have not begun is given up when the block is left."""
    context = multiprocessing.get_context("spawn")  # graphics contexts and JAX do not survive a fork
    try:
        executor = concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)
    except OSError as error:  # of a semaphore
        raise ConfigError(
            f"{count} worker processes need shared memory: /dev/shm: {error}; expected room (docker run --shm-size=1g)"
        ) from error
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Makes this worker end when its parent does and not before: the executor alone leaves workers of a killed parent running."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers itself
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
