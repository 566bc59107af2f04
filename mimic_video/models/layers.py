"""Layers shared by the video backbone and the action decoder.

Modules compute in the dtype of their parameters and inputs: a caller that wants bfloat16 casts both. Norms, softmax and
activations work in float32 inside and round their result (SPEC 3.9).
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mimic_video.models.devices import PAPER, is_spread, platform
from mimic_video.models.quantization import dequantized

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Remat = Literal["none", "attention", "full", "offload"]
Block = TypeVar("Block", bound=nnx.Module)

SAVED_ATTENTION = "attention"  # the name under which policies of rematerialisation know what attention returns


def truncated_normal(std: float) -> Initializer:
    """Normal with standard deviation `std` before truncation at ±3 std."""
    return lambda key, shape, dtype: std * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)


def _flat_dot_general(inputs, kernel, dimension_numbers, **options):
    """A matmul over flattened leading dimensions on CPU, whose backward pass is about 1.7x faster that way.

    Elsewhere the leading dimensions stay apart, since they are sharded separately.
    """
    if platform() != "cpu" or is_spread() or inputs.ndim <= 2:
        return jax.lax.dot_general(inputs, kernel, dimension_numbers, **options)
    flat = jax.lax.dot_general(inputs.reshape(-1, inputs.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return flat.reshape(*inputs.shape[:-1], kernel.shape[-1])


def linear(
    inputs: int, outputs: int, rngs: nnx.Rngs, *, init: Initializer | None = None, bias: float | None = None
) -> nnx.Linear:
    """A dense layer; unless given, weights are truncated normal with std 1/√inputs and there is no bias (SPEC 3.11)."""
    return nnx.Linear(
        inputs,
        outputs,
        rngs=rngs,
        use_bias=bias is not None,
        kernel_init=init or truncated_normal(inputs**-0.5),
        bias_init=nnx.initializers.constant(bias or 0.0),
        dot_general=_flat_dot_general,
    )


def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer normalisation without learned parameters, eps 1e-6."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with learned scale and offset, eps 1e-6."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return (layer_norm(x.astype(jnp.float32)) * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x · rsqrt(mean x² + eps) · scale, eps 1e-6."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        return (y * self.scale[...]).astype(x.dtype)


def silu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x · sigmoid(x), computed in float32."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exact (erf) GELU, computed in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class Modulation(nnx.Module):
    """AdaLN-LoRA: `parts` vectors per token from the normalised time embedding, plus a term shared by all blocks (SPEC 3.6)."""

    def __init__(self, width: int, rank: int, parts: int, rngs: nnx.Rngs, time_width: int | None = None):
        self.parts = parts
        self.down = linear(time_width or width, rank, rngs)
        self.up = linear(rank, parts * width, rngs, init=nnx.initializers.zeros)

    def __call__(self, time: Float[Array, "*b e"], shared: Float[Array, "*b n"]) -> list[Float[Array, "*b d"]]:
        low_rank = self.up(self.down(silu(time)))
        return jnp.split(low_rank + shared[..., : low_rank.shape[-1]], self.parts, axis=-1)


def modulate(x: Float[Array, "*b d"], shift: Float[Array, "*#b d"], scale: Float[Array, "*#b d"]) -> Float[Array, "*b d"]:
    return layer_norm(x) * (1 + scale) + shift


class MLP(nnx.Module):
    """Two dense layers around the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = linear(width, hidden, rngs)
        self.down = linear(hidden, width, rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.down(gelu(self.up(x)))


def stack_blocks(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one module whose every parameter has a leading axis of that length."""
    return nnx.vmap(make_block, axis_size=depth)(rngs.split(depth))


def rematerialised(function: Callable, remat: Remat) -> Callable:
    """The function with a backward pass that computes again what it does not find.

    Args:
        remat: "none" keeps everything, "attention" the inputs and what attention returns, "offload" the same but the latter in
            the host's memory, "full" the inputs only.
    """
    if remat == "none" or platform() == PAPER:
        return function
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names(SAVED_ATTENTION),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[SAVED_ATTENTION],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=False)  # a scan keeps them apart anyway


def scan_blocks(
    blocks: nnx.Module, apply: Callable, x: Float[Array, "*x"], *per_block, stop: int | None = None, remat: Remat = "none"
) -> Float[Array, "*x"]:
    """Runs stacked blocks one after another: x ← apply(block, x, *slice of per_block).

    Args:
        blocks: from `stack_blocks`.
        apply: called as apply(block, x, *arrays), with each array of `per_block` indexed by the block.
        stop: number of leading blocks to run; None for all. The other blocks' parameters are not touched.
        remat: of each block, as for `rematerialised`.
    """
    graphdef, state = nnx.split(blocks)
    stacked = state, per_block

    def body(x, block_inputs):
        block_state, extra = block_inputs
        block = nnx.merge(graphdef, dequantized(block_state, x.dtype))  # one block's at a time
        return apply(block, x, *extra), None

    def body_at(x, index):
        return body(x, jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked))

    # XLA's CPU backend gains about 1.4x from seeing several blocks at once; accelerators only lose compile time.
    unroll = 4 if platform() == "cpu" else 1
    if stop is None or stop == len(jax.tree.leaves(stacked)[0]):
        return jax.lax.scan(rematerialised(body, remat), x, stacked, unroll=unroll)[0]
    # A slice of the stack would be a copy, of gigabytes.
    return jax.lax.scan(rematerialised(body_at, remat), x, jnp.arange(stop), unroll=unroll)[0]
