"""Episodes → a prepared RLDS dataset that plain tfds reads."""

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from data_pipelines.episode import CAMERAS, Episode, Frames, blocks
from data_pipelines.sources.records import RecordWriter
from data_pipelines.windows import at_rate
from mimic_video.atomic import atomically
from mimic_video.config import expanded_path
from mimic_video.transforms import resize_images

VERSION = "1.0.0"
FileFormat = Literal["array_record", "tfrecord"]
_EPISODES_PER_SHARD = 256  # a few hundred MB at 480×640


class SplitSize(NamedTuple):
    """Records of every shard of a split in order, and the bytes of all of them."""

    shard_lengths: list[int]
    num_bytes: int


class _Dims(NamedTuple):
    """What all episodes of a dataset have in common: widths, None where there is none, and cameras besides the primary one."""

    action: int | None
    proprio: int | None
    cameras: tuple[str, ...]
    action_layout: str


class _Recording(NamedTuple):
    """How episodes are stored: arguments of `write_rlds`."""

    control_hz: float
    image_size: tuple[int, int]
    jpeg_quality: int
    robot: str


def write_rlds(
    directory: str | os.PathLike,
    name: str,
    splits: Mapping[str, Iterable[Episode]],
    *,
    control_hz: float,
    image_size: tuple[int, int],
    jpeg_quality: int = 95,
    description: str,
    file_format: FileFormat = "tfrecord",
    robot: str = "",
) -> Path:
    """Writes `<directory>/<name>/1.0.0`, one episode in memory at a time and in the order given.

    Frames of every camera are resized to `image_size` (height, width) and stored as JPEG: `observation/image_primary`, and
    `image_secondary` and `image_wrist` of episodes that have these cameras. Datasets of episodes without actions or proprio lack
    the feature `action` or `observation/proprio`. The dataset is written to a folder `incomplete.*` beside its place and renamed
    at the end, so it appears whole or not at all. The same episodes give the same files.

    Args:
        directory: holds one folder per dataset.
        name: the dataset's name, in snake_case.
        splits: split name → its episodes; consumed once, one after the other.
        control_hz: steps per second of every episode.
        description: for people; stored in dataset_info.json.
        file_format: TFRecord, which plain tfds reads by `as_dataset` and of which less has to be read for a window, or
            ArrayRecord, which it reads at random by `as_data_source`.
        robot: whose episodes they are; empty leaves that to the experiment that reads them.

    Returns:
        The folder to read from.

    Raises:
        FileExistsError: if the dataset exists; delete it or choose another name.
        ValueError: for another file format or a name that no robot can have, a split without episodes, an episode whose features
            differ from the first one's, or one whose timestamps are not at `control_hz`.
    """
    path = Path(expanded_path(os.fspath(directory), "the folder for datasets")) / name / VERSION
    if path.exists():
        raise FileExistsError(f"dataset {path} exists already: delete it or choose another name")
    if not control_hz > 0:
        raise ValueError(f"control_hz is {control_hz}; expected a positive rate")
    check_format(file_format)
    check_robot(robot)
    if not splits:
        raise ValueError(f"dataset {path} needs at least one split")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as partial:
        partial.mkdir()
        _write(partial, name, splits, _Recording(control_hz, image_size, jpeg_quality, robot), description, file_format)
    return path


def check_format(file_format: str) -> None:
    """Raises ValueError for another one than those of `FileFormat`."""
    if file_format not in get_args(FileFormat):
        raise ValueError(f"file_format is {file_format!r}; expected {' or '.join(get_args(FileFormat))}")


def check_robot(robot: str) -> None:
    """Raises ValueError for a name that no robot can have."""
    if "/" in robot:
        raise ValueError(f"robot is '{robot}'; expected a name without '/'")


def write_metadata(
    directory: Path,
    name: str,
    version: str,
    features: tfds.features.FeaturesDict,
    splits: Mapping[str, SplitSize],
    *,
    file_format: FileFormat,
    description: str,
) -> None:
    """Writes what makes a folder of shards, named by `shard_path`, a dataset: `features.json` and `dataset_info.json`."""
    identity = tfds.core.DatasetIdentity(name, tfds.core.Version(version), data_dir=os.fspath(directory), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=description)
    info.set_file_format(file_format)
    info.set_splits(
        tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=list(size.shard_lengths),
                    num_bytes=size.num_bytes,
                    filename_template=_template(directory, name, split, file_format),
                )
                for split, size in splits.items()
            ]
        )
    )
    info.write_to_directory(os.fspath(directory))


def shard_path(directory: Path, name: str, split: str, file_format: FileFormat, shard: int) -> Path:
    """Where a shard of a dataset lies."""
    return Path(_template(directory, name, split, file_format).sharded_filepath(shard_index=shard, num_shards=None))


def _template(directory: Path, name: str, split: str, file_format: FileFormat) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        dataset_name=name,
        data_dir=os.fspath(directory),
        split=split,
        filetype_suffix=file_format,
    )


