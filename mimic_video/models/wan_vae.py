"""The Wan 2.1 VAE: video ↔ latents of 16 channels, 8x8 smaller in space and 4x smaller in time (SPEC 1).

Every convolution over time is causal, so a clip is coded as a stream: the first frame alone, then chunks of equal length in
one scan whose carry holds the few frames that each layer remembers. Memory is that of one chunk, and the length of a chunk
changes nothing else. At the published width, 480x640 pixels and one latent frame to a chunk, that is about 6 GiB beside
weights and clip in float32 and 4 GiB in bfloat16, for 61 frames or any number.
"""

import math
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mimic_video.config import CompatConfig, ExperimentConfig, TokenizerConfig
from mimic_video.models.attention import attention
from mimic_video.models.layers import linear, silu, truncated_normal

CHANNELS, PATCH, GROUP = 16, 8, 4  # of a latent; pixels along each side of a latent pixel; frames to a latent frame
MULTIPLES = (1, 2, 4, 4)  # width of each stage, in widths of the first
TIME_RESAMPLED = (False, True, True)  # whether the change from one stage of the encoder to the next halves time too

LATENT_MEAN = np.array([-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921], np.float32)  # fmt: skip
LATENT_STD = np.array([2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160], np.float32)  # fmt: skip

NO_ROUNDING = CompatConfig()

Frames = Float[Array, "b t h w c"]
Memory = list[Float[Array, "b _ _ _ _"]]  # a few frames of every layer that remembers any


def latent_statistics(*, bfloat16: bool) -> tuple[Float[np.ndarray, "16"], Float[np.ndarray, "16"]]:
    """(μ, 1/s) of each latent channel in float32: normalised latents are (z − μ) · (1/s) (SPEC 1.3).

    With `bfloat16` they have the values that bfloat16 arithmetic gives: s is rounded, and 1/s again.
    """
    if not bfloat16:
        return LATENT_MEAN, 1 / LATENT_STD
    mean, std = LATENT_MEAN.astype(jnp.bfloat16), LATENT_STD.astype(jnp.bfloat16)
    return mean.astype(np.float32), (1 / std.astype(np.float32)).astype(jnp.bfloat16).astype(np.float32)


class Stream:
    """What layers remember from one chunk of a clip to the next, listed in the order in which they run.

    Without a past, the chunk is the first frame of the clip, which layers that resample time treat apart (SPEC 1.2).
    """

    def __init__(self, past: Memory | None = None):
        self.first = past is None
        self.kept: Memory = []
        self._past = iter(past or ())

    def extend(self, x: Frames, count: int) -> Float[Array, "b n h w c"]:
        """`x` after the `count` frames before it, or alone if it is the first; its last `count` frames are kept.

        Before the first frame there are zeros.
        """
        frames = x if self.first else jnp.concatenate([next(self._past), x], axis=1)
        missing = max(count - frames.shape[1], 0)
        self.kept.append(jnp.pad(frames[:, -count:], [(0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)]))
        return frames


def over_chunks(step: Callable[[Frames, Stream], Array], x: Frames, size: int) -> Float[Array, "b n i j d"]:
    """Applies `step` to the first frame of `x`, then to chunks of `size` frames, then to what is left; joins the results."""

    def run(chunk: Frames, past: Memory | None) -> tuple[Memory, Float[Array, "b n i j d"]]:
        state = Stream(past)
        y = step(chunk, state)
        return state.kept, y

    past, first = run(x[:, :1], None)
    parts, rest = [first], x[:, 1:]
    count = rest.shape[1] // size
    if count:
        chunks = rest[:, : count * size].reshape(len(x), count, size, *x.shape[2:])
        past, coded = jax.lax.scan(lambda past, chunk: run(chunk, past), past, jnp.moveaxis(chunks, 1, 0))
        parts.append(jnp.moveaxis(coded, 0, 1).reshape(len(x), -1, *coded.shape[3:]))
    if rest.shape[1] % size:
        parts.append(run(rest[:, count * size :], past)[1])
    return jnp.concatenate(parts, axis=1)


def _conv(
    x: Frames, kernel: Float[Array, "3 3 c d"], stride: int = 1, padding: tuple[int, int] = (1, 1)
) -> Float[Array, "b t i j d"]:
    """The same 3x3 convolution of every frame; `padding` is before and after each spatial axis."""
    dtype = jnp.result_type(x, kernel)
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]).astype(dtype),
        kernel.astype(dtype),
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _over_time(x: Frames, kernel: Float[Array, "3 *window c d"], stride: int = 1) -> Float[Array, "b n h w d"]:
    """Outputs at every `stride`-th run of three frames, by one tap per frame: a dense layer or a 3x3 convolution.

    There is no padding, except that one frame alone has zeros before it. A sum of 2-D convolutions is 1.3 to 2.1x as fast
    as one 3-D convolution on CPU, at the widths of this network.
    """
    kernel = kernel[-x.shape[1] :]
    count = (x.shape[1] - len(kernel)) // stride + 1
    tap = _conv if kernel.ndim == 5 else jnp.matmul
    taps = [tap(x[:, i::stride][:, :count], kernel[i]) for i in range(len(kernel))]
    return sum(taps[1:], taps[0])


