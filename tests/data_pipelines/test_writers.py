import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import writers
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds

SIZE = (16, 32)


def write(directory, splits, **options):
    return write_rlds(directory, "demo", splits, **{"control_hz": 10.0, "image_size": SIZE, "description": "A demo."} | options)


def test_plain_tfds_reads_it(tmp_path, make_source):
    path = write(tmp_path, {"train": make_source(12, 20, 15), "val": make_source(14)}, file_format="array_record")
    builder = tfds.builder_from_directory(path)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 3, "val": 1}
    assert builder.info.description == "A demo."
    episodes = list(builder.as_data_source("train"))
    assert [len(episode["steps"]) for episode in episodes] == [12, 20, 15]  # in the order given
    assert episodes[0]["episode_metadata"]["control_hz"] == np.float32(10)
    steps = list(episodes[1]["steps"])
    assert [bool(step["is_first"]) for step in steps] == [True] + 19 * [False]
    for flag in ("is_last", "is_terminal", "reward"):
        assert [float(step[flag]) for step in steps] == 19 * [0.0] + [1.0]
    assert {float(step["discount"]) for step in steps} == {1.0}
    assert steps[7]["language_instruction"] == b"do task 1"
    np.testing.assert_array_equal(steps[7]["action"], np.float32([107.5, 107.5]))
    np.testing.assert_array_equal(steps[7]["observation"]["proprio"], np.float32([107, 107, 107]))
    np.testing.assert_allclose(steps[7]["observation"]["image_primary"], np.full((*SIZE, 3), 28), atol=1)


@pytest.mark.reference
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_with_tensorflow_reads_it(tmp_path, make_episode, file_format):
    path = write(tmp_path, {"train": [make_episode(12), make_episode(20, episode=1)]}, file_format=file_format)
    # `as_dataset` of ArrayRecord is not implemented in tfds itself; its features must still decode under TensorFlow.
    # In a process of its own: TensorFlow does not survive being imported after some of the other tests' libraries.
    script = f"""
import tensorflow
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(path)!r})
if builder.info.file_format.value == "tfrecord":
    example = next(iter(builder.as_dataset("train", shuffle_files=False)))
else:
    source = builder.as_data_source("train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    example = builder.info.features.deserialize_example(source[0])
steps = list(example["steps"])
print([int(step["is_last"]) for step in steps], steps[3]["action"].numpy().tolist(), steps[3]["language_instruction"].numpy(),
      steps[3]["observation"]["image_primary"].shape, example["episode_metadata"]["action_layout"].numpy())
"""
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert child.stdout.splitlines()[-1] == f"{11 * [0] + [1]} [3.5, 3.5] b'do task 0' (16, 32, 3) b'vector'"


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_further_cameras_and_action_layouts_come_back(tmp_path, make_episode, file_format):
    pose = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), (5, 1))
    frames = [make_episode(5 + n).frames for n in range(3)]
    for n, camera in enumerate(frames):
        camera.frames = camera.frames[:5] + np.uint8(50 * n)
    whole = dataclasses.replace(
        make_episode(5),
        frames=frames[0],
        further_cameras={"wrist": frames[2], "secondary": frames[1]},
        proprio=pose,
        actions=pose,
        action_layout="pose",
    )
    source = RldsSource(write(tmp_path, {"train": [whole]}, file_format=file_format, image_size=(8, 16)), "train")
    episode = source[0]
    assert episode.action_layout == "pose" and set(episode.further_cameras) == {"secondary", "wrist"}
    for n, camera in enumerate((episode.frames, episode.further_cameras["secondary"], episode.further_cameras["wrist"])):
        np.testing.assert_allclose(camera.take([4]), np.full((1, 8, 16, 3), 16 + 50 * n), atol=1)
    with pytest.raises(ValueError, match=r"episode 0: dimensions are .*cameras=\(\)"):
        write(tmp_path / "other", {"train": [whole, dataclasses.replace(whole, further_cameras={}, name="episode 0")]})
    with pytest.raises(ValueError, match=r"episode 0: dimensions are .*action_layout='delta'"):
        write(tmp_path / "other", {"train": [whole, dataclasses.replace(whole, action_layout="delta")]})


def test_action_free(tmp_path, make_episode):
    path = write(tmp_path, {"train": [make_episode(6, action_free=True)]})
    steps = tfds.builder_from_directory(path).info.features["steps"]
    assert "action" not in steps.feature and set(steps["observation"]) == {"image_primary"}


