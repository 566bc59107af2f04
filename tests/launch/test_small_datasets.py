"""Datasets at the edge: one episode, episodes of one step, chunks that are padding but for one action, no instruction."""

import dataclasses
import json
import pathlib
import shutil
import sys

import foreign_formats as formats
import numpy as np
import pytest
import tiny

from data_pipelines.writers import write_rlds
from mimic_video.policy.policy import Policy
from mimic_video.registry import SIMULATORS

pytestmark = pytest.mark.training

OWN = pathlib.Path(__file__).parents[1] / "own_simulator.py"
EVALUATION = {"simulator": "point", "tasks": ("left",), "episodes_per_task": 1, "max_steps": 3, "workers": 1}
TRAIN = {"steps": 2, "validate_every": 2, "validation_batches": 1}


def episode(length, seed=0):
    return dataclasses.replace(tiny.episode(length, seed), instruction="")


def rlds(folder, **splits):
    splits = {split: list(map(episode, lengths)) for split, lengths in splits.items()}
    return write_rlds(folder, "small", splits, control_hz=10.0, image_size=tiny.SIZE, description="Small.")


@pytest.fixture
def experiment_file(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))
    shutil.copy(OWN, tmp_path / "my_simulator.py")
    monkeypatch.syspath_prepend(tmp_path)

    def write(stage, dataset, **changes):
        data = {"video_dataset": str(dataset), "action_dataset": str(dataset)} | changes.pop("data", {})
        path = config_file(tiny.experiment(stage=stage, data=data, evaluation=EVALUATION, **{"train": TRAIN} | changes))
        path.write_text(f"import my_simulator\n{path.read_text()}")
        return path

    yield write
    sys.modules.pop("my_simulator", None)


@pytest.fixture
def use(launch, experiment_file, tmp_path):
    """Trains and evaluates both stages and exports the policy, which plans; with the fields that differ from `tiny`."""

    def run(dataset, proprio, **changes):
        video, action, bundle = (tmp_path / name for name in ("video", "action", "bundle"))
        for stage, workdir, backbone in (("video", video, ""), ("action", action, str(video))):
            file = experiment_file(stage, dataset, backbone_run=backbone, **changes)
            launch("train", f"--config={file}", f"--workdir={workdir}")
            metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
            values = [value for record in metrics for value in record.values()]
            assert metrics[-1]["step"] == 2 and np.isfinite(values).all()
            assert metrics[-1]["loss"] > 0
            print(launch("evaluate", f"--config={file}", f"--workdir={workdir}", "--recorded=1"))
        assert "wrote" in launch("export", f"--workdir={action}", f"--out={bundle}")
        policy = Policy.load(bundle)
        chunk = policy(np.zeros((1, 5, *tiny.SIZE, 3), np.uint8), np.zeros((1, proprio), np.float32), [""])
        np.testing.assert_array_equal(
            chunk, Policy.load(action)(np.zeros((1, 5, *tiny.SIZE, 3), np.uint8), np.zeros((1, proprio), np.float32), [""])
        )
        assert np.isfinite(chunk).all()
        return [json.loads((workdir / "evaluation.json").read_text()) for workdir in (video, action)]

    return run


@pytest.mark.parametrize("delay", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(6,), (1, 6), (6, 1, 1)])
def test_rlds(use, tmp_path, lengths, delay):
    video, action = use(rlds(tmp_path, train=lengths, val=lengths), 3, data={"action_delay": delay})
    print(video["psnr"], action["open_loop"])


def test_lerobot(use, launch, tmp_path):
    source = formats.write_lerobot(tmp_path / "demo", "v3.0", (1, 6))
    launch("import_dataset", "--source_format=lerobot", f"--source={source}", f"--out={tmp_path}", "--image_size=16x32")
    changes = {"decoder": {"action_dim": 3}, "data": {"validation_split": "train"}}
    use(tmp_path / "demo" / "1.0.0", 3, **changes)
