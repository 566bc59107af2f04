"""The video backbone: a diffusion transformer over latent frames (Cosmos-Predict2; SPEC 3)."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from mimic_video.config import CompatConfig, VideoDiTConfig
from mimic_video.models.attention import Attention, Backend, KeyMask
from mimic_video.models.devices import TOKENS, constrain
from mimic_video.models.layers import MLP, Modulation, Remat, RMSNorm, linear, modulate, scan_blocks, silu, stack_blocks
from mimic_video.models.rope import rope_angles, rotate

Tokens = Float[Array, "b t n d"]  # n = patches of one latent frame, row by row; those of several views one view after the other
ViewMask = Bool[Array, "b v"]  # False for a view that a sample does not have
PerFrame = Float[Array, "b t d"]
Shared = Float[Array, "b t 3*d"]  # what all blocks have of their modulations


def time_features(times: Float[Array, "b t"], width: int) -> PerFrame:
    """[cos(τω) | sin(τω)] with width/2 frequencies ω from 1 down to 1/10000 (SPEC 3.5)."""
    frequencies = jnp.exp(-math.log(10000.0) / (width // 2) * jnp.arange(width // 2))
    angles = times.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def token_mask(view_mask: ViewMask, patches: int) -> Bool[Array, "b {patches}"]:
    """The mask of one latent frame's patches, or of its rows of latents."""
    return jnp.repeat(view_mask, patches // view_mask.shape[1], axis=1)


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

    def hidden(
        self,
        latents: Float[Array, "b t h w c"],
        times: Float[Array, "b t"],
        text: Float[Array, "b s e"],
        condition_mask: Float[Array, "b t"],
        padding_mask: Float[Array, "b h w"] | None = None,
        view_mask: ViewMask | None = None,
        *,
        stop: int,
    ) -> Tokens:
        """The residual stream after the first `stop` blocks; 0 is the patch embedding (SPEC 3.8).

        Args:
            latents: network input: clean conditioned frames, noised other frames (SPEC 4.1).
            times: flow time τ of each latent frame, in [0, 1].
            text: text rows; every row takes part, so published models need exactly 512 (SPEC 2).
            condition_mask: 1 for conditioned frames.
            padding_mask: 1 for latent pixels outside the picture; None for none.
            view_mask: False for views that nothing attends to; None if every sample has all of them. Views stand one above the
                other in latents; each has positions of its own.
        """
        time, shared = self._time_embedding(times, latents.dtype)
        x = self._patchify(latents, condition_mask, padding_mask)
        return self._run(x, time, shared, text, latents.shape, view_mask, stop)

    def __call__(
        self,
        latents: Float[Array, "b t h w c"],
        times: Float[Array, "b t"],
        text: Float[Array, "b s e"],
        condition_mask: Float[Array, "b t"],
        padding_mask: Float[Array, "b h w"] | None = None,
        view_mask: ViewMask | None = None,
    ) -> Float[Array, "b t h w c"]:
        """The velocity ε − x₀ of every latent frame; arguments as for `hidden`."""
        time, shared = self._time_embedding(times, latents.dtype)
        x = self._patchify(latents, condition_mask, padding_mask)
        x = self._run(x, time, shared, text, latents.shape, view_mask, self.config.num_blocks)
        shift, scale = (part[:, :, None] for part in self.final_modulation(time, shared))
        return self._unpatchify(self.final_proj(modulate(x, shift, scale)), latents.shape)

    def _time_embedding(self, times: Float[Array, "b t"], dtype: jnp.dtype) -> tuple[PerFrame, Shared]:
        if self.compat.bfloat16_times:
            times = times.astype(jnp.bfloat16)
        features = time_features(times, self.config.width).astype(dtype)
        return self.time_norm(features), self.time_out(silu(self.time_in(features)))

    def _run(
        self,
        x: Tokens,
        time: PerFrame,
        shared: Shared,
        text: Float[Array, "b s e"],
        latent_shape: tuple[int, ...],
        view_mask: ViewMask | None,
        stop: int,
    ) -> Tokens:
        config = self.config
        _, t, h, w, _ = latent_shape
        grid, head_dim = (t, h // self.views // config.patch[1], w // config.patch[2]), config.width // config.num_heads
        angles = rope_angles(grid, head_dim, config.rope_ratio, bfloat16=self.compat.bfloat16_rope)
        angles = np.tile(angles.reshape(t, -1, angles.shape[-1]), (1, self.views, 1))
        mask = None if view_mask is None else jnp.tile(token_mask(view_mask, x.shape[2]), t)

        def apply(block: VideoBlock, x: Tokens) -> Tokens:
            return constrain(block(x, time, shared, text, lambda heads: rotate(heads, angles), mask), TOKENS)

        return scan_blocks(self.blocks, apply, constrain(x, TOKENS), stop=stop, remat=self.remat)

    def _patchify(
        self,
        latents: Float[Array, "b t h w c"],
        condition_mask: Float[Array, "b t"],
        padding_mask: Float[Array, "b h w"] | None,
    ) -> Tokens:
        b, t, h, w, _ = latents.shape
        _, rows, columns = self.config.patch
        if h % (rows * self.views) or w % columns:
            raise ValueError(f"latents of {h}x{w} cannot be cut into patches of {rows}x{columns} in {self.views} views")
        if padding_mask is None:
            padding_mask = jnp.zeros((b, h, w))
        masks = (condition_mask[:, :, None, None, None], padding_mask[:, None, :, :, None])
        whole = [jnp.broadcast_to(mask, (b, t, h, w, 1)).astype(latents.dtype) for mask in masks]
        x = jnp.concatenate([latents, *whole], axis=-1)
        x = x.reshape(b, t, h // rows, rows, w // columns, columns, -1)
        x = x.transpose(0, 1, 2, 4, 6, 3, 5)  # b t h w (c m n): channel slowest (SPEC 3.3)
        x = self.patch_proj(x.reshape(b, t, (h // rows) * (w // columns), -1))
        if self.views > 1:
            x = x + jnp.repeat(self.view_embedding[...], x.shape[2] // self.views, axis=0)
        return x

    def _unpatchify(self, x: Tokens, latent_shape: tuple[int, ...]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = latent_shape
        _, rows, columns = self.config.patch
        x = x.reshape(b, t, h // rows, w // columns, rows, columns, c)  # channel fastest, unlike the input (SPEC 3.7)
        return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(latent_shape)
