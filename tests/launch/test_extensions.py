"""A tokenizer, a backbone, a simulator and a robot's dataset from outside of the package, each a short file beside an experiment.

Both stages are trained on them by the launch scripts, the policy is evaluated and exported.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import oxe_schemas
import pytest
import tensorflow_datasets as tfds
import tiny

from data_pipelines.oxe import registry
from mimic_video.config import to_dict
from mimic_video.policy.policy import Policy
from mimic_video.registry import BACKBONES, SIMULATORS, TOKENIZERS
from mimic_video.runs import directory

HERE = pathlib.Path(__file__).parents[1]
OWN = ("own_backbone", "own_dataset", "own_simulator", "own_tokenizer")
SIZE = (16, 24)
SETTINGS = {
    "data": {"image_size": SIZE, "past_frames": 3, "future_frames": 2, "action_horizon": 2, "action_delay": 0.2}
    | {
        "video_hz": 5.0,
        "control_hz": 5.0,
        "video_dataset": "point_robot",
        "action_dataset": "point_robot",
        "validation_split": "train",
    },
    "tokenizer": {"kind": "averages"},
    "backbone": {"kind": "means", "num_blocks": 3, "hidden_block": 2},
    "decoder": {"embodiments": 1},
    "train": {"steps": 3},
    "policy": {"execute_steps": 1},
    "evaluation": {"simulator": "point", "tasks": ("left",), "episodes_per_task": 2, "max_steps": 4, "workers": 1},
}


@pytest.mark.parametrize("name", OWN)
def test_each_is_short(name):
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= 60


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with those files, which are not imported yet."""
    for parts in (BACKBONES, SIMULATORS, TOKENIZERS):
        monkeypatch.setattr(parts, "_parts", dict(parts._parts))
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
        shutil.copy(HERE / f"{name}.py", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write_recordings(folder):
    """Two episodes of the robot, written by tfds, which needs TensorFlow for it."""
    random, number = np.random.default_rng(0), tfds.features.Tensor
    features = {
        "steps/observation/camera": tfds.features.Image(shape=(32, 40, 3), dtype=np.uint8, encoding_format="png"),
        "steps/observation/state": number(shape=(5,), dtype=np.float32),
        "steps/action": number(shape=(4,), dtype=np.float32),
        "steps/language_instruction": tfds.features.Text(),
    }

    def step(episode):
        values = [random.integers(0, 256, (32, 40, 3), np.uint8), *map(np.float32, map(random.standard_normal, (5, 4)))]
        return dict(zip(features, [*values, f"move {episode}"], strict=True))

    episodes = [({}, [step(episode) for _ in range(9)]) for episode in ("left", "right")]
    oxe_schemas.write_episodes(folder, "point_robot", features, episodes, "array_record")


def write_experiment(folder, stage, **fields):
    """A file as a user would write it: it imports what it names from files beside it."""
    values = to_dict(tiny.experiment(stage=stage)) | fields
    for group, changes in SETTINGS.items():
        values[group] |= changes
    values["data"]["root"] = str(folder)
    path = folder / f"{stage}.py"
    path.write_text(
        "\n".join(f"import {name}" for name in OWN)
        + f"\nimport ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n"
    )
    return path


def test_the_template_of_a_dataset_is_imported_as_its_text_says(launch, folder, monkeypatch):
    """An experiment beside a copy of it; there is no such recording here."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.delitem(sys.modules, "my_robot", raising=False)
    shutil.copy(HERE.parent / "configs" / "my_robot.py", folder)
    values = to_dict(tiny.experiment())
    values["data"] |= {"action_dataset": "my_robot", "root": str(folder)}
    (folder / "mine.py").write_text(
        f"import ml_collections\nimport my_robot\n\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n"
    )
    error = launch("train", f"--config={folder / 'mine.py'}", f"--workdir={folder / 'run'}")
    assert "my_robot" in error and str(folder) in error and "registered" not in error


@pytest.mark.training
def test_parts_of_ones_own_are_trained_evaluated_and_exported(launch, one_device, folder):
    write_recordings(folder)
    runs = {stage: folder / "runs" / stage for stage in ("video", "action")}
    for stage, run in runs.items():
        backbone = str(runs["video"]) if stage == "action" else ""
        launch("train", f"--config={write_experiment(folder, stage, backbone_run=backbone)}", f"--workdir={run}")
    assert list(directory.load_embodiments(runs["action"])) == ["point"]
    assert "left: " in launch("evaluate", f"--config={folder / 'action.py'}", f"--workdir={runs['action']}")
    assert len(json.loads((runs["action"] / "evaluation.json").read_text())["episodes"]) == 2
    launch("export", f"--workdir={runs['action']}", f"--out={folder / 'bundle'}")

    random = np.random.default_rng(1)
    observation = random.integers(0, 256, (1, 3, *SIZE, 3), np.uint8), np.zeros((1, 3), np.float32), ["move left"]
    run, bundle = (Policy.load(path)(*observation) for path in (runs["action"], folder / "bundle"))
    assert run.shape == (1, 2, 2) and np.isfinite(run).all()
    np.testing.assert_array_equal(bundle, run)
