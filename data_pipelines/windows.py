"""Pure functions that cut one training window out of an episode (SPEC 8.3, 8.4).

Times are float64 seconds throughout. A window is anchored at one step of the episode. Times that a window asks for outside
the episode read its first or last step, and the masks say so.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.episode import Episode
from mimic_video.config import DataConfig

TOLERANCE = 1e-4  # seconds. Far below any step, far above the rounding of k / rate with a float32 rate


def anchors(timestamps: np.ndarray, config: DataConfig, *, actions: bool) -> np.ndarray:
    """int64 steps of an episode that a window can be anchored at.

    Every step is an anchor of a video window. With `actions`, the window's first action must lie inside the episode.
    """
    steps = np.arange(len(timestamps))
    if not actions:
        return steps
    return steps[inside(timestamps, timestamps + config.action_delay)]


def video_times(anchor_time: float, config: DataConfig) -> np.ndarray:
    """float64 (past+future,) times of a window's frames; the past ones end at the anchor."""
    return anchor_time + np.arange(1 - config.past_frames, 1 + config.future_frames) / config.video_hz


def action_times(anchor_time: np.ndarray | float, config: DataConfig) -> np.ndarray:
    """float64 (..., A) times of the actions of windows anchored at (...)."""
    return np.asarray(anchor_time)[..., None] + config.action_delay + np.arange(config.action_horizon) / config.control_hz


def video_window(episode: Episode, anchor: int, config: DataConfig) -> dict[str, np.ndarray]:
    """The frames of one window.

    Returns:
        video: uint8 (past+future, H, W, 3), the frames nearest to `video_times`.
        video_mask: bool (past+future,), False where the requested time lies outside the episode.
    """
    times = video_times(episode.timestamps[anchor], config)
    steps, rows = np.unique(nearest(episode.timestamps, times), return_inverse=True)
    return {"video": episode.frames.take(steps.tolist())[rows], "video_mask": inside(episode.timestamps, times)}


def action_windows(episode: Episode, anchors: Sequence[int] | np.ndarray, config: DataConfig) -> dict[str, np.ndarray]:
    """The low-dimensional part of k windows at once; no frame is decoded.

    Returns:
        proprio: float32 (k, 1, p) at the anchors, raw units.
        actions: float32 (k, A, m) nearest to `action_times`, raw units.
        action_mask: bool (k, A), False where the requested time lies outside the episode.

    Raises:
        ValueError: if the episode has no actions or no proprioception.
    """
    if episode.actions is None or episode.proprio is None:
        raise ValueError(f"{episode.name}: action windows need both actions and proprio")
    anchors = np.asarray(anchors)
    times = action_times(episode.timestamps[anchors], config)
    return {
        "proprio": episode.proprio[anchors][:, None],
        "actions": episode.actions[nearest(episode.timestamps, times)],
        "action_mask": inside(episode.timestamps, times),
    }


def action_window(episode: Episode, anchor: int, config: DataConfig) -> dict[str, np.ndarray]:
    """`action_windows` of one anchor, without the leading axis."""
    return {name: values[0] for name, values in action_windows(episode, [anchor], config).items()}


def inside(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """bool, shaped as `times`: whether each time lies within the range of `timestamps` (n,)."""
    return (times >= timestamps[0] - TOLERANCE) & (times <= timestamps[-1] + TOLERANCE)


def nearest(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """int64, shaped as `times`: the step with the nearest timestamp; ties within `TOLERANCE` go to the earlier (SPEC 8.3)."""
    before, after = _neighbours(timestamps, times)
    return np.where(times - timestamps[before] <= timestamps[after] - times + TOLERANCE, before, after)


def linear(timestamps: np.ndarray, values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Values (n, d) at `times` (...), interpolated linearly and constant outside the episode: (..., d), dtype of `values`."""
    before, after = _neighbours(timestamps, times)
    span = np.where(after > before, timestamps[after] - timestamps[before], 1.0)
    weight = np.clip((times - timestamps[before]) / span, 0.0, 1.0)[..., None]
    return ((1 - weight) * values[before] + weight * values[after]).astype(values.dtype)


def _neighbours(timestamps: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps before and after each time; the first or last two steps for times outside."""
    last = len(timestamps) - 1
    after = np.clip(np.searchsorted(timestamps, times), min(1, last), last)
    return np.maximum(after - 1, 0), after
