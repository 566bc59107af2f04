import dataclasses
import io
import json
import os
import pickle
import re
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image
from synthetic import step_episode
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import writers
from data_pipelines.sources import index as index_module
from data_pipelines.sources.records import RecordWriter, open_records
from data_pipelines.sources.rlds import DatasetError, RldsSource, SplitError, decode_image
from data_pipelines.writers import SplitSize, shard_path, write_metadata, write_rlds
from mimic_video.transforms import resize_images

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


def edit_records(path, change, file_format="array_record"):
    """Applies `change` to the tf.Example of every record of the only shard of `train`; checksums stay right."""
    (shard,) = path.glob("*train*")
    file = open_records(str(shard), file_format)
    records = [tf_example_pb2.Example.FromString(bytes(file.read(i))) for i in range(len(file))]
    with RecordWriter(shard, file_format) as writer:
        for index, record in enumerate(records):
            change(index, record.features.feature)
            writer.write(record.SerializeToString())


@pytest.fixture(params=["array_record", "tfrecord"])
def rlds(tmp_path, request):
    """The dataset of conftest.py in both formats."""
    splits = {"train": [step_episode(n, episode=e) for e, n in enumerate((12, 20, 15))], "val": [step_episode(14, episode=3)]}
    return write_rlds(
        tmp_path,
        "steps_demo",
        splits,
        control_hz=10.0,
        image_size=SIZE,
        description="Steps that count.",
        file_format=request.param,
    )


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


SLICES = ["train[:2]", "train[1:]", "train[-1:]", "train[1:-1]", "train[:50%]", "train[34%:67%]", "train[2:]+train[:1]"]


@pytest.mark.parametrize("text", SLICES)
def test_slices_are_of_episodes_in_stored_order(rlds, text):
    whole, part = RldsSource(rlds, "train"), RldsSource(rlds, text)
    instructions = tfds.builder_from_directory(rlds).info.splits[text].file_instructions
    expected = [n for each in instructions for n in range(each.skip, each.skip + each.take)]  # of the only shard
    assert list(part.numbers) == expected and len(part) == len(expected)
    for index, number in enumerate(expected):
        episode, same = part[index], whole[number]
        assert episode.name == same.name == f"{rlds} split 'train' episode {number}"
        for field in ("timestamps", "actions", "proprio"):
            np.testing.assert_array_equal(getattr(episode, field), getattr(same, field))
        np.testing.assert_array_equal(episode.frames.take([5, 0]), same.frames.take([5, 0]))
    assert part.name == f"{rlds} split '{text}'" and part[-1].name == part[len(part) - 1].name
    again = pickle.loads(pickle.dumps(part))
    assert [episode.name for episode in again] == [episode.name for episode in part]
    with pytest.raises(IndexError, match=f"has {len(part)} episodes"):
        part[len(part)]


@pytest.mark.reference
@pytest.mark.parametrize("text", SLICES)
def test_tfds_reads_the_same_episodes(rlds, text):
    builder = tfds.builder_from_directory(rlds)
    if "array_record" in builder.info.file_format.value:
        episodes = [[step["action"] for step in episode["steps"]] for episode in builder.as_data_source(text)]
    else:
        read = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = tfds.as_numpy(builder.as_dataset(split=text, read_config=read, shuffle_files=False))
        episodes = [[step["action"] for step in episode["steps"]] for episode in dataset]
    source = RldsSource(rlds, text)
    assert len(episodes) == len(source)
    for theirs, ours in zip(episodes, source, strict=True):
        np.testing.assert_array_equal(np.stack(theirs), ours.actions)


def test_slices_over_several_shards(tmp_path, monkeypatch, make_episode):
    monkeypatch.setattr(writers, "_EPISODES_PER_SHARD", 1)
    options = {"control_hz": 10.0, "image_size": SIZE, "description": ""}
    path = write_rlds(tmp_path, "many", {"train": [make_episode(3 + e, episode=e) for e in range(5)]}, **options)
    assert len(list(path.glob("*train*"))) == 5
    assert [len(episode) for episode in RldsSource(path, "train[1:4]")] == [4, 5, 6]
    assert [len(episode) for episode in RldsSource(path, "train[-20%:]")] == [7]


