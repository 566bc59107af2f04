"""Episodes of a prepared RLDS dataset (tfds, ArrayRecord), read at random and without TensorFlow."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from data_pipelines.episode import Episode

INCOMPLETE_PREFIX = "incomplete."  # of a dataset directory that is still being written, as tfds names them


class DatasetError(ValueError):
    """A dataset that cannot be used. The message names the dataset, what was found in it and what was expected."""


class EncodedFrames:
    """Frames kept as encoded image files and decoded by `take`. `size` is (height, width) in pixels."""

    def __init__(self, name: str, encoded: Sequence[bytes], size: tuple[int, int]):
        self._name, self._encoded, self._size = name, encoded, size

    def __len__(self) -> int:
        return len(self._encoded)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3). Raises DatasetError for a broken image or one of another size."""
        frames = np.empty((len(indices), *self._size, 3), np.uint8)
        for row, index in enumerate(indices):
            frames[row] = self._decode(index)
        return frames

    def _decode(self, index: int) -> np.ndarray:
        try:
            frame = np.asarray(Image.open(io.BytesIO(self._encoded[index])).convert("RGB"))
        except OSError as error:
            raise DatasetError(f"{self._name}: image_primary of step {index} cannot be decoded: {error}") from error
        if frame.shape[:2] != self._size:
            raise DatasetError(f"{self._name}: image_primary of step {index} is {frame.shape[:2]}, not {self._size}")
        return frame


class RldsSource(Sequence[Episode]):
    """One split of a prepared RLDS directory as a sequence of episodes; thread-safe.

    Needs `steps/observation/image_primary` and `steps/language_instruction`; `steps/action` and `steps/observation/proprio` are
    read where they exist and other features are ignored. Step k of an episode is at k / control_hz seconds.

    Attributes:
        name: the directory and the split, for error messages.
        image_size: (height, width) in pixels.
        action_dim, proprio_dim: int, or None where the dataset has none.

    Args:
        directory: the prepared version's folder, e.g. `.../my_dataset/1.0.0`.
        split: a split's name, e.g. `train`.
        control_hz: steps per second where `episode_metadata/control_hz` does not say.

    Raises:
        DatasetError: if the directory is missing, half-written or not a dataset, the split or a required feature is missing, a
            feature has another type or shape, or a shard is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike, split: str, *, control_hz: float | None = None):
        directory = Path(directory)
        self.name = f"{directory} split '{split}'"
        builder = _open(directory)
        if split not in builder.info.splits:
            raise DatasetError(f"{directory} has no split '{split}'; it has {', '.join(sorted(builder.info.splits)) or 'none'}")
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise DatasetError(f"{directory} is stored as {builder.info.file_format.value}; expected array_record")

        features = _Features(directory, builder.info.features)
        self.image_size = features.image_size()
        self.action_dim = features.vector_dim("steps/action")
        self.proprio_dim = features.vector_dim("steps/observation/proprio")
        features.require("steps/language_instruction", tfds.features.Text, "a Text feature")
        self._control_hz = None if features.get("episode_metadata/control_hz") else control_hz
        if self._control_hz is None and not features.get("episode_metadata/control_hz"):
            raise DatasetError(f"{directory} has no feature 'episode_metadata/control_hz': pass control_hz to RldsSource")

        _check_shards(builder.info.splits[split])
        skip = {key: tfds.decode.SkipDecoding() for key in features.images("steps/observation")}
        self._records = builder.as_data_source(split, decoders={"steps": {"observation": skip}})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]  # no slices
        """The episode, its images still encoded. Raises IndexError, or DatasetError if its record cannot be read."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} episodes; index {index} is out of range")
        index %= len(self)
        name = f"{self.name} episode {index}"
        try:
            record = self._records[index]
            steps = list(record["steps"])
        except Exception as error:  # undocumented: a damaged chunk, or a record that does not match features.json
            raise DatasetError(f"{name} cannot be read: {error}") from error
        if not steps:
            raise DatasetError(f"{name} has no steps")
        control_hz = self._control_hz or float(record["episode_metadata"]["control_hz"])
        if not control_hz > 0:
            raise DatasetError(f"{name}: episode_metadata/control_hz is {control_hz}; expected a positive rate")
        observations = [step["observation"] for step in steps]
        return Episode(
            name=name,
            timestamps=np.arange(len(steps)) / control_hz,
            frames=EncodedFrames(name, [observation["image_primary"] for observation in observations], self.image_size),
            instruction=steps[0]["language_instruction"].decode(),
            proprio=None if self.proprio_dim is None else np.stack([o["proprio"] for o in observations]).astype(np.float32),
            actions=None if self.action_dim is None else np.stack([step["action"] for step in steps]).astype(np.float32),
        )


