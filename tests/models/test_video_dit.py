import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimic_video.config import VideoDiTConfig
from mimic_video.models.protocols import VideoInputs
from mimic_video.models.rope import rope_angles, rotate
from mimic_video.models.video_dit import VideoDiT, time_features

CONFIG = VideoDiTConfig(width=16, num_blocks=3, num_heads=2, mlp_ratio=2.0, text_width=6, adaln_lora_dim=4, hidden_block=2)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def graphdef():
    return nnx.split(nnx.eval_shape(lambda: VideoDiT(CONFIG, 3, nnx.Rngs(0))))[0]


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: nnx.split(VideoDiT(CONFIG, 3, nnx.Rngs(0)))[1])()


@pytest.fixture(scope="module")
def velocity(graphdef):
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(VideoInputs(*inputs)))


@pytest.fixture(scope="module")
def hidden(graphdef):
    def call(state, *inputs, stop):
        return nnx.merge(graphdef, state).hidden(VideoInputs(*inputs), stop=stop)

    return jax.jit(call, static_argnames="stop")


def inputs(batch=2):
    """Latents, times, text and condition mask of two latent frames of 4x6."""
    times = jnp.asarray(np.random.default_rng(5).uniform(0, 1, (batch, 2)), jnp.float32)
    return [random(batch, 1, 2, 4, 6, 3), times, random(batch, 5, 6, seed=1), jnp.tile(jnp.asarray([1.0, 0.0]), (batch, 1))]


def test_published_size():
    _, state = nnx.split(nnx.eval_shape(lambda: VideoDiT(VideoDiTConfig(), 16, nnx.Rngs(0))))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert sum(math.prod(leaf.shape) for _, leaf in leaves) == 1_956_413_440
    stacked = [leaf for path, leaf in leaves if "blocks" in jax.tree_util.keystr(path)]
    assert len(leaves) - len(stacked) + 28 * len(stacked) == 567  # tensors
    assert sum(math.prod(leaf.shape[1:]) for leaf in stacked) == 69_206_528  # parameters of a block


