"""Episodes of a LeRobot dataset (codebase v2.0, v2.1 and v3.0) through pyarrow and PyAV, without the lerobot package.

A folder holds `meta/` (info.json, tasks, episodes), `data/` (Parquet files of everything but videos) and `videos/` (MP4 files).
v2.x has one Parquet file and one MP4 a camera per episode; v3.0 packs several episodes into either and keeps their places in
`meta/episodes`. Cameras are stored as videos or as encoded images inside the Parquet files.
"""

import concurrent.futures
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import CAMERAS, ActionLayout, Episode, Frames, require_index
from data_pipelines.sources.frames import camera_frames, check_roles, frame_steps, sized
from data_pipelines.sources.rlds import DatasetError, DatasetLayout
from data_pipelines.sources.video import VideoFrames, check_whole
from data_pipelines.windows import at_rate
from mimic_video.media import MediaError, read_picture

VERSIONS = ("v2.0", "v2.1", "v3.0")

_WRIST_WORDS = ("wrist", "hand", "gripper")  # in the name of a feature
_READERS = 8  # threads that read Parquet files at opening: waiting for a disk or a bucket, mostly
_INDEX_COLUMNS = ("timestamp", "episode_index", "task_index")


class _Camera(NamedTuple):
    """A camera feature: its key, whether it is stored as video, and its (height, width) in pixels."""

    key: str
    is_video: bool
    size: tuple[int, int]


class _Clip(NamedTuple):
    """Where an episode's frames of one camera are: an MP4 file and the time in it, in seconds, at which the episode starts."""

    path: str
    start: float


class _Entry(NamedTuple):
    """What `meta/` says of an episode. `clips` are those of its video cameras, by feature key."""

    episode: int
    length: int
    data_file: str
    clips: Mapping[str, _Clip]


