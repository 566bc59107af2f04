import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimic_video.config import MeshConfig
from mimic_video.models.attention import attention
from mimic_video.training.sharding import make_mesh

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


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys", "masked"), [(130, 130, False), (128, 256, False), (1100, 200, True)])
def test_splash_attention_is_attention(queries, keys, masked):
    """Also where tokens fill no whole blocks, and where keys are masked; in interpret mode."""
    q, k, v = random(2, queries, 2, HEAD_DIM), random(2, keys, 2, HEAD_DIM, seed=1), random(2, keys, 2, HEAD_DIM, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((2, keys)) > 0.3) if masked else None
    assert_close(*(outputs_and_gradients(lambda *heads, backend=backend: attention(*heads, mask, backend), q, k, v)
                   for backend in ("splash", "xla")))  # fmt: skip


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
