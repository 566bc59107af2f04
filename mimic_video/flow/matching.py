"""Flow matching: the path between data and noise, its training distributions and its losses.

Convention, here and everywhere: x_τ = (1−τ)·x₀ + τ·ε with τ = 1 pure noise; a network predicts the velocity ε − x₀.
The noise level of the diffusion literature is σ = τ/(1−τ). With the rectified-flow preconditioning of SPEC 4.1 the
video network's raw output is that velocity, and its input is x_τ itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from mimic_video.config import NoiseConfig

ACTION_TIME_MIN = 1e-3
CONDITION_TIME = 1e-4 / (1 + 1e-4)  # flow time of clean conditioned frames: σ = 1e-4


def flow_time(sigma: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """τ = σ/(1+σ)."""
    return sigma / (1 + sigma)


def _over(scalars: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Appends axes so that per-sample (or per-frame) scalars broadcast over the rest of `x`."""
    return scalars.reshape(*scalars.shape, *[1] * (x.ndim - scalars.ndim))


def interpolate(x0: Float[Array, " b *x"], noise: Float[Array, " b *x"], time: Float[Array, " b"]) -> Float[Array, " b *x"]:
    """The point x_τ on the straight path from data to noise."""
    time = _over(time, x0)
    return (1 - time) * x0 + time * noise


def denoised(x_tau: Float[Array, " b *x"], velocity: Float[Array, " b *x"], time: Float[Array, " b"]) -> Float[Array, " b *x"]:
    """The data estimate x̂₀ = x_τ − τ·v."""
    return x_tau - _over(time, x_tau) * velocity


def sample_video_sigma(key: jax.Array, batch: int, config: NoiseConfig) -> Float[Array, " {batch}"]:
    """Training noise levels: log-normal, with a share from a log-uniform high tail (SPEC 4.2)."""
    normal_key, tail_key, choice_key = jax.random.split(key, 3)
    body = config.scale * jnp.exp(config.log_mean + config.log_std * jax.random.normal(normal_key, (batch,)))
    low, high = jnp.log(jnp.asarray(config.tail_range))
    tail = jnp.exp(jax.random.uniform(tail_key, (batch,), minval=low, maxval=high))
    return jnp.where(jax.random.uniform(choice_key, (batch,)) < config.tail_probability, tail, body)


def video_sigma_quantiles(probabilities: Float[np.ndarray, " n"], config: NoiseConfig) -> Float[np.ndarray, " n"]:
    """Noise levels below which those shares of `sample_video_sigma` lie; `probabilities` are between 0 and 1."""
    low, high = np.log(config.tail_range)
    body = np.log(config.scale) + config.log_mean + 10 * config.log_std * np.array([-1, 1])
    log_sigma = np.linspace(min(body[0], low), max(body[1], high), 100_000)
    standard = (log_sigma - np.log(config.scale) - config.log_mean) / config.log_std
    tail = np.clip((log_sigma - low) / (high - low), 0, 1)
    below = (1 - config.tail_probability) * scipy.special.ndtr(standard) + config.tail_probability * tail
    return np.exp(np.interp(probabilities, below, log_sigma))


def sample_action_time(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Action flow times, uniform in [0.001, 1) (SPEC 7)."""
    return ACTION_TIME_MIN + (1 - ACTION_TIME_MIN) * jax.random.uniform(key, shape)


def scale_to_unit_variance(x_tau: Float[Array, " b *x"], time: Float[Array, " b"]) -> Float[Array, " b *x"]:
    """The action decoder's input scaling, x_τ / √((1−τ)² + τ²) (SPEC 7)."""
    time = _over(time, x_tau)
    return x_tau / jnp.sqrt((1 - time) ** 2 + time**2)


def condition_mask(conditioned: Int[Array, " b"], frames: int) -> Float[Array, "b {frames}"]:
    """1 for each sample's first `conditioned` latent frames, 0 for the frames to generate."""
    return (jnp.arange(frames) < conditioned[:, None]).astype(jnp.float32)


def frame_replacement(
    clean: Float[Array, "b v t h w c"], x_tau: Float[Array, "b v t h w c"], time: Float[Array, " b"], mask: Float[Array, "b t"]
) -> tuple[Float[Array, "b v t h w c"], Float[Array, "b t"]]:
    """Network input and per-frame times when conditioned frames are given clean (SPEC 4.1)."""
    return jnp.where(_over(mask[:, None], clean) > 0, clean, x_tau), jnp.where(mask > 0, CONDITION_TIME, time[:, None])


def weighted_mean(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean of `values` over everything whose weight is 1; weights cover the first axes. 0 if there is nothing."""
    per_weight = jnp.mean(values.reshape(*weights.shape, -1), axis=-1)
    return jnp.sum(per_weight * weights) / jnp.maximum(jnp.sum(weights), 1)


def numpy_noise(seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Standard normal float32 noise from the stream that the published code draws from (SPEC 5, 7).

    Args:
        shape: channels last. PyTorch's video has its channels on the second axis, and the stream is drawn in that order.
    """
    channels_second = (shape[0], shape[-1], *shape[1:-1]) if len(shape) == 5 else shape
    noise = np.random.RandomState(seed).standard_normal(channels_second).astype(np.float32)
    return np.moveaxis(noise, 1, -1) if len(shape) == 5 else noise