class _Rows(NamedTuple):
    """The low-dimensional columns of one episode, and the row of its Parquet file at which it starts."""

    first_row: int
    timestamps: np.ndarray
    instruction: str | tuple[str, ...]
    proprio: np.ndarray | None
    actions: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _AsRecorded:
    """What of a `DatasetLayout` says which columns are proprioception and actions; they are taken as they are."""

    state: str | None
    action: str | None
    action_layout: ActionLayout

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"steps/{key}" for key in dict.fromkeys((self.state, self.action)) if key is not None)

    def standardise(self, columns: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        proprio, actions = (None if key is None else columns[f"steps/{key}"] for key in (self.state, self.action))
        return proprio, actions


class LeRobotSource(Sequence[Episode]):
    """A LeRobot dataset as a sequence of episodes, in the order of their indices; thread-safe.

    Low-dimensional columns are read at opening and kept in memory; no image is read before `take`. Proprioception and actions
    are the columns as they were recorded. The instruction of a step is its task. Time stamps at the dataset's rate are made
    exact: in float32, as lerobot stores them, those of long episodes are off by more and more.

    Attributes:
        name: the directory, for error messages.
        image_size: (height, width) of the primary camera's frames in pixels.
        action_dim, proprio_dim: int, or None where that column was not asked for.
        control_hz: the dataset's frames per second.
        cameras: role → feature key, of the cameras that are read; `camera_sizes` role → (height, width) in pixels.
        skipped: reason → what was left out.

    Args:
        directory: the dataset's folder, which holds `meta/info.json`.
        cameras: "primary" and maybe "secondary" and "wrist" → the key of a camera feature, e.g. `observation.images.top`. By
            default chosen by name: features with "wrist", "hand" or "gripper" in it are wrist cameras, the others come in the
            order of info.json, and a single camera is the primary one whatever its name. Depth maps and what else has not three
            channels do not count, and are noted in `skipped`.
        state: key of the proprioception's column, or None to go without.
        action: key of the actions' column, or None to go without.
        action_layout: what the actions are, see `Episode`.
        image_size: (height, width) that the frames of every camera are resized to as by `resize_images`; None keeps them.
        layout: takes the place of `cameras`, `state`, `action` and `action_layout`: an entry of the registry, whose columns are
            `steps/` and the key of a feature.
        roles: of the cameras that are read; of those besides the primary one, others are left out.
        skip_damaged: leaves out, and notes in `skipped`, episodes whose Parquet rows or video files are missing or wrong.
        keep_damaged: leaves them in their place instead, where reading one is an error. Then videos that are not whole, which
            `check_whole` tells, are wrong, too.

    Raises:
        DatasetError: naming the file, and the episode or feature, if the directory is not a LeRobot dataset of a version in
            `VERSIONS`, a feature is missing (with those there are) or of another shape than info.json says, a number is not
            finite, a file is missing or damaged, or the default cannot tell which of several cameras is which.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        cameras: Mapping[str, str] | None = None,
        state: str | None = "observation.state",
        action: str | None = "action",
        action_layout: ActionLayout = "vector",
        image_size: tuple[int, int] | None = None,
        layout: DatasetLayout | None = None,
        roles: Sequence[str] = CAMERAS,
        skip_damaged: bool = False,
        keep_damaged: bool = False,
    ):
        directory = Path(directory)
        self.name = os.fspath(directory)
        info = read_info(directory)
        self.control_hz = float(info["fps"])
        found, unusable = _camera_features(info)
        if layout is not None:
            cameras = {role: key for role in CAMERAS if (key := getattr(layout, role)) is not None}
        self.cameras = dict(cameras) if cameras is not None else _default_cameras(self.name, list(found), unusable)
        check_roles(self.name, self.cameras)
        self.cameras = {role: key for role, key in self.cameras.items() if role in ("primary", *roles)}
        for role, key in self.cameras.items():
            if key in unusable:
                raise DatasetError(f"{self.name}: feature '{key}' for the role '{role}' {unusable[key]}; expected three channels")
            if key not in found:
                raise DatasetError(
                    f"{self.name} has no camera feature '{key}' for the role '{role}'; it has {', '.join(found) or 'none'}"
                )
        self._cameras = {role: found[key] for role, key in self.cameras.items()}
        self._resize = image_size
        self.camera_sizes = {role: image_size or camera.size for role, camera in self._cameras.items()}
        self.image_size = self.camera_sizes["primary"]
        self._layout = _AsRecorded(state, action, action_layout) if layout is None else layout
        keys = (path.removeprefix("steps/") for path in self._layout.columns)
        self._columns = {key: _vector_width(directory, info, key) for key in keys}
        self._keep_damaged = keep_damaged
        self.skipped: dict[str, list[str]] = {}
        for key, reason in unusable.items():
            self.skipped.setdefault(f"it {reason}", []).append(key)

        videos = [camera.key for camera in self._cameras.values() if camera.is_video]
        self._tasks = _read_tasks(directory, info)
        self._episodes = self._read_rows(_read_entries(directory, info, videos), skip_damaged)
        first = next((rows for _, rows in self._episodes if isinstance(rows, _Rows)), None)
        if first is None:
            damage = next((f"; the first: {rows}" for _, rows in self._episodes), "")
            raise DatasetError(f"{directory} has no usable episode; left out: {self.skipped}{damage}")
        self.proprio_dim, self.action_dim = (None if v is None else v.shape[1] for v in (first.proprio, first.actions))

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, position: int) -> Episode:  # type: ignore[override]  # no slices
        """The episode, its frames not read. Raises IndexError, or DatasetError for a damaged one that was kept."""
        require_index(self.name, len(self), position)
        entry, rows = self._episodes[position]
        if isinstance(rows, DatasetError):
            raise rows
        cameras = {role: self._frames(entry, rows, camera) for role, camera in self._cameras.items()}
        primary, further = camera_frames(cameras, self._resize)
        return Episode(
            name=f"{self.name} episode {entry.episode}",
            timestamps=rows.timestamps,
            frames=primary,
            instruction=rows.instruction,
            proprio=rows.proprio,
            actions=rows.actions,
            action_layout=self._layout.action_layout,
            further_cameras=further,
        )

    def _frames(self, entry: _Entry, rows: _Rows, camera: _Camera) -> Frames:
        name = f"{self.name} episode {entry.episode}, feature '{camera.key}'"
        if not camera.is_video:
            return _StoredImages(name, entry.data_file, camera.key, rows.first_row, entry.length, camera.size)
        clip = entry.clips[camera.key]
        return VideoFrames(name, clip.path, clip.start + rows.timestamps, self.control_hz, camera.size)

    def _read_rows(self, entries: Sequence[_Entry], skip_damaged: bool) -> list[tuple[_Entry, _Rows | DatasetError]]:
        files: dict[str, list[_Entry]] = {}
        for entry in entries:
            files.setdefault(entry.data_file, []).append(entry)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            read = {index: rows for file in pool.map(self._read_file, files, files.values()) for index, rows in file.items()}
        episodes: list[tuple[_Entry, _Rows | DatasetError]] = []
        for entry in entries:
            rows = read[entry.episode]
            if self._keep_damaged or not isinstance(rows, DatasetError):
                episodes.append((entry, rows))
            elif skip_damaged:
                self.skipped.setdefault("it is damaged", []).append(str(rows))
            else:
                raise rows
        return episodes

    def _read_file(self, path: str, entries: Sequence[_Entry]) -> dict[int, _Rows | DatasetError]:
        """The rows of the episodes of one Parquet file, by episode index, or what is wrong with them."""
        try:
            table = _read_table(path, (*_INDEX_COLUMNS, *self._columns))
            indices, timestamps, tasks = (_scalars(path, table, key) for key in ("episode_index", "timestamp", "task_index"))
            values = {key: _vectors(path, table, key, width, np.float32) for key, width in self._columns.items()}
        except DatasetError as error:
            return {entry.episode: error for entry in entries}
        read: dict[int, _Rows | DatasetError] = {}
        for entry in entries:
            try:
                read[entry.episode] = self._episode_rows(path, entry, indices, timestamps, tasks, values)
            except DatasetError as error:
                read[entry.episode] = error
        return read

    def _episode_rows(
        self,
        path: str,
        entry: _Entry,
        indices: np.ndarray,
        timestamps: np.ndarray,
        tasks: np.ndarray,
        values: Mapping[str, np.ndarray],
    ) -> _Rows:
        name = f"{path}, episode {entry.episode}"
        (steps,) = np.nonzero(indices == entry.episode)
        if len(steps) != entry.length or len(steps) == 0 or steps[-1] - steps[0] != len(steps) - 1:
            raise DatasetError(f"{name}: has {len(steps)} rows; meta says {entry.length} consecutive ones")
        span = slice(steps[0], steps[-1] + 1)
        if not np.isfinite(timestamps[span]).all() or (np.diff(timestamps[span]) <= 0).any():
            raise DatasetError(f"{name}: feature 'timestamp' does not increase from step to step")
        for key, column in values.items():
            if not np.isfinite(column[span]).all():
                step = int(np.argwhere(~np.isfinite(column[span]))[0, 0])
                raise DatasetError(f"{name}: feature '{key}' is not finite at step {step}")
        used = np.unique(tasks[span]).tolist()
        for task in used:
            if task not in self._tasks:
                raise DatasetError(f"{name}: feature 'task_index' is {task:g}; meta/tasks has {sorted(self._tasks)}")
            if not isinstance(self._tasks[task], str):
                raise DatasetError(f"{name}: task {task:g} of meta/tasks is {self._tasks[task]!r}; expected a text")
        for key, clip in entry.clips.items():
            if not os.path.isfile(clip.path):
                raise DatasetError(f"{name}: the video {clip.path} of feature '{key}' is missing")
            if self._keep_damaged:
                try:
                    check_whole(clip.path)
                except DatasetError as error:
                    raise DatasetError(f"{name}, feature '{key}': {error}") from error
        try:
            standard = self._layout.standardise({f"steps/{key}": column[span] for key, column in values.items()})
        except ValueError as error:
            raise DatasetError(f"{name}: {error}") from error
        proprio, actions = (None if each is None else np.asarray(each, np.float32) for each in standard)
        times = timestamps[span]
        if at_rate(times, self.control_hz):
            times = times[0] + np.arange(len(times)) / self.control_hz
        several = tuple(self._tasks[task] for task in tasks[span].tolist()) if len(used) > 1 else ()
        return _Rows(int(span.start), times, several or self._tasks[used[0]], proprio, actions)


@dataclasses.dataclass(frozen=True)
class _StoredImages:
    """Encoded images in a column of a Parquet file; only the row groups of the wanted steps are read."""

    name: str
    path: str
    key: str
    first_row: int
    length: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return self.length

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3). Raises DatasetError if the file or an image cannot be read."""
        steps = frame_steps(indices, self.length)
        frames = np.empty((len(steps), *self.size, 3), np.uint8)
        try:
            with pq.ParquetFile(self.path) as file:
                lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                bounds = np.cumsum([0, *lengths])
                groups = np.searchsorted(bounds, self.first_row + steps, side="right") - 1
                for group in np.unique(groups):
                    column = file.read_row_group(int(group), columns=[self.key]).column(self.key)
                    for row in np.flatnonzero(groups == group):
                        stored = column[int(self.first_row + steps[row] - bounds[group])].as_py()
                        frames[row] = self._decode(int(steps[row]), stored)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{self.name}: {self.path} cannot be read: {error}") from error
        return frames

    def _decode(self, step: int, stored: Mapping[str, Any] | None) -> np.ndarray:
        encoded = (stored or {}).get("bytes")
        if not encoded:
            raise DatasetError(f"{self.name}: step {step} has no image bytes in {self.path}")
        try:
            frame = read_picture(io.BytesIO(encoded))
        except MediaError as error:
            raise DatasetError(f"{self.name}: the image of step {step} in {self.path} cannot be decoded: {error}") from error
        return sized(f"{self.name}: the image of step {step} in {self.path}", frame, self.size)


def read_info(directory: Path) -> dict[str, Any]:
    """The content of `meta/info.json`. Raises DatasetError as `LeRobotSource`."""
    path = directory / "meta" / "info.json"
    if not path.is_file():
        raise DatasetError(f"{directory} is not a LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version not in VERSIONS:
        raise DatasetError(f"{path}: codebase_version is {version!r}; expected one of {', '.join(VERSIONS)}")
    info["chunks_size"] = info.get("chunks_size") or 1000
    for field, kind in (("fps", (int, float)), ("features", dict), ("data_path", str), ("chunks_size", int)):
        if not isinstance(info.get(field), kind):
            raise DatasetError(f"{path}: field '{field}' is {info.get(field)!r}")
    for key, feature in info["features"].items():
        if not isinstance(feature, dict) or not isinstance(feature.get("shape") or [], list):
            raise DatasetError(f"{path}: feature '{key}' is {feature!r}; expected a type and a shape")
    if not info["fps"] > 0:
        raise DatasetError(f"{path}: field 'fps' is {info['fps']}; expected a positive rate")
    return info


def _camera_features(info: Mapping[str, Any]) -> tuple[dict[str, _Camera], dict[str, str]]:
    """The colour cameras in the order of info.json; and of the others, by their keys, what they are."""
    cameras, others = {}, {}
    for key, feature in info["features"].items():
        if feature.get("dtype") not in ("video", "image"):
            continue
        shape: list[int] = feature.get("shape") or []
        names = [str(name) for name in feature.get("names") or []]
        channels_first = names[0].startswith("channel") if len(names) == 3 else shape[0] == 3 if len(shape) == 3 else False
        if _is_depth(feature):
            others[key] = "is a depth map"
        elif len(shape) != 3 or shape[0 if channels_first else 2] != 3:
            others[key] = f"has shape {shape} with names {names}"
        else:
            height, width = shape[1:] if channels_first else shape[:2]
            cameras[key] = _Camera(key, feature["dtype"] == "video", (height, width))
    return cameras, others


def camera_sizes(info: Mapping[str, Any]) -> dict[str, tuple[int, int] | None]:
    """(height, width) in pixels of the colour cameras by their keys, in the order of info.json."""
    return {key: camera.size for key, camera in _camera_features(info)[0].items()}


def _is_depth(feature: Mapping[str, Any]) -> bool:
    notes = [feature.get("info") or {}, feature.get("video_info") or {}]
    return any(note.get(flag) for note in notes for flag in ("is_depth_map", "video.is_depth_map"))


def _default_cameras(name: str, keys: Sequence[str], unusable: Mapping[str, str]) -> dict[str, str]:
    wrists = [key for key in keys if any(word in key.lower() for word in _WRIST_WORDS)]
    others = [key for key in keys if key not in wrists]
    if len(keys) == 1:
        return {"primary": keys[0]}
    if not others or len(others) > 2 or len(wrists) > 1:
        raise DatasetError(
            f"{name}: which of its cameras is which cannot be told from their names; pass cameras with the role "
            f"'primary' and maybe 'secondary' and 'wrist', or write an entry (launch/new_robot.py). "
            f"It has {', '.join(keys) or 'none'}" + "".join(f"; '{key}' {reason}" for key, reason in unusable.items())
        )
    return dict(zip(("primary", "secondary"), others, strict=False)) | dict(zip(("wrist",), wrists, strict=False))


def _vector_width(directory: Path, info: Mapping[str, Any], key: str) -> int:
    feature = info["features"].get(key)
    if feature is None:
        vectors = [other for other, entry in info["features"].items() if str(entry.get("dtype")).startswith("float")]
        raise DatasetError(f"{directory} has no feature '{key}'; its floating point features are {', '.join(vectors) or 'none'}")
    shape = feature.get("shape") or []
    if len(shape) != 1 or not str(feature.get("dtype")).startswith(("float", "int")):
        raise DatasetError(f"{directory}: feature '{key}' is {feature.get('dtype')} {list(shape)}; expected a vector of numbers")
    return int(shape[0])


def _read_tasks(directory: Path, info: Mapping[str, Any]) -> dict[int, Any]:
    """Task texts by index; what is no text is an error of the episodes that have that task."""
    if info["codebase_version"] == "v3.0":
        path = directory / "meta" / "tasks.parquet"
        table = _read_table(os.fspath(path))
        # The index of a pandas frame: called "task" or, by older writers, left without a name.
        name = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
        if name is None or "task_index" not in table.column_names:
            raise DatasetError(f"{path} has columns {sorted(table.column_names)}; expected 'task_index' and 'task'")
        indices = _scalars(os.fspath(path), table, "task_index").astype(int).tolist()
        return dict(zip(indices, table.column(name).to_pylist(), strict=True))
    path = directory / "meta" / "tasks.jsonl"
    return {_integer(path, row, "task_index"): _field(path, row, "task") for row in _read_lines(path)}


def _read_entries(directory: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[_Entry]:
    """The episodes in order, with the clips of those camera features."""
    if videos and not isinstance(info.get("video_path"), str):
        raise DatasetError(
            f"{directory}/meta/info.json: field 'video_path' is {info.get('video_path')!r}; expected a pattern, "
            f"as feature '{videos[0]}' is a video"
        )
    read = _entries_of_v3 if info["codebase_version"] == "v3.0" else _entries_of_v2
    entries = sorted(read(directory, info, videos), key=lambda entry: entry.episode)
    if not entries:
        raise DatasetError(f"{directory} has no episodes")
    if len({entry.episode for entry in entries}) != len(entries):
        raise DatasetError(f"{directory}: meta/episodes has an episode index twice")
    return entries


def _entries_of_v2(directory: Path, info: Mapping[str, Any], videos: Sequence[str]) -> Iterator[_Entry]:
    path = directory / "meta" / "episodes.jsonl"
    for row in _read_lines(path):
        index, length = _integer(path, row, "episode_index"), _integer(path, row, "length")
        place = {"episode_chunk": index // info["chunks_size"], "episode_index": index}
        clips = {key: _Clip(_fill(directory, info, "video_path", place | {"video_key": key}), 0.0) for key in videos}
        yield _Entry(index, length, _fill(directory, info, "data_path", place), clips)


def _entries_of_v3(directory: Path, info: Mapping[str, Any], videos: Sequence[str]) -> Iterator[_Entry]:
    paths = sorted((directory / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"{directory} has no meta/episodes/*/*.parquet")
    places = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"data/{part}" for part in places)]
    columns += [f"videos/{key}/{part}" for key in videos for part in (*places, "from_timestamp")]
    for path in paths:
        table = _read_table(os.fspath(path), columns)
        for column in columns:
            _scalars(os.fspath(path), table, column)  # numbers without nulls
        for row in table.to_pylist():

            def place(what: str, row=row) -> dict[str, int]:
                return {part: int(row[f"{what}/{part}"]) for part in places}

            clips = {
                key: _Clip(
                    _fill(directory, info, "video_path", place(f"videos/{key}") | {"video_key": key}),
                    float(row[f"videos/{key}/from_timestamp"]),
                )
                for key in videos
            }
            yield _Entry(int(row["episode_index"]), int(row["length"]), _fill(directory, info, "data_path", place("data")), clips)


def _fill(directory: Path, info: Mapping[str, Any], field: str, values: Mapping[str, object]) -> str:
    try:
        return os.fspath(directory / info[field].format(**values))
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(
            f"{directory}/meta/info.json: field '{field}' is {info[field]!r}; expected a pattern of {', '.join(values)}"
        ) from error


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other separators may be part of a text
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}, line {number}: is not JSON: {error}") from error


def _field(path: Path, row: Mapping[str, Any], field: str) -> Any:
    if not isinstance(row, dict) or field not in row:
        raise DatasetError(f"{path}: {row!r} has no field '{field}'")
    return row[field]


def _integer(path: Path, row: Mapping[str, Any], field: str) -> int:
    value = _field(path, row, field)
    if not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise DatasetError(f"{path}: field '{field}' is {value!r}; expected an integer")
    return int(value)


def _read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Those columns of a Parquet file, or all."""
    try:
        with pq.ParquetFile(path) as file:
            missing = [column for column in columns or () if column not in file.schema_arrow.names]
            if missing:
                raise DatasetError(f"{path} has no column '{missing[0]}'; it has {', '.join(file.schema_arrow.names)}")
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _scalars(path: str, table: pa.Table, key: str) -> np.ndarray:
    return _vectors(path, table, key, 1, np.float64)[:, 0]  # exact for indices below 2⁵³


def _vectors(path: str, table: pa.Table, key: str, width: int, dtype: type) -> np.ndarray:
    """A numeric column as (rows, width); columns of width 1 may be stored as plain numbers."""
    column = table.column(key).combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if column.null_count or lengths.tolist() not in ([], [width]):
            raise DatasetError(f"{path}: feature '{key}' has rows of {lengths.tolist()} values; meta/info.json says {width}")
        column = column.flatten()
    elif width != 1:
        raise DatasetError(f"{path}: feature '{key}' is {column.type}; meta/info.json says a vector of {width}")
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DatasetError(f"{path}: feature '{key}' is {column.type} with {column.null_count} nulls; expected numbers")
    return column.to_numpy(zero_copy_only=False).astype(dtype).reshape(-1, width)
