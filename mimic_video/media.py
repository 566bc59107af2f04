"""Pictures and videos on disk ↔ arrays of RGB frames, turned as the file says that they are to be seen."""

import collections
import contextlib
import fractions
import os
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

Frames = UInt8[np.ndarray, "f h w 3"]
Turn = tuple[bool, int, int]  # whether rows become columns; then 1 or -1, the order of rows and of columns

_SEEK_MARGIN = 1.0  # seconds. Keyframes lie by their decoding time, which is a few frames from the one that they are shown at
_CUT_OFF = 0.5  # seconds that the last frame may begin before its file says that it does
_TIE = 1e-6  # seconds: of two frames that are as near, the earlier one is meant
_SMALLEST_GIF = 192  # pixels; smaller frames are enlarged, so that they can be looked at


class MediaError(RuntimeError):
    """A picture or video file that cannot be read or written."""


def read_frames(path: str | pathlib.Path, hz: float, count: int) -> Frames:
    """The last frames of a video at `hz` frames a second, oldest first, at most `count`; of a picture, its one frame.

    No more than the end of a long video is held in memory, and where its file has an index no more is decoded.

    Raises:
        MediaError: if there is no such file, it is neither a picture nor a video, or what is read of it is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MediaError(f"there is no file {path}")
    span = (count - 1) / hz
    try:
        with Image.open(path) as image:
            frames = _tail(_pictures(image, hz), span)
    except UnidentifiedImageError:
        frames = _video_tail(path, span)
    except Exception as error:  # a file that is damaged can make Pillow raise anything
        raise MediaError(f"{path} cannot be read: {error}") from error
    times = np.array([time for time, _ in frames])
    wanted = times[-1] - np.arange(count)[::-1] / hz
    wanted = wanted[wanted >= times[0] - 0.1 / hz] - _TIE
    chosen = [frames[np.argmin(np.abs(times - time))][1] for time in wanted]
    try:
        return np.stack([frame if isinstance(frame, np.ndarray) else upright_frame(frame) for frame in chosen])
    except MediaError as error:
        raise MediaError(f"{path} cannot be read: {error}") from error


def read_picture(file: str | pathlib.Path | BinaryIO) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in RGB. Raises MediaError if it is damaged, or has more than 8 bits a channel."""
    try:
        with Image.open(file) as image:
            return _upright(image)
    except Exception as error:  # as above
        raise MediaError(str(error)) from error


