"""A training run that was stopped or killed ends, after the same command again, with the same bits as one that was not."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import chex
import devices
import jax
import numpy as np
import pytest
import tiny

from data_pipelines.writers import write_rlds
from mimic_video.config import MeshConfig, to_dict
from mimic_video.parallel.sharding import make_mesh
from mimic_video.runs import checkpoints, directory
from mimic_video.runs.directory import read_metrics
from mimic_video.training import loop
from mimic_video.training.preemption import EXIT_CODE
from mimic_video.training.steps import abstract_state
from mimic_video.trees import named_leaves

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 10

# launch/train.py, with what every batch holds written down and, at a given step, a signal to itself.
RECORD = """
import dataclasses, json, os, zlib
import experiment, train
from data_pipelines.assembly import OpenTrainingData, TrainingData
from mimic_video.batch import fields
STEP, SIGNAL = int(os.environ["SIGNAL_STEP"]), int(os.environ["SIGNAL"])

class Recorded(OpenTrainingData):
    def batches(self, start, robots):
        for step, batch in enumerate(super().batches(start, robots), start + 1):
            if step == STEP:
                os.kill(os.getpid(), SIGNAL)
            with open(f"{train._WORKDIR.value}/batches.jsonl", "a") as file:
                sums = {name: zlib.crc32(value.tobytes()) for name, value in fields(batch).items()}
                file.write(json.dumps([step, sums]) + "\\n")
            yield batch

class Recording(TrainingData):
    def open(self, *arguments):
        return Recorded(**vars(super().open(*arguments)))

