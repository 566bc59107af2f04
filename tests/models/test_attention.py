import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimic_video.config import MeshConfig
from mimic_video.models import attention as module
from mimic_video.models import devices
from mimic_video.models.attention import attention
from mimic_video.parallel.sharding import make_mesh

HEAD_DIM = 128  # what a TPU's lanes hold


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def outputs_and_gradients(function, *heads):
    """What attention returns, and the gradients of a smooth function of it: [output, of q, of k, of v]."""

    @jax.jit
    def compute(*heads):
        out, pullback = jax.vjp(function, *heads)
        return [out, *pullback(jnp.cos(out))]

    return compute(*heads)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("queries", "keys", "masked", "head_dim"),
    [
        (130, 130, False, HEAD_DIM),
        (128, 256, False, HEAD_DIM),
        (1100, 200, True, HEAD_DIM),
        (30, 130, False, 32),
    ],
)
def test_splash_attention_is_attention(queries, keys, masked, head_dim):
    """Also where tokens fill no whole blocks, and where keys are masked; in interpret mode, where heads may be narrower."""
    q, k, v = random(2, queries, 2, head_dim), random(2, keys, 2, head_dim, seed=1), random(2, keys, 2, head_dim, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((2, keys)) > 0.3) if masked else None
    assert_close(
        *(
            outputs_and_gradients(lambda *heads, backend=backend: attention(*heads, mask, backend), q, k, v)
            for backend in ("splash", "xla")
        )
    )


# Queries that share keys.


@pytest.mark.parametrize("backend", ["xla", pytest.param("splash", marks=pytest.mark.tpu_compiler)])
@pytest.mark.parametrize("masked", [False, True])
def test_samples_that_share_keys_attend_as_with_keys_of_their_own(masked, backend):
    """Outputs, and gradients, which for shared keys are sums."""
    heads, dim = (2, HEAD_DIM) if backend == "splash" else (2, 8)
    q, k, v = random(6, 50, heads, dim), random(2, 130, heads, dim, seed=1), random(2, 130, heads, dim, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 130)) > 0.3) if masked else None

    def own(q, k, v):
        k, v, masks = (x if x is None else jnp.repeat(x, 3, axis=0) for x in (k, v, mask))
        return attention(q, k, v, masks, "xla")

    shared = outputs_and_gradients(lambda *heads: attention(*heads, mask, backend), q, k, v)
    assert_close(shared, outputs_and_gradients(own, q, k, v))


def test_samples_that_cannot_share_keys():
    with pytest.raises(ValueError, match="queries of 5 samples cannot share the keys of 2; expected a multiple of them"):
        attention(random(5, 3, 2, 4), random(2, 3, 2, 4), random(2, 3, 2, 4))


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 8), (8, 1, 1)], ids=str)
def test_devices_share_the_samples_and_heads_of_whole_tokens(mesh):
    """Three samples to a context, and as many contexts as devices divide, or not; heads that `sequence` divides, or not."""
    for contexts in (8, 3):
        q, k, v = random(3 * contexts, 5, 4, 8), random(contexts, 7, 4, 8, seed=1), random(contexts, 7, 4, 8, seed=2)
        mask = jnp.asarray(np.random.default_rng(3).random((contexts, 7)) > 0.3)
        expected = outputs_and_gradients(lambda *heads, mask=mask: attention(*heads, mask), q, k, v)
        with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
            assert_close(outputs_and_gradients(lambda *heads, mask=mask: attention(*heads, mask), q, k, v), expected)


# What cuDNN is given.


