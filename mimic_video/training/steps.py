"""The training state, the compiled step of either stage, and the tokenizer's part of it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimic_video.batch import Batch
from mimic_video.config import ExperimentConfig
from mimic_video.models.devices import BATCH
from mimic_video.parallel.sharding import (
    MeshFunction,
    global_batch,
    make_mesh,
    on_mesh,
    place,
    require_divisible,
    shardings,
)
from mimic_video.stages import join_params, split_params
from mimic_video.training.metrics import group_norms
from mimic_video.training.optimizer import average_decay, make_optimizer, make_schedule
from mimic_video.vam import Draws, Metrics, Params, VideoActionModel, WeightedMean


@struct.dataclass
class TrainState:
    """All that changes from one step to the next. The data position and random keys are functions of `step` and the seed."""

    step: jax.Array
    params: Params  # of the trained part
    opt_state: optax.OptState
    ema: Params  # moving average of `params`; empty when switched off

    @property
    def inference_params(self) -> Params:
        return self.ema or self.params


def make_state(config: ExperimentConfig, params: Params) -> TrainState:
    """The state before the first step."""
    ema = jax.tree.map(jnp.copy, params) if config.train.keeps_average else {}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=make_optimizer(config.train).init(params), ema=ema)


def initial_state(config: ExperimentConfig, params: Params, mesh: Mesh) -> TrainState:
    """`make_state` of placed parameters, which it consumes; every leaf is made where the sharding rules want it."""
    make = functools.partial(make_state, config)
    return on_mesh(make, mesh, once=True, out_shardings=shardings(jax.eval_shape(make, params), mesh), donate_argnums=0)(params)


def abstract_state(vam: VideoActionModel, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda params: make_state(vam.config, split_params(params, vam.config)[0]), vam.shapes)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings(shapes, mesh)
    )


def make_train_step(vam: VideoActionModel, mesh: Mesh, state: TrainState) -> MeshFunction:
    """The compiled step (state, frozen, batch) → (state, metrics); it consumes the old state's memory.

    `frozen` is neither differentiated nor copied. `train.micro_batches` parts of the batch go through the networks one after
    another; what is random is drawn for all of it, and means are over all of it, so the result differs by rounding only.
    """
    config = vam.config
    optimizer, schedule = make_optimizer(config.train), make_schedule(config.train)
    where = shardings(state, mesh)

    def gradients(params: Params, frozen: Params, batch: Batch, draws: Draws) -> tuple[Params, dict[str, WeightedMean]]:
        def loss(params: Params) -> tuple[jax.Array, dict[str, WeightedMean]]:
            return vam.loss(join_params(params, frozen, config), batch, draws)

        grads, means = jax.grad(loss, has_aux=True)(params)
        return jax.lax.with_sharding_constraint(grads, where.params), means

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = vam.draw(jax.random.fold_in(jax.random.key(config.seed), state.step), config.train.batch_size)
        grads, means = _in_parts(gradients, config.train.micro_batches, state.params, frozen, batch, draws)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - average_decay(config.train, state.step)) if state.ema else {}
        metrics = {name: mean.value for name, mean in means.items()}
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        metrics |= group_norms(grads, "grad_norm") | group_norms(params, "param_norm")
        if config.train.spike_factor:
            metrics["skipped_fraction"] = opt_state.skipped - state.opt_state.skipped  # of the steps that are logged together
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    batch, replicated = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    return on_mesh(step, mesh, in_shardings=(where, None, batch), out_shardings=(where, replicated), donate_argnums=0)


def _in_parts(gradients: Callable, parts: int, params: Params, frozen: Params, batch: Batch, draws: Draws):
    """Gradients and means of a batch, from `parts` parts of it in turn."""
    if parts == 1:
        return gradients(params, frozen, batch, draws)
    # Part i has the rows i, i + parts, …, so that every device has its share of each part.
    rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, draws))

    def accumulate(sums, part):
        grads, means = gradients(params, frozen, *part)
        weighted = jax.tree.map(lambda grad: grad * means["loss"].weight, grads)
        values = {name: mean.value * mean.weight for name, mean in means.items()}
        weights = {name: mean.weight for name, mean in means.items()}
        return jax.tree.map(jnp.add, sums, (weighted, values, weights)), None

    shapes = jax.eval_shape(gradients, params, frozen, *jax.tree.map(lambda x: x[0], rows))[1]
    zeros = {name: jnp.zeros(()) for name in shapes}
    sums, _ = jax.lax.scan(accumulate, (jax.tree.map(jnp.zeros_like, params), zeros, zeros), rows)
    grads, values, weights = sums
    weights = {name: jnp.maximum(weight, 1) for name, weight in weights.items()}
    grads = jax.tree.map(lambda grad: grad / weights["loss"], grads)
    return grads, {name: WeightedMean(values[name] / weights[name], weights[name]) for name in values}


def make_encoder(config: ExperimentConfig, tokenizer: Params) -> Callable[[np.ndarray], np.ndarray]:
    """Frames of `train.batch_size` windows → their latents, as the step encodes them, in the dtype of the tokenizer's arithmetic.

    Raises:
        ConfigError: if the machine has no such mesh, or the batch cannot be split over it.
    """
    vam, mesh = VideoActionModel(config), make_mesh(config.mesh)
    require_divisible(config.train.batch_size, mesh)
    params, dtype = place({"tokenizer": tokenizer}, mesh), vam.dtype("tokenizer")
    encode = on_mesh(lambda params, video: vam.encode_video(params, video).astype(dtype), mesh)
    return lambda video: np.array(encode(params, global_batch({"video": video}, mesh)["video"]))


def make_validation_step(vam: VideoActionModel, mesh: Mesh) -> Callable[[Params, Params, Batch], Metrics]:
    """The compiled metrics of (params, frozen, batch) under noise that is the same at every call."""

    def validate(params: Params, frozen: Params, batch: Batch) -> Metrics:
        draws = vam.draw(jax.random.key(vam.config.seed), vam.config.train.batch_size)
        means = vam.loss(join_params(params, frozen, vam.config), batch, draws)[1]
        return {name: mean.value for name, mean in means.items()}

    return MeshFunction(jax.jit(validate), mesh)  # as XLA does it: of latents that were precomputed, the same to the bit