class Conv(nnx.Module):
    """Kernel (*window, inputs, outputs) and bias of a convolution."""

    def __init__(self, window: tuple[int, ...], inputs: int, outputs: int, rngs: nnx.Rngs):
        shape = (*window, inputs, outputs)
        init = truncated_normal(math.prod(shape[:-1]) ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))


class CausalConv(Conv):
    """3x3x3 convolution: each output sees its own frame and the two before."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        super().__init__((3, 3, 3), inputs, outputs, rngs)

    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "b t h w d"]:
        return _over_time(stream.extend(x, 2), self.kernel[...]) + self.bias[...]


class SpatialConv(Conv):
    """3x3 convolution of every frame."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        super().__init__((3, 3), inputs, outputs, rngs)

    def __call__(self, x: Frames, stride: int = 1, padding: tuple[int, int] = (1, 1)) -> Float[Array, "b t i j d"]:
        return _conv(x, self.kernel[...], stride, padding) + self.bias[...]


class TimeConv(Conv):
    """Convolution of every pixel over three frames, without padding."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        super().__init__((3,), inputs, outputs, rngs)

    def __call__(self, x: Frames, stride: int = 1) -> Float[Array, "b n h w d"]:
        return _over_time(x, self.kernel[...], stride) + self.bias[...]


class ChannelNorm(nnx.Module):
    """x / max(‖x‖, 1e-12) · √channels · scale, with the norm over channels."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24))
        return (y * (x.shape[-1] ** 0.5 * self.scale[...])).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two causal convolutions, each after a norm and SiLU, around a skip connection."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs, rngs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs, rngs)
        self.shortcut = linear(inputs, outputs, rngs, bias=0.0) if inputs != outputs else None

    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "b t h w d"]:
        y = self.conv1(silu(self.norm1(x)), stream)
        y = self.conv2(silu(self.norm2(y)), stream)
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Self-attention with one head over the pixels of each frame, around a skip connection."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = ChannelNorm(width)
        self.qkv = linear(width, 3 * width, rngs, bias=0.0)
        self.proj = linear(width, width, rngs, bias=0.0)

    def __call__(self, x: Frames, stream: Stream) -> Frames:
        b, t, h, w, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b * t, h * w, 3, 1, c)
        q, k, v = (qkv[:, :, i] for i in range(3))
        y = attention(q, k, v, backend="xla")  # a head this wide is beyond cudnn's flash attention
        return x + self.proj(y.reshape(x.shape))


class Downsample(nnx.Module):
    """Halves height and width, and with `time` also time: the first frame stays, then two frames become one (SPEC 1.2)."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, time: bool):
        self.conv = SpatialConv(width, width, rngs)
        self.time_conv = TimeConv(width, width, rngs) if time else None

    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "b n h//2 w//2 c"]:
        x = self.conv(x, stride=2, padding=(0, 1))
        if self.time_conv is None:
            return x
        frames = stream.extend(x, 1)
        return x if stream.first else self.time_conv(frames, stride=2)


class Upsample(nnx.Module):
    """Doubles height and width at half the channels, and with `time` also time: all but the first frame (SPEC 1.2)."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, time: bool):
        self.time_conv = TimeConv(width, 2 * width, rngs) if time else None
        self.conv = SpatialConv(width, width // 2, rngs)

    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "b n 2*h 2*w c//2"]:
        if self.time_conv is not None:
            x = self._double(x, stream)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))

    def _double(self, x: Frames, stream: Stream) -> Float[Array, "b n h w c"]:
        if stream.first:
            stream.extend(jnp.zeros_like(x), 2)  # the frames that follow do not see it
            return x
        assert self.time_conv is not None  # as called
        b, t, h, w, c = x.shape
        pairs = self.time_conv(stream.extend(x, 2)).reshape(b, t, h, w, 2, c)
        return jnp.moveaxis(pairs, 4, 2).reshape(b, 2 * t, h, w, c)


class Coder(nnx.Module):
    """Layers between two causal convolutions; a norm and SiLU before the last. Both directions are of this form."""

    def __init__(self, inputs: int, layers: list[nnx.Module], outputs: int, widths: tuple[int, int], rngs: nnx.Rngs):
        self.conv_in = CausalConv(inputs, widths[0], rngs)
        self.layers = nnx.List(layers)
        self.norm_out = ChannelNorm(widths[1])
        self.conv_out = CausalConv(widths[1], outputs, rngs)

    def __call__(self, x: Frames, stream: Stream) -> Float[Array, "b n i j d"]:
        x = self.conv_in(x, stream)
        for layer in self.layers:
            x = layer(x, stream)
        return self.conv_out(silu(self.norm_out(x)), stream)


