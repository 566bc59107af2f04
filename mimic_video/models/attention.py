"""Multi-head attention: one function that all of the networks call, and the module around it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mimic_video.models.layers import RMSNorm, linear

Heads = Float[Array, "b s n k"]


def attention(q: Heads, k: Heads, v: Heads, mask: Bool[Array, "b k"] | None = None, backend: str | None = None) -> Heads:
    """Softmax attention, scale 1/√head_dim; softmax in float32.

    Args:
        mask: False for keys that no query attends to; None for none.
        backend: "xla" or "cudnn" (flash attention on GPU, bfloat16 only); None chooses by platform.
    """
    if backend is None:
        backend = "cudnn" if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None, None], implementation=backend)


class Attention(nnx.Module):
    """Attention with RMS-normalised queries and keys and no biases (SPEC 3.6).

    Keys and values are a separate step, so that those of a constant context are computed once and reused.
    """

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs, context_width: int | None = None):
        self.num_heads = num_heads
        head_dim = width // num_heads
        self.q_proj = linear(width, width, rngs)
        self.k_proj = linear(context_width or width, width, rngs)
        self.v_proj = linear(context_width or width, width, rngs)
        self.out_proj = linear(width, width, rngs)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def _heads(self, x: Float[Array, "b s d"]) -> Heads:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def keys_values(self, context: Float[Array, "b s c"], rotate: Callable[[Heads], Heads] = lambda x: x) -> tuple[Heads, Heads]:
        return rotate(self.k_norm(self._heads(self.k_proj(context)))), self._heads(self.v_proj(context))

    def __call__(
        self,
        x: Float[Array, "b s d"],
        keys_values: tuple[Heads, Heads],
        rotate: Callable[[Heads], Heads] = lambda x: x,
        mask: Bool[Array, "b k"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Attends from `x` to those of `keys_values` that `mask` allows; `rotate` applies position as to the keys."""
        q = rotate(self.q_norm(self._heads(self.q_proj(x))))
        return self.out_proj(attention(q, *keys_values, mask).reshape(x.shape))
