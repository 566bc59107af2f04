"""What each stage trains, what it leaves as it is, and what it reads: the split of all parameters, and shapes of batches."""

from typing import Any

import jax
import jax.numpy as jnp

from mimic_video.config import ExperimentConfig
from mimic_video.models.lora import init_adapters, join_network, require_names, split_network
from mimic_video.vam import Params

TRAINED = {"video": "backbone", "action": "decoder"}  # the network that each stage optimises


def split_params(params: Params, config: ExperimentConfig) -> tuple[Params, Params]:
    """(trained, frozen) parts of {"tokenizer", "backbone", "decoder"}; a stage drops what it does not read.

    With LoRA, `trained` is {network: what is trained fully, "lora": new adapters} and the rest of the network is frozen.

    Raises:
        ConfigError: if the configuration of LoRA names a parameter that is not there, or one twice.
    """
    name = TRAINED[config.stage]
    frozen = {other: part for other, part in params.items() if other not in (name, "decoder")}
    if not config.lora.rank:
        return {name: params[name]}, frozen
    require_names(params, config.lora)
    trained, base = split_network(params[name], config.lora)
    adapters = init_adapters(base, config.lora, jax.random.fold_in(jax.random.key(config.seed), 1))
    return {name: trained, "lora": adapters}, frozen | {name: base}


def join_params(trained: Params, frozen: Params, config: ExperimentConfig) -> Params:
    """What `split_params` split, with adapters merged into the network: the parameters that the model computes with."""
    if not config.lora.rank:
        return frozen | trained
    name = TRAINED[config.stage]
    return frozen | {name: join_network(trained[name], frozen[name], trained["lora"], config.lora)}


def batch_shapes(config: ExperimentConfig, size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, as the loader makes them of datasets that have all of their cameras and action dimensions.

    Args:
        size: samples; None for the global batch.
    """
    data, decoder, size = config.data, config.decoder, size or config.train.batch_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "video_mask": ((data.num_frames,), bool),
        "text": ((config.text.rows, config.text.width), jnp.float32),
    }
    if data.latents:
        shapes["latents"] = (*data.latent_shape, config.backbone.latent_channels), config.precision
    else:
        shapes["video"] = (data.num_frames, *data.frame_size, 3), jnp.uint8
    if len(data.cameras) > 1:
        shapes["view_mask"] = (len(data.cameras),), bool
    if config.stage == "action":
        shapes["proprio"] = (decoder.obs_horizon, decoder.proprio_dim), jnp.float32
        shapes["actions"] = (decoder.action_horizon, decoder.action_dim), jnp.float32
        shapes["action_mask"] = (decoder.action_horizon,), bool
        if decoder.embodiments:
            shapes["embodiment"] = (), jnp.int32
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}
