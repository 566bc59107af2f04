"""The VAE against Hugging Face's diffusers with random weights, and the rules of streaming on their own."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from mimic_video.config import CompatConfig, TokenizerConfig
from mimic_video.models import wan_vae
from mimic_video.models.wan_vae import Stream, WanVAE, latent_statistics, over_chunks
from mimic_video.weights.published import export_params, import_params, published_shapes
from mimic_video.weights.wan_names import DIFFUSERS_VAE_NAMES, WAN_VAE_NAMES

WIDTH = 4


@functools.cache
def split(chunk=1, compat=CompatConfig(), width=WIDTH):
    """Structure and shapes of the parameters."""
    config = TokenizerConfig(kind="wan", width=width, chunk_latents=chunk)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0), compat)))
    return graphdef, nnx.to_pure_dict(state)


@functools.cache
def coder(direction, chunk, compat=CompatConfig()):
    graphdef, _ = split(chunk, compat)
    return jax.jit(lambda params, x: getattr(nnx.merge(graphdef, nnx.State(params)), direction)(x))


@pytest.fixture(scope="module")
def params():
    """Kernels as PyTorch draws them, scales and biases that matter, an output that diffusers' clamp to [−1, 1] leaves alone."""
    random = np.random.default_rng(2)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        deviation = 0.1 if name.endswith("bias") else (3 * math.prod(leaf.shape[:-1])) ** -0.5
        gain = np.float32(0.3 if name == "decoder/conv_out/kernel" else 1)
        return gain * random.normal(0, deviation, leaf.shape).astype(np.float32)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(fill, split()[1]))


