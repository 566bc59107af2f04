"""Inpainting of action chunks while they are sampled: real-time chunking (Black, Galliker and Levine, 2025).

A chunk has to continue what a robot executes while the chunk is being planned. As in ΠGDM, every velocity is corrected by the
gradient of how well the current data estimate x̂₀ agrees with the target Y:

    v ← v − min(β, ((1−τ)² + τ²) / (τ(1−τ))) · (∂x̂₀/∂x_τ)ᵀ · W (Y − x̂₀)

That is the paper's rule in the convention of `matching`, where time runs the other way and velocities have the other sign. The
factor is τ / ((1−τ) r²) with r² = τ² / ((1−τ)² + τ²), the variance of data given x_τ if data were standard normal: for such data
and weights of 1, the rule without its bound β is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Velocity = Callable[[Array, Float[Array, ""]], Array]


def prefix_weights(horizon: int, delay: int, overlap: int) -> Float[np.ndarray, " {horizon}"]:
    """The soft mask W over the steps of a chunk, float32.

    1 for the `delay` steps that will have been executed before the chunk can be used; then falling, about exponentially, over
    what is left of the `overlap` steps that the previous chunk has too; 0 beyond.

    Raises:
        ValueError: unless 0 ≤ delay ≤ overlap ≤ horizon.
    """
    if not 0 <= delay <= overlap <= horizon:
        raise ValueError(f"delay is {delay} and overlap {overlap}; expected 0 <= delay <= overlap <= horizon={horizon}")
    left = np.clip((overlap - np.arange(horizon)) / (overlap - delay + 1), 0, 1)
    return (left * np.expm1(left) / np.expm1(1)).astype(np.float32)


def guidance_weight(time: Float[Array, ""], clip: float) -> Float[Array, ""]:
    """min(β, ((1−τ)² + τ²) / (τ(1−τ))); the bound β = `clip` is what counts near pure noise and near data."""
    return jnp.minimum(((1 - time) ** 2 + time**2) / (time * (1 - time)), clip)


def guided(velocity: Velocity, target: Float[Array, "b a m"], weights: Float[Array, "b a"], clip: float) -> Velocity:
    """The velocity of a flow that is led to the target where weights are above 0; it costs a backward pass more."""

    def guided_velocity(x: Float[Array, "b a m"], time: Float[Array, ""]) -> Float[Array, "b a m"]:
        def estimate(x: Array) -> tuple[Array, Array]:
            v = velocity(x, time)
            return x - time * v, v

        x0, pull_back, v = jax.vjp(estimate, x, has_aux=True)
        (correction,) = pull_back(weights[..., None] * (target - x0))
        return v - guidance_weight(time, clip) * correction

    return guided_velocity
