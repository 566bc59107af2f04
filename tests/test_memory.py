"""Memory that is freed and wanted again, in a process of its own, since malloc's settings stay."""

import subprocess
import sys

import pytest

from mimic_video import memory

# Page faults of a thread that fills 40 times an array of 48 MB and frees it, after one.
PROGRAM = """
import resource, sys, threading
import numpy as np
from mimic_video.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory("cpu"):
    sys.exit("no glibc")

def fill(times):
    for _ in range(times):
        np.ones(6 * 2**20)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill(40)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

fill(1)
for target, arguments in ((fill, (1,)), (faults, ())):
    thread = threading.Thread(target=target, args=arguments)
    thread.start()
    thread.join()
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=False, capture_output=True, text=True)
    if "no glibc" in done.stderr:
        pytest.skip("there is no glibc, whose malloc this is about")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_pages_that_were_freed_are_not_asked_for_again():
    assert faults("keep") < 300 < faults("leave")  # an array is 12,288 pages of 4 kB, or 24 of 2 MB: 40 times that


@pytest.mark.parametrize(("platforms", "devices", "expected"), [("cuda", (), False), (None, ("/dev/null",), False)])
def test_with_an_accelerator_malloc_is_left_alone(monkeypatch, platforms, devices, expected):
    monkeypatch.setattr(memory, "_ACCELERATORS", devices)
    assert memory.keep_freed_memory(platforms) is expected
