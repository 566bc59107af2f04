"""Episodes of a prepared RLDS dataset (tfds, TFRecord or ArrayRecord), read at random and without TensorFlow."""

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds

from data_pipelines import buffers
from data_pipelines.episode import CAMERAS, ActionLayout, Episode, Frames, require_index
from data_pipelines.sources.index import Column, Index, Shard, cache_directories, open_index
from data_pipelines.sources.records import DatasetError, RecordFiles, file_sizes, is_remote, parse_example, read_file
from data_pipelines.survey import Survey, kept_reading, readable
from mimic_video.atomic import INCOMPLETE
from mimic_video.config import expanded_path
from mimic_video.media import MediaError, read_picture
from mimic_video.splits import parse_split
from mimic_video.transforms import resize_images

__all__ = ["CONTINUES", "DatasetError", "DatasetLayout", "RldsSource", "SplitError", "open_dataset"]

CONTINUES = "episode_metadata/continues"  # flag of a record whose steps follow those of the record before it
CONTROL_HZ = "episode_metadata/control_hz"
ACTION_LAYOUT = "episode_metadata/action_layout"
ROBOT = "episode_metadata/robot"
_LAST = "steps/is_last"
_METADATA = ("dataset_info.json", "features.json")
_SURVEY_VERSION = 1  # of how values of the same index and layout are computed

_log = logging.getLogger(__name__)


class SplitError(DatasetError):
    """A slice of a split that cannot be read; the message begins with it."""


