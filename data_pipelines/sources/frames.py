"""What the sources of other people's formats share: steps, sizes and roles of cameras."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.episode import CAMERAS, Frames
from data_pipelines.sources.rlds import DatasetError
from mimic_video.transforms import resize_images


@dataclasses.dataclass(frozen=True)
class ResizedFrames:
    """Frames resized by `resize_images` to `size` = (height, width) in pixels when they are taken."""

    frames: Frames
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3)."""
        return resize_images(self.frames.take(indices), self.size)


def camera_frames(cameras: Mapping[str, Frames], image_size: tuple[int, int] | None) -> tuple[Frames, dict[str, Frames]]:
    """Cameras by role → the primary one and the further ones, resized unless `image_size` is None."""
    further = dict(cameras)
    if image_size is not None:
        further = {role: ResizedFrames(frames, image_size) for role, frames in cameras.items()}
    return further.pop("primary"), further


def check_roles(name: str, cameras: Mapping[str, str]) -> None:
    """Raises DatasetError unless the keys of `cameras` are "primary" and maybe "secondary" and "wrist"."""
    if "primary" not in cameras or not set(cameras) <= set(CAMERAS):
        raise DatasetError(
            f"{name}: cameras have the roles {sorted(cameras)}; expected 'primary' and maybe 'secondary' and 'wrist'"
        )


def frame_steps(indices: Sequence[int], length: int) -> np.ndarray:
    """int64 steps 0 to length − 1 of indices that may be negative. Raises IndexError."""
    steps = np.asarray(indices, np.int64)
    if ((steps < -length) | (steps >= length)).any():
        raise IndexError(f"steps {steps.tolist()} of an episode of {length}")
    return steps % length


def sized(what: str, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The frame (height, width, 3), if it has that (height, width). Raises DatasetError, which begins with `what`."""
    if frame.shape[:2] != size:
        raise DatasetError(f"{what} is {frame.shape[:2]}; expected {size}")
    return frame