def test_each_episode_is_on_disk_before_the_next_one_is_made(tmp_path, make_episode, monkeypatch):
    monkeypatch.setattr(writers, "_EPISODES_PER_SHARD", 1)
    shards = []

    def episodes():
        for e in range(4):
            (partial,) = (tmp_path / "demo").iterdir()
            assert partial.name.startswith("incomplete.")
            shards.append(len(list(partial.glob("*tfrecord*"))))
            yield make_episode(3, episode=e)

    write(tmp_path, {"train": episodes()})
    assert shards == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["1.0.0"]


def test_shards_and_bytes_are_deterministic(tmp_path, make_episode, monkeypatch):
    monkeypatch.setattr(writers, "_EPISODES_PER_SHARD", 2)
    paths = [write(tmp_path / folder, {"train": [make_episode(4, episode=e) for e in range(5)]}) for folder in "ab"]
    files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in paths]
    assert files[0] == files[1]
    assert sum("tfrecord" in name for name in files[0]) == 3
    assert [episode.actions[0, 0] for episode in RldsSource(paths[0], "train")] == [0.5, 100.5, 200.5, 300.5, 400.5]


def test_frames_are_resized_on_writing(tmp_path, make_episode):
    source = RldsSource(write(tmp_path, {"train": [make_episode(3)]}, image_size=(32, 16)), "train")
    assert source.image_size == (32, 16)
    assert source[0].frames.take([2]).shape == (1, 32, 16, 3)


def test_an_existing_dataset_is_kept(rlds, tmp_path, make_episode):
    with pytest.raises(FileExistsError, match=r"steps_demo/1\.0\.0 exists already"):
        write_rlds(tmp_path, "steps_demo", {"train": [make_episode(3)]}, control_hz=10.0, image_size=SIZE, description="")
    assert len(RldsSource(rlds, "train")) == 3


def test_an_interrupted_write_leaves_nothing(tmp_path, make_episode):
    def interrupted():
        yield make_episode(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {"train": interrupted()})
    assert list((tmp_path / "demo").iterdir()) == []


def test_mixed_episodes_and_other_mistakes_are_errors(tmp_path, make_episode):
    whole, free = make_episode(3, episode=0), make_episode(3, episode=1, action_free=True)
    with pytest.raises(ValueError, match="episode 1: dimensions"):
        write(tmp_path, {"train": [whole, free]})
    with pytest.raises(ValueError, match="episode 0: dimensions"):
        write(tmp_path, {"train": [free], "val": [whole]})
    with pytest.raises(ValueError, match=r"timestamps are not 20\.0 steps per second"):
        write(tmp_path, {"train": [whole]}, control_hz=20.0)
    with pytest.raises(ValueError, match="file_format is 'riegeli'; expected array_record or tfrecord"):
        write(tmp_path, {"train": [whole]}, file_format="riegeli")
    with pytest.raises(ValueError, match="control_hz is 0"):
        write(tmp_path, {"train": [whole]}, control_hz=0)
    with pytest.raises(ValueError, match="split 'val' has no episodes"):
        write(tmp_path, {"train": [whole], "val": iter(())})
    with pytest.raises(ValueError, match="at least one split"):
        write(tmp_path, {})
    shifted = dataclasses.replace(whole, timestamps=whole.timestamps + 3)
    assert RldsSource(write(tmp_path, {"train": [shifted]}), "train")[0].timestamps.tolist() == [0, 0.1, 0.2]


def test_few_frames_of_a_long_episode_are_decoded_at_a_time(tmp_path, make_episode):
    episode, taken = make_episode(300), []
    take = episode.frames.take
    episode.frames.take = lambda indices: (taken.append(len(indices)), take(indices))[1]
    source = RldsSource(write(tmp_path, {"train": [episode]}), "train")
    assert sum(taken) == 300 and max(taken) <= 128
    np.testing.assert_allclose(source[0].frames.take([0, 63, 299])[:, 0, 0, 0], [0, 252, 4 * 299 % 256], atol=1)


def test_rates_of_long_episodes(tmp_path, make_episode):
    episode = make_episode(1500, hz=0.7)
    rounded = dataclasses.replace(episode, timestamps=episode.timestamps.astype(np.float32).astype(np.float64))
    source = RldsSource(write(tmp_path, {"train": [rounded]}, control_hz=0.7), "train")
    np.testing.assert_allclose(source[0].timestamps, np.arange(1500) / 0.7, rtol=1e-6)


def test_a_tilde_is_the_home_directory_for_programs_too(monkeypatch, tmp_path, make_episode):
    monkeypatch.setenv("HOME", str(tmp_path))
    write = {"control_hz": 10.0, "image_size": SIZE, "description": ""}
    written = write_rlds("~/data", "tiny", {"train": [make_episode(5)]}, **write)
    assert written == tmp_path / "data" / "tiny" / "1.0.0"
    assert len(RldsSource("~/data/tiny/1.0.0", "train")[0]) == 5
