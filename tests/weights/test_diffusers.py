"""Settings of diffusers' folders, and what of them is not supported."""

import json

import pytest
from diffusers import AutoencoderKLWan

from mimic_video.config import TokenizerConfig
from mimic_video.weights.diffusers import read_component, video_dit_config, wan_config
from mimic_video.weights.published import WeightsError

pytestmark = pytest.mark.reference

COSMOS_14B = {
    "_class_name": "CosmosTransformer3DModel",
    "_diffusers_version": "0.34.0",
    "adaln_lora_dim": 256,
    "attention_head_dim": 128,
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
    "in_channels": 17,
    "max_size": [128, 240, 240],
    "mlp_ratio": 4.0,
    "num_attention_heads": 40,
    "num_layers": 36,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "rope_scale": [0.8333333333333334, 2.0, 2.0],
    "text_embed_dim": 1024,
}


def test_settings_of_a_larger_backbone():
    config = video_dit_config(COSMOS_14B, hidden_block=25)
    assert (config.width, config.num_blocks, config.num_heads, config.hidden_block) == (5120, 36, 40, 25)
    assert config.rope_ratio == (20 / 24, 2.0, 2.0) and config.patch == (1, 2, 2)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"extra_pos_embed_type": "learnable"}, "'extra_pos_embed_type' is 'learnable'; only None is supported"),
        ({"use_crossattn_projection": True}, "'use_crossattn_projection' is True; only False"),
        ({"concat_padding_mask": False}, "'concat_padding_mask' is False; only True"),
        ({"in_channels": 16}, "'in_channels' is 16; only 17"),
        ({"out_channels": 48, "in_channels": 49}, "'out_channels' is 48; only 16"),
        ({"img_context_dim_in": 1152}, "'img_context_dim_in' is 1152"),
        ({"controlnet_block_every_n": 7}, "'controlnet_block_every_n' is 7"),
        (
            {"_class_name": "WanTransformer3DModel"},
            "'_class_name' is 'WanTransformer3DModel'; expected 'CosmosTransformer3DModel'",
        ),
    ],
)
def test_backbones_that_are_not_supported(changes, part):
    with pytest.raises(WeightsError) as error:
        video_dit_config(COSMOS_14B | changes, hidden_block=20)
    assert "transformer/config.json describes another network: " in str(error.value) and part in str(error.value)


@pytest.mark.parametrize("field", ["num_layers", "rope_scale", "out_channels", "extra_pos_embed_type"])
def test_a_setting_that_is_missing(field):
    """diffusers' default of the last is an embedding that we do not have."""
    with pytest.raises(WeightsError, match=f"'{field}' is missing"):
        video_dit_config({name: value for name, value in COSMOS_14B.items() if name != field}, hidden_block=20)


def test_settings_of_the_wan_vae(tmp_path):
    """As diffusers writes its own defaults, which are the published ones."""
    AutoencoderKLWan(base_dim=8).save_config(tmp_path / "vae")
    values = read_component(tmp_path, "vae")
    assert wan_config(values) == TokenizerConfig(kind="wan", width=8)
    others = {
        "z_dim": 48,
        "dim_mult": [1, 2, 4],
        "temperal_downsample": [True, True, True],
        "is_residual": True,
        "latents_mean": [0.0] * 16,
        "latents_std": values["latents_std"][::-1],
    }
    for field, value in others.items():
        with pytest.raises(WeightsError, match=f"vae/config.json describes another network: '{field}' is"):
            wan_config(values | {field: value})
    with pytest.raises(WeightsError, match="'base_dim' is missing"):
        wan_config({})


def test_folders_without_settings(tmp_path):
    with pytest.raises(WeightsError, match=r"is not a diffusers folder: it has no transformer/config.json"):
        read_component(tmp_path, "transformer")
    (tmp_path / "transformer").mkdir()
    for content, part in (("{", "is not JSON"), (json.dumps([1]), r"holds \[1\]; expected an object")):
        (tmp_path / "transformer" / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=part):
            read_component(tmp_path, "transformer")
