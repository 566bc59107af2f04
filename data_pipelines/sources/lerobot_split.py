"""A LeRobot dataset as training reads it, without an import: its import has the same episodes to the bit, but for JPEG."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.episode import CAMERAS, Episode, require_index
from data_pipelines.rates import check_times, resampled
from data_pipelines.sources.lerobot import LeRobotSource, read_info
from data_pipelines.sources.rlds import DatasetError, DatasetLayout, SplitError
from mimic_video.config import expanded_path
from mimic_video.splits import parse_split

SPLIT = "train"  # the only one that such datasets have
_FOLDERS = ("meta", "data", "videos")


class LeRobotSplit(Sequence[Episode]):
    """All episodes of a LeRobot folder, or slices of them, as an `EpisodeSource`; what its attributes are is said there.

    As in an import, episodes begin at 0 s, and those whose time stamps are not at the dataset's rate are resampled to it. What is
    not an image is read at opening and kept in memory; frames are decoded when they are taken, by decoders of which a process
    keeps few open. An episode whose files are missing, cut off or contradict each other cannot be read, and the others can.

    Args:
        directory: the folder, which holds `meta/info.json`.
        split: `train`, or slices of it by episodes, in the order of their indices.
        spec: an entry of the registry, whose columns are `steps/` and the key of a feature. Without one, `observation.state` and
            `action` are read as they are where they exist, and cameras are told by their names (`LeRobotSource`).
        cameras: those that are needed besides the primary one. Others are not read.
        image_size: (height, width) that every camera's frames are resized to as by `resize_images`; None keeps each camera's.

    Raises:
        DatasetError: as `LeRobotSource`, or if no episode can be read.
        SplitError: a DatasetError, for another split, or slices that are malformed, beyond the episodes or empty.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str,
        *,
        spec: DatasetLayout | None = None,
        cameras: Sequence[str] = CAMERAS,
        image_size: tuple[int, int] | None = None,
    ):
        directory = Path(expanded_path(os.fspath(directory), "the dataset"))
        self.name = f"{directory} split '{split}'"
        try:
            chosen = parse_split(split)
        except ValueError as error:
            raise SplitError(f"split '{split}' of {directory} cannot be read; expected {error}") from error
        if chosen.name != SPLIT:
            raise SplitError(
                f"{directory} has no split '{chosen.name}': LeRobot datasets have one, '{SPLIT}'; expected slices of it, such as "
                f"'{SPLIT}[-10%:]' to validate on and '{SPLIT}[:90%]' to train on"
            )
        info = read_info(directory)
        state, action = (key if key in info["features"] else None for key in ("observation.state", "action"))
        source = LeRobotSource(
            directory, state=state, action=action, image_size=image_size, layout=spec, roles=cameras, keep_damaged=True
        )
        try:
            self.numbers = chosen.numbers(len(source))
        except ValueError as error:
            raise SplitError(f"split '{split}' of {directory} cannot be read: {error}") from error
        self.camera_sizes, self.robot = source.camera_sizes, getattr(spec, "robot", "")
        self.control_hz = float(np.float32(source.control_hz))  # as an import stores it
        self._directory, self._cameras = directory, source.cameras
        self._episodes = [self._read(source, number) for number in self.numbers]
        first = next((episode for episode in self._episodes if isinstance(episode, Episode)), None)
        if first is None:
            raise DatasetError(f"{self.name}: none of its {len(self)} episodes can be read; the last one: {self._episodes[-1]}")
        self.action_layout = first.action_layout
        self.action_dim, self.proprio_dim = (None if v is None else v.shape[1] for v in (first.actions, first.proprio))

    @functools.cached_property
    def identity(self) -> str:
        """Changes with the metadata, the names and sizes of all files or the choice of cameras."""
        digest = hashlib.sha256((self._directory / "meta" / "info.json").read_bytes())
        digest.update(repr((sorted(_files(self._directory)), self._cameras)).encode())
        return digest.hexdigest()

    def _read(self, source: LeRobotSource, number: int) -> Episode | DatasetError:
        try:
            episode = source[number]
            check_times(episode, source.control_hz)
            episode = resampled(episode, self.control_hz)
        except DatasetError as error:
            return error
        return dataclasses.replace(episode, timestamps=np.arange(len(episode)) / self.control_hz)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]  # no slices
        """The episode, its frames not read. Raises IndexError, or DatasetError for a damaged one."""
        require_index(self.name, len(self), index)
        episode = self._episodes[index]
        if isinstance(episode, DatasetError):
            raise episode
        return episode


def _files(directory: Path) -> Iterator[tuple[str, int]]:
    for folder in _FOLDERS:
        for root, _, names in os.walk(directory / folder):
            for name in names:
                path = os.path.join(root, name)
                yield os.path.relpath(path, directory), os.path.getsize(path)
