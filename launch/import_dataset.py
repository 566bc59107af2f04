"""Imports other people's recordings as an RLDS dataset, which this project trains from and plain tfds reads.

    python launch/import_dataset.py --format=lerobot --source=/data/my_recording --out=data \\
        --camera=primary=observation.images.top --camera=wrist=observation.images.wrist --validation=0.05
    python launch/import_dataset.py --format=libero --source=/data/libero_goal --out=data --image_size=480,640
    python launch/import_dataset.py --format=bridge --source=/data/bridge/raw --out=data --skip_damaged

writes `OUT/NAME/1.0.0` with the splits `train` and `val`. Formats: LeRobot folders of v2.0 to v3.0; HDF5 demonstrations of
LIBERO; raw folders of Bridge v2 (data_pipelines/sources). The dataset appears whole or not at all, so after an interruption the
same command starts anew. What is left out is counted and named by reason.

Steps are stored at one rate. Episodes whose time stamps are not at that rate are resampled: images, joints and commands as the
nearest step has them, poses interpolated (SPEC 8.3).
"""

import collections
import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import app, flags
from tqdm import tqdm

from data_pipelines.episode import ArrayFrames, Episode, Frames
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.windows import TOLERANCE, nearest, poses_at
from data_pipelines.writers import write_rlds

_VALIDATION_SEED = 42  # as the published system's choice (SPEC 8.5)
_LISTED = 5  # names that are printed for a reason


class Source(Protocol):
    """What an episode source of `data_pipelines.sources` offers an import."""

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def control_hz(self) -> float: ...

    @property
    def skipped(self) -> Mapping[str, Sequence[str]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Episode: ...


def _open_lerobot(path: str, **options: Any) -> Source:
    from data_pipelines.sources.lerobot import LeRobotSource  # here and below: each format needs other packages

    return LeRobotSource(path, **options)


def _open_libero(path: str, **options: Any) -> Source:
    from data_pipelines.sources.libero import LiberoSource

    return LiberoSource(path, **options)


def _open_bridge(path: str, **options: Any) -> Source:
    from data_pipelines.sources.bridge_raw import BridgeSource

    return BridgeSource(path, **options)


# Format → how its source is opened, and the flags that it has of its own.
_FORMATS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    "lerobot": (_open_lerobot, ("camera", "state", "action", "action_layout")),
    "libero": (_open_libero, ("upside_down", "instructions")),
    "bridge": (_open_bridge, ("camera", "default_instruction")),
}

_FORMAT = flags.DEFINE_enum("format", None, list(_FORMATS), "Of the source", required=True)
_SOURCE = flags.DEFINE_string("source", None, "Folder, or one file, to import", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the dataset's folder", required=True)
_NAME = flags.DEFINE_string("name", None, "Of the dataset, in snake_case; by default made from the source's name")
_IMAGE_SIZE = flags.DEFINE_list("image_size", None, "HEIGHT,WIDTH in pixels; by default that of the primary camera")
_JPEG_QUALITY = flags.DEFINE_integer("jpeg_quality", 95, "Of stored images", lower_bound=1, upper_bound=100)
_CONTROL_HZ = flags.DEFINE_float("control_hz", None, "Steps per second; by default the source's own (Bridge: 5)")
_VALIDATION = flags.DEFINE_float("validation", 0.0, "Share of the episodes that go to `val`", lower_bound=0.0, upper_bound=0.9)
_FILE_FORMAT: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "file_format", "array_record", ["array_record", "tfrecord"], "Of the dataset"
)
_SKIP_DAMAGED = flags.DEFINE_bool("skip_damaged", False, "Leave damaged episodes out instead of giving up")

