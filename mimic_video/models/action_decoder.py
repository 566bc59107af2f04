"""The action decoder: a small transformer that turns the backbone's hidden states into actions (SPEC 6)."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from mimic_video.config import ActionDecoderConfig
from mimic_video.models.attention import Attention, Backend, KeyMask, Keys
from mimic_video.models.devices import BATCH_AXES, axis_size, constrain
from mimic_video.models.layers import (
    MLP,
    LayerNorm,
    Modulation,
    Remat,
    RMSNorm,
    gelu,
    linear,
    modulate,
    scan_blocks,
    silu,
    stack_blocks,
    truncated_normal,
)

Tokens = Float[Array, "m s d"]  # s = proprioception tokens, then action tokens


class Context(NamedTuple):
    """Keys and values of every block, and which of them to attend to; None for all."""

    keys: Float[Array, "blocks b k n e"]
    values: Float[Array, "blocks b k n e"]
    mask: Bool[Array, "b k"] | None


class ActionConditioning(NamedTuple):
    """What the action flow is told of b samples.

    Attributes:
        context: from `encode_context`.
        video_time: video flow time τ_v at which the hidden states were read.
        proprio: normalised proprioception.
        embodiment: the robot of each sample; for decoders that have embodiments, and only them.
        action_dims: False for dimensions of actions that a robot lacks, which stay at zero; None if all have all. The network
            itself does not know.
    """

    context: Context
    video_time: Float[Array, " b"]
    proprio: Float[Array, "b o p"]
    embodiment: Int[Array, " b"] | None = None
    action_dims: Bool[Array, "b m"] | None = None


PROPRIO_TIME = 1e-3  # the flow time that proprioception tokens carry
BILINEAR_BIAS = 0.382050174


def fourier_features(times: Float[Array, "*b"], width: int) -> Float[Array, "*b {width}"]:
    """[sin | cos] of flow times with width/2 periods from 0.004 to 4, geometrically spaced (SPEC 6.2).

    The shortest period makes 250 cycles over the unit interval: a float32 product would lose the phase's low digits.
    Splitting both factors in two makes the large partial products exact, so that whole cycles drop out without error.
    """
    half = width // 2
    cycles = 1.0 / (0.004 * 1000.0 ** (np.arange(half) / (half - 1)))  # per unit of flow time, float64
    cycles_high = np.round(cycles * 16) / 16  # 250·16 < 2¹²: twelve bits
    cycles_low = (cycles - cycles_high).astype(np.float32)
    times = times.astype(jnp.float32)[..., None]
    times_high = jnp.round(times * 4096) / 4096
    phase = jnp.mod(times_high * cycles_high.astype(np.float32), 1.0)
    phase += jnp.mod((times - times_high) * cycles_high.astype(np.float32), 1.0)
    phase += times * cycles_low
    return jnp.concatenate([jnp.sin(2 * np.pi * phase), jnp.cos(2 * np.pi * phase)], axis=-1)


def embedder_widths(inputs: int, outputs: int) -> list[int]:
    """Widths of an embedder that grows about fourfold a layer; 10 → 47 → 220 → 1024 as published (SPEC 6.2)."""
    ratio = outputs / inputs
    layers = max(1, round(math.log(ratio, 4))) if ratio > 1 else 1
    widths = [inputs]
    for _ in range(layers - 1):
        widths.append(round(widths[-1] * ratio ** (1 / layers)))
    return [*widths, outputs]


class Embedder(nnx.Module):
    """Raw vectors → tokens: dense layers with the exact GELU between them, scaled by 1/√width."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        widths = embedder_widths(inputs, outputs)
        last = len(widths) - 2
        self.layers = nnx.List(
            linear(a, b, rngs, bias=0.0, init=nnx.initializers.variance_scaling(1.0 if i == last else 2.0, "fan_in", "uniform"))
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )

    def __call__(self, x: Float[Array, "m s i"]) -> Tokens:
        for layer in self.layers[:-1]:
            x = gelu(layer(x))
        x = self.layers[-1](x)
        return x / math.sqrt(x.shape[-1])


