"""launch/train.py in several processes, as on several hosts."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import devices
import numpy as np
import pytest
import tiny
from buckets import emulated_bucket

from data_pipelines.writers import write_rlds
from mimic_video.parallel.distributed import OTHER_FAILED, SILENCE
from mimic_video.runs import checkpoints
from mimic_video.runs.directory import read_metrics
from mimic_video.runs.storage import run_path
from mimic_video.training.preemption import EXIT_CODE

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 8, 2
DEADLINE = 300  # seconds that anything may take


@pytest.fixture(scope="module")
def experiment_file(config_file, tmp_path_factory):
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25, 11))]}
    folder = tmp_path_factory.mktemp("data")
    data = str(write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    train = {"steps": STEPS, "batch_size": 16, "checkpoint_every": CHECKPOINT_EVERY}
    datasets = {"video_dataset": data, "action_dataset": data}
    return config_file(tiny.experiment(train=train, data=datasets, backbone={"width": 32, "num_heads": 4}))


@pytest.fixture
def alone(launch, experiment_file):
    """alone() → the run of this process alone, which the first test that asks trains: a finished one stays as it is."""

    def train():
        run = experiment_file.parent / "alone"
        launch("train", f"--config={experiment_file}", f"--workdir={run}")
        return run

    return train


class Processes:
    """A run of `count` processes of two devices each, all of this machine.

    Args:
        command: arguments of launch/train.py.
        extra: process → further arguments that it alone gets.
        slurm: whether they find each other as tasks of SLURM.
    """

    def __init__(self, folder, count, command, extra=None, slurm=False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        folder.mkdir()
        self.errors = [folder / f"{index}.txt" for index in range(count)]
        self.processes = []
        for index, error in enumerate(self.errors):
            if slurm:
                job = {
                    "SLURM_JOB_ID": "7",
                    "SLURM_STEP_ID": "0",
                    "SLURM_STEP_NODELIST": "localhost",
                    "SLURM_NTASKS": count,
                    "SLURM_PROCID": index,
                    "SLURM_LOCALID": index,
                    "JAX_COORDINATOR_PORT": port,
                }
            else:
                job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
            absent = {"http_proxy": "http://127.0.0.1:9"}  # a proxy that is not there, and not for processes of a run
            own = devices.of_each(2) | {"PYTHONPATH": str(ROOT)} | absent | {k: str(v) for k, v in job.items()}
            environment = os.environ | own
            arguments = [sys.executable, "launch/train.py", *command, *(extra or {}).get(index, [])]
            with error.open("w") as file:
                self.processes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def end(self, seconds=DEADLINE):
        """Exit codes."""
        deadline = time.monotonic() + seconds
        return [process.wait(deadline - time.monotonic()) for process in self.processes]

    def printed(self, index):
        """Without the lines of Gloo, whose threads write them at any time."""
        lines = self.errors[index].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))


def test_four_processes_train_as_one_even_if_one_of_them_is_killed(alone, experiment_file, tmp_path):
    four = tmp_path / "four"
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.sequence=4")  # a sample is on two processes
    command = [f"--config={experiment_file}", f"--workdir={four}", *mesh]
    with Processes(tmp_path / "killed", 4, command) as job:
        deadline = time.monotonic() + DEADLINE
        while not (four / "checkpoints" / str(CHECKPOINT_EVERY)).exists():
            assert [process.poll() for process in job.processes] == [None] * 4, job.printed(0)
            assert time.monotonic() < deadline
            time.sleep(0.005)
        job.processes[2].kill()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ended = pool.submit(job.end, SILENCE + 20)
            one = alone()  # while the others wait for a sign of life
            assert ended.result() == [OTHER_FAILED, OTHER_FAILED, -signal.SIGKILL, OTHER_FAILED]
        for index in (0, 1, 3):
            assert f"error: process 2 on {socket.gethostname()} has shown no sign of life for 30 s" in job.printed(index)
    assert not (four / "checkpoints" / str(STEPS)).exists()
    with Processes(tmp_path / "restarted", 4, command) as job:
        assert job.end() == [0] * 4, job.printed(0)
        assert "loss" in job.printed(0) and not any("loss" in job.printed(index) for index in (1, 2, 3))

    records = [read_metrics(run) for run in (four, one)]
    assert [record["step"] for record in records[0]] == list(range(1, STEPS + 1))
    for name in ("loss", "action_mse", "grad_norm"):
        found, expected = ([record[name] for record in each] for each in records)
        assert len(set(expected)) == STEPS
        np.testing.assert_allclose(found, expected, rtol=5e-7)
    params = [checkpoints.load_params(run, "stored")[0] for run in (four, one)]
    chex.assert_trees_all_close(*params, rtol=1e-7, atol=1e-6)


def test_what_one_process_cannot_read_ends_all_with_its_reason(experiment_file, tmp_path):
    command = [f"--config={experiment_file}", f"--workdir={tmp_path / 'run'}"]
    missing = {1: ["--config.data.action_dataset=/nowhere/1.0.0"]}
    with Processes(tmp_path / "job", 2, command, extra=missing, slurm=True) as job:
        assert job.end() == [OTHER_FAILED, 1]
        reason = "dataset directory /nowhere/1.0.0 does not exist"
        assert job.printed(1).strip().endswith(f"error: {reason}") and "Traceback" not in job.printed(1)
        assert f"error: process 1 on {socket.gethostname()} stopped: {reason}" in job.printed(0)


def test_processes_of_different_runs_end_with_what_differs(experiment_file, tmp_path):
    command = [f"--config={experiment_file}", f"--workdir={tmp_path / 'run'}"]
    other = {1: ["--config.train.learning_rate=0.5", f"--workdir={tmp_path / 'other'}"]}
    with Processes(tmp_path / "job", 2, command, extra=other) as job:
        assert job.end() == [OTHER_FAILED, 1]
        reason = (
            "this process and process 0 were started for different runs: the run directory is "
            f"{tmp_path}/other, there {tmp_path}/run; config field 'train.learning_rate' is 0.5, there 0.001"
        )
        assert job.printed(1).strip().endswith(f"error: {reason}") and "Traceback" not in job.printed(1)
        assert f"error: process 1 on {socket.gethostname()} stopped: {reason}" in job.printed(0)
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()


def test_two_processes_train_and_continue_in_a_bucket(launch, alone, experiment_file, tmp_path):
    with emulated_bucket() as bucket:
        run = run_path(f"{bucket}/run")
        command = [f"--config={experiment_file}", f"--workdir={run}"]
        with Processes(tmp_path / "stopped", 2, command) as job:
            deadline = time.monotonic() + DEADLINE
            while not (run / "checkpoints").exists():
                assert [process.poll() for process in job.processes] == [None] * 2, job.printed(0)
                assert time.monotonic() < deadline
                time.sleep(0.05)
            job.processes[1].terminate()
            assert job.end() == [EXIT_CODE] * 2, job.printed(0)
        with Processes(tmp_path / "restarted", 2, command) as job:
            assert job.end() == [0] * 2, job.printed(0)
        one = alone()

        records = [read_metrics(each) for each in (run, one)]
        assert [[record["step"] for record in each] for each in records] == [list(range(1, STEPS + 1))] * 2
        np.testing.assert_allclose(*[[record["loss"] for record in each] for each in records], rtol=5e-7)
        params = [checkpoints.load_params(each, "stored")[0] for each in (run, one)]
        chex.assert_trees_all_close(*params, rtol=1e-7, atol=1e-6)
        assert f"step {STEPS} of {run}" in launch("export", f"--workdir={run}", f"--out={tmp_path / 'policy'}")
