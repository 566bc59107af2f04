"""Random crops and colours of the windows that training reads, for small datasets.

What is drawn is a function of (seed, sample number, camera): not of hosts, workers or where a run went on. All frames of a window
of a camera, past and future, are changed alike, so that the video model sees one world. Wrist cameras keep their frame: where the
hand is in it says how the camera is mounted, and Octo and openpi leave it, too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipelines import buffers
from mimic_video.config import AugmentationConfig

_STREAM = 0xA06  # tells these draws from others of the same seed
_NUMBERS = 8  # that are drawn for a camera, whatever is switched on
_WHITE = 255.0
_UNCROPPED = ("wrist",)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])  # of NTSC
_RGB = np.linalg.inv(_YIQ)

Box = tuple[float, float, float, float]


class Change(NamedTuple):
    """What happens to the frames of one camera.

    Attributes:
        box: left, upper, right and lower edge of the crop as shares of the frame; None for all of it.
        colour: (3, 4), the affine map of RGB values of 0 to 255; None for none.
    """

    box: Box | None
    colour: Float[np.ndarray, "3 4"] | None


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Changes the frames of samples.

    Attributes:
        config: ranges.
        cameras: names of a sample's views.
        seed: of the run.
    """

    config: AugmentationConfig
    cameras: tuple[str, ...]
    seed: int

    def __call__(self, sample: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The sample of that number with its `video` (v, f, H, W, 3) changed; cameras that it lacks stay black."""
        video, there = sample["video"], sample.get("view_mask", (True,) * len(self.cameras))
        changed = buffers.empty(video.shape)
        for view, change in enumerate(self.draw(number)):
            if there[view]:
                apply(change, video[view], changed[view])
            else:
                changed[view] = video[view]
        return {**sample, "video": changed}

    def draw(self, number: int) -> list[Change]:
        """What happens to each camera of a sample."""
        numbers = np.random.default_rng((self.seed, number, _STREAM)).random((len(self.cameras), _NUMBERS))
        return [_change(self.config, camera, row.tolist()) for camera, row in zip(self.cameras, numbers, strict=True)]


def _change(config: AugmentationConfig, camera: str, draws: list[float]) -> Change:
    def between(low: float, high: float) -> float:
        return low + (high - low) * draws.pop()

    area, shape = between(*config.crop_scale), math.exp(between(*map(math.log, config.crop_ratio)))
    width, height = min(1.0, math.sqrt(area * shape)), min(1.0, math.sqrt(area / shape))
    left, upper = between(0.0, 1.0 - width), between(0.0, 1.0 - height)
    brightness, contrast = between(-config.brightness, config.brightness), between(*config.contrast)
    saturation, hue = between(*config.saturation), between(-config.hue, config.hue)
    whole = camera in _UNCROPPED or (width, height) == (1.0, 1.0)
    colour = colour_map(brightness, contrast, saturation, hue) if config.recolours else None
    return Change(None if whole else (left, upper, left + width, upper + height), colour)


def colour_map(brightness: float, contrast: float, saturation: float, hue: float) -> Float[np.ndarray, "3 4"]:
    """Four changes of colours as one affine map of RGB, so that each pixel is visited, rounded and clipped once.

    Args:
        brightness: is added, as a share of white.
        contrast: factor of the distance from middle grey. It is not the frame's mean, which changes while an arm moves.
        saturation: factor of the distance from the grey of the same luma.
        hue: turn of the chroma plane of YIQ, in whole turns; luma stays.
    """
    cosine, sine = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    chroma = np.eye(3)
    chroma[1:, 1:] = saturation * np.array([[cosine, -sine], [sine, cosine]])
    offset = contrast * _WHITE * (brightness - 0.5) + 0.5 * _WHITE
    return np.concatenate([contrast * _RGB @ chroma @ _YIQ, np.full((3, 1), offset)], axis=1)


def apply(change: Change, frames: UInt8[np.ndarray, "f h w 3"], out: UInt8[np.ndarray, "f h w 3"]) -> None:
    """Writes the changed frames to `out`. Crops are resized as `transforms.resize_images` does."""
    height, width = frames.shape[1:3]
    box = None if change.box is None else tuple(np.multiply(change.box, (width, height, width, height)).tolist())
    colour = None if change.colour is None else tuple(change.colour.ravel().tolist())
    if box is None and colour is None:
        out[:] = frames
        return
    for frame, target in zip(frames, out, strict=True):
        image = Image.fromarray(frame)
        if box is not None:
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        target[:] = image if colour is None else image.convert("RGB", colour)