@pytest.mark.parametrize(
    ("queries", "keys", "masked"),
    [
        (64, 128, False),
        (61, 128, False),
        (64, 127, False),
        (64, 128, True),
        (61, 127, True),
    ],
)
def test_cudnn_is_given_the_same_attention(queries, keys, masked, monkeypatch):
    """Even numbers of tokens, and lengths in place of masks; XLA, which knows lengths too, computes what the GPU would."""
    of_jax, asked = jax.nn.dot_product_attention, []

    def instead(q, k, v, *, implementation, mask=None, key_value_seq_lengths=None):
        asked.append(implementation)
        if implementation == "cudnn":
            assert mask is None and q.shape[1] % 2 == k.shape[1] % 2 == 0
        return of_jax(q, k, v, mask=mask, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    q, k, v = random(6, queries, 2, 8), random(2, keys, 2, 8, seed=1), random(2, keys, 2, 8, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((2, keys)) > 0.3) if masked else None
    assert_close(
        *(
            outputs_and_gradients(lambda *heads, backend=backend: attention(*heads, mask, backend), q, k, v)
            for backend in ("cudnn", "xla")
        )
    )
    assert asked == ["cudnn", "xla"]


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("PJRT C API\ncuda 13000", "9.0", (9, 0)),
        ("PJRT C API\ncuda 12090", "12.1", (12, 1)),
        ("PJRT C API\nrocm 60300", "gfx942", None),
        ("cpu", None, None),
    ],
)
def test_compute_capability_is_that_of_cuda(version, capability, expected, monkeypatch):
    device = types.SimpleNamespace(client=types.SimpleNamespace(platform_version=version), compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert devices._own_capability.__wrapped__() == expected


# Many products, in parts.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_parts_is_attention(masked, dtype, monkeypatch):
    """Of 130 queries, which 50 at a time do not divide; of one query at a time, where one alone is too much.

    Not of few queries: their logits are smaller than copies of the keys and values in float32, which parts would need.
    """
    q, k, v = (random(2, tokens, 2, 8, seed=tokens).astype(dtype) for tokens in (130, 70, 70))
    mask = jnp.asarray(np.random.default_rng(3).random((2, 70)) > 0.3) if masked else None

    def compute():
        return outputs_and_gradients(lambda *heads: attention(*heads, mask, "xla").astype(jnp.float32), q, k, v)

    whole = compute()
    for at_a_time in (50, 0):
        monkeypatch.setattr(module, "_LOGITS_BYTES", at_a_time * 2 * 2 * 70 * 4)
        parts = compute()
        assert [x.dtype for x in parts] == [x.dtype for x in whole]
        bound = 1e-5 if dtype == jnp.float32 else 2**-7  # the gradients' own rounding: of keys, sums in float32 are rounded once
        for one, other in zip(parts, whole, strict=True):
            np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=bound, atol=bound)
        for queries, loops in ((130, 1), (16, 0)):
            program = jax.make_jaxpr(lambda q: attention(q, k, v, mask, "xla"))(q[:, :queries])
            assert str(program).count("scan") == loops


def test_attention_in_parts_fits_memory_at_the_published_number_of_tokens():
    """19,200 tokens of one sample and 16 heads: all logits are 23.6 GB in float32, and those of a part an eighth of a gigabyte.

    Forward and backward hold a few arrays of a part's size; beside them the arguments' and results' own, of 0.16 GB in float32.
    """
    heads = jax.ShapeDtypeStruct((1, 19_200, 16, 128), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, backend="xla").astype(jnp.float32))

    for function in (loss, jax.grad(loss, (0, 1, 2))):
        memory = jax.jit(function).lower(heads, heads, heads).compile().memory_analysis()
        print(f"{memory.temp_size_in_bytes / 1e9:.2f} GB")
        assert memory.temp_size_in_bytes < 2.5e9


# Video tokens on several devices.


@pytest.mark.parametrize("patches", [8, 5, 3], ids=["even", "uneven", "fewer than devices"])
@pytest.mark.parametrize("sequence", [2, 4, 8])
def test_devices_that_share_a_sample_attend_as_one_does(sequence, patches):
    """Self-attention of video tokens, gradients included, with some keys masked."""
    mesh = make_mesh(MeshConfig(data=8 // sequence, sequence=sequence))
    q, k, v = (random(8, 3, patches, 8, 4, seed=seed) for seed in range(3))
    mask = jnp.asarray(np.random.default_rng(3).random((8, 3 * patches)) > 0.3)
    expected = outputs_and_gradients(lambda *heads: attention(*heads, mask), q, k, v)
    with jax.set_mesh(mesh):
        found = outputs_and_gradients(lambda *heads: attention(*heads, mask), q, k, v)
    assert_close(found, expected)


def test_tokens_attend_to_a_context_that_every_device_has():
    q, k, v = random(8, 3, 5, 4, 4), random(8, 6, 4, 4, seed=1), random(8, 6, 4, 4, seed=2)
    expected = attention(q, k, v)
    np.testing.assert_allclose(expected.reshape(8, 15, 4, 4), attention(q.reshape(8, 15, 4, 4), k, v), atol=1e-6)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, sequence=4))):
        spread = jax.jit(attention)(q, k, v)
    np.testing.assert_allclose(spread, expected, atol=1e-6)


def test_exchanged_tokens_are_not_gathered():
    """Every device attends with its share of the heads: no array of all tokens and all heads is in the program."""
    mesh = make_mesh(MeshConfig(data=1, sequence=8))
    q = random(1, 2, 16, 8, 4)
    with jax.set_mesh(mesh):
        text = jax.jit(attention).lower(q, q, q).compile().as_text()
    assert "all-to-all" in text and "all-gather" not in text
