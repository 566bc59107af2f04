"""Fixtures of the synthetic episodes."""

from collections.abc import Callable

import pytest
from synthetic import SIZE, ListSource, step_episode

from data_pipelines.episode import Episode
from data_pipelines.writers import write_rlds
from mimic_video.config import DataConfig


@pytest.fixture
def make_episode() -> Callable[..., Episode]:
    return step_episode


@pytest.fixture
def make_source() -> Callable[..., ListSource]:
    return lambda *lengths, hz=10.0: ListSource(step_episode(n, hz=hz, episode=e) for e, n in enumerate(lengths))


@pytest.fixture
def config() -> DataConfig:
    """Windows of 5 + 4 frames and 4 actions, all at 10 Hz, the first action one step after the anchor."""
    return DataConfig(
        image_size=SIZE, past_frames=5, future_frames=4, video_hz=10.0, action_horizon=4, control_hz=10.0, action_delay=0.1
    )


@pytest.fixture
def rlds(tmp_path):
    """A prepared dataset of three episodes in `train` and one in `val`, at 10 Hz."""
    splits = {"train": [step_episode(n, episode=e) for e, n in enumerate((12, 20, 15))], "val": [step_episode(14, episode=3)]}
    return write_rlds(tmp_path, "steps_demo", splits, control_hz=10.0, image_size=SIZE, description="Steps that count.")