def upright_frame(frame: Any, turn: Turn | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """A decoded frame of PyAV in RGB, turned by `turn`, or by `display_turn`, whose errors it has."""
    # One thread: windows are made in parallel already, and a thread pool would not survive a fork.
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    swapped, down, right = turn or display_turn(frame)
    return (pixels.swapaxes(0, 1) if swapped else pixels)[::down, ::right]


def display_turn(frame: Any) -> Turn:
    """How a decoded frame of PyAV is to be turned by its display matrix. Raises MediaError for an oblique one."""
    # A frame that is asked for its side data keeps its memory until a garbage collection: here a small copy, which has the same.
    matrix = frame.reformat(width=16, height=16, format="gray", threads=1).side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a·x + c·y, y' = b·x + d·y
    if not ((a and d and not b and not c) or (b and c and not a and not d)):
        raise MediaError(f"its display matrix is {[[a, c], [b, d]]}; expected quarter turns")
    right, down = (c, b) if b else (a, d)
    return bool(b), 1 if down > 0 else -1, 1 if right > 0 else -1


def write_video(path: str | pathlib.Path, frames: Frames, hz: float) -> None:
    """Writes an endlessly repeating GIF or an H.264 MP4, by the suffix of `path`. Raises what `check_writable` does."""
    path = pathlib.Path(path)
    check_writable(path, frames.shape[1:3])
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    if path.suffix == ".gif":
        factor = -(-_SMALLEST_GIF // min(height, width))
        images = [Image.fromarray(frame).resize((width * factor, height * factor), Image.Resampling.NEAREST) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / hz), loop=0)
    else:
        with _av().open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fractions.Fraction(hz).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "18"}
            for frame in frames:
                container.mux(stream.encode(_av().VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())


def stacked(video: UInt8[np.ndarray, "*b v f h w 3"]) -> UInt8[np.ndarray, "*b f y w 3"]:
    """A video for people's eyes: its views one above the other."""
    return np.concatenate(list(np.moveaxis(video, -5, 0)), axis=-3)


def film_strip(
    real: UInt8[np.ndarray, "n f h w 3"], predicted: UInt8[np.ndarray, "n f h w 3"]
) -> UInt8[np.ndarray, "n*(2*h+4) f*w 3"]:
    """One picture of pairs of rows, the frames of a real video above those of the predicted one, a pair for each sample."""
    n, f, h, w, _ = real.shape
    rows = np.full((n, 2 * h + 4, f * w, 3), 255, np.uint8)
    rows[:, :h], rows[:, h : 2 * h] = (np.concatenate(list(video.swapaxes(0, 1)), axis=2) for video in (real, predicted))
    return rows.reshape(-1, f * w, 3)


def check_writable(path: str | pathlib.Path, size: tuple[int, int]) -> None:
    """Raises MediaError unless `write_video` can write frames of `size` there: MP4 needs PyAV and even sizes."""
    suffix = pathlib.Path(path).suffix
    if suffix not in (".gif", ".mp4"):
        raise MediaError(f"{path} ends in {suffix!r}; expected .gif or .mp4")
    if suffix == ".mp4":
        _av()
        if size[0] % 2 or size[1] % 2:
            raise MediaError(f"{path}: frames of {size[0]}x{size[1]} pixels; MP4 needs even numbers")


def matplotlib_figure() -> type:
    """matplotlib's Figure, which draws with Agg and leaves the caller's backend alone.

    Importing matplotlib fails if MPLBACKEND names a backend that is not installed, such as that of a notebook whose kernel has
    started this process; so the variable is read only where it can be obeyed.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    chosen = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install -e '.[report]'") from error
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen
    if chosen:
        with contextlib.suppress(ValueError):  # it is not installed here, and nothing of ours needs it
            matplotlib.rcParams["backend"] = chosen
    return Figure


def crop_to_shape(frames: Frames, size: tuple[int, int]) -> UInt8[np.ndarray, "f y x 3"]:
    """The largest central part that has the aspect ratio of `size` = (height, width)."""
    rows, columns = frames.shape[1:3]
    height, width = min(rows, round(columns * size[0] / size[1])), min(columns, round(rows * size[1] / size[0]))
    top, left = (rows - height) // 2, (columns - width) // 2
    return frames[:, top : top + height, left : left + width]


def _upright(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith(("I", "F")):  # integers of 16 or 32 bits, floats: a conversion would clip them to white
        raise MediaError(f"its pixels are of the mode {image.mode}; expected 8 bits a channel")
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _pictures(image: Image.Image, hz: float) -> Iterator[tuple[float, np.ndarray]]:
    """Times in seconds and frames of a picture that may be animated; a frame that stands still for long comes again at `hz`."""
    start = 0.0
    for frame in ImageSequence.Iterator(image):
        pixels, seconds = _upright(frame), max(image.info.get("duration", 1000 / hz), 1) / 1000
        for period in range(max(1, round(seconds * hz))):
            yield start + period / hz, pixels
        start += seconds


def _tail(frames: Iterable[tuple[float, Any]], span: float) -> list[tuple[float, Any]]:
    """Those of the last `span` seconds, and the one before them, of frames with their times."""
    kept: collections.deque[tuple[float, Any]] = collections.deque()
    for time, frame in frames:
        kept.append((time, frame))
        while len(kept) > 1 and kept[1][0] <= time - span:
            kept.popleft()
    return list(kept)


def _video_tail(path: pathlib.Path, span: float, seek: bool = True) -> list[tuple[float, Any]]:
    """`_tail` of a video, its frames not yet converted. Decodes all of it without `seek`, or where seeking yields too little."""
    av, frames = _av(), []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            first, rate = stream.start_time or 0, stream.average_rate or 1
            length = stream.duration or int((container.duration or 0) / (av.time_base * stream.time_base))
            end = float((first + length) * stream.time_base - 1 / rate)  # when the last frame begins
            known = stream.duration is None and len(container.streams) == 1  # another stream may be longer
            start = first + length - int((span + _SEEK_MARGIN) / stream.time_base)
            seek = seek and start > first
            if seek:
                container.seek(start, stream=stream)
            numbered = enumerate(container.decode(stream))
            frames = _tail(((float(k / rate) if frame.time is None else frame.time, frame) for k, frame in numbered), span)
    except (av.FFmpegError, IndexError) as error:
        if not seek:
            raise MediaError(f"{path} is neither a picture nor a video, or is damaged: {error}") from error
    damaged = [time for time, frame in frames if frame.is_corrupt]
    if seek and (damaged or not frames or frames[0][0] > frames[-1][0] - span):
        return _video_tail(path, span, seek=False)
    if damaged or not frames:
        raise MediaError(f"{path} " + (f"is damaged at {damaged[0]:.2f} s" if damaged else "has no frames"))
    if known and frames[-1][0] < end - _CUT_OFF:  # of a container that can be read though its end is missing
        raise MediaError(f"{path} is cut off: its last frame is at {frames[-1][0]:.2f} s; expected {end:.2f} s")
    return frames


def _av() -> types.ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise MediaError("reading and writing MP4 needs PyAV: pip install 'mimic-video-jax[video]'") from error
    return av