_OWN = {
    "camera": flags.DEFINE_multi_string("camera", None, "ROLE=KEY: primary, secondary or wrist, and a feature or image folder"),
    "state": flags.DEFINE_string("state", None, "Feature of the proprioception; empty for none"),
    "action": flags.DEFINE_string("action", None, "Feature of the actions; empty for none"),
    "action_layout": flags.DEFINE_enum("action_layout", None, ["vector", "delta", "pose"], "What actions are, see Episode"),
    "upside_down": flags.DEFINE_bool("upside_down", None, "Whether images are to be rotated by 180 degrees"),
    "instructions": flags.DEFINE_enum("instructions", None, ["published", "recorded"], "From file names, or from the files"),
    "default_instruction": flags.DEFINE_string("default_instruction", None, "Where no label is usable"),
}


@dataclasses.dataclass(frozen=True)
class _ChosenFrames:
    """Some steps of other frames."""

    frames: Frames
    steps: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        return self.frames.take(self.steps[np.asarray(indices, int)].tolist())


def resampled(episode: Episode, hz: float) -> Episode:
    """The episode at `hz` steps a second from its first time stamp on: itself if it is at that rate.

    Images and values are those of the nearest step; actions and proprioception of the layout "pose" are interpolated.

    Raises:
        DatasetError: for actions of the layout "delta": a commanded step belongs to the time between two steps.
    """
    start = episode.timestamps[0]
    if np.allclose(episode.timestamps - start, np.arange(len(episode)) / hz, rtol=0, atol=TOLERANCE):
        return episode
    if episode.action_layout == "delta" and episode.actions is not None:
        raise DatasetError(f"{episode.name}: time stamps are not {hz} steps per second, and commanded steps cannot be resampled")
    times = start + np.arange(int((episode.timestamps[-1] - start + TOLERANCE) * hz) + 1) / hz
    steps = nearest(episode.timestamps, times)
    poses = episode.action_layout == "pose"

    def at_times(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        return poses_at(episode.timestamps, values, times) if poses else values[steps]

    return dataclasses.replace(
        episode,
        timestamps=times,
        frames=_ChosenFrames(episode.frames, steps),
        further_cameras={role: _ChosenFrames(frames, steps) for role, frames in episode.further_cameras.items()},
        proprio=at_times(episode.proprio),
        actions=at_times(episode.actions),
    )


def split_episodes(count: int, share: float) -> dict[str, list[int]]:
    """Episodes of `train` and, if there are any, `val`, in order; the choice depends on the numbers alone."""
    held_out = np.random.default_rng(_VALIDATION_SEED).choice(count, round(share * count), replace=False)
    splits = {"train": [i for i in range(count) if i not in set(held_out.tolist())], "val": sorted(held_out.tolist())}
    return {split: indices for split, indices in splits.items() if indices}


class Import:
    """Episodes of a source on their way into a dataset; counts them and notes what was left out.

    Attributes:
        written: split → numbers of episodes and steps.
        skipped: reason → names.
    """

    def __init__(self, source: Source, hz: float, cameras: Sequence[str], skip_damaged: bool):
        self._source, self._hz, self._cameras, self._skip_damaged = source, hz, set(cameras), skip_damaged
        self.written: dict[str, tuple[int, int]] = {}
        self.skipped: dict[str, list[str]] = collections.defaultdict(list)
        for reason, names in source.skipped.items():
            self.skipped[reason].extend(names)

    def episodes(self, split: str, indices: Sequence[int]) -> Iterator[Episode]:
        """Those episodes, resampled, with a progress bar. Raises DatasetError for a damaged one that is not to be skipped."""
        for index in tqdm(indices, desc=split, unit="episode"):
            episode = self._source[index]
            if missing := self._cameras - {"primary", *episode.further_cameras}:
                self.skipped[f"it has no camera '{min(missing)}'"].append(episode.name)
                continue
            try:
                episode = resampled(episode, self._hz)
                if self._skip_damaged:  # what is damaged must show before the episode is handed on
                    episode = dataclasses.replace(
                        episode,
                        frames=_decoded(episode.frames),
                        further_cameras={role: _decoded(frames) for role, frames in episode.further_cameras.items()},
                    )
            except DatasetError as error:
                if not self._skip_damaged:
                    raise
                self.skipped["it is damaged"].append(str(error))
                continue
            episodes, steps = self.written.get(split, (0, 0))
            self.written[split] = episodes + 1, steps + len(episode)
            yield episode

    def report_skipped(self) -> None:
        for reason, names in self.skipped.items():
            listed = "".join(f"\n  {name}" for name in names[:_LISTED])
            more = f"\n  and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            print(f"left out {len(names)} because {reason}:{listed}{more}")


def _decoded(frames: Frames) -> ArrayFrames:
    return ArrayFrames(frames.take(range(len(frames))))


def source_options() -> dict[str, Any]:
    """Arguments of the format's source from its own flags. Raises DatasetError for a flag of another format."""
    given = {name: flag.value for name, flag in _OWN.items() if flag.value is not None}
    for name in given:
        if name not in _FORMATS[_FORMAT.value][1]:
            raise DatasetError(f"--{name} does not apply to --format={_FORMAT.value}")
    options: dict[str, Any] = {"skip_damaged": _SKIP_DAMAGED.value, **given}
    if "camera" in options:
        pairs = [camera.partition("=") for camera in options.pop("camera")]
        for role, equals, key in pairs:
            if not (role and equals and key):
                raise DatasetError(f"--camera={role}{equals}{key}; expected ROLE=KEY, e.g. primary=observation.images.top")
        if len({role for role, _, _ in pairs}) != len(pairs):
            raise DatasetError(f"--camera names a role twice: {', '.join(role for role, _, _ in pairs)}")
        options["cameras"] = {role: key for role, _, key in pairs}
    for name in ("state", "action"):
        if options.get(name) == "":
            options[name] = None
    return options


def chosen_name() -> str:
    """--name, or one made from the source's."""
    name = _NAME.value
    if name is None:
        source = pathlib.Path(_SOURCE.value).resolve()
        stem = source.stem if source.is_file() else source.name
        name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DatasetError(f"'{name}' is no name for a dataset; pass --name with lower-case letters, digits and underscores")
    return name


def chosen_size(source: Source) -> tuple[int, int]:
    """--image_size, or the source's."""
    if _IMAGE_SIZE.value is None:
        return source.image_size
    try:
        height, width = (int(part) for part in _IMAGE_SIZE.value)
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise DatasetError(f"--image_size={','.join(_IMAGE_SIZE.value)}; expected HEIGHT,WIDTH in pixels")
    return height, width


def import_dataset() -> None:
    name = chosen_name()
    options = source_options()
    if _CONTROL_HZ.value is not None and not _CONTROL_HZ.value > 0:
        raise DatasetError(f"--control_hz={_CONTROL_HZ.value}; expected a positive rate")
    open_source, _ = _FORMATS[_FORMAT.value]
    source = open_source(_SOURCE.value, **options)
    hz = _CONTROL_HZ.value or source.control_hz
    job = Import(source, hz, list(options.get("cameras", ())), _SKIP_DAMAGED.value)
    try:
        path = write_rlds(
            _OUT.value,
            name,
            {split: job.episodes(split, indices) for split, indices in split_episodes(len(source), _VALIDATION.value).items()},
            control_hz=hz,
            image_size=chosen_size(source),
            jpeg_quality=_JPEG_QUALITY.value,
            file_format=_FILE_FORMAT.value,
            description=f"Imported from {_FORMAT.value}: {pathlib.Path(_SOURCE.value).name}",
        )
    finally:
        job.report_skipped()
    counts = ", ".join(f"{episodes} episodes of {steps} steps in {split}" for split, (episodes, steps) in job.written.items())
    print(f"wrote {path}: {counts}, at {hz:g} steps a second, actions of the layout '{source[0].action_layout}'")


def main(_: list[str]) -> None:
    try:
        import_dataset()
    except (FileExistsError, ModuleNotFoundError, ValueError) as error:  # DatasetError is a ValueError
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
