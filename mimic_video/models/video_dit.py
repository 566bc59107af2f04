"""The video backbone: a diffusion transformer over latent frames (Cosmos-Predict2; SPEC 3)."""

import math
from typing import Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from mimic_video.config import CompatConfig, ExperimentConfig, VideoDiTConfig
from mimic_video.models.attention import Attention, Backend, KeyMask
from mimic_video.models.devices import TOKENS, constrain
from mimic_video.models.layers import MLP, Modulation, Remat, RMSNorm, linear, modulate, scan_blocks, silu, stack_blocks
from mimic_video.models.protocols import Latents, VideoInputs, ViewMask
from mimic_video.models.rope import rope_angles, rotate

Tokens = Float[Array, "b t n d"]  # n = patches of one latent frame, row by row; those of several views one view after the other
PerFrame = Float[Array, "b t d"]
Shared = Float[Array, "b t 3*d"]  # what all blocks have of their modulations


def time_features(times: Float[Array, "b t"], width: int) -> PerFrame:
    """[cos(τω) | sin(τω)] with width/2 frequencies ω from 1 down to 1/10000 (SPEC 3.5)."""
    frequencies = jnp.exp(-math.log(10000.0) / (width // 2) * jnp.arange(width // 2))
    angles = times.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def token_mask(view_mask: ViewMask, patches: int, frames: int) -> Bool[Array, "b k"]:
    """The mask of a window's tokens, of which each of its latent frames has `patches` a view."""
    return jnp.tile(jnp.repeat(view_mask, patches, axis=1), frames)


class VideoBlock(nnx.Module):
    """Self-attention, cross-attention to the text, MLP; each modulated by its frame's flow time (SPEC 3.6)."""

    def __init__(self, config: VideoDiTConfig, rngs: nnx.Rngs, backend: Backend = "auto"):
        width, rank = config.width, config.adaln_lora_dim
        self.self_attn = Attention(width, config.num_heads, rngs, backend=backend)
        self.cross_attn = Attention(width, config.num_heads, rngs, config.text_width, backend)
        self.mlp = MLP(width, int(width * config.mlp_ratio), rngs)
        self.self_attn_modulation = Modulation(width, rank, 3, rngs)
        self.cross_attn_modulation = Modulation(width, rank, 3, rngs)
        self.mlp_modulation = Modulation(width, rank, 3, rngs)

    def __call__(
        self, x: Tokens, time: PerFrame, shared: Shared, text: Float[Array, "b s e"], rotate_heads, mask: KeyMask | None = None
    ) -> Tokens:
        def self_attention(y: Tokens) -> Tokens:
            return self.self_attn(y, self.self_attn.keys_values(y, rotate_heads), rotate_heads, mask)

        def cross_attention(y: Tokens) -> Tokens:
            return self.cross_attn(y, self.cross_attn.keys_values(text))

        for layer, modulation in (
            (self_attention, self.self_attn_modulation),
            (cross_attention, self.cross_attn_modulation),
            (self.mlp, self.mlp_modulation),
        ):
            shift, scale, gate = (part[:, :, None] for part in modulation(time, shared))
            x = x + gate * layer(modulate(x, shift, scale))
        return x


class VideoDiT(nnx.Module):
    """Velocity of latent video under the flow, and the residual stream on the way to it."""

    def __init__(
        self,
        config: VideoDiTConfig,
        channels: int,
        rngs: nnx.Rngs,
        compat: CompatConfig = CompatConfig(),
        backend: Backend = "auto",
        remat: Remat = "none",
        views: int = 1,
    ):
        """`channels`: of latents, as the tokenizer makes them. `views`: cameras of a sample."""
        self.config, self.views, self.compat, self.remat = config, views, compat, remat
        width, patch_size = config.width, math.prod(config.patch)
        self.patch_proj = linear((channels + 2) * patch_size, width, rngs)
        if views > 1:  # zeros, so that views added to a pretrained model look like more of the same at first
            self.view_embedding = nnx.Param(jnp.zeros((views, width)))
        self.time_in = linear(width, width, rngs)
        self.time_out = linear(width, 3 * width, rngs)
        self.time_norm = RMSNorm(width)
        self.blocks = stack_blocks(lambda rngs: VideoBlock(config, rngs, backend), config.num_blocks, rngs)
        self.final_modulation = Modulation(width, config.adaln_lora_dim, 2, rngs)
        self.final_proj = linear(width, channels * patch_size, rngs)

    @classmethod
    def build(cls, config: ExperimentConfig, rngs: nnx.Rngs) -> Self:
        return cls(
            config.backbone,
            config.latent_shape[-1],
            rngs,
            config.compat,
            config.attention,
            config.train.remat,
            config.data.views,
        )

    def hidden(self, inputs: VideoInputs, *, stop: int) -> Tokens:
        """The residual stream after the first `stop` blocks; 0 is the patch embedding (SPEC 3.8)."""
        return self._run(inputs, *self._time_embedding(inputs), stop)

    def __call__(self, inputs: VideoInputs) -> Latents:
        """The velocity ε − x₀ of every latent frame."""
        time, shared = self._time_embedding(inputs)
        x = self._run(inputs, time, shared, self.config.num_blocks)
        shift, scale = (part[:, :, None] for part in self.final_modulation(time, shared))
        return self._unpatchify(self.final_proj(modulate(x, shift, scale)), inputs.latents.shape)

    def _time_embedding(self, inputs: VideoInputs) -> tuple[PerFrame, Shared]:
        times = inputs.times.astype(jnp.bfloat16) if self.compat.bfloat16_times else inputs.times
        features = time_features(times, self.config.width).astype(inputs.latents.dtype)
        return self.time_norm(features), self.time_out(silu(self.time_in(features)))

    def _run(self, inputs: VideoInputs, time: PerFrame, shared: Shared, stop: int) -> Tokens:
        config, x = self.config, self._patchify(inputs)
        _, views, t, h, w, _ = inputs.latents.shape
        grid, head_dim = (t, h // config.patch[1], w // config.patch[2]), config.width // config.num_heads
        angles = rope_angles(grid, head_dim, config.rope_ratio, bfloat16=self.compat.bfloat16_rope)
        angles = np.tile(angles.reshape(t, -1, angles.shape[-1]), (1, views, 1))
        mask = None if inputs.view_mask is None else token_mask(inputs.view_mask, x.shape[2] // views, t)

        def apply(block: VideoBlock, x: Tokens) -> Tokens:
            return constrain(block(x, time, shared, inputs.text, lambda heads: rotate(heads, angles), mask), TOKENS)

        return scan_blocks(self.blocks, apply, constrain(x, TOKENS), stop=stop, remat=self.remat)

    def _patchify(self, inputs: VideoInputs) -> Tokens:
        latents, (_, rows, columns) = inputs.latents, self.config.patch
        b, v, t, h, w, _ = latents.shape
        if v != self.views or h % rows or w % columns:
            raise ValueError(
                f"latents are {v} views of {h}x{w}; expected {self.views}, to be cut into patches of {rows}x{columns}"
            )
        padding = jnp.zeros((b, v, h, w)) if inputs.padding_mask is None else inputs.padding_mask
        masks = (inputs.condition_mask[:, None, :, None, None, None], padding[:, :, None, :, :, None])
        whole = [jnp.broadcast_to(mask, (b, v, t, h, w, 1)).astype(latents.dtype) for mask in masks]
        x = jnp.concatenate([latents, *whole], axis=-1)
        x = x.reshape(b, v, t, h // rows, rows, w // columns, columns, -1)
        x = x.transpose(0, 2, 1, 3, 5, 7, 4, 6)  # b t v h w (c m n): channel slowest (SPEC 3.3)
        x = self.patch_proj(x.reshape(b, t, v * (h // rows) * (w // columns), -1))
        if v > 1:
            x = x + jnp.repeat(self.view_embedding[...], x.shape[2] // v, axis=0)
        return x

    def _unpatchify(self, x: Tokens, latent_shape: tuple[int, ...]) -> Latents:
        b, v, t, h, w, c = latent_shape
        _, rows, columns = self.config.patch
        x = x.reshape(b, t, v, h // rows, w // columns, rows, columns, c)  # channel fastest, unlike the input (SPEC 3.7)
        return x.transpose(0, 2, 1, 3, 5, 4, 6, 7).reshape(latent_shape)
