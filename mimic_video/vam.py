"""The Video-Action Model: tokenizer, video backbone and action decoder composed into losses and samplers.

`VideoActionModel` holds structure only; every method takes the parameters it uses, as one nested dict
{"tokenizer", "backbone", "decoder"} or the part of it that the method needs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from mimic_video.config import ExperimentConfig
from mimic_video.flow import inpainting, matching, solvers
from mimic_video.models import quantization
from mimic_video.models.action_decoder import ActionDecoder, Context, each_chunk
from mimic_video.models.patch_tokenizer import PatchTokenizer
from mimic_video.models.video_dit import VideoDiT, ViewMask, token_mask
from mimic_video.models.wan_vae import WanVAE

Params = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Latents = Float[Array, "b t h w c"]
Past = Float[Array, "b p h w c"]  # latents of the observed frames
PerFrame = Float[Array, "b t"]
Text = Float[Array, "b rows width"]
Noise = dict[str, Float[Array, "b ..."]]  # standard normal: "video" as latents, "actions" (b a m)
Draws = dict[str, Array]  # all that is random in a training step, of every sample of a batch

VIDEO_LOSS_SCALE, ACTION_LOSS_SCALE = 100.0, 10.0  # as published (SPEC 4.2, 7); metrics report unscaled errors


class Robots(NamedTuple):
    """What the samples of a batch have, for models of several robots; None where that is the same for all.

    Attributes:
        embodiment: number of each sample's robot, if the decoder tells robots apart.
        action_dims: False for dimensions of actions that a robot lacks.
        view_mask: False for views that a sample lacks.
    """

    embodiment: Int[Array, " b"] | None = None
    action_dims: Bool[Array, "b m"] | None = None
    view_mask: ViewMask | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Robots":
        return cls(*(batch.get(name) for name in cls._fields))


ALIKE = Robots()


class Prefix(NamedTuple):
    """What sampled chunks have to continue.

    Attributes:
        actions: normalised, of the same steps as the chunk's; those of weight 0 are not looked at.
        weights: as of `inpainting.prefix_weights`.
    """

    actions: Float[Array, "b a m"]
    weights: Float[Array, "b a"]


class Mean(NamedTuple):
    """A mean and the weight of what it is over: means over the parts of a batch, weighted so, make that over all of it."""

    value: Float[Array, ""]
    weight: Float[Array, ""]


class VideoActionModel:
    """Pure functions of parameters, for one experiment's configuration.

    Attributes:
        shapes: of the parameters that `init` makes.
    """

    def __init__(self, config: ExperimentConfig):
        self.config = config
        wan = config.tokenizer.kind == "wan"
        make = {
            "tokenizer": lambda rngs: WanVAE(config.tokenizer, rngs, config.compat) if wan else PatchTokenizer(),
            "backbone": lambda rngs: VideoDiT(config.backbone, rngs, config.compat, config.attention, config.train.remat),
            "decoder": lambda rngs: ActionDecoder(
                config.decoder, config.backbone.width, rngs, config.attention, config.train.remat
            ),
        }
        self._make, self._draw_noise = make, jax.jit(self.draw_noise, static_argnums=1)
        networks = {name: nnx.eval_shape(make[name], nnx.Rngs(0)) for name in make}
        self._graphdefs = {name: nnx.graphdef(network) for name, network in networks.items()}
        self.shapes: Params = {name: nnx.to_pure_dict(nnx.state(network, nnx.Param)) for name, network in networks.items()}

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32. A tokenizer has to be fitted or loaded to be of use."""
        keys = dict(zip(self._make, jax.random.split(key, len(self._make)), strict=True))
        return {name: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(keys[name])), nnx.Param)) for name, make in self._make.items()}

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
        exact = name == "tokenizer" and self.config.tokenizer.kind == "pca"  # its scales span orders of magnitude
        return jnp.dtype(jnp.float32 if exact else self.config.precision)

    # Latents.

    @jax.named_scope("encode")
    def encode_video(self, params: Params, video: UInt8[Array, "b f h w 3"]) -> Float[Array, "b 1+f//4 h//8 w//8 c"]:
        """8-bit RGB frames → latents; a prefix of the frames gives the prefix of the latents. Views are encoded by themselves."""
        video = (self._apart(video).astype(jnp.float32) / 127.5 - 1).astype(self.dtype("tokenizer"))
        return self._stacked(jax.lax.stop_gradient(self.module("tokenizer", params).encode(video)).astype(jnp.float32))

    def decode_video(self, params: Params, latents: Latents) -> UInt8[Array, "b 4*t-3 8*h 8*w 3"]:
        """Latents → 8-bit RGB frames."""
        latents = self._apart(latents).astype(self.dtype("tokenizer"))
        video = self._stacked(self.module("tokenizer", params).decode(latents).astype(jnp.float32))
        return jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def window_latents(self, params: Params, batch: Batch) -> Latents:
        """Of a batch's windows: those that were precomputed, or else of its frames."""
        if "latents" in batch:
            return batch["latents"].astype(jnp.float32)
        return self.encode_video(params, batch["video"])

    def _apart(self, x: Num[Array, "b n vh w c"]) -> Num[Array, "bv n h w c"]:
        """Views that stand one above the other as samples of their own."""
        views = self.config.backbone.views
        b, n, height, *rest = x.shape
        return jnp.moveaxis(x.reshape(b, n, views, height // views, *rest), 2, 1).reshape(b * views, n, height // views, *rest)

    def _stacked(self, x: Num[Array, "bv n h w c"]) -> Num[Array, "b n vh w c"]:
        """Undoes `_apart`."""
        views = self.config.backbone.views
        bv, n, height, *rest = x.shape
        return jnp.moveaxis(x.reshape(bv // views, views, n, height, *rest), 1, 2).reshape(bv // views, n, views * height, *rest)

    # Training. What is random is an argument, so that a batch may be cut into parts, and noise be the same twice.

    def draw(self, key: jax.Array, batch: int) -> Draws:
        """What a step of the configured stage draws for a batch.

        Returns:
            Of either stage `video_time` (b,), the flow time τ_v, and `video`, noise as latents; of stage `video` also
            `conditioned` (b,), the number of clean latent frames; of stage `action`, with d = `train.action_draws`, `action_time`
            (b, d), `actions` (b, d, a, m), noise, and `dropped` bool (b, d), where proprioception is hidden.
        """
        config, shapes, draws = self.config, self._noise_shapes(batch), self.config.train.action_draws
        keys = dict(zip(("sigma", "video", "count", "time", "actions", "drop"), jax.random.split(key, 6), strict=True))
        drawn: Draws = {
            "video_time": matching.flow_time(matching.sample_video_sigma(keys["sigma"], batch, config.noise)),
            "video": jax.random.normal(keys["video"], shapes["video"]),
        }
        if config.stage == "video":
            return drawn | {"conditioned": jax.random.randint(keys["count"], (batch,), 1, config.data.past_latents + 1)}
        return drawn | {
            "action_time": matching.sample_action_time(keys["time"], (batch, draws)),
            "actions": jax.random.normal(keys["actions"], (batch, draws, *shapes["actions"][1:])),
            "dropped": jax.random.bernoulli(keys["drop"], config.decoder.proprio_dropout, (batch, draws)),
        }

    def loss(self, params: Params, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The loss of the configured stage.

        Raises:
            AssertionError: naming the field of the batch whose shape or dtype is not the configuration's, before anything runs.
        """
        self._check(batch)
        return (self.video_loss if self.config.stage == "video" else self.action_loss)(params, batch, draws)

    def _check(self, batch: Batch) -> None:
        """Shapes and dtypes that would otherwise be broadcast, or multiplied as numbers, in silence."""
        config, size = self.config, len(batch["text"])
        if config.stage == "video":
            shapes, masks = {}, {"video_mask": (size, config.data.num_frames)}
        else:
            steps, width = config.data.action_horizon, config.decoder.action_dim
            shapes = {
                "proprio": (size, config.decoder.obs_horizon, config.decoder.proprio_dim),
                "actions": (size, steps, width),
            }
            masks = {"action_mask": (size, steps), "action_dims": (size, width)}
        masks |= {"view_mask": (size, config.backbone.views)}
        for name, shape in {"text": (size, None, config.text.width), **shapes, **masks}.items():
            if name in batch or name in shapes:
                chex.assert_shape(batch[name], shape, custom_message=f"field {name!r} of the batch")
        for name in masks.keys() & batch.keys():
            chex.assert_type(batch[name], bool, custom_message=f"field {name!r} of the batch")

    def video_loss(self, params: Params, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Flow matching on the latents that follow 1 … past_latents clean ones (SPEC 4).

        Args:
            batch: `video` uint8 (b f H W 3) or `latents` (b t h w c) of it, `video_mask` bool (b f), `text` (b rows width), with
                several cameras `view_mask`.
            draws: of `draw`.

        Returns:
            The loss to differentiate, and metrics: `loss` itself and the unscaled error `video_mse`. Views that are missing and,
            unless configured otherwise, padded frames take no part.
        """
        latents, time, noise = self.window_latents(params, batch), draws["video_time"], draws["video"]
        mask = matching.condition_mask(draws["conditioned"], latents.shape[1])
        inputs, times = matching.frame_replacement(latents, matching.interpolate(latents, noise, time), time, mask)
        velocity = self._video_velocity(params, inputs, times, batch["text"], mask, batch.get("view_mask"))
        error = (velocity - (noise - latents)) ** 2
        valid = self._valid(self._latent_mask(batch["video_mask"]))
        if "view_mask" in batch:  # from here on, every row of latents has a weight of its own
            valid = valid[:, :, None] * token_mask(batch["view_mask"], latents.shape[2])[:, None]
            mask = mask[:, :, None]
        generated = Mean(matching.weighted_mean(error, valid * (1 - mask)), jnp.sum(valid * (1 - mask)))
        if self.config.train.average_generated_only:
            mean = generated
        else:  # conditioned frames count in the denominator, with no error of their own
            error = error * (1 - mask).reshape(*mask.shape, *[1] * (error.ndim - mask.ndim))
            mean = Mean(matching.weighted_mean(error, valid), jnp.sum(valid))
        loss = Mean(VIDEO_LOSS_SCALE * mean.value, mean.weight)
        return loss.value, {"loss": loss, "video_mse": generated}

    def action_loss(self, params: Params, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Flow matching on action chunks, given the frozen backbone's view of the true video noised to a random τ_v (SPEC 7).

        Args:
            batch: as for `video_loss`, and normalised `proprio` (b o p), `actions` (b a m), `action_mask` bool (b a). Of mixtures
                also `action_dims` and `embodiment` as in `Robots`.
            draws: of `draw`. All draws of a sample share its hidden states, and their keys and values.

        Returns:
            The loss to differentiate, and metrics: `loss` itself and the unscaled error `action_mse`.
        """
        robots, video_time, noise = Robots.of(batch), draws["video_time"], draws["actions"]
        hidden = self.hidden_of_noised_video(params, batch, draws)
        decoder = self.module("decoder", params)
        context = decoder.encode_context(jax.lax.stop_gradient(hidden), self._context_mask(robots.view_mask))

        weights = self._valid(batch["action_mask"])
        if robots.action_dims is not None:  # the others stay at zero, here and in `decode_actions`
            dims = robots.action_dims[:, None]
            weights, noise = weights[:, :, None] * dims, noise * dims[:, None]
        # Every draw is a chunk of its own.
        time, noise, dropped = (x.reshape(-1, *x.shape[2:]) for x in (draws["action_time"], noise, draws["dropped"]))
        actions = each_chunk(batch["actions"], len(noise))
        noised = matching.interpolate(actions, noise, time)
        velocity = self._action_velocity(decoder, batch["proprio"], noised, time, video_time, context, dropped, robots.embodiment)
        mean = matching.weighted_mean((velocity - (noise - actions)) ** 2, each_chunk(weights, len(noise)))
        mse, loss = Mean(mean, jnp.sum(weights)), Mean(ACTION_LOSS_SCALE * mean, jnp.sum(weights))
        return loss.value, {"loss": loss, "action_mse": mse}

    def hidden_of_noised_video(self, params: Params, batch: Batch, draws: Draws) -> Float[Array, "b k d"]:
        """Hidden states of a batch's whole windows, their future latents noised to the τ_v that were drawn."""
        latents, time = self.window_latents(params, batch), draws["video_time"]
        noised = matching.interpolate(latents, draws["video"], time)
        mask = matching.condition_mask(jnp.full(len(latents), self.config.data.past_latents), latents.shape[1])
        return self._hidden(params, latents, mask, noised, time, batch["text"], batch.get("view_mask"))

    # Sampling. Noise is an argument, so that a sample is a function of it whatever drew it.

    def draw_noise(self, key: jax.Array, batch: int) -> Noise:
        """Noise for `batch` samples of a window and of its action chunk."""
        video_key, action_key = jax.random.split(key)
        shapes = self._noise_shapes(batch)
        return {
            "video": jax.random.normal(video_key, shapes["video"]),
            "actions": jax.random.normal(action_key, shapes["actions"]),
        }

    def policy_noise(self, seed: int, batch: int, query: int = 0) -> Noise:
        """Noise as `policy.noise` has it: of (seed, query), or the published streams, which start anew at every query."""
        if self.config.policy.noise == "numpy":
            return {name: jnp.asarray(matching.numpy_noise(seed, shape)) for name, shape in self._noise_shapes(batch).items()}
        return self._draw_noise(jax.random.fold_in(jax.random.key(seed), query), batch)

    def sample_video(
        self,
        params: Params,
        past_video: UInt8[Array, "b f y x 3"],
        text: Text,
        noise: Latents,
        negative_text: Text | None = None,
        guidance: float = 0.0,
        view_mask: ViewMask | None = None,
    ) -> UInt8[Array, "b 4*t-3 y x 3"]:
        """A whole window of video that continues the observed frames, by the full solver and its final clean pass (SPEC 5).

        Args:
            past_video: 1 + 4n frames of any supported size.
            noise: of the whole window's latents; its shape says how long that is.
            negative_text: rows of the prompt to move away from; None for no guidance, at half the cost.
            guidance: g in x̂₀ + g·(x̂₀ − x̂₀(negative prompt)), one less than the scale of other codes (SPEC 2).
            view_mask: False for views that are not given; what is made of those means nothing.
        """
        past = self.encode_video(params, past_video)
        return self.decode_video(params, self.sample_latents(params, past, text, noise, negative_text, guidance, view_mask))

    def sample_latents(
        self,
        params: Params,
        past: Past,
        text: Text,
        noise: Latents,
        negative_text: Text | None = None,
        guidance: float = 0.0,
        view_mask: ViewMask | None = None,
    ) -> Latents:
        """`sample_video` from and to latents."""
        sigmas = solvers.karras_sigmas(self.config.policy.video_steps)
        clean, mask = self._given(past, noise.shape[1])
        predict_x0 = self._denoiser(params, clean, mask, text, negative_text, guidance, view_mask)
        x = solvers.solve_video(predict_x0, sigmas[0] * noise, sigmas)
        return predict_x0(x, jnp.float32(sigmas[-1]))

    def sample_path(
        self, params: Params, past: Past, text: Text, noise: Latents, steps: Sequence[int], view_mask: ViewMask | None = None
    ) -> list[Latents]:
        """The x_τ that `sample_hidden` would read the backbone at after each of `steps`, in one run through the video sampler."""
        sigmas = solvers.karras_sigmas(self.config.policy.video_steps)[: steps[-1] + 1]
        clean, mask = self._given(past, noise.shape[1])
        denoiser = self._denoiser(params, clean, mask, text, view_mask=view_mask)
        path = solvers.video_path(denoiser, sigmas[0] * noise, sigmas, steps)
        return [(1 - matching.flow_time(sigma)) * x for sigma, x in zip(sigmas[list(steps)], path, strict=True)]

    def hidden_at(
        self,
        params: Params,
        past: Past,
        x_tau: Latents,
        video_time: Float[Array, " b"],
        text: Text,
        view_mask: ViewMask | None = None,
    ) -> Float[Array, "b k d"]:
        """Hidden states of any window latents x_τ at the flow times τ_v, the observed frames given."""
        clean, mask = self._given(past, x_tau.shape[1])
        return self._hidden(params, clean, mask, x_tau, video_time, text, view_mask)

    def sample_hidden(
        self, params: Params, past_video: UInt8[Array, "b f y x 3"], text: Text, noise: Latents, view_mask: ViewMask | None = None
    ) -> tuple[Float[Array, "b k d"], Float[Array, " b"]]:
        """Hidden states where the policy stops the video sampler (SPEC 5.1), and the flow time τ_v there.

        Stop step 0 is a single pass through the first `hidden_block` blocks, on pure noise.
        """
        return self.hidden_after(params, self.encode_video(params, past_video), text, noise, view_mask)

    @jax.named_scope("video")
    def hidden_after(
        self, params: Params, past: Past, text: Text, noise: Latents, view_mask: ViewMask | None = None
    ) -> tuple[Float[Array, "b k d"], Float[Array, " b"]]:
        """`sample_hidden` from latents of the observed frames."""
        sigmas = solvers.stopping_sigmas(self.config.policy)
        stop_time = self.config.policy.stop_time or matching.flow_time(sigmas[-1])
        clean, mask = self._given(past, noise.shape[1])
        time = jnp.full(len(clean), stop_time, jnp.float32)
        if len(sigmas) == 1:
            x_tau = stop_time * noise
        else:
            denoiser = self._denoiser(params, clean, mask, text, view_mask=view_mask)
            x_tau = (1 - stop_time) * solvers.solve_video(denoiser, sigmas[0] * noise, sigmas)
        return self._hidden(params, clean, mask, x_tau, time, text, view_mask), time

    def sample_actions(
        self,
        params: Params,
        past_video: UInt8[Array, "b f y x 3"],
        proprio: Float[Array, "b o p"],
        text: Text,
        noise: Noise,
        robots: Robots = ALIKE,
        prefix: Prefix | None = None,
    ) -> Float[Array, "b a m"]:
        """Normalised action chunks: one partial video pass, then the action flow over a context encoded once.

        Given a prefix, chunks are led to continue it, `policy.guidance_clip` bounding how hard (see `flow.inpainting`).
        """
        hidden, video_time = self.sample_hidden(params, past_video, text, noise["video"], robots.view_mask)
        return self.decode_actions(params, hidden, video_time, proprio, noise["actions"], robots, prefix)

    def decode_actions(
        self,
        params: Params,
        hidden: Float[Array, "b k d"],
        video_time: Float[Array, " b"],
        proprio: Float[Array, "b o p"],
        noise: Float[Array, "n a m"],
        robots: Robots = ALIKE,
        prefix: Prefix | None = None,
    ) -> Float[Array, "n a m"]:
        """The action flow from noise to a normalised chunk, by Euler steps; arguments as for `sample_actions`."""
        context = self.action_context(params, hidden, robots)
        return self.solve_actions(params, context, video_time, proprio, noise, robots, prefix)

    @jax.named_scope("context")
    def action_context(self, params: Params, hidden: Float[Array, "b k d"], robots: Robots = ALIKE) -> Context:
        """Keys and values of the decoder's cross-attention to hidden states."""
        decoder = self.module("decoder", params)
        return decoder.encode_context(hidden.astype(self.dtype("decoder")), self._context_mask(robots.view_mask))

    def solve_actions(
        self,
        params: Params,
        context: Context,
        video_time: Float[Array, " b"],
        proprio: Float[Array, "b o p"],
        noise: Float[Array, "n a m"],
        robots: Robots = ALIKE,
        prefix: Prefix | None = None,
    ) -> Float[Array, "n a m"]:
        """`decode_actions` from a context. Noise may be of several chunks a sample, those of a sample next to each other."""
        decoder, chunks = self.module("decoder", params), len(noise)
        dims = 1.0 if robots.action_dims is None else each_chunk(robots.action_dims[:, None], chunks)

        def velocity(x: Float[Array, "n a m"], time: Float[Array, ""], /) -> Float[Array, "n a m"]:
            times = jnp.full(chunks, time)
            x = dims * x  # so that guidance does not move the dimensions that a robot lacks
            return dims * self._action_velocity(decoder, proprio, x, times, video_time, context, embodiment=robots.embodiment)

        if prefix is not None:
            target, weights = (each_chunk(part, chunks) for part in prefix)
            velocity = inpainting.guided(velocity, target, weights, self.config.policy.guidance_clip)
        state = jnp.bfloat16 if self.config.compat.bfloat16_action_state else jnp.float32
        return solvers.solve_euler(velocity, dims * noise, self.config.policy.action_steps, state)

    # Internals. Mathematics is float32, networks run in the configured precision.

    def _noise_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        data, decoder = self.config.data, self.config.decoder
        return {
            "video": (batch, *data.latent_shape, self.config.backbone.latent_channels),
            "actions": (batch, decoder.action_horizon, decoder.action_dim),
        }

    def _video_velocity(
        self, params: Params, inputs: Latents, times: PerFrame, text: Text, mask: PerFrame, view_mask: ViewMask | None = None
    ) -> Latents:
        dtype = self.dtype("backbone")
        backbone = self.module("backbone", params)
        return backbone(inputs.astype(dtype), times, text.astype(dtype), mask, view_mask=view_mask).astype(jnp.float32)

    def _hidden(
        self,
        params: Params,
        clean: Latents,
        mask: PerFrame,
        x_tau: Latents,
        time: Float[Array, " b"],
        text: Text,
        view_mask: ViewMask | None = None,
    ) -> Float[Array, "b k d"]:
        dtype, stop = self.dtype("backbone"), self.config.backbone.hidden_block
        inputs, times = matching.frame_replacement(clean, x_tau, time, mask)
        backbone = self.module("backbone", params)
        hidden = backbone.hidden(inputs.astype(dtype), times, text.astype(dtype), mask, view_mask=view_mask, stop=stop)
        return hidden.reshape(len(hidden), -1, hidden.shape[-1])

    def _action_velocity(
        self,
        decoder: ActionDecoder,
        proprio: Float[Array, "b o p"],
        x_tau: Float[Array, "n a m"],
        time: Float[Array, " n"],
        video_time: Float[Array, " b"],
        context: Context,
        dropped: Bool[Array, " n"] | None = None,
        embodiment: Int[Array, " b"] | None = None,
    ) -> Float[Array, "n a m"]:
        dtype = self.dtype("decoder")
        scaled = matching.scale_to_unit_variance(x_tau, time).astype(dtype)
        return decoder(proprio.astype(dtype), scaled, time, video_time, context, dropped, embodiment).astype(jnp.float32)

    def _valid(self, mask: Bool[Array, "b n"]) -> Float[Array, "b n"]:
        """Weights in the loss of what a data mask calls real or padded."""
        return mask.astype(jnp.float32) if self.config.train.mask_padding else jnp.ones(mask.shape)

    def _context_mask(self, view_mask: ViewMask | None) -> Bool[Array, "b k"] | None:
        """Which of a window's hidden states belong to views that are there."""
        if view_mask is None:
            return None
        (frames, *size), (_, *patch) = self.config.data.latent_shape, self.config.backbone.patch
        return jnp.tile(token_mask(view_mask, size[0] // patch[0] * (size[1] // patch[1])), frames)

    def _latent_mask(self, video_mask: Bool[Array, "b f"]) -> Bool[Array, "b 1+f//4"]:
        """True for latent frames all of whose pixel frames are real."""
        groups = video_mask[:, 1:].reshape(len(video_mask), -1, 4).all(axis=-1)
        return jnp.concatenate([video_mask[:, :1], groups], axis=1)

    def _given(self, past: Past, frames: int) -> tuple[Latents, PerFrame]:
        """The observed latent frames with zeros up to `frames`, and the mask of the observed ones."""
        clean = jnp.pad(past, [(0, 0), (0, frames - past.shape[1]), (0, 0), (0, 0), (0, 0)])
        return clean, matching.condition_mask(jnp.full(len(past), past.shape[1]), frames)

    def _denoiser(
        self,
        params: Params,
        clean: Latents,
        mask: PerFrame,
        text: Text,
        negative_text: Text | None = None,
        guidance: float = 0.0,
        view_mask: ViewMask | None = None,
    ) -> solvers.Denoiser:
        """(x, σ) → x̂₀, with the observed frames given (SPEC 4.1)."""

        def predict_x0(x: Latents, sigma: Float[Array, ""]) -> Latents:
            time = jnp.full(len(x), matching.flow_time(sigma))
            x_tau = (1 - time[0]) * x
            inputs, times = matching.frame_replacement(clean, x_tau, time, mask)
            velocity = self._video_velocity(params, inputs, times, text, mask, view_mask)
            if negative_text is not None:  # guides by velocities, in which x̂₀ is linear
                velocity += guidance * (velocity - self._video_velocity(params, inputs, times, negative_text, mask, view_mask))
            return jnp.where(mask[..., None, None, None] > 0, clean, matching.denoised(x_tau, velocity, time))

        return predict_x0
