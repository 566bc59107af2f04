"""Rotary position embedding over time, height and width (SPEC 3.4)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rope_frequencies(size: int, stretch: float, *, bfloat16: bool = False) -> Float[np.ndarray, " {size}//2"]:
    """Radians per position along an axis.

    Args:
        size: dimensions n of each head that belong to the axis.
        stretch: the base period is 10000 · stretch^(n/(n−2)).
        bfloat16: rounds every intermediate result, as the published code does after casting its buffers (SPEC 3.4).
    """
    base = 10000.0 * stretch ** (size / (size - 2)) if size > 2 else 10000.0
    exponents = np.arange(0, size, 2) / size
    if not bfloat16:
        return base**-exponents
    return _round(1 / _round(np.float32(_round(base)) ** _round(exponents)))


def rope_angles(
    grid: tuple[int, int, int], head_dim: int, ratio: tuple[float, float, float], *, bfloat16: bool = False
) -> Float[np.ndarray, "s {head_dim}//2"]:
    """Rotation angles in radians of every token of a (t, h, w) grid, tokens in t-major order.

    A head's dimensions are split between the axes: two times head_dim // 6 each for height and width, the rest for time.
    With `bfloat16` frequencies and angles are rounded; released weights were trained with such features (SPEC 3.4).
    """
    spatial = head_dim // 6 * 2
    positions = np.indices(grid).reshape(3, -1)
    parts = [
        position[:, None] * rope_frequencies(size, stretch, bfloat16=bfloat16)
        for position, size, stretch in zip(positions, (head_dim - 2 * spatial, spatial, spatial), ratio, strict=True)
    ]
    angles = np.concatenate(parts, axis=-1).astype(np.float32)
    return _round(angles) if bfloat16 else angles


def _round(values: np.ndarray | float) -> Float[np.ndarray, "..."]:
    """Float32 values rounded to the nearest bfloat16."""
    return np.asarray(values, np.float32).astype(jnp.bfloat16).astype(np.float32)


def rotate(x: Float[Array, "b *s n e"], angles: Float[np.ndarray | Array, "*s e//2"]) -> Float[Array, "b *s n e"]:
    """Rotates dimension i of each head together with dimension i + half (half-split form), in float32."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
