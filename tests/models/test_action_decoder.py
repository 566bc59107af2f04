import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimic_video.config import ActionDecoderConfig
from mimic_video.models.action_decoder import ActionConditioning, ActionDecoder, Embedder, embedder_widths, fourier_features

CONFIG = ActionDecoderConfig(
    width=16,
    num_blocks=3,
    num_heads=2,
    mlp_ratio=2.0,
    adaln_lora_dim=4,
    time_rank=8,
    proprio_dim=3,
    action_dim=2,
)
CONTEXT = 12


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def make(config=CONFIG, context_width=CONTEXT, action_horizon=5, obs_horizon=2):
    return ActionDecoder(config, context_width, action_horizon, nnx.Rngs(0), obs_horizon=obs_horizon)


def abstract(*arguments):
    return nnx.split(nnx.eval_shape(lambda: make(*arguments)))


@pytest.fixture(scope="module")
def decoder():
    """(graphdef, state) of a small decoder."""
    return jax.jit(lambda: nnx.split(make())[1])(), abstract()[0]


@pytest.fixture(scope="module")
def run(decoder):
    state, graphdef = decoder

    @jax.jit
    def velocity(proprio, actions, time, video_time, hidden, drop=None):
        model = nnx.merge(graphdef, state)
        return model(actions, time, ActionConditioning(model.encode_context(hidden), video_time, proprio), drop)

    return velocity


def inputs(batch=2):
    return [
        random(batch, 2, 3),
        random(batch, 5, 2, seed=1),
        jnp.linspace(0.2, 0.9, batch),
        jnp.linspace(0.5, 0.99, batch),
        random(batch, 7, CONTEXT, seed=2),
    ]


@pytest.mark.parametrize(("horizon", "parameters"), [(15, 498_990_730), (60, 499_036_810)])
def test_published_sizes(horizon, parameters):
    _, state = abstract(ActionDecoderConfig(), 2048, horizon, 1)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert sum(math.prod(leaf.shape) for _, leaf in leaves) == parameters
    stacked = [leaf for path, leaf in leaves if "blocks" in jax.tree_util.keystr(path)]
    assert len(leaves) - len(stacked) + 24 * len(stacked) == 509  # tensors
    assert sum(math.prod(leaf.shape[1:]) for leaf in stacked) == 20_447_744  # parameters of a block


@pytest.mark.parametrize(
    ("inputs", "outputs", "widths"),
    [
        (10, 1024, [10, 47, 220, 1024]),
        (4, 64, [4, 16, 64]),
        (16, 64, [16, 64]),
        (64, 64, [64, 64]),
        (64, 16, [64, 16]),
    ],
)
def test_embedder_widths(inputs, outputs, widths):
    assert embedder_widths(inputs, outputs) == widths


def test_embedder():
    embedder = jax.jit(lambda: nnx.split(Embedder(4, 64, nnx.Rngs(0)))[1])()
    embedder = nnx.merge(nnx.split(nnx.eval_shape(lambda: Embedder(4, 64, nnx.Rngs(0))))[0], embedder)
    first, second = (np.asarray(layer.kernel[...]) for layer in embedder.layers)
    assert 0.9 < np.abs(first).max() / math.sqrt(6 / 4) <= 1 and 0.9 < np.abs(second).max() / math.sqrt(3 / 16) <= 1  # SPEC 6.4
    embedder.layers[0].bias[...] = random(16, seed=3)
    x = np.asarray(random(2, 3, 4))
    hidden = np.float64(x) @ first + np.asarray(random(16, seed=3))
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(hidden)
    np.testing.assert_allclose(embedder(x), gelu @ second / 8, atol=1e-6)