def test_nothing_of_other_episodes_is_read_but_their_place_in_the_index(rlds, monkeypatch):
    RldsSource(rlds, "train")
    read = []

    def noted(self, record, path, steps):
        read.append(record)
        return encoded(self, record, path, steps)

    encoded = RldsSource.encoded
    monkeypatch.setattr(RldsSource, "encoded", noted)
    monkeypatch.setattr(index_module, "_index_shard", None)  # slices share the index of their split
    source = RldsSource(rlds, "train[1:2]")
    for episode in source:
        episode.frames.take([0, 3])
    assert set(read) == {1}


def test_damage_elsewhere_does_not_matter(rlds):
    def change(index, features):
        if index != 1:
            features["steps/action"].float_list.value[0] = np.nan

    edit_records(rlds, change, "tfrecord" if list(rlds.glob("*tfrecord*")) else "array_record")
    assert len(RldsSource(rlds, "train[1:2]")[0]) == 20
    with pytest.raises(DatasetError, match=r"split 'train\[2:\]': none of its 1 episodes can be read; .*'train' episode 2: "):
        RldsSource(rlds, "train[2:]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train[:4]", r"cannot be read: 'train\[:4\]' is beyond its 3 episodes; expected bounds from -3 to 3$"),
        ("train[-4:]", r"cannot be read: 'train\[-4:\]' is beyond its 3 episodes; expected bounds from -3 to 3$"),
        ("train[:2]+train[3:9]", r"cannot be read: 'train\[3:9\]' is beyond its 3 episodes; expected bounds from -3 to 3$"),
        ("train[2:2]", r"cannot be read: 'train\[2:2\]' has none of 3 episodes; expected a slice with one or more$"),
        ("train[:10%]", r"cannot be read: 'train\[:10%\]' has none of 3 episodes; expected a slice with one or more$"),
        (
            "train[:10",
            r"cannot be read; expected the name of a split such as 'train', or slices of one by episodes: 'train\[:50\]'",
        ),
    ],
)
def test_slices_that_cannot_be_read(rlds, text, message):
    with pytest.raises(SplitError, match=rf"^split '{re.escape(text)}' of {rlds} {message}"):
        RldsSource(rlds, text)


def test_a_slice_of_a_split_that_is_not_there(rlds):
    with pytest.raises(DatasetError, match=r"no split 'test'; it has train, val"):
        RldsSource(rlds, "test[:1]")


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
    episode = RldsSource(rlds, "train")[1]
    with pytest.raises(DatasetError, match="record 1: feature 'steps/observation/image_wrist': it is missing"):
        episode.further_cameras["wrist"].take([0])
    edit_features(rlds, lambda top, steps: steps[ACTION]["tensor"]["shape"].update(dimensions=["7"]))
    with pytest.raises(DatasetError, match=r"none of its 3 episodes can be read.*record 2: feature 'steps/action' is not what"):
        RldsSource(rlds, "train")


def test_damaged_records_name_the_episode(rlds):
    shard = next(rlds.glob("*train*"))
    data = bytearray(shard.read_bytes())
    data[200] ^= 0xFF  # inside the first record
    shard.write_bytes(data)
    if "array_record" in shard.name:
        with pytest.raises(DatasetError, match=rf"train' episode 0 cannot be read: shard .*{shard.name}, record 0"):
            RldsSource(rlds, "train")[0]
    else:
        with pytest.raises(DatasetError, match=rf"{shard.name}, record 0: its checksum does not match"):
            RldsSource(rlds, "train")[0].frames.take([2])
    assert RldsSource(rlds, "train")[1].frames.take([2]).shape == (1, *SIZE, 3)


def test_values_that_are_not_finite_name_the_step(rlds):
    def change(index, features):
        if index == 1:
            features["steps/action"].float_list.value[2 * 7 + 1] = np.nan

    edit_records(rlds, change, "tfrecord" if list(rlds.glob("*tfrecord*")) else "array_record")
    source = RldsSource(rlds, "train")
    assert len(source[0]) == 12
    with pytest.raises(DatasetError, match=r"episode 1: 'steps/action' of step 7 is \[107\.5, nan\]; expected finite"):
        source[1]