class DatasetLayout(Protocol):
    """Where a dataset of another layout than ours keeps what an episode has: an entry of the Open-X registry.

    Attributes:
        primary, secondary, wrist: keys of the cameras' images under `steps/observation`; None where there is none. Of the
            last two, those that the dataset lacks are left out: a conversion may have dropped them.
        language: path of the instruction under `steps` or `episode_metadata`, or None.
        control_hz: steps per second where `episode_metadata/control_hz` does not say.
        columns: flattened paths of the low-dimensional features that `standardise` reads.
        action_layout: of the actions that it returns, as `Episode.action_layout`.
    """

    @property
    def primary(self) -> str | None: ...
    @property
    def secondary(self) -> str | None: ...
    @property
    def wrist(self) -> str | None: ...
    @property
    def language(self) -> str | None: ...
    @property
    def control_hz(self) -> float | None: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def action_layout(self) -> ActionLayout: ...

    def standardise(self, columns: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Arrays (n, …) of `columns` → proprio (n, p) and actions (n, m), either may be None."""
        ...


class RldsSource(Sequence[Episode]):
    """One split of a prepared RLDS directory, or slices of one, as a sequence of episodes. Thread-safe; may be pickled.

    Episodes come from a memory-mapped index of the low-dimensional values, which the first opening of a dataset builds
    (`data_pipelines.sources.index`). Of images, `take` reads and decodes those that it is asked for. The checksum makes the first
    look at a TFRecord record read all of it once; an ArrayRecord record is always read whole. Step k of an episode is at
    k / control_hz seconds. A record with the flag `episode_metadata/continues` is joined to the episode of the record before it;
    an episode of which one record is damaged cannot be read. The index is of the whole split, whose slices share it; of episodes
    outside of a slice nothing else is read.

    Without `spec`, datasets have our own layout: `steps/observation/image_primary` and `steps/language_instruction`;
    `steps/action`, `steps/observation/proprio`, `image_secondary`, `image_wrist` and `action_layout` and `robot` of
    `episode_metadata` are read where they exist and other features are ignored.

    Attributes:
        name: the directory and the split, for error messages. Episodes are named by their numbers in the whole split.
        numbers: of the episodes in the whole split, in stored order.
        image_size: (height, width) in pixels of the primary camera's frames.
        camera_sizes: the same of all cameras by name; empty where images of a camera differ in size.
        action_dim, proprio_dim: int, or None where the dataset has none.
        control_hz, action_layout: steps per second and `Episode.action_layout` of the first episode that can be read.
        robot: whose that episode is; empty where the dataset does not say.
        identity: hex digits that change with the metadata, the shards' names and sizes or the choice of cameras, and
            not with where the dataset lies; that of the whole split.

    Args:
        directory: the prepared version's folder, e.g. `.../my_dataset/1.0.0`. A TFRecord dataset may be a URL of fsspec, from
            which `take` fetches whole records: mount or convert such a dataset to train on it.
        split: a split's name, e.g. `train`, or slices of one by episodes, as `mimic_video.splits` reads them: `train[:50]`.
        spec: of a dataset with another layout.
        cameras: those that are needed besides the primary one. Another one that is no RGB image is left out, with a warning.
        control_hz: takes the place of the spec's.
        image_size: (height, width) that every camera's frames are resized to as by `resize_images`; None keeps each camera's.
        cache_dir: holds the index; None is `.mimic_video_index` in the directory or, if that cannot be written,
            `~/.cache/mimic_video/index`.

    Raises:
        DatasetError: if the directory is missing, half-written or not a dataset, the split is missing or empty, a required
            feature is missing or has another type or shape, a shard is missing, or no episode can be read.
        SplitError: a DatasetError, if slices are malformed, beyond the split's episodes or empty.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str,
        *,
        spec: DatasetLayout | None = None,
        cameras: Sequence[str] = (),
        control_hz: float | None = None,
        image_size: tuple[int, int] | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        try:
            chosen = parse_split(split)
        except ValueError as error:
            raise SplitError(f"split '{split}' of {directory} cannot be read; expected {error}") from error
        self.name, self._split = f"{directory} split '{split}'", f"{directory} split '{chosen.name}'"
        dataset = open_dataset(directory)
        directory, shards = dataset.directory, dataset.shards(chosen.name)
        features = _Features(dataset.directory, dataset.features)
        self._resize, self._format = image_size, dataset.file_format
        self._paths = [shard.path for shard in shards]

        self._spec = spec = features.own_layout() if spec is None else spec
        if spec.primary is None:
            raise DatasetError(f"{directory}: its spec names no primary camera")
        paths = {camera: f"steps/observation/{key}" for camera in CAMERAS if (key := getattr(spec, camera)) is not None}
        paths = {camera: path for camera, path in paths.items() if camera == "primary" or features.get(path) is not None}
        self._cameras: dict[str, _Camera] = {}
        for camera, path in paths.items():
            try:
                self._cameras[camera] = _Camera(path, features.image_size(path, fixed=image_size is None))
            except DatasetError as error:
                if camera in ("primary", *cameras):
                    raise
                _log.warning("left out camera '%s': %s", camera, error)

        shard_names = [(os.path.basename(shard.path), shard.records, shard.size) for shard in shards]
        self.identity = hashlib.sha256(dataset.identity + repr((shard_names, paths)).encode()).hexdigest()
        columns = [features.steps(path) for path in spec.columns] or [features.any_steps(paths["primary"])]
        language = None if spec.language is None else features.text(spec.language)
        self._language = None if language is None else language.path
        layout, robot = (features.text(path) if features.get(path) is not None else None for path in (ACTION_LAYOUT, ROBOT))
        self._layout = None if layout is None else layout.path
        rate, continues = (features.record(path) for path in (CONTROL_HZ, CONTINUES))
        last = None if continues is None or features.get(_LAST) is None else features.steps(_LAST)
        self._rate_column = None if rate is None else rate.path
        self._rate = spec.control_hz if control_hz is None else control_hz
        if rate is None and self._rate is None:
            raise DatasetError(f"{directory} has no feature '{CONTROL_HZ}': pass control_hz to RldsSource")
        columns += [column for column in (language, layout, robot, rate, continues, last) if column is not None]
        self._caches = cache_directories(directory, cache_dir)
        index = open_index(
            shards,
            dataset.file_format,
            columns,
            identity=dataset.identity,
            name=self._split,
            directories=self._caches,
        )
        self._index = Index(index, continues and continues.path, last and last.path)
        try:
            self.numbers = chosen.numbers(len(self._index))
        except ValueError as error:
            raise SplitError(f"split '{split}' of {directory} cannot be read: {error}") from error

        self.camera_sizes = {name: tuple(image_size or camera.size or ()) for name, camera in self._cameras.items()}
        self.image_size = self.camera_sizes["primary"]
        first, episode = self._first_readable()
        self.control_hz = self._control_hz(episode.name, first)
        self.action_layout = episode.action_layout
        self.robot = "" if robot is None else self._index.text(robot.path, first)
        self.action_dim, self.proprio_dim = (None if v is None else v.shape[1] for v in (episode.actions, episode.proprio))

    def _first_readable(self) -> tuple[int, Episode]:
        """An episode's first record, and the episode."""
        for index in range(len(self)):
            try:
                return self._index.record_range(self.numbers[index])[0], self[index]
            except DatasetError as error:
                last = error
        raise DatasetError(f"{self.name}: none of its {len(self)} episodes can be read; the last one: {last}") from last

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]  # no slices
        """The episode, its images still encoded. Raises IndexError, or DatasetError if a record or value cannot be used."""
        require_index(self.name, len(self), index)
        number = self.numbers[index]
        name = f"{self._split} episode {number}"
        first, last = self._index.record_range(number)
        if damage := self._index.error(first, last):
            raise DatasetError(f"{name} cannot be read: {damage}")
        bounds = self._index.first_steps(first, last)
        proprio, actions = self._low_dimensional(name, bounds[0], bounds[-1])
        frames: dict[str, Frames] = {
            camera: RecordFrames(self, name, camera, first, bounds - bounds[0]) for camera in self._cameras
        }
        layout = self._spec.action_layout if self._layout is None else self._index.text(self._layout, first)
        if layout not in get_args(ActionLayout):
            raise DatasetError(f"{name}: {ACTION_LAYOUT} is '{layout}'; expected {', '.join(get_args(ActionLayout))}")
        timestamps = np.arange(bounds[-1] - bounds[0]) / self._control_hz(name, first)
        try:
            return Episode(
                name=name,
                timestamps=timestamps,
                frames=frames.pop("primary"),
                further_cameras=frames,
                instruction=self._instruction(first, bounds[0], bounds[-1]),
                proprio=proprio,
                actions=actions,
                action_layout=layout,  # type: ignore[arg-type]  # checked above
            )
        except ValueError as error:
            raise DatasetError(str(error)) from error

    def survey(self) -> Survey:
        """What is known of these episodes. At the first time, and after that from files in the index, they are read once.

        Their steps and rates are those of the index's columns.
        """
        numbers, layout = np.asarray(self.numbers), repr(self._spec)
        depends = [_SURVEY_VERSION, self._index.key, layout, self._rate, hashlib.sha256(numbers.tobytes()).hexdigest()]
        key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
        own = self._index.directory
        folders = dict.fromkeys((own.parent, *self._caches)) if " at 0x" not in layout else {}  # what tells nothing of itself
        reading = kept_reading(self, [folder / own.name / "surveys" for folder in folders], f"{key}.json")
        numbers = numbers[readable(len(self), reading.broken)]
        rates, rate_of = np.array([self._rate]), np.zeros(len(numbers), np.int64)
        if self._rate_column is not None:
            rates, rate_of = np.unique(self._index.first_rows(self._rate_column, numbers), return_inverse=True)
        steps = self._index.steps(numbers)
        longest = int(steps.max(initial=0))
        pairs, clock_of = np.unique(rate_of.reshape(-1) * (longest + 1) + steps, return_inverse=True)
        clocks = [np.arange(pair % (longest + 1)) / float(rates[pair // (longest + 1)]) for pair in pairs.tolist()]
        return Survey(*reading, clocks, clock_of.astype(np.int32))

    def _instruction(self, record: int, start: int, stop: int) -> str | tuple[str, ...]:
        if self._language is None:
            return ""
        if self._language.startswith("steps/"):
            return self._index.texts(self._language, start, stop)
        return self._index.text(self._language, record)

    def _control_hz(self, name: str, record: int) -> float:
        rate = self._rate if self._rate_column is None else float(self._index.column(self._rate_column)[record])
        if rate is None or not rate > 0:
            raise DatasetError(f"{name}: {self._rate_column or 'control_hz'} is {rate}; expected a positive rate")
        return rate

    def _low_dimensional(self, name: str, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Proprio and actions of steps start to stop − 1 of the index."""
        columns = {path: np.asarray(self._index.column(path)[start:stop]) for path in self._spec.columns}
        for path, values in columns.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                step = int(np.argwhere(~np.isfinite(values))[0][0])
                raise DatasetError(f"{name}: '{path}' of step {step} is {values[step].tolist()}; expected finite numbers")
        try:
            proprio, actions = self._spec.standardise(columns)
        except ValueError as error:
            raise DatasetError(f"{name}: {error}") from error
        return _float32(proprio), _float32(actions)

    def encoded(self, record: int, path: str, steps: Sequence[int]) -> list[memoryview]:
        """Images at `path` of a record of the split, as files; `steps` are the record's own.

        Raises:
            DatasetError: naming the shard and the record, if it is damaged or has not got the images.
        """
        row = self._index.records[record]
        file = self._files[int(row["shard"])]
        where = f"shard {file.path}, record {row['record']}"
        try:
            feature = parse_example(file.read(int(row["record"]))).get(path)
            if feature is None:
                raise ValueError("it is missing")
            images = feature.strings(max(steps) + 1)
        except DatasetError:
            raise
        except ValueError as error:
            raise DatasetError(f"{where}: feature '{path}': {error}") from error
        if len(images) <= max(steps):
            raise DatasetError(f"{where}: feature '{path}' has {len(images)} of its {row['steps']} images")
        return [images[step] for step in steps]

    @functools.cached_property
    def _files(self) -> RecordFiles:
        records = self._index.records
        bounds = np.searchsorted(records["shard"], np.arange(len(self._paths) + 1))

        def table(shard: int) -> np.ndarray:
            part = records[bounds[shard] : bounds[shard + 1]]
            return np.stack([part["offset"], part["size"]], axis=1)

        return RecordFiles(self._paths, self._format, table)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_files"}


class RecordFrames:
    """Frames of one camera of one episode, in their records until `take` decodes them.

    Args:
        source: whose records they are in.
        name: of the episode.
        camera: one of `CAMERAS`.
        first_record: of the episode.
        bounds: (records + 1,), the steps of the episode that its records begin with, and its length.
    """

    def __init__(self, source: RldsSource, name: str, camera: str, first_record: int, bounds: np.ndarray):
        self._source, self._name, self._camera, self._first, self._bounds = source, name, camera, first_record, bounds

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3). Raises DatasetError for a damaged record, or a broken image or one of
        another size than the dataset's features say."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self._name} has {len(self)} steps; frames {wanted.min()} to {wanted.max()} are out of range")
        path, size = self._source._cameras[self._camera]
        target = self._source._resize or size
        assert target is not None  # the source has seen to it
        frames = buffers.empty((len(wanted), *target, 3))
        records = np.searchsorted(self._bounds, wanted, side="right") - 1
        for record in np.unique(records).tolist():
            rows = np.flatnonzero(records == record)
            images = self._source.encoded(self._first + record, path, (wanted[rows] - self._bounds[record]).tolist())
            for row, image in zip(rows, images, strict=True):
                try:
                    decode_image(image, size, target, frames[row])
                except ValueError as error:
                    raise DatasetError(f"{self._name}: {path.rpartition('/')[2]} of step {wanted[row]} {error}") from error
        return frames


def decode_image(
    encoded: bytes | memoryview,
    size: tuple[int, int] | None = None,
    target: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes an image file to uint8 RGB (height, width, 3), turned as its EXIF orientation says.

    JPEGs are decoded at full size and exactly as Pillow would, by libjpeg-turbo without the interpreter's lock: a scaled
    decoding would be faster, but differs from the antialiased one by more than training and evaluation should.

    Args:
        encoded: a JPEG, or another format that Pillow knows.
        size: (height, width) that the image must have; None accepts any.
        target: (height, width) that it is resized to as by `resize_images`; None leaves it.
        out: array of the result's shape to put it in.

    Raises:
        ValueError: if the file is broken, has more than 8 bits a channel, or the image has another size.
    """
    try:
        if bytes(encoded[:2]) == b"\xff\xd8" and not _has_exif(bytes(encoded)):
            fits = out is not None and simplejpeg.decode_jpeg_header(encoded)[:2] == out.shape[:2]
            image = simplejpeg.decode_jpeg(encoded, buffer=out if fits else None)
        else:
            image = read_picture(io.BytesIO(encoded))
    except (ValueError, MediaError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    if size is not None and image.shape[:2] != tuple(size):
        raise ValueError(f"is {image.shape[:2]}, not {tuple(size)}")
    if target is not None:
        image = resize_images(image, target)
    if out is None or np.may_share_memory(image, out):
        return image
    out[:] = image
    return out


def _has_exif(jpeg: bytes) -> bool:
    return b"Exif\0\0" in jpeg or b"http://ns.adobe.com/xap/1.0/" in jpeg  # in pixels by chance, too: they are read all the same


class Dataset(NamedTuple):
    """A prepared dataset as its metadata describes it; `identity` is that metadata's bytes."""

    directory: str
    info: tfds.core.DatasetInfo
    file_format: str
    identity: bytes

    @property
    def features(self) -> tfds.features.FeaturesDict:
        return self.info.features

    def shards(self, split: str) -> list[Shard]:
        """Raises DatasetError if the split is missing or empty, or one of its shards is missing."""
        if split not in self.info.splits:
            found = ", ".join(sorted(self.info.splits)) or "none"
            raise DatasetError(f"{self.directory} has no split '{split}'; it has {found}")
        counts = self.info.splits[split].shard_lengths
        if not sum(counts or ()):
            raise DatasetError(f"{self.directory} split '{split}' has no episodes")
        separator = "/" if is_remote(self.directory) else os.sep
        paths = [f"{self.directory}{separator}{name}" for name in sorted(self.info.splits[split].filenames)]
        return [Shard(*shard) for shard in zip(paths, counts, file_sizes(paths), strict=True)]


def open_dataset(directory: str | os.PathLike) -> Dataset:
    """Reads a dataset's metadata. Raises DatasetError as `RldsSource`."""
    if is_remote(directory):
        return _open_remote(os.fspath(directory).rstrip("/"))
    directory = Path(expanded_path(os.fspath(directory), "the dataset"))
    if directory.name.startswith(INCOMPLETE):
        raise DatasetError(f"{directory} is a half-written dataset: its writer did not finish")
    if not directory.is_dir():
        halves = sorted(str(path) for path in directory.parent.glob(f"{INCOMPLETE}*_{directory.name}*"))
        hint = f"; it was half-written ({', '.join(halves)}): its writer is still running or did not finish" if halves else ""
        raise DatasetError(f"dataset directory {directory} does not exist{hint}")
    return _open(str(directory), _metadata(str(directory), str(directory) + os.sep), directory)


def _open_remote(directory: str) -> Dataset:
    metadata = _metadata(directory, directory + "/")
    with tempfile.TemporaryDirectory() as copy:  # tfds reads few kinds of URLs
        for name, content in metadata.items():
            (Path(copy) / name).write_bytes(content)
        return _open(directory, metadata, Path(copy))


def _metadata(directory: str, prefix: str) -> dict[str, bytes]:
    metadata = {}
    for name in _METADATA:
        try:
            metadata[name] = read_file(prefix + name)
        except FileNotFoundError as error:
            raise DatasetError(
                f"{directory} is not a prepared dataset: it has no {name} (expected .../<name>/<version>)"
            ) from error
    return metadata


def _open(directory: str, metadata: Mapping[str, bytes], folder: Path) -> Dataset:
    try:
        info = tfds.builder_from_directory(folder).info
        return Dataset(directory, info, info.file_format.value, b"".join(metadata.values()))
    except Exception as error:  # tfds documents none: JSON, protobuf and import errors all reach here
        raise DatasetError(f"{directory} is not a prepared dataset that tfds can open: {error}") from error


_ACTION, _PROPRIO = "steps/action", "steps/observation/proprio"


@dataclasses.dataclass(frozen=True)
class _OwnLayout:
    """`DatasetLayout` of what `write_rlds` writes."""

    columns: tuple[str, ...]
    primary: str = "image_primary"
    secondary: str = "image_secondary"
    wrist: str = "image_wrist"
    language: str = "language_instruction"
    control_hz: float | None = None
    action_layout: ActionLayout = "vector"

    def standardise(self, columns: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        return columns.get(_PROPRIO), columns.get(_ACTION)


class _Camera(NamedTuple):
    path: str
    size: tuple[int, int] | None  # of its images; None if they may have any


class _Features:
    """The feature tree of one dataset, looked up by path; `steps` is entered as if it were a dictionary."""

    def __init__(self, directory: str, tree: tfds.features.FeaturesDict):
        self._directory, self._tree = directory, tree

    def get(self, path: str) -> Any:
        """The feature, or None. Keys may have slashes themselves, as some of Kuka's and BC-Z's have: the longest one is taken."""
        node, rest = self._tree, path
        while rest:
            if isinstance(node, tfds.features.Sequence) and path == f"steps/{rest}":  # Dataset is one; others are ragged
                node = node.feature
            if not isinstance(node, tfds.features.FeaturesDict):
                return None
            key = max((key for key in node if f"{rest}/".startswith(f"{key}/")), key=len, default=None)
            if key is None:
                return None
            node, rest = node[key], rest[len(key) + 1 :]
        return node

    def require(self, path: str, kind: type, expected: str) -> Any:
        feature = self.get(path)
        if feature is None:
            raise DatasetError(f"{self._directory} has no feature '{path}'; expected {expected}")
        if not isinstance(feature, kind):
            raise self._mismatch(path, feature, expected)
        return feature

    def own_layout(self) -> _OwnLayout:
        columns = tuple(path for path in (_PROPRIO, _ACTION) if self.get(path) is not None)
        self.image_size("steps/observation/image_primary", fixed=False)  # the error about it comes first
        for path in columns:
            self._require_vector(path)
        return _OwnLayout(columns)

    def image_size(self, path: str, *, fixed: bool) -> tuple[int, int] | None:
        expected = f"a uint8 Image of {'a fixed ' if fixed else ''}(height, width, 3)"
        feature = self.require(path, tfds.features.Image, expected)
        unknown = None in feature.shape[:2]
        if len(feature.shape) != 3 or feature.shape[-1] != 3 or feature.np_dtype != np.uint8 or (fixed and unknown):
            raise self._mismatch(path, feature, expected)
        return None if unknown else tuple(feature.shape[:2])

    def _require_vector(self, path: str) -> None:
        expected = "a floating point vector of a fixed length"
        feature = self.require(path, tfds.features.Tensor, expected)
        if len(feature.shape) != 1 or None in feature.shape or not np.issubdtype(feature.np_dtype, np.floating):
            raise self._mismatch(path, feature, expected)

    def steps(self, path: str) -> Column:
        if not path.startswith("steps/"):
            raise DatasetError(f"{self._directory}: '{path}' is not a feature of steps")
        return self._numbers(path, "steps")

    def record(self, path: str) -> Column | None:
        return None if self.get(path) is None else self._numbers(path, "record")

    def any_steps(self, image: str) -> Column:
        """What tells the number of steps where nothing else is asked for: the flags that every RLDS dataset should have."""
        for flag in ("steps/is_first", "steps/is_last"):
            if self.get(flag) is not None:
                return self.steps(flag)
        return Column(image, "count")

    def text(self, path: str) -> Column:
        """The text at `path` under steps, of every step, or under episode_metadata: a Text, or its bytes as integers."""
        candidates = (f"steps/{path}", path, f"episode_metadata/{path}")
        found = next((c for c in candidates if self.get(c) is not None), candidates[0])
        feature = self.require(found, tfds.features.Tensor, "a Text feature")
        dtype = np.dtype(feature.np_dtype)
        kind: Literal["texts", "text"] = "texts" if found.startswith("steps/") else "text"
        if dtype.kind in "OSU" and feature.shape == ():
            return Column(found, kind)
        if dtype.kind in "iu" and len(feature.shape) == 1:
            return self._numbers(found, kind)
        raise self._mismatch(found, feature, "a Text feature")

    def _numbers(self, path: str, kind: Any) -> Column:
        expected = "a Tensor of numbers of a fixed shape"
        feature = self.require(path, tfds.features.Tensor, expected)
        dtype, encoding = np.dtype(feature.np_dtype), feature.to_json_content().encoding
        if {None, 0} & set(feature.shape) or dtype.kind not in "biuf" or encoding not in ("", "none", "bytes", "zlib"):
            raise self._mismatch(path, feature, expected)
        return Column(path, kind, dtype.name, tuple(feature.shape), encoding or "none")

    def _mismatch(self, path: str, feature: tfds.features.FeatureConnector, expected: str) -> DatasetError:
        return DatasetError(f"{self._directory}: feature '{path}' is {feature!r}; expected {expected}")


def _float32(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.float32)
