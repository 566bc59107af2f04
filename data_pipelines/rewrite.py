"""Prepared RLDS datasets → the same episodes in another file format, with other images, in shorter records.

Everything that is not an image keeps its feature, its type and its bits, so what could read the source reads the result. Long
episodes may be cut into records of a number of steps: a window then reads a short record rather than a whole episode, which
matters for ArrayRecord, whose records are read whole. The pieces do not overlap. The second and later ones of an episode carry
the flag `episode_metadata/continues`, by which `RldsSource` joins them again, so no window is lost at their borders and none is
there twice. Other readers of RLDS see each piece as an episode; its flags `is_first` and `is_last` still say where the real one
begins and ends.
"""

import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import flatten_nest_dict
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from data_pipelines.sources.index import Shard
from data_pipelines.sources.records import Feature, RecordFile, RecordWriter, open_records, parse_example
from data_pipelines.sources.rlds import CONTINUES, ROBOT, Dataset, DatasetError, decode_image, open_dataset
from data_pipelines.workers import worker_processes
from data_pipelines.writers import FileFormat, SplitSize, check_format, check_robot, encode_jpeg, shard_path, write_metadata
from mimic_video.atomic import INCOMPLETE, atomically

_OBSERVATION = "steps/observation/"
_DEFAULT_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What to change. The defaults keep what there is.

    Attributes:
        file_format: of the result.
        cameras: keys under `steps/observation` of the images to keep; None keeps every image, and () none.
        image_size: (height, width) in pixels that RGB images are resized to, antialiased.
        jpeg_quality: 1 to 100, of RGB images, which are then all encoded anew; without it those that keep their size keep their
            bytes, and others get 95.
        chunk_steps: longest record, in steps; None leaves episodes whole.
        robot: whose episodes they are, `episode_metadata/robot`; empty keeps what the source says.

    Raises:
        ValueError: naming the field, if a value is impossible.
    """

    file_format: FileFormat = "tfrecord"
    cameras: tuple[str, ...] | None = None
    image_size: tuple[int, int] | None = None
    jpeg_quality: int | None = None
    chunk_steps: int | None = None
    robot: str = ""

    def __post_init__(self):
        check_format(self.file_format)
        check_robot(self.robot)
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"image_size is {self.image_size}; expected a positive height and width")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}; expected 1 to 100")
        if self.chunk_steps is not None and self.chunk_steps < 1:
            raise ValueError(f"chunk_steps is {self.chunk_steps}; expected at least 1")


def convert_rlds(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    conversion: Conversion,
    *,
    processes: int = 1,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> Path:
    """Writes `<directory>/<name>/<version>` with the name and version of the dataset at `source`, shard by shard.

    Each shard is read back before it counts: its number of records, their checksums, and every value that is not an image against
    the source. The dataset is written to a folder `incomplete.*` beside its place and renamed at the end; the same call continues
    where it was interrupted.

    Args:
        source: a prepared dataset, as for `RldsSource`.
        directory: holds one folder per dataset.
        processes: that convert shards at the same time.
        progress: called with a split, its finished shards and all of its shards.

    Returns:
        The folder to read from.

    Raises:
        FileExistsError: if the result exists; delete it or choose another folder.
        DatasetError: naming the shard and the record, if the source is damaged or what was written is not what should have been;
            or naming the feature, if a camera is missing, or a feature cannot be cut into pieces.
    """
    dataset = open_dataset(source)
    name, version = dataset.info.name, str(dataset.info.version)
    path = Path(directory) / name / version
    if path.exists():
        raise FileExistsError(f"dataset {path} exists already: delete it or choose another folder")
    plan, features = _plan(dataset, conversion)
    key = hashlib.sha256(dataset.identity + repr(conversion).encode()).hexdigest()[:8]
    partial = path.parent / f"{INCOMPLETE}{key}_{version}"
    splits = {split: dataset.shards(split) for split, info in dataset.info.splits.items() if info.num_examples}
    partial.mkdir(parents=True, exist_ok=True)

    jobs = [
        (split, len(shards), (plan, dataset.file_format, shard, shard_path(partial, name, split, conversion.file_format, i)))
        for split, shards in splits.items()
        for i, shard in enumerate(shards)
    ]
    written: dict[str, list[Shard]] = {split: [] for split in splits}
    for (split, count, _), shard in zip(jobs, _convert_shards([job for *_, job in jobs], processes), strict=True):
        written[split].append(shard)
        progress(split, len(written[split]), count)
    sizes = {
        split: SplitSize([shard.records for shard in shards], sum(shard.size for shard in shards))
        for split, shards in written.items()
    }
    write_metadata(
        partial, name, version, features, sizes, file_format=conversion.file_format, description=dataset.info.description or ""
    )
    partial.rename(path)
    shutil.rmtree(path / _DONE)
    return path


def _convert_shards(jobs: Sequence[tuple], processes: int) -> Iterator[Shard]:
    if processes == 1:
        yield from itertools.starmap(_convert_shard, jobs)
        return
    with worker_processes(processes) as executor:
        yield from executor.map(_convert_shard, *zip(*jobs, strict=True))


_DONE = "converted"  # folder of what is known of finished shards


class _Plan(NamedTuple):
    """What becomes of each feature of the record, by its key there. Keys that are in neither are dropped."""

    conversion: Conversion
    images: dict[str, tuple[int | None, ...]]  # RGB images to encode anew where need be, with their shape
    others: dict[str, int | None]  # values of one step; None for a feature of the whole record
    continues: bool  # whether the source has the flag


def _plan(dataset: Dataset, conversion: Conversion) -> tuple[_Plan, tfds.features.FeaturesDict]:
    """The plan, and the features of the result."""
    tree = copy.deepcopy(dataset.features.to_json())
    top = tree["content"]["features"]
    found = dict(_images(top, ""))
    keep = set(found) if conversion.cameras is None else {_OBSERVATION + camera for camera in conversion.cameras}
    if missing := sorted(keep - set(found)):
        raise DatasetError(f"{dataset.directory} has no image '{missing[0]}'; it has {', '.join(sorted(found)) or 'none'}")
    images = {}
    for path, (siblings, key) in found.items():
        if path not in keep:
            del siblings[key]
            continue
        image = siblings[key]["image"]
        shape = tuple(int(n) if int(n) >= 0 else None for n in image["shape"].get("dimensions", ["-1", "-1", "3"]))
        if shape[-1] != 3 or image["dtype"] != "uint8":
            continue  # depth and masks
        images[path] = shape
        target = conversion.image_size or shape[:2]
        if conversion.jpeg_quality is not None or target != shape[:2]:
            image["encodingFormat"] = "jpeg"
        if None not in target:
            image["shape"] = {"dimensions": [str(n) for n in (*target, 3)]}

    others: dict[str, int | None] = {}
    specs = flatten_nest_dict(dataset.features.get_serialized_info())
    for path, info in specs.items():
        if path in images or (path in found and path not in keep):
            continue
        if not path.startswith("steps/"):
            others |= dict.fromkeys(_keys(path, info), None)
        elif info.sequence_rank == 1 and None not in info.shape[1:]:
            others[path] = int(np.prod(info.shape[1:], dtype=int))
        elif conversion.chunk_steps is None:
            others |= dict.fromkeys(_keys(path, info), None)
        else:
            raise DatasetError(
                f"{dataset.directory}: feature '{path}' has a length that varies from step to step, so its "
                "episodes cannot be cut: leave out chunk_steps"
            )
    continues = CONTINUES in specs
    added: dict[str, Any] = {}
    if conversion.chunk_steps is not None and not continues:
        added["continues"] = tfds.features.Scalar(np.bool_)
    if conversion.robot:
        added["robot"] = tfds.features.Text()
    if added:
        metadata = top.setdefault("episode_metadata", {"pythonClassName": tree["type"], "featuresDict": {"features": {}}})
        metadata["featuresDict"]["features"] |= tfds.features.FeaturesDict(added).to_json()["content"]["features"]
    for replaced in (CONTINUES, ROBOT) if conversion.robot else (CONTINUES,):
        others.pop(replaced, None)
    return _Plan(conversion, images, others, continues), tfds.features.FeaturesDict.from_json(tree)


def _images(features: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """Path → (the dictionary that it is in, its key there) of every image of a feature tree in JSON."""
    for key, node in list(features.items()):
        path = prefix + key
        inner = node.get("sequence", {}).get("feature", node) if path == "steps" else node
        if "image" in inner:
            yield path, (features, key)
        elif "featuresDict" in inner:
            yield from _images(inner["featuresDict"]["features"], f"{path}/")


def _keys(path: str, info: Any) -> list[str]:
    """The keys of the record that hold a feature: one, or several if it is a sequence of sequences."""
    if info.sequence_rank < 2:
        return [path]
    return [f"{path}/ragged_flat_values", *(f"{path}/ragged_row_lengths_{i}" for i in range(info.sequence_rank - 1))]


def _convert_shard(plan: _Plan, file_format: str, shard: Shard, path: Path) -> Shard:
    """Writes one shard and reads it back. Returns its path, number of records and their bytes."""
    done = path.parent / _DONE / f"{path.name}.json"
    if done.exists() and path.exists():
        return Shard(*json.loads(done.read_text()))
    done.parent.mkdir(exist_ok=True)
    source = open_records(shard.path, file_format)
    if len(source) != shard.records:
        raise DatasetError(f"shard {shard.path} is truncated or damaged: it has {len(source)} of its {shard.records} records")
    checksums: list[int] = []
    pieces: list[int] = []
    with atomically(path) as partial:
        with RecordWriter(partial, plan.conversion.file_format) as writer:
            for index in range(len(source)):
                written = 0
                for piece in _pieces(plan, source, index):
                    record = piece.SerializeToString(deterministic=True)
                    writer.write(record)
                    checksums.append(google_crc32c.value(record))
                    written += 1
                pieces.append(written)
        _verify(plan, source, open_records(str(partial), plan.conversion.file_format), pieces, checksums)
    result = Shard(str(path), writer.count, writer.num_bytes)
    with atomically(done) as partial:
        partial.write_text(json.dumps(result))
    return result


def _pieces(plan: _Plan, source: RecordFile, index: int) -> Iterator[Any]:
    """The tf.Examples that one record becomes."""
    features, steps = _parse(plan, source, index)
    length = plan.conversion.chunk_steps or steps
    images = {key: features[key].strings() for key in plan.images if key in features}
    values = {key: _values(features[key]) for key in plan.others if key in features}
    continued = plan.continues and bool(features[CONTINUES].numbers()[0])
    for start in range(0, steps, length):
        piece = slice(start, start + length)
        example: dict[str, Any] = {}
        for key, value in values.items():
            width = plan.others[key]
            example[key] = value if width is None else value[start * width : piece.stop * width]
        for key, encoded in images.items():
            where = f"shard {source.path}, record {index}: '{key}' of step"
            example[key] = [
                _convert_image(image, plan.images[key], plan.conversion, f"{where} {start + k}")
                for k, image in enumerate(encoded[piece])
            ]
        if plan.continues or plan.conversion.chunk_steps is not None:
            example[CONTINUES] = np.array([continued or start > 0], np.int64)
        if plan.conversion.robot:
            example[ROBOT] = [plan.conversion.robot.encode()]
        yield tf_example_pb2.Example(features=tf_feature_pb2.Features(feature={k: _feature(v) for k, v in example.items()}))


def _parse(plan: _Plan, source: RecordFile, index: int) -> tuple[dict[str, Feature], int]:
    """The features of a record, and its number of steps."""
    try:
        features = parse_example(source.read(index))
        lengths = {key: len(features[key].strings()) for key in plan.images if key in features}
        for key, width in plan.others.items():
            if width and key in features:
                lengths[key], rest = divmod(len(_values(features[key])), width)
                if rest:
                    raise ValueError(f"feature '{key}' has {lengths[key] * width + rest} values; expected a multiple of {width}")
        if len(counts := collections.Counter(lengths.values())) != 1 or 0 in counts:
            raise ValueError(f"its features have different numbers of steps, or none: {lengths}")
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"shard {source.path}, record {index}: {error}") from error
    return features, next(iter(counts))


def _values(feature: Feature) -> np.ndarray | list[memoryview]:
    return feature.strings() if feature.is_bytes else feature.numbers()


def _feature(values: np.ndarray | list[Any]) -> Any:
    if isinstance(values, list):
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[bytes(value) for value in values]))
    if values.dtype == np.int64:
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
    return tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))


def _convert_image(encoded: memoryview, shape: tuple[int | None, ...], conversion: Conversion, where: str) -> memoryview | bytes:
    """The image as it is, or encoded anew if its size or quality are to change."""
    height, width = shape[:2]
    size = None if height is None or width is None else (height, width)
    if conversion.jpeg_quality is None and conversion.image_size in (None, size):
        return encoded
    try:
        frame = decode_image(encoded, size, conversion.image_size)
    except ValueError as error:
        raise DatasetError(f"{where} {error}") from error
    return encode_jpeg(frame, conversion.jpeg_quality or _DEFAULT_QUALITY)


def _verify(plan: _Plan, source: RecordFile, written: RecordFile, pieces: list[int], checksums: list[int]) -> None:
    """Compares a shard on disk with what was written to it, and with its source. Raises DatasetError."""
    if len(written) != len(checksums):
        raise DatasetError(f"shard {written.path} has {len(written)} records after writing {len(checksums)}")
    first = 0
    for index, count in enumerate(pieces):
        read = []
        for record in range(first, first + count):
            data = written.read(record)
            if google_crc32c.value(bytes(data)) != checksums[record]:
                raise DatasetError(f"shard {written.path}, record {record} is not what was written to it")
            read.append(parse_example(data))
        original, _ = _parse(plan, source, index)
        for key, width in plan.others.items():
            if key in original and not _same(original[key], [features[key] for features in read], width):
                raise DatasetError(
                    f"shard {written.path}, records {first} to {first + count - 1}: '{key}' differs from record "
                    f"{index} of {source.path}"
                )
        first += count


def _same(original: Feature, pieces: list[Feature], width: int | None) -> bool:
    """Whether the pieces hold what the original does: bit for bit, so that NaN equals itself."""
    if any(piece.kind != original.kind for piece in pieces):
        return False
    if original.is_bytes:
        expected, found = original.strings(), [piece.strings() for piece in pieces]
        return all(f == expected for f in found) if width is None else list(itertools.chain(*found)) == expected
    bits, parts = original.numbers().tobytes(), [piece.numbers().tobytes() for piece in pieces]
    return all(part == bits for part in parts) if width is None else b"".join(parts) == bits
