"""Episodes at one rate: recorded time stamps checked, and steps chosen where they are not at that rate."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.episode import Episode, Frames
from data_pipelines.sources.records import DatasetError
from data_pipelines.windows import at_rate, nearest, poses_at, rate_tolerance

_OTHER_RATE = 1.5  # times as many or few steps: other units, or another rate than the source says
_LONGEST_BREAK = 100.0  # periods that the nearest step may stand for what was not recorded


@dataclasses.dataclass(frozen=True)
class _ChosenFrames:
    """Some steps of other frames."""

    frames: Frames
    steps: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        return self.frames.take(self.steps[np.asarray(indices, int)].tolist())


def check_times(episode: Episode, hz: float) -> None:
    """Raises DatasetError for time stamps that cannot be seconds of a recording at about `hz` steps a second without a break."""
    if len(episode) == 1:
        return
    periods = np.diff(episode.timestamps)
    middle, longest = float(np.median(periods)), int(periods.argmax())
    if not 1 / _OTHER_RATE < middle * hz < _OTHER_RATE:
        raise DatasetError(f"{episode.name}: time stamps are {middle:.4g} apart; expected {1 / hz:.4g}, in seconds")
    if periods[longest] * hz > _LONGEST_BREAK:
        raise DatasetError(
            f"{episode.name}: time stamps go {periods[longest]:.4g} s ahead after step {longest}; expected about {1 / hz:.4g}: a "
            "clock was set, or recording was interrupted"
        )


def resampled(episode: Episode, hz: float) -> Episode:
    """The episode at `hz` steps a second from its first time stamp on: itself if it is at that rate.

    Images and values are those of the nearest step; actions and proprioception of the layout "pose" are interpolated.

    Raises:
        DatasetError: for actions of the layout "delta": a commanded step belongs to the time between two steps.
    """
    start = episode.timestamps[0]
    if at_rate(episode.timestamps, hz):
        return episode
    if episode.action_layout == "delta" and episode.actions is not None:
        raise DatasetError(f"{episode.name}: time stamps are not {hz} steps per second, and commanded steps cannot be resampled")
    duration = episode.timestamps[-1] - start + rate_tolerance(episode.timestamps, hz)
    times = start + np.arange(int(duration * hz) + 1) / hz
    steps = nearest(episode.timestamps, times)
    poses = episode.action_layout == "pose"

    def at_times(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        return poses_at(episode.timestamps, values, times) if poses else values[steps]

    return dataclasses.replace(
        episode,
        timestamps=times,
        instruction=tuple(episode.instruction_at(step) for step in steps),
        frames=_ChosenFrames(episode.frames, steps),
        further_cameras={role: _ChosenFrames(frames, steps) for role, frames in episode.further_cameras.items()},
        proprio=at_times(episode.proprio),
        actions=at_times(episode.actions),
    )
