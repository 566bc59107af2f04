"""Transforms of observations and actions, each next to its inverse. NumPy only.

One definition serves training, evaluation, serving and export, so a policy cannot see other numbers than it was trained on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

NormalizerMode = Literal["none", "identity", "variance", "squash", "squash_hard"]

PERCENTILES = np.linspace(0.0, 100.0, 1001)  # grid of `Statistics.percentiles`, in percent
_P2, _P98 = 20, 980  # rows of that grid
_CLAMP_MARGIN = 1.5  # values are clamped at this multiple of the distance from the centre to the 2nd or 98th percentile
_CONSTANT = 1e-5  # a dimension that spreads less than this is shifted but not scaled


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one key over a training set, per horizon step and dimension (SPEC 7.1).

    All arrays are float32 (H, d) in the key's raw units, except `percentiles`, which is (1001, H, d).
    """

    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    percentiles: np.ndarray
    clamp_min: np.ndarray  # mean + 1.5 (p2 − mean)
    clamp_max: np.ndarray  # mean + 1.5 (p98 − mean)
    mean_clamped: np.ndarray  # of the values clipped to [clamp_min, clamp_max]
    std_clamped: np.ndarray


def compute_statistics(samples: np.ndarray) -> Statistics:
    """Reduces samples (N, H, d) in raw units over their first axis (SPEC 7.1).

    Raises:
        ValueError: if `samples` is not a non-empty (N, H, d) array of finite numbers.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 3 or len(samples) == 0:
        raise ValueError(f"statistics need samples of shape (N, H, d) with N > 0; got {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError(f"statistics need finite samples; first bad index (sample, step, dim) is {_first_bad(samples)}")
    mean = samples.mean(axis=0, dtype=np.float64)
    percentiles = np.percentile(samples, PERCENTILES, axis=0)
    clamp_min = mean + _CLAMP_MARGIN * (percentiles[_P2] - mean)
    clamp_max = mean + _CLAMP_MARGIN * (percentiles[_P98] - mean)
    clamped = np.clip(samples, clamp_min, clamp_max)
    reduced = Statistics(
        min=samples.min(axis=0),
        max=samples.max(axis=0),
        mean=mean,
        std=samples.std(axis=0, dtype=np.float64),
        percentiles=percentiles,
        clamp_min=clamp_min,
        clamp_max=clamp_max,
        mean_clamped=clamped.mean(axis=0, dtype=np.float64),
        std_clamped=clamped.std(axis=0, dtype=np.float64),
    )
    return Statistics(**{name: value.astype(np.float32) for name, value in vars(reduced).items()})


def to_json(statistics: Mapping[str, Statistics]) -> dict[str, dict[str, Any]]:
    """{key: {field: nested lists}}, the published `dataset_statistics` form (SPEC 7.1). `from_json` inverts it exactly."""
    return {key: {name: value.tolist() for name, value in vars(entry).items()} for key, entry in statistics.items()}


def from_json(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Statistics]:
    """Statistics from the published JSON form.

    Raises:
        ValueError: for a key with missing or unknown fields, or fields of contradicting shapes.
    """
    return {key: _statistics_from_lists(key, fields) for key, fields in values.items()}


def _statistics_from_lists(key: str, fields: Mapping[str, Any]) -> Statistics:
    expected = {field.name for field in dataclasses.fields(Statistics)}
    if set(fields) != expected:
        raise ValueError(f"statistics of '{key}': missing fields {sorted(expected - set(fields))}, "
                         f"unknown fields {sorted(set(fields) - expected)}")
    arrays = {name: np.asarray(value, np.float32) for name, value in fields.items()}
    shape = arrays["mean"].shape
    for name, array in arrays.items():
        wanted = (len(PERCENTILES), *shape) if name == "percentiles" else shape
        if len(shape) != 2 or array.shape != wanted:
            raise ValueError(f"statistics of '{key}': '{name}' has shape {array.shape}; expected {wanted}, with a mean of (H, d)")
    return Statistics(**arrays)


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """y = clip((x − shift) · scale, low, high), and back (without the clip) by x = y / scale + shift (SPEC 7.1).

    The parameters are float32 (H, d), or () for the mode `none`, which leaves any shape as it is. `key` is the name of the
    values, for error messages.
    """

    shift: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    key: str = "values"

    @classmethod
    def from_statistics(cls, statistics: Statistics, mode: NormalizerMode, key: str = "values") -> Self:
        """Parameters of one mode.

        none: leaves values of any shape as they are. identity: the same, but insists on the statistics' (H, d).
        variance: clamped mean and deviation to 0 and 1, clamped at `clamp_min` and `clamp_max`.
        squash: 2nd and 98th percentile to −1 and 1, clamped at ±1.5.
        squash_hard: that clamp range, cut to [min, max], to −1 and 1, clamped at ±1.

        Raises:
            ValueError: for an unknown mode.
        """
        if mode == "none":
            return cls._build(np.float32(0), np.float32(1), -np.inf, np.inf, key)
        if mode == "identity":
            return cls._build(np.zeros_like(statistics.mean), np.ones_like(statistics.mean), -np.inf, np.inf, key)
        if mode == "variance":
            shift = statistics.mean_clamped
            scale = _reciprocal(statistics.std_clamped)
            return cls._build(shift, scale, (statistics.clamp_min - shift) * scale, (statistics.clamp_max - shift) * scale, key)
        p2, p98 = statistics.percentiles[_P2], statistics.percentiles[_P98]
        if mode == "squash":
            return cls._build((p98 + p2) / 2, _reciprocal((p98 - p2) / 2), -_CLAMP_MARGIN, _CLAMP_MARGIN, key)
        if mode == "squash_hard":
            centre, reach = (p98 + p2) / 2, _CLAMP_MARGIN * (p98 - p2) / 2
            low, high = np.maximum(centre - reach, statistics.min), np.minimum(centre + reach, statistics.max)
            return cls._build((high + low) / 2, _reciprocal((high - low) / 2), -1.0, 1.0, key)
        raise ValueError(f"normaliser mode of '{key}' is {mode!r}; expected none, identity, variance, squash or squash_hard")

    @classmethod
    def _build(cls, shift, scale, low, high, key: str) -> Self:
        shape = np.shape(shift)
        shift, scale, low, high = (np.broadcast_to(np.asarray(value, np.float32), shape) for value in (shift, scale, low, high))
        return cls(shift, scale, low, high, key)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Raw units (..., H, d) → float32 normalised units of the same shape. Raises ValueError for another (H, d)."""
        return np.clip((self._fitting(values) - self.shift) * self.scale, self.low, self.high)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Normalised units (..., H, d) → float32 raw units of the same shape. Raises ValueError for another (H, d)."""
        return self._fitting(values) / self.scale + self.shift

    def _fitting(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if self.shift.ndim and values.shape[-2:] != self.shift.shape:
            raise ValueError(f"'{self.key}' has shape {values.shape}; the normaliser expects (..., H, d) = (..., "
                             f"{', '.join(map(str, self.shift.shape))})")
        return values


def resize_images(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 RGB images (..., H, W, 3) to `size` = (height, width) pixels (SPEC 8.5).

    Bilinear and antialiased; the aspect ratio is not kept. Images that have the size already are returned as they are.

    Raises:
        ValueError: if `images` is not uint8 (..., H, W, 3).
    """
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 (..., H, W, 3)")
    if images.shape[-3:-1] == tuple(size):
        return images
    height, width = size
    resized = np.empty((*images.shape[:-3], height, width, 3), np.uint8)
    for index in np.ndindex(images.shape[:-3]):
        resized[index] = Image.fromarray(images[index]).resize((width, height), Image.Resampling.BILINEAR)
    return resized


def _reciprocal(spread: np.ndarray) -> np.ndarray:
    return 1 / np.where(spread < _CONSTANT, 1, spread)


def _first_bad(samples: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(~np.isfinite(samples))[0])
