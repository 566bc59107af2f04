"""launch/explore.py: what it writes about a policy, and what it cannot look at."""

import json

import numpy as np
import pytest
import tiny

from data_pipelines.assembly import TrainingData
from data_pipelines.writers import write_rlds
from mimic_video import Policy
from mimic_video.media import read_frames
from mimic_video.runs import checkpoints


def recordings(folder, name, seed):
    splits = {"train": [tiny.episode(20, seed + 1)], "val": [tiny.episode(20, seed), tiny.episode(15, seed + 2)]}
    return str(write_rlds(folder, name, splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise."))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A policy of random networks."""
    folder = tmp_path_factory.mktemp("explored")
    data = {"action_dataset": recordings(folder, "tiny", 1)}
    config = tiny.experiment(data=data, train={"validation_batches": 1}, policy={"video_steps": 4})
    checkpoints.save_converted(folder / "run", config, tiny.params(config), TrainingData(config).open().robots())
    return folder / "run"


@pytest.mark.training
def test_a_run_and_its_bundle(run, launch, tmp_path):
    launch("export", f"--workdir={run}", f"--out={tmp_path / 'bundle'}")
    found = []
    for policy in (run, tmp_path / "bundle"):
        out = tmp_path / f"of_{policy.name}"
        printed = launch("explore", f"--policy={policy}", f"--out={out}", "--windows=3", "--draws=2")
        assert f"wrote {out}: 3 windows with 2 chunks each" in printed
        assert {path.name for path in out.iterdir()} == {"videos", "chunks.png", "errors.png", "explore.json"}
        assert read_frames(out / "videos" / "02.gif", 5.0, 20).shape[0] == 9
        found.append(json.loads((out / "explore.json").read_text()))
    assert found[0] == found[1]

    sampled, recorded = (np.array(found[0]["chunks"][name], np.float32) for name in ("sampled", "recorded"))
    assert sampled.shape == (3, 2, 4, 2) and np.ptp(sampled, axis=1).min() > 0
    config = Policy.load(run).config
    held_out = TrainingData(config).open().training.windows["tiny"]
    assert not any(np.array_equal(recorded[0], window["actions"]) for window in held_out)  # of another split
    np.testing.assert_allclose(found[0]["chunks"]["spread"], sampled.std(1).mean((0, 1)), rtol=1e-5)
    errors = found[0]["errors"]
    assert sorted({name.split("/")[1] for name in errors}) == ["generated_video", "ground_truth_video"]
    at_noise = [value for name, value in errors.items() if name.endswith(max(errors).split("/")[-1])]
    assert len(at_noise) == 2 and min(errors.values()) > 0


@pytest.mark.training
def test_other_recordings(run, launch, tmp_path):
    other = recordings(tmp_path, "other,one", 7)  # a name that a mixture would divide
    launch("explore", f"--policy={run}", f"--source={other}", f"--out={tmp_path / 'out'}", "--windows=1", "--draws=1")
    chunks = json.loads((tmp_path / "out" / "explore.json").read_text())["chunks"]
    episodes = [tiny.episode(20, 7), tiny.episode(15, 9)]
    actions = np.array(chunks["recorded"][0], np.float32)[chunks["action_mask"][0]]
    n = len(actions)
    assert n and any(np.array_equal(episode.actions[step : step + n], actions) for episode in episodes for step in range(20))
    assert chunks["spread"] == [0, 0]


def test_what_cannot_be_looked_at(run, launch, tmp_path):
    assert "nowhere" in launch("explore", "--policy=nowhere", f"--out={tmp_path / 'out'}")
    arguments = f"--policy={run}", f"--out={tmp_path / 'out'}"
    assert launch("explore", *arguments, f"--source={tmp_path}").startswith("error: ")
    assert "'franka'; this model has 'tiny'" in launch("explore", *arguments, "--embodiment=franka")
    assert not (tmp_path / "out").exists()
