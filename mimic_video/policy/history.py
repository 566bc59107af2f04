"""The observed past that a policy conditions on."""

import collections

import numpy as np


class FrameHistory:
    """The last `past_frames` camera frames at the video rate, kept from frames that arrive at the control rate.

    Every (control_hz / video_hz)-th frame is selected, counting back from the newest, so the window always ends at the
    present. Before enough frames have arrived, the first one stands in for the missing past.
    """

    def __init__(self, past_frames: int, video_hz: float, control_hz: float):
        """Raises ValueError when the control rate is not a whole multiple of the video rate."""
        if past_frames < 1:
            raise ValueError(f"past_frames is {past_frames}; a history needs at least one frame")
        self._stride = round(control_hz / video_hz)
        if self._stride < 1 or not np.isclose(self._stride * video_hz, control_hz, rtol=1e-6):
            raise ValueError(f"control_hz={control_hz:g} is not a whole multiple of video_hz={video_hz:g}")
        self._length = (past_frames - 1) * self._stride + 1
        self._frames: collections.deque[np.ndarray] = collections.deque(maxlen=self._length)

    def reset(self) -> None:
        """Forgets everything: the next frame starts an episode."""
        self._frames.clear()

    def append(self, frame: np.ndarray) -> None:
        """Adds the frame of one control step: uint8 (..., H, W, 3). It is kept by reference, not copied."""
        if self._frames and frame.shape != self._frames[-1].shape:
            raise ValueError(f"frame has shape {frame.shape}; this history holds frames of shape {self._frames[-1].shape}")
        self._frames.extend([frame] * (1 if self._frames else self._length))

    def window(self) -> np.ndarray:
        """uint8 (..., past_frames, H, W, 3), oldest first. Raises RuntimeError before the first frame."""
        if not self._frames:
            raise RuntimeError("the frame history is empty: append the episode's first frame before asking for a window")
        return np.stack(list(self._frames)[:: self._stride], axis=-4)
