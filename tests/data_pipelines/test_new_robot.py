"""What new_robot proposes for recordings of several kinds, and that what it writes opens."""

import io
import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import oxe_schemas
import pytest
import tensorflow_datasets as tfds
from foreign_formats import SIZE, TOP, WRIST, write_lerobot
from PIL import Image
from synthetic import step_episode

from data_pipelines.datasets import open_datasets
from data_pipelines.new_robot import Recording, Vector, locate, new_robot, propose, read_recording
from data_pipelines.oxe import registry
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.writers import write_rlds
from mimic_video.config import experiment_from

RECORDINGS = Path(__file__).parents[1] / "lerobot_recordings"
POSE = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def config_of(path, stage="action"):
    return experiment_from(runpy.run_path(str(path))["get_config"](stage).to_dict())


def edit_features(folder, change):
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info["features"])
    path.write_text(json.dumps(info))
    return folder


def texts(proposal):
    return [doubt.what for doubt in proposal.doubts]


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_recording_of_lerobot(tmp_path, capsys, version):
    path = new_robot(str(RECORDINGS / version), tmp_path / "mine.py")
    config = config_of(path)
    data = config.data
    assert data.action_dataset == data.video_dataset == version and data.cameras == ("primary", "wrist")
    assert (data.image_size, data.control_hz, data.video_hz) == ((48, 64), 10.0, 10.0)
    assert (data.past_frames, data.future_frames, data.action_horizon) == (5, 8, 8)  # half of the episodes last 1.3 s
    assert (config.decoder.action_dim, config.decoder.proprio_dim, config.text.rows) == (7, 7, 16)
    assert (data.train_split, config.train.validate_every) == ("train", 0)
    entry = registry.find(version)
    assert entry.robot == "so101" and [part.name for part in entry.actions.parts] == ["joints", "gripper"]
    read = np.load(RECORDINGS / f"{version}_read.npz")
    (windows,) = open_datasets(config, "train").windows.values()
    np.testing.assert_array_equal(np.concatenate([e.actions for e in windows.episodes]), read["action"])  # in the robot's units
    printed, written = capsys.readouterr().out, path.read_text()
    for doubt in ("3 episodes are too few to hold some out", "episodes are short"):
        assert f"  * {doubt}" in printed and f"* {doubt}" in written
    assert "# joint_0.pos: -3.106 to 2.346" in written and config_of(path, "video").stage == "video"
    with pytest.raises(FileExistsError, match=r"mine\.py exists; expected another --out"):
        new_robot(str(RECORDINGS / version), path)


def test_two_arms_with_four_cameras(tmp_path):
    cameras = [f"observation.images.cam_{name}" for name in ("high", "low", "left_wrist", "right_wrist")]
    folder = write_lerobot(tmp_path / "two arms", "v3.0", (55,) * 16, fps=30, cameras=cameras[:1])
    names = ["left_waist", "left_gripper", "right_gripper"]

    def change(features):
        features["action"]["names"] = {"motors": names}
        for camera in cameras[1:]:  # whose videos nobody opens for a proposal
            features[camera] = features[cameras[0]]

    edit_features(folder, change)
    proposal = propose(read_recording(folder))
    assert proposal.recording.name == "two_arms" and proposal.recording.robot == "so100"
    assert proposal.cameras == dict(zip(("primary", "secondary", "wrist"), cameras, strict=False))
    assert (proposal.train_split, proposal.validation_split, proposal.validated) == ("train[:-2]", "train[-2:]", True)
    assert (proposal.hz, proposal.video_hz, proposal.past_frames, proposal.future_frames) == (30.0, 10.0, 5, 12)
    assert proposal.action_horizon == 36 and proposal.image_size == SIZE
    kind, parts = proposal.parts["actions"]
    assert kind == "vector" and [(part.name, part.width) for part in parts] == [("joints", 1), ("gripper", 2)]
    assert [part.name for part in proposal.parts["proprio"][1]] == ["values"]  # x, y, z are no joints
    doubts = texts(proposal)
    assert "a sample has three cameras at most; observation.images.cam_right_wrist are left out" in doubts
    assert any(text.startswith("that 'observation.images.cam_high' is the primary camera") for text in doubts)


