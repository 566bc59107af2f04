"""Folders with a dataset of any format: which one it is, and how it is opened. The loader sees `EpisodeSource`s alone."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.episode import EpisodeSource
from data_pipelines.oxe.spec import DatasetSpec, DeclaredFeature, flatten_features
from data_pipelines.sources.records import is_remote
from data_pipelines.sources.rlds import DatasetError, RldsSource, open_dataset
from mimic_video.atomic import INCOMPLETE
from mimic_video.config import expanded_path

VERSION = re.compile(r"\d+\.\d+\.\d+")

Directory = str | os.PathLike
Features = Mapping[str, DeclaredFeature]


class Format(NamedTuple):
    """How datasets of one format are read.

    Attributes:
        marks: files by which a folder shows that it has such a dataset.
        splits: directory → names of its splits.
        features: directory → its features by path, as `check_schema` compares them with an entry; None for a format that says at
            opening what an entry has and the dataset lacks.
        open: directory, split, entry or None, cameras and image size → the split.
    """

    marks: tuple[str, ...]
    splits: Callable[[Directory], Sequence[str]]
    features: Callable[[Directory], Features | None]
    open: Callable[[Directory, str, DatasetSpec | None, Sequence[str], tuple[int, int]], EpisodeSource]


def _open_rlds(
    directory: Directory, split: str, spec: DatasetSpec | None, cameras: Sequence[str], image_size: tuple[int, int]
) -> EpisodeSource:
    size = None if spec is None else image_size  # of our own layout, sizes are the writer's choice
    return RldsSource(directory, split, spec=spec, cameras=cameras, image_size=size)


def _open_lerobot(
    directory: Directory, split: str, spec: DatasetSpec | None, cameras: Sequence[str], image_size: tuple[int, int]
) -> EpisodeSource:
    return _lerobot().LeRobotSplit(directory, split, spec=spec, cameras=cameras, image_size=image_size)


def _lerobot() -> Any:
    try:
        from data_pipelines.sources import lerobot_split  # here: PyAV and pyarrow are needed for this format alone
    except ModuleNotFoundError as error:
        raise DatasetError(f"a LeRobot dataset needs {error.name}: pip install -e '.[data]'") from error
    return lerobot_split


FORMATS = {
    "RLDS": Format(
        ("dataset_info.json", "features.json"),
        lambda directory: sorted(open_dataset(directory).info.splits),
        lambda directory: flatten_features(open_dataset(directory).features),
        _open_rlds,
    ),
    "LeRobot": Format(("meta/info.json",), lambda _: (_lerobot().SPLIT,), lambda _: None, _open_lerobot),
}


def versions(folder: Path) -> list[Path]:
    """Folders in it that are called like versions, 1.0.0, the newest one last."""
    found = [path for path in folder.glob("*") if VERSION.fullmatch(path.name)]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def find_format(directory: Directory) -> str | None:
    """The name of the format of the dataset in a folder; None if there is none. What is at a URL is RLDS."""
    if is_remote(directory):
        return "RLDS"
    folder = Path(expanded_path(os.fspath(directory), "the dataset"))
    return next((name for name, format in FORMATS.items() if any((folder / mark).is_file() for mark in format.marks)), None)


def format_of(directory: Directory) -> Format:
    """How the dataset in a folder is read.

    Raises:
        DatasetError: saying that the folder is not there, or has no dataset of a format of `FORMATS`.
    """
    name = find_format(directory)
    if name is None:
        folder = Path(expanded_path(os.fspath(directory), "the dataset"))
        if not folder.is_dir() or folder.name.startswith(INCOMPLETE):
            open_dataset(folder)  # raises, and knows of half-written ones
        known = [path for path in versions(folder) if find_format(path)]
        marks = ", or ".join(f"{format.marks[0]} ({name})" for name, format in FORMATS.items())
        hint = f"; did you mean {known[-1]}?" if known else ""
        raise DatasetError(f"{folder} has no dataset of a known format: expected a folder with {marks}{hint}")
    return FORMATS[name]
