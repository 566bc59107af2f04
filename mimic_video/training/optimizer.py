"""AdamW with warm-up and clipping, and moving averages of parameters (SPEC 4.4)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mimic_video.config import TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 1e-6 of the peak rate, then constant, or to `final_fraction` of it at the schedule's end."""
    remaining = (config.schedule_steps or config.steps) - config.warmup_steps
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak * 1e-6, peak, config.warmup_steps), after], [config.warmup_steps])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with decoupled weight decay on every trained tensor."""
    beta1, beta2 = config.betas
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(make_schedule(config), b1=beta1, b2=beta2, eps=1e-8, weight_decay=config.weight_decay),
    )


def power_average_exponent(std: float) -> float:
    """γ of a power-function average whose weights (t/T)^γ have the standard deviation `std`, as a share of T (SPEC 4.4)."""
    return float(np.max(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real))


def average_decay(config: TrainConfig, step: jax.Array) -> Float[Array, ""]:
    """The share that the moving average keeps of itself at the update after `step` earlier ones."""
    if config.ema_std:
        return (1 - 1 / (step + 1)) ** (power_average_exponent(config.ema_std) + 1)
    return jnp.float32(config.ema_decay)