class PairTimeEmbedding(nnx.Module):
    """Low-rank bilinear embedding of the pair (action flow time, video flow time) (SPEC 6.2, step 5)."""

    def __init__(self, width: int, rank: int, rngs: nnx.Rngs):
        self.action_proj = linear(width, width, rngs, bias=0.0)
        self.video_proj = linear(width, width, rngs, bias=0.0)
        self.action_rank = linear(width, rank, rngs, bias=BILINEAR_BIAS)
        self.video_rank = linear(width, rank, rngs, bias=BILINEAR_BIAS)
        self.shared_proj = linear(rank, 3 * width, rngs)
        self.norm = RMSNorm(rank)

    def __call__(
        self, times: Float[Array, "n s"], video_time: Float[Array, " b"], dtype: jnp.dtype
    ) -> tuple[Float[Array, "n s r"], Float[Array, "n s w"]]:
        """Normalised embedding (n, s, rank) and the modulation term shared by all blocks (n, s, 3·width)."""
        width = self.action_proj.in_features
        action = silu(self.action_proj(fourier_features(times, width).astype(dtype)))
        video = silu(self.video_proj(fourier_features(video_time[:, None], width).astype(dtype)))
        video_rank = each_chunk(self.video_rank(video), len(action))
        assert self.action_rank.bias is not None and self.video_rank.bias is not None
        z = self.action_rank(action) * video_rank - self.action_rank.bias[...] * self.video_rank.bias[...]
        return self.norm(z), self.shared_proj(z)


