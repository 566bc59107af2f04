"""Multi-head attention: one function that all of the networks call, and the module around it."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from mimic_video.config import ConfigError
from mimic_video.models.devices import BATCH, BATCH_AXES, PAPER, TOKENS, axis_size, compute_capability, is_spread, platform
from mimic_video.models.layers import SAVED_ATTENTION, RMSNorm, linear

Backend = Literal["auto", "xla", "cudnn", "splash"]
# Tokens are on one axis, or as video tokens on two: frames and patches of a frame.
Heads = Float[Array, "b *s n e"]
Keys = Float[Array, "b *k n e"]
KeyMask = Bool[Array, "b keys"]  # over keys on all their axes in order

_SPLASH_BLOCK, _SPLASH_LANES = 1024, 128
_UNKNOWN = "GPUs of an unknown compute capability"
_LOGITS_BYTES = 2**28  # of products of queries and keys that XLA's attention has in memory at a time


@jax.named_scope("attention")
def attention(
    q: Float[Array, "m *s n e"], k: Keys, v: Keys, mask: KeyMask | None = None, backend: Backend = "auto"
) -> Float[Array, "m *s n e"]:
    """Softmax attention over all tokens, scale 1/√head_dim; softmax in float32.

    Video tokens may be spread over the axis `sequence` of the mesh in context. Then, if keys are too, devices exchange parts of
    the tokens for parts of the heads before and after (all-to-all); the number of patches need not be divisible. Tokens on one
    axis are whole on every device, which has its part of the batch, and of the heads where `sequence` divides them.

    Args:
        q: of as many samples as `k`, or with tokens on one axis of a multiple: those that share keys stand next to each other.
        mask: False for keys that no query attends to, over all keys in order; some key of every sample is attended to. None for
            all.
        backend: "xla"; "cudnn" (flash attention on GPU); "splash" (flash attention on TPU, elsewhere interpreted, which is slow);
            "auto" for the platform's flash attention, and for "xla" where that does not take the arrays, which is logged once.

    Raises:
        ValueError: if the samples of `q` are no multiple of those of `k`.
        ConfigError: if "cudnn" is named and does not take the arrays, or not on this GPU.
    """
    if q.ndim == 4 and len(q) != len(k):  # more queries of the same keys
        if len(q) % len(k):
            raise ValueError(f"queries of {len(q)} samples cannot share the keys of {len(k)}; expected a multiple of them")
        return attention(q.reshape(len(k), -1, *q.shape[2:]), k, v, mask, backend).reshape(q.shape)
    if not is_spread():
        return _attend(q, k, v, mask, backend)
    if q.ndim == 4:
        whole = PartitionSpec(
            BATCH_AXES if len(q) % axis_size(*BATCH_AXES) == 0 else None,
            None,
            "sequence" if q.shape[2] % axis_size("sequence") == 0 else None,
        )
        return _on_devices(_attend, q, k, v, mask, backend, whole, whole)
    if k.ndim == 4:
        return _on_devices(_attend, _padded(q), k, v, mask, backend, TOKENS, BATCH)[:, :, : q.shape[2]]
    exchanging = functools.partial(_attend_by_heads, patches=q.shape[2])
    out = _on_devices(exchanging, _padded(q), _padded(k), _padded(v), mask, backend, TOKENS, TOKENS)
    return out[:, :, : q.shape[2]]


def _on_devices(
    attend: Callable,
    q: Heads,
    k: Keys,
    v: Keys,
    mask: KeyMask | None,
    backend: Backend,
    queries: PartitionSpec,
    keys: PartitionSpec,
) -> Heads:
    """Attention by every device of the mesh of its part of the arrays: kernels of flash attention are not divided by XLA."""
    masks = () if mask is None else (mask,)

    def local(q: Heads, k: Keys, v: Keys, *masks: KeyMask) -> Heads:
        return attend(q, k, v, masks[0] if masks else None, backend)

    specs = (queries, keys, keys, *[PartitionSpec(queries[0])] * len(masks))
    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, *masks)


def _padded(x: Float[Array, "b t p n e"], patches: int | None = None) -> Float[Array, "b t padded n e"]:
    """With zero patches added up to `patches`, or as many as the axis `sequence` divides."""
    extra = -x.shape[2] % axis_size("sequence") if patches is None else patches - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)]) if extra else x


def _attend_by_heads(q: Heads, k: Keys, v: Keys, mask: KeyMask | None, backend: Backend, patches: int) -> Heads:
    """A device's patches of all heads → all patches of its share of the heads, attention, and back."""
    if axis_size("sequence") == 1:
        return _attend(q, k, v, mask, backend)
    padded = q.shape[2] * axis_size("sequence")
    exchange = functools.partial(jax.lax.all_to_all, axis_name="sequence", tiled=True)
    q, k, v = (exchange(x, split_axis=3, concat_axis=2)[:, :, :patches] for x in (q, k, v))
    return exchange(_padded(_attend(q, k, v, mask, backend), padded), split_axis=2, concat_axis=3)


def _attend(q: Heads, k: Keys, v: Keys, mask: KeyMask | None, backend: Backend) -> Heads:
    """Attention on one device."""
    shape = q.shape
    q, k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
    backend = chosen(q, k, backend)
    if backend == "splash":
        return _splash(q, k, v, mask).reshape(shape)  # it names what it saves itself
    out = (_cudnn if backend == "cudnn" else _xla)(q, k, v, mask)
    return checkpoint_name(out.reshape(shape), SAVED_ATTENTION)