@pytest.fixture(scope="module")
def theirs(params):
    """diffusers' network."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(1)
    model = AutoencoderKLWan(base_dim=WIDTH).eval().requires_grad_(False)
    model.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in export_params(params, DIFFUSERS_VAE_NAMES)})
    return model


def videos(frames, height=16, width=24):
    """Smooth motion and some noise, in [−1, 1]."""
    t, i, j, c = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (frames, height, width, 3)), indexing="ij")
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 64, height, width, 3)).astype(np.float32)[:, :frames]
    return 0.6 * np.sin(0.4 * t + 0.3 * i - 0.2 * j + c) + 0.4 * noise


def latents(frames, height=2, width=3):
    return np.random.default_rng(1).standard_normal((2, 64, height, width, 16)).astype(np.float32)[:, :frames]


def to_torch(x):
    import torch

    return torch.tensor(np.moveaxis(np.asarray(x, np.float32), -1, 1))


def from_torch(x):
    return np.moveaxis(x.float().numpy(), 1, -1)


# frames, chunk_latents, pixels: the first frame alone; a scan of one chunk, of two; a scan and a remainder
CASES = [(1, 1, (16, 24)), (5, 1, (16, 24)), (9, 1, (16, 24)), (17, 3, (24, 8))]


@pytest.mark.reference
@pytest.mark.parametrize(("frames", "chunk", "size"), CASES)
def test_encode_as_diffusers(theirs, params, frames, chunk, size):
    video = videos(frames, *size)
    mean, inverse_std = latent_statistics(bfloat16=False)
    expected = (from_torch(theirs.encode(to_torch(video)).latent_dist.mean) - mean) * inverse_std
    assert expected.std() > 0.1
    np.testing.assert_allclose(coder("encode", chunk)(params, video), expected, rtol=0, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(("frames", "chunk", "size"), CASES)
def test_decode_as_diffusers(theirs, params, frames, chunk, size):
    z = latents(1 + (frames - 1) // 4, size[0] // 8, size[1] // 8)
    mean, inverse_std = latent_statistics(bfloat16=False)
    expected = from_torch(theirs.decode(to_torch(z / inverse_std + mean)).sample)
    assert np.abs(expected).max() < 1 and expected.std() > 0.05
    np.testing.assert_allclose(coder("decode", chunk)(params, z), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [0, 1])
def test_a_prefix_of_the_frames_gives_the_prefix_of_the_latents(params, groups):
    whole = coder("encode", 1)(params, videos(9))
    np.testing.assert_array_equal(coder("encode", 1)(params, videos(1 + 4 * groups)), whole[:, : 1 + groups])


@pytest.mark.parametrize("groups", [0, 1])
def test_a_prefix_of_the_latents_gives_the_prefix_of_the_frames(params, groups):
    whole = coder("decode", 1)(params, latents(3))
    np.testing.assert_array_equal(coder("decode", 1)(params, latents(1 + groups)), whole[:, : 1 + 4 * groups])


# Layers on their own, as rules over a whole clip (SPEC 1.2).


def layer_and_clip(make, frames, channels):
    layer = make(nnx.Rngs(0))
    random = np.random.default_rng(2)
    for _, parameter in nnx.iter_graph(layer):
        if isinstance(parameter, nnx.Param) and parameter.ndim == 1:
            parameter[...] = jnp.asarray(random.standard_normal(parameter.shape), jnp.float32)
    return layer, random.standard_normal((2, frames, 4, 6, channels)).astype(np.float32)


def streamed(layer, x, size):
    return jax.jit(lambda x: over_chunks(layer, x, size))(x)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_causal_convolution(size):
    layer, x = layer_and_clip(lambda rngs: wan_vae.CausalConv(3, 5, rngs), 8, 3)
    expected = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (1, 1, 1), ((2, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(streamed(layer, x, size), expected + layer.bias[...], atol=1e-5)


@pytest.mark.parametrize("size", [2, 6])
def test_halving_time(size):
    layer, x = layer_and_clip(lambda rngs: wan_vae.Downsample(4, rngs, time=True), 9, 4)
    x_half = np.asarray(layer.conv(x, stride=2, padding=(0, 1)))
    kernel, bias = np.asarray(layer.time_conv.kernel), np.asarray(layer.time_conv.bias)
    expected = [x_half[:, 0]]
    for j in range(1, 5):
        expected.append(sum(x_half[:, 2 * j - 2 + i] @ kernel[i] for i in range(3)) + bias)
    np.testing.assert_allclose(streamed(layer, x, size), np.stack(expected, 1), atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_doubling_time(size):
    layer, x = layer_and_clip(lambda rngs: wan_vae.Upsample(4, rngs, time=True), 5, 4)
    kernel, bias = np.asarray(layer.time_conv.kernel), np.asarray(layer.time_conv.bias)
    rest = np.concatenate([np.zeros_like(x[:, :2]), x[:, 1:]], 1)  # the first frame is not among them
    expected = [x[:, 0]]
    for j in range(4):
        pair = sum(rest[:, j + i] @ kernel[i] for i in range(3)) + bias
        expected += [pair[..., :4], pair[..., 4:]]
    expected = layer.conv(jnp.asarray(np.stack(expected, 1).repeat(2, axis=2).repeat(2, axis=3)))
    np.testing.assert_allclose(streamed(layer, x, size), expected, atol=1e-5)


def test_channel_norm():
    norm, x = layer_and_clip(lambda rngs: wan_vae.ChannelNorm(6), 2, 6)
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True) * 6**0.5 * np.asarray(norm.scale)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-5)
    np.testing.assert_array_equal(norm(jnp.zeros((1, 6))), 0)
    tiny = jnp.full((1, 6), 1e-14)  # of norm below 1e-12, by which it is divided instead
    np.testing.assert_allclose(norm(tiny), 1e-2 * 6**0.5 * norm.scale[...][None], rtol=1e-4)


def test_a_stream_keeps_the_last_frames():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1, 1)
    first = Stream()
    assert first.first and first.extend(x[:, :1], 2).ravel().tolist() == [1]
    assert first.kept[0].ravel().tolist() == [0, 1]
    second = Stream(first.kept)
    assert not second.first and second.extend(x[:, 1:2], 2).ravel().tolist() == [0, 1, 2]
    third = Stream(second.kept)
    assert third.extend(x[:, 2:], 2).ravel().tolist() == [1, 2, 3, 4]
    assert third.kept[0].ravel().tolist() == [3, 4]


# Size, precision, statistics.


def test_published_size():
    _, shapes = split(width=96)
    count = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert count == {"encoder": 53_595_872, "decoder": 73_295_331, "quant_conv": 1056, "post_quant_conv": 272}
    assert sum(count.values()) == 126_892_531
    assert len(jax.tree.leaves(shapes)) == 194


def largest_array(jaxpr):
    """Elements of the largest intermediate array, loops included."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    return max(sizes + [largest_array(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params)])


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_does_not_grow_with_the_clip(direction):
    graphdef, shapes = split(width=96)

    def largest(groups):
        clip = (1, 1 + 4 * groups, 480, 640, 3) if direction == "encode" else (1, 1 + groups, 60, 80, 16)
        apply = lambda params, x: getattr(nnx.merge(graphdef, nnx.State(params)), direction)(x)  # noqa: E731
        return largest_array(jax.make_jaxpr(apply)(shapes, jax.ShapeDtypeStruct(clip, jnp.float32)).jaxpr)

    assert largest(15) == largest(1)


