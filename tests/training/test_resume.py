"""A training run that was killed ends, after the same command again, with the same bits as one that was not."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from data_pipelines.writers import write_rlds
from mimic_video.config import MeshConfig, to_dict
from mimic_video.training import checkpoints, loop, run_directory
from mimic_video.training.metrics import read_metrics
from mimic_video.training.sharding import make_mesh
from mimic_video.training.steps import make_state, place, split_params
from mimic_video.vam import VideoActionModel

ROOT = pathlib.Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 200, 10
DEADLINE = 240  # seconds that any one process may take

@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(stage, workdir, *overrides) → the training command on a tiny dataset."""
    folder = tmp_path_factory.mktemp("resume")
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25, 11))], "val": [tiny.episode(16, 9)]}
    dataset = str(write_rlds(folder / "data", "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    train = {"steps": STEPS, "warmup_steps": 10, "schedule": "cosine", "batch_size": 4, "log_every": 5, "validate_every": 100,
             "checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": 2, "action_draws": 2}  # fmt: skip
    values = to_dict(tiny.experiment(train=train, data={"video_dataset": dataset, "action_dataset": dataset}))
    config = folder / "tiny_config.py"
    config.write_text(f"import ml_collections\n\ndef get_config(stage):\n"
                      f"    return ml_collections.ConfigDict({values!r} | {{'stage': stage}})\n")  # fmt: skip

    def make(stage, workdir, *overrides):
        return [sys.executable, "launch/train.py", f"--config={config}:{stage}", f"--workdir={workdir}", *overrides]

    return make


def environment():
    """One CPU device, as outside the tests."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(command):
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=DEADLINE, capture_output=True)


def kill(command, when):
    """Starts the command, and kills it as soon as `when()` holds."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE
        while not when():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def final_state(workdir):
    """The last checkpoint and the frozen parameters, as NumPy arrays."""
    config = run_directory.read_config(workdir)
    params, _ = split_params(jax.jit(VideoActionModel(config).init)(jax.random.key(1)), config.stage)
    template = place(make_state(config, params), make_mesh(MeshConfig(), jax.devices()[:1]))
    with checkpoints.open_checkpoints(workdir, 2) as manager:
        state = checkpoints.restore(manager, template)
    assert int(state.step) == STEPS
    assert state.ema
    return jax.device_get((state.params, state.ema, state.opt_state, checkpoints.load_frozen(workdir)))


def assert_same_run(killed, whole):
    leaves = [jax.tree_util.tree_leaves_with_path(final_state(run)) for run in (killed, whole)]
    for (path, one), (_, two) in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, two, err_msg=jax.tree_util.keystr(path))
    timing = ("samples_per_second", "data_wait_fraction")
    records = [[{k: v for k, v in record.items() if k not in timing} for record in read_metrics(run)] for run in (killed, whole)]
    assert [record["step"] for record in records[1]] == list(range(5, STEPS + 1, 5))
    assert records[0] == records[1]
    assert any("validation" in name for name in records[0][19])
    assert len({record["loss"] for record in records[1]}) == STEPS / 5


@pytest.fixture(scope="module")
def video_run(command, tmp_path_factory):
    """A whole run of stage `video`."""
    workdir = tmp_path_factory.mktemp("runs") / "video"
    run(command("video", workdir))
    return workdir


@pytest.mark.slow
def test_a_killed_video_run_ends_with_the_same_bits(command, video_run, tmp_path):
    workdir = tmp_path / "killed"
    kill(command("video", workdir), when=lambda: max(saved_steps(workdir), default=0) >= 30)
    assert 30 <= max(saved_steps(workdir)) < STEPS - CHECKPOINT_EVERY
    run(command("video", workdir))
    assert_same_run(workdir, video_run)


@pytest.mark.slow
def test_an_action_run_that_was_killed_twice_ends_with_the_same_bits(command, video_run, tmp_path):
    overrides = [f"--config.backbone_run={video_run}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command("action", whole, *overrides))
    kill(command("action", killed, *overrides), when=(killed / "frozen").exists)
    assert saved_steps(killed) == []
    kill(command("action", killed, *overrides), when=lambda: max(saved_steps(killed), default=0) >= 30)
    assert 30 <= max(saved_steps(killed)) < STEPS - CHECKPOINT_EVERY
    run(command("action", killed, *overrides))
    assert_same_run(killed, whole)
    before = json.loads((whole / "embodiments.json").read_text())
    assert json.loads((killed / "embodiments.json").read_text()) == before
    trained = checkpoints.load_params(video_run)[0]["backbone"]
    kept = checkpoints.load_frozen(killed)["backbone"]
    jax.tree.map(np.testing.assert_array_equal, kept, trained)  # the backbone is the video run's moving average


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(command, video_run):
    files = {path: path.read_bytes() for path in video_run.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    run(command("video", video_run))
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_without_a_checkpoint_starts_again_on_the_frozen_parameters_it_kept(monkeypatch, tmp_path):
    """The backbone's run may have moved on in between; what is trained on has to be what a policy will load."""
    config, used = tiny.experiment(), []

    def run_no_steps(config, vam, mesh, state, frozen, *_):
        used.append(jax.device_get(frozen))
        return state

    monkeypatch.setattr(loop, "_run_steps", run_no_steps)
    for seed in (0, 1):
        loop.train(config, tmp_path, init=lambda mesh, seed=seed: tiny.params(config, seed), batches=lambda step: iter(()),
                   data=lambda step: {})
    kept = jax.device_get(checkpoints.load_frozen(tmp_path))
    for frozen in used:
        jax.tree.map(np.testing.assert_array_equal, frozen, kept)