def chosen(q: Float[Array, "b s n e"], k: Float[Array, "b k n e"], backend: Backend) -> Backend:
    """The backend that attends on this platform: `backend`, or what stands for "auto". Errors are those of `attention`."""
    if platform() == PAPER:
        return "xla"
    if backend == "cudnn" and (reason := _cudnn_refuses(q)) not in ("", _UNKNOWN):  # who names it knows the GPU
        raise ConfigError(f"config field 'attention' is 'cudnn', which does not take {reason}; expected 'auto' or 'xla'")
    if backend != "auto":
        return backend
    flash: Backend
    if platform() == "gpu":
        flash, reason = "cudnn", _cudnn_refuses(q)
    elif platform() == "tpu" and min(q.shape[1], k.shape[1]) >= _SPLASH_LANES:
        flash, reason = "splash", f"heads of {q.shape[-1]}" if q.shape[-1] % _SPLASH_LANES else ""
    else:
        return "xla"
    if reason:
        _say_once(f"{flash} does not take {reason}")
    return "xla" if reason else flash


REFUSED: list[str] = []  # what flash attention did not take of what this process has traced


def _say_once(message: str) -> None:
    if message not in REFUSED:
        REFUSED.append(message)
        logging.warning("attention by XLA: %s", message)


def _cudnn_refuses(q: Float[Array, "b s n e"]) -> str:
    """What of the arrays or the GPU cuDNN's flash attention cannot do; empty if nothing."""
    capability, head_dim = compute_capability(), q.shape[-1]
    if capability is None:
        return _UNKNOWN
    if capability < (8, 0):
        slow = ", which has no bfloat16 either: config field 'precision' had better be 'float32'"
        return f"compute capability {capability[0]}.{capability[1]}{slow if q.dtype == jnp.bfloat16 else ''}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} (config field 'precision')"
    if head_dim % 8 or head_dim > (256 if capability >= (9, 0) else 128):
        return f"heads of {head_dim}"
    return ""


def _xla(
    q: Float[Array, "b s n e"], k: Float[Array, "b k n e"], v: Float[Array, "b k n e"], mask: Bool[Array, "b k"] | None
) -> Float[Array, "b s n e"]:
    """Attention of plain products. If they are many, queries come some after others, and the backward pass does that again."""
    mask = None if mask is None else mask[:, None, None]
    (size, queries, heads, head_dim), dtype = q.shape, q.dtype
    at_a_time = max(1, _LOGITS_BYTES // (4 * size * heads * k.shape[1]))
    if platform() == PAPER or queries <= max(
        at_a_time, 2 * head_dim
    ):  # keys and values in float32 are as large as the logits of that many
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    at_a_time -= at_a_time % _SPLASH_LANES if at_a_time > _SPLASH_LANES else 0
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)  # in which their gradients are summed up

    @jax.checkpoint
    def attend(q: Float[Array, "b c n e"]) -> Float[Array, "b c n e"]:
        return jax.nn.dot_product_attention(q, k.astype(dtype), v.astype(dtype), mask=mask, implementation="xla")

    q = jnp.pad(q, [(0, 0), (0, -queries % at_a_time), (0, 0), (0, 0)])
    out = jax.lax.map(attend, q.reshape(size, -1, at_a_time, heads, head_dim).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(q.shape)[:, :queries]


def _cudnn(
    q: Float[Array, "b s n e"], k: Float[Array, "b k n e"], v: Float[Array, "b k n e"], mask: Bool[Array, "b k"] | None
) -> Float[Array, "b s n e"]:
    """Flash attention on GPU. It has no gradients of odd numbers of tokens, and no masks but the number of leading keys."""
    queries, keys, lengths = q.shape[1], k.shape[1], None
    if mask is not None:
        order, lengths = jnp.argsort(~mask, axis=1, stable=True), jnp.sum(mask, axis=1, dtype=jnp.int32)
        attended = (jnp.arange(keys) < lengths[:, None])[:, :, None, None]
        take = jax.vmap(lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds"))
        k, v = (jnp.where(attended, take(x, order), 0) for x in (k, v))  # the attended ones first; the others have no gradient
    elif keys % 2:
        lengths = jnp.full(len(k), keys, jnp.int32)
    q, k, v = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :queries]


def _splash(
    q: Float[Array, "b s n e"], k: Float[Array, "b k n e"], v: Float[Array, "b k n e"], mask: Bool[Array, "b k"] | None
) -> Float[Array, "b s n e"]:
    """Flash attention on TPU. Tokens are padded to whole blocks; padded keys are told from others by their segment."""
    (size, queries, heads, head_dim), keys = q.shape, k.shape[1]
    q_block, k_block = (min(_SPLASH_BLOCK, -(-tokens // _SPLASH_LANES) * _SPLASH_LANES) for tokens in (queries, keys))

    def blocks(x: Float[Array, "b s n e"], block: int) -> Float[Array, "b n padded e"]:
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
            block_q=q_block,
            block_kv=k_block,
            block_q_dkv=q_block,
            block_kv_dkv=k_block,
            block_q_dq=q_block,
            block_kv_dq=k_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED_ATTENTION,
        interpret=platform() != "tpu",
    )
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

    def keys_values(self, context: Float[Array, "b *k c"], rotate: Callable[[Heads], Heads] = lambda x: x) -> tuple[Keys, Keys]:
        return rotate(self.k_norm(self._heads(self.k_proj(context)))), self._heads(self.v_proj(context))

    def __call__(
        self,
        x: Float[Array, "m *s d"],
        keys_values: tuple[Keys, Keys],
        rotate: Callable[[Heads], Heads] = lambda x: x,
        mask: KeyMask | None = None,
    ) -> Float[Array, "m *s d"]:
        """Attends from `x` to those of `keys_values` that `mask` allows; `rotate` applies position as to the keys."""
        q = rotate(self.q_norm(self._heads(self.q_proj(x))))
        return self.out_proj(attention(q, *keys_values, mask, self.backend).reshape(x.shape))