@pytest.mark.parametrize(("direction", "clip"), [("encode", videos(5)), ("decode", latents(2))])
def test_bfloat16_is_close(params, direction, clip):
    exact = np.asarray(coder(direction, 1)(params, clip))
    rounded = coder(direction, 1)(*jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), (params, clip)))
    assert rounded.dtype == jnp.bfloat16
    error = np.asarray(rounded, np.float32) - exact
    assert 1e-4 < np.sqrt(np.mean(error**2)) / exact.std() < 0.02


# The published values (SPEC 1.3), which bfloat16 holds exactly.
# fmt: off
MEAN_BFLOAT16 = [-0.7578125, -0.70703125, -0.91015625, 0.107421875, -0.1748046875, 0.96484375, -0.1513671875, 1.5546875,
                 0.4140625, -0.0712890625, 0.55078125, -0.36328125, -0.1923828125, -0.94921875, 0.25, -0.29296875]
INVERSE_STD_BFLOAT16 = [0.35546875, 0.6875, 0.4296875, 0.376953125, 0.8203125, 0.5625, 0.3828125, 0.48046875,
                        0.306640625, 0.462890625, 0.349609375, 0.64453125, 0.609375, 0.890625, 0.353515625, 0.5234375]
# fmt: on


@pytest.mark.reference
def test_latent_statistics_are_those_of_diffusers(theirs):
    mean, inverse_std = latent_statistics(bfloat16=False)
    np.testing.assert_array_equal(mean, np.float32(theirs.config.latents_mean))
    np.testing.assert_allclose(inverse_std, 1 / np.float64(theirs.config.latents_std), rtol=1e-6)


def test_latent_statistics():
    mean, inverse_std = latent_statistics(bfloat16=False)
    rounded = latent_statistics(bfloat16=True)
    np.testing.assert_array_equal(rounded[0], np.float32(MEAN_BFLOAT16))
    np.testing.assert_array_equal(rounded[1], np.float32(INVERSE_STD_BFLOAT16))
    np.testing.assert_allclose(rounded[0], mean, rtol=2**-8)
    np.testing.assert_allclose(rounded[1], inverse_std, rtol=2**-7)


def test_published_rounding_of_the_statistics(params):
    published = CompatConfig(bfloat16_latent_statistics=True)
    mean, inverse_std = latent_statistics(bfloat16=False)
    video, z = videos(1), latents(1)
    raw = np.asarray(coder("encode", 1)(params, video)) / inverse_std + mean
    expected = (raw - np.float32(MEAN_BFLOAT16)) * np.float32(INVERSE_STD_BFLOAT16)
    np.testing.assert_allclose(coder("encode", 1, published)(params, video), expected, atol=1e-6)
    same = (z / np.float32(INVERSE_STD_BFLOAT16) + np.float32(MEAN_BFLOAT16) - mean) * inverse_std
    np.testing.assert_allclose(coder("decode", 1, published)(params, z), coder("decode", 1)(params, same), atol=1e-5)


