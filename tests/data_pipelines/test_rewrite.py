"""Prepared datasets in another form: what is kept, what changes, and what is checked."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from synthetic import step_episode

from data_pipelines import rewrite, writers
from data_pipelines.rewrite import Conversion, convert_rlds
from data_pipelines.sources.records import RecordWriter, open_records, parse_example
from data_pipelines.sources.rlds import DatasetError, RldsSource, open_dataset
from data_pipelines.writers import write_rlds
from mimic_video.transforms import resize_images

SIZE = (16, 32)
LENGTHS = (12, 20, 7, 1)


def two_cameras(length, number):
    episode = step_episode(length, episode=number)
    return dataclasses.replace(episode, further_cameras={"wrist": step_episode(length).frames})


@pytest.fixture(params=["tfrecord", "array_record"])
def source(tmp_path, monkeypatch, request):
    """Two shards of two episodes in `train` and one in `val`."""
    monkeypatch.setattr(writers, "_EPISODES_PER_SHARD", 2)
    splits = {"train": [two_cameras(n, e) for e, n in enumerate(LENGTHS)], "val": [two_cameras(5, 9)]}
    return write_rlds(
        tmp_path / "source", "demo", splits, control_hz=10.0, image_size=SIZE, description="A demo.", file_format=request.param
    )


def other_format(path):
    return "array_record" if open_dataset(path).file_format == "tfrecord" else "tfrecord"


def records(path, split="train"):
    """Every record of a split, as {key: list of bytes or array}."""
    dataset = open_dataset(path)
    for shard in dataset.shards(split):
        file = open_records(shard.path, dataset.file_format)
        for i in range(len(file)):
            features = parse_example(file.read(i)).items()
            yield {key: list(map(bytes, f.strings())) if f.is_bytes else f.numbers().tolist() for key, f in features}


def test_there_and_back_keeps_every_value(source, tmp_path):
    there = convert_rlds(source, tmp_path / "there", Conversion(other_format(source)))
    assert open_dataset(there).file_format == other_format(source) and there == tmp_path / "there" / "demo" / "1.0.0"
    assert list(records(there)) == list(records(source)) and len(list(records(there, "val"))) == 1
    back = convert_rlds(there, tmp_path / "back", Conversion(other_format(there)))
    assert list(records(back)) == list(records(source))
    assert (back / "features.json").read_bytes() == (source / "features.json").read_bytes()
    info = open_dataset(back).info
    assert info.description == "A demo." and info.splits["train"].shard_lengths == [2, 2]
    assert sorted(path.name for path in there.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_pieces_are_joined_again(source, tmp_path, processes):
    path = convert_rlds(source, tmp_path / "out", Conversion(other_format(source), chunk_steps=6), processes=processes)
    assert open_dataset(path).info.splits["train"].shard_lengths == [2 + 4, 2 + 1]
    read = list(records(path))
    assert [r["episode_metadata/continues"][0] for r in read] == [0, 1, 0, 1, 1, 1, 0, 1, 0]
    assert [len(r["steps/is_first"]) for r in read] == [6, 6, 6, 6, 6, 2, 6, 1, 1]
    assert [sum(r["steps/is_first"]) for r in read] == [1, 0, 1, 0, 0, 0, 1, 0, 1]
    before, after = RldsSource(source, "train"), RldsSource(path, "train")
    assert [len(episode) for episode in after] == list(LENGTHS)
    assert [len(episode) for episode in RldsSource(path, "train[1:3]")] == list(LENGTHS[1:3])  # of episodes, not of records
    for old, new in zip(before, after, strict=True):
        assert new.instruction == old.instruction
        for field in ("timestamps", "actions", "proprio"):
            np.testing.assert_array_equal(getattr(new, field), getattr(old, field))
        steps = [step for step in (0, 5, 6, 7, 18, 11) if step < len(old)]
        np.testing.assert_array_equal(new.frames.take(steps), old.frames.take(steps))
        wrist = [episode.further_cameras["wrist"].take(steps) for episode in (new, old)]
        np.testing.assert_array_equal(*wrist)


def test_pieces_may_be_cut_again(source, tmp_path):
    once = convert_rlds(source, tmp_path / "once", Conversion(chunk_steps=8))
    twice = convert_rlds(once, tmp_path / "twice", Conversion(chunk_steps=5))
    assert [len(episode) for episode in RldsSource(twice, "train")] == list(LENGTHS)
    whole = convert_rlds(once, tmp_path / "whole", Conversion("tfrecord"))
    assert [len(episode) for episode in RldsSource(whole, "train")] == list(LENGTHS)
    np.testing.assert_array_equal(RldsSource(twice, "train")[1].actions, RldsSource(source, "train")[1].actions)


def test_cameras_size_and_quality(source, tmp_path):
    path = convert_rlds(source, tmp_path / "out", Conversion(cameras=("image_primary",), image_size=(8, 24)))
    converted, original = RldsSource(path, "train"), RldsSource(source, "train")
    assert converted.image_size == (8, 24) and not converted[0].further_cameras
    assert not any("wrist" in key for record in records(path) for key in record)
    small = resize_images(original[1].frames.take([7, 19]), (8, 24))
    np.testing.assert_allclose(converted[1].frames.take([7, 19]), small, atol=2)
    same = convert_rlds(source, tmp_path / "same", Conversion(image_size=SIZE))
    assert list(records(same)) == list(records(source))
    poor = convert_rlds(source, tmp_path / "poor", Conversion(jpeg_quality=5))
    sizes = [sum(len(image) for r in records(p) for image in r["steps/observation/image_primary"]) for p in (source, poor)]
    assert sizes[1] < sizes[0]
    blind = convert_rlds(source, tmp_path / "blind", Conversion(cameras=()))
    assert {key for r in records(blind) for key in r if "image" in key} == set()


@pytest.mark.reference
def test_plain_tfds_reads_pieces(source, tmp_path):
    path = convert_rlds(source, tmp_path / "out", Conversion("tfrecord", chunk_steps=3, image_size=(8, 24)))
    script = f"""
