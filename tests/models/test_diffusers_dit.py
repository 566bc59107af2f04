"""The video backbone against Hugging Face's diffusers with random weights, converted by their names."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from flax import nnx

from mimic_video.models.protocols import VideoInputs
from mimic_video.models.video_dit import VideoDiT
from mimic_video.weights.diffusers import DIFFUSERS_DIT_NAMES, video_dit_config
from mimic_video.weights.published import import_params

pytestmark = pytest.mark.reference

SMALL = {
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 4.0,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
}
# (changed settings, (b, t, h, w) of the latents, text rows)
CASES = {
    "small": ({}, (2, 3, 4, 6), 5),
    "deeper, heads of 16": ({"num_layers": 5, "attention_head_dim": 16, "mlp_ratio": 2.0}, (1, 2, 6, 4), 3),
    "one head of 32, stretched time": (
        {"num_attention_heads": 1, "attention_head_dim": 32, "rope_scale": (20 / 24, 2.0, 2.0)},
        (1, 5, 2, 8),
        7,
    ),
    "one frame, wide patches": ({"patch_size": (1, 2, 4), "text_embed_dim": 12, "adaln_lora_dim": 6}, (3, 1, 4, 8), 1),
}


@pytest.fixture(autouse=True)
def resize_without_torchvision(monkeypatch):
    """torchvision has no build for this PyTorch on CPU; of it, the network uses a nearest resize of the padding mask."""

    def resize(image, size, interpolation):
        assert interpolation == "nearest"
        return torch.nn.functional.interpolate(image, size, mode="nearest")

    functional = types.SimpleNamespace(resize=resize)
    transforms = types.SimpleNamespace(functional=functional, InterpolationMode=types.SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", transforms, raising=False)
    torch.set_num_threads(1)


def make_theirs(settings, dtype):
    """diffusers' network with modulations and norms that matter, and outputs of order one."""
    torch.manual_seed(0)
    model = transformer_cosmos.CosmosTransformer3DModel(**settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        elif "linear_2" in name:
            parameter.normal_(0, 0.5 / parameter.shape[1] ** 0.5)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    for module in model.modules():  # theirs normalises queries and keys with 1e-5, the published network with 1e-6 (SPEC 3.6)
        if isinstance(module, transformer_cosmos.Attention):
            module.norm_q.eps = module.norm_k.eps = 1e-6
    return model.to(dtype)


def make_inputs(settings, size, rows):
    """Float32 inputs in our layout: latents, flow times per frame, text, condition mask per frame, padding mask."""
    random = np.random.default_rng(0)
    b, t, h, w = size
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    condition = (np.arange(t) < 1 + np.arange(b)[:, None] % 2).astype(np.float32)
    padding = np.broadcast_to(np.arange(w) >= w - 1, (b, h, w)).astype(np.float32)
    times = random.uniform(0, 1, (b, t)).astype(np.float32)
    return normal(b, t, h, w, 16), times, normal(b, rows, settings["text_embed_dim"]), condition, padding


def run_theirs(model, inputs, dtype):
    """Its output in our layout, one sample at a time: it repeats the padding mask by the batch size."""
    outputs = []
    for latents, times, text, condition, padding in zip(*map(torch.tensor, inputs), strict=True):
        t, h, w, _ = latents.shape
        outputs.append(
            model(
                hidden_states=latents.movedim(-1, 0)[None].to(dtype),
                timestep=times.reshape(1, 1, t, 1, 1),
                encoder_hidden_states=text[None].to(dtype),
                condition_mask=condition.reshape(1, 1, t, 1, 1).expand(1, 1, t, h, w).to(dtype),
                padding_mask=padding.repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None].to(dtype),
                return_dict=False,
            )[0]
        )
    return np.moveaxis(torch.cat(outputs).float().numpy(), 1, -1)


def make_ours(model, settings, dtype):
    """Our network with their weights: inputs → output, compiled."""
    config = video_dit_config(settings, hidden_block=1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, 16, nnx.Rngs(0))))
    tensors = {name: parameter.float().numpy() for name, parameter in model.named_parameters()}
    params = import_params(tensors, DIFFUSERS_DIT_NAMES, nnx.to_pure_dict(state), dtype=dtype)
    network = jax.jit(lambda params, inputs: nnx.merge(graphdef, nnx.State(params))(VideoInputs(*inputs))[:, 0])

    def run(inputs):
        latents, times, text, condition, padding = inputs
        return np.float32(
            network(params, (latents[:, None].astype(dtype), times, text.astype(dtype), condition, padding[:, None]))
        )

    return run


@pytest.mark.parametrize("case", CASES)
def test_velocity_in_float32(case):
    changes, size, rows = CASES[case]
    settings = SMALL | changes
    model, inputs = make_theirs(settings, torch.float32), make_inputs(settings, size, rows)
    expected, result = run_theirs(model, inputs, torch.float32), make_ours(model, settings, np.float32)(inputs)
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_velocity_in_bfloat16():
    """Both round after every layer, not at the same places: the distance between them is that of either to float32."""
    model, inputs = make_theirs(SMALL, torch.bfloat16), make_inputs(SMALL, (2, 3, 4, 6), 5)
    expected, result = run_theirs(model, inputs, torch.bfloat16), make_ours(model, SMALL, jnp.bfloat16)(inputs)
    error = np.sqrt(np.mean((result - expected) ** 2)) / expected.std()
    assert 0 < error < 0.015


def test_every_input_matters():
    """So that the comparison above would notice a mask or a time that is not used."""
    model, inputs = make_theirs(SMALL, torch.float32), make_inputs(SMALL, (2, 3, 4, 6), 5)
    ours = make_ours(model, SMALL, np.float32)
    result = ours(inputs)
    for index in range(len(inputs)):
        changed = [value * 0.5 if i == index else value for i, value in enumerate(inputs)]
        assert np.abs(ours(changed) - result).max() > 1e-3


def test_settings_are_those_of_the_2b_model():
    released = SMALL | {
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 28,
        "text_embed_dim": 1024,
        "adaln_lora_dim": 256,
        "_class_name": "CosmosTransformer3DModel",
    }
    config = video_dit_config(released, hidden_block=20)
    assert dataclasses.asdict(config) == dataclasses.asdict(type(config)())
