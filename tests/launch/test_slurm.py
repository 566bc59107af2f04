"""launch/train.py as tasks of a real Slurm, of one node."""

import pathlib
import re
import shlex
import subprocess
import sys
import time

import chex
import devices
import numpy as np
import pytest
import tiny
from slurm_cluster import slurm

from data_pipelines.writers import write_rlds
from mimic_video.parallel.distributed import OTHER_FAILED
from mimic_video.runs import checkpoints
from mimic_video.runs.directory import read_config, read_metrics
from mimic_video.training.preemption import EXIT_CODE

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
DEADLINE = 600  # seconds that anything may take


@pytest.fixture(scope="module")
def cluster():
    with slurm() as environment:
        yield environment | devices.of_each(1) | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def experiment_file(config_file, tmp_path_factory):
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25))]}
    folder = tmp_path_factory.mktemp("data")
    data = str(write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    train = {"steps": STEPS, "batch_size": 8, "checkpoint_every": STEPS}
    return config_file(tiny.experiment(stage="video", train=train, data={"video_dataset": data}))  # it compiles faster


def training(*arguments):
    """A command for a shell, which expands what its arguments have of variables."""
    words = " ".join(f'"{argument}"' for argument in arguments)
    return f"exec {shlex.quote(sys.executable)} launch/train.py {words}"


def start(cluster, *command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=cluster, **pipes)


def end(process, *codes):
    """What was printed by a process that has to end with one of these exit codes."""
    try:
        printed, _ = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode in codes, printed
    return printed


def test_a_step_trains_as_one_process_and_goes_on_after_sigterm_as_if_nothing_had_been(
    cluster, launch, experiment_file, tmp_path
):
    def tasks(name):
        command = training(f"--config={experiment_file}", f"--workdir={tmp_path / name}")
        return start(cluster, "srun", "--ntasks=2", f"--job-name={name}", "bash", "-c", command)

    end(tasks("whole"), 0)

    process, deadline = tasks("stopped"), time.monotonic() + DEADLINE
    while not (tmp_path / "stopped" / "config.json").exists():  # processes have met, and nothing is compiled
        assert process.poll() is None and time.monotonic() < deadline, end(process, 0)
        time.sleep(0.02)
    subprocess.run(["scancel", "--signal=TERM", "--name=stopped"], env=cluster, check=True)
    stopped = int(re.search(r"stopped after step (\d+) of", end(process, EXIT_CODE))[1])
    assert 1 <= stopped < STEPS
    end(tasks("stopped"), 0)

    launch("train", f"--config={experiment_file}", f"--workdir={tmp_path / 'one'}")
    runs = [tmp_path / name for name in ("whole", "stopped", "one")]
    whole, again, one = (checkpoints.load_params(run, "stored")[0] for run in runs)
    chex.assert_trees_all_equal(again, whole)
    chex.assert_trees_all_close(whole, one, rtol=1e-7, atol=1e-6)
    losses = [[record["loss"] for record in read_metrics(run)] for run in runs]
    assert losses[0] == losses[1] and len(set(losses[0])) == STEPS
    np.testing.assert_allclose(losses[0], losses[2], rtol=5e-7)


def test_two_steps_of_one_job_are_two_runs(cluster, experiment_file, tmp_path):
    command = training(
        f"--config={experiment_file}", f"--workdir={tmp_path}/$RUN", "--config.seed=$RUN", "--config.train.steps=2"
    )
    step = f"srun --ntasks=2 --exact bash -c {shlex.quote(command)}"
    both = f"RUN=1 {step} & first=$!; RUN=2 {step}; second=$?; wait $first; exit $(($? + second))"
    end(start(cluster, "salloc", "--ntasks=4", "bash", "-c", both), 0)
    for run in ("1", "2"):
        assert checkpoints.load_params(tmp_path / run, "stored")[1] == 2
        assert read_config(tmp_path / run).seed == int(run)


def test_tasks_of_different_runs_end_with_what_differs_and_write_nothing(cluster, experiment_file, tmp_path):
    command = training(f"--config={experiment_file}", f"--workdir={tmp_path}/$SLURM_PROCID", "--config.seed=$SLURM_PROCID")
    printed = end(start(cluster, "srun", "--ntasks=2", "--label", "bash", "-c", command), OTHER_FAILED)
    reason = (
        "this process and process 0 were started for different runs: "
        f"the run directory is {tmp_path}/1, there {tmp_path}/0; config field 'seed' is 1, there 0\n"
    )
    assert f"1: error: {reason}" in printed
    assert re.search(rf"0: error: process 1 on \S+ stopped: {re.escape(reason)}", printed)
    assert "Traceback" not in printed and not list(tmp_path.iterdir())
