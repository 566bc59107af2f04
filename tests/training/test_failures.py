"""What training does when its numbers or its disk fail."""

import contextlib
import errno
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import chex
import numpy as np
import pytest
import tiny

from mimic_video.runs import checkpoints, directory
from mimic_video.training import loop

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = tiny.experiment(train={"steps": 6, "checkpoint_every": 2})


def train(run, bad_step=0, at=lambda step: None):
    """Trains on random batches, of which that of `bad_step` is not a number; calls `at(step)` when its batch is asked for."""

    def batches(start):
        for step in range(start + 1, CONFIG.train.steps + 1):
            at(step)
            batch = tiny.batch(CONFIG, CONFIG.train.batch_size, step)
            if step == bad_step:
                batch.actions[0, 0, 0] = np.nan
            yield batch

    return loop.train(CONFIG, run, tiny.Data(CONFIG, batches))


def saved_steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.training
def test_a_loss_that_is_not_a_number_stops_training_and_is_never_saved(tmp_path):
    with pytest.raises(loop.NonFiniteLossError) as error:
        train(tmp_path, bad_step=4)
    assert f"between steps 4 and 4 of {tmp_path}; the last good checkpoint is that of step 2" in str(error.value)
    assert saved_steps(tmp_path) == [2]
    chex.assert_tree_all_finite(checkpoints.load_params(tmp_path)[0])
    assert int(train(tmp_path).step) == 6


@pytest.mark.training
def test_a_disk_that_is_full_for_something_else_ends_training_too(tmp_path):
    def fail(step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.jsonl"))

    with pytest.raises(directory.RunError, match=r"cannot be written: \[Errno 28\] .*metrics.jsonl'; the same command"):
        train(tmp_path, at=fail)


@contextlib.contextmanager
def file_size_limit(size):
    """Writing beyond it fails as on a full disk, with an OSError. Metrics of a few steps are smaller, checkpoints larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_until_nothing_is_written(folder):
    """A failed save's threads go on for a while; in a new process, where training is started again as a rule, there are none."""
    before = None
    while (now := sorted(folder.rglob("*"))) != before:
        before = now
        time.sleep(1)


@pytest.mark.training
def test_a_full_disk_ends_training_with_what_is_left_and_the_next_start_continues(tmp_path):
    with contextlib.ExitStack() as full:

        def fill(step):
            if step == 4:
                while saved_steps(tmp_path) != [2]:
                    time.sleep(0.01)
                full.enter_context(file_size_limit(20_000))

        with pytest.raises(directory.RunError) as error:
            train(tmp_path, at=fill)
    assert re.fullmatch(
        f"step 4 could not be saved in {tmp_path}/checkpoints: .*File too large.*; the last good checkpoint is "
        "that of step 2, from where the same command continues",
        str(error.value),
    )
    assert saved_steps(tmp_path) == [2]
    wait_until_nothing_is_written(tmp_path)
    assert int(train(tmp_path).step) == 6
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "6"}  # and nothing half-written


READ_ONLY = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
    sys.exit("the capability that ignores permissions cannot be dropped")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.processes
def test_a_directory_that_cannot_be_written_is_found_out_at_the_start(tmp_path):
    config = tmp_path / "tiny_config.py"
    config.write_text(
        "import ml_collections\nfrom mimic_video.config import ExperimentConfig, to_dict\n"
        "def get_config():\n    return ml_collections.ConfigDict(to_dict(ExperimentConfig()))\n"
    )
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    for run in (folder, folder / "new"):
        command = [sys.executable, "-c", READ_ONLY, "launch/train.py", f"--config={config}", f"--workdir={run}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 1
        assert f"error: {run} cannot be written: [Errno 13] Permission denied" in ended.stderr
        assert "Traceback" not in ended.stderr
