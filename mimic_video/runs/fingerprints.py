"""Fingerprints of arrays: 32 bits that tell whether what was read is what was written."""

import functools
import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mimic_video.compiler import compiler_options
from mimic_video.trees import named_leaves

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprints(tree: Any) -> dict[str, int]:
    """{'decoder/blocks/mlp/up/kernel': 32-bit number of its bits and where they stand}; one pass over the arrays, on device.

    Sums of integers modulo 2^32: the same on every mesh, in every sharding, and for any number of processes. Any change within
    one element changes it; other changes do except by a chance of 2^-32.

    Args:
        tree: arrays with elements of 1, 2 or 4 bytes.
    """
    named = named_leaves(tree)
    return dict(zip(named, jax.device_get(_all()(tuple(named.values()))).tolist(), strict=True)) if named else {}


def json_fingerprint(value: Any) -> int:
    """The same of a value that JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@functools.cache
def _all() -> Callable[[tuple[jax.Array, ...]], jax.Array]:
    """The numbers of arrays, in their order."""
    options = compiler_options(jax.default_backend(), once=True)
    return jax.jit(lambda leaves: jnp.stack([_one(leaf) for leaf in leaves]), compiler_options=options)


@jax.jit  # arrays of one shape are traced once
def _one(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
        position += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(_scramble(bits ^ _scramble(position)), dtype=jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """One to one on 32 bits, and unlike any sum of them: odd factors and shifts onto oneself can both be undone."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 15)) * jnp.uint32(0x85EBCA77)
    return x ^ (x >> 16)
