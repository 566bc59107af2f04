"""A backbone that has seen one camera learns a second one, and the policy acts by both."""

import json

import numpy as np
import pytest
import tiny

from data_pipelines.sources.rlds import RldsSource
from mimic_video.runs import checkpoints, directory

pytestmark = pytest.mark.simulator

RATES = {"image_size": (32, 32), "video_hz": 20.0, "control_hz": 20.0, "action_delay": 0.0}
BOTH = {"cameras": ("primary", "wrist")}


def experiment(stage, data=(), **changes):
    evaluation = {"tasks": ("drawer-close-v3",), "episodes_per_task": 2, "max_steps": 6}
    values = {"decoder": {"action_dim": 4, "proprio_dim": 4}, "train": {"steps": 2, "batch_size": 8}} | changes
    return tiny.experiment(stage=stage, data=RATES | dict(data), evaluation=evaluation, **values)


def test_a_second_camera(launch, one_device, config_file, tmp_path):
    folder = tmp_path / "data"
    counts = ["--videos=1", "--demonstrations=1", "--validation=1"]
    launch("collect", f"--config={config_file(experiment('action', BOTH))}", f"--out={folder}", *counts)
    dataset = str(folder / "demonstrations" / "1.0.0")
    episode = RldsSource(dataset, "train")[0]
    assert set(episode.cameras) == {"primary", "wrist"}

    data = {"video_dataset": dataset, "action_dataset": dataset}
    runs = {name: tmp_path / name for name in ("one", "two", "action")}
    launch("train", f"--config={config_file(experiment('video', data))}", f"--workdir={runs['one']}")
    two = experiment("video", data | BOTH, backbone_run=str(runs["one"]))
    launch("train", f"--config={config_file(two)}", f"--workdir={runs['two']}")
    embedding = checkpoints.load_params(runs["two"])[0]["backbone"]["view_embedding"]
    assert embedding.shape == (2, 16) and np.abs(embedding).min(axis=1).max() > 0
    file = config_file(experiment("action", data | BOTH, backbone_run=str(runs["two"])))
    launch("train", f"--config={file}", f"--workdir={runs['action']}")
    assert directory.load_embodiments(runs["action"])["demonstrations"].cameras == ("primary", "wrist")
    assert "drawer-close-v3: " in launch("evaluate", f"--config={file}", f"--workdir={runs['action']}")
    strategies = ("receding_horizon", "real_time_chunking")
    arguments = [f"--config={file}", f"--workdir={runs['action']}", *(f"--strategy={strategy}" for strategy in strategies)]
    table = launch("evaluate_delay", *arguments, "--delays=0,150").splitlines()[-4:]
    assert [line.split()[:2] for line in table] == [[strategy, delay] for strategy in strategies for delay in ("0", "150")]
    rows = json.loads((runs["action"] / "delays.json").read_text())["rows"]
    assert [row["delay_steps"] for row in rows] == [0, 3, 0, 3] and all(row["jerk"] > 0 for row in rows)
    assert "--delays is '1,soon'; expected milliseconds" in launch("evaluate_delay", *arguments, "--delays=1,soon")
    one = config_file(experiment("action", data, backbone_run=str(runs["two"])))  # but not the other way
    assert "'data.cameras' is ('primary',), there ('primary', 'wrist')" in launch(
        "train", f"--config={one}", f"--workdir={tmp_path / 'other'}"
    )
