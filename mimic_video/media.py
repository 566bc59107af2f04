"""Pictures and videos on disk ↔ arrays of RGB frames."""

import contextlib
import fractions
import os
import pathlib
import sys
import types

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

Frames = UInt8[np.ndarray, "f h w 3"]

_SMALLEST_GIF = 192  # pixels; smaller frames are enlarged, so that they can be looked at


class MediaError(RuntimeError):
    """A picture or video file that cannot be read or written."""


def read_frames(path: str | pathlib.Path, hz: float, count: int) -> Frames:
    """The last frames of a video at `hz` frames a second, oldest first, at most `count`; of a picture, its one frame.

    Raises:
        MediaError: if there is no such file, or it is neither a picture nor a video.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MediaError(f"there is no file {path}")
    try:
        with Image.open(path) as image:
            duration = image.info.get("duration", 1000 / hz)  # milliseconds a frame, of animated pictures
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        own_hz = 1000 / max(duration, 1)
    except UnidentifiedImageError:
        frames, own_hz = _decode(path)
    chosen = len(frames) - 1 - np.round(np.arange(count)[::-1] * own_hz / hz).astype(int)
    return np.stack([frames[i] for i in chosen if i >= 0])


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


def _decode(path: pathlib.Path) -> tuple[list[np.ndarray], float]:
    av = _av()
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            rate = container.streams.video[0].average_rate
    except (av.FFmpegError, IndexError) as error:
        raise MediaError(f"{path} is neither a picture nor a video: {error}") from error
    if not frames or not rate:
        raise MediaError(f"{path} has no frames")
    return frames, float(rate)


def _av() -> types.ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise MediaError("reading and writing MP4 needs PyAV: pip install 'mimic-video-jax[video]'") from error
    return av
