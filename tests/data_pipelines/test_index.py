"""The index of a split: what it holds, when it is built, and what it says of damaged records."""

import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from data_pipelines.sources import index as index_module
from data_pipelines.sources.index import Column, Index, Shard, cache_directories, open_index
from data_pipelines.sources.records import DatasetError, RecordWriter

COLUMNS = [
    Column("steps/action", "steps", "float32", (2,)),
    Column("steps/flag", "steps", "bool"),
    Column("steps/words", "text"),
    Column("meta/hz", "record", "float32"),
    Column("meta/continues", "record", "bool"),
]


def record(steps, number, *, drop=(), continues=False):
    features = {
        "steps/action": tf_feature_pb2.FloatList(value=100 * number + np.arange(2 * steps)),
        "steps/flag": tf_feature_pb2.Int64List(value=[int(k == 0) for k in range(steps)]),
        "steps/words": tf_feature_pb2.BytesList(value=[f"größe {number}".encode()] * steps),
        "meta/hz": tf_feature_pb2.FloatList(value=[number]),
        "meta/continues": tf_feature_pb2.Int64List(value=[int(continues)]),
    }
    kinds = {"FloatList": "float_list", "Int64List": "int64_list", "BytesList": "bytes_list"}
    feature = {key: tf_feature_pb2.Feature(**{kinds[type(v).__name__]: v}) for key, v in features.items() if key not in drop}
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString()


def write(folder, shards, file_format="tfrecord"):
    """Shards of the given records, as `Shard`s."""
    found = []
    for number, records in enumerate(shards):
        path = folder / f"shard-{number}"
        with RecordWriter(path, file_format) as writer:
            for data in records:
                writer.write(data)
        found.append(Shard(str(path), len(records), path.stat().st_size))
    return found


def build(shards, cache, file_format="tfrecord", columns=COLUMNS, identity=b"demo"):
    return open_index(shards, file_format, columns, identity=identity, name="demo", directories=[cache])


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path, [[record(3, 0), record(5, 1)], [record(2, 2)]])


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_columns_of_all_shards_are_joined(tmp_path, file_format):
    shards = write(tmp_path, [[record(3, 0), record(5, 1)], [record(2, 2)]], file_format)
    index = Index(build(shards, tmp_path / "cache", file_format))
    assert len(index) == 3
    assert index.records[["shard", "record", "steps"]].tolist() == [(0, 0, 3), (0, 1, 5), (1, 0, 2)]
    actions = index.column("steps/action")
    np.testing.assert_array_equal(actions[3:8], 100 + np.arange(10, dtype=np.float32).reshape(5, 2))
    assert isinstance(actions, np.memmap) and not actions.flags.writeable
    assert index.column("steps/flag").tolist() == [k in (0, 3, 8) for k in range(10)]
    assert index.column("meta/hz").tolist() == [0, 1, 2]
    assert [index.text("steps/words", r) for r in range(3)] == ["größe 0", "größe 1", "größe 2"]
    assert index.first_steps(1, 3).tolist() == [3, 8, 10]
    assert pickle.loads(pickle.dumps(index)).column("steps/action")[9].tolist() == [202, 203]


def test_records_that_continue_an_episode_are_joined(tmp_path):
    shards = write(tmp_path, [[record(3, 0), record(3, 0, continues=True)], [record(1, 0, continues=True), record(2, 1)]])
    folder = build(shards, tmp_path / "cache")
    index = Index(folder, continues="meta/continues")
    assert [index.record_range(i) for i in range(len(index))] == [(0, 3), (3, 4)]
    assert index.first_steps(*index.record_range(0)).tolist() == [0, 3, 6, 7]
    assert len(Index(folder)) == 4


