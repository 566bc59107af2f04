"""Transforms of observations and actions, each next to its inverse. NumPy only.

One definition serves training, evaluation, serving and export, so a policy cannot see other numbers than it was trained on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Float32, UInt8
from numpy.typing import ArrayLike, DTypeLike
from PIL import Image

PerStep = Float[np.ndarray, "h d"]  # of every step of a horizon and every dimension
Poses = Float[np.ndarray, "*#b 10"]
NormalizerMode = Literal["identity", "variance", "squash", "squash_hard"]

PERCENTILES = np.linspace(0.0, 100.0, 1001)  # grid of `Statistics.percentiles`, in percent
_P2, _P98 = 20, 980  # rows of that grid
_CLAMP_MARGIN = 1.5  # values are clamped at this multiple of the distance from the centre to the 2nd or 98th percentile
_IDENTITY = (0.0, 1.0, -np.inf, np.inf)  # shift, scale, low, high
_CONSTANT = 1e-5  # a dimension that spreads less than this is shifted but not scaled
_FAR = 50.0  # standard deviations: only one value in 2500 can be as far from the mean, so it may be an error

_POSE_PARTS, _POSE_BOUNDS, _POSE_DIM = (3, 6, 1), (3, 9), 10  # position, rot6d and gripper of a pose vector (SPEC 8.5)
_SHORTEST = 1e-9  # a row of a rotation shorter than this has no direction
_PARALLEL = 1e-6  # sine of the angle between two rows below which float32 cannot tell their plane
_SKEW = 1e-2  # recorded matrices are rotations up to this, in every entry of R·Rᵀ

# Keys of a published statistics file, by robot: our key → its parts in the order of a pose vector (SPEC 7.1).
PUBLISHED_STATISTICS = {
    "bridge": {
        "action": ("action/eef_pos_lowdim", "action/eef_rot_lowdim", "action/gripper_action_lowdim"),
        "proprio": ("obs/eef_pos_lowdim", "obs/eef_rot_lowdim", "obs/gripper_state_lowdim"),
    },
    "libero": {
        "action": ("action/eef_pos_ref_delta_lowdim", "action/eef_rot_ref_delta_lowdim", "action/gripper_action_lowdim"),
        "proprio": ("obs/eef_pos_lowdim", "obs/eef_rot_lowdim", "obs/gripper_lowdim"),
    },
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one key over a training set, per horizon step and dimension (SPEC 7.1).

    All arrays are float32 (H, d) in the key's raw units, except `percentiles`, which is (1001, H, d).
    """

    min: PerStep
    max: PerStep
    mean: PerStep
    std: PerStep
    percentiles: Float[np.ndarray, "1001 h d"]
    clamp_min: PerStep  # mean + 1.5 (p2 − mean)
    clamp_max: PerStep  # mean + 1.5 (p98 − mean)
    mean_clamped: PerStep  # of the values clipped to [clamp_min, clamp_max]
    std_clamped: PerStep

    @property
    def two_valued(self) -> tuple[int, ...]:
        """Dimensions that have two values at every step, as a gripper's commands do, up to one value in a hundred."""
        low, high, mean, std = (np.float64(value) for value in (self.min, self.max, self.mean, self.std))
        at_ends = std**2 >= 0.99 * (high - mean) * (mean - low)  # the largest variance, which only values at both ends have
        return tuple(np.flatnonzero(at_ends.all(0) & (high - low > _CONSTANT).any(0)).tolist())


