"""The 2B backbone at its full width and depth, on few tokens: bfloat16 against float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimic_video.config import CompatConfig, VideoDiTConfig
from mimic_video.models.protocols import VideoInputs
from mimic_video.models.video_dit import VideoDiT

pytestmark = pytest.mark.full_size

CONFIG = VideoDiTConfig()
FRAMES, ROWS, COLUMNS, TEXT_ROWS = 2, 4, 6, 8


def random_params(shapes):
    """bfloat16 weights of the size that trained ones have, from one repeated pool: two billion fresh numbers take minutes."""
    pool = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return np.ones(leaf.shape, jnp.bfloat16)
        deviation = 0.5 if "modulation" in name and "up" in name else 1.0
        return np.resize((deviation / math.sqrt(leaf.shape[-2]) * pool).astype(jnp.bfloat16), leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.mark.parametrize(("blocks", "bound"), [(1, 0.01), (CONFIG.num_blocks, 0.03)], ids=["one block", "whole network"])
def test_bfloat16_stays_close_to_float32(blocks, bound):
    """`bound` is of the root mean square error relative to that of the float32 result."""
    config = VideoDiTConfig(num_blocks=blocks, hidden_block=min(20, blocks))
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: VideoDiT(config, 16, nnx.Rngs(0), CompatConfig.published())))
    params = random_params(nnx.to_pure_dict(shapes))
    if blocks == CONFIG.num_blocks:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_956_413_440
    random = np.random.default_rng(1)
    latents = random.standard_normal((1, 1, FRAMES, ROWS, COLUMNS, 16)).astype(np.float32)
    text = random.standard_normal((1, TEXT_ROWS, 1024)).astype(np.float32)
    times, mask = np.float32([[1e-4, 0.9]]), np.float32([[1, 0]])

    params = jax.block_until_ready(jax.device_put(params))

    def run(what, dtype):  # float32 inputs widen the weights where they are used
        def call(params, inputs):
            model = nnx.merge(graphdef, nnx.State(params))
            return model.hidden(inputs, stop=config.hidden_block) if what == "hidden" else model(inputs)

        return np.float32(jax.jit(call)(params, VideoInputs(latents.astype(dtype), times, text.astype(dtype), mask)))

    for what in ("hidden", "velocity"):  # one at a time: each of these copies weights
        reference, result = run(what, jnp.float32), run(what, jnp.bfloat16)
        assert np.isfinite(result).all() and 0.1 < reference.std() < 100
        error = np.sqrt(np.mean((result - reference) ** 2)) / reference.std()
        print(f"{blocks} blocks, {what}: relative error {error:.4f}")
        assert 0 < error < bound
