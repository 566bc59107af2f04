"""The Video-Action Model: tokenizer, video backbone and action decoder composed into losses and samplers.

`VideoActionModel` holds structure only; every method takes the parameters it uses, as one nested dict
{"tokenizer", "backbone", "decoder"} or the part of it that the method needs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mimic_video.config import ExperimentConfig
from mimic_video.flow import matching, solvers
from mimic_video.models.action_decoder import ActionDecoder, Context
from mimic_video.models.patch_tokenizer import PatchTokenizer
from mimic_video.models.video_dit import VideoDiT

Params = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Latents = Float[Array, "b t h w c"]

VIDEO_LOSS_SCALE, ACTION_LOSS_SCALE = 100.0, 10.0  # as published (SPEC 4.2, 7); metrics report unscaled errors


class VideoActionModel:
    """Pure functions of parameters, for one experiment's configuration."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        make = {
            "tokenizer": lambda rngs: PatchTokenizer(),
            "backbone": lambda rngs: VideoDiT(config.backbone, rngs),
            "decoder": lambda rngs: ActionDecoder(config.decoder, config.backbone.width, rngs),
        }
        self._make = make
        self._graphdefs = {name: nnx.split(nnx.eval_shape(make[name], nnx.Rngs(0)))[0] for name in make}

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32; the tokenizer still has to be fitted or loaded."""
        keys = dict(zip(self._make, jax.random.split(key, len(self._make)), strict=True))
        return {name: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(keys[name])), nnx.Param)) for name, make in self._make.items()}

    def module(self, name: str, params: Params) -> Any:
        """The named network with its parameters in the configured precision."""
        dtype = jnp.dtype(self.config.precision) if name != "tokenizer" else jnp.float32
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params[name])
        return nnx.merge(self._graphdefs[name], nnx.State(cast))

    # Latents.

    def encode_video(self, params: Params, video: UInt8[Array, "b f h w 3"]) -> Latents:
        """8-bit RGB frames → latents; a prefix of the frames gives the prefix of the latents."""
        return jax.lax.stop_gradient(self.module("tokenizer", params).encode(video.astype(jnp.float32) / 127.5 - 1))

    def decode_video(self, params: Params, latents: Latents) -> UInt8[Array, "b f h w 3"]:
        """Latents → 8-bit RGB frames."""
        video = self.module("tokenizer", params).decode(latents)
        return jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8)

    # Training.

    def video_loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """Flow matching on the latents that follow 1 … past_latents clean ones (SPEC 4).

        Args:
            batch: `video` uint8 (b f H W 3), `video_mask` bool (b f), `text` (b rows width).

        Returns:
            The loss to differentiate, and metrics; padded frames take no part.
        """
        data = self.config.data
        count_key, sigma_key, noise_key = jax.random.split(key, 3)
        latents = self.encode_video(params, batch["video"])
        size, frames = latents.shape[:2]
        mask = matching.condition_mask(jax.random.randint(count_key, (size,), 1, data.past_latents + 1), frames)
        time = matching.flow_time(matching.sample_video_sigma(sigma_key, size, self.config.noise))
        noise = jax.random.normal(noise_key, latents.shape)
        inputs, times = matching.frame_replacement(latents, matching.interpolate(latents, noise, time), time, mask)
        velocity = self._video_velocity(params, inputs, times, batch["text"], mask)
        error = (velocity - (noise - latents)) ** 2
        valid = self._latent_mask(batch["video_mask"])
        generated = matching.weighted_mean(error, valid * (1 - mask))
        if self.config.train.average_generated_only:
            loss = generated
        else:  # conditioned frames count in the denominator, with no error of their own
            loss = matching.weighted_mean(error * (1 - mask)[..., None, None, None], valid)
        return VIDEO_LOSS_SCALE * loss, {"video_mse": generated}

    def action_loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """Flow matching on action chunks, given the frozen backbone's view of the true video noised to a random τ_v (SPEC 7).

        Args:
            batch: as for `video_loss`, and normalised `proprio` (b o p), `actions` (b a m), `action_mask` bool (b a).
        """
        video_key, draws_key = jax.random.split(key)
        hidden, video_time = self.hidden_of_noised_video(params, batch["video"], batch["text"], video_key)
        decoder = self.module("decoder", params)
        context = decoder.encode_context(jax.lax.stop_gradient(hidden))

        def draw(key: jax.Array) -> Float[Array, ""]:
            time_key, noise_key, drop_key = jax.random.split(key, 3)
            actions = batch["actions"]
            time = matching.sample_action_time(time_key, len(actions))
            noise = jax.random.normal(noise_key, actions.shape)
            dropped = jax.random.bernoulli(drop_key, self.config.decoder.proprio_dropout, (len(actions),))
            noised = matching.interpolate(actions, noise, time)
            velocity = self._action_velocity(decoder, batch["proprio"], noised, time, video_time, context, dropped)
            return matching.weighted_mean((velocity - (noise - actions)) ** 2, batch["action_mask"].astype(jnp.float32))

        loss = jnp.mean(jax.vmap(draw)(jax.random.split(draws_key, self.config.train.action_draws)))
        return ACTION_LOSS_SCALE * loss, {"action_mse": loss}

    def hidden_of_noised_video(
        self, params: Params, video: UInt8[Array, "b f h w 3"], text: Array, key: jax.Array
    ) -> tuple[Float[Array, "b k d"], Float[Array, " b"]]:
        """Hidden states of whole windows whose future latents are noised to random τ_v; and those τ_v."""
        sigma_key, noise_key = jax.random.split(key)
        latents = self.encode_video(params, video)
        time = matching.flow_time(matching.sample_video_sigma(sigma_key, len(latents), self.config.noise))
        noised = matching.interpolate(latents, jax.random.normal(noise_key, latents.shape), time)
        return self._hidden(params, latents, noised, time, text), time

    # Sampling.

    def sample_video(
        self, params: Params, past_video: UInt8[Array, "b f h w 3"], text: Array, key: jax.Array
    ) -> UInt8[Array, "b g h w 3"]:
        """A whole window of video that continues the observed frames, by the full solver and its final clean pass (SPEC 5)."""
        clean, mask, sigmas = self._observed(params, past_video)
        x = self._denoise(params, clean, mask, text, key, sigmas, len(sigmas) - 1)
        return self.decode_video(params, self._predict_x0(params, clean, mask, text, x, jnp.float32(sigmas[-1])))

    def sample_hidden(
        self, params: Params, past_video: UInt8[Array, "b f h w 3"], text: Array, key: jax.Array
    ) -> tuple[Float[Array, "b k d"], Float[Array, " b"]]:
        """Hidden states at the policy's stop step of the video sampler (SPEC 5.1), and the flow time τ_v there.

        Stop step 0 is a single pass through the first `hidden_block` blocks, on pure noise.
        """
        stop = self.config.policy.stop_step
        clean, mask, sigmas = self._observed(params, past_video)
        x = self._denoise(params, clean, mask, text, key, sigmas, stop)
        time = jnp.full(len(clean), sigmas[stop] / (1 + sigmas[stop]), jnp.float32)
        return self._hidden(params, clean, (1 - time[0]) * x, time, text), time

    def sample_actions(
        self, params: Params, past_video: UInt8[Array, "b f h w 3"], proprio: Float[Array, "b o p"], text: Array, key: jax.Array
    ) -> Float[Array, "b a m"]:
        """Normalised action chunks: one partial video pass, then the action flow over a context encoded once."""
        video_key, action_key = jax.random.split(key)
        hidden, video_time = self.sample_hidden(params, past_video, text, video_key)
        return self.decode_actions(params, hidden, video_time, proprio, action_key)

    def decode_actions(
        self, params: Params, hidden: Float[Array, "b k d"], video_time: Float[Array, " b"], proprio: Array, key: jax.Array
    ) -> Float[Array, "b a m"]:
        """The action flow from noise to a normalised chunk, by Euler steps."""
        config = self.config.decoder
        decoder = self.module("decoder", params)
        context = decoder.encode_context(hidden)

        def velocity(x: Array, time: Float[Array, ""]) -> Array:
            return self._action_velocity(decoder, proprio, x, jnp.full(len(x), time), video_time, context)

        noise = jax.random.normal(key, (len(hidden), config.action_horizon, config.action_dim))
        return solvers.solve_euler(velocity, noise, self.config.policy.action_steps)

    # Internals. Mathematics is float32, networks run in the configured precision.

    def _video_velocity(self, params: Params, inputs: Latents, times: Array, text: Array, mask: Array) -> Latents:
        dtype = jnp.dtype(self.config.precision)
        return self.module("backbone", params)(inputs.astype(dtype), times, text.astype(dtype), mask).astype(jnp.float32)

    def _hidden(self, params: Params, clean: Latents, x_tau: Latents, time: Array, text: Array) -> Float[Array, "b k d"]:
        dtype = jnp.dtype(self.config.precision)
        mask = self._past_mask(clean)
        inputs, times = matching.frame_replacement(clean, x_tau, time, mask)
        backbone = self.module("backbone", params)
        hidden = backbone.hidden(inputs.astype(dtype), times, text.astype(dtype), mask, stop=self.config.backbone.hidden_block)
        return hidden.reshape(len(hidden), -1, hidden.shape[-1])

    def _action_velocity(self, decoder: ActionDecoder, proprio, x_tau, time, video_time, context: Context, dropped=None) -> Array:
        dtype = jnp.dtype(self.config.precision)
        scaled = matching.scale_to_unit_variance(x_tau, time).astype(dtype)
        return decoder(proprio.astype(dtype), scaled, time, video_time, context, dropped).astype(jnp.float32)

    def _past_mask(self, latents: Latents) -> Float[Array, "b t"]:
        return matching.condition_mask(jnp.full(len(latents), self.config.data.past_latents), latents.shape[1])

    def _latent_mask(self, video_mask: Array) -> Float[Array, "b t"]:
        """1 for latent frames all of whose pixel frames are real."""
        groups = video_mask[:, 1:].reshape(len(video_mask), -1, 4).all(axis=-1)
        return jnp.concatenate([video_mask[:, :1], groups], axis=1).astype(jnp.float32)

    def _observed(self, params: Params, past_video: Array) -> tuple[Latents, Float[Array, "b t"], Array]:
        past = self.encode_video(params, past_video)
        missing = self.config.data.latent_shape[0] - past.shape[1]
        clean = jnp.pad(past, [(0, 0), (0, missing), (0, 0), (0, 0), (0, 0)])
        return clean, self._past_mask(clean), solvers.karras_sigmas(self.config.policy.video_steps)

    def _predict_x0(self, params: Params, clean: Latents, mask: Array, text: Array, x: Latents, sigma: Array) -> Latents:
        time = jnp.full(len(x), matching.flow_time(sigma))
        x_tau = (1 - time[0]) * x
        inputs, times = matching.frame_replacement(clean, x_tau, time, mask)
        velocity = self._video_velocity(params, inputs, times, text, mask)
        return jnp.where(mask[..., None, None, None] > 0, clean, matching.denoised(x_tau, velocity, time))

    def _denoise(self, params: Params, clean, mask, text, key, sigmas, stop: int) -> Latents:
        x = sigmas[0] * jax.random.normal(key, clean.shape)
        return solvers.solve_video(lambda x, sigma: self._predict_x0(params, clean, mask, text, x, sigma), x, sigmas, stop)