def test_an_empty_split(rlds):
    info = json.loads((rlds / "dataset_info.json").read_text())
    next(split for split in info["splits"] if split["name"] == "val")["shardLengths"] = ["0"]
    (rlds / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="split 'val' has no episodes"):
        RldsSource(rlds, "val")


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


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda top, steps: observation(steps).pop(IMAGE),
            r"no feature 'steps/observation/image_primary'; expected a uint8 Image",
        ),
        (lambda top, steps: observation(steps)[IMAGE]["image"].pop("shape"), r"image_primary' is Image.*None"),
        (
            lambda top, steps: observation(steps).update({IMAGE: steps[ACTION]}),
            r"image_primary' is Tensor.*expected a uint8 Image",
        ),
        (lambda top, steps: steps[ACTION]["tensor"]["shape"].update(dimensions=["2", "2"]), r"action' is Tensor\(shape=\(2, 2\)"),
        (lambda top, steps: steps[ACTION]["tensor"].update(dtype="int32"), r"steps/action' is Tensor.*int32.*floating"),
        (lambda top, steps: steps.pop("language_instruction"), r"no feature 'steps/language_instruction'"),
        (lambda top, steps: top.pop("steps"), r"no feature 'steps/observation/image_primary'"),
    ],
)
def test_feature_errors_name_the_feature(rlds, change, message):
    edit_features(rlds, change)
    with pytest.raises(DatasetError, match=message):
        RldsSource(rlds, "train")


def test_shard_errors_name_the_file(rlds):
    (shard,) = rlds.glob("*train*")
    data = shard.read_bytes()
    cut_record = "record [012]: the file of [0-9]+ bytes ends within it"
    for cut in (0, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:cut])
        expected = cut_record if cut and "tfrecord" in shard.name else "is truncated or damaged: it has 0 of its 3 records"
        with pytest.raises(DatasetError, match=rf"{shard.name},? {expected}"):
            RldsSource(rlds, "train")
    shard.unlink()
    with pytest.raises(DatasetError, match=f"{shard.name} is missing"):
        RldsSource(rlds, "train")
    assert len(RldsSource(rlds, "val")) == 1


def test_broken_images_name_the_step(rlds):
    file_format = "tfrecord" if list(rlds.glob("*tfrecord*")) else "array_record"

    def change(index, features):
        images = features["steps/observation/image_primary"].bytes_list.value
        images[4] = images[4][:-100]
        images[6] = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
        del images[10:]

    edit_records(rlds, change, file_format)
    episode = RldsSource(rlds, "train")[2]
    with pytest.raises(DatasetError, match="episode 2: image_primary of step 4 cannot be decoded"):
        episode.frames.take([3, 4])
    with pytest.raises(DatasetError, match=r"episode 2: image_primary of step 6 is \(8, 8\), not \(16, 32\)"):
        episode.frames.take([6])
    with pytest.raises(DatasetError, match="record 2: feature 'steps/observation/image_primary' has 10 of its 15 images"):
        episode.frames.take([9, 10])
    with pytest.raises(IndexError, match="15 steps; frames 3 to 15"):
        episode.frames.take([3, 15])
    assert episode.frames.take([3, 5]).shape == (2, *SIZE, 3) and episode.frames.take([]).shape == (0, *SIZE, 3)


def test_frames_are_resized_when_they_are_taken(rlds):
    whole, small = (RldsSource(rlds, "train", image_size=size)[1].frames.take([5, 9]) for size in (None, (8, 12)))
    np.testing.assert_array_equal(small, resize_images(whole, (8, 12)))
    assert RldsSource(rlds, "train", image_size=(8, 12)).image_size == (8, 12)


def test_a_source_may_be_pickled_and_its_values_are_mapped(rlds):
    source = RldsSource(rlds, "train")
    frames = source[1].frames.take([4])
    other = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(other[1].frames.take([4]), frames)
    assert len(pickle.dumps(source)) < 5000 and isinstance(source[1].actions.base, np.memmap)


