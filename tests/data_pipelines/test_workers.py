import concurrent.futures
import errno
import os

import pytest

from data_pipelines.workers import worker_processes
from mimic_video.errors import ConfigError


def test_workers_without_shared_memory_are_refused_with_the_remedy(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", full)
    expected = pytest.raises(ConfigError, match=r"^2 worker processes need shared memory: /dev/shm: .*No space.*--shm-size=1g")
    with expected, worker_processes(2):
        pass
