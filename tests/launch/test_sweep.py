"""launch/sweep.py on this machine: real runs in processes of their own."""

import contextlib
import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import devices
import pytest
import tiny
from buckets import emulated_bucket
from sweeps import local, points

from data_pipelines.writers import write_rlds
from mimic_video.config import ConfigError
from mimic_video.evaluation.sweep_results import save_entries
from mimic_video.registry import SIMULATORS
from mimic_video.runs.directory import locked, read_config, read_metrics, write_config
from mimic_video.runs.status import read_status, reported
from mimic_video.runs.storage import run_path

SWEEP = pathlib.Path(__file__).parents[2] / "launch" / "sweep.py"
OWN = pathlib.Path(__file__).parents[1] / "own_simulator.py"
DECLARATIONS = """

def sweep():
    for rate in (1e-4, 1e-3):
        for decay in (0.0, 0.1):
            yield {"train.learning_rate": rate, "train.weight_decay": decay}
    yield {"train.learning_rate": 1e-3, "train.weight_decay": 0.1}
    yield {"train.learning_rate": 1e30, "train.weight_decay": 0.1}


def sweep_stop_step():
    yield {"policy.stop_step": 0}
    yield {"policy.stop_step": 1}


def sweep_misspelt():
    yield {"train.learning_rate": 1e-4}
    yield {"train.lerning_rate": 1e-4}
"""
POINTS = [f"learning_rate={rate},weight_decay={decay}" for rate in (0.0001, 0.001) for decay in (0.0, 0.1)]
DIVERGING = "learning_rate=1e+30,weight_decay=0.1"


@pytest.fixture(scope="module")
def experiment(config_file, tmp_path_factory):
    """--config of an experiment, of stage `action` unless it says otherwise, that declares sweeps and registers a simulator."""
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)], "val": [tiny.episode(15, 2)]}
    data = str(write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    evaluation = {"simulator": "point", "tasks": ("left",), "episodes_per_task": 1, "max_steps": 2, "workers": 1}
    train = {"steps": 12, "log_every": 2, "validate_every": 6, "checkpoint_every": 2}
    file = config_file(tiny.experiment(data={"action_dataset": data, "video_dataset": data}, train=train, evaluation=evaluation))
    shutil.copy(OWN, file.parent / "my_simulator.py")
    file.write_text(f"import my_simulator\n{file.read_text()}{DECLARATIONS}")
    with pytest.MonkeyPatch.context() as patch:  # tests that read the file in this process register the simulator
        patch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))
        patch.syspath_prepend(file.parent)
        yield f"--config={file}"
    sys.modules.pop("my_simulator", None)


