"""Datasets at the edge: one episode, an episode of one step, chunks that are padding but for one action, no instruction."""

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


@pytest.fixture
def use(launch, one_device, config_file, tmp_path, monkeypatch):
    """use(dataset, evaluated, **changes): trains both stages, exports the policy, plans; evaluations of some of the stages."""
    monkeypatch.setattr(SIMULATORS, "_parts", dict(SIMULATORS._parts))
    shutil.copy(OWN, tmp_path / "my_simulator.py")
    monkeypatch.syspath_prepend(tmp_path)

    def run(dataset, evaluated, **changes):
        data = {"video_dataset": str(dataset), "action_dataset": str(dataset), **changes.pop("data", {})}
        runs = {stage: tmp_path / stage for stage in ("video", "action")}
        for stage, workdir in runs.items():
            backbone = {"backbone_run": str(runs["video"])} if stage == "action" else {}
            file = config_file(tiny.experiment(stage=stage, data=data, evaluation=EVALUATION, train=TRAIN, **backbone, **changes))
            file.write_text(f"import my_simulator\n{file.read_text()}")
            message = launch("train", f"--config={file}", f"--workdir={workdir}")
            assert (workdir / "metrics.jsonl").exists(), message
            *_, last = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
            assert last["step"] == 2 and last["loss"] > 0 and np.isfinite(list(last.values())).all()
            if stage in evaluated:
                message = launch("evaluate", f"--config={file}", f"--workdir={workdir}", "--recorded=1")
                assert (workdir / "evaluation.json").exists(), message
        assert "wrote" in launch("export", f"--workdir={runs['action']}", f"--out={tmp_path / 'bundle'}")
        observation = np.zeros((1, 5, *tiny.SIZE, 3), np.uint8), np.zeros((1, 3), np.float32), [""]
        chunk = Policy.load(runs["action"])(*observation)
        assert np.isfinite(chunk).all()
        np.testing.assert_array_equal(Policy.load(tmp_path / "bundle")(*observation), chunk)
        return [json.loads((runs[stage] / "evaluation.json").read_text()) for stage in evaluated]

    yield run
    sys.modules.pop("my_simulator", None)


def test_rlds(use, tmp_path):
    """A window of the one step has one action; of the only other episode, one window has all of its frames."""
    splits = {split: [dataclasses.replace(tiny.episode(n, n), instruction="") for n in (1, 9)] for split in ("train", "val")}
    data = write_rlds(tmp_path, "small", splits, control_hz=10.0, image_size=tiny.SIZE, description="")
    video, action = use(data, ("video", "action"), data={"action_delay": 0.0})
    assert len(video["psnr"]) == 4 and max(video["psnr"]) < 30 and video["samples"] == [""] * 16
    assert len(action["open_loop"]["rmse_per_step"]) == 4 and action["open_loop"]["windows"] == 3


def test_lerobot(use, launch, tmp_path, monkeypatch):
    """One episode, which is also what is validated on."""
    monkeypatch.setattr(formats, "TASKS", ("", ""))
    source = formats.write_lerobot(tmp_path / "demo", "v2.1", (9,))
    out = tmp_path / "out"
    launch("import_dataset", "--source_format=lerobot", f"--source={source}", f"--out={out}", "--image_size=16x32")
    use(out / "demo" / "1.0.0", ("video",), decoder={"action_dim": 3}, data={"validation_split": "train"})