def _write(
    directory: Path,
    name: str,
    splits: Mapping[str, Iterable[Episode]],
    recording: _Recording,
    description: str,
    file_format: FileFormat,
) -> None:
    # Not tfds' own writers: these shuffle through memory, and write TFRecord and open large files with TensorFlow.
    dims: Any = None
    sizes = {}
    for split, episodes in splits.items():
        first, episodes = _peek(split, episodes)
        dims = dims or _dims(first)
        records = _records(episodes, dims, recording)
        path = functools.partial(shard_path, directory, name, split, file_format)
        sizes[split] = _write_shards(records, path, file_format)
    features = _features(dims, recording)
    write_metadata(directory, name, VERSION, features, sizes, file_format=file_format, description=description)


def _records(episodes: Iterable[Episode], dims: _Dims, recording: _Recording) -> Iterator[bytes]:
    features = _features(dims, recording)
    serializer = ExampleSerializer(features.get_serialized_info())
    for episode in episodes:
        _check(episode, dims, recording.control_hz)
        example = features.encode_example(_example(episode, recording))
        yield serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _write_shards(records: Iterator[bytes], path: Callable[[int], Path], file_format: FileFormat) -> SplitSize:
    lengths: list[int] = []
    num_bytes = 0
    for first in records:
        with RecordWriter(path(len(lengths)), file_format) as writer:
            writer.write(first)
            for record in itertools.islice(records, _EPISODES_PER_SHARD - 1):
                writer.write(record)
        lengths.append(writer.count)
        num_bytes += writer.num_bytes
    return SplitSize(lengths, num_bytes)


def _peek(split: str, episodes: Iterable[Episode]) -> tuple[Episode, Iterator[Episode]]:
    iterator = iter(episodes)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise ValueError(f"split '{split}' has no episodes")


def _dims(episode: Episode) -> _Dims:
    action, proprio = (None if values is None else values.shape[1] for values in (episode.actions, episode.proprio))
    cameras = tuple(camera for camera in CAMERAS if camera in episode.further_cameras)
    return _Dims(action, proprio, cameras, episode.action_layout)


def _check(episode: Episode, dims: _Dims, control_hz: float) -> None:
    if _dims(episode) != dims:
        raise ValueError(f"{episode.name}: dimensions are {_dims(episode)}; the dataset's first episode has {dims}")
    # The reader derives the timestamps from the rate alone.
    if not at_rate(episode.timestamps, control_hz):
        raise ValueError(f"{episode.name}: timestamps are not {control_hz} steps per second; resample the episode first")


def _features(dims: _Dims, recording: _Recording) -> tfds.features.FeaturesDict:
    def vector(width: int) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(width,), dtype=np.float32)

    observation = {
        f"image_{camera}": tfds.features.Image(shape=(*recording.image_size, 3), dtype=np.uint8, encoding_format="jpeg")
        for camera in ("primary", *dims.cameras)
    }
    step = {
        "observation": observation,
        "language_instruction": tfds.features.Text(),
        **{name: tfds.features.Scalar(np.bool_) for name in ("is_first", "is_last", "is_terminal")},
        **{name: tfds.features.Scalar(np.float32) for name in ("reward", "discount")},
    }
    if dims.proprio is not None:
        observation["proprio"] = vector(dims.proprio)
    if dims.action is not None:
        step["action"] = vector(dims.action)
    metadata = {"control_hz": tfds.features.Scalar(np.float32), "action_layout": tfds.features.Text()}
    if recording.robot:
        metadata["robot"] = tfds.features.Text()
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})


def _example(episode: Episode, recording: _Recording) -> dict[str, Any]:
    images = {f"image_{camera}": list(_jpegs(frames, recording)) for camera, frames in episode.cameras.items()}
    last = len(episode) - 1
    steps = []
    for k in range(len(episode)):
        step: dict[str, Any] = {
            "observation": {key: io.BytesIO(files[k]) for key, files in images.items()},
            "language_instruction": episode.instruction_at(k),
            "is_first": k == 0,
            "is_last": k == last,
            "is_terminal": k == last,
            "reward": float(k == last),
            "discount": 1.0,
        }
        if episode.proprio is not None:
            step["observation"]["proprio"] = episode.proprio[k].astype(np.float32)
        if episode.actions is not None:
            step["action"] = episode.actions[k].astype(np.float32)
        steps.append(step)
    metadata = {"control_hz": recording.control_hz, "action_layout": episode.action_layout}
    return {"steps": steps, "episode_metadata": metadata | ({"robot": recording.robot} if recording.robot else {})}


def _jpegs(frames: Frames, recording: _Recording) -> Iterator[bytes]:
    for block in blocks(frames):
        yield from (encode_jpeg(frame, recording.jpeg_quality) for frame in resize_images(block, recording.image_size))


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """The JPEG file of a frame, uint8 (height, width, 3); tfds stores files as they are, and needs TensorFlow for arrays."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return file.getvalue()