def _middle(width: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    return [ResidualBlock(width, width, rngs), AttentionBlock(width, rngs), ResidualBlock(width, width, rngs)]


def make_encoder(width: int, rngs: nnx.Rngs) -> Coder:
    """Video (b 1 or 4n, h, w, 3) → moments (b 1 or n, h/8, w/8, 32)."""
    layers, inputs = list[nnx.Module](), width
    for stage, multiple in enumerate(MULTIPLES):
        outputs = multiple * width
        layers += [ResidualBlock(inputs, outputs, rngs), ResidualBlock(outputs, outputs, rngs)]
        if stage < len(TIME_RESAMPLED):
            layers.append(Downsample(outputs, rngs, time=TIME_RESAMPLED[stage]))
        inputs = outputs
    return Coder(3, layers + _middle(inputs, rngs), 2 * CHANNELS, (width, inputs), rngs)


def make_decoder(width: int, rngs: nnx.Rngs) -> Coder:
    """Latents (b 1 or n, h, w, 16) → video (b 1 or 4n, 8h, 8w, 3): the encoder's stages backwards, one block more in each."""
    widest = inputs = MULTIPLES[-1] * width
    layers = _middle(widest, rngs)
    for stage, multiple in enumerate(reversed(MULTIPLES)):
        outputs = multiple * width
        layers += [ResidualBlock(inputs, outputs, rngs)] + [ResidualBlock(outputs, outputs, rngs) for _ in range(2)]
        if stage < len(TIME_RESAMPLED):
            layers.append(Upsample(outputs, rngs, time=TIME_RESAMPLED[::-1][stage]))
        inputs = outputs // 2
    return Coder(CHANNELS, layers, 3, (widest, outputs), rngs)


class WanVAE(nnx.Module):
    """Video in [−1, 1] ↔ latents with about unit variance in each channel.

    Computes in the dtype of parameters and inputs; call it under `jax.jit`, or every call compiles its scan again.
    """

    time_stride, stride, channels = GROUP, PATCH, CHANNELS
    exact = False
    pretrained = True

    def __init__(self, config: TokenizerConfig, rngs: nnx.Rngs, compat: CompatConfig = NO_ROUNDING):
        self.config, self.compat = config, compat
        self.encoder = make_encoder(config.width, rngs)
        self.quant_conv = linear(2 * CHANNELS, 2 * CHANNELS, rngs, bias=0.0)
        self.post_quant_conv = linear(CHANNELS, CHANNELS, rngs, bias=0.0)
        self.decoder = make_decoder(config.width, rngs)

    @classmethod
    def build(cls, config: ExperimentConfig, rngs: nnx.Rngs) -> Self:
        return cls(config.tokenizer, rngs, config.compat)

    def encode(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b 1+f//4 h//8 w//8 16"]:
        """1 + 4n frames of (8i, 8j) pixels in [−1, 1] → 1 + n normalised latent frames: the mean, with no sampling.

        A prefix of the frames gives the prefix of the latents.

        Raises:
            ValueError: for any other count of frames, size or number of channels.
        """
        if video.ndim != 5 or video.shape[-1] != 3:
            raise ValueError(f"video has shape {video.shape}; expected (batch, frames, height, width, 3)")
        _, frames, height, width, _ = video.shape
        if frames % GROUP != 1:
            raise ValueError(f"video has {frames} frames; expected 1 + a multiple of {GROUP}")
        if height % PATCH or width % PATCH or not height or not width:
            raise ValueError(f"video has {height}x{width} pixels; expected multiples of {PATCH}")

        def step(chunk: Frames, stream: Stream) -> Float[Array, "b n i j 16"]:
            return self.quant_conv(self.encoder(chunk, stream))[..., :CHANNELS]  # the rest is the logarithm of the variance

        latents = over_chunks(step, video, GROUP * self.config.chunk_latents)
        mean, inverse_std = latent_statistics(bfloat16=self.compat.bfloat16_latent_statistics)
        return ((latents.astype(jnp.float32) - mean) * inverse_std).astype(latents.dtype)

    def decode(self, latents: Float[Array, "b t i j 16"]) -> Float[Array, "b 4*t-3 8*i 8*j 3"]:
        """1 + n normalised latent frames of (i, j) → 1 + 4n frames of (8i, 8j) pixels, not clipped to [−1, 1].

        Raises:
            ValueError: for an empty clip or any other number of channels.
        """
        if latents.ndim != 5 or latents.shape[-1] != CHANNELS or 0 in latents.shape[1:]:
            raise ValueError(f"latents have shape {latents.shape}; expected (batch, frames, height, width, {CHANNELS})")
        mean, inverse_std = latent_statistics(bfloat16=self.compat.bfloat16_latent_statistics)
        latents = (latents.astype(jnp.float32) / inverse_std + mean).astype(latents.dtype)

        def step(chunk: Frames, stream: Stream) -> Float[Array, "b n i j 3"]:
            return self.decoder(self.post_quant_conv(chunk), stream)

        return over_chunks(step, latents, self.config.chunk_latents)