# Names.


def test_published_names():
    shapes = published_shapes(WAN_VAE_NAMES, split(width=96)[1])
    convolutions = {
        "encoder.conv1": (96, 3, 3, 3, 3),
        "encoder.downsamples.3.residual.2": (192, 96, 3, 3, 3),
        "encoder.downsamples.6.shortcut": (384, 192, 1, 1, 1),
        "encoder.downsamples.2.resample.1": (96, 96, 3, 3),
        "encoder.downsamples.5.time_conv": (192, 192, 3, 1, 1),
        "encoder.middle.1.to_qkv": (1152, 384, 1, 1),
        "encoder.head.2": (32, 384, 3, 3, 3),
        "conv1": (32, 32, 1, 1, 1),
        "conv2": (16, 16, 1, 1, 1),
        "decoder.upsamples.3.time_conv": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.shortcut": (384, 192, 1, 1, 1),
        "decoder.upsamples.11.resample.1": (96, 192, 3, 3),
        "decoder.head.2": (3, 96, 3, 3, 3),
    }
    for name, shape in convolutions.items():
        assert shapes[f"{name}.weight"].shape == shape and shapes[f"{name}.bias"].shape == shape[:1], name
    gammas = {
        "encoder.downsamples.0.residual.0": (96, 1, 1, 1),
        "decoder.middle.1.norm": (384, 1, 1),
        "decoder.upsamples.14.residual.3": (96, 1, 1, 1),
        "decoder.head.0": (96, 1, 1, 1),
    }
    for name, shape in gammas.items():
        assert shapes[f"{name}.gamma"].shape == shape, name
    assert len(shapes) == 194


@pytest.mark.reference
def test_diffusers_names():
    import torch
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs = AutoencoderKLWan().state_dict()
    ours = published_shapes(DIFFUSERS_VAE_NAMES, split(width=96)[1])
    assert {name: tuple(value.shape) for name, value in theirs.items()} == {name: value.shape for name, value in ours.items()}


@pytest.mark.reference
def test_both_names_of_a_parameter_are_the_same_to_diffusers():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    theirs = convert_wan_vae_to_diffusers({name: name for name in WAN_VAE_NAMES})  # diffusers' name → published name
    assert {name: WAN_VAE_NAMES[published] for name, published in theirs.items()} == DIFFUSERS_VAE_NAMES


def test_weights_survive_the_way_out_and_back(params):
    tensors = dict(export_params(params, WAN_VAE_NAMES))
    chex.assert_trees_all_equal(import_params(tensors, WAN_VAE_NAMES, split()[1]), params)


# Errors.


@pytest.mark.parametrize(
    ("direction", "shape", "message"),
    [
        ("encode", (1, 4, 16, 16, 3), "4 frames; expected 1 . a multiple of 4"),
        ("encode", (1, 0, 16, 16, 3), "0 frames"),
        ("encode", (1, 5, 16, 20, 3), "16x20 pixels; expected multiples of 8"),
        ("encode", (1, 5, 0, 16, 3), "0x16 pixels"),
        ("encode", (1, 5, 16, 16, 4), r"shape \(1, 5, 16, 16, 4\); expected \(batch, frames, height, width, 3\)"),
        ("encode", (5, 16, 16, 3), "expected .batch, frames"),
        ("decode", (1, 2, 4, 4, 8), "expected .batch, frames, height, width, 16"),
        ("decode", (1, 0, 4, 4, 16), "shape .1, 0, 4, 4, 16"),
    ],
)
def test_wrong_shapes(direction, shape, message):
    graphdef, shapes = split()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params, x: getattr(nnx.merge(graphdef, nnx.State(params)), direction)(x),
            shapes,
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
