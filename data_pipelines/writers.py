"""Episodes → a prepared RLDS dataset that plain tfds reads."""

import io
import itertools
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.episode import Episode
from data_pipelines.sources.rlds import INCOMPLETE_PREFIX
from data_pipelines.windows import TOLERANCE
from mimic_video.transforms import resize_images

VERSION = "1.0.0"
_EPISODES_PER_SHARD = 256  # a few hundred MB at 480×640


class _Dims(NamedTuple):
    """Width of the low-dimensional features of a dataset; None where it has none."""

    action: int | None
    proprio: int | None


def write_rlds(directory: str | os.PathLike, name: str, splits: Mapping[str, Iterable[Episode]], *, control_hz: float,
               image_size: tuple[int, int], jpeg_quality: int = 95, description: str) -> Path:
    """Writes `<directory>/<name>/1.0.0` as ArrayRecord, one episode in memory at a time and in the order given.

    Frames are resized to `image_size` (height, width) and stored as JPEG. Datasets of episodes without actions or proprio lack
    the feature `action` or `observation/proprio`. The dataset is written to a folder `incomplete.*` beside its place and renamed
    at the end, so it appears whole or not at all. The same episodes give the same files.

    Args:
        directory: holds one folder per dataset.
        name: the dataset's name, in snake_case.
        splits: split name → its episodes; consumed once, one after the other.
        control_hz: steps per second of every episode.
        description: for people; stored in dataset_info.json.

    Returns:
        The folder to read from.

    Raises:
        FileExistsError: if the dataset exists; delete it or choose another name.
        ValueError: for a split without episodes, an episode whose features differ from the first one's, or one whose timestamps
            are not at `control_hz`.
    """
    path = Path(directory) / name / VERSION
    if path.exists():
        raise FileExistsError(f"dataset {path} exists already: delete it or choose another name")
    if not control_hz > 0:
        raise ValueError(f"control_hz is {control_hz}; expected a positive rate")
    if not splits:
        raise ValueError(f"dataset {path} needs at least one split")
    partial = path.parent / f"{INCOMPLETE_PREFIX}{uuid.uuid4().hex[:6]}_{VERSION}"
    partial.mkdir(parents=True)
    try:
        _write(partial, name, splits, control_hz, image_size, jpeg_quality, description)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return path


def _write(directory: Path, name: str, splits: Mapping[str, Iterable[Episode]], control_hz: float, image_size: tuple[int, int],
           jpeg_quality: int, description: str) -> None:
    # Not a GeneratorBasedBuilder: it shuffles through memory, and beyond 1 GB through files that it needs TensorFlow to open.
    writer, dims = None, _Dims(None, None)
    for split, episodes in splits.items():
        first, episodes = _peek(split, episodes)
        if writer is None:
            dims = _dims(first)
            identity = tfds.core.DatasetIdentity(name, tfds.core.Version(VERSION), data_dir=os.fspath(directory), module_name="")
            info = tfds.core.DatasetInfo(builder=identity, features=_features(dims, image_size), description=description)
            writer = tfds.core.SequentialWriter(info, _EPISODES_PER_SHARD, file_format="array_record")
        writer.initialize_splits([split])
        for episode in episodes:
            _check(episode, dims, control_hz)
            writer.add_examples({split: [_example(episode, control_hz, image_size, jpeg_quality)]})
        writer.close_splits([split])


def _peek(split: str, episodes: Iterable[Episode]) -> tuple[Episode, Iterator[Episode]]:
    iterator = iter(episodes)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise ValueError(f"split '{split}' has no episodes")


def _dims(episode: Episode) -> _Dims:
    return _Dims(*(None if values is None else values.shape[1] for values in (episode.actions, episode.proprio)))


def _check(episode: Episode, dims: _Dims, control_hz: float) -> None:
    if _dims(episode) != dims:
        raise ValueError(f"{episode.name}: dimensions are {_dims(episode)}; the dataset's first episode has {dims}")
    # The reader derives the timestamps from the rate alone.
    if not np.allclose(episode.timestamps - episode.timestamps[0], np.arange(len(episode)) / control_hz, rtol=0, atol=TOLERANCE):
        raise ValueError(f"{episode.name}: timestamps are not {control_hz} steps per second; resample the episode first")


def _features(dims: _Dims, image_size: tuple[int, int]) -> tfds.features.FeaturesDict:
    def vector(width: int) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(width,), dtype=np.float32)

    observation = {"image_primary": tfds.features.Image(shape=(*image_size, 3), dtype=np.uint8, encoding_format="jpeg")}
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
    return tfds.features.FeaturesDict({
        "steps": tfds.features.Dataset(step),
        "episode_metadata": {"control_hz": tfds.features.Scalar(np.float32)},
    })


def _example(episode: Episode, control_hz: float, image_size: tuple[int, int], jpeg_quality: int) -> dict[str, Any]:
    frames = resize_images(episode.frames.take(range(len(episode))), image_size)
    last = len(episode) - 1
    steps = []
    for k, frame in enumerate(frames):
        step: dict[str, Any] = {
            "observation": {"image_primary": _jpeg(frame, jpeg_quality)},
            "language_instruction": episode.instruction,
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
    return {"steps": steps, "episode_metadata": {"control_hz": control_hz}}


def _jpeg(frame: np.ndarray, quality: int) -> io.BytesIO:
    """The encoded frame as a file: tfds stores it as it is, and would need TensorFlow to encode an array."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    file.seek(0)
    return file
