import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.sources.rlds import DatasetError, RldsSource
from data_pipelines.writers import write_rlds

SIZE = (16, 32)
IMAGE, PROPRIO, ACTION = "image_primary", "proprio", "action"


def edit_features(path, change):
    file = path / "features.json"
    tree = json.loads(file.read_text())
    top = tree["featuresDict"]["features"]
    change(top, top["steps"]["sequence"]["feature"]["featuresDict"]["features"])
    file.write_text(json.dumps(tree))


def observation(steps):
    return steps["observation"]["featuresDict"]["features"]


def test_episodes_come_back(rlds, make_episode):
    source = RldsSource(rlds, "train")
    assert (len(source), source.action_dim, source.proprio_dim, source.image_size) == (3, 2, 3, SIZE)
    episode, written = source[1], make_episode(20, episode=1)
    np.testing.assert_array_equal(episode.timestamps, np.arange(20) / 10.0)
    np.testing.assert_array_equal(episode.actions, written.actions)
    np.testing.assert_array_equal(episode.proprio, written.proprio)
    assert episode.instruction == "do task 1" and episode.actions.dtype == np.float32
    np.testing.assert_allclose(episode.frames.take([19, 3]), written.frames.take([19, 3]), atol=1)
    assert [len(e) for e in source] == [12, 20, 15] and len(source[-1]) == 15
    with pytest.raises(IndexError, match="3 episodes"):
        source[3]


def test_rates_that_float32_rounds(tmp_path, make_episode):
    path = write_rlds(tmp_path, "odd", {"train": [make_episode(9, hz=3.3)]}, control_hz=3.3, image_size=SIZE, description="")
    np.testing.assert_allclose(RldsSource(path, "train")[0].timestamps, np.arange(9) / 3.3, atol=1e-6)


def test_control_hz_may_be_missing_from_the_dataset(rlds):
    edit_features(rlds, lambda top, steps: top.pop("episode_metadata"))
    with pytest.raises(DatasetError, match="pass control_hz"):
        RldsSource(rlds, "train")
    assert RldsSource(rlds, "train", control_hz=4.0)[0].timestamps[1] == 0.25


def test_the_datasets_own_control_hz_wins(rlds):
    assert RldsSource(rlds, "train", control_hz=4.0)[0].timestamps[1] == 0.1


def test_action_free(rlds):
    edit_features(rlds, lambda top, steps: (steps.pop(ACTION), observation(steps).pop(PROPRIO)))
    source = RldsSource(rlds, "train")
    assert source.action_dim is source.proprio_dim is source[0].actions is source[0].proprio is None


def test_records_that_contradict_the_features_name_the_episode(rlds):
    edit_features(rlds, lambda top, steps: observation(steps).update(image_wrist=observation(steps)[IMAGE]))
    with pytest.raises(DatasetError, match="train' episode 1 cannot be read"):
        RldsSource(rlds, "train")[1]


def test_damaged_records_name_the_episode(rlds):
    (shard,) = rlds.glob("*train*array_record*")
    data = bytearray(shard.read_bytes())
    data[200] ^= 0xFF  # inside the first record
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match="train' episode 0 cannot be read"):
        RldsSource(rlds, "train")[0]
    assert len(RldsSource(rlds, "train")[1]) == 20


def test_directory_errors(rlds, tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere does not exist$"):
        RldsSource(tmp_path / "nowhere", "train")
    with pytest.raises(DatasetError, match=r"no dataset_info\.json"):
        RldsSource(rlds.parent, "train")
    with pytest.raises(DatasetError, match=r"no split 'test'; it has train, val"):
        RldsSource(rlds, "test")
    half = rlds.rename(rlds.with_name("incomplete.ABC123_1.0.0"))
    with pytest.raises(DatasetError, match=r"1\.0\.0 does not exist; it was half-written .*incomplete\.ABC123"):
        RldsSource(rlds, "train")
    with pytest.raises(DatasetError, match="half-written"):
        RldsSource(half, "train")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_missing_and_broken_metadata(rlds, file):
    (rlds / file).write_text("{")
    with pytest.raises(DatasetError, match=r"1\.0\.0 is not a prepared dataset"):
        RldsSource(rlds, "train")
    (rlds / file).unlink()
    with pytest.raises(DatasetError, match=f"has no {file}"):
        RldsSource(rlds, "train")


@pytest.mark.parametrize("change, message", [
    (lambda top, steps: observation(steps).pop(IMAGE), r"no feature 'steps/observation/image_primary'; expected a uint8 Image"),
    (lambda top, steps: observation(steps)[IMAGE]["image"].pop("shape"), r"image_primary' is Image.*None"),
    (lambda top, steps: observation(steps).update({IMAGE: steps[ACTION]}), r"image_primary' is Tensor.*expected a uint8 Image"),
    (lambda top, steps: steps[ACTION]["tensor"]["shape"].update(dimensions=["2", "2"]), r"action' is Tensor\(shape=\(2, 2\)"),
    (lambda top, steps: steps[ACTION]["tensor"].update(dtype="int32"), r"steps/action' is Tensor.*int32.*floating"),
    (lambda top, steps: steps.pop("language_instruction"), r"no feature 'steps/language_instruction'"),
    (lambda top, steps: top.pop("steps"), r"no feature 'steps/observation/image_primary'"),
])
def test_feature_errors_name_the_feature(rlds, change, message):
    edit_features(rlds, change)
    with pytest.raises(DatasetError, match=message):
        RldsSource(rlds, "train")


def test_shard_errors_name_the_file(rlds):
    (shard,) = rlds.glob("*train*array_record*")
    data = shard.read_bytes()
    for cut in (0, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:cut])
        with pytest.raises(DatasetError, match=rf"{shard.name} is truncated or damaged: it has 0 of its 3 records"):
            RldsSource(rlds, "train")
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard.name} is missing"):
        RldsSource(rlds, "train")
    assert len(RldsSource(rlds, "val")) == 1


def test_broken_images_name_the_step(rlds, monkeypatch):
    episode = RldsSource(rlds, "train")[2]
    episode.frames._encoded[4] = episode.frames._encoded[4][:100]
    with pytest.raises(DatasetError, match="episode 2: image_primary of step 4 cannot be decoded"):
        episode.frames.take([3, 4])
    assert episode.frames.take([3, 5]).shape == (2, *SIZE, 3)


def test_reading_never_imports_tensorflow(rlds, tmp_path):
    """A TensorFlow that refuses to be imported stands first on the path, so an attempt fails even where none is installed."""
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('TensorFlow was imported')")
    code = f"""
import sys, numpy as np
from data_pipelines.loader import WindowDataset, make_batches
from data_pipelines.sources.rlds import RldsSource
from mimic_video.config import DataConfig
config = DataConfig(image_size={SIZE}, past_frames=1, future_frames=4, video_hz=10.0, action_horizon=4, control_hz=10.0)
dataset = WindowDataset(RldsSource({str(rlds)!r}, "train"), config, actions=True)
text = lambda _: np.zeros((1, 1), np.float32)
batch = next(make_batches(dataset, batch_size=2, seed=0, start_step=0, text=text, normalizers=None))
assert batch["video"].shape == (2, 5, 16, 32, 3)
assert "tensorflow" not in sys.modules
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(trap.parent), root])}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
