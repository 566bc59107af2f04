"""The Video-Action Model: tokenizer, video backbone and action decoder composed into losses and samplers.

`VideoActionModel` holds structure only; every method takes the parameters it uses, as one nested dict
{"tokenizer", "backbone", "decoder"} or the part of it that the method needs.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from mimic_video.batch import Batch, Observation, require_shapes
from mimic_video.config import ExperimentConfig
from mimic_video.flow import inpainting, matching, solvers
from mimic_video.models import quantization
from mimic_video.models.action_decoder import ActionConditioning, ActionDecoder, each_chunk
from mimic_video.models.protocols import Latents, VideoInputs, ViewMask
from mimic_video.models.video_dit import token_mask
from mimic_video.registry import BACKBONES

Params = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
PerFrame = Float[Array, "b t"]
Text = Float[Array, "b rows width"]
Hidden = Float[Array, "b k d"]  # k = tokens of a window
Noise = dict[str, Float[Array, "b ..."]]  # standard normal: "video" as latents, "actions" (b a m)
Draws = dict[str, Array]  # all that is random in a training step, of every sample of a batch

VIDEO_LOSS_SCALE, ACTION_LOSS_SCALE = 100.0, 10.0  # as published (SPEC 4.2, 7); metrics report unscaled errors


class Conditioning(NamedTuple):
    """What the video model is told of a window that it is to make.

    Attributes:
        past: latents of the observed frames, p of the window's t.
        text: rows of each sample's instruction.
        view_mask: False for views that are not there; what is made of those means nothing. None if all are.
        negative_text: rows of the prompt to move away from; None for no guidance, at half the cost.
        guidance: g in x̂₀ + g·(x̂₀ − x̂₀(negative prompt)), one less than the scale of other codes (SPEC 2).
    """

    past: Float[Array, "b v p h w c"]
    text: Text
    view_mask: ViewMask | None = None
    negative_text: Text | None = None
    guidance: float | Float[Array, ""] = 0.0


class Prefix(NamedTuple):
    """What sampled chunks have to continue.

    Attributes:
        actions: normalised, of the same steps as the chunk's; those of weight 0 are not looked at.
        weights: as of `inpainting.prefix_weights`.
    """

    actions: Float[Array, "b a m"]
    weights: Float[Array, "b a"]


class WeightedMean(NamedTuple):
    """A mean and the weight of what it is over: means over the parts of a batch, weighted so, make that over all of it."""

    value: Float[Array, ""]
    weight: Float[Array, ""]


@functools.lru_cache(maxsize=16)
def _networks(config: ExperimentConfig) -> tuple[dict[str, Callable[[nnx.Rngs], Any]], dict[str, Any], Params]:
    """What makes each network, its structure, and the shapes of its parameters; traced once, since a run asks several times."""
    make: dict[str, Callable[[nnx.Rngs], Any]] = {
        "tokenizer": functools.partial(config.tokenizer.network.build, config),
        "backbone": functools.partial(BACKBONES[config.backbone.kind].build, config),
        "decoder": lambda rngs: ActionDecoder(
            config.decoder, config.backbone.width, config.data.action_horizon, rngs, config.attention, config.train.remat
        ),
    }
    networks = {name: nnx.eval_shape(make[name], nnx.Rngs(0)) for name in make}
    shapes = {name: nnx.to_pure_dict(nnx.state(network, nnx.Param)) for name, network in networks.items()}
    return make, {name: nnx.graphdef(network) for name, network in networks.items()}, shapes


class VideoActionModel:
    """Pure functions of parameters, for one experiment's configuration.

    Attributes:
        shapes: of the parameters that `init` makes.
    """

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self._draw_noise = jax.jit(self.draw_noise, static_argnums=1)
        self._make, self._graphdefs, self.shapes = _networks(config)

    def init(self, key: jax.Array, networks: Collection[str] | None = None) -> Params:
        """Random parameters, float32, of the named networks, or of all. A tokenizer has to be fitted or loaded to be of use."""
        keys = dict(zip(self._make, jax.random.split(key, len(self._make)), strict=True))
        chosen = {name: make for name, make in self._make.items() if networks is None or name in networks}
        return {name: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(keys[name])), nnx.Param)) for name, make in chosen.items()}

    def module(self, name: str, params: Params) -> Any:
        """The named network with its parameters in the configured precision."""
        return nnx.merge(self._graphdefs[name], nnx.State(quantization.cast(params[name], self.dtype(name))))

    def cast(self, params: Params) -> Params:
        """Parameters of networks in the dtypes that they compute in."""
        return {name: quantization.cast(part, self.dtype(name)) for name, part in params.items()}

    def policy_params(self, params: Params) -> Params:
        """Parameters of all networks as a policy keeps them: cast, and the backbone's as `policy.weights` has it."""
        kept = self.cast(params)
        return kept | {"backbone": quantization.quantized(kept["backbone"])} if self.config.policy.weights == "int8" else kept

    def dtype(self, name: str) -> jnp.dtype:
        """What the named network computes in."""
        exact = name == "tokenizer" and self.config.tokenizer.network.exact
        return jnp.dtype(jnp.float32 if exact else self.config.precision)

    # Latents.

    @jax.named_scope("encode")
    def encode_video(self, params: Params, video: UInt8[Array, "b v f y x 3"]) -> Latents:
        """8-bit RGB frames → latents; a prefix of the frames gives the prefix of the latents. Views are encoded by themselves."""
        views = video.reshape(-1, *video.shape[2:])
        inputs = (views.astype(jnp.float32) / 127.5 - 1).astype(self.dtype("tokenizer"))
        latents = jax.lax.stop_gradient(self.module("tokenizer", params).encode(inputs)).astype(jnp.float32)
        return latents.reshape(*video.shape[:2], *latents.shape[1:])

    def decode_video(self, params: Params, latents: Latents) -> UInt8[Array, "b v f y x 3"]:
        """Latents → 8-bit RGB frames."""
        views = latents.reshape(-1, *latents.shape[2:]).astype(self.dtype("tokenizer"))
        video = self.module("tokenizer", params).decode(views).astype(jnp.float32)
        return jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8).reshape(*latents.shape[:2], *video.shape[1:])

    def latents(self, params: Params, observation: Observation) -> Latents:
        """Those of an observation that were precomputed, or else of its frames."""
        if observation.latents is not None:
            return observation.latents.astype(jnp.float32)
        assert observation.video is not None, "an observation has video or latents"
        return self.encode_video(params, observation.video)

    def condition(
        self, params: Params, observation: Observation, negative_text: Text | None = None, guidance: float = 0.0
    ) -> Conditioning:
        """What an observation of past frames tells the video model."""
        past = self.latents(params, observation)
        return Conditioning(past, observation.text, observation.view_mask, negative_text, guidance)

    def condition_on_past(self, latents: Latents, observation: Observation) -> Conditioning:
        """What the observed frames of whole windows, as latents, tell the video model."""
        return Conditioning(latents[:, :, : self.config.past_latents], observation.text, observation.view_mask)

    # Training. What is random is an argument, so that a batch may be cut into parts, and noise be the same twice.

    def draw(self, key: jax.Array, batch: int) -> Draws:
        """What a step of the configured stage draws for a batch.

        Returns:
            Of either stage `video_time` (b,), the flow time τ_v, and `video`, noise as latents; of stage `video` also
            `conditioned` (b,), the number of clean latent frames; of stage `action`, with d = `train.action_draws`, `action_time`
            (b, d), `actions` (b, d, a, m), noise, and `dropped` bool (b, d), where proprioception is hidden.
        """
        config, shapes, draws = self.config, self._draw_shapes(batch), self.config.train.action_draws
        keys = dict(zip(("sigma", "video", "count", "time", "actions", "drop"), jax.random.split(key, 6), strict=True))
        drawn: Draws = {
            "video_time": matching.flow_time(matching.sample_video_sigma(keys["sigma"], batch, config.noise)),
            "video": self._views(jax.random.normal(keys["video"], shapes["video"])),
        }
        if config.stage == "video":
            return drawn | {"conditioned": jax.random.randint(keys["count"], (batch,), 1, config.past_latents + 1)}
        return drawn | {
            "action_time": matching.sample_action_time(keys["time"], (batch, draws)),
            "actions": jax.random.normal(keys["actions"], (batch, draws, *shapes["actions"][1:])),
            "dropped": jax.random.bernoulli(keys["drop"], config.decoder.proprio_dropout, (batch, draws)),
        }

    def loss(self, params: Params, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], dict[str, WeightedMean]]:
        """The loss of the configured stage.

        Raises:
            AssertionError: naming the field of the batch whose shape or dtype is not the configuration's, before anything runs.
        """
        require_shapes(batch, self.config)
        return (self.video_loss if self.config.stage == "video" else self.action_loss)(params, batch, draws)

    def video_loss(self, params: Params, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], dict[str, WeightedMean]]:
        """Flow matching on the latents that follow 1 … past_latents clean ones (SPEC 4).

        Args:
            draws: of `draw`.

        Returns:
            The loss to differentiate, and metrics: `loss` itself and the unscaled error `video_mse`. Views that are missing and,
            unless configured otherwise, padded frames take no part.
        """
        seen, time, noise = batch.observation, draws["video_time"], draws["video"]
        latents = self.latents(params, seen)
        mask = matching.condition_mask(draws["conditioned"], latents.shape[2])
        conditioning = Conditioning(latents, seen.text, seen.view_mask)  # of which the mask says what is told
        inputs = self._video_inputs(matching.interpolate(latents, noise, time), time, conditioning, mask)
        error = (self._velocity(params, inputs) - (noise - latents)) ** 2
        valid, mask = self._valid(self._latent_mask(batch.frame_mask))[:, None], mask[:, None]
        valid = jnp.tile(valid, (1, latents.shape[1], 1))  # of every view
        if seen.view_mask is not None:
            valid = valid * seen.view_mask[:, :, None]
        generated = WeightedMean(matching.weighted_mean(error, valid * (1 - mask)), jnp.sum(valid * (1 - mask)))
        if self.config.train.average_generated_only:
            mean = generated
        else:  # conditioned frames count in the denominator, with no error of their own
            mean = WeightedMean(matching.weighted_mean(error * (1 - mask)[..., None, None, None], valid), jnp.sum(valid))
        loss = WeightedMean(VIDEO_LOSS_SCALE * mean.value, mean.weight)
        return loss.value, {"loss": loss, "video_mse": generated}

    def action_loss(self, params: Params, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], dict[str, WeightedMean]]:
        """Flow matching on action chunks, given the frozen backbone's view of the true video noised to a random τ_v (SPEC 7).

        Args:
            draws: of `draw`. All draws of a sample share its hidden states, and their keys and values.

        Returns:
            The loss to differentiate, and metrics: `loss` itself and the unscaled error `action_mse`.
        """
        assert batch.actions is not None and batch.action_mask is not None
        seen, video_time, noise = batch.observation, draws["video_time"], draws["actions"]
        hidden = jax.lax.stop_gradient(self.hidden_of_noised_video(params, batch, draws))
        conditioning = self.action_conditioning(params, hidden, video_time, seen)

        weights = self._valid(batch.action_mask)
        if seen.action_dims is not None:  # the others stay at zero, here and in `decode_actions`
            dims = seen.action_dims[:, None]
            weights, noise = weights[:, :, None] * dims, noise * dims[:, None]
        # Every draw is a chunk of its own.
        time, noise, dropped = (x.reshape(-1, *x.shape[2:]) for x in (draws["action_time"], noise, draws["dropped"]))
        actions = each_chunk(batch.actions, len(noise))
        noised = matching.interpolate(actions, noise, time)
        velocity = self._action_velocity(self.module("decoder", params), noised, time, conditioning, dropped)
        mean = matching.weighted_mean((velocity - (noise - actions)) ** 2, each_chunk(weights, len(noise)))
        mse = WeightedMean(mean, jnp.sum(weights))
        loss = WeightedMean(ACTION_LOSS_SCALE * mean, mse.weight)
        return loss.value, {"loss": loss, "action_mse": mse}

    def hidden_of_noised_video(self, params: Params, batch: Batch, draws: Draws) -> Hidden:
        """Hidden states of a batch's whole windows, their future latents noised to the τ_v that were drawn."""
        seen, time = batch.observation, draws["video_time"]
        latents = self.latents(params, seen)
        x_tau = matching.interpolate(latents, draws["video"], time)
        return self.hidden_at(params, self.condition_on_past(latents, seen), x_tau, time)

    # Sampling. Noise is an argument, so that a sample is a function of it whatever drew it.

    def draw_noise(self, key: jax.Array, batch: int) -> Noise:
        """Noise for `batch` samples of a window and of its action chunk."""
        video_key, action_key = jax.random.split(key)
        shapes = self._draw_shapes(batch)
        return {
            "video": self._views(jax.random.normal(video_key, shapes["video"])),
            "actions": jax.random.normal(action_key, shapes["actions"]),
        }

    def policy_noise(self, seed: int, batch: int, query: int = 0) -> Noise:
        """Noise as `policy.noise_stream` has it: of (seed, query), or the published streams, which start anew at every query."""
        if self.config.policy.noise_stream == "numpy":
            noise = {name: jnp.asarray(matching.numpy_noise(seed, shape)) for name, shape in self._draw_shapes(batch).items()}
            return noise | {"video": self._views(noise["video"])}
        return self._draw_noise(jax.random.fold_in(jax.random.key(seed), query), batch)

    def sample_video(self, params: Params, conditioning: Conditioning, noise: Latents) -> UInt8[Array, "b v f y x 3"]:
        """A whole window of video that continues the observed frames, by the full solver and its final clean pass (SPEC 5).

        Args:
            noise: of the whole window's latents; its shape says how long that is.
        """
        return self.decode_video(params, self.sample_latents(params, conditioning, noise))

    def sample_latents(self, params: Params, conditioning: Conditioning, noise: Latents) -> Latents:
        """`sample_video` as latents."""
        sigmas = solvers.karras_sigmas(self.config.policy.video_steps)
        predict_x0 = self._denoiser(params, conditioning, noise.shape[2])
        x = solvers.solve_video(predict_x0, sigmas[0] * noise, sigmas)
        return predict_x0(x, jnp.float32(sigmas[-1]))

    def sample_path(self, params: Params, conditioning: Conditioning, noise: Latents, steps: Sequence[int]) -> list[Latents]:
        """The x_τ that `sample_hidden` would read the backbone at after each of `steps`, in one run through the video sampler."""
        sigmas = solvers.karras_sigmas(self.config.policy.video_steps)[: steps[-1] + 1]
        denoiser = self._denoiser(params, conditioning, noise.shape[2])
        path = solvers.video_path(denoiser, sigmas[0] * noise, sigmas, steps)
        return [(1 - matching.flow_time(sigma)) * x for sigma, x in zip(sigmas[list(steps)], path, strict=True)]

    def hidden_at(self, params: Params, conditioning: Conditioning, x_tau: Latents, time: Float[Array, " b"]) -> Hidden:
        """Hidden states of any window latents x_τ at the flow times τ_v, the observed frames given."""
        inputs = self._video_inputs(x_tau, time, conditioning)
        hidden = self.module("backbone", params).hidden(inputs, stop=self.config.backbone.hidden_block)
        return hidden.reshape(len(hidden), -1, hidden.shape[-1])

    @jax.named_scope("video")
    def sample_hidden(self, params: Params, conditioning: Conditioning, noise: Latents) -> tuple[Hidden, Float[Array, " b"]]:
        """Hidden states where the policy stops the video sampler (SPEC 5.1), and the flow time τ_v there.

        Stop step 0 is a single pass through the first `hidden_block` blocks, on pure noise.
        """
        sigmas = solvers.stopping_sigmas(self.config.policy)
        stop_time = self.config.policy.stop_time or matching.flow_time(sigmas[-1])
        time = jnp.full(len(noise), stop_time, jnp.float32)
        if len(sigmas) == 1:
            x_tau = stop_time * noise
        else:
            denoiser = self._denoiser(params, conditioning, noise.shape[2])
            x_tau = (1 - stop_time) * solvers.solve_video(denoiser, sigmas[0] * noise, sigmas)
        return self.hidden_at(params, conditioning, x_tau, time), time

    def sample_actions(
        self, params: Params, observation: Observation, noise: Noise, prefix: Prefix | None = None
    ) -> Float[Array, "b *n a m"]:
        """Normalised action chunks: one partial video pass, then the action flow over a context encoded once.

        Args:
            observation: of the past frames.
            noise: "actions" of one chunk for each sample, (b, a, m), or of several, (b, n, a, m).
            prefix: chunks are led to continue it, `policy.guidance_clip` bounding how hard (see `flow.inpainting`).
        """
        hidden, time = self.sample_hidden(params, self.condition(params, observation), noise["video"])
        conditioning, actions = self.action_conditioning(params, hidden, time, observation), noise["actions"]
        chunks = actions.reshape(-1, *actions.shape[-2:])  # those of a sample next to each other
        return self.decode_actions(params, conditioning, chunks, prefix).reshape(actions.shape)

    @jax.named_scope("context")
    def action_conditioning(
        self, params: Params, hidden: Hidden, video_time: Float[Array, " b"], observation: Observation
    ) -> ActionConditioning:
        """What the action flow is told of each sample: hidden states of its video as read at τ_v, and of the robot."""
        dtype = self.dtype("decoder")
        assert observation.proprio is not None, "the action decoder needs proprioception"
        return ActionConditioning(
            context=self.module("decoder", params).encode_context(
                hidden.astype(dtype), self._context_mask(observation.view_mask, hidden.shape[1])
            ),
            video_time=video_time,
            proprio=observation.proprio.astype(dtype),
            embodiment=observation.embodiment,
            action_dims=observation.action_dims,
        )

    def decode_actions(
        self,
        params: Params,
        conditioning: ActionConditioning,
        noise: Float[Array, "n a m"],
        prefix: Prefix | None = None,
    ) -> Float[Array, "n a m"]:
        """The action flow from noise to normalised chunks, by Euler steps.

        Args:
            noise: of one chunk or several for each sample, those of a sample next to each other.
            prefix: as for `sample_actions`.
        """
        decoder, chunks, dims = self.module("decoder", params), len(noise), conditioning.action_dims
        there = 1.0 if dims is None else each_chunk(dims[:, None], chunks)

        def velocity(x: Float[Array, "n a m"], time: Float[Array, ""], /) -> Float[Array, "n a m"]:
            x = there * x  # so that guidance does not move the dimensions that a robot lacks
            return there * self._action_velocity(decoder, x, jnp.full(chunks, time), conditioning)

        if prefix is not None:
            target, weights = (each_chunk(part, chunks) for part in prefix)
            velocity = inpainting.guided(velocity, target, weights, self.config.policy.guidance_clip)
        state = jnp.bfloat16 if self.config.compat.bfloat16_action_state else jnp.float32
        return solvers.solve_euler(velocity, there * noise, self.config.policy.action_steps, state)

    # Internals. Mathematics is float32, networks run in the configured precision.

    def _draw_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of noise as it is drawn: latents with views one above the other, which `_views` parts; actions."""
        data, (frames, rows, *rest) = self.config.data, self.config.latent_shape
        return {
            "video": (batch, frames, data.views * rows, *rest),
            "actions": (batch, data.action_horizon, self.config.decoder.action_dim),
        }

    def _views(self, stacked: Float[Array, "b t rows w c"]) -> Latents:
        b, t, rows, *rest = stacked.shape
        views = self.config.data.views
        return jnp.moveaxis(stacked.reshape(b, t, views, rows // views, *rest), 2, 1)

    def _video_inputs(
        self, x_tau: Latents, time: Float[Array, " b"], conditioning: Conditioning, mask: PerFrame | None = None
    ) -> VideoInputs:
        """What the backbone sees of x_τ, the observed frames given clean; with a mask, the frames that it is 1 for."""
        clean, observed = _padded(conditioning.past, x_tau.shape[2])
        mask, dtype = observed if mask is None else mask, self.dtype("backbone")
        latents, times = matching.frame_replacement(clean, x_tau, time, mask)
        return VideoInputs(latents.astype(dtype), times, conditioning.text.astype(dtype), mask, None, conditioning.view_mask)

    def _velocity(self, params: Params, inputs: VideoInputs) -> Latents:
        return self.module("backbone", params)(inputs).astype(jnp.float32)

    def _action_velocity(
        self,
        decoder: ActionDecoder,
        x_tau: Float[Array, "n a m"],
        time: Float[Array, " n"],
        conditioning: ActionConditioning,
        dropped: Bool[Array, " n"] | None = None,
    ) -> Float[Array, "n a m"]:
        scaled = matching.scale_to_unit_variance(x_tau, time).astype(self.dtype("decoder"))
        return decoder(scaled, time, conditioning, dropped).astype(jnp.float32)

    def _valid(self, mask: Bool[Array, "b n"]) -> Float[Array, "b n"]:
        """Weights in the loss of what a data mask calls real or padded."""
        return mask.astype(jnp.float32) if self.config.train.mask_padding else jnp.ones(mask.shape)

    def _context_mask(self, view_mask: ViewMask | None, tokens: int) -> Bool[Array, "b k"] | None:
        """Which of a window's hidden states belong to views that are there."""
        if view_mask is None:
            return None
        frames, views = self.config.latent_shape[0], view_mask.shape[1]
        return token_mask(view_mask, tokens // (frames * views), frames)

    def _latent_mask(self, frame_mask: Bool[Array, "b f"]) -> Bool[Array, "b t"]:
        """True for latent frames all of whose pixel frames are real."""
        stride = self.config.tokenizer.network.time_stride
        groups = frame_mask[:, 1:].reshape(len(frame_mask), -1, stride).all(axis=-1)
        return jnp.concatenate([frame_mask[:, :1], groups], axis=1)

    def _denoiser(self, params: Params, conditioning: Conditioning, frames: int) -> solvers.Denoiser:
        """(x, σ) → x̂₀ of a window of `frames` latent frames, the observed ones given (SPEC 4.1)."""
        clean, mask = _padded(conditioning.past, frames)

        def predict_x0(x: Latents, sigma: Float[Array, ""]) -> Latents:
            time = jnp.full(len(x), matching.flow_time(sigma))
            x_tau = (1 - time[0]) * x
            inputs = self._video_inputs(x_tau, time, conditioning)
            velocity = self._velocity(params, inputs)
            if conditioning.negative_text is not None:  # guides by velocities, in which x̂₀ is linear
                negative = inputs._replace(text=conditioning.negative_text.astype(inputs.text.dtype))
                velocity += conditioning.guidance * (velocity - self._velocity(params, negative))
            given = mask[:, None, :, None, None, None] > 0
            return jnp.where(given, clean, matching.denoised(x_tau, velocity, time))

        return predict_x0


def _padded(past: Float[Array, "b v p h w c"], frames: int) -> tuple[Latents, PerFrame]:
    """The observed latent frames with zeros up to `frames`, and the mask of the observed ones."""
    clean = jnp.pad(past, [(0, 0), (0, 0), (0, frames - past.shape[2]), (0, 0), (0, 0), (0, 0)])
    return clean, matching.condition_mask(jnp.full(len(past), past.shape[2]), frames)
