"""A video tokenizer for small configurations: principal components of 8x8 patches.

It keeps the Wan VAE's contract (SPEC 1): the first frame alone, then groups of four; 8x8 pixels to one latent pixel of 16
channels; channels of unit variance; the latents of a prefix are the prefix of the latents. It has no weights to train: a
basis fitted to a sample of the videos.
"""

from typing import Self, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mimic_video.config import ExperimentConfig

PATCH, GROUP, CHANNELS = 8, 4, 16  # of a latent pixel, in pixels; frames of a latent frame; of a latent

AnyArray = TypeVar("AnyArray", np.ndarray, Array)


def _patches(frames: Float[AnyArray, "b f h w 3"], group: int) -> Float[AnyArray, "b f//{group} h//8 w//8 n"]:
    """Cuts groups of frames into columns of `group` 8x8 patches, n = group·8·8·3."""
    b, f, h, w, c = frames.shape
    x = frames.reshape(b, f // group, group, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, f // group, h // PATCH, w // PATCH, -1)


def _frames(patches: Float[Array, "b t i j n"], group: int) -> Float[Array, "b t*{group} 8*i 8*j 3"]:
    b, t, i, j, _ = patches.shape
    x = patches.reshape(b, t, i, j, group, PATCH, PATCH, 3)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * group, i * PATCH, j * PATCH, 3)


class Projection(nnx.Module):
    """One whitened principal-component basis: patch = mean + basis · (scale · latent)."""

    def __init__(self, features: int):
        self.mean = nnx.Param(jnp.zeros(features))
        self.basis = nnx.Param(jnp.zeros((features, CHANNELS)))
        self.scale = nnx.Param(jnp.ones(CHANNELS))

    def encode(self, patches: Float[Array, "*b n"]) -> Float[Array, "*b 16"]:
        return (patches - self.mean[...]) @ self.basis[...] / self.scale[...]

    def decode(self, latents: Float[Array, "*b 16"]) -> Float[Array, "*b n"]:
        return (latents * self.scale[...]) @ self.basis[...].T + self.mean[...]

    def fit(self, patches: Float[np.ndarray, "m n"]) -> float:
        """Fits to a sample of patches; returns the share of variance left unexplained."""
        mean = patches.mean(axis=0, dtype=np.float64)
        centred = patches - mean
        values, vectors = np.linalg.eigh(centred.T @ centred / len(patches))
        values, vectors = values[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
        self.mean[...] = jnp.asarray(mean, jnp.float32)
        self.basis[...] = jnp.asarray(vectors, jnp.float32)
        self.scale[...] = jnp.asarray(np.sqrt(np.maximum(values, 1e-6)), jnp.float32)
        return float(1 - values.sum() / (centred**2).sum(axis=1).mean())


class PatchTokenizer(nnx.Module):
    """Video in [−1, 1] ↔ latents, by two bases: one for the first frame, one for groups of four."""

    time_stride, stride, channels = GROUP, PATCH, CHANNELS
    exact = True  # its scales span orders of magnitude
    pretrained = False

    def __init__(self):
        self.first = Projection(PATCH * PATCH * 3)
        self.rest = Projection(GROUP * PATCH * PATCH * 3)

    @classmethod
    def build(cls, config: ExperimentConfig, rngs: nnx.Rngs) -> Self:
        return cls()

    def encode(self, video: Float[Array, "b f h w 3"]) -> Float[Array, "b 1+f//4 h//8 w//8 16"]:
        """1 + 4n frames of (8i, 8j) pixels → 1 + n latent frames."""
        parts = [self.first.encode(_patches(video[:, :1], 1))]
        if video.shape[1] > 1:
            parts.append(self.rest.encode(_patches(video[:, 1:], GROUP)))
        return jnp.concatenate(parts, axis=1)

    def decode(self, latents: Float[Array, "b t i j 16"]) -> Float[Array, "b 4*t-3 8*i 8*j 3"]:
        """Inverse of `encode`, up to what 16 channels cannot hold; not clipped."""
        parts = [_frames(self.first.decode(latents[:, :1]), 1)]
        if latents.shape[1] > 1:
            parts.append(_frames(self.rest.decode(latents[:, 1:]), GROUP))
        return jnp.concatenate(parts, axis=1)

    def fit(self, video: Float[np.ndarray, "b f h w 3"]) -> tuple[float, float]:
        """Fits both bases to sample videos in [−1, 1]; returns the unexplained shares of variance (first, rest)."""
        samples = (_patches(video[:, :1], 1), _patches(video[:, 1:], GROUP))
        first, rest = (np.asarray(patches).reshape(-1, patches.shape[-1]) for patches in samples)
        return self.first.fit(first), self.rest.fit(rest)
