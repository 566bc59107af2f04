"""Multi-head attention: one function that all of the networks call, and the module around it."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float

from mimic_video.models.layers import SAVED_ATTENTION, RMSNorm, linear
from mimic_video.models.parallel import BATCH, TOKENS, axis_size, is_spread, platform

Backend = Literal["auto", "xla", "cudnn", "splash"]
Heads = Float[Array, "b *s n k"]  # tokens on one axis, or as video tokens on two: frames and patches of a frame

_SPLASH_BLOCK, _SPLASH_LANES = 1024, 128


def attention(q: Heads, k: Heads, v: Heads, mask: Bool[Array, "b k"] | None = None, backend: Backend = "auto") -> Heads:
    """Softmax attention over all tokens, scale 1/√head_dim; softmax in float32.

    Video tokens may be spread over the axis `sequence` of the mesh in context. Then, if keys are too, devices exchange parts of
    the tokens for parts of the heads before and after (all-to-all); the number of patches need not be divisible.

    Args:
        mask: False for keys that no query attends to, over all keys in order; None for none.
        backend: "xla"; "cudnn" (flash attention on GPU, bfloat16 only); "splash" (flash attention on TPU, elsewhere interpreted,
            which is slow); "auto" chooses by platform, dtype and size.
    """
    if q.ndim == 4 or not is_spread():
        return _attend(q, k, v, mask, backend)
    keys, exchanged = (TOKENS, True) if k.ndim == 5 else (BATCH, False)
    local = functools.partial(_attend_by_heads, patches=q.shape[2]) if exchanged else _attend
    masks = () if mask is None else (mask,)

    def attend(q, k, v, *masks):
        return local(q, k, v, masks[0] if masks else None, backend)

    spread = jax.shard_map(attend, in_specs=(TOKENS, keys, keys, *[BATCH] * len(masks)), out_specs=TOKENS, check_vma=False)
    k, v = (_padded(x) if exchanged else x for x in (k, v))
    return spread(_padded(q), k, v, *masks)[:, :, : q.shape[2]]


def _padded(x: Float[Array, "b t n h k"], patches: int | None = None) -> Float[Array, "b t n h k"]:
    """With zero patches added up to `patches`, or as many as the axis `sequence` divides."""
    extra = -x.shape[2] % axis_size("sequence") if patches is None else patches - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)]) if extra else x


def _attend_by_heads(q: Heads, k: Heads, v: Heads, mask: Array | None, backend: Backend, patches: int) -> Heads:
    """A device's patches of all heads → all patches of its share of the heads, attention, and back."""
    if axis_size("sequence") == 1:
        return _attend(q, k, v, mask, backend)
    padded = q.shape[2] * axis_size("sequence")
    exchange = functools.partial(jax.lax.all_to_all, axis_name="sequence", tiled=True)
    q, k, v = (exchange(x, split_axis=3, concat_axis=2)[:, :, :patches] for x in (q, k, v))
    return exchange(_padded(_attend(q, k, v, mask, backend), padded), split_axis=2, concat_axis=3)


def _attend(q: Heads, k: Heads, v: Heads, mask: Array | None, backend: Backend) -> Heads:
    """Attention on one device."""
    shape = q.shape
    q, k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
    backend = _fastest(q, k) if backend == "auto" else backend
    if backend == "splash":
        return _splash(q, k, v, mask).reshape(shape)
    mask = None if mask is None else mask[:, None, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=backend).reshape(shape)
    return checkpoint_name(out, SAVED_ATTENTION)


def _fastest(q: Float[Array, "b s n k"], k: Float[Array, "b z n k"]) -> Backend:
    (_, queries, _, head_dim), device = q.shape, platform()
    if device == "gpu" and q.dtype == jnp.bfloat16 and head_dim % 8 == 0:
        return "cudnn"
    if device == "tpu" and head_dim % _SPLASH_LANES == 0 and min(queries, k.shape[1]) >= _SPLASH_LANES:
        return "splash"
    return "xla"


def _splash(q: Float[Array, "b s n k"], k: Array, v: Array, mask: Bool[Array, "b z"] | None) -> Float[Array, "b s n k"]:
    """Flash attention on TPU. Tokens are padded to whole blocks; padded keys are told from others by their segment."""
    (size, queries, heads, head_dim), keys = q.shape, k.shape[1]
    q_block, k_block = (min(_SPLASH_BLOCK, -(-tokens // _SPLASH_LANES) * _SPLASH_LANES) for tokens in (queries, keys))

    def blocks(x: Array, block: int) -> Float[Array, "b n s k"]:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)]).swapaxes(1, 2)

    q, k, v = blocks(q * head_dim**-0.5, q_block), blocks(k, k_block), blocks(v, k_block)
    segments, batched = None, None
    if mask is not None or k.shape[2] != keys:
        real = jnp.ones((size, keys), bool) if mask is None else mask
        key_segments = jnp.pad(real, [(0, 0), (0, k.shape[2] - keys)]).astype(jnp.int32)
        segments, batched = splash_attention_kernel.SegmentIds(jnp.ones((size, q.shape[2]), jnp.int32), key_segments), 0
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=q_block, block_kv=k_block, block_q_dkv=q_block, block_kv_dkv=k_block, block_q_dq=q_block, block_kv_dq=k_block,
        ),
        head_shards=1, q_seq_shards=1, residual_checkpoint_name=SAVED_ATTENTION, interpret=platform() != "tpu",
    )  # fmt: skip
    out = jax.vmap(kernel, in_axes=(0, 0, 0, batched))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :queries]


class Attention(nnx.Module):
    """Attention with RMS-normalised queries and keys and no biases (SPEC 3.6).

    Keys and values are a separate step, so that those of a constant context are computed once and reused.
    """

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs, context_width: int | None = None, backend: Backend = "auto"):
        self.num_heads, self.backend = num_heads, backend
        head_dim = width // num_heads
        self.q_proj = linear(width, width, rngs)
        self.k_proj = linear(context_width or width, width, rngs)
        self.v_proj = linear(context_width or width, width, rngs)
        self.out_proj = linear(width, width, rngs)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def _heads(self, x: Float[Array, "b *s d"]) -> Heads:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def keys_values(self, context: Float[Array, "b *s c"], rotate: Callable[[Heads], Heads] = lambda x: x) -> tuple[Heads, Heads]:
        return rotate(self.k_norm(self._heads(self.k_proj(context)))), self._heads(self.v_proj(context))

    def __call__(
        self,
        x: Float[Array, "b *s d"],
        keys_values: tuple[Heads, Heads],
        rotate: Callable[[Heads], Heads] = lambda x: x,
        mask: Bool[Array, "b k"] | None = None,
    ) -> Float[Array, "b *s d"]:
        """Attends from `x` to those of `keys_values` that `mask` allows; `rotate` applies position as to the keys."""
        q = rotate(self.q_norm(self._heads(self.q_proj(x))))
        return self.out_proj(attention(q, *keys_values, mask, self.backend).reshape(x.shape))