def test_names_that_tell_nothing(tmp_path):
    folder = write_lerobot(tmp_path / "unnamed", "v3.0", (40,), cameras=("observation.images.hand", "observation.images.gripper"))

    def change(features):
        features["action"]["names"] = None
        features["observation.state"]["names"] = {"motor_2": 2, "motor_1": 1, "motor_0": 0}

    proposal = propose(read_recording(edit_features(folder, change)))
    assert proposal.cameras == {"primary": "observation.images.hand", "wrist": "observation.images.gripper"}
    assert proposal.recording.state[0].names == ("motor_0", "motor_1", "motor_2")
    assert "nothing says what the 3 dimensions of actions are; they are taken as they are" in texts(proposal)
    assert not any("dimensions of proprio" in text for text in texts(proposal))


def poses(tmp_path, name, offset):
    """A recording of poses of 7 numbers whose actions are where the hand is, plus an offset."""
    folder = write_rlds_of(tmp_path, name, offset)
    recording = Recording(
        folder,
        "RLDS",
        name,
        name,
        {"image": SIZE},
        (Vector("observation/state", 7, tuple(POSE)),),
        (Vector("action", 7, tuple(POSE)),),
        "language_instruction",
        20.0,
        ("train",),
    )
    return propose(recording)


def write_rlds_of(tmp_path, name, offset, length=20):
    """One episode of another layout than ours; actions are where the hand is, plus an offset."""
    features = {
        "steps/observation/image": tfds.features.Image(shape=(*SIZE, 3), dtype=np.uint8, encoding_format="png"),
        "steps/observation/state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "steps/action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "steps/language_instruction": tfds.features.Text(),
    }
    state = np.random.default_rng(0).uniform(-1, 1, (length, 7)).astype(np.float32)
    black = io.BytesIO()
    Image.new("RGB", SIZE[::-1]).save(black, "png")  # tfds encodes arrays by TensorFlow
    steps = [
        dict(zip(features, (io.BytesIO(black.getvalue()), row, row + np.float32(offset), "do it"), strict=True)) for row in state
    ]
    return oxe_schemas.write_episodes(tmp_path, name, features, [({}, steps)], "array_record")


def test_poses_by_names_and_values(tmp_path):
    proposal = poses(tmp_path, "near", 0.01)
    for kind, parts in proposal.parts.values():
        assert kind == "pose" and [type(part).__name__ for part in parts] == ["Values", "Turn", "Gripper"]
        assert parts[1].encoding == "euler_xyz" and parts[1].column.endswith("[3:6]") and parts[2].closed < parts[2].open
    assert any("units" in doubt.what or "in metres" in doubt.what for doubt in proposal.doubts)
    far = poses(tmp_path, "far", 5.0)
    assert [kind for kind, _ in far.parts.values()] == ["vector", "vector"]
    assert any("displacements, taken as they are" in text for text in texts(far))


def test_rlds_of_others_needs_its_rate(tmp_path):
    folder = write_rlds_of(tmp_path, "some_arm", 0.0)
    guessed = propose(read_recording(folder))
    assert guessed.hz == 10.0 and "the recording does not tell its rate; 10 steps a second are a guess" in texts(guessed)
    assert propose(read_recording(folder), control_hz=5.0).hz == 5.0
    path = new_robot(str(folder.parent), tmp_path / "arm.py", control_hz=5.0)  # the newest version in it
    config = config_of(path)
    assert (config.data.control_hz, config.data.video_hz, config.decoder.action_dim) == (5.0, 5.0, 7)
    entry = registry.find("some_arm")
    assert (entry.primary, entry.language, entry.directory) == ("image", "language_instruction", str(folder))
    assert dict(entry.features) == {"observation/state": (7,), "action": (7,)}


