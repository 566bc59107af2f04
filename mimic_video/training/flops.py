"""Model FLOPs of training steps and of policies, and what accelerators can do: the one source of every reported utilisation.

Only matrix products count, at two operations per multiply-add, attention's two among them. What is computed again to save
memory does not. A product with a weight is done once forward, once more for the gradient of the weight if that is trained, and
once more for the gradient of its input if anything before it is trained.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from mimic_video.config import ExperimentConfig
from mimic_video.flow.solvers import stopping_sigmas
from mimic_video.models.action_decoder import embedder_widths
from mimic_video.models.lora import has_name
from mimic_video.models.patch_tokenizer import CHANNELS, PATCH
from mimic_video.models.wan_vae import MULTIPLES, TIME_RESAMPLED
from mimic_video.stages import TRAINED


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of one optimisation step over the whole batch, by what they are spent on.

    Attributes:
        tokenizer: encoding frames; zero if the latents were precomputed. No part of `model`: it is no part of the models.
        backbone, decoder: products with weights.
        backbone_attention, decoder_attention: queries with keys, and weights with values.
        adapters: merging low-rank adapters into the weights, and their gradients from the weights'.
    """

    tokenizer: float
    backbone: float
    backbone_attention: float
    decoder: float
    decoder_attention: float
    adapters: float

    @property
    def model(self) -> float:
        """All but the tokenizer's: what utilisation is measured by."""
        return self.attention + self.backbone + self.decoder + self.adapters

    @property
    def attention(self) -> float:
        return self.backbone_attention + self.decoder_attention


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products that are alike: `count` times (rows, inputs) · (inputs, outputs).

    Attributes:
        weight: path of the parameter in its network, without 'kernel'; empty for those of attention, between activations.
        live: whether the input depends on parameters of the same network that are trained.
        other_live: the same of the other factor, in attention.
    """

    rows: int
    inputs: int
    outputs: int
    weight: str = ""
    live: bool = True
    other_live: bool = True
    count: int = 1

    @property
    def forward(self) -> float:
        return 2.0 * self.count * self.rows * self.inputs * self.outputs


def video_tokens(config: ExperimentConfig) -> int:
    """Tokens of one sample's video in the backbone, and hidden states that the decoder attends to."""
    (frames, height, width, _), (_, rows, columns) = config.latent_shape, config.backbone.patch
    return len(config.data.cameras) * frames * (height // rows) * (width // columns)


def step_flops(config: ExperimentConfig) -> StepFlops:
    """Of one optimisation step of `config.stage`.

    In stage `action` the first `hidden_block` blocks of the frozen backbone and the keys and values of the decoder's context are
    computed once a sample, the rest of the decoder `train.action_draws` times.
    """
    batch, action = config.train.batch_size, config.stage == "action"
    backbone = list(backbone_products(config, config.backbone.hidden_block if action else None))
    decoder = list(decoder_products(config)) if action else []
    totals = {
        f"{name}{kind}": batch
        * sum(_passes(config, name, product) * product.forward for product in products if bool(product.weight) == (kind == ""))
        for name, products in (("backbone", backbone), ("decoder", decoder))
        for kind in ("", "_attention")
    }
    adapted = (product for product in (decoder if action else backbone) if has_name(product.weight, config.lora.targets))
    merged = sum(
        3 * 2.0 * config.lora.rank * inputs * outputs * blocks
        for _, inputs, outputs, blocks in {_shape(product) for product in adapted}
    )
    tokenizer = 0.0 if config.data.latents else batch * tokenizer_forward(config, config.data.num_frames)
    return StepFlops(tokenizer=tokenizer, adapters=merged, **totals)


def backbone_products(config: ExperimentConfig, stop: int | None) -> Iterator[Product]:
    """Of one sample's pass through the first `stop` blocks; None for the whole backbone."""
    net, (frames, *_), tokens = config.backbone, config.latent_shape, video_tokens(config)
    channels = config.latent_shape[-1]
    width, text, patch = net.width, config.text.rows, math.prod(net.patch)
    blocks = net.num_blocks if stop is None else stop
    yield Product(tokens, (channels + 2) * patch, width, "patch_proj", live=False)
    yield Product(frames, width, width, "time_in", live=False)
    yield Product(frames, width, 3 * width, "time_out", live=_trained(config, "backbone", "time_in"))
    yield from _attention(config, "backbone", "self_attn", tokens, tokens, (tokens, width, True), blocks)
    yield from _attention(config, "backbone", "cross_attn", tokens, text, (text, net.text_width, False), blocks)
    yield from _mlp(tokens, width, net.mlp_ratio, blocks)
    modulated = Modulated(frames, width, net.adaln_lora_dim, width)
    yield from _block_modulations(config, "backbone", modulated, blocks)
    if stop is None:
        yield from _modulation(config, "backbone", "final_modulation", modulated, 2, 1)
        yield Product(tokens, width, channels * patch, "final_proj")


def decoder_products(config: ExperimentConfig) -> Iterator[Product]:
    """Of one sample: its context once, and every action noise draw."""
    net, draws, context = config.decoder, config.train.action_draws, video_tokens(config)
    width, rank, acted = net.width, net.time_rank, draws * config.data.action_horizon
    tokens = draws * (bool(net.embodiments) + 1 + config.data.action_horizon)
    blocks, whole = net.num_blocks, config.lora.rank == 0
    for name, rows, inputs in (("proprio", 1, net.proprio_dim), ("action", acted, net.action_dim)):
        for layer, (a, b) in enumerate(itertools.pairwise(embedder_widths(inputs, width))):
            yield Product(rows, a, b, f"{name}_embedder/layers/{layer}", live=layer > 0 and whole)
    for name, rows in (("action", tokens), ("video", 1)):
        yield Product(rows, width, width, f"time_embedding/{name}_proj", live=False)
        yield Product(rows, width, rank, f"time_embedding/{name}_rank", live=whole)
    yield Product(tokens, rank, 3 * width, "time_embedding/shared_proj", live=whole)
    yield from _attention(config, "decoder", "cross_attn", tokens, context, (context, config.backbone.width, whole), blocks)
    yield from _attention(config, "decoder", "self_attn", tokens, tokens // draws, (tokens, width, True), blocks)
    yield from _mlp(tokens, width, net.mlp_ratio, blocks)
    modulated = Modulated(tokens, rank, net.adaln_lora_dim, width)
    yield from _block_modulations(config, "decoder", modulated, blocks)
    yield from _modulation(config, "decoder", "final_modulation", modulated, 2, 1)
    yield Product(tokens, width, net.action_dim, "final_proj")


def _attention(
    config: ExperimentConfig, network: str, name: str, queries: int, keys: int, context: tuple[int, int, bool], blocks: int
) -> Iterator[Product]:
    """Of each query to `keys` keys, made of `context`: its rows, its width, and whether it depends on what is trained."""
    path, width, (rows, inputs, live) = f"blocks/{name}", getattr(config, network).width, context
    live_keys, live_values = (live or _trained(config, network, f"{path}/{projection}") for projection in ("k_proj", "v_proj"))
    yield Product(queries, width, width, f"{path}/q_proj", count=blocks)
    yield Product(rows, inputs, width, f"{path}/k_proj", live, count=blocks)
    yield Product(rows, inputs, width, f"{path}/v_proj", live, count=blocks)
    yield Product(queries, width, keys, other_live=live_keys, count=blocks)
    yield Product(queries, keys, width, other_live=live_values, count=blocks)
    yield Product(queries, width, width, f"{path}/out_proj", count=blocks)


def _mlp(rows: int, width: int, ratio: float, blocks: int) -> Iterator[Product]:
    yield Product(rows, width, int(width * ratio), "blocks/mlp/up", count=blocks)
    yield Product(rows, int(width * ratio), width, "blocks/mlp/down", count=blocks)


class Modulated(NamedTuple):
    """Sizes of every modulation of a network."""

    rows: int
    time: int
    rank: int
    width: int


def _block_modulations(config: ExperimentConfig, network: str, sizes: Modulated, blocks: int) -> Iterator[Product]:
    for name in ("self_attn", "cross_attn", "mlp"):
        yield from _modulation(config, network, f"blocks/{name}_modulation", sizes, 3, blocks)


def _modulation(
    config: ExperimentConfig, network: str, path: str, sizes: Modulated, parts: int, blocks: int
) -> Iterator[Product]:
    whole = config.lora.rank == 0
    yield Product(sizes.rows, sizes.time, sizes.rank, f"{path}/down", whole, count=blocks)
    live = whole or _trained(config, network, f"{path}/down")
    yield Product(sizes.rows, sizes.rank, parts * sizes.width, f"{path}/up", live, count=blocks)


def _passes(config: ExperimentConfig, network: str, product: Product) -> int:
    """How often a product of its size is done: forward, for the weight's and for the input's gradient."""
    if TRAINED[config.stage] != network:
        return 1
    other = _trained(config, network, product.weight) if product.weight else product.other_live
    return 1 + product.live + other


def _trained(config: ExperimentConfig, network: str, weight: str) -> bool:
    everything = config.lora.rank == 0
    return TRAINED[config.stage] == network and (everything or has_name(weight, config.lora.targets + config.lora.trained))


def _shape(product: Product) -> tuple[str, int, int, int]:
    return product.weight, product.inputs, product.outputs, product.count


@dataclasses.dataclass(frozen=True)
class PolicyFlops:
    """Of one robot's action chunk, by the policy's stages.

    Attributes:
        encode: of the observed frames.
        video: every pass of the video sampler, and the one that ends at `hidden_block`.
        context: keys and values of the decoder's cross-attention, once.
        steps: everything else of the decoder, at every Euler step.
    """

    encode: float
    video: float
    context: float
    steps: float

    @property
    def total(self) -> float:
        return self.encode + self.video + self.context + self.steps


def policy_flops(config: ExperimentConfig) -> PolicyFlops:
    """Of a chunk as `config.policy` samples it."""
    passes = len(stopping_sigmas(config.policy)) - 1
    full, partial = (
        sum(product.forward for product in backbone_products(config, stop)) for stop in (None, config.backbone.hidden_block)
    )
    once = dataclasses.replace(config, train=dataclasses.replace(config.train, action_draws=1))
    context, step = 0.0, 0.0
    for product in decoder_products(once):
        if product.weight in ("blocks/cross_attn/k_proj", "blocks/cross_attn/v_proj"):
            context += product.forward
        else:
            step += product.forward
    encode = tokenizer_forward(config, config.data.past_frames)
    return PolicyFlops(encode=encode, video=passes * full + partial, context=context, steps=config.policy.action_steps * step)


def tokenizer_forward(config: ExperimentConfig, frames: int) -> float:
    """Of encoding that many frames of one sample."""
    (height, width), views = config.data.image_size, len(config.data.cameras)
    if config.tokenizer.kind == "wan":
        return views * wan_encoder_forward(config.tokenizer.width, frames, height, width)
    return views * 2.0 * (height // PATCH) * (width // PATCH) * (3 * PATCH**2) * CHANNELS * frames


def wan_encoder_forward(base: int, frames: int, height: int, width: int) -> float:
    """Of the Wan VAE's encoder. Zeros around a picture count; those before its first frame do not, as nothing multiplies them."""

    def causal(pixels: int, frames: int, inputs: int, outputs: int) -> float:
        return 2.0 * 9 * pixels * (1 + 3 * (frames - 1)) * inputs * outputs

    def residual(pixels: int, frames: int, inputs: int, outputs: int) -> float:
        shortcut = 2.0 * pixels * frames * inputs * outputs if inputs != outputs else 0.0
        return causal(pixels, frames, inputs, outputs) + causal(pixels, frames, outputs, outputs) + shortcut

    pixels, channels = height * width, base
    total = causal(pixels, frames, 3, base)
    for stage, multiple in enumerate(MULTIPLES):
        outputs = multiple * base
        total += residual(pixels, frames, channels, outputs) + residual(pixels, frames, outputs, outputs)
        channels = outputs
        if stage < len(TIME_RESAMPLED):
            pixels //= 4
            total += 2.0 * 9 * pixels * frames * channels**2
            if TIME_RESAMPLED[stage]:
                frames = 1 + (frames - 1) // 2
                total += 2.0 * 3 * pixels * (frames - 1) * channels**2
    projections, scores = 4 * 2.0 * pixels * frames * channels**2, 2 * 2.0 * pixels**2 * frames * channels
    total += 2 * residual(pixels, frames, channels, channels) + projections + scores
    return total + causal(pixels, frames, channels, 2 * CHANNELS) + 2.0 * pixels * frames * (2 * CHANNELS) ** 2


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one accelerator chip can do at best.

    Attributes:
        flops: bfloat16 operations of its matrix units per second.
        hbm: bytes of its memory that programs can use.
        hbm_rate: bytes per second between memory and chip.
        link_rate: bytes per second that it sends to other chips over all of its links, and as many that it receives.
    """

    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float


# By what JAX's `device_kind` contains; the first match counts. From Google's pages on each TPU version ("System architecture",
# cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) and NVIDIA's data sheets of the A100, H100 and H200 (SXM, without sparsity). The
# memory of TPUs is what their compiler leaves to programs, which its errors state.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.2e12, 300e9),
    "TPU v5 lite": Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 31.25 * 2**30, 1638e9, 400e9),
    "A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip behind a device; None for kinds that `CHIPS` lacks, and for CPUs."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind), None)


def mfu(flops_per_second: float, devices: list[jax.Device]) -> float | None:
    """Model FLOPs utilisation: the share of all the devices' peak that `flops_per_second` is; None where that is not known."""
    chip = chip_of(devices[0])
    return None if chip is None else flops_per_second / (chip.flops * len(devices))
