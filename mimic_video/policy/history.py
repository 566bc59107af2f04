"""The observed past that a policy conditions on."""

import collections
import math

import numpy as np
from jaxtyping import UInt8

_SAME = 1e-6  # seconds: times that are as near count as equal, whatever their rounding


class FrameHistory:
    """Camera frames by their times, and the window at the video rate that ends with the newest one, whatever the camera's rate.

    Every time of the window gets the frame nearest to it, the earlier of two that are as near, as in training (SPEC 8.3). Before
    the first frame, that one stands in.
    """

    def __init__(self, past_frames: int, video_hz: float):
        """Raises ValueError without frames, or for a rate that is none."""
        if past_frames < 1:
            raise ValueError(f"past_frames is {past_frames}; a history needs at least one frame")
        if not (video_hz > 0 and math.isfinite(video_hz)):
            raise ValueError(f"video_hz is {video_hz:g}; expected a positive number")
        self._period = 1 / video_hz
        self._ages = np.arange(past_frames - 1, -1, -1) / video_hz
        self._frames: collections.deque[tuple[float, np.ndarray]] = collections.deque()

    def reset(self) -> None:
        """Forgets everything: the next frame starts an episode."""
        self._frames.clear()

    def append(self, frame: UInt8[np.ndarray, "*b h w 3"], timestamp: float) -> None:
        """Adds a frame, in place of one of the same time, as when a request is repeated.

        It is kept by reference, not copied, and let go when no window needs it any more.

        Args:
            timestamp: seconds of any clock that only moves forward.

        Raises:
            ValueError: if the frame is earlier than the last one, has another shape, or its time is no finite number.
        """
        if not math.isfinite(timestamp):
            raise ValueError(f"the frame's timestamp is {timestamp}; expected seconds")
        if self._frames:
            last, other = self._frames[-1]
            if timestamp < last:
                raise ValueError(
                    f"the frame's timestamp is {timestamp:.3f} s, and the last one's {last:.3f} s; frames have to "
                    "come in order (reset the history for a new episode)"
                )
            if frame.shape != other.shape:
                raise ValueError(f"frame has shape {frame.shape}; this history holds frames of shape {other.shape}")
            if timestamp == last:
                self._frames.pop()
        self._frames.append((timestamp, frame))
        while len(self._frames) > 1 and self._frames[1][0] <= timestamp - self._ages[0]:
            self._frames.popleft()

    def window(self, now: float | None = None) -> UInt8[np.ndarray, "*b f h w 3"]:
        """`past_frames` frames, oldest first.

        Args:
            now: the present on the frames' clock, to be sure that the camera has not stopped; None where that cannot be.

        Raises:
            RuntimeError: before the first frame, or if the newest one is older than a period of the video.
        """
        if not self._frames:
            raise RuntimeError("the frame history is empty: append the episode's first frame before asking for a window")
        newest = self._frames[-1][0]
        if now is not None and now - newest > self._period + _SAME:
            raise RuntimeError(
                f"the newest frame is {now - newest:.3f} s old; expected at most {self._period:g} s, the "
                "period of the video that the policy was trained on: is the camera still sending?"
            )
        return np.stack([self._frames[index][1] for index in self._chosen()], axis=-4)

    def __len__(self) -> int:
        """Frames that are kept."""
        return len(self._frames)

    @property
    def newest(self) -> tuple[float, UInt8[np.ndarray, "*b h w 3"]] | None:
        """The last frame with its time; None before the first."""
        return self._frames[-1] if self._frames else None

    @property
    def distinct(self) -> int:
        """How many different frames the window has."""
        return len(set(self._chosen()))

    def _chosen(self) -> list[int]:
        times = np.array([timestamp for timestamp, _ in self._frames])
        distances = np.abs(times - (times[-1] - self._ages)[:, None])
        return (distances <= distances.min(axis=1, keepdims=True) + _SAME).argmax(axis=1).tolist()
