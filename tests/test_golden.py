"""Both networks against vectors of the published PyTorch implementation."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimic_video.config import ActionDecoderConfig, CompatConfig, VideoDiTConfig
from mimic_video.models.action_decoder import ActionConditioning, ActionDecoder
from mimic_video.models.protocols import VideoInputs
from mimic_video.models.video_dit import VideoDiT
from mimic_video.weights.published import ACTION_DECODER_NAMES, VIDEO_DIT_NAMES, import_params

GOLDEN = pathlib.Path(os.environ.get("MIMIC_VIDEO_GOLDEN", pathlib.Path(__file__).parent / "golden"))
TOLERANCE = 1e-5


def files_of(kind):
    loaded = {path.stem: np.load(path) for path in sorted(GOLDEN.glob("*.npz"))}
    chosen = {stem: arrays for stem, arrays in loaded.items() if json.loads(str(arrays["meta"]))["kind"] == kind}
    return [pytest.param(json.loads(str(arrays["meta"])), arrays, id=stem) for stem, arrays in chosen.items()]


def load(make, arrays, names):
    """Structure and published parameters of the network that `make` makes."""
    published = {key.removeprefix("param/"): arrays[key] for key in arrays.files if key.startswith("param/")}
    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.State(jax.tree.map(jnp.asarray, import_params(published, names, nnx.to_pure_dict(shapes))))


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize(("meta", "arrays"), files_of("video_dit"))
def test_video_dit(meta, arrays):
    compat = CompatConfig(bfloat16_rope={"float32": False, "bfloat16": True}[meta["rope_dtype"]])
    config = VideoDiTConfig(
        width=meta["width"],
        num_blocks=meta["num_blocks"],
        num_heads=meta["num_heads"],
        mlp_ratio=meta["mlp_ratio"],
        text_width=meta["text_width"],
        adaln_lora_dim=meta["adaln_lora_dim"],
        patch=tuple(meta["patch"]),
        rope_ratio=tuple(meta["rope_ratio"]),
        hidden_block=meta["num_blocks"],
    )
    graphdef, state = load(lambda: VideoDiT(config, meta["latent_channels"], nnx.Rngs(0), compat), arrays, VIDEO_DIT_NAMES)
    mask = arrays["in/condition_mask"][:, 0]
    assert (mask == mask[:, :, :1, :1]).all(), "the mask is per latent frame"
    latents = channels_last(arrays["in/latents"])
    rows, columns = latents.shape[2:4]
    padding = arrays["in/padding_mask"][:, 0]
    padding = padding[:, :: padding.shape[1] // rows, :: padding.shape[2] // columns]  # nearest
    inputs = (latents[:, None], arrays["in/timesteps"], arrays["in/text"], mask[:, :, 0, 0], padding[:, None])
    inputs = VideoInputs(*map(jnp.asarray, inputs))

    @jax.jit
    def run(state, inputs):
        model = nnx.merge(graphdef, state)
        return model(inputs)[:, 0], [model.hidden(inputs, stop=block) for block in range(meta["num_blocks"] + 1)]

    output, hidden = run(state, inputs)
    np.testing.assert_allclose(output, channels_last(arrays["out/net"]), atol=TOLERANCE)
    for block, got in enumerate(hidden):
        expected = arrays[f"out/hidden_{block}"]
        np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=TOLERANCE)


@pytest.mark.parametrize(("meta", "arrays"), files_of("action_decoder"))
def test_action_decoder(meta, arrays):
    config = ActionDecoderConfig(
        width=meta["width"],
        num_blocks=meta["num_blocks"],
        num_heads=meta["num_heads"],
        mlp_ratio=meta["mlp_ratio"],
        adaln_lora_dim=meta["adaln_lora_dim"],
        time_rank=meta["time_rank"],
        proprio_dim=meta["action_dim"],
        action_dim=meta["action_dim"],
    )
    observed, acted = meta["obs_horizon"], meta["action_horizon"]
    graphdef, state = load(
        lambda: ActionDecoder(config, meta["context_width"], acted, nnx.Rngs(0), obs_horizon=observed),
        arrays,
        ACTION_DECODER_NAMES,
    )
    times, sigma = arrays["in/timesteps"], arrays["in/video_sigma"][:, 0]
    np.testing.assert_allclose(times[:, :observed], 1e-3)
    inputs = [arrays["in/noisy_actions"], times[:, -1], arrays["in/state"], sigma / (1 + sigma)]
    inputs = jax.tree.map(jnp.asarray, inputs)

    @jax.jit
    def run(state, hidden, actions, time, proprio, video_time):
        model = nnx.merge(graphdef, state)
        told = actions, time, ActionConditioning(model.encode_context(hidden), video_time, proprio)
        return model(*told), model.tokens(*told), model.tokens(*told, jnp.ones(len(sigma), bool))

    actions, tokens, masked = run(state, jnp.asarray(arrays["in/context"]), *inputs)
    np.testing.assert_allclose(tokens, arrays["out/velocity"], atol=TOLERANCE)
    np.testing.assert_allclose(actions, arrays["out/velocity"][:, observed:], atol=TOLERANCE)
    np.testing.assert_allclose(masked, arrays["out/velocity_obs_masked"], atol=TOLERANCE)
