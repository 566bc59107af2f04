import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimic_video.models import layers
from mimic_video.models.attention import Attention, attention


def random(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numpy_layer_norm(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def numpy_rms_norm(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 the epsilon matters
def test_norms(scale):
    x = random(3, 4, 10, scale=scale) + np.float32(scale)
    np.testing.assert_allclose(layers.layer_norm(x), numpy_layer_norm(x), atol=2e-6)
    rms, affine = layers.RMSNorm(10), layers.LayerNorm(10)
    np.testing.assert_allclose(rms(x), numpy_rms_norm(x), atol=2e-6)
    weight, bias = random(10, seed=1), random(10, seed=2)
    rms.scale[...], affine.scale[...], affine.bias[...] = jnp.asarray(weight), jnp.asarray(weight), jnp.asarray(bias)
    np.testing.assert_allclose(rms(x), numpy_rms_norm(x) * weight, atol=5e-6)
    np.testing.assert_allclose(affine(x), numpy_layer_norm(x) * weight + bias, atol=5e-6)


def test_norms_of_bfloat16_work_in_float32_inside():
    x = jnp.asarray(random(4, 64) + 30, jnp.bfloat16)  # in bfloat16 the deviations would be lost
    affine, rms = layers.LayerNorm(64), layers.RMSNorm(64)
    for module, reference in ((layers.layer_norm, numpy_layer_norm), (affine, numpy_layer_norm), (rms, numpy_rms_norm)):
        y = module(x)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), reference(x.astype(jnp.float32)), rtol=2**-8, atol=1e-6)


def test_modulate():
    x, shift, scale = random(2, 3, 8), random(2, 3, 8, seed=1), random(2, 3, 8, seed=2)
    np.testing.assert_allclose(layers.modulate(x, shift, scale), numpy_layer_norm(x) * (1 + scale) + shift, atol=1e-5)


def test_modulation():
    module = layers.Modulation(width=6, rank=2, parts=2, rngs=nnx.Rngs(0), time_width=5)
    time, shared = random(3, 5), random(3, 18, seed=1)
    parts = module(time, shared)  # the last layer starts at zero; the shared term is longer than needed
    np.testing.assert_array_equal(np.stack(parts), [shared[:, :6], shared[:, 6:12]])
    module.up.kernel[...] = jnp.asarray(random(2, 12, seed=2))
    low_rank = (time / (1 + np.exp(-time))) @ np.asarray(module.down.kernel[...]) @ random(2, 12, seed=2)
    np.testing.assert_allclose(np.concatenate(module(time, shared), -1), low_rank + shared[:, :12], atol=1e-5)


def test_mlp_has_the_exact_gelu():
    mlp, x = layers.MLP(4, 7, nnx.Rngs(0)), random(2, 3, 4, scale=2.0)
    hidden = np.float64(x) @ np.asarray(mlp.up.kernel[...])
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(hidden)
    np.testing.assert_allclose(mlp(x), gelu @ np.asarray(mlp.down.kernel[...]), atol=2e-6)  # the tanh form is 1e-4 away


def test_dense_layers_start_truncated_normal():
    kernel = np.asarray(layers.linear(100, 3000, nnx.Rngs(0)).kernel[...])
    assert 0.29 < np.abs(kernel).max() <= 0.3  # 3 standard deviations of 1/√100
    np.testing.assert_allclose(kernel.std(), 0.1 * 0.98658, rtol=5e-3)  # of a normal cut at ±3
    assert layers.linear(2, 3, nnx.Rngs(0)).bias is None
    np.testing.assert_array_equal(layers.linear(2, 3, nnx.Rngs(0), bias=0.25).bias[...], [0.25] * 3)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
def test_dense_layers_take_any_leading_axes(leading):
    layer, x = layers.linear(5, 6, nnx.Rngs(0), bias=0.5), random(*leading, 5)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[...]) + 0.5, atol=1e-5)


@pytest.mark.parametrize("stop", [0, 1, 3, None])
def test_blocks_run_in_order_up_to_the_stop(stop):
    blocks = layers.stack_blocks(lambda rngs: layers.linear(3, 3, rngs), 5, nnx.Rngs(0))
    assert blocks.kernel.shape == (5, 3, 3)
    assert len(np.unique(np.asarray(blocks.kernel[...]))) == 45  # every block has weights of its own
    x, extra = random(2, 3), random(5, 3, seed=1)
    expected = x
    for kernel, bias in list(zip(np.asarray(blocks.kernel[...]), extra, strict=True))[:stop]:
        expected = np.tanh(expected @ kernel) + bias

    def apply(block, x, bias):
        return jnp.tanh(block(x)) + bias

    got = layers.scan_blocks(blocks, apply, jnp.asarray(x), jnp.asarray(extra), stop=stop)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def numpy_attention(q, k, v):
    logits = np.einsum("bsnk,btnk->bnst", q, k).astype(np.float64) / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnst,btnk->bsnk", weights / weights.sum(-1, keepdims=True), v)


def test_attention():
    q, k, v = random(2, 3, 2, 4), random(2, 5, 2, 4, seed=1, scale=3.0), random(2, 5, 2, 4, seed=2)
    np.testing.assert_allclose(attention(q, k, v), numpy_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("padding", [0, 3])  # zero rows, as text padding, take their share of attention: there is no mask
def test_attention_module(padding):
    module = Attention(8, 2, nnx.Rngs(0), context_width=5)
    x, context = random(2, 3, 8), np.pad(random(2, 4, 5, seed=1), [(0, 0), (0, padding), (0, 0)])
    module.q_norm.scale[...], module.k_norm.scale[...] = jnp.asarray(random(4, seed=2)), jnp.asarray(random(4, seed=3))
    q, k, v = (
        (array @ np.asarray(layer.kernel[...])).reshape(2, -1, 2, 4)
        for array, layer in ((x, module.q_proj), (context, module.k_proj), (context, module.v_proj))
    )
    mixed = numpy_attention(numpy_rms_norm(q) * random(4, seed=2), numpy_rms_norm(k) * random(4, seed=3), v)
    expected = mixed.reshape(2, 3, 8) @ np.asarray(module.out_proj.kernel[...])
    np.testing.assert_allclose(module(x, module.keys_values(context)), expected, atol=1e-5)


def test_rotations_follow_the_norms_of_queries_and_keys_and_leave_values():
    module, x = Attention(8, 2, nnx.Rngs(0)), random(1, 4, 8)
    module.q_norm.scale[...], module.k_norm.scale[...] = jnp.asarray(random(4, seed=2)), jnp.asarray(random(4, seed=3))
    q, k, v = ((x @ np.asarray(layer.kernel[...])).reshape(1, 4, 2, 4) for layer in (module.q_proj, module.k_proj, module.v_proj))
    q, k = numpy_rms_norm(q) * random(4, seed=2), numpy_rms_norm(k) * random(4, seed=3)
    expected = numpy_attention(q[..., ::-1], -k, v).reshape(1, 4, 8) @ np.asarray(module.out_proj.kernel[...])
    got = module(x, module.keys_values(x, lambda heads: -heads), lambda heads: heads[..., ::-1])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_keys_are_rotated_after_their_norm():
    module, x = Attention(8, 2, nnx.Rngs(0)), random(1, 4, 8)
    module.k_norm.scale[...] = jnp.asarray(random(4, seed=3))
    keys, values = module.keys_values(x)
    rotated, same = module.keys_values(x, lambda heads: heads[..., ::-1])
    np.testing.assert_allclose(rotated, keys[..., ::-1], atol=1e-6)
    np.testing.assert_array_equal(same, values)