def each_chunk(x: Shaped[Array, " b *x"], chunks: int) -> Shaped[Array, " {chunks} *x"]:
    """What samples have, for each of `chunks` action chunks, of which every sample has the same number one after the other."""
    return jnp.repeat(x, chunks // len(x), axis=0)


class ActionBlock(nnx.Module):
    """Cross-attention to the video, self-attention, MLP; each modulated per token (SPEC 6.2, step 6)."""

    def __init__(self, config: ActionDecoderConfig, context_width: int, rngs: nnx.Rngs, backend: Backend = "auto"):
        width, rank, time = config.width, config.adaln_lora_dim, config.time_rank
        self.cross_attn = Attention(width, config.num_heads, rngs, context_width, backend)
        self.self_attn = Attention(width, config.num_heads, rngs, backend=backend)
        self.mlp = MLP(width, int(width * config.mlp_ratio), rngs)
        self.cross_attn_modulation = Modulation(width, rank, 3, rngs, time)
        self.self_attn_modulation = Modulation(width, rank, 3, rngs, time)
        self.mlp_modulation = Modulation(width, rank, 3, rngs, time)

    def __call__(
        self,
        x: Tokens,
        time: Float[Array, "m s r"],
        shared: Float[Array, "m s 3*d"],
        keys_values: tuple[Keys, Keys],
        mask: KeyMask | None,
    ) -> Tokens:
        for layer, modulation in (
            (lambda y: self.cross_attn(y, keys_values, mask=mask), self.cross_attn_modulation),
            (lambda y: self.self_attn(y, self.self_attn.keys_values(y)), self.self_attn_modulation),
            (self.mlp, self.mlp_modulation),
        ):
            shift, scale, gate = modulation(time, shared)
            x = x + gate * layer(modulate(x, shift, scale))
        return x


class ActionDecoder(nnx.Module):
    """Velocity of an action chunk under the flow, given proprioception and the video backbone's hidden states."""

    def __init__(
        self,
        config: ActionDecoderConfig,
        context_width: int,
        action_horizon: int,
        rngs: nnx.Rngs,
        backend: Backend = "auto",
        remat: Remat = "none",
        obs_horizon: int = 1,
    ):
        """`context_width`: of hidden states. Horizons: steps of a chunk, and of proprioception."""
        self.config, self.horizons, self.remat = config, (obs_horizon, action_horizon), remat
        width = config.width
        self.proprio_embedder = Embedder(config.proprio_dim, width, rngs)
        self.action_embedder = Embedder(config.action_dim, width, rngs)
        small = truncated_normal(width**-0.5)
        self.proprio_mask_token = nnx.Param(small(rngs.params(), (1, 1, width), jnp.float32))
        self.position_embedding = nnx.Param(small(rngs.params(), (1, sum(self.horizons), width), jnp.float32))
        if config.embodiments:
            self.embodiment_tokens = nnx.Param(small(rngs.params(), (config.embodiments, width), jnp.float32))
        self.context_norm = LayerNorm(context_width)
        self.time_embedding = PairTimeEmbedding(width, config.time_rank, rngs)
        self.blocks = stack_blocks(lambda rngs: ActionBlock(config, context_width, rngs, backend), config.num_blocks, rngs)
        self.final_modulation = Modulation(width, config.adaln_lora_dim, 2, rngs, config.time_rank)
        self.final_proj = linear(width, config.action_dim, rngs)

    def encode_context(self, hidden: Float[Array, "b k c"], mask: Bool[Array, "b k"] | None = None) -> Context:
        """Keys and values of every block's cross-attention: all that the decoder needs of the video, at any action time.

        Args:
            mask: False for hidden states that take no part; None for none.
        """
        graphdef, state = nnx.split(self.blocks.cross_attn)
        context = self.context_norm(hidden)
        # There are few queries, so devices that share a sample each take some of the heads.
        heads = "sequence" if self.config.num_heads % axis_size("sequence") == 0 else None
        spec = PartitionSpec(BATCH_AXES, None, heads)

        def keys_values(block: nnx.State) -> tuple[Keys, Keys]:
            keys, values = nnx.merge(graphdef, block).keys_values(context)
            return constrain(keys, spec), constrain(values, spec)

        keys, values = jax.lax.map(keys_values, state)
        return Context(keys, values, mask)

    def __call__(
        self,
        actions: Float[Array, "n a m"],
        time: Float[Array, " n"],
        conditioning: ActionConditioning,
        drop_proprio: Bool[Array, " n"] | None = None,
    ) -> Float[Array, "n a m"]:
        """The velocity ε − x₀ of every action.

        A sample may have several chunks, which share all that is observed: n is a multiple of b, and those of a sample stand next
        to each other.

        Args:
            actions: noised normalised actions, scaled to unit variance (SPEC 7).
            time: action flow time τ_a in [0, 1].
            drop_proprio: chunks that see the mask token in place of proprioception; None for none.

        Raises:
            ValueError: if the token count is not the one the position embedding was made for, or the embodiment is missing or not
                expected.
        """
        return self.tokens(actions, time, conditioning, drop_proprio)[:, conditioning.proprio.shape[1] :]

    def tokens(
        self,
        actions: Float[Array, "n a m"],
        time: Float[Array, " n"],
        conditioning: ActionConditioning,
        drop_proprio: Bool[Array, " n"] | None = None,
    ) -> Float[Array, "n s m"]:
        """As `__call__`, for proprioception tokens too."""
        context, video_time, proprio, embodiment, _ = conditioning
        observed, acted, chunks = proprio.shape[1], actions.shape[1], len(actions)
        if (observed, acted) != self.horizons:
            raise ValueError(
                f"{observed} proprioception and {acted} action tokens; the decoder was built for "
                f"{self.horizons[0]} and {self.horizons[1]}"
            )
        if (embodiment is None) == bool(self.config.embodiments):
            raise ValueError(
                f"embodiment is {'missing' if embodiment is None else 'given'}; this decoder has "
                f"{self.config.embodiments} embodiments"
            )
        extra = 0 if embodiment is None else 1  # its token comes first and carries the time of what is observed
        times = jnp.concatenate([jnp.full((len(time), extra + observed), PROPRIO_TIME), jnp.tile(time[:, None], acted)], axis=1)
        embedding, shared = self.time_embedding(times, video_time, actions.dtype)
        proprio_tokens = each_chunk(self.proprio_embedder(proprio), chunks)
        if drop_proprio is not None:
            proprio_tokens = jnp.where(drop_proprio[:, None, None], self.proprio_mask_token[...], proprio_tokens)
        x = jnp.concatenate([proprio_tokens, self.action_embedder(actions)], axis=1)
        x = x + self.position_embedding[...]
        if embodiment is not None:
            robots = each_chunk(self.embodiment_tokens[...][embodiment][:, None], chunks)
            x = jnp.concatenate([robots.astype(x.dtype), x], axis=1)

        def apply(block: ActionBlock, x: Tokens, keys: Keys, values: Keys) -> Tokens:
            return block(x, embedding, shared, (keys, values), context.mask)

        x = scan_blocks(self.blocks, apply, x, context.keys, context.values, remat=self.remat)
        shift, scale = self.final_modulation(embedding, shared)
        return self.final_proj(modulate(x, shift, scale))[:, extra:]