def test_a_dataset_that_the_registry_knows(tmp_path):
    oxe_schemas.write(tmp_path, "bridge_orig", "array_record", episodes=2)
    path = new_robot(str(tmp_path / "bridge_orig"), tmp_path / "bridge.py")
    assert 'register(dataclasses.replace(find("bridge_orig"), name="bridge_orig_own", directory=' in path.read_text()
    (windows,) = open_datasets(config_of(path), "train").windows.values()
    assert windows.raw_dims == {"action": (3, 4, 5, 6, 7, 8), "proprio": (3, 4, 5, 6, 7, 8)}
    assert config_of(path).decoder.action_dim == 10


def test_our_own_layout(tmp_path):
    episodes = {
        "train": [step_episode(30, episode=e, wrist=True) for e in range(4)],
        "val": [step_episode(30, episode=9, wrist=True)],
    }
    write_rlds(tmp_path, "own_arm", episodes, control_hz=10.0, image_size=SIZE, description="", robot="arm")
    path = new_robot(str(tmp_path / "own_arm"), tmp_path / "own.py")
    config = config_of(path)
    assert (config.data.train_split, config.data.validation_split, config.train.validate_every) == ("train", "val", 200)
    assert config.data.cameras == ("primary", "wrist") and (config.decoder.action_dim, config.decoder.proprio_dim) == (2, 3)
    assert set(open_datasets(config, "val").windows) == {"own_arm"}


def test_videos_without_actions(tmp_path):
    folder = write_lerobot(tmp_path / "videos_only", "v2.1", (40,) * 3)
    edit_features(folder, lambda features: features.pop("action"))
    path = new_robot(str(folder), tmp_path / "videos.py")
    assert config_of(path, "video").stage == "video" and "it serves the stage `video` alone" in path.read_text()
    assert ":action" not in path.read_text().split('"""')[1]


def test_odd_names_are_written_as_they_are(tmp_path):
    folder = write_lerobot(tmp_path / 'Arm "7" \\ Öl', "v2.1", (40,), cameras=(TOP, WRIST))
    edit_features(folder, lambda features: features["action"].update(names=['a"""b', "c\\d", "Öl"]))
    path = new_robot(str(folder), tmp_path / "odd.py")
    assert registry.find("arm_7_l").directory == str(folder) and config_of(path).decoder.action_dim == 3


def test_episodes_that_are_damaged_or_too_short(tmp_path):
    folder = write_lerobot(tmp_path / "damaged_arm", "v2.1", (40, 40, 40))
    (folder / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    path = new_robot(str(folder), tmp_path / "damaged.py")
    assert config_of(path).data.skip_broken and "1 episodes cannot be read and are left out; the" in path.read_text()
    short = write_lerobot(tmp_path / "short", "v2.1", (3, 4))
    with pytest.raises(
        DatasetError, match=r"episodes have 3 to 4 steps at 10 a second; expected half of them .* 4 frames at 10 a"
    ):
        propose(read_recording(short))


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    folder = write_lerobot(tmp_path / "snapshot", "v3.0", (20,))
    asked = []

    class HfHubHTTPError(OSError):
        pass

    class LocalEntryNotFoundError(OSError):
        pass

    def snapshot_download(name, repo_type):
        asked.append((name, repo_type))
        if name != "somebody/so101":
            raise HfHubHTTPError("404:\nnot found")
        return str(folder)

    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    hub.snapshot_download, hub.errors = snapshot_download, errors
    errors.HfHubHTTPError, errors.LocalEntryNotFoundError = HfHubHTTPError, LocalEntryNotFoundError
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert locate("somebody/so101") == folder and asked == [("somebody/so101", "dataset")]
    with pytest.raises(DatasetError, match=r"there is no folder some/typo, and the Hugging Face Hub does not .*: 404: not found"):
        locate("some/typo")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DatasetError, match=r"Hugging Face Hub huggingface_hub is needed: pip install -e '\.\[hub\]'"):
        locate("somebody/so101")
    with pytest.raises(DatasetError, match=r"--source is '/data/nowhere'; expected a folder that is there, or OWNER/NAME"):
        locate("/data/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty has no dataset of a known format"):
        locate(str(tmp_path / "empty"))