def test_processes_build_the_same(tmp_path, monkeypatch):
    shards = write(tmp_path, [[record(n + 1, n)] for n in range(3)])
    alone = build(shards, tmp_path / "a")
    monkeypatch.setattr(index_module, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    together = build(shards, tmp_path / "b")
    names = sorted(file.name for file in alone.iterdir())
    assert names == sorted(file.name for file in together.iterdir()) and len(names) == 8
    assert all((alone / name).read_bytes() == (together / name).read_bytes() for name in names)
    assert list((tmp_path / "b").iterdir()) == [together]


def test_it_is_built_once_by_content(shards, tmp_path, monkeypatch):
    folder = build(shards, tmp_path / "cache")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copies = [Shard(shutil.copy(shard.path, moved), *shard[1:]) for shard in shards]
    monkeypatch.setattr(index_module, "_index_shard", None)
    assert build(copies, tmp_path / "cache") == folder
    for other in (
        {"shards": [shards[0], shards[1]._replace(size=1)]},
        {"shards": [shards[0]._replace(records=1), shards[1]]},
        {"identity": b"other"},
        {"columns": COLUMNS[:2]},
    ):
        with pytest.raises(TypeError):  # it would build
            build(**{"shards": shards, "cache": tmp_path / "cache"} | other)


@pytest.mark.parametrize("damage", ["", "\0" * 99])
def test_a_damaged_one_is_built_again(shards, tmp_path, damage):
    folder = build(shards, tmp_path / "cache")
    whole = (folder / "index.json").read_text()
    (folder / "index.json").write_text(damage)
    assert build(shards, tmp_path / "cache") == folder and (folder / "index.json").read_text() == whole


def test_an_interrupted_build_continues(shards, tmp_path, monkeypatch):
    original, seen = index_module._index_shard, []

    def interrupted(shard, *rest):
        seen.append(shard.path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(shard, *rest)

    monkeypatch.setattr(index_module, "_index_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(shards, tmp_path / "cache")
    assert not any((path / "index.json").exists() for path in (tmp_path / "cache").iterdir())
    index = Index(build(shards, tmp_path / "cache"))
    assert seen == [shards[0].path, shards[1].path, shards[1].path]
    assert index.column("steps/action").shape == (10, 2)


def test_several_processes_may_ask_at_once(shards, tmp_path, monkeypatch):
    original, seen = index_module._index_shard, []
    monkeypatch.setattr(index_module, "_index_shard", lambda *job: (seen.append(job[0]), original(*job)))
    threads = [threading.Thread(target=build, args=(shards, tmp_path / "cache")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == shards


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(4, 1, drop=["steps/action"]), "feature 'steps/action' is missing"),
        (record(4, 1, drop=["meta/hz"]), "feature 'meta/hz' is missing"),
        (record(0, 1), "it has no steps"),
        (b"no example", "it is not a tf.Example"),
    ],
)
def test_a_bad_record_is_kept_as_an_error(tmp_path, bad, message):
    shards = write(tmp_path, [[record(3, 0)], [bad, record(2, 2)]])
    index = Index(build(shards, tmp_path / "cache"))
    assert index.records["steps"].tolist() == [3, 0, 2]
    assert index.error(0, 1) is index.error(2, 3) is None
    assert index.error(1, 2).startswith(f"shard {shards[1].path}, record 0: {message}")
    assert index.text("steps/words", 2) == "größe 2" and index.column("steps/action")[3].tolist() == [200, 201]


def test_different_numbers_of_steps_in_a_record(tmp_path):
    mixed = tf_example_pb2.Example.FromString(record(3, 0))
    mixed.features.feature["steps/flag"].int64_list.value.append(1)
    index = Index(build(write(tmp_path, [[mixed.SerializeToString()]]), tmp_path / "cache"))
    assert "different numbers of steps: {'steps/action': 3, 'steps/flag': 4}" in index.error(0, 1)


def test_a_shard_that_had_errors_is_looked_at_again_once_it_has_changed(tmp_path):
    shards = write(tmp_path, [[record(3, 0), record(3, 1)]])
    path = Path(shards[0].path)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[12] = 0xFF  # the tag of the first record's Example
    path.write_bytes(broken)
    assert Index(build(shards, tmp_path / "cache")).error(0, 1)
    before = path.stat().st_mtime_ns
    assert Index(build(shards, tmp_path / "cache")).error(0, 1)
    path.write_bytes(whole)
    os.utime(path, ns=(before + 1, before + 1))
    assert Index(build(shards, tmp_path / "cache")).error(0, 2) is None


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_no_record_of_a_shard_of_another_length_is_used(tmp_path, file_format):
    whole, short = write(tmp_path, [[record(3, 0)], [record(2, 1)]], file_format)
    index = Index(build([whole, short._replace(records=2)], tmp_path / "cache", file_format))
    assert index.records["steps"].tolist() == [3, 0, 0] and index.error(0, 1) is None
    for number in (1, 2):
        assert index.error(number, 3) == f"shard {short.path} is truncated or damaged: it has 1 of its 2 records"


def test_where_it_is_kept(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    own, user = cache_directories(tmp_path / "data", None)
    assert own == tmp_path / "data" / ".mimic_video_index" and user == tmp_path / "user" / "mimic_video" / "index"
    assert cache_directories("gs://bucket/data", None) == [user]
    assert cache_directories(tmp_path, "/elsewhere")[0].as_posix() == "/elsewhere"
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    options = {"identity": b"", "name": "demo"}
    built = open_index(shards, "tfrecord", COLUMNS, directories=[blocked / "cache", user], **options)
    assert built.parent == user
    assert open_index(shards, "tfrecord", COLUMNS, directories=[own, user], **options) == built
    assert json.loads((built / "index.json").read_text())["errors"] == []
    with pytest.raises(DatasetError, match=r"index of demo cannot be written to .*file/cache; set XDG_CACHE_HOME"):
        open_index(shards, "tfrecord", COLUMNS[:1], directories=[blocked / "cache"], **options)


def words(*texts):
    """A record whose steps have these texts, also as bytes in integers."""
    strings = tf_feature_pb2.BytesList(value=[text.encode() for text in texts])
    padded = [text.encode().ljust(8, b"\0") for text in texts]
    numbers = tf_feature_pb2.Int64List(value=[byte for text in padded for byte in text])
    feature = {"words": tf_feature_pb2.Feature(bytes_list=strings), "numbers": tf_feature_pb2.Feature(int64_list=numbers)}
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString()


@pytest.mark.parametrize("column", [Column("words", "texts"), Column("numbers", "texts", "int32", (8,))])
def test_texts_of_every_step(tmp_path, column):
    shards = write(tmp_path, [[words("", "go", "go"), b"damaged", words("go")], [b"damaged"], [b"damaged"], [words("für", "go")]])
    index = Index(build(shards, tmp_path / "cache", columns=[column]))
    everything = ("", "go", "go", "go", "für", "go")
    for start in range(6):
        for stop in range(start + 1, 7):
            assert index.texts(column.path, start, stop) == everything[start:stop]


def test_texts_are_one_for_each_step(tmp_path):
    columns = [Column("words", "texts"), Column("numbers", "steps", "int64", (16,))]
    index = Index(build(write(tmp_path, [[words("a", "b")]]), tmp_path / "cache", columns=columns))
    assert "different numbers of steps: {'numbers': 1, 'words': 2}" in index.error(0, 1)
