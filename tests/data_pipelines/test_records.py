"""Record files and the tf.Examples in them, against what tfds and TensorFlow make of the same bytes."""

import io
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from data_pipelines.sources.index import Column
from data_pipelines.sources.records import (
    DatasetError,
    RecordFiles,
    RecordWriter,
    TfRecordFile,
    file_sizes,
    open_records,
    parse_example,
)

FORMATS = ("tfrecord", "array_record")
RECORDS = [b"first", b"", bytes(range(256)) * 300]


def write(path, file_format, records=RECORDS):
    with RecordWriter(path, file_format) as writer:
        for record in records:
            writer.write(record)
    assert (writer.count, writer.num_bytes) == (len(records), sum(map(len, records)))
    return str(path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_records_come_back_in_any_order(tmp_path, file_format):
    file = open_records(write(tmp_path / "shard", file_format), file_format)
    assert len(file) == 3
    for index in (2, 0, 1, 2):
        assert bytes(file.read(index)) == bytes(file.peek(index)) == RECORDS[index]


@pytest.mark.reference
def test_tensorflow_reads_and_writes_the_same_tfrecord_files(tmp_path):
    ours, theirs = write(tmp_path / "ours", "tfrecord"), str(tmp_path / "theirs")
    script = f"""
import tensorflow as tf
with tf.io.TFRecordWriter({theirs!r}) as writer:
    for record in tf.data.TFRecordDataset({ours!r}):
        writer.write(record.numpy())
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    file = open_records(theirs, "tfrecord")
    assert [bytes(file.read(i)) for i in range(len(file))] == RECORDS
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "ours").read_bytes()


def test_a_known_table_saves_the_walk(tmp_path):
    path = write(tmp_path / "shard", "tfrecord")
    table = TfRecordFile(path).table
    assert table.tolist() == [[12, 5], [12 + 5 + 4 + 12, 0], [12 + 5 + 4 + 12 + 4 + 12, 76800]]
    assert bytes(TfRecordFile(path, table[2:]).read(0)) == RECORDS[2]


def test_a_tfrecord_is_verified_when_it_is_read_first(tmp_path):
    path = tmp_path / "shard"
    write(path, "tfrecord")
    data = bytearray(path.read_bytes())
    data[60] ^= 1  # within record 2
    path.write_bytes(data)
    file = open_records(str(path), "tfrecord")
    assert len(file) == 3 and len(file.peek(2)) == 76800 and bytes(file.read(0)) == b"first"
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"shard .*shard, record 2: its checksum does not match"):
            file.read(2)


def test_an_array_record_is_read_on_after_a_damaged_record(tmp_path):
    path = tmp_path / "shard"
    write(path, "array_record", [bytes([k]) * 1000 for k in range(3)])
    data = bytearray(path.read_bytes())
    data[data.index(b"\1" * 1000) + 500] ^= 1
    path.write_bytes(data)
    file = open_records(str(path), "array_record")
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"shard .*shard, record 1 cannot be read: .*hash mismatch"):
            file.read(1)
        assert bytes(file.read(2)) == b"\2" * 1000 and bytes(file.read(0)) == b"\0" * 1000


@pytest.mark.parametrize(("cut", "record"), [(3, 0), (12, 0), (20, 0), (21 + 5, 1), (21 + 16 + 12 + 76800 + 3, 2)])
def test_a_tfrecord_that_is_cut_short_names_the_record(tmp_path, cut, record):
    path = tmp_path / "shard"
    write(path, "tfrecord")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DatasetError, match=rf"record {record}: the file of {cut} bytes ends within it"):
        open_records(str(path), "tfrecord")


def test_a_damaged_length_names_the_record(tmp_path):
    path = tmp_path / "shard"
    write(path, "tfrecord")
    data = bytearray(path.read_bytes())
    data[21] = 9
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="record 1 at byte 21: the checksum of its length does not match"):
        open_records(str(path), "tfrecord")


def test_empty_and_missing_files_and_other_formats(tmp_path):
    assert len(open_records(write(tmp_path / "empty", "tfrecord", []), "tfrecord")) == 0
    with pytest.raises(DatasetError, match="nowhere is missing"):
        open_records(str(tmp_path / "nowhere"), "array_record")
    with pytest.raises(DatasetError, match="stored as riegeli; expected tfrecord or array_record"):
        open_records(str(tmp_path / "empty"), "riegeli")
    with pytest.raises(ValueError, match="file_format is 'riegeli'"):
        RecordWriter(tmp_path / "new", "riegeli")


def test_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(RecordFiles, "_OPEN", 2)
    paths = [write(tmp_path / f"shard{k}", "tfrecord", [bytes([k])]) for k in range(5)]
    files = RecordFiles(paths, "tfrecord", [TfRecordFile(path).table for path in paths].__getitem__)
    held = files[0].read(0)
    assert [bytes(files[k].read(0))[0] for k in (1, 2, 3, 4, 0, 3)] == [1, 2, 3, 4, 0, 3]
    assert bytes(held) == b"\0"
    assert files[1].verified == b"\1"  # although it was closed in between


def test_remote_tfrecords(tmp_path):
    data = tmp_path / "shard"
    write(data, "tfrecord")
    memory = fsspec.filesystem("memory")
    memory.pipe("/records/shard", data.read_bytes())
    path = "memory://records/shard"
    table = TfRecordFile(path).table
    file = open_records(path, "tfrecord", table)
    assert [bytes(file.read(i)) for i in range(3)] == RECORDS
    assert file_sizes([path]) == [data.stat().st_size]
    memory.pipe("/records/shard", data.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"record 2: the file of .* ends within it"):
        TfRecordFile(path, table).read(2)
    with pytest.raises(DatasetError, match="memory://records/other is missing"):
        file_sizes(["memory://records/other"])
    with pytest.raises(DatasetError, match="ArrayRecord files are read from local or mounted paths only"):
        open_records(path, "array_record")
    with pytest.raises(DatasetError, match="nosuch://records/shard cannot be opened: Protocol not known"):
        open_records("nosuch://records/shard", "tfrecord")


# tf.Examples


def image(file_format, value):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, file_format)
    file.seek(0)
    return file


FEATURES = tfds.features.FeaturesDict(
    {
        "steps": tfds.features.Dataset(
            {
                "observation": {
                    "jpeg": tfds.features.Image(shape=(6, 8, 3), encoding_format="jpeg"),
                    "png": tfds.features.Image(shape=(6, 8, 3), encoding_format="png"),
                    "state": {"joints": tfds.features.Tensor(shape=(2, 3), dtype=np.float32)},
                },
                "double": tfds.features.Tensor(shape=(2,), dtype=np.float64),
                "ints": tfds.features.Tensor(shape=(3,), dtype=np.int64),
                "bytes": tfds.features.Tensor(shape=(2,), dtype=np.uint8),
                "unsigned": tfds.features.Scalar(np.uint64),
                "flag": tfds.features.Scalar(np.bool_),
                "label": tfds.features.ClassLabel(num_classes=300),
                "zlib": tfds.features.Tensor(shape=(2,), dtype=np.float64, encoding="zlib"),
                "raw": tfds.features.Tensor(shape=(4,), dtype=np.int16, encoding="bytes"),
                "text": tfds.features.Text(),
            }
        ),
        "episode_metadata": {"hz": tfds.features.Scalar(np.float32), "file": tfds.features.Text(), "success": np.bool_},
    }
)


def example(steps=5):
    rng = np.random.default_rng(0)
    extremes = np.array([0, -1, 127, 128, 2**31, -(2**63), 2**63 - 1])
    return {
        "steps": [
            {
                "observation": {
                    "jpeg": image("JPEG", 10 * k),
                    "png": image("PNG", k),
                    "state": {"joints": rng.normal(size=(2, 3)).astype(np.float32)},
                },
                "double": rng.normal(size=2),
                "ints": rng.choice(extremes, 3),
                "bytes": rng.integers(0, 256, 2).astype(np.uint8),
                "unsigned": np.uint64(2**64 - 1 - k),
                "flag": k % 2 == 0,
                "label": 299 - k,
                "zlib": rng.normal(size=2),
                "raw": rng.integers(-300, 300, 4).astype(np.int16),
                "text": f"schließe {k}",
            }
            for k in range(steps)
        ],
        "episode_metadata": {"hz": np.float32(3.3), "file": "a/b.h5", "success": True},
    }


@pytest.mark.parametrize(
    ("path", "dtype", "shape", "encoding"),
    [
        ("steps/observation/state/joints", "float32", (2, 3), "none"),
        ("steps/double", "float64", (2,), "none"),
        ("steps/ints", "int64", (3,), "none"),
        ("steps/bytes", "uint8", (2,), "none"),
        ("steps/unsigned", "uint64", (), "none"),
        ("steps/flag", "bool", (), "none"),
        ("steps/label", "int64", (), "none"),
        ("steps/zlib", "float64", (2,), "zlib"),
        ("steps/raw", "int16", (4,), "bytes"),
    ],
)
def test_numbers_are_those_of_tfds(path, dtype, shape, encoding):
    record = FEATURES.serialize_example(example())
    values = Column(path, "steps", dtype, shape, encoding).decode(parse_example(memoryview(record)))
    steps = list(FEATURES.deserialize_example_np(record)["steps"])
    for key in path.split("/")[1:]:
        steps = [step[key] for step in steps]
    np.testing.assert_array_equal(values, np.stack(steps))
    assert values.dtype == dtype and values.shape == (5, *shape)


def test_text_metadata_and_images_are_those_of_tfds():
    record = FEATURES.serialize_example(example())
    features, theirs = parse_example(memoryview(record)), FEATURES.deserialize_example_np(record)
    assert set(features) == set(tf_example_pb2.Example.FromString(record).features.feature)
    assert Column("steps/text", "text").decode(features) == "schließe 0"
    assert [bytes(text) for text in features["steps/text"].strings()] == [step["text"] for step in theirs["steps"]]
    assert Column("episode_metadata/file", "text").decode(features) == "a/b.h5"
    assert Column("episode_metadata/hz", "record", "float32").decode(features) == np.float32(3.3)
    assert Column("episode_metadata/success", "record", "bool").decode(features).item() is True
    for key in ("jpeg", "png"):
        assert Column(f"steps/observation/{key}", "count").decode(features).shape == (5, 0)
        files = features[f"steps/observation/{key}"].strings(4)
        assert len(files) == 4
        for k, step in enumerate(list(theirs["steps"])[:4]):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(files[k]))), step["observation"][key])


def test_bytes_stored_as_integers_are_an_instruction():
    encoded = np.zeros(8, np.int64)
    encoded[:7] = list("größe".encode())
    feature = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=np.tile(encoded, 3)))
    record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature={"steps/words": feature})).SerializeToString()
    assert Column("steps/words", "text", "int32", (8,)).decode(parse_example(memoryview(record))) == "größe"


def test_values_are_slices_of_the_record():
    record = memoryview(FEATURES.serialize_example(example()))
    image_bytes = parse_example(record)["steps/observation/png"].strings()[3]
    assert image_bytes.obj is record.obj


def test_features_that_are_not_what_they_should_be():
    features = parse_example(memoryview(FEATURES.serialize_example(example())))
    with pytest.raises(ValueError, match="feature 'steps/other' is missing"):
        Column("steps/other", "steps", "float32", (2,)).decode(features)
    with pytest.raises(ValueError, match=r"feature 'steps/double' is not what .* \(float64 \(3,\)\)"):
        Column("steps/double", "steps", "float64", (3,)).decode(features | {"steps/double": features["steps/label"]})
    with pytest.raises(ValueError, match=r"steps/text.*holds bytes; expected numbers"):
        Column("steps/text", "steps", "float32").decode(features)
    with pytest.raises(ValueError, match=r"steps/flag.*holds numbers; expected bytes"):
        Column("steps/flag", "text").decode(features)
    with pytest.raises(ValueError, match=r"steps/raw.*Error -3"):
        Column("steps/raw", "steps", "int16", (4,), "zlib").decode(features)


@pytest.mark.parametrize("kind", [2, 3])
def test_numbers_that_are_not_packed_are_an_error(kind):
    values = bytes([1 << 3 | 5, 0, 0, 0, 0]) if kind == 2 else bytes([1 << 3, 7])
    feature = bytes([kind << 3 | 2, len(values)]) + values
    entry = b"\x0a\x01x" + bytes([2 << 3 | 2, len(feature)]) + feature
    features = bytes([0x0A, len(entry)]) + entry
    record = bytes([0x0A, len(features)]) + features
    theirs = tf_example_pb2.Example.FromString(record).features.feature["x"]
    assert len(theirs.float_list.value) + len(theirs.int64_list.value) == 1
    with pytest.raises(ValueError, match="not packed"):
        parse_example(memoryview(record))["x"].numbers()


def test_any_bytes_are_a_value_error_or_an_example():
    record, rng = FEATURES.serialize_example(example(2)), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(record[: rng.integers(1, len(record))])
        for position in rng.integers(0, min(len(broken), 400), 3):
            broken[position] = rng.integers(256)
        try:
            for feature in parse_example(memoryview(bytes(broken))).values():
                feature.strings() if feature.is_bytes else feature.numbers()
        except ValueError:
            refused += 1
    assert refused > 200


def test_finding_features_touches_no_image(tmp_path):
    """The pages that images fill may not be accessed: to look at one of their bytes would end the process."""
    shard, part = str(tmp_path / "shard"), str(tmp_path / "part.npz")
    script = f"""
import ctypes, mmap, pathlib, re, sys
import numpy as np
from data_pipelines.sources import records
from data_pipelines.sources.index import Column, Shard, _index_shard

images = []

def map_without_images(path, size):
    memory = mmap.mmap(-1, size)
    memory.write(open(path, "rb").read())
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for image in re.finditer(b"\\xab+", memory):
        first, last = -(-(address + image.start()) // mmap.PAGESIZE), (address + image.end()) // mmap.PAGESIZE
        images.append((first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE))
    for start, length in images:
        assert length > 0 and ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), 0) == 0
    return memoryview(memory)

records._map = map_without_images
columns = [Column("steps/action", "steps", "float32", (7,)), Column("steps/text", "text")]
_index_shard(Shard({shard!r}, 3, 0), "tfrecord", columns, pathlib.Path({part!r}))
with np.load({part!r}) as part:
    assert part["steps.action.npy"].shape == (12, 7) and part["errors.json"].item() == "{{}}"
print(len(images), flush=True)
if len(sys.argv) > 1:
    records.TfRecordFile({shard!r}).read(0)
"""
    features = {
        "steps/action": tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=np.arange(28))),
        "steps/observation/image": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[b"\xab" * 20_000] * 4)),
        "steps/text": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[b"go"] * 4)),
    }
    record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString()
    write(shard, "tfrecord", [record] * 3)
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "12\n"), child.stderr
    child = subprocess.run([sys.executable, "-c", script, "read"], capture_output=True, text=True)
    assert child.returncode == -signal.SIGSEGV and child.stdout == "12\n"  # the trap works: verifying the record ends in it
