"""launch/train.py on weights that were converted, on data that changed, and in several processes."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from data_pipelines.sources.rlds import RldsSource
from data_pipelines.statistics import action_statistics
from data_pipelines.writers import write_rlds
from mimic_video.embodiments import Embodiment, to_table
from mimic_video.runs import checkpoints, directory

SETTINGS = {"precision": "bfloat16", "train": {"steps": 2, "ema_decay": 0.0}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run directory of bfloat16 weights of stage `video`, and those weights."""
    config = tiny.experiment(stage="video", **SETTINGS)
    params = tiny.params(config, seed=3)
    params = {
        "tokenizer": params["tokenizer"],
        "backbone": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["backbone"]),
    }
    run = tmp_path_factory.mktemp("converted") / "run"
    checkpoints.save_converted(run, config, params)
    return run, params


@pytest.mark.training
@pytest.mark.parametrize("stage", ["video", "action"])
def test_either_stage_starts_from_converted_weights(launch, config_file, pretrained, tmp_path, stage):
    run, params = pretrained
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)]}
    data = str(write_rlds(tmp_path, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))
    datasets = {"video_dataset": data, "action_dataset": data}
    file = config_file(tiny.experiment(stage=stage, backbone_run=str(run), data=datasets, **SETTINGS))
    workdir = tmp_path / "out"
    assert f"backbone: step 0 of {run}" in launch("train", f"--config={file}", f"--workdir={workdir}")
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    trained, step = checkpoints.load_params(workdir, "stored")
    assert step == 2
    for expected, found in zip(jax.tree.leaves(params["tokenizer"]), jax.tree.leaves(trained["tokenizer"]), strict=True):
        np.testing.assert_array_equal(np.float32(found), np.float32(expected))
    moved = [
        np.abs(np.float32(found) - np.float32(expected)).max()
        for expected, found in zip(jax.tree.leaves(params["backbone"]), jax.tree.leaves(trained["backbone"]), strict=True)
    ]
    if stage == "video":  # small steps from where the weights were, in float32
        assert 0 < max(moved) < 0.01 and jax.tree.leaves(trained["backbone"])[0].dtype == jnp.float32
    else:  # frozen, and still in bfloat16
        assert max(moved) == 0 and jax.tree.leaves(trained["backbone"])[0].dtype == jnp.bfloat16


def write(folder, *episodes):
    return write_rlds(folder, "tiny", {"train": episodes}, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")


@pytest.mark.training
def test_a_run_does_not_continue_on_data_that_changed(launch, config_file, tmp_path):
    data = write(tmp_path / "data", tiny.episode(15, 0), tiny.episode(12, 1))
    file = config_file(tiny.experiment(stage="video", train={"steps": 2}, data={"video_dataset": str(data)}))
    arguments = "train", f"--config={file}", f"--workdir={tmp_path / 'out'}"
    launch(*arguments)
    shutil.rmtree(data)
    write(tmp_path / "data", tiny.episode(15, 0), tiny.episode(14, 1))
    error = launch(*arguments)
    assert f"not those that {tmp_path / 'out'} was trained on (datasets.tiny.content: " in error
    assert "datasets.tiny.windows: 27 → 29)" in error
    renamed = shutil.copytree(data, tmp_path / "other" / data.name)
    assert "datasets.tiny.content: " in launch(*arguments, f"--config.data.video_dataset={renamed}")


@pytest.mark.training
def test_statistics_are_those_of_the_data_until_there_is_a_checkpoint(launch, config_file, tmp_path):
    file = config_file(tiny.experiment(train={"steps": 2}))
    one, two = (write(tmp_path / name, tiny.episode(15, seed)) for name, seed in (("one", 0), ("two", 1)))
    found = []
    for data in (one, two):
        launch("train", f"--config={file}", f"--config.data.action_dataset={data}", f"--workdir={tmp_path / 'out'}")
        found.append(directory.load_embodiments(tmp_path / "out")["tiny"].statistics["action"])
        shutil.rmtree(tmp_path / "out" / "checkpoints")
    for data, statistics in zip((one, two), found, strict=True):
        np.testing.assert_array_equal(
            statistics.mean, action_statistics(RldsSource(data, "train"), tiny.experiment().data)["action"].mean
        )


HOST = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
import tiny
from data_pipelines.assembly import TrainingData
from mimic_video.runs import directory
from mimic_video.training.start import find_robots
config, run = tiny.experiment(data={"action_dataset": sys.argv[3]}), Path(sys.argv[4])
directory.write_config(run, config)
data = TrainingData(config).open()
for _ in range(2):  # computed, then read
    found = find_robots(run, data.robots)
print(list(found))
"""


@pytest.mark.processes
def test_two_processes_compute_statistics_together_and_the_first_writes_them(tmp_path):
    data, run = write(tmp_path / "data", tiny.episode(15, 0), tiny.episode(12, 1)), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", HOST, address]
    processes = [
        subprocess.Popen([*command, str(index), data, run], env=environment, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [lines[-1] for lines in printed] == ["['tiny']"] * 2
    source = RldsSource(data, "train")
    alone = action_statistics(source, tiny.experiment().data)
    expected = to_table({"tiny": Embodiment("tiny", 0, alone, {"action": (), "proprio": ()}, datasets=("tiny",))})
    assert json.loads((run / "embodiments.json").read_text()) == expected
