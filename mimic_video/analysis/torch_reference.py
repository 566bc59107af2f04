"""The policy's networks in PyTorch: what its latency is compared with.

The backbone is that of Hugging Face's diffusers, cut off at the block that the decoder reads; the decoder is written here, as in
SPEC 6. Both take their parameters from a policy and compute its chunk, from the latents of the observed frames on, on the
GPU if there is one. Attention is PyTorch's scaled-dot-product attention; nothing goes through torch.compile.
"""

import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimic_video.batch import Observation
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.flow import matching, solvers
from mimic_video.policy.latency import percentiles
from mimic_video.policy.policy import Policy
from mimic_video.weights.diffusers import DIFFUSERS_DIT_NAMES
from mimic_video.weights.published import ACTION_DECODER_NAMES, export_params


def times(policy: Policy, batch: int, repeats: int) -> dict[str, Any]:
    """Percentiles of "video", a partial pass of the backbone, and of all Euler steps of the decoder with keys and values of its
    context "recomputed" at every step, as published, and "cached"; and how far its chunk is from the policy's.

    Raises:
        ConfigError: for what the published system has not: other stop steps than 0, several cameras, tokens of robots.
    """
    import torch

    config, device = policy.config, "cuda" if jax.default_backend() == "gpu" else "cpu"
    fields = {
        "policy.stop_step": config.policy.stop_step,
        "policy.stop_time": config.policy.stop_time,
        "decoder.embodiments": config.decoder.embodiments,
        "data.cameras": config.data.views - 1,
    }
    for field, value in fields.items():
        if value:
            raise ConfigError(f"config field '{field}' is set; --reference=torch has no counterpart for it")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--reference=torch needs a PyTorch that sees the GPU: a comparison with its CPU would mean nothing")
    dtype = getattr(torch, config.precision)

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array, np.float32)).to(device)

    random, vam = np.random.default_rng(1), policy.program.vam
    images = random.integers(0, 256, (batch, 1, config.data.past_frames, *config.data.image_size, 3), np.uint8)
    proprio = jnp.zeros((batch, 1, config.decoder.proprio_dim))
    text = np.tile(random.standard_normal((1, config.text.rows, config.backbone.text_width), np.float32), (batch, 1, 1))
    noise = policy.program.noise(jax.random.key_data(jax.random.key(0)), batch)
    observation = Observation(text, images, proprio=proprio)
    conditioning = jax.jit(vam.condition)(policy.params, observation)
    expected = np.asarray(jax.jit(vam.sample_actions)(policy.params, observation, noise))
    stop = float(matching.flow_time(solvers.karras_sigmas(config.policy.video_steps)[0]))
    past, video_noise = conditioning.past[:, 0], noise["video"][:, 0]
    mask = np.arange(video_noise.shape[1]) < past.shape[1]
    latents = jnp.where(
        mask[:, None, None, None], jnp.pad(past, [(0, 0), (0, len(mask) - past.shape[1])] + [(0, 0)] * 3), stop * video_noise
    )
    frame_times = tensor(np.where(mask, matching.CONDITION_TIME, stop))
    backbone = _Backbone(policy, tensor, device, dtype)
    decoder = _Decoder(
        config, {name: tensor(value).to(dtype) for name, value in export_params(policy.params["decoder"], ACTION_DECODER_NAMES)}
    )
    video = (tensor(latents).movedim(-1, 1).to(dtype), frame_times, tensor(text).to(dtype), tensor(mask))
    actions = (tensor(proprio).to(dtype), tensor(noise["actions"]), torch.full((batch, 1), stop, device=device))

    def timed(call: Callable[[], Any]) -> dict[str, float]:
        def finished() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return percentiles(finished, repeats)

    with torch.inference_mode():
        hidden = backbone(*video)
        chunk = decoder.sample(hidden, *actions, cached=True)
        error = float(np.abs(chunk.float().cpu().numpy() - expected).max() / expected.std())
        return {
            "version": torch.__version__,
            "device": device,
            "chunk_error_over_std": round(error, 6),
            "video": timed(lambda: backbone(*video)),
            "recomputed": timed(lambda: decoder.sample(hidden, *actions, cached=False)),
            "cached": timed(lambda: decoder.sample(hidden, *actions, cached=True)),
        }


