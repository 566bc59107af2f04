"""The policy as one pure function, from raw observations to raw actions: what is compiled, measured and exported."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from mimic_video.batch import Observation
from mimic_video.config import ExperimentConfig
from mimic_video.embodiments import Embodiment
from mimic_video.flow import matching
from mimic_video.transforms import Normalizer
from mimic_video.vam import Noise, Params, Prefix, VideoActionModel

Ranges = dict[str, Float[Array, "h d"]]  # parameters of a normaliser: "shift", "scale", "low", "high"


class PolicyProgram:
    """Plans chunks for a batch of robots of one embodiment, as stages, or all of them in one call.

    Its parameters are the model's and, under "normalizers", those of the robot: what is a constant of the compiled program might
    be folded into other constants, with other roundings than NumPy's.
    """

    def __init__(self, config: ExperimentConfig, embodiment: Embodiment, seed: int = 0):
        """`seed`: of published noise, which no key changes."""
        train = dataclasses.replace(config.train, remat="none")  # guidance differentiates a few tokens: nothing to save
        self.vam, self.embodiment, self._seed = VideoActionModel(dataclasses.replace(config, train=train)), embodiment, seed
        self._decoder, self._cameras, self._bfloat16 = config.decoder, config.data.cameras, config.compat.bfloat16_low_dim

    def parameters(self, params: Params) -> Params:
        """What a call takes, given those of the model."""
        normalizers = self.embodiment.normalizers(self.vam.config)
        scales = {name: ranges(normalizer) for name, normalizer in normalizers.items()}
        return {**self.vam.policy_params(params), "normalizers": scales}

    def input_shapes(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what a call takes after the parameters, for `batch` robots."""
        config, data = self.vam.config, self.vam.config.data
        return {
            "images": jax.ShapeDtypeStruct((batch, len(data.cameras), data.past_frames, *data.image_size, 3), jnp.uint8),
            "proprio": jax.ShapeDtypeStruct((batch, self.embodiment.proprio_dim), jnp.float32),
            "text": jax.ShapeDtypeStruct((batch, config.text.rows, config.backbone.text_width), jnp.float32),
            "key": jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
        }

    def prefix_shapes(self, batch: int) -> Prefix:
        """Shapes of what chunks have to continue."""
        chunk = (batch, self.vam.config.data.action_horizon, self._decoder.action_dim)
        return Prefix(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (chunk, chunk[:2])))  # type: ignore[arg-type]

    def __call__(
        self,
        params: Params,
        images: UInt8[Array, "b v f h w 3"],
        proprio: Float[Array, "b p"],
        text: Float[Array, "b rows width"],
        key_data: UInt32[Array, " k"],
        prefix: Prefix | None = None,
        samples: int | None = None,
    ) -> Float[Array, "b *n a m"]:
        """Actions in raw units; with `samples`, (b, samples, a, m): chunks that share all but the noise of the action flow.

        Args:
            images: frames of the size that the model sees, of the cameras that it has; black where the robot lacks one.
            proprio: raw units.
            text: rows of each robot's instruction.
            key_data: `jax.random.key_data` of the key that noise comes from.
            prefix: what the chunks have to continue, normalised.
        """
        noise, observation = self.noise(key_data, len(images), samples), self.observe(params, images, proprio, text)
        return self.raw_actions(params, self.vam.sample_actions(params, observation, noise, prefix))

    def noise(self, key_data: UInt32[Array, " k"], batch: int, samples: int | None = None) -> Noise:
        """As of `VideoActionModel.policy_noise`; of several samples, "actions" is (b, samples, a, m), the first that of one."""
        if self.vam.config.policy.noise_stream == "numpy":
            noise = self.vam.policy_noise(self._seed, batch)
            more: list[Any] = [matching.numpy_noise(self._seed + n, noise["actions"].shape) for n in range(1, samples or 1)]
        else:
            key = jax.random.wrap_key_data(key_data)
            noise = self.vam.draw_noise(key, batch)
            keys = [jax.random.fold_in(jax.random.split(key)[1], n) for n in range(1, samples or 1)]  # of the actions' own key
            more = [jax.random.normal(key, noise["actions"].shape) for key in keys]
        return noise if samples is None else noise | {"actions": jnp.stack([noise["actions"], *more], axis=1)}

    def observe(
        self,
        params: Params,
        images: UInt8[Array, "b v f h w 3"],
        proprio: Float[Array, "b p"],
        text: Float[Array, "b rows width"],
    ) -> Observation:
        """What the model has to be told of robots of this embodiment; arguments as for a call."""
        robot, batch, width = self.embodiment, len(images), self._decoder.action_dim
        views = np.isin(self._cameras, robot.cameras)
        state = normalize(proprio[:, None], params["normalizers"]["proprio"], self._bfloat16)
        return Observation(
            text=text,
            video=images,
            view_mask=jnp.tile(views, (batch, 1)) if len(views) > 1 else None,
            proprio=jnp.pad(state, [(0, 0), (0, 0), (0, self._decoder.proprio_dim - robot.proprio_dim)]),
            embodiment=jnp.full(batch, robot.index) if self._decoder.embodiments else None,
            action_dims=jnp.tile(jnp.arange(width) < robot.action_dim, (batch, 1)) if robot.action_dim < width else None,
        )

    def raw_actions(self, params: Params, chunks: Float[Array, "b *n a w"]) -> Float[Array, "b *n a m"]:
        """In the robot's units, and only its dimensions."""
        return unnormalize(chunks[..., : self.embodiment.action_dim], params["normalizers"]["action"], self._bfloat16)


def ranges(normalizer: Normalizer) -> Ranges:
    """A normaliser's parameters in float32, in which those of bfloat16 are exact."""
    return {name: jnp.asarray(getattr(normalizer, name), jnp.float32) for name in ("shift", "scale", "low", "high")}


def normalize(values: Float[Array, "*b h d"], ranges: Ranges, bfloat16: bool) -> Float[Array, "*b h d"]:
    """`Normalizer.normalize` to the bit; `bfloat16` where that is the normaliser's dtype."""
    shifted = _rounded(_rounded(values, bfloat16) - ranges["shift"], bfloat16)
    return jnp.clip(_rounded(shifted * ranges["scale"], bfloat16), ranges["low"], ranges["high"])


def unnormalize(values: Float[Array, "*b h d"], ranges: Ranges, bfloat16: bool) -> Float[Array, "*b h d"]:
    """`Normalizer.unnormalize` to the bit."""
    # A divisor that is visibly the same for many values would become a factor, its rounded reciprocal.
    scale = jax.lax.optimization_barrier(jnp.broadcast_to(ranges["scale"], values.shape))
    scaled = _rounded(_rounded(values, bfloat16) / scale, bfloat16)
    return _rounded(scaled + ranges["shift"], bfloat16)


def _rounded(values: Float[Array, "*b"], bfloat16: bool) -> Float[Array, "*b"]:
    """To bfloat16's grid if asked for, in float32: compilers may leave out conversions between types, but not this."""
    return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7) if bfloat16 else values
