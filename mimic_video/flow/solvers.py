"""Solvers of the learned flows, from noise to data. Coefficients are computed in float64 ahead of time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mimic_video.config import PolicyConfig

Denoiser = Callable[[Array, Float[Array, ""]], Array]  # (x, σ) → data estimate, with x = x₀ + σ·ε

SIGMA_MAX, SIGMA_MIN, RHO = 80.0, 0.002, 7.0


def karras_sigmas(steps: int) -> Float[np.ndarray, " {steps}+1"]:
    """Noise levels σ₀ = 80 … σ_steps = 0.002 of the video sampler, float64 (SPEC 5)."""
    ramp = np.arange(steps + 1) / steps
    return (SIGMA_MAX ** (1 / RHO) + ramp * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO


def sigmas_until(sigmas: Float[np.ndarray, " n"], time: float) -> Float[np.ndarray, " m"]:
    """The levels of a grid that lie above flow time `time`, in (0, 1], and then that one: a grid whose last step stops there."""
    sigma = time / (1 - time) if time < 1 else np.inf
    return np.append(sigmas[sigmas > sigma * (1 + 1e-9)], sigma)


def stopping_sigmas(policy: PolicyConfig) -> Float[np.ndarray, " n"]:
    """The levels that a policy's video sampler goes through; at the last one it stops."""
    grid = karras_sigmas(policy.video_steps)
    return sigmas_until(grid, policy.stop_time) if policy.stop_time else grid[: policy.stop_step + 1]


def adams_bashforth_coefficients(sigmas: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n-1 3"]:
    """Rows (a, b, c) of the update x ← a·x + b·x̂₀ + c·x̂₀(previous step) from σᵢ to σᵢ₊₁.

    The first step is Euler's; the others are two-step Adams–Bashforth in λ = −ln σ (SPEC 5).
    """
    first = sigmas[1] / sigmas[0]
    rows = [(first, 1 - first, 0.0)]
    log_snr = -np.log(sigmas)
    for previous, start, end in zip(log_snr[:-2], log_snr[1:-1], log_snr[2:], strict=True):
        step = end - start
        phi1 = -np.expm1(-step) / step
        phi2 = (phi1 - 1) / -step
        back = phi2 / ((previous - start) / step)
        rows.append((np.exp(-step), step * (phi1 - back), step * back))
    return np.asarray(rows)


def solve_video(predict_x0: Denoiser, x: Float[Array, "*x"], sigmas: Float[np.ndarray, " n"]) -> Float[Array, "*x"]:
    """Takes a sample at noise level sigmas[0] to sigmas[-1] in len(sigmas) − 1 steps.

    Args:
        x: the sample at sigmas[0].
        sigmas: from `karras_sigmas` or `sigmas_until`, or a leading part of one.
    """
    if len(sigmas) == 1:
        return x
    step = _video_step(predict_x0)
    return jax.lax.scan(lambda *a: (step(*a), None), (x, jnp.zeros_like(x)), _video_steps(sigmas))[0][0]


def video_path(
    predict_x0: Denoiser, x: Float[Array, "*x"], sigmas: Float[np.ndarray, " n"], kept: Sequence[int]
) -> Float[Array, " {len(kept)} *x"]:
    """What `solve_video` makes of a sample at the levels sigmas[kept], in one run through all of them; `kept` ascends."""
    slots = np.full(len(sigmas), len(kept))  # of each level in the result; those that are not kept have none
    slots[list(kept)] = np.arange(len(kept))
    step, path = _video_step(predict_x0), jnp.zeros((len(kept), *x.shape), x.dtype).at[slots[0]].set(x, mode="drop")

    def keeping(carry, inputs):
        (state, path), (slot, inputs) = carry, inputs
        state = step(state, inputs)
        return (state, path.at[slot].set(state[0], mode="drop")), None

    carry = ((x, jnp.zeros_like(x)), path)
    return jax.lax.scan(keeping, carry, (jnp.asarray(slots[1:]), _video_steps(sigmas)))[0][1]


def _video_steps(sigmas: Float[np.ndarray, " n"]) -> tuple[Float[Array, " n-1"], tuple[Float[Array, " n-1"], ...]]:
    """(σ, coefficients) of every step of a grid."""
    coefficients = adams_bashforth_coefficients(sigmas).astype(np.float32)
    return jnp.asarray(sigmas[:-1], jnp.float32), tuple(jnp.asarray(coefficients.T))


def _video_step(predict_x0: Denoiser) -> Callable:
    """One of `_video_steps` on (x, the data estimate of the step before)."""

    def step(state, inputs):
        x, previous = state
        sigma, (a, b, c) = inputs
        x0 = predict_x0(x, sigma)
        return a * x + b * x0 + c * previous, x0

    return step


def solve_euler(
    velocity: Callable[[Array, Float[Array, ""]], Array], x: Float[Array, "*x"], steps: int, state_dtype: DTypeLike = jnp.float32
) -> Float[Array, "*x"]:
    """Euler steps of equal length from flow time 1 to 0 (SPEC 7); the state is kept in `state_dtype` between them."""

    def step(x, time):
        y = x.astype(jnp.float32)
        return (y - velocity(y, time) / steps).astype(state_dtype), None

    times = jnp.asarray(1 - np.arange(steps) / steps, jnp.float32)
    return jax.lax.scan(step, x.astype(state_dtype), times)[0].astype(jnp.float32)