class _Backbone:
    """diffusers' network up to the hidden state."""

    def __init__(self, policy: Policy, tensor: Any, device: str, dtype: Any):
        import torch
        from diffusers.models.transformers import transformer_cosmos

        if not hasattr(transformer_cosmos, "transforms"):  # torchvision, of which it uses one function
            resize = lambda image, size, interpolation: torch.nn.functional.interpolate(image, size, mode="nearest")  # noqa: E731
            transformer_cosmos.transforms = types.SimpleNamespace(
                functional=types.SimpleNamespace(resize=resize), InterpolationMode=types.SimpleNamespace(NEAREST="nearest")
            )
        net, channels = policy.config.backbone, policy.config.latent_shape[-1]
        with torch.device("meta"):
            self._net = transformer_cosmos.CosmosTransformer3DModel(
                in_channels=channels + 1,
                out_channels=channels,
                num_attention_heads=net.num_heads,
                attention_head_dim=net.width // net.num_heads,
                num_layers=net.hidden_block,
                mlp_ratio=net.mlp_ratio,
                text_embed_dim=net.text_width,
                adaln_lora_dim=net.adaln_lora_dim,
                patch_size=net.patch,
                rope_scale=net.rope_ratio,
                extra_pos_embed_type=None,
            )
        params = dict(policy.params["backbone"])
        params["blocks"] = jax.tree.map(lambda leaf: leaf[: net.hidden_block], params["blocks"])
        state = {name: tensor(value).to(dtype) for name, value in export_params(params, DIFFUSERS_DIT_NAMES)}
        self._net.load_state_dict(state, strict=False, assign=True)
        for module in self._net.modules():  # theirs normalises queries and keys with 1e-5, the published network with 1e-6
            if isinstance(module, transformer_cosmos.Attention):
                module.norm_q.eps = module.norm_k.eps = 1e-6
        missing = [name for name, value in self._net.named_parameters() if value.is_meta]
        if missing:
            raise RuntimeError(f"diffusers' backbone has parameters that ours lacks: {missing}")
        self._padding = torch.zeros(1, 1, *policy.config.data.image_size, device=device, dtype=dtype)
        self._net.norm_out.register_forward_pre_hook(self._keep)

    def _keep(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self._hidden = arguments[0]

    def __call__(self, latents: Any, frame_times: Any, text: Any, mask: Any) -> Any:
        b, _, t, h, w = latents.shape
        condition = mask.reshape(1, 1, t, 1, 1).expand(b, 1, t, h, w).to(latents.dtype)
        self._net(
            hidden_states=latents,
            timestep=frame_times.reshape(1, 1, t, 1, 1).expand(b, 1, t, 1, 1),
            encoder_hidden_states=text,
            condition_mask=condition,
            padding_mask=self._padding,
            return_dict=False,
        )
        return self._hidden.reshape(b, -1, self._hidden.shape[-1])


class _Decoder:
    """SPEC 6.2 from tensors by their published names (6.3)."""

    def __init__(self, config: ExperimentConfig, tensors: dict[str, Any]):
        self._config, self._tensors = config.decoder, tensors
        self._steps = config.policy.action_steps

    def sample(self, hidden: Any, proprio: Any, noise: Any, video_time: Any, cached: bool) -> Any:
        """The Euler steps (SPEC 7)."""
        import torch

        kept = self._keys_values(hidden) if cached else None
        x = noise
        for step in range(self._steps):
            time = 1 - step / self._steps
            scaled = (x / math.sqrt((1 - time) ** 2 + time**2)).to(proprio.dtype)
            context = kept or self._keys_values(hidden)
            x = x - self._velocity(proprio, scaled, time, video_time, context).to(torch.float32) / self._steps
        return x

    def _keys_values(self, hidden: Any) -> list[tuple[Any, Any]]:
        import torch.nn.functional as F

        context = F.layer_norm(hidden, hidden.shape[-1:], self._tensors["ctx_norm.weight"], self._tensors["ctx_norm.bias"], 1e-6)
        return [self._pair(f"blocks.{i}.cross_attn", context) for i in range(self._config.num_blocks)]

    def _velocity(self, proprio: Any, actions: Any, time: float, video_time: Any, context: list[tuple[Any, Any]]) -> Any:
        import torch
        import torch.nn.functional as F

        tensors = self._tensors
        x = torch.cat([self._embed(proprio, "obs_embedder"), self._embed(actions, "action_embedder")], 1)
        x = x + tensors["pos_embedding"]
        times = torch.full(x.shape[:2], time, device=x.device)
        times[:, : proprio.shape[1]] = 1e-3
        a = F.silu(self._dense(self._features(times, x), "t_embedder.pair.proj_x"))
        v = F.silu(self._dense(self._features(video_time, x), "t_embedder.pair.proj_c"))
        b, c = "t_embedder.pair.B", "t_embedder.pair.C"
        z = self._dense(a, b) * self._dense(v, c) - tensors[f"{b}.bias"] * tensors[f"{c}.bias"]
        shared = self._dense(z, "t_embedder.pair.A")
        e = F.silu(F.rms_norm(z, z.shape[-1:], tensors["t_embedding_norm.weight"], 1e-6))
        for i in range(self._config.num_blocks):
            block = f"blocks.{i}"
            for layer in ("cross_attn", "self_attn", "mlp"):
                shift, scale, gate = (self._modulation(e, f"{block}.adaln_modulation_{layer}") + shared).chunk(3, -1)
                y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
                if layer == "mlp":
                    y = self._dense(F.gelu(self._dense(y, f"{block}.mlp.layer1")), f"{block}.mlp.layer2")
                else:
                    name = f"{block}.{layer}"
                    y = self._attend(y, name, context[i] if layer == "cross_attn" else self._pair(name, y))
                x = x + gate * y
        shift, scale = (self._modulation(e, "final_layer.adaln_modulation") + shared[..., : 2 * x.shape[-1]]).chunk(2, -1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self._dense(y, "final_layer.linear")[:, proprio.shape[1] :]

    def _attend(self, x: Any, name: str, keys_values: tuple[Any, Any]) -> Any:
        import torch.nn.functional as F

        out = F.scaled_dot_product_attention(self._heads(x, name, "q"), *keys_values)
        return self._dense(out.transpose(1, 2).flatten(2), f"{name}.output_proj")

    def _pair(self, name: str, context: Any) -> tuple[Any, Any]:
        return self._heads(context, name, "k"), self._heads(context, name, "v")

    def _heads(self, x: Any, name: str, part: str) -> Any:
        import torch.nn.functional as F

        heads = self._dense(x, f"{name}.{part}_proj").unflatten(-1, (self._config.num_heads, -1)).transpose(1, 2)
        return heads if part == "v" else F.rms_norm(heads, heads.shape[-1:], self._tensors[f"{name}.{part}_norm.weight"], 1e-6)

    def _dense(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _modulation(self, e: Any, name: str) -> Any:
        return self._dense(self._dense(e, f"{name}.1"), f"{name}.2")

    def _embed(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        layers = sum(key.startswith(f"{name}.layers.") and key.endswith("weight") for key in self._tensors)
        for layer in range(layers):
            x = self._dense(x if layer == 0 else F.gelu(x), f"{name}.layers.{2 * layer}")
        return x / math.sqrt(x.shape[-1])

    def _features(self, times: Any, like: Any) -> Any:
        import torch

        half = like.shape[-1] // 2
        periods = 0.004 * 1000 ** (torch.arange(half, dtype=torch.float64, device=like.device) / (half - 1))
        phases = 2 * math.pi / periods * times[..., None].double()
        return torch.cat([phases.sin(), phases.cos()], -1).to(like.dtype)