@pytest.mark.parametrize("width", [96, 1024])
@pytest.mark.parametrize("compiled", [False, True])
def test_time_features_are_as_exact_as_in_float64(width, compiled):
    times = np.concatenate(
        [
            np.linspace(0, 1, 1001),
            1 - np.geomspace(1e-7, 1e-2, 200),
            np.geomspace(1e-7, 1e-2, 200),
            np.random.default_rng(0).uniform(0.001, 1, 1000),
            [1e-3, 80 / 81, np.nextafter(np.float32(1), np.float32(0))],
        ]
    ).astype(np.float32)
    periods = 0.004 * 1000.0 ** (np.arange(width // 2) / (width // 2 - 1))
    angles = 2 * np.pi * times.astype(np.float64)[:, None] / periods
    function = jax.jit(fourier_features, static_argnums=1) if compiled else fourier_features
    features = function(jnp.asarray(times), width)
    np.testing.assert_allclose(features, np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=1e-5)


def test_the_context_is_that_of_each_blocks_cross_attention(decoder):
    state, graphdef = decoder
    hidden = 3 * random(2, 7, CONTEXT) + 1

    @jax.jit
    def both(hidden):
        model = nnx.merge(graphdef, state)
        blocks, block_state = nnx.split(model.blocks)

        def block(index):
            return nnx.merge(blocks, jax.tree.map(lambda leaf: leaf[index], block_state))

        context = model.context_norm(hidden)
        return model.encode_context(hidden), [block(i).cross_attn.keys_values(context) for i in range(CONFIG.num_blocks)]

    (keys, values, _), again = both(hidden)
    assert keys.shape == (3, 2, 7, 2, 8)
    for i, (key, value) in enumerate(again):
        np.testing.assert_allclose(keys[i], key, atol=1e-6)
        np.testing.assert_allclose(values[i], value, atol=1e-6)
    assert np.abs(keys[0] - keys[1]).max() > 0.1


def test_a_context_serves_every_action_time(decoder, run):
    state, graphdef = decoder
    proprio, actions, _, video_time, hidden = inputs()
    context = jax.jit(lambda: nnx.merge(graphdef, state).encode_context(hidden))()
    reuse = jax.jit(lambda time: nnx.merge(graphdef, state)(actions, time, ActionConditioning(context, video_time, proprio)))
    for time in (1.0, 0.1):
        time = jnp.full(2, time)
        np.testing.assert_allclose(reuse(time), run(proprio, actions, time, video_time, hidden), atol=1e-6)


def test_every_input_matters_from_the_start(run):  # SPEC 6.4: gates are not zero at initialisation
    reference = run(*inputs())
    assert reference.shape == (2, 5, 2)
    for position in range(5):
        changed = inputs()
        changed[position] = changed[position].at[0].multiply(jnp.abs(random(*changed[position].shape[1:], seed=8)))
        difference = np.abs(run(*changed) - reference)
        assert difference[0].min() > 1e-6  # all tokens
        np.testing.assert_allclose(difference[1], 0, atol=1e-6)  # no other sample


def test_dropped_proprioception_has_no_influence(run):
    one, two = inputs(), inputs()
    two[0] = random(2, 2, 3, seed=9)
    drop = jnp.asarray([True, False])
    difference = np.abs(run(*one, drop) - run(*two, drop))
    np.testing.assert_array_equal(difference[0], 0)
    assert difference[1].max() > 1e-4
    np.testing.assert_allclose(run(*one, jnp.asarray([False, False])), run(*one), atol=1e-6)
    assert np.abs(run(*one, drop) - run(*one))[0].max() > 1e-4


def test_tokens_include_the_proprioceptions(decoder):
    state, graphdef = decoder
    proprio, actions, time, video_time, hidden = inputs()

    @jax.jit
    def both():
        model = nnx.merge(graphdef, state)
        conditioning = ActionConditioning(model.encode_context(hidden), video_time, proprio)
        return model.tokens(actions, time, conditioning), model(actions, time, conditioning)

    tokens, velocity = both()
    assert tokens.shape == (2, 7, 2)
    np.testing.assert_array_equal(tokens[:, 2:], velocity)


@pytest.mark.parametrize(("observed", "acted"), [(1, 5), (2, 4), (3, 4)])
def test_another_number_of_tokens(decoder, observed, acted):
    state, graphdef = decoder
    _, _, time, video_time, hidden = inputs()

    def call():
        model = nnx.merge(graphdef, state)
        conditioning = ActionConditioning(model.encode_context(hidden), video_time, random(2, observed, 3))
        return model(random(2, acted, 2), time, conditioning)

    with pytest.raises(ValueError, match=f"{observed} proprioception and {acted} action tokens; .* built for 2 and 5"):
        jax.eval_shape(call)


def test_initial_values(decoder):  # SPEC 6.4
    model = nnx.merge(decoder[1], decoder[0])
    time = model.time_embedding
    for layer in (time.action_proj, time.video_proj):
        np.testing.assert_array_equal(layer.bias[...], 0)
    for layer in (time.action_rank, time.video_rank):
        np.testing.assert_allclose(layer.bias[...], 0.382050174, rtol=1e-6)
    for token in (model.position_embedding, model.proprio_mask_token):
        assert 0.3 < np.abs(np.asarray(token[...])).max() <= 0.75  # 3 standard deviations of 1/√16
    np.testing.assert_array_equal(model.context_norm.scale[...], 1)
    np.testing.assert_array_equal(model.context_norm.bias[...], 0)
    np.testing.assert_array_equal(model.blocks.mlp_modulation.up.kernel[...], 0)