import tensorflow_datasets as tfds
for record in tfds.builder_from_directory({str(path)!r}).as_dataset("val", shuffle_files=False):
    steps = list(record["steps"])
    print(bool(record["episode_metadata"]["continues"]), len(steps), steps[0]["observation"]["image_wrist"].shape)
"""
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert child.stdout.splitlines() == ["False 3 (8, 24, 3)", "True 2 (8, 24, 3)"]


def test_it_continues_where_it_was_interrupted(source, tmp_path, monkeypatch):
    original, seen = rewrite._verify, []

    def interrupted(plan, source, *rest):
        seen.append(source.path.rpartition("/")[2])
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(plan, source, *rest)

    monkeypatch.setattr(rewrite, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_rlds(source, tmp_path / "out", Conversion())
    (half,) = (tmp_path / "out" / "demo").iterdir()
    with pytest.raises(DatasetError, match="half-written"):
        open_dataset(half)
    done = []
    path = convert_rlds(source, tmp_path / "out", Conversion(), progress=lambda *state: done.append(state))
    assert seen[1] == seen[2] and len(seen) == 4 and seen[0] not in seen[1:]
    assert done == [("train", 1, 2), ("train", 2, 2), ("val", 1, 1)]
    assert list(records(path)) == list(records(source))
    with pytest.raises(FileExistsError, match=r"demo/1\.0\.0 exists already"):
        convert_rlds(source, tmp_path / "out", Conversion())


def test_what_was_written_is_compared_with_the_source(source, tmp_path, monkeypatch):
    original = rewrite._feature

    def wrong(values):
        feature = original(values)
        if feature.HasField("float_list") and len(feature.float_list.value) == 2 * 12:
            feature.float_list.value[3] += 1e-6
        return feature

    monkeypatch.setattr(rewrite, "_feature", wrong)
    with pytest.raises(DatasetError, match=r"records 0 to 0: 'steps/action' differs from record 0 of .*demo-train"):
        convert_rlds(source, tmp_path / "out", Conversion())
    monkeypatch.setattr(rewrite, "_feature", original)
    monkeypatch.setattr(rewrite.RecordWriter, "write", lambda self, record: None)
    with pytest.raises(DatasetError, match="has 0 records after writing 2"):
        convert_rlds(source, tmp_path / "out", Conversion())


def test_damaged_sources_name_the_record(source, tmp_path):
    shard = sorted(source.glob("*train*"))[1]
    data = bytearray(shard.read_bytes())
    data[200] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{shard.name}, record 0"):
        convert_rlds(source, tmp_path / "out", Conversion())
    assert not (tmp_path / "out" / "demo" / "1.0.0").exists()


def test_a_broken_image_names_the_step(source, tmp_path, monkeypatch):
    def decode(encoded, *arguments):
        raise ValueError("cannot be decoded: no")

    monkeypatch.setattr(rewrite, "decode_image", decode)
    with pytest.raises(DatasetError, match=r"record 0: .*image_(primary|wrist).* of step 0 cannot be decoded: no"):
        convert_rlds(source, tmp_path / "out", Conversion(jpeg_quality=50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "riegeli"}, "file_format is 'riegeli'"),
        ({"robot": "a/b"}, "robot is 'a/b'"),
        ({"image_size": (0, 3)}, r"image_size is \(0, 3\)"),
        ({"jpeg_quality": 101}, "jpeg_quality is 101; expected 1 to 100"),
        ({"chunk_steps": 0}, "chunk_steps is 0"),
    ],
)
def test_impossible_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Conversion(**options)


def test_features_that_cannot_be_converted_are_named(source, tmp_path):
    with pytest.raises(DatasetError, match=r"no image 'steps/observation/top'; it has steps/observation/image_primary, "):
        convert_rlds(source, tmp_path / "out", Conversion(cameras=("top",)))
    tree = json.loads((source / "features.json").read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["words"] = {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "sequence": {"feature": steps["reward"], "length": "-1"},
    }
    (source / "features.json").write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match="feature 'steps/words' has a length that varies from step to step"):
        convert_rlds(source, tmp_path / "out", Conversion(chunk_steps=3))
    assert len(RldsSource(convert_rlds(source, tmp_path / "out", Conversion()), "train")) == 4


def test_encoded_images_are_jpegs(source, tmp_path):
    path = convert_rlds(source, tmp_path / "out", Conversion(jpeg_quality=80))
    image = next(records(path))["steps/observation/image_wrist"][0]
    assert simplejpeg.decode_jpeg_header(image)[:2] == SIZE


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_an_episode_with_a_damaged_piece_is_left_out_as_a_whole(source, tmp_path, piece):
    """Its neighbours, which are healthy, are not."""
    path = convert_rlds(source, tmp_path / "out", Conversion(chunk_steps=8))  # pieces of 12, 20, 7 and 1: 2, 3, 1 and 1
    shard = sorted(path.glob("*train*"))[0]
    file = open_records(str(shard), "tfrecord")
    pieces = [bytes(file.read(i)) for i in range(len(file))]
    with RecordWriter(shard, "tfrecord") as writer:
        for number, record in enumerate(pieces):
            writer.write(b"\xff" * len(record) if number == 2 + piece else record)
    damaged = RldsSource(path, "train")
    assert len(damaged) == 4
    with pytest.raises(DatasetError, match=rf"episode 1 cannot be read: shard .*, record {2 + piece}"):
        damaged[1]
    for number in (0, 2, 3):
        np.testing.assert_array_equal(damaged[number].actions, RldsSource(source, "train")[number].actions)


def test_a_robot_may_be_named(source, tmp_path):
    assert RldsSource(source, "train").robot == ""
    named = convert_rlds(source, tmp_path / "named", Conversion(robot="franka", chunk_steps=6))
    assert RldsSource(named, "train").robot == "franka"
    renamed = convert_rlds(named, tmp_path / "renamed", Conversion("array_record", robot="ur5"))
    assert {tuple(record["episode_metadata/robot"]) for record in records(renamed)} == {(b"ur5",)}
    assert RldsSource(renamed, "train").robot == "ur5"
    assert RldsSource(convert_rlds(renamed, tmp_path / "kept", Conversion()), "train").robot == "ur5"


def test_instructions_of_steps_are_kept(tmp_path):
    words = ("", *["reach"] * 6, *["pick"] * 5)
    episode = dataclasses.replace(step_episode(12), instruction=words)
    path = write_rlds(tmp_path, "demo", {"train": [episode]}, control_hz=10.0, image_size=SIZE, description="")
    cut = convert_rlds(path, tmp_path / "cut", Conversion("array_record", chunk_steps=5))
    assert RldsSource(cut, "train")[0].instruction == words
