"""Pure functions that cut one training window out of an episode (SPEC 8.3, 8.4).

Times are float64 seconds throughout. A window is anchored at one step of the episode. Times that a window asks for outside
the episode read its first or last step, and the masks say so.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from data_pipelines.episode import POSE_DIM, Episode
from mimic_video.config import DataConfig
from mimic_video.transforms import matrix_from_rot6d, relative_poses, rot6d_from_matrix, stack_views

TOLERANCE = 1e-4  # seconds. Far below any step, far above the rounding of k / rate within a window, with a float32 rate
_JITTER = 0.02  # of a period: what time stamps that were rounded to a millisecond at 30 Hz are off by


def anchors(timestamps: np.ndarray, config: DataConfig, *, actions: bool) -> np.ndarray:
    """int64 steps of an episode that a window can be anchored at; they follow one another.

    Every step is an anchor of a video window. With `actions`, the window's first action must lie inside the episode.
    """
    steps = np.arange(len(timestamps))
    if not actions:
        return steps
    return steps[inside(timestamps, timestamps + config.action_delay)]


@dataclasses.dataclass(frozen=True)
class Anchors:
    """The anchors of all windows of some episodes, which are numbered episode by episode, without a list of them.

    Episodes with the same time stamps have the same anchors, so these are of each clock: each different array of time stamps.

    Attributes:
        first, count: int64 (clocks,), the first anchor of an episode, and how many it has.
        clock_of: int (episodes,), which clock is an episode's.
        stride: steps from one anchor to the next.
    """

    first: np.ndarray
    count: np.ndarray
    clock_of: np.ndarray
    stride: int = 1

    @classmethod
    def of(cls, steps: Sequence[np.ndarray], clock_of: np.ndarray) -> Self:
        """Those of each clock, steps that follow one another."""
        first = [int(each[0]) if len(each) else 0 for each in steps]
        return cls(np.array(first, np.int64), np.array(list(map(len, steps)), np.int64), clock_of)

    def __len__(self) -> int:
        """Windows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.count[self.clock_of])

    def place(self, window: int) -> tuple[int, int]:
        """The episode of a window, and its anchor there. Raises IndexError."""
        if not -len(self) <= window < len(self):
            raise IndexError(f"there are {len(self)} windows; index {window} is out of range")
        number = int(window) % len(self)
        episode = int(np.searchsorted(self._ends, number, side="right"))
        clock = self.clock_of[episode]
        return episode, int(self.first[clock] + (number - self._ends[episode] + self.count[clock]) * self.stride)

    def windows_of(self, episode: int) -> range:
        """The numbers of an episode's windows."""
        end = int(self._ends[episode])
        return range(end - int(self.count[self.clock_of[episode]]), end)

    def every(self, stride: int) -> Self:
        """Those of the anchors that are multiples of `stride`; their own stride is 1."""
        first, last = -(-self.first // stride), -(-(self.first + self.count) // stride)
        return dataclasses.replace(self, first=first * stride, count=last - first, stride=stride)


def video_times(anchor_time: float, config: DataConfig) -> np.ndarray:
    """float64 (past+future,) times of a window's frames; the past ones end at the anchor."""
    return anchor_time + np.arange(1 - config.past_frames, 1 + config.future_frames) / config.video_hz


def action_times(anchor_time: np.ndarray | float, config: DataConfig) -> np.ndarray:
    """float64 (..., A) times of the actions of windows anchored at (...)."""
    return np.asarray(anchor_time)[..., None] + config.action_delay + np.arange(config.action_horizon) / config.control_hz


def video_window(episode: Episode, anchor: int, config: DataConfig) -> dict[str, np.ndarray]:
    """The frames of one window.

    Returns:
        video: uint8 (V, past+future, H, W, 3), the frames nearest to `video_times` of the V cameras of `config`; black where
            the episode lacks a camera.
        frame_mask, view_mask: see `video_masks`.
    """
    times = video_times(episode.timestamps[anchor], config)
    steps, rows = np.unique(nearest(episode.timestamps, times), return_inverse=True)
    cameras = {name: frames for name, frames in episode.cameras.items() if name in config.cameras}
    views = stack_views({name: frames.take(steps.tolist()) for name, frames in cameras.items()}, config.cameras)
    video = views if len(steps) == len(times) else views[:, rows]  # copied only where frames repeat
    return {"video": video, **video_masks(episode, anchor, config)}


def video_masks(episode: Episode, anchor: int, config: DataConfig) -> dict[str, np.ndarray]:
    """Which of a window's frames are real.

    Returns:
        frame_mask: bool (past+future,), False where the requested time lies outside the episode.
        view_mask: bool (V,), which of the V cameras of `config` the episode has; only if V > 1.
    """
    masks = {"frame_mask": inside(episode.timestamps, video_times(episode.timestamps[anchor], config))}
    return masks if len(config.cameras) == 1 else masks | {"view_mask": np.isin(config.cameras, list(episode.cameras))}


def action_windows(
    episode: Episode, anchors: Sequence[int] | np.ndarray, config: DataConfig, steps: slice = slice(None)
) -> dict[str, np.ndarray]:
    """The low-dimensional part of k windows at once, or these steps of their horizon; no frame is decoded.

    Returns:
        proprio: float32 (k, 1, p) at the anchors, raw units.
        actions: float32 (k, A, m) at `action_times`, raw units: the nearest ones, or for a "pose" layout interpolated ones as
            seen from the pose at the anchor (SPEC 8.5).
        action_mask: bool (k, A), False where the requested time lies outside the episode.

    Raises:
        ValueError: if the episode has no actions or no proprioception.
    """
    if episode.actions is None or episode.proprio is None:
        raise ValueError(f"{episode.name}: action windows need both actions and proprio")
    anchors = np.asarray(anchors)
    times, proprio = action_times(episode.timestamps[anchors], config)[:, steps], episode.proprio[anchors][:, None]
    if episode.action_layout == "pose":
        actions = relative_poses(proprio, poses_at(episode.timestamps, episode.actions, times))
    else:
        actions = episode.actions[nearest(episode.timestamps, times)]
    return {
        "proprio": proprio,
        "actions": actions,
        "action_mask": inside(episode.timestamps, times),
    }


def action_window(episode: Episode, anchor: int, config: DataConfig) -> dict[str, np.ndarray]:
    """`action_windows` of one anchor, without the leading axis."""
    return {name: values[0] for name, values in action_windows(episode, [anchor], config).items()}


def rate_tolerance(timestamps: np.ndarray, hz: float) -> float:
    """Seconds by which time stamps of `hz` steps a second may be off: a part of a period, and what numbers were rounded by.

    Stamps that are float32 numbers are known to their spacing, which at 2048 s is 0.24 ms. Rates are stored in float32.
    """
    single = timestamps.astype(np.float32)
    rounded = single if np.array_equal(single, timestamps) else (timestamps - timestamps[0]).astype(np.float32)
    return _JITTER / hz + float(np.spacing(np.abs(rounded[[0, -1]])).max())


def at_rate(timestamps: np.ndarray, hz: float) -> bool:
    """Whether step k is k / hz seconds after the first one, within `rate_tolerance`."""
    expected = timestamps[0] + np.arange(len(timestamps)) / hz
    return bool(np.abs(timestamps - expected).max() <= rate_tolerance(timestamps, hz))


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


def poses_at(timestamps: np.ndarray, poses: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Pose vectors (n, 10) at `times` (...), constant outside the episode: float32 (..., 10) (SPEC 8.3).

    Positions are interpolated linearly and rotations along the shortest arc; the gripper linearly, or if it has at most two
    values, as the nearest step has it: there is nothing between open and closed.
    """
    if len(timestamps) == 1:
        return np.broadcast_to(poses[0], (*times.shape, POSE_DIM)).astype(np.float32)
    turns = Slerp(timestamps, Rotation.from_matrix(matrix_from_rot6d(poses[:, 3:9])))
    matrices = turns(np.clip(times, timestamps[0], timestamps[-1]).ravel()).as_matrix()
    binary = len(np.unique(poses[:, 9])) <= 2
    gripper = poses[nearest(timestamps, times), 9:] if binary else linear(timestamps, poses[:, 9:], times)
    rotation = rot6d_from_matrix(matrices).reshape(*times.shape, 6)
    return np.concatenate([linear(timestamps, poses[:, :3], times), rotation, gripper], axis=-1).astype(np.float32)


def _neighbours(timestamps: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps before and after each time; the first or last two steps for times outside."""
    last = len(timestamps) - 1
    after = np.clip(np.searchsorted(timestamps, times), min(1, last), last)
    return np.maximum(after - 1, 0), after