def compute_statistics(samples: Float[np.ndarray, "n h d"]) -> Statistics:
    """Reduces samples (N, H, d) in raw units over their first axis (SPEC 7.1).

    Raises:
        ValueError: if `samples` is not a non-empty (N, H, d) array of finite numbers.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 3 or len(samples) == 0:
        raise ValueError(f"statistics need samples of shape (N, H, d) with N > 0; got {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError(
            f"statistics need finite samples; first bad index (sample, step, dim) is {_first(~np.isfinite(samples))}"
        )
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
    """{key: {field: nested lists}}, fields as in the published `dataset_statistics`. `from_json` inverts it exactly."""
    return {key: {name: value.tolist() for name, value in vars(entry).items()} for key, entry in statistics.items()}


def from_json(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Statistics]:
    """Statistics from `to_json`'s form.

    Raises:
        ValueError: for a key with missing or unknown fields, fields of contradicting shapes, or anything but finite numbers.
    """
    return {key: _statistics_from_lists(key, fields) for key, fields in values.items()}


def _statistics_from_lists(key: str, fields: Mapping[str, Any]) -> Statistics:
    expected = {field.name for field in dataclasses.fields(Statistics)}
    if set(fields) != expected:
        raise ValueError(
            f"statistics of '{key}': missing fields {sorted(expected - set(fields))}, "
            f"unknown fields {sorted(set(fields) - expected)}"
        )
    try:
        arrays = {name: np.asarray(value, np.float32) for name, value in fields.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"statistics of '{key}' are not rectangular lists of numbers: {error}") from error
    shape = arrays["mean"].shape
    for name, array in arrays.items():
        wanted = (len(PERCENTILES), *shape) if name == "percentiles" else shape
        if len(shape) != 2 or array.shape != wanted:
            raise ValueError(f"statistics of '{key}': '{name}' has shape {array.shape}; expected {wanted}, with a mean of (H, d)")
        if not np.isfinite(array).all():
            raise ValueError(f"statistics of '{key}': '{name}' is not finite at index {_first(~np.isfinite(array))}")
    return Statistics(**arrays)


def statistics_from_published(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Statistics]:
    """Statistics of whole pose vectors from a published file, which has them part by part (SPEC 7.1).

    Args:
        values: a loaded `dataset_statistics/*.json` with the keys of one robot of `PUBLISHED_STATISTICS`.

    Returns:
        "action": (A, 10); "proprio": (1, 10).

    Raises:
        ValueError: listing all missing and unknown keys, or all parts of a wrong width or of another horizon than the other
            parts; and for what `from_json` refuses.
    """
    keys = {robot: {key for parts in entries.values() for key in parts} for robot, entries in PUBLISHED_STATISTICS.items()}
    robot = max(keys, key=lambda robot: len(keys[robot] & set(values)))
    if set(values) != keys[robot]:
        raise ValueError(
            f"published statistics, taken for those of '{robot}': missing keys {sorted(keys[robot] - set(values))}, "
            f"unknown keys {sorted(set(values) - keys[robot])}"
        )
    entries = from_json(values)
    problems = [
        f"'{key}' has shape {entries[key].mean.shape}, expected ({len(entries[parts[0]].mean)}, {width})"
        for parts in PUBLISHED_STATISTICS[robot].values()
        for key, width in zip(parts, _POSE_PARTS, strict=True)
        if entries[key].mean.shape != (len(entries[parts[0]].mean), width)
    ]
    if problems:
        raise ValueError("published statistics contradict each other or a pose vector: " + "; ".join(problems))
    return {name: _concatenate([entries[key] for key in parts]) for name, parts in PUBLISHED_STATISTICS[robot].items()}


def statistics_to_published(statistics: Mapping[str, Statistics], robot: str) -> dict[str, dict[str, Any]]:
    """A published statistics file, ready for JSON; `statistics_from_published` inverts it exactly (SPEC 7.1).

    Args:
        statistics: "action" (A, 10) and "proprio" (1, 10), of pose vectors.
        robot: whose keys to write, "bridge" or "libero".

    Raises:
        ValueError: for an unknown robot, other keys, or another width.
    """
    if robot not in PUBLISHED_STATISTICS:
        raise ValueError(f"robot is {robot!r}; published statistics have the keys of {' or '.join(PUBLISHED_STATISTICS)}")
    if set(statistics) != set(PUBLISHED_STATISTICS[robot]):
        raise ValueError(f"statistics have the keys {sorted(statistics)}; expected 'action' and 'proprio'")
    published = {}
    for name, keys in PUBLISHED_STATISTICS[robot].items():
        shape = statistics[name].mean.shape
        if shape[-1] != _POSE_DIM:
            raise ValueError(f"statistics of '{name}' have shape {shape}; published ones are of pose vectors, (H, {_POSE_DIM})")
        split = {field: np.split(value, _POSE_BOUNDS, axis=-1) for field, value in vars(statistics[name]).items()}
        for part, key in enumerate(keys):
            published[key] = Statistics(**{field: pieces[part] for field, pieces in split.items()})
    return to_json(published)


def _concatenate(parts: Sequence[Statistics]) -> Statistics:
    return Statistics(**{field: np.concatenate([getattr(part, field) for part in parts], axis=-1) for field in vars(parts[0])})


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """y = clip((x − shift) · scale, low, high), and back (without the clip) by x = y / scale + shift (SPEC 7.1).

    The parameters are (H, d). Their dtype is that of the arithmetic: values are rounded to it first, and so is the result of
    every operation. `key` is the name of the values, for error messages.
    """

    shift: PerStep
    scale: PerStep
    low: PerStep
    high: PerStep
    key: str = "values"

    @classmethod
    def from_statistics(
        cls,
        statistics: Statistics,
        mode: NormalizerMode,
        key: str = "values",
        raw_dims: Sequence[int] = (),
        dtype: DTypeLike = np.float32,
        percentile_clamp: bool = False,
    ) -> Self:
        """Parameters of one mode, computed in float32 and then rounded to `dtype`.

        Values are clamped at `min` and `max`, so that none of the training set changes, however rare it is.

        identity: leaves values as they are, and clamps nothing.
        variance: mean and deviation to 0 and 1.
        squash: 2nd and 98th percentile to −1 and 1, or where rare values spread further, one deviation around their centre.
        squash_hard: `min` and `max` to −1 and 1.

        Args:
            raw_dims: dimensions, of 0 to d−1, that any mode leaves as they are and does not clamp: 6-D rotations.
            percentile_clamp: as published. variance: clamped mean and deviation to 0 and 1, clamped at `clamp_min` and
                `clamp_max`; squash: 2nd and 98th percentile to −1 and 1, clamped at ±1.5; squash_hard: that clamp range, cut to
                [min, max], to −1 and 1, clamped at ±1. What fewer than 2 % of the values command is lost where the others hardly
                spread: see `remarks`.
            dtype: float32, or bfloat16, which the published system normalises in, both ways. Positions between 0.5 and
                1 m then lie on a grid of 4 mm.

        Raises:
            ValueError: for an unknown mode, a raw dimension that the statistics do not have, or another dtype.
        """
        width = statistics.mean.shape[-1]
        if not set(raw_dims) <= set(range(width)):
            raise ValueError(f"raw_dims of '{key}' are {tuple(raw_dims)}; expected dimensions of 0 to {width - 1}")
        if np.dtype(dtype).name not in ("float32", "bfloat16"):
            raise ValueError(f"dtype of the normaliser of '{key}' is {np.dtype(dtype).name}; expected float32 or bfloat16")
        raw = np.isin(np.arange(width), raw_dims)
        shift, scale, low, high = (
            np.where(raw, identity, np.broadcast_to(value, statistics.mean.shape)).astype(np.float32).astype(dtype)
            for value, identity in zip(_parameters(statistics, mode, percentile_clamp, key), _IDENTITY, strict=True)
        )
        return cls(shift, scale, low, high, key)

    def normalize(self, values: Float[np.ndarray, "*b h d"]) -> Float32[np.ndarray, "*b h d"]:
        """Raw units (..., H, d) → float32 normalised units of the same shape. Raises ValueError for another (H, d)."""
        return np.clip((self._fitting(values) - self.shift) * self.scale, self.low, self.high).astype(np.float32)

    def unnormalize(self, values: Float[np.ndarray, "*b h d"]) -> Float32[np.ndarray, "*b h d"]:
        """Normalised units (..., H, d) → float32 raw units of the same shape. Raises ValueError for another (H, d)."""
        return (self._fitting(values) / self.scale + self.shift).astype(np.float32)

    def _fitting(self, values: Float[np.ndarray, "*b h d"]) -> Float[np.ndarray, "*b h d"]:
        if np.shape(values)[-2:] != self.shift.shape:
            raise ValueError(
                f"'{self.key}' has shape {np.shape(values)}; the normaliser expects (..., H, d) = (..., "
                f"{', '.join(map(str, self.shift.shape))})"
            )
        return np.asarray(values, np.float32).astype(self.shift.dtype)


def clamped(statistics: Statistics, normalizer: Normalizer) -> PerStep:
    """Share of the training set's values that a normaliser's clamp changes, in steps of 0.1 %.

    Where it leaves one value, those near that do not count: what the others commanded is lost.
    """
    moved, left = _moved(statistics, normalizer), normalizer.unnormalize(normalizer.high) - normalizer.unnormalize(normalizer.low)
    return (moved > np.where(left > _CONSTANT, 0, np.median(moved, 0)) + _CONSTANT).mean(0)


def remarks(statistics: Statistics, normalizer: Normalizer) -> list[str]:
    """What becomes of rare values of the training set: a sentence for each dimension with something to say, of its worst step.

    Either its clamp moves some by more than the range that it leaves, so that what they command is lost; or some that are kept
    are so far from all others that they may be errors.
    """
    key, share, found = normalizer.key, clamped(statistics, normalizer), []
    low, high = normalizer.unnormalize(normalizer.low), normalizer.unnormalize(normalizer.high)
    lost = np.where(_moved(statistics, normalizer).max(0) > np.maximum(high - low, _CONSTANT), share, 0)
    distance = np.maximum(statistics.max - statistics.mean, statistics.mean - statistics.min) * _reciprocal(statistics.std)
    far = np.where(np.isfinite(high), distance, 0)  # what is not normalised may be anywhere
    for dim in range(lost.shape[1]):
        step = int(lost[:, dim].argmax()) if lost[:, dim].any() else int(far[:, dim].argmax())
        at = step, dim
        values = f"{key} dimension {dim}, which is {statistics.min[at]:.4g} to {statistics.max[at]:.4g}"
        if lost[at]:
            left = f"leaves {low[at]:.4g} to {high[at]:.4g}"
            found.append(f"the clamp changes {lost[at]:.1%} of {values}, and {left}; compat.percentile_clamp=False keeps them")
        elif far[at] > _FAR:
            found.append(f"{values}, has some at {far[at]:.0f} standard deviations from the mean: errors there spoil its scale")
    return found


def _moved(statistics: Statistics, normalizer: Normalizer) -> Float[np.ndarray, "1001 h d"]:
    """How far the clamp moves each percentile, in raw units."""
    low, high = normalizer.unnormalize(normalizer.low), normalizer.unnormalize(normalizer.high)
    return np.abs(statistics.percentiles - np.clip(statistics.percentiles, low, high))


def _parameters(
    statistics: Statistics, mode: NormalizerMode, percentile_clamp: bool, key: str
) -> tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]:
    """Shift, scale, low and high of a mode; each (H, d), or a number for all of it."""
    if mode == "identity":
        return _IDENTITY
    if mode not in ("variance", "squash", "squash_hard"):
        raise ValueError(f"normaliser mode of '{key}' is {mode!r}; expected identity, variance, squash or squash_hard")
    low, high, p2, p98 = statistics.min, statistics.max, statistics.percentiles[_P2], statistics.percentiles[_P98]
    if percentile_clamp and mode == "variance":
        shift, scale = statistics.mean_clamped, _reciprocal(statistics.std_clamped)
        return shift, scale, (statistics.clamp_min - shift) * scale, (statistics.clamp_max - shift) * scale
    if percentile_clamp and mode == "squash":
        return (p98 + p2) / 2, _reciprocal((p98 - p2) / 2), -_CLAMP_MARGIN, _CLAMP_MARGIN
    if percentile_clamp:
        centre, reach = (p98 + p2) / 2, _CLAMP_MARGIN * (p98 - p2) / 2
        low, high = np.maximum(centre - reach, low), np.minimum(centre + reach, high)
        return (high + low) / 2, _reciprocal((high - low) / 2), -1.0, 1.0
    shift, spread = {
        "variance": (statistics.mean, statistics.std),
        "squash": ((p98 + p2) / 2, np.maximum((p98 - p2) / 2, statistics.std)),
        "squash_hard": ((high + low) / 2, (high - low) / 2),
    }[mode]
    scale = _reciprocal(spread)
    return shift, scale, (low - shift) * scale, (high - shift) * scale


# A pose vector is [position 3 | rot6d 6 | gripper 1]: metres in the robot's base frame, the first two rows of the rotation
# matrix that takes the hand's coordinates to the base's, and the gripper in the robot's own units (SPEC 8.5). LIBERO's actions
# have the same layout but are commanded steps, so they stay as they are. Quaternions (x, y, z, w) and rotation vectors come
# and go as scipy.spatial.transform.Rotation's matrices.


def rot6d_from_matrix(rotations: Float[np.ndarray, "*b 3 3"]) -> Float32[np.ndarray, "*b 6"]:
    """The first two rows of each rotation matrix, one after the other, in float32 (SPEC 8.5).

    Raises:
        ValueError: if `rotations` is not a finite (..., 3, 3) array, or naming the first matrix that is not a rotation.
    """
    rotations = _finite("rotations", rotations, (3, 3))
    skew = np.abs(rotations @ np.swapaxes(rotations, -1, -2) - np.eye(3)).max((-1, -2))
    bad = (skew > _SKEW) | (np.linalg.det(rotations) < 0)
    if bad.any():
        raise ValueError(f"'rotations' has no rotation matrix at index {_first(bad)}: {rotations[_first(bad)].tolist()}")
    return rotations[..., :2, :].reshape(*rotations.shape[:-2], 6).astype(np.float32)


def matrix_from_rot6d(rot6d: Float[np.ndarray, "*b 6"]) -> Float32[np.ndarray, "*b 3 3"]:
    """float32 rotation matrices of 6-D rotations, which need not be orthonormal: a network's outputs (SPEC 8.5).

    Gram–Schmidt: the first row keeps its direction, the second its plane with the first; the third is their cross product.

    Raises:
        ValueError: if `rot6d` is not a finite (..., 6) array, or naming the first whose rows do not span a plane.
    """
    return _gram_schmidt("rot6d", _finite("rot6d", rot6d, (6,))).astype(np.float32)


def relative_poses(current: Poses, future: Poses) -> Float32[np.ndarray, "*b 10"]:
    """Future poses as seen from the current hand, T_now⁻¹·T_future; the gripper stays the future one (SPEC 8.5).

    Args:
        current: pose vectors in the base frame; its leading axes broadcast, so one per chunk is `current[..., None, :]`.
        future: pose vectors in the base frame.

    Returns:
        float32 pose vectors; computed in double precision.

    Raises:
        ValueError: naming the argument, if it is not finite, not 10 wide or holds a degenerate rotation, or if the shapes do
            not broadcast.
    """
    (origin, frame, _), (position, rotation, gripper) = _pose_pair(current=current, future=future)
    inverse = np.swapaxes(frame, -1, -2)  # of a rotation
    return _pose_vectors(inverse @ (position - origin), inverse @ rotation, gripper)


def absolute_poses(current: Poses, relative: Poses) -> Float32[np.ndarray, "*b 10"]:
    """Base-frame poses T_now·T_relative of poses seen from the current hand: the inverse of `relative_poses` (SPEC 9.2).

    Arguments, result and errors are those of `relative_poses`, with `relative` in the place of `future`.
    """
    (origin, frame, _), (position, rotation, gripper) = _pose_pair(current=current, relative=relative)
    return _pose_vectors(origin + frame @ position, frame @ rotation, gripper)


def _pose_pair(**poses: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Two arguments' poses as (position column, rotation matrix, gripper) in float64, with the same leading axes."""
    finite = [_finite(name, value, (_POSE_DIM,)) for name, value in poses.items()]
    try:
        vectors = np.broadcast_arrays(*finite)
    except ValueError as error:
        shapes = " and ".join(f"'{name}' {np.shape(value)}" for name, value in poses.items())
        raise ValueError(f"the shapes of poses {shapes} do not broadcast") from error
    return [(v[..., :3, None], _gram_schmidt(name, v[..., 3:9]), v[..., 9:]) for name, v in zip(poses, vectors, strict=True)]


