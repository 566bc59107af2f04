"""Rotary position embedding over time, height and width (SPEC 3.4)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rope_angles(
    grid: tuple[int, int, int], head_dim: int, ratio: tuple[float, float, float]
) -> Float[np.ndarray, "s half_head"]:
    """Rotation angles in radians of every token of a (t, h, w) grid, tokens in t-major order.

    A head's dimensions are split between the axes: two times head_dim // 6 each for height and width, the rest for time.
    The base period of an axis of n dimensions is stretched by ratio^(n/(n−2)).
    """
    spatial = head_dim // 6 * 2
    positions = np.indices(grid).reshape(3, -1)
    angles = []
    for position, size, stretch in zip(positions, (head_dim - 2 * spatial, spatial, spatial), ratio, strict=True):
        base = 10000.0 * stretch ** (size / (size - 2)) if size > 2 else 10000.0
        frequencies = base ** (-np.arange(0, size, 2) / size)
        angles.append(position[:, None] * frequencies)
    return np.concatenate(angles, axis=-1).astype(np.float32)


def rotate(x: Float[Array, "b s n k"], angles: Float[Array, "s half"]) -> Float[Array, "b s n k"]:
    """Rotates dimension i of each head together with dimension i + half (half-split form), in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