train.TrainingData = Recording
experiment.run(train.main)
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(stage, workdir, *overrides, signal=None, step=0) → exit status of the training command on a tiny dataset.

    The process sends the signal to itself when it asks for the batch of that step. `train.dataset` is where the dataset is.
    """
    folder = tmp_path_factory.mktemp("resume")
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25, 11))], "val": [tiny.episode(16, 9)]}
    dataset = str(write_rlds(folder / "data", "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    settings = {
        "steps": STEPS,
        "warmup_steps": 2,
        "schedule": "cosine",
        "batch_size": 4,
        "micro_batches": 2,
        "log_every": 1,
        "validate_every": 10,
        "checkpoint_every": 100,
        "keep_checkpoints": 2,
        "action_draws": 2,
    }
    values = to_dict(tiny.experiment(train=settings, data={"video_dataset": dataset, "action_dataset": dataset}))
    config = folder / "tiny_config.py"
    config.write_text(
        f"import ml_collections\n\ndef get_config(stage):\n"
        f"    return ml_collections.ConfigDict({values!r} | {{'stage': stage}})\n"
    )

    def run(stage, workdir, *overrides, signal=0, step=0):
        environment = os.environ | {
            **devices.of_each(1),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}",
            "SIGNAL_STEP": str(step),
            "SIGNAL": str(int(signal)),
        }
        command = [sys.executable, "-c", RECORD, f"--config={config}:{stage}", f"--workdir={workdir}", *overrides]
        return subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)

    run.dataset = pathlib.Path(dataset)
    return run


def steps_saved(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def final_state(workdir):
    """All arrays of the last checkpoint and of the frozen parameters."""
    config = directory.read_config(workdir)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with checkpoints.open_checkpoints(workdir, 2) as manager:
        state = checkpoints.restore(manager, abstract_state(tiny.model(config), mesh))
    assert int(state.step) == STEPS and state.ema
    return named_leaves({"state": state, "frozen": checkpoints.load_frozen(workdir)})


def batches_of(workdir):
    """{step: checksums of its batch}: of steps that were repeated, all of them have to be the same."""
    found = {}
    for step, batch in map(json.loads, (workdir / "batches.jsonl").read_text().splitlines()):
        assert found.setdefault(step, batch) == batch
    return found


def assert_same_run(stopped, whole):
    one, two = final_state(stopped), final_state(whole)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert batches_of(stopped) == batches_of(whole)
    assert sorted(batches_of(whole)) == list(range(1, STEPS + 1))

    def records(run):
        exact = ("loss", "grad_norm", "learning_rate", "validation")
        return [
            {name: value for name, value in record.items() if name == "step" or name.startswith(exact)}
            for record in read_metrics(run)
        ]

    assert records(stopped) == records(whole)
    assert len({record["loss"] for record in records(whole)}) == STEPS


LORA = "--config.lora.rank=2"  # as published: adapters of the backbone, and a decoder trained whole


@pytest.fixture(scope="module")
def video_run(train, tmp_path_factory):
    """A whole run of stage `video`."""
    workdir = tmp_path_factory.mktemp("runs") / "video"
    done = train("video", workdir, LORA)
    assert done.returncode == 0, done.stderr
    return workdir


def copied(dataset, folder):
    """The overrides that name a copy of the dataset in a folder. Its name, that of the folder above its version, stays."""
    copy = shutil.copytree(dataset, folder / dataset.parent.name / dataset.name)
    return [f"--config.data.video_dataset={copy}", f"--config.data.action_dataset={copy}"]


@pytest.mark.processes
@pytest.mark.parametrize("stage", ["video", "action"])
def test_ten_steps_are_five_a_sigterm_a_sigkill_and_five(train, video_run, tmp_path, stage):
    """The last five on a dataset that has moved, with a worker and without a cache, and without the backbone's run."""
    overrides, whole, stopped, own = [LORA], video_run, tmp_path / "stopped", tmp_path / "backbone"
    if stage == "action":
        overrides, whole = [f"--config.backbone_run={own}"], tmp_path / "whole"
        assert train(stage, whole, f"--config.backbone_run={video_run}").returncode == 0
        shutil.copytree(video_run, own)
    first = copied(train.dataset, tmp_path / "first")
    asked = train(stage, stopped, *overrides, *first, signal=signal.SIGTERM, step=5)
    assert asked.returncode == EXIT_CODE, asked.stderr
    assert f"stopped after step 5 of {stopped}, as asked; the same command continues there" in asked.stdout
    assert steps_saved(stopped) == [5]
    # In stage `action` the kill comes while a checkpoint is written, in stage `video` when none has been since the fifth step.
    every = f"--config.train.checkpoint_every={100 if stage == 'video' else 2}"
    killed = train(stage, stopped, *overrides, *first, every, signal=signal.SIGKILL, step=9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(stopped) == [5] if stage == "video" else 6 in steps_saved(stopped)
    second = copied(train.dataset, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(own, ignore_errors=True)
    ended = train(stage, stopped, *overrides, *second, "--config.data.workers=1", "--config.data.frame_cache_mb=0")
    assert ended.returncode == 0, ended.stderr
    assert_same_run(stopped, whole)
    if stage == "action":
        assert (stopped / "embodiments.json").read_text() == (whole / "embodiments.json").read_text()
        average = checkpoints.load_params(video_run)[0]["backbone"]
        chex.assert_trees_all_equal(checkpoints.load_frozen(stopped)["backbone"], average)


@pytest.mark.processes
def test_a_finished_run_stays_as_it_is(train, video_run):
    files = {path: path.read_bytes() for path in video_run.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert train("video", video_run, LORA).returncode == 0
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_without_a_checkpoint_starts_anew_and_keeps_the_frozen_parameters_that_it_trains_on(
    monkeypatch, tmp_path, one_device
):
    """The backbone's run may have moved on in between, or be another; what is trained on has to be what a policy will load."""
    config, used = tiny.experiment(), []

    class StoppedError(Exception):
        pass

    def stop_before_the_first_step(state, frozen, batch):
        used.append(jax.device_get(frozen))
        raise StoppedError

    monkeypatch.setattr(loop, "make_train_step", lambda *_: stop_before_the_first_step)
    for seed in (0, 1):
        with pytest.raises(StoppedError):
            loop.train(config, tmp_path, tiny.Data(config, seed=seed))
        chex.assert_trees_all_equal(used[-1], jax.device_get(checkpoints.load_frozen(tmp_path)))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(*used)


@pytest.mark.training
@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({"schedule": "cosine"}, {"schedule": "cosine", "schedule_steps": 2})],  # where the first schedule ended
    ids=["constant", "cosine"],
)
def test_a_run_that_is_given_more_steps_is_one_that_had_them(tmp_path, first, second):
    def train(run, steps, settings):
        config = tiny.experiment(train={"steps": steps, "checkpoint_every": 100} | settings)
        return loop.train(config, tmp_path / run, tiny.Data(config))

    assert int(train("grown", 2, first).step) == 2
    grown, whole = train("grown", 4, second), train("whole", 4, second)
    assert int(grown.step) == 4
    chex.assert_trees_all_equal(jax.device_get(grown), jax.device_get(whole))
