"""Statistics of a dataset's low-dimensional windows, computed without decoding an image, and their file."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from data_pipelines.episode import Episode
from data_pipelines.windows import action_windows, anchors
from mimic_video.config import DataConfig
from mimic_video.transforms import Statistics, compute_statistics, from_json, to_json


def action_statistics(episodes: Iterable[Episode], config: DataConfig) -> dict[str, Statistics]:
    """Statistics over every action window of the episodes, repeated steps at their ends included (SPEC 7.1, 8.3).

    Returns:
        "action": per-step statistics (A, m); "proprio": (1, p). Raw units.

    Raises:
        ValueError: if an episode has no actions or proprio, or no episode has an anchor.
    """
    windows = [action_windows(episode, anchors(episode.timestamps, config, actions=True), config) for episode in episodes]
    if not any(len(window["actions"]) for window in windows):
        raise ValueError(f"no action windows: no episode reaches data.action_delay={config.action_delay} s")
    return {
        "action": compute_statistics(np.concatenate([window["actions"] for window in windows])),
        "proprio": compute_statistics(np.concatenate([window["proprio"] for window in windows])),
    }


def save_statistics(path: str | os.PathLike, statistics: Mapping[str, Statistics]) -> None:
    """Writes the published JSON form. The file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(to_json(statistics)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(path: str | os.PathLike) -> dict[str, Statistics]:
    """Reads what `save_statistics` wrote.

    Raises:
        FileNotFoundError: naming the path.
        ValueError: naming the path, if the file is not a statistics JSON.
    """
    try:
        return from_json(json.loads(Path(path).read_text()))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset statistics file: {error}") from error
