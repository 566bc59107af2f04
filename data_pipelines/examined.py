"""What of a dataset is looked at to find out why a policy does not work."""

from typing import Any

import numpy as np

from data_pipelines.episode import Episode
from data_pipelines.inspection import spread
from data_pipelines.loader import WindowDataset
from data_pipelines.windows import action_windows, anchors
from mimic_video.config import DataConfig
from mimic_video.evaluation.recordings import Recording
from mimic_video.transforms import relative_poses


def examined_windows(windows: WindowDataset, config: DataConfig, episodes: int, count: int) -> list[dict[str, Any]]:
    """At most `count` windows of each of at most `episodes` episodes, both evenly spread.

    Each has the number of its "episode" besides and, where there are actions, "held": the command before it as a chunk.
    """
    names = [number for number in range(len(windows.episodes)) if windows.windows_of(number)]
    found = []
    for chosen in spread(len(names), episodes):
        own = windows.windows_of(names[chosen])
        for index in spread(len(own), count):
            number, anchor = windows.place(own[index])
            window = {**windows[own[index]], "episode": number}
            if "actions" in window:
                window["held"] = _held(windows.episodes[number], anchor, config)
            found.append(window)
    return found


def _held(episode: Episode, anchor: int, config: DataConfig) -> np.ndarray:
    """The command of the step before, as every action of a chunk."""
    assert episode.actions is not None and episode.proprio is not None
    last = episode.actions[max(anchor - 1, 0)]
    if episode.action_layout == "pose":
        last = relative_poses(episode.proprio[anchor], last)
    return np.tile(last, (config.action_horizon, 1))


def recordings(windows: WindowDataset, config: DataConfig) -> list[Recording]:
    """The numbers of all episodes that have windows."""
    found = []
    for episode in windows.episodes:
        steps = anchors(episode.timestamps, config, actions=True)
        if len(steps):
            assert episode.actions is not None and episode.proprio is not None
            targets = action_windows(episode, steps, config, slice(0, 1))["actions"][:, 0]
            found.append(Recording(episode.actions, episode.proprio, targets))
    return found
