"""AdamW with warm-up and clipping, and moving averages of parameters (SPEC 4.4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mimic_video.config import TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 1e-6 of the peak rate, then constant, or to `final_fraction` of it at the schedule's end.

    "wsd" is constant until `decay_steps` before that end and falls from there on a straight line.
    """
    remaining = config.schedule_end - config.warmup_steps
    stable = remaining - config.decay_steps
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, config.decay_steps)], [stable]
        ),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak * 1e-6, peak, config.warmup_steps), after], [config.warmup_steps])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with decoupled weight decay on every trained tensor; spikes are skipped if configured."""
    beta1, beta2 = config.betas
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config), b1=beta1, b2=beta2, eps=1e-8, weight_decay=config.weight_decay, mu_dtype=config.first_moment
        ),
    )
    return skip_spikes(optimizer, config.spike_factor) if config.spike_factor else optimizer


class SpikeState(NamedTuple):
    """The state of `skip_spikes`: the recent average of gradient norms, 0 at first, and how many steps were skipped so far."""

    average: Float[Array, ""]
    skipped: Int[Array, ""]
    inner: optax.OptState


def skip_spikes(optimizer: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Leaves parameters and optimizer as they are where the gradient norm is over `factor` times its moving average.

    The average has a horizon of 100 steps. A skipped norm counts in it as `factor` times the average, so that gradients which
    have grown for good are let through after a while.
    """

    def init(params: optax.Params) -> SpikeState:
        return SpikeState(jnp.zeros(()), jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(grads: optax.Updates, state: SpikeState, params: optax.Params) -> tuple[optax.Updates, SpikeState]:
        norm, first = optax.tree.norm(grads), state.average == 0
        spike = ~first & (norm > factor * state.average)
        updates, inner = optimizer.update(grads, state.inner, params)
        inner = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner, inner)
        updates = jax.tree.map(lambda update: jnp.where(spike, 0, update), updates)
        counted = jnp.where(first, norm, jnp.minimum(norm, factor * state.average))
        average = jnp.where(first, norm, state.average + 0.01 * (counted - state.average))
        return updates, SpikeState(average, state.skipped + spike, inner)

    return optax.GradientTransformation(init, update)


def power_average_exponent(std: float) -> float:
    """γ of a power-function average whose weights (t/T)^γ have the standard deviation `std`, as a share of T (SPEC 4.4)."""
    return float(np.max(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real))


def average_decay(config: TrainConfig, step: jax.Array) -> Float[Array, ""]:
    """The share that the moving average keeps of itself at the update after `step` earlier ones."""
    if config.ema_std:
        return (1 - 1 / (step + 1)) ** (power_average_exponent(config.ema_std) + 1)
    return jnp.float32(config.ema_decay)
