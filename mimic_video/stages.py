"""What each stage trains, and what it leaves as it is: the split of all parameters into the two, and back."""

import jax

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
