"""Small synthetic episodes whose pixels, proprio and actions tell their step."""

from collections.abc import Callable

import numpy as np
import pytest

from data_pipelines.episode import Episode
from data_pipelines.writers import write_rlds
from mimic_video.config import DataConfig

SIZE = (16, 32)  # height, width


class ArrayFrames:
    """Frames in memory; counts how many were taken."""

    def __init__(self, frames: np.ndarray):
        self.frames, self.taken = frames, 0

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, indices):
        self.taken += len(indices)
        return self.frames[list(indices)]


class ListSource(list):
    """A list of episodes with what the loader asks of a source."""

    name = "memory"
    image_size = SIZE
    action_dim = 2
    proprio_dim = 3


def step_episode(length: int, *, hz: float = 10.0, episode: int = 0, action_free: bool = False) -> Episode:
    """Step k of episode e has pixels 4k, proprio 100e + k and actions 100e + k + 0.5."""
    steps = np.arange(length)
    frames = np.broadcast_to((4 * steps).astype(np.uint8)[:, None, None, None], (length, *SIZE, 3))
    values = (100 * episode + steps)[:, None].astype(np.float32)
    return Episode(
        name=f"episode {episode}",
        timestamps=steps / hz,
        frames=ArrayFrames(frames),
        instruction=f"do task {episode % 2}",
        proprio=None if action_free else np.tile(values, (1, 3)),
        actions=None if action_free else np.tile(values + 0.5, (1, 2)),
    )


@pytest.fixture
def make_episode() -> Callable[..., Episode]:
    return step_episode


@pytest.fixture
def make_source() -> Callable[..., ListSource]:
    return lambda *lengths, hz=10.0: ListSource(step_episode(n, hz=hz, episode=e) for e, n in enumerate(lengths))


@pytest.fixture
def config() -> DataConfig:
    """Windows of 5 + 4 frames and 4 actions, all at 10 Hz, the first action one step after the anchor."""
    return DataConfig(image_size=SIZE, past_frames=5, future_frames=4, video_hz=10.0,
                      action_horizon=4, control_hz=10.0, action_delay=0.1)


@pytest.fixture
def rlds(tmp_path):
    """A prepared dataset of three episodes in `train` and one in `val`, at 10 Hz."""
    splits = {"train": [step_episode(n, episode=e) for e, n in enumerate((12, 20, 15))], "val": [step_episode(14, episode=3)]}
    return write_rlds(tmp_path, "steps_demo", splits, control_hz=10.0, image_size=SIZE, description="Steps that count.")
