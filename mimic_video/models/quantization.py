"""Weights of eight bits for inference: integers, and a scale for each of a kernel's outputs. Activations stay as they are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


class Int8Kernel(NamedTuple):
    """A kernel in place of its array: values · scale."""

    values: Int8[Array, "*depth in out"]
    scale: Float[Array, "*depth 1 out"]  # float32


def quantized(network: dict[str, Any]) -> dict[str, Any]:
    """A network's parameters with the kernels of its blocks, nearly all of it, as `Int8Kernel`; those that are stay.

    An output's largest weight is 127, so that every weight is off by at most 1/254 of it.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        return _quantize(leaf) if path[-1].key == "kernel" and not _is_int8(leaf) else leaf

    return network | {"blocks": jax.tree_util.tree_map_with_path(one, network["blocks"], is_leaf=_is_int8)}


def dequantized(tree: Any, dtype: jnp.dtype) -> Any:
    """The tree with every `Int8Kernel` as an array again."""

    def one(leaf: Any) -> Any:
        return (leaf.values * leaf.scale).astype(dtype) if _is_int8(leaf) else leaf

    return jax.tree.map(one, tree, is_leaf=_is_int8)


def cast(tree: Any, dtype: jnp.dtype) -> Any:
    """Arrays in another dtype; every `Int8Kernel` as it is."""
    return jax.tree.map(lambda leaf: leaf if _is_int8(leaf) else leaf.astype(dtype), tree, is_leaf=_is_int8)


def _quantize(kernel: Float[Array, "*depth in out"]) -> Int8Kernel:
    exact = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return Int8Kernel(jnp.round(exact / scale).astype(jnp.int8), scale)


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8Kernel)
