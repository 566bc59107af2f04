"""Other people's recordings → an RLDS dataset of our layout.

Steps are stored at one rate. Episodes whose time stamps are not at that rate are resampled: images, joints and commands as the
nearest step has them, poses interpolated (SPEC 8.3).
"""

import collections
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines.episode import Episode, blocks
from data_pipelines.rates import check_times, resampled
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.writers import FileFormat, write_rlds
from mimic_video.progress import progress

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


# Format → how its source is opened, and the options that it has of its own.
FORMATS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    "lerobot": (_open_lerobot, ("camera", "state", "action", "action_layout")),
    "libero": (_open_libero, ("upside_down", "instructions")),
    "bridge": (_open_bridge, ("camera", "default_instruction")),
}


def split_episodes(count: int, share: float) -> dict[str, list[int]]:
    """Episodes of `train` and, if there are any, `val`, in order; the choice depends on the numbers alone."""
    held_out = set(np.random.default_rng(_VALIDATION_SEED).choice(count, round(share * count), replace=False).tolist())
    splits = {"train": [i for i in range(count) if i not in held_out], "val": sorted(held_out)}
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
        for index in progress(indices, desc=split, unit="episode"):
            episode = self._source[index]
            if missing := self._cameras - {"primary", *episode.further_cameras}:
                self.skipped[f"it has no camera '{min(missing)}'"].append(episode.name)
                continue
            try:
                check_times(episode, self._source.control_hz)
                episode = resampled(episode, self._hz)
                for frames in episode.cameras.values() if self._skip_damaged else ():
                    for _ in blocks(frames):  # what is damaged must show before the episode is handed on
                        pass
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


def dataset_name(source: str | os.PathLike) -> str:
    """A name made from the source's: lower-case letters, digits and underscores."""
    path = pathlib.Path(source).resolve()
    return re.sub(r"[^a-z0-9]+", "_", (path.stem if path.is_file() else path.name).lower()).strip("_")


def import_dataset(
    source: Source,
    directory: str | os.PathLike,
    name: str,
    *,
    description: str,
    control_hz: float | None = None,
    image_size: tuple[int, int] | None = None,
    jpeg_quality: int = 95,
    file_format: FileFormat = "tfrecord",
    robot: str = "",
    validation_share: float = 0.0,
    cameras: Sequence[str] = (),
    skip_damaged: bool = False,
) -> pathlib.Path:
    """Writes the episodes of a source to `directory/name/1.0.0`, and prints what was left out and what was written.

    Args:
        control_hz, image_size: the source's own unless given.
        file_format, robot: as of `write_rlds`.
        validation_share: of the episodes goes to the split `val`.
        cameras: that an episode must have not to be left out.
        skip_damaged: leaves damaged episodes out instead of giving up.

    Raises:
        DatasetError: for a name or a rate that cannot be, or a damaged episode that is not to be skipped.
        FileExistsError: if the dataset exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DatasetError(f"'{name}' is no name for a dataset; expected lower-case letters, digits and underscores")
    hz = source.control_hz if control_hz is None else control_hz
    if not hz > 0:
        raise DatasetError(f"control_hz is {hz}; expected a positive rate")
    job = Import(source, hz, cameras, skip_damaged)
    splits = split_episodes(len(source), validation_share)
    try:
        path = write_rlds(
            directory,
            name,
            {split: job.episodes(split, indices) for split, indices in splits.items()},
            control_hz=hz,
            image_size=image_size or source.image_size,
            jpeg_quality=jpeg_quality,
            file_format=file_format,
            robot=robot,
            description=description,
        )
    finally:
        job.report_skipped()
    counts = ", ".join(f"{episodes} episodes of {steps} steps in {split}" for split, (episodes, steps) in job.written.items())
    print(f"wrote {path}: {counts}, at {hz:g} steps a second, actions of the layout '{source[0].action_layout}'")
    return path