def _pose_vectors(position: np.ndarray, rotation: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    return np.concatenate([position[..., 0], rot6d_from_matrix(rotation), gripper], axis=-1).astype(np.float32)


def _gram_schmidt(name: str, rot6d: np.ndarray) -> np.ndarray:
    rows = rot6d.reshape(*rot6d.shape[:-1], 2, 3)
    lengths = np.linalg.norm(rows, axis=-1)
    first, second = np.moveaxis(rows / np.maximum(lengths, _SHORTEST)[..., None], -2, 0)
    second = second - (first * second).sum(-1, keepdims=True) * first
    height = np.linalg.norm(second, axis=-1)
    bad = (lengths < _SHORTEST).any(-1) | (height < _PARALLEL)
    if bad.any():
        raise ValueError(
            f"'{name}' has a degenerate rotation at index {_first(bad)}: {rot6d[_first(bad)].tolist()}; "
            "expected two rows that span a plane"
        )
    second = second / height[..., None]
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def _finite(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape[-len(shape) :] != shape:
        raise ValueError(f"'{name}' has shape {values.shape}; expected (..., {', '.join(map(str, shape))})")
    if not np.isfinite(values).all():
        raise ValueError(f"'{name}' is not finite at index {_first(~np.isfinite(values))}")
    return values


def stack_views(
    views: Mapping[str, UInt8[np.ndarray, "*b f h w 3"]], cameras: Sequence[str]
) -> UInt8[np.ndarray, "*b {len(cameras)} f h w 3"]:
    """The videos of `cameras` in that order; black where there is none. The first one has to be there."""
    if len(cameras) == 1:
        return np.expand_dims(views[cameras[0]], -5)
    black = np.broadcast_to(np.uint8(0), views[cameras[0]].shape)
    return np.stack([views.get(camera, black) for camera in cameras], axis=-5)


def resize_images(images: UInt8[np.ndarray, "*b h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "*b {size[0]} {size[1]} 3"]:
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


def _first(mask: np.ndarray) -> tuple[int, ...]:
    """Index of the first true element."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