class _Features:
    """The feature tree of one dataset, looked up by path; `steps` is entered as if it were a dictionary."""

    def __init__(self, directory: Path, tree: tfds.features.FeaturesDict):
        self._directory, self._tree = directory, tree

    def get(self, path: str) -> Any:
        node = self._tree
        for part in path.split("/"):
            node = getattr(node, "feature", node)
            if not isinstance(node, tfds.features.FeaturesDict) or part not in node:
                return None
            node = node[part]
        return node

    def require(self, path: str, kind: type, expected: str) -> Any:
        feature = self.get(path)
        if feature is None:
            raise DatasetError(f"{self._directory} has no feature '{path}'; expected {expected}")
        if not isinstance(feature, kind):
            raise self._mismatch(path, feature, expected)
        return feature

    def image_size(self) -> tuple[int, int]:
        path, expected = "steps/observation/image_primary", "a uint8 Image of a fixed (height, width, 3)"
        feature = self.require(path, tfds.features.Image, expected)
        if None in feature.shape or len(feature.shape) != 3 or feature.shape[-1] != 3 or feature.np_dtype != np.uint8:
            raise self._mismatch(path, feature, expected)
        return feature.shape[:2]

    def vector_dim(self, path: str) -> int | None:
        if self.get(path) is None:
            return None
        expected = "a floating point vector of a fixed length"
        feature = self.require(path, tfds.features.Tensor, expected)
        if len(feature.shape) != 1 or None in feature.shape or not np.issubdtype(feature.np_dtype, np.floating):
            raise self._mismatch(path, feature, expected)
        return feature.shape[0]

    def _mismatch(self, path: str, feature: tfds.features.FeatureConnector, expected: str) -> DatasetError:
        return DatasetError(f"{self._directory}: feature '{path}' is {feature!r}; expected {expected}")

    def images(self, path: str) -> list[str]:
        return [key for key, feature in self.get(path).items() if isinstance(feature, tfds.features.Image)]


def _open(directory: Path) -> tfds.core.DatasetBuilder:
    if directory.name.startswith(INCOMPLETE_PREFIX):
        raise DatasetError(f"{directory} is a half-written dataset: its writer did not finish")
    if not directory.is_dir():
        halves = sorted(str(path) for path in directory.parent.glob(f"{INCOMPLETE_PREFIX}*_{directory.name}"))
        hint = f"; it was half-written ({', '.join(halves)}): its writer is still running or did not finish" if halves else ""
        raise DatasetError(f"dataset directory {directory} does not exist{hint}")
    for file in ("dataset_info.json", "features.json"):
        if not (directory / file).is_file():
            raise DatasetError(f"{directory} is not a prepared dataset: it has no {file} (expected .../<name>/<version>)")
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # tfds documents none: JSON, protobuf and import errors all reach here
        raise DatasetError(f"{directory} is not a prepared dataset that tfds can open: {error}") from error


def _check_shards(split: tfds.core.SplitInfo) -> None:
    """Opens every shard: a truncated ArrayRecord file opens without a complaint, as one of no records."""
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
        if not os.path.isfile(path):
            raise DatasetError(f"shard {path} is missing")
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        if reader.num_records() != length:
            raise DatasetError(f"shard {path} is truncated or damaged: it has {reader.num_records()} of its {length} records")
        reader.close()
