"""Frames of video files by their times, exact to the frame, through PyAV (H.264, AV1 and whatever else FFmpeg decodes)."""

import dataclasses
import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence

import av
import numpy as np

from data_pipelines import buffers
from data_pipelines.sources.frames import frame_steps, sized
from data_pipelines.sources.rlds import DatasetError
from mimic_video.media import MediaError, Turn, display_turn, upright_frame

_OPEN_VIDEOS = 8  # kept open by a process; three cameras of two files each fit
_SEEK_FRAMES = 8  # fewer frames than this are decoded and dropped rather than sought over


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """Frames of an MP4 file at float64 `times` (n,) in seconds of that file, strictly increasing."""

    name: str
    path: str
    times: np.ndarray
    hz: float
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.times)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3): the frames that are shown at those steps' times.

        Raises:
            DatasetError: if the file cannot be decoded or, turned as it says, has another size, or has no frame within half a
                frame of a step.
        """
        steps, rows = np.unique(frame_steps(indices, len(self)), return_inverse=True)
        frames = buffers.empty((len(steps), *self.size, 3))
        try:
            decoder = _DECODERS.borrow(self.path)
        except (av.FFmpegError, OSError) as error:
            raise DatasetError(f"{self.name}: {self.path} cannot be opened as a video: {error}") from error
        try:
            for row, step in enumerate(steps.tolist()):
                frame = decoder.frame_at(self.times[step], 0.5 / self.hz)
                if frame is None:
                    raise DatasetError(
                        f"{self.name}: step {step} has no frame: {self.path} has none within half a frame of "
                        f"{self.times[step]:.4f} s"
                    )
                if frame.is_corrupt:
                    raise DatasetError(f"{self.name}: the frame of step {step} in {self.path} is damaged")
                frames[row] = sized(f"{self.name}: the frame of step {step} in {self.path}", decoder.pixels(frame), self.size)
        except (av.FFmpegError, MediaError) as error:
            decoder.close()
            raise DatasetError(f"{self.name}: {self.path} cannot be decoded: {error}") from error
        except BaseException:
            decoder.close()
            raise
        _DECODERS.give_back(decoder)
        in_order = len(rows) == len(steps) and (np.diff(rows) == 1).all()  # as windows ask for them: spares a copy
        return frames if in_order else frames[rows]


def check_whole(path: str) -> None:
    """Looks at an MP4 file's boxes, not at what they hold: what a recording or a copy left behind when it was interrupted shows.

    Raises:
        DatasetError: naming the file, if it is missing, its boxes do not end where it does, or it has no index of its frames
            (`moov`, which is written last).
    """
    try:
        size, kinds, place = os.path.getsize(path), [], 0
        with open(path, "rb") as file:
            while place < size:
                file.seek(place)
                length, kind, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
                length = {0: size - place, 1: long}.get(length, length)  # up to the end of the file; of more than 4 GB
                kinds.append(kind)
                if length < 8:
                    raise DatasetError(f"{path} is no MP4 file, or damaged: at byte {place} no box begins")
                place += length
    except FileNotFoundError as error:
        raise DatasetError(f"the video {path} is missing") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if place != size or b"moov" not in kinds:
        raise DatasetError(f"{path} is truncated, or no MP4 file: it has {size} bytes of {place}, and boxes {kinds}")


class _Decoder:
    """One open video, read at increasing or at random times. Not thread-safe."""

    def __init__(self, path: str):
        self.path = path
        self._container = av.open(path)
        try:
            stream = next(iter(self._container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise av.InvalidDataError(0, "it has no video stream that can be decoded", path)
            self._stream = stream
            self._stream.codec_context.thread_count = 1  # batches are made in parallel already, and frame threads delay seeks
            keys = [entry.timestamp for entry in self._stream.index_entries if entry.is_keyframe]
        except BaseException:
            self._container.close()
            raise
        self._time_base = float(self._stream.time_base or 1)
        self._keyframes = np.sort(np.array(keys, np.float64)) * self._time_base  # decoding times: up to the shown ones
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._last: av.VideoFrame | None = None
        self._turns: dict[int, Turn] = {}  # by rotation, which a frame tells without keeping its memory

    def close(self) -> None:
        self._container.close()

    def frame_at(self, time: float, tolerance: float) -> av.VideoFrame | None:
        """The frame shown within `tolerance` of `time`, both in seconds; None if there is none."""
        if not self._decodes_on_to(time, tolerance):
            self._seek(time, tolerance)
        while self._last is None or self._shown() < time - tolerance:
            self._last = next(self._frames, None)
            if self._last is None:
                return None
        return self._last if self._shown() <= time + tolerance else None

    def pixels(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB, as `upright_frame`; a video that is mirrored is so from its first frame on."""
        if frame.rotation not in self._turns:
            self._turns[frame.rotation] = display_turn(frame)
        return upright_frame(frame, self._turns[frame.rotation])

    def _shown(self) -> float:
        return -math.inf if self._last is None or self._last.pts is None else self._last.pts * self._time_base

    def _decodes_on_to(self, time: float, tolerance: float) -> bool:
        """Whether the frame is the last one or lies ahead of it with no keyframe between that is worth a jump."""
        if self._last is None or self._shown() > time + tolerance:
            return False
        nearest = int(np.searchsorted(self._keyframes, time, side="right")) - 1  # the keyframe that a seek would go to
        return nearest < 0 or bool(self._keyframes[nearest] <= self._shown() + 2 * _SEEK_FRAMES * tolerance)

    def _seek(self, time: float, tolerance: float) -> None:
        """Goes to a keyframe shown at or before `time`: the one that is sought may be decoded before but shown after it."""
        first, margin = self._stream.start_time or 0, 0.0
        while True:
            wanted = max(round((time - margin) / self._time_base), first)
            self._container.seek(wanted, stream=self._stream, backward=True)
            self._frames = iter(self._container.decode(video=self._stream.index))
            self._last = next(self._frames, None)
            if self._last is None or self._shown() <= time + tolerance or wanted == first:
                return
            margin = 2 * margin + 1.0


class _DecoderPool:
    """The most recently used decoders of this process, maybe several of one file. A borrowed one is its borrower's alone."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._inherited: list[list[_Decoder]] = []
        self._idle: list[_Decoder] = []
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Starts anew in a forked child, which shares the file positions, and maybe a held lock, of its parent."""
        self._inherited.append(self._idle)  # not freed: that could wait for threads that only the parent has
        self._idle, self._lock = [], threading.Lock()

    def borrow(self, path: str) -> _Decoder:
        with self._lock:
            decoder = next((each for each in reversed(self._idle) if each.path == path), None)
            if decoder is not None:
                self._idle.remove(decoder)
        return _Decoder(path) if decoder is None else decoder

    def give_back(self, decoder: _Decoder) -> None:
        with self._lock:
            self._idle.append(decoder)
            superfluous, self._idle = self._idle[: -self._capacity], self._idle[-self._capacity :]
        for other in superfluous:
            other.close()


_DECODERS = _DecoderPool(_OPEN_VIDEOS)
os.register_at_fork(after_in_child=_DECODERS.forget)
