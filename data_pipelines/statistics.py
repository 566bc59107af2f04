"""Statistics of a dataset's low-dimensional windows, computed without reading an image."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.episode import Episode
from data_pipelines.windows import action_windows, anchors
from mimic_video.config import DataConfig
from mimic_video.transforms import Statistics, compute_statistics

_MEMORY = 2**27  # bytes of actions that are held at once


def action_statistics(episodes: Sequence[Episode], config: DataConfig) -> dict[str, Statistics]:
    """Statistics over every action window of the episodes, repeated steps at their ends included (SPEC 7.1, 8.3).

    Exact, quantiles included: all windows, but only so many steps of their horizon at once as fit `_MEMORY`.

    Returns:
        "action": per-step statistics (A, m); "proprio": (1, p). Raw units.

    Raises:
        ValueError: if an episode has no actions or proprio, or no episode has an anchor.
    """
    chosen = [(episode, anchors(episode.timestamps, config, actions=True)) for episode in episodes]
    if not any(len(steps) for _, steps in chosen):
        raise ValueError(f"no action windows: no episode reaches data.action_delay={config.action_delay} s")
    width = 0 if episodes[0].actions is None else episodes[0].actions.shape[1]
    together = max(1, _MEMORY // (4 * width * sum(len(steps) for _, steps in chosen) + 1))
    actions = []
    for first in range(0, config.action_horizon, together):
        part = dataclasses.replace(
            config, action_delay=config.action_delay + first / config.control_hz,
            action_horizon=min(together, config.action_horizon - first),
        )  # fmt: skip
        windows = [action_windows(episode, steps, part) for episode, steps in chosen]
        actions.append(compute_statistics(np.concatenate([window["actions"] for window in windows])))
    proprio = np.concatenate([window["proprio"] for window in windows])
    return {"action": _join(actions), "proprio": compute_statistics(proprio)}


def _join(steps: Sequence[Statistics]) -> Statistics:
    """Statistics of parts of a horizon as those of the whole."""
    fields = [field.name for field in dataclasses.fields(Statistics)]
    return Statistics(**{name: np.concatenate([getattr(step, name) for step in steps], axis=-2) for name in fields})
