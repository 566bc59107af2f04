"""Cosmos-Predict2 and the Wan VAE as Hugging Face's diffusers stores them: names, configuration, folders.

A folder has `transformer/` (CosmosTransformer3DModel) and `vae/` (AutoencoderKLWan), each with a config.json and safetensors.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimic_video.config import TokenizerConfig, VideoDiTConfig
from mimic_video.models.wan_vae import CHANNELS, LATENT_MEAN, LATENT_STD
from mimic_video.weights.published import Names, Place, WeightsError


def _block_names() -> Names:
    names = {"ff.net.0.proj.weight": Place("mlp/up/kernel"), "ff.net.2.weight": Place("mlp/down/kernel")}
    for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        names |= {f"{theirs}.to_{part}.weight": Place(f"{ours}/{part}_proj/kernel") for part in ("q", "k", "v")}
        names |= {f"{theirs}.norm_{part}.weight": Place(f"{ours}/{part}_norm/scale") for part in ("q", "k")}
        names |= {f"{theirs}.to_out.0.weight": Place(f"{ours}/out_proj/kernel")}
    for theirs, ours in (("norm1", "self_attn"), ("norm2", "cross_attn"), ("norm3", "mlp")):
        names |= _modulation_names(theirs, f"{ours}_modulation")
    return {f"transformer_blocks.{{i}}.{theirs}": Place(f"blocks/{place.path}") for theirs, place in names.items()}


def _modulation_names(theirs: str, ours: str) -> Names:
    return {f"{theirs}.linear_1.weight": Place(f"{ours}/down/kernel"), f"{theirs}.linear_2.weight": Place(f"{ours}/up/kernel")}


DIFFUSERS_DIT_NAMES: Names = (
    {
        "patch_embed.proj.weight": Place("patch_proj/kernel"),
        "time_embed.t_embedder.linear_1.weight": Place("time_in/kernel"),
        "time_embed.t_embedder.linear_2.weight": Place("time_out/kernel"),
        "time_embed.norm.weight": Place("time_norm/scale"),
        "proj_out.weight": Place("final_proj/kernel"),
    }
    | _block_names()
    | _modulation_names("norm_out", "final_modulation")
)


def _decimals(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]  # float32 → the decimals it was written with


# What our networks have no counterpart for: field → the only value that they are. An absent field has that value in diffusers.
_DIT_FIXED = {
    "out_channels": CHANNELS,
    "concat_padding_mask": True,
    "use_crossattn_projection": False,
    "img_context_dim_in": None,
    "controlnet_block_every_n": None,
}
_VAE_FIXED = {
    "z_dim": CHANNELS,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "latents_mean": _decimals(LATENT_MEAN),
    "latents_std": _decimals(LATENT_STD),
}


def video_dit_config(values: Mapping[str, Any], hidden_block: int) -> VideoDiTConfig:
    """The backbone that a `transformer/config.json` describes.

    Args:
        values: the loaded file. Its `in_channels` count the condition mask.
        hidden_block: of the result; it belongs to the action decoder, so diffusers has none.

    Raises:
        WeightsError: naming every field that is missing or asks for what our backbone does not have.
        ConfigError: for sizes that no backbone can have.
    """
    needed = {
        "in_channels",
        "out_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "mlp_ratio",
        "text_embed_dim",
        "adaln_lora_dim",
        "patch_size",
        "rope_scale",
        "extra_pos_embed_type",
    }
    channels = values.get("out_channels")
    fixed = _DIT_FIXED | {"extra_pos_embed_type": None, "in_channels": channels + 1 if isinstance(channels, int) else None}
    _check("transformer/config.json", "CosmosTransformer3DModel", values, needed, fixed)
    ratio: tuple[Any, ...] = tuple(map(float, values["rope_scale"]))
    return VideoDiTConfig(
        width=values["num_attention_heads"] * values["attention_head_dim"],
        num_blocks=values["num_layers"],
        num_heads=values["num_attention_heads"],
        mlp_ratio=float(values["mlp_ratio"]),
        text_width=values["text_embed_dim"],
        adaln_lora_dim=values["adaln_lora_dim"],
        patch=tuple(values["patch_size"]),
        rope_ratio=ratio,
        hidden_block=hidden_block,
    )


def wan_config(values: Mapping[str, Any]) -> TokenizerConfig:
    """The tokenizer that a `vae/config.json` describes. Raises WeightsError as `video_dit_config` does."""
    _check("vae/config.json", "AutoencoderKLWan", values, {"base_dim"}, _VAE_FIXED)
    return TokenizerConfig(kind="wan", width=values["base_dim"])


def read_component(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The `config.json` of a folder's "transformer" or "vae". Raises WeightsError if there is none, or it is no JSON object."""
    path = folder / name / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} is not a diffusers folder: it has no {name}/config.json")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds {values!r}; expected an object of settings")
    return values


def _check(file: str, kind: str, values: Mapping[str, Any], needed: set[str], fixed: Mapping[str, Any]) -> None:
    problems = [f"'{field}' is missing" for field in sorted(needed - values.keys())]
    if values.get("_class_name", kind) != kind:
        problems.append(f"'_class_name' is {values['_class_name']!r}; expected {kind!r}")
    problems += [
        f"'{field}' is {values[field]!r}; only {value!r} is supported"
        for field, value in fixed.items()
        if field in values and values[field] != value
    ]
    if problems:
        raise WeightsError(f"{file} describes another network: " + "; ".join(problems))
