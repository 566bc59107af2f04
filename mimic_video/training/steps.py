"""The training state and the compiled step of either stage."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimic_video.config import ExperimentConfig
from mimic_video.training.optimizer import average_decay, make_optimizer, make_schedule
from mimic_video.training.sharding import BATCH, shardings
from mimic_video.vam import Batch, Metrics, Params, VideoActionModel

TRAINED = {"video": "backbone", "action": "decoder"}  # the part of the parameters that each stage optimises


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


def split_params(params: Params, stage: str) -> tuple[Params, Params]:
    """(trained, frozen) parts of {"tokenizer", "backbone", "decoder"}; a stage drops what it does not read."""
    trained = TRAINED[stage]
    frozen = {name: part for name, part in params.items() if name not in (trained, "decoder")}
    return {trained: params[trained]}, frozen


def make_state(config: ExperimentConfig, params: Params) -> TrainState:
    """The state before the first step."""
    ema = jax.tree.map(jnp.copy, params) if config.train.keeps_average else {}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=make_optimizer(config.train).init(params), ema=ema)


def initial_state(config: ExperimentConfig, params: Params, mesh: Mesh) -> TrainState:
    """`make_state` of placed parameters; every leaf is made where the sharding rules want it."""
    make = functools.partial(make_state, config)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, params), mesh))(params)


def abstract_state(vam: VideoActionModel, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state, to restore a checkpoint into."""

    def make() -> TrainState:
        return make_state(vam.config, split_params(vam.init(jax.random.key(0)), vam.config.stage)[0])

    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings(shapes, mesh)
    )


def loss_function(vam: VideoActionModel) -> Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]:
    return {"video": vam.video_loss, "action": vam.action_loss}[vam.config.stage]


def make_train_step(
    vam: VideoActionModel, mesh: Mesh, state: TrainState
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The compiled step (state, frozen, batch) → (state, metrics); it consumes the old state's memory.

    `frozen` is neither differentiated nor copied.
    """
    config = vam.config
    optimizer, schedule, loss = make_optimizer(config.train), make_schedule(config.train), loss_function(vam)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient = jax.value_and_grad(lambda params: loss(params | frozen, batch, key), has_aux=True)
        (value, metrics), grads = gradient(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - average_decay(config.train, state.step)) if state.ema else {}
        metrics |= {"loss": value, "grad_norm": optax.global_norm(grads), "learning_rate": schedule(state.step)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    where = shardings(state, mesh)
    batch, replicated = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, in_shardings=(where, None, batch), out_shardings=(where, replicated), donate_argnums=0)


def make_validation_step(vam: VideoActionModel) -> Callable[[Params, Params, Batch], Metrics]:
    """The compiled metrics of (params, frozen, batch) under noise that is the same at every call."""
    loss = loss_function(vam)

    @jax.jit
    def validate(params: Params, frozen: Params, batch: Batch) -> Metrics:
        return loss(params | frozen, batch, jax.random.key(vam.config.seed))[1]

    return validate


def random_params(vam: VideoActionModel, mesh: Mesh) -> Params:
    """`vam.init` by the experiment's seed, every part that the stage reads made where the sharding rules want it."""

    def make(key: jax.Array) -> Params:
        trained, frozen = split_params(vam.init(key), vam.config.stage)
        return trained | frozen

    key = jax.random.key(vam.config.seed)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))(key)


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts parameters or state where the sharding rules want them; what processes hold by themselves is the same in all."""

    def one(leaf: Any, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, where)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, where, lambda index: values[index])

    return jax.tree.map(one, tree, shardings(tree, mesh))