def test_where_the_index_is_kept(rlds, tmp_path):
    RldsSource(rlds, "train", cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1 and not (rlds / ".mimic_video_index").exists()
    RldsSource(rlds, "train")
    moved = rlds.rename(tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in (moved / ".mimic_video_index").rglob("*")}
    assert len(RldsSource(moved, "train")) == 3
    assert {path: path.stat().st_mtime_ns for path in (moved / ".mimic_video_index").rglob("*")} == before


def test_remote_datasets(tmp_path, make_episode):
    splits = {"train": [make_episode(6), make_episode(8, episode=1)]}
    options = {"control_hz": 10.0, "image_size": SIZE, "description": ""}
    path = write_rlds(tmp_path, "far", splits, file_format="tfrecord", **options)
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/datasets/far", recursive=True)
    source, local = RldsSource("memory://datasets/far", "train", cache_dir=tmp_path / "cache"), RldsSource(path, "train")
    assert len(source) == 2 and source[1].instruction == "do task 1"
    np.testing.assert_array_equal(source[1].actions, local[1].actions)
    np.testing.assert_array_equal(source[1].frames.take([7, 2]), local[1].frames.take([7, 2]))
    with pytest.raises(DatasetError, match=r"memory://datasets is not a prepared dataset: it has no dataset_info\.json"):
        RldsSource("memory://datasets", "train")
    arrays = write_rlds(tmp_path, "arrays", splits, file_format="array_record", **options)
    memory.put(str(arrays), "/datasets/arrays", recursive=True)
    with pytest.raises(DatasetError, match="ArrayRecord files are read from local or mounted paths only"):
        RldsSource("memory://datasets/arrays", "train", cache_dir=tmp_path / "cache")


def test_jpegs_decode_as_pillow_does():
    rng = np.random.default_rng(0)
    image = resize_images(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (48, 61))
    for mode, options in (("RGB", {"quality": 85}), ("RGB", {"quality": 95, "subsampling": 0}), ("L", {"quality": 75})):
        file = io.BytesIO()
        Image.fromarray(image).convert(mode).save(file, "JPEG", **options)
        expected = np.asarray(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(decode_image(file.getvalue()), expected)
        np.testing.assert_array_equal(
            decode_image(memoryview(file.getvalue()), (48, 61), (20, 10)), resize_images(expected, (20, 10))
        )
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    np.testing.assert_array_equal(decode_image(file.getvalue()), image)
    for broken in (b"", b"\xff\xd8", file.getvalue()[:50], b"no image"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_image(broken)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of a dataset that is not ours."""

    primary: str | None = "image_0"
    secondary: str | None = "image_1"
    wrist: str | None = "not_there"
    language: str | None = "observation/instruction"
    control_hz: float = 5.0
    columns: tuple[str, ...] = ("steps/action", "steps/observation/state/pose", "steps/open")
    action_layout: str = "delta"

    def standardise(self, columns):
        assert {path: values.dtype.name for path, values in columns.items()} == {
            "steps/action": "float64",
            "steps/observation/state/pose": "float32",
            "steps/open": "bool",
        }
        if columns["steps/open"].all():
            raise ValueError("the gripper never closes")
        pose = columns["steps/observation/state/pose"].reshape(len(columns["steps/open"]), -1)
        return np.concatenate([pose, columns["steps/open"][:, None]], axis=1), columns["steps/action"][:, :2]


def write_foreign(folder, file_format, lengths):
    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {
                        "image_0": tfds.features.Image(shape=(6, 8, 3), encoding_format="png"),
                        "image_1": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "state": {"pose": tfds.features.Tensor(shape=(2, 2), dtype=np.float32)},
                        "instruction": tfds.features.Tensor(shape=(16,), dtype=np.int32),
                    },
                    "action": tfds.features.Tensor(shape=(3,), dtype=np.float64),
                    "open": tfds.features.Scalar(np.bool_),
                }
            ),
        }
    )

    def image(kind, size, value):
        file = io.BytesIO()
        Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, kind)
        return io.BytesIO(file.getvalue())

    with RecordWriter(shard_path(folder, "foreign", "train", file_format, 0), file_format) as writer:
        for number, length in enumerate(lengths):
            words = np.zeros(16, np.int32)
            words[:6] = list(f"lift {number}".encode())
            writer.write(
                features.serialize_example(
                    {
                        "steps": [
                            {
                                "observation": {
                                    "image_0": image("PNG", (6, 8), k),
                                    "image_1": image("JPEG", (10 + k, 4), k),
                                    "state": {"pose": np.full((2, 2), k, np.float32)},
                                    "instruction": words,
                                },
                                "action": np.full(3, 10 * number + k, np.float64),
                                "open": bool(k % 2) or number == 2,
                            }
                            for k in range(length)
                        ]
                    }
                )
            )
    write_metadata(
        folder, "foreign", "1.0.0", features, {"train": SplitSize([len(lengths)], 0)}, file_format=file_format, description=""
    )


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_other_layouts_are_read_through_their_spec(tmp_path, file_format):
    write_foreign(tmp_path, file_format, (4, 7, 3))
    with pytest.raises(DatasetError, match=r"'steps/observation/image_1' is Image.*expected a uint8 Image of a fixed"):
        RldsSource(tmp_path, "train", spec=Layout(), cameras=("secondary",))
    assert set(RldsSource(tmp_path, "train", spec=Layout())[0].cameras) == {"primary"}
    source = RldsSource(tmp_path, "train", spec=Layout(), image_size=(12, 6))
    assert (len(source), source.proprio_dim, source.action_dim, source.control_hz) == (3, 5, 2, 5.0)
    episode = source[1]
    assert (episode.instruction, episode.action_layout, len(episode)) == ("lift 1", "delta", 7)
    assert episode.timestamps[-1] == 6 / 5.0
    np.testing.assert_array_equal(episode.proprio[3], np.float32([3, 3, 3, 3, 1]))
    np.testing.assert_array_equal(episode.actions[3], np.float32([13, 13]))
    assert episode.actions.dtype == np.float32 and set(episode.further_cameras) == {"secondary"}
    np.testing.assert_array_equal(episode.frames.take([5]), np.full((1, 12, 6, 3), 5))
    np.testing.assert_allclose(episode.further_cameras["secondary"].take([6]), np.full((1, 12, 6, 3), 6), atol=1)
    with pytest.raises(DatasetError, match="train' episode 2: the gripper never closes"):
        source[2]
    assert RldsSource(tmp_path, "train", spec=Layout(), image_size=(12, 6), control_hz=2.0)[0].timestamps[1] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"primary": None}, "its spec names no primary camera"),
        ({"primary": "image"}, "no feature 'steps/observation/image'"),
        ({"columns": ("steps/actions",)}, "no feature 'steps/actions'; expected a Tensor of numbers of a fixed shape"),
        ({"columns": ("steps/observation/image_0",)}, "'steps/observation/image_0' is Image.*expected a Tensor of numbers"),
        ({"columns": ("action",)}, "'action' is not a feature of steps"),
        ({"language": "instruction"}, "no feature 'steps/instruction'; expected a Text"),
        ({"language": "action"}, "'steps/action' is Tensor.*expected a Text"),
    ],
)
def test_specs_that_do_not_fit_name_the_feature(tmp_path, change, message):
    write_foreign(tmp_path, "tfrecord", (4,))
    with pytest.raises(DatasetError, match=message):
        RldsSource(tmp_path, "train", spec=dataclasses.replace(Layout(), **change), image_size=SIZE)


def test_a_spec_without_columns_or_language_is_video(tmp_path):
    write_foreign(tmp_path, "tfrecord", (4, 5))

    class Video(Layout):
        def standardise(self, columns):
            return None, None

    episode = RldsSource(tmp_path, "train", spec=Video(secondary=None, columns=(), language=None))[1]
    assert (len(episode), episode.instruction, episode.actions, episode.proprio) == (5, "", None, None)


def test_reading_and_writing_never_import_tensorflow(rlds, tmp_path):
    """A TensorFlow that refuses to be imported stands first on the path, so an attempt fails even where none is installed."""
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('TensorFlow was imported')")
    code = f"""
import sys
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds
episodes = list(RldsSource({str(rlds)!r}, "train"))
assert episodes[1].frames.take([1]).shape == (1, 16, 32, 3)
options = dict(control_hz=10.0, image_size=(8, 8), description="")
for kind in ("tfrecord", "array_record"):
    write_rlds({str(tmp_path)!r}, kind, dict(train=episodes), file_format=kind, **options)
assert "tensorflow" not in sys.modules
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(trap.parent), root])}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
@pytest.mark.parametrize("profile", [None, b"\xff\xda" * 99])  # bytes as of a scan, before or behind the EXIF data
def test_images_are_turned_as_exif_says(orientation, turns, profile):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = resize_images(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8), (16, 32))
    Image.fromarray(image).save(file, "JPEG", exif=exif, icc_profile=profile)
    stored = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(decode_image(file.getvalue()), np.rot90(stored, turns))
    if turns % 2:
        with pytest.raises(ValueError, match=r"is \(32, 16\), not \(16, 32\)"):
            decode_image(file.getvalue(), (16, 32))


def test_images_of_more_than_8_bits_are_not_clipped():
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8), 1000, np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="cannot be decoded: its pixels are of the mode I;16; expected 8 bits a channel"):
        decode_image(file.getvalue())