def sweep(*arguments):
    command, pipes = [sys.executable, str(SWEEP), *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=os.environ | devices.of_each(1), text=True, **pipes)


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.processes
def test_a_sweep_goes_on_after_a_kill_and_a_diverging_run_does_not_end_it(experiment, tmp_path):
    workdir = tmp_path / "sweep"
    command = f"{experiment}:video", f"--workdir={workdir}", "--jobs=2"  # of that stage, since it compiles faster
    with sweep(*command) as launcher:
        wait_for(lambda: any(read_status(workdir / name).step >= 2 for name in POINTS), launcher)
        launcher.kill()
    running = [name for name in POINTS if read_status(workdir / name).state == "running"]
    os.kill(read_status(workdir / running[0]).pid, signal.SIGKILL)  # one goes with it, the other one goes on
    with sweep(*command) as launcher:
        output, _ = launcher.communicate()
    assert launcher.returncode == 1, output
    assert f"{POINTS[3]} is the same experiment as {POINTS[3]}, and left out" in output
    assert f"{DIVERGING}: training failed at step 0 of 12: loss is nan" in output
    for name in POINTS:
        status, config = read_status(workdir / name), read_config(workdir / name)
        assert (status.state, status.step) == ("finished", 12), output
        assert status.starts == (2 if name == running[0] else 1)
        assert f"learning_rate={config.train.learning_rate},weight_decay={config.train.weight_decay}" == name
        assert read_metrics(workdir / name)[-1]["step"] == 12
    with open(workdir / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and [row["train.learning_rate"] for row in rows].count("0.001") == 2
    errors = [record["validation_video_mse"] for name in POINTS for record in read_metrics(workdir / name)[2::3]]
    assert len(errors) == 8 and float(rows[0]["validation_best"]) == min(errors)
    assert rows[-1]["state"] == "failed" and rows[-1]["reason"].startswith("loss is nan")
    page = (workdir / "sweep.html").read_text()
    assert "5 points: 4 trained, 1 failed" in page and f"<td>{DIVERGING}</td><td>failed</td><td>loss is nan" in page
    assert page.count("data:image/png") == 3  # the error over each field, and the curves of all runs


@pytest.mark.processes
def test_a_signal_is_passed_on_and_evaluations_follow(experiment, tmp_path):
    """Points that only evaluation tells apart share a run."""
    workdir = tmp_path / "sweep"
    command = experiment, f"--workdir={workdir}", "--sweep=stop_step", "--then=evaluate", "--config.train.steps=300"
    with sweep(*command) as launcher:
        wait_for(lambda: read_status(workdir).step >= 2, launcher)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate()
    assert launcher.returncode == 75 and "the same command continues them" in output
    stopped = read_status(workdir)
    assert stopped.state == "stopped" and 2 <= stopped.step < 300
    done = f"--config.train.steps={stopped.step + 2}"
    with sweep(*command[:-1], done) as launcher:
        output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    assert read_status(workdir).step == stopped.step + 2
    for step in (0, 1):
        found = json.loads((workdir / "evaluations" / f"stop_step={step}" / "evaluation.json").read_text())
        assert found["policy"]["stop_step"] == step and found["success"]["overall"]["episodes"] == 1
    with sweep(*command[:-1], done) as launcher:
        output, _ = launcher.communicate()
    assert launcher.returncode == 0 and "of which 1 have finished" in output
    (job,) = points.jobs(points.expand([command[0], done], ["stop_step"])[0], str(workdir), evaluate=True)
    assert not points.remaining(job)
    more = points.expand([command[0], done, "--config.evaluation.max_steps=3"], ["stop_step"])[0]
    assert [script for script, *_ in points.remaining(*points.jobs(more, str(workdir), evaluate=True))] == ["evaluate.py"] * 2


def test_mistakes_are_found_before_anything_starts(experiment, launch, tmp_path):
    workdir = f"--workdir={tmp_path / 'sweep'}"
    assert "did you mean 'train.learning_rate'?" in launch("sweep", experiment, workdir, "--sweep=misspelt")
    assert "TrainConfig.steps' is -1" in launch("sweep", experiment, workdir, "--config.train.steps=-1")
    assert "--config is missing" in launch("sweep", workdir)
    assert "no sweep was started there" in launch("sweep", workdir, "--report")
    assert not (tmp_path / "sweep").exists()
    run = tmp_path / "sweep" / POINTS[0]
    run.mkdir(parents=True)
    other = points.expand([experiment, "--config.train.batch_size=16"], [])[0][0].config
    write_config(run, other)
    assert "train.batch_size: 16 → 8" in launch("sweep", experiment, workdir)


def test_a_dry_run_prints_the_commands(experiment, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("JAX_PLATFORMS")
    workdir = tmp_path / "sweep"
    output = launch("sweep", experiment, f"--workdir={workdir}", "--jobs=2", "--dry_run", "--then=evaluate")
    assert "# 5 runs, 2 at a time, on GPUs 0,1, on GPUs 2,3" in output
    lines = [line for line in output.splitlines() if line.startswith("python launch/")]
    assert len(lines) == 10 and not workdir.exists()
    values = "--config.train.learning_rate=0.0001 --config.train.weight_decay=0.0"
    assert lines[0] == f"python launch/train.py {experiment} {values} --workdir={workdir}/{POINTS[0]}"
    assert lines[1] == lines[0].replace("train.py", "evaluate.py")


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_report_of_what_is_half_finished(experiment, launch, tmp_path, place):
    """Of two runs, one is under way and one was killed; the others have not started."""
    with emulated_bucket() if place == "bucket" else contextlib.nullcontext(str(tmp_path)) as folder:
        workdir = run_path(f"{folder}/sweep")
        save_entries(workdir, [point.entry for point in points.expand([experiment], None)[0]])
        with locked(workdir / POINTS[0]), reported(workdir / POINTS[0], "training", 12) as progress:
            (workdir / POINTS[0] / "metrics.jsonl").write_text('{"step": 6, "loss": 2.0, "validation_action_mse": 0.5}\n')
            progress(6)
            (workdir / POINTS[1]).mkdir(parents=True)
            (workdir / POINTS[1] / "status.json").write_text((workdir / POINTS[0] / "status.json").read_text())
            output = launch("sweep", f"--workdir={workdir}", "--report")
        rows = {row["point"]: row for row in csv.DictReader((workdir / "sweep.csv").read_text().splitlines())}
        assert [rows[name]["state"] for name in (*POINTS, DIVERGING)] == ["running", "killed", "waiting", "waiting", "waiting"]
        assert next(iter(rows)) == POINTS[0] and float(rows[POINTS[0]]["validation_best"]) == 0.5
        assert "running  6/12" in output and "killed" in output
        assert "it ended without a word" in (workdir / "sweep.html").read_text()


SKY = ("--on=sky", "--infra=gcp/us-west4", "--accelerators=H100:8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--on=tpu"], "--accelerator_type is missing, which --on=tpu needs: tpu: slice of a run, such as v5litepod-16"),
        (["--on=tpu", "--accelerator_type=v5e-16"], "--workdir is '.*'; expected gs://BUCKET/FOLDER"),
        (["--on=sky", "--infra=gcp/us-west4"], "--accelerators is missing, which --on=sky needs"),
        ([*SKY, "--provisioning=reserved"], "--provisioning is 'reserved'; expected spot or on_demand for --on=sky"),
        (SKY, "--workdir is '.*'; expected gs://BUCKET/FOLDER"),
        (["--slurm=--time=1"], "--slurm is given, which says nothing for --on=local"),
        (["--on=slurm", "--nodes=2"], "--nodes is given, which says nothing for --on=slurm"),
        (["--stop"], "--stop is given, which says nothing for --on=local"),
    ],
)
def test_flags_of_other_places_and_missing_ones_are_named(experiment, launch, tmp_path, flags, message):
    output = launch("sweep", experiment, f"--workdir={tmp_path / 'sweep'}", *flags, "--dry_run")
    assert re.search(message, output), output


def test_a_dry_run_for_slurm_has_a_task_for_each_run(experiment, launch, tmp_path):
    flags = "--on=slurm", "--slurm=--partition=gpu", "--slurm=--time=4:00:00", "--jobs=3", "--dry_run"
    output = launch("sweep", experiment, f"--workdir={tmp_path / 'sweep'}", *flags)
    for line in ("--array=0-4%3", "--partition=gpu", "--time=4:00:00", "--signal=TERM@120"):
        assert f"#SBATCH {line}" in output.splitlines()
    assert output.count("train.py") == 5 and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("environment", "jobs", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}, 3, [{}, {}, {}]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, [{}]),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, 0, [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2, [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]),
    ],
)
def test_runs_at_once_have_gpus_of_their_own(environment, jobs, expected):
    assert local.slots(jobs, environment) == expected


def test_more_runs_than_gpus_are_refused():
    with pytest.raises(ConfigError, match="--jobs is 3, with 2 GPUs"):
        local.slots(3, {"CUDA_VISIBLE_DEVICES": "0,1"})
