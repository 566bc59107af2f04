"""Small synthetic episodes whose pixels, proprio and actions tell their step; here so that worker processes can import them."""

import dataclasses
from types import MappingProxyType

import numpy as np

from data_pipelines.episode import Episode
from data_pipelines.sources.rlds import DatasetError

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
    camera_sizes = MappingProxyType({"primary": SIZE})
    action_dim = 2
    proprio_dim = 3
    control_hz = 10.0

    @property
    def action_layout(self) -> str:
        return self[0].action_layout

    @property
    def numbers(self) -> range:
        return range(len(self))


def step_episode(length: int, *, hz: float = 10.0, episode: int = 0, action_free: bool = False, wrist: bool = False) -> Episode:
    """Step k of episode e has pixels 4k, of its wrist camera 4k + 1, proprio 100e + k and actions 100e + k + 0.5."""
    steps = np.arange(length)
    frames = np.broadcast_to((4 * steps).astype(np.uint8)[:, None, None, None], (length, *SIZE, 3))
    values = (100 * episode + steps)[:, None].astype(np.float32)
    return Episode(
        name=f"episode {episode}",
        timestamps=steps / hz,
        frames=ArrayFrames(frames),
        further_cameras={"wrist": ArrayFrames(frames + np.uint8(1))} if wrist else {},
        instruction=f"do task {episode % 2}",
        proprio=None if action_free else np.tile(values, (1, 3)),
        actions=None if action_free else np.tile(values + 0.5, (1, 2)),
    )


class WristSource(ListSource):
    """With a wrist camera."""

    camera_sizes = MappingProxyType({"primary": SIZE, "wrist": SIZE})

    def __init__(self, *lengths: int):
        super().__init__(step_episode(n, episode=e, wrist=True) for e, n in enumerate(lengths))


class NarrowSource(ListSource):
    """Of a robot with one action dimension and two of proprio, which begins at 5000."""

    action_dim, proprio_dim = 1, 2

    def __init__(self, *lengths: int):
        wide = (step_episode(n, episode=e) for e, n in enumerate(lengths))
        super().__init__(dataclasses.replace(e, proprio=5000 + e.proprio[:, :2], actions=e.actions[:, :1]) for e in wide)


class BrokenFrames(ArrayFrames):
    def take(self, indices):
        raise DatasetError("memory episode 1: image_primary of step 3 cannot be decoded")