def test_time_features():
    times = np.float32([[0.0, 1e-4, 0.5], [0.9, 0.987654, 1.0]])
    angles = times.astype(np.float64)[..., None] * 10000.0 ** (-np.arange(64) / 64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(time_features(jnp.asarray(times), 128), expected, atol=1e-6)


def test_patches_enter_channel_slowest(state, hidden):  # SPEC 3.3: index ((c·1 + r)·2 + m)·2 + n
    latents, times, text, mask = inputs(1)
    padding = random(1, 1, 4, 6, seed=7)
    embedded = hidden(state, latents, times, text, mask, padding, stop=0)
    assert embedded.shape == (1, 2, 6, 16)
    planes = np.concatenate(
        [
            latents[0, 0],
            np.broadcast_to(mask[0][:, None, None, None], (2, 4, 6, 1)),
            np.broadcast_to(padding[0, 0][None, :, :, None], (2, 4, 6, 1)),
        ],
        axis=-1,
    )
    kernel = np.asarray(state["patch_proj"]["kernel"][...])
    for frame, row, column in ((0, 0, 0), (0, 1, 0), (1, 0, 2), (1, 1, 1)):
        features = [planes[frame, 2 * row + m, 2 * column + n, c] for c in range(5) for m in range(2) for n in range(2)]
        np.testing.assert_allclose(embedded[0, frame, 3 * row + column], np.array(features) @ kernel, atol=1e-5)


def test_patches_leave_channel_fastest(graphdef, state):  # SPEC 3.7: index (p1·2 + p2)·16 + c
    model = nnx.merge(graphdef, state)
    tokens = np.arange(1 * 2 * 6 * 12, dtype=np.float32).reshape(1, 2, 6, 12)
    latents = np.asarray(model._unpatchify(jnp.asarray(tokens), (1, 1, 2, 4, 6, 3)))
    for frame, y, x, c in ((0, 0, 0, 0), (0, 0, 1, 2), (1, 3, 4, 1), (1, 2, 5, 0)):
        assert latents[0, 0, frame, y, x, c] == tokens[0, frame, 3 * (y // 2) + x // 2, (2 * (y % 2) + x % 2) * 3 + c]


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_an_early_exit_does_not_read_later_blocks(state, hidden, stop):
    def poisoned(first):
        """The parameters with NaN from block `first` on, and in the last layers."""

        def poison(path, leaf):
            name = jax.tree_util.keystr(path)
            if "blocks" in name:
                return leaf.at[first:].set(jnp.nan)
            return leaf * jnp.nan if "final" in name else leaf

        return jax.tree_util.tree_map_with_path(poison, state)

    result = hidden(poisoned(stop), *inputs(), stop=stop)
    np.testing.assert_array_equal(result, hidden(state, *inputs(), stop=stop))
    assert np.isfinite(result).all()
    if stop:
        assert np.isnan(hidden(poisoned(stop - 1), *inputs(), stop=stop)).all()


def test_an_early_exit_is_the_full_pass_bit_for_bit(graphdef, state, hidden):
    """Of a pass that goes on to the velocity and keeps the residual stream after every block on its way."""

    @jax.jit
    def full(state, *inputs):
        model, seen = nnx.merge(graphdef, state), VideoInputs(*inputs)
        time, shared = model._time_embedding(seen)
        x = model._patchify(seen)
        blocks, block_state = nnx.split(model.blocks)
        angles = rope_angles((2, 2, 3), 8, CONFIG.rope_ratio).reshape(2, 6, 4)

        def body(x, block):
            y = nnx.merge(blocks, block)(x, time, shared, seen.text, lambda heads: rotate(heads, angles))
            return y, y

        last, states = jax.lax.scan(body, x, block_state)
        return jnp.concatenate([x[None], states]), last

    states, last = full(state, *inputs())
    np.testing.assert_array_equal(states[-1], last)
    for stop in range(4):
        np.testing.assert_array_equal(hidden(state, *inputs(), stop=stop), states[stop])


def test_every_input_matters_from_the_start_and_only_to_its_own_sample(state, velocity):
    reference = velocity(state, *inputs())
    assert reference.shape == (2, 1, 2, 4, 6, 3)
    for position in range(4):
        changed = inputs()
        changed[position] = changed[position].at[0].multiply(jnp.abs(random(*changed[position].shape[1:], seed=8)))
        difference = np.abs(velocity(state, *changed) - reference)
        assert difference[0].max() > 1e-5
        np.testing.assert_allclose(difference[1], 0, atol=1e-6)


def test_no_padding_mask_is_a_padding_mask_of_zeros(state, velocity):
    np.testing.assert_allclose(velocity(state, *inputs(), jnp.zeros((2, 1, 4, 6))), velocity(state, *inputs()), atol=1e-6)
    assert np.abs(velocity(state, *inputs(), jnp.ones((2, 1, 4, 6))) - velocity(state, *inputs())).max() > 1e-3


def test_the_velocity_is_the_final_projection_of_the_last_hidden_state(graphdef, state, hidden, velocity):
    latents, times, text, mask = inputs()
    model = nnx.merge(graphdef, state)
    last = np.asarray(hidden(state, latents, times, text, mask, stop=3), np.float64)
    _, shared = model._time_embedding(
        VideoInputs(latents, times, text, mask)
    )  # modulations start at zero: only the shared term is left
    shift, scale = np.asarray(shared)[:, :, None, :16], np.asarray(shared)[:, :, None, 16:32]
    normalised = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    projected = (normalised * (1 + scale) + shift) @ np.asarray(model.final_proj.kernel[...])
    expected = model._unpatchify(jnp.asarray(projected, jnp.float32), latents.shape)
    np.testing.assert_allclose(velocity(state, latents, times, text, mask), expected, atol=1e-5)


def test_latents_that_cannot_be_cut_into_patches(graphdef, state):
    _, times, text, mask = inputs()
    with pytest.raises(ValueError, match="latents are 1 views of 4x5; expected 1, to be cut into patches of 2x2"):
        jax.eval_shape(lambda: nnx.merge(graphdef, state)(VideoInputs(random(2, 1, 2, 4, 5, 3), times, text, mask)))


def test_another_number_of_blocks_only_changes_the_leading_axis():
    def shapes(depth):
        config = dataclasses.replace(CONFIG, num_blocks=depth)
        leaves = jax.tree_util.tree_leaves_with_path(nnx.split(nnx.eval_shape(lambda: VideoDiT(config, 3, nnx.Rngs(0))))[1])
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    three, seven = shapes(3), shapes(7)
    assert three.keys() == seven.keys()
    for name, shape in three.items():
        assert seven[name] == ((7, *shape[1:]) if "blocks" in name else shape)


# Several views.


@pytest.fixture(scope="module")
def both():
    """A model of two views with the parameters of the single-view one, as a function of its view embedding."""
    graphdef = nnx.split(nnx.eval_shape(lambda: VideoDiT(CONFIG, 3, nnx.Rngs(0), views=2)))[0]

    def run(state, embedding, *inputs, view_mask=None):
        state = nnx.State(nnx.to_pure_dict(state) | {"view_embedding": embedding})
        return nnx.merge(graphdef, state).hidden(VideoInputs(*inputs, view_mask=view_mask), stop=2)

    return jax.jit(run)


def test_a_view_without_the_other_is_the_single_view_model(both, hidden, state):
    first, second = random(2, 1, 3, 4, 6, 3), random(2, 1, 3, 4, 6, 3, seed=1)
    rest = (jnp.full((2, 3), 0.5), random(2, 5, 6, seed=2), jnp.zeros((2, 3)))
    stacked, zeros = jnp.concatenate([first, second], axis=1), jnp.zeros((2, 16))
    for view, latents in enumerate((first, second)):
        alone = hidden(state, latents, *rest, stop=2)
        found = both(state, zeros, stacked, *rest, view_mask=jnp.arange(2)[None] == jnp.full((2, 1), view))
        np.testing.assert_allclose(found[:, :, 6 * view : 6 * (view + 1)], alone, atol=1e-5)
    together = both(state, zeros, stacked, *rest)
    assert np.abs(together[:, :, :6] - hidden(state, first, *rest, stop=2)).max() > 1e-3
    np.testing.assert_allclose(both(state, zeros, stacked, *rest, view_mask=jnp.ones((2, 2), bool)), together, atol=1e-6)


def test_views_differ_by_their_embedding_alone(both, state):
    first, second = random(1, 1, 3, 4, 6, 3), random(1, 1, 3, 4, 6, 3, seed=1)
    rest, embedding = (jnp.full((1, 3), 0.5), random(1, 5, 6, seed=2), jnp.zeros((1, 3))), random(2, 16, seed=3)
    found = both(state, embedding, jnp.concatenate([first, second], axis=1), *rest)
    swapped = both(state, embedding[::-1], jnp.concatenate([second, first], axis=1), *rest)
    np.testing.assert_allclose(swapped, jnp.concatenate([found[:, :, 6:], found[:, :, :6]], axis=2), atol=1e-5)
    same = both(state, jnp.zeros((2, 16)), jnp.concatenate([first, second], axis=1), *rest)
    assert np.abs(same - found).max() > 1e-2


def test_latents_have_to_be_of_all_views(both, state):
    with pytest.raises(ValueError, match="latents are 3 views of 6x6; expected 2"):
        both(state, jnp.zeros((2, 16)), random(1, 3, 3, 6, 6, 3), jnp.zeros((1, 3)), random(1, 5, 6), jnp.zeros((1, 3)))
