"""Frozen, validated configuration for every part of the system.

Experiments are written as `ml_collections` files in `configs/`; `experiment_from` turns one into an `ExperimentConfig`
exactly once, at the edge. Everything below the launch scripts takes these dataclasses, so nothing in `mimic_video`
depends on ml_collections and an invalid experiment cannot travel further than this file.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from mimic_video.errors import ConfigError as ConfigError
from mimic_video.errors import nearest
from mimic_video.registry import BACKBONES, TEXT_ENCODERS, TOKENIZERS
from mimic_video.splits import parse_split


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"config field '{field}' is {value!r}; expected {expected}")


def _require_positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value > 0, f"{type(config).__name__}.{field}", value, "a positive number")


T = TypeVar("T")
OnResume = Literal["free", "extends", "fixed"]
Shaped = Literal["window", "tokenizer", "backbone", "decoder", "latents", "rounded_latents"]


def _field(default: T, help: str, on_resume: OnResume, shapes: str) -> T:
    """A field of a configuration: default, meaning, and what depends on it. Everything that treats fields by kind reads this.

    Args:
        on_resume: what a run that continues allows. "free" for what changes no sample and no formula, so that parameters stay the
            same to the bit, or to rounding where work is divided otherwise (`mesh`, `attention`, `micro_batches`, `remat`);
            "extends" for what may grow; "fixed" for the rest.
        shapes: what presupposes the value, of `Shaped`, with spaces between: the weights of "tokenizer", "backbone" or "decoder";
            the "window" that a network is trained on; precomputed "latents", or "rounded_latents" of a tokenizer that rounds.
    """
    return dataclasses.field(default=default, metadata={"help": help, "on_resume": on_resume, "shapes": tuple(shapes.split())})


def free(default: T, help: str) -> T:
    return _field(default, help, "free", "")


def fixed(default: T, help: str, shapes: str = "") -> T:
    return _field(default, help, "fixed", shapes)


def extends(default: T, help: str) -> T:
    return _field(default, help, "extends", "")


Path = Annotated[str, "path"]  # `~` is the home directory: `expanded_path`
Cameras = tuple[Literal["primary", "secondary", "wrist"], ...]
Normalization = Literal["identity", "variance", "squash", "squash_hard"]
Precision = Literal["float32", "bfloat16"]
Remat = Literal["none", "attention", "full", "offload"]
Schedule = Literal["constant", "cosine", "linear", "wsd"]
Statistics = Literal["robot", "dataset"]
Strategy = Literal["open_loop", "receding_horizon", "temporal_ensembling", "asynchronous", "real_time_chunking"]
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp/up", "mlp/down", "patch_proj", "time_in", "time_out")
_LORA_TRAINED = ("self_attn_modulation", "cross_attn_modulation", "mlp_modulation", "final_modulation")


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Random crops and colours in training; off as they stand. What is drawn holds for all frames of a camera's window."""

    crop_scale: tuple[float, float] = fixed((1.0, 1.0), "smallest and largest share of a frame's area; not of wrist cameras")
    crop_ratio: tuple[float, float] = fixed((1.0, 1.0), "smallest and largest width by height, as multiples of the frame's")
    brightness: float = fixed(0.0, "most that is added or taken, as a share of white")
    contrast: tuple[float, float] = fixed((1.0, 1.0), "smallest and largest factor, about middle grey")
    saturation: tuple[float, float] = fixed((1.0, 1.0), "smallest and largest factor")
    hue: float = fixed(0.0, "most that hues turn either way, as a share of a whole turn")

    def __post_init__(self):
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "data.augmentation.crop_scale", self.crop_scale, "0 < low <= high <= 1")
        for field in ("crop_ratio", "contrast", "saturation"):
            low, high = getattr(self, field)
            smallest = 0.0 if field == "saturation" else 1e-3
            _require(
                smallest <= low <= high,
                f"data.augmentation.{field}",
                (low, high),
                f"low <= high, both at least {smallest:g}",
            )
        _require(0 <= self.brightness < 1, "data.augmentation.brightness", self.brightness, "0 (off) or a share below 1")
        _require(0 <= self.hue <= 0.5, "data.augmentation.hue", self.hue, "0 (off) to 0.5, half a turn")

    @property
    def recolours(self) -> bool:
        return bool(self.brightness or self.hue) or not self.contrast == self.saturation == (1.0, 1.0)

    @property
    def on(self) -> bool:
        return self.recolours or not self.crop_scale == self.crop_ratio == (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where episodes come from and how one is cut into a training window.

    A window is anchored at one video frame: `past_frames` frames end there, `future_frames` follow, both at `video_hz`;
    `action_horizon` actions start `action_delay` seconds after the anchor, at `control_hz` (SPEC 8.3, 8.4).
    """

    video_dataset: str = free("", "RLDS or LeRobot folder for stage 1, which needs no actions, or a mixture by weight: 'A,B*2'")
    action_dataset: str = free("", "the same for stage 2; 'A,B*2;10000:A' changes weights at a step")
    root: Path = free("", "folder of Open-X datasets, which those fields may name by their name in the registry")
    train_split: str = fixed("train", "split that is trained on, or slices of it by episodes as TFDS has them: 'train[:50]'")
    validation_split: str = free("val", "the same that validation and evaluation read")
    image_size: tuple[int, int] = fixed((480, 640), "height, width in pixels, as the tokenizer sees them", "window latents")
    cameras: Cameras = fixed(("primary",), "of a sample, in the order of its views", "backbone latents")
    past_frames: int = fixed(5, "observed frames of a window", "window latents")
    future_frames: int = fixed(56, "frames of a window that the backbone predicts", "window latents")
    video_hz: float = fixed(5.0, "frames per second", "window latents")
    action_horizon: int = fixed(15, "actions of a chunk", "decoder")
    control_hz: float = fixed(5.0, "actions per second", "decoder")
    action_delay: float = fixed(0.2, "seconds from the current frame to the first action", "decoder")
    normalization: Normalization = fixed("variance", "of actions and proprioception (SPEC 7.1)", "decoder")
    raw_action_dims: tuple[int, ...] = fixed((), "dimensions that are not normalised: 6-D rotations", "decoder")
    raw_proprio_dims: tuple[int, ...] = fixed((), "the same of proprioception", "decoder")
    robots: tuple[tuple[str, str], ...] = fixed((), "(dataset, robot): whose a dataset is; else its entry's, or one of its own")
    statistics: Statistics = fixed("robot", "that normalise: of all datasets of a robot together, or of each 'dataset' alone")
    latents: Path = free("", "folder of launch/precompute_latents.py, read in training in place of frames; empty for frames")
    frame_cache_mb: int = free(512, "decoded frames of a dataset that are kept in host memory")
    workers: int = free(0, "processes that read windows; 0 reads in threads of the training process")
    skip_broken: bool = free(False, "leaves out episodes and windows that cannot be read, counted in the log, instead of ending")
    augmentation: AugmentationConfig = AugmentationConfig()

    def __post_init__(self):
        _require_positive(self, "past_frames", "future_frames", "video_hz", "action_horizon", "control_hz")
        _require(
            len(dict(self.robots)) == len(self.robots) and all(name and "/" not in name for _, name in self.robots),
            "data.robots",
            self.robots,
            "pairs (dataset, robot), each dataset once, names without '/'",
        )
        for field in ("train_split", "validation_split"):
            try:
                parse_split(getattr(self, field))
            except ValueError as error:
                raise ConfigError(f"config field 'data.{field}' is {getattr(self, field)!r}; expected {error}") from error
        _require(self.workers >= 0, "data.workers", self.workers, "0 (threads) or a number of processes")
        _require(self.action_delay >= 0, "data.action_delay", self.action_delay, "zero or more seconds")
        _require(
            self.cameras[:1] == ("primary",) and len(self.cameras) == len(set(self.cameras)),
            "data.cameras",
            self.cameras,
            "'primary', and maybe others after it",
        )
        _require(
            not (self.latents and self.augmentation.on),
            "data.latents",
            self.latents,
            "'', since data.augmentation changes frames anew in every epoch, and latents are computed once",
        )

    @property
    def views(self) -> int:
        """Cameras of a sample; a backbone tells several apart by a learned embedding, which published weights do not have."""
        return len(self.cameras)

    @property
    def num_frames(self) -> int:
        return self.past_frames + self.future_frames


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Video ↔ latents: the Wan 2.1 VAE (SPEC 1), or `pca`, which is fitted to data and keeps its shape contract."""

    kind: str = fixed("pca", "network: principal components, the Wan 2.1 VAE (wan), or a registered one", "tokenizer latents")
    fit_windows: int = fixed(512, "pca: windows that the basis is fitted on")
    width: int = fixed(96, "wan: channels of the first stage", "tokenizer")
    chunk_latents: int = free(1, "wan: latent frames coded in one pass; bounds memory, changes nothing else")

    def __post_init__(self):
        _require_positive(self, "fit_windows", "width", "chunk_latents")

    @property
    def network(self) -> Any:
        """The class that `kind` names, a `Tokenizer` of mimic_video/models/protocols.py, which knows its strides and channels."""
        return TOKENIZERS[self.kind]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Instruction → rows of text features: a T5 encoder (SPEC 2), or `hash`, one fixed random row per word, as a stand-in."""

    kind: str = fixed("hash", "encoder: random rows for words, T5 (t5), or a registered one", "backbone")
    rows: int = fixed(512, "of an instruction's features, padding included", "backbone")
    model: Path = free("", "t5: folder of the encoder and its tokenizer, or their Hugging Face name")
    cache: Path = free("", "t5: folder that keeps features of prompts; empty for none")
    precision: Precision = fixed("float32", "t5: of the encoder")

    def __post_init__(self):
        _require_positive(self, "rows")
        _require(self.kind != "t5" or bool(self.model), "text.model", self.model, "a T5 folder or name, since text.kind is 't5'")


@dataclasses.dataclass(frozen=True)
class VideoDiTConfig:
    """The video backbone (SPEC 3.1). Defaults are the 2B model."""

    kind: str = fixed("cosmos", "network: that of Cosmos-Predict2, or a registered one", "backbone")
    width: int = fixed(2048, "of a token", "backbone")
    num_blocks: int = fixed(28, "blocks of the transformer", "backbone")
    num_heads: int = fixed(16, "attention heads of a block", "backbone")
    mlp_ratio: float = fixed(4.0, "width of a block's MLP, as a multiple of `width`", "backbone")
    text_width: int = fixed(1024, "of a row of text features; that of text.model", "backbone")
    adaln_lora_dim: int = fixed(256, "rank of the modulation", "backbone")
    patch: tuple[int, int, int] = fixed((1, 2, 2), "t, h, w of a token in latent pixels", "backbone")
    rope_ratio: tuple[float, float, float] = fixed((1.0, 3.0, 3.0), "t, h, w extrapolation of positions", "backbone")
    hidden_block: int = fixed(20, "blocks run before the decoder reads the residual stream (SPEC 3.8)", "decoder")

    def __post_init__(self):
        _require_positive(self, "width", "num_blocks", "num_heads", "mlp_ratio", "text_width", "adaln_lora_dim")
        _require(self.width % self.num_heads == 0, "backbone.width", self.width, f"a multiple of num_heads={self.num_heads}")
        head_dim = self.width // self.num_heads
        _require(
            head_dim % 2 == 0 and head_dim >= 6,
            "backbone.num_heads",
            self.num_heads,
            f"an even head dimension of 6 or more, not {head_dim}",
        )
        _require(self.patch[0] == 1, "backbone.patch", self.patch, "a temporal patch of 1 (timesteps are per latent frame)")
        _require(
            0 <= self.hidden_block <= self.num_blocks,
            "backbone.hidden_block",
            self.hidden_block,
            f"0 to num_blocks={self.num_blocks}",
        )


@dataclasses.dataclass(frozen=True)
class ActionDecoderConfig:
    """The action decoder (SPEC 6.1). Defaults are the published Bridge decoder."""

    width: int = fixed(1024, "of a token", "decoder")
    num_blocks: int = fixed(24, "blocks of the transformer", "decoder")
    num_heads: int = fixed(8, "attention heads of a block", "decoder")
    mlp_ratio: float = fixed(4.0, "width of a block's MLP, as a multiple of `width`", "decoder")
    adaln_lora_dim: int = fixed(128, "rank of the modulation", "decoder")
    time_rank: int = fixed(1024, "rank of the embedding of both flow times", "decoder")
    proprio_dim: int = fixed(10, "width of proprioception; of several robots the widest", "decoder")
    action_dim: int = fixed(10, "width of actions; of several robots the widest", "decoder")
    proprio_dropout: float = fixed(0.2, "training only; the tokens are replaced by a learned mask token")
    embodiments: int = fixed(0, "robots that a learned token tells apart (data.robots); 0 for none, as published", "decoder")

    def __post_init__(self):
        _require_positive(
            self,
            "width",
            "num_blocks",
            "num_heads",
            "mlp_ratio",
            "adaln_lora_dim",
            "time_rank",
            "proprio_dim",
            "action_dim",
        )
        _require(self.width % self.num_heads == 0, "decoder.width", self.width, f"a multiple of num_heads={self.num_heads}")
        _require(self.embodiments >= 0, "decoder.embodiments", self.embodiments, "0 (no token) or a number of robots")
        _require(0 <= self.proprio_dropout < 1, "decoder.proprio_dropout", self.proprio_dropout, "a probability below 1")


@dataclasses.dataclass(frozen=True)
class CompatConfig:
    """What the published system's released weights were trained with: roundings, a clamp (SPEC 12). All off unless asked for."""

    bfloat16_rope: bool = fixed(False, "the backbone's rotary frequencies and angles (SPEC 3.4)")
    bfloat16_times: bool = fixed(False, "the backbone's flow times (SPEC 4.1)")
    bfloat16_latent_statistics: bool = fixed(False, "the Wan VAE's means and scales (SPEC 1.3)", "rounded_latents")
    bfloat16_low_dim: bool = fixed(False, "proprioception, actions and their normaliser (SPEC 7.1)")
    bfloat16_action_state: bool = fixed(False, "the action sampler's state after each step (SPEC 7)")
    percentile_clamp: bool = fixed(False, "of the normaliser, which loses rare commands (SPEC 7.1)", "decoder")

    @classmethod
    def published(cls) -> Self:
        """All on."""
        return cls(**{field.name: True for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Distribution of the video noise level σ = τ/(1−τ) in training (SPEC 4.2)."""

    log_mean: float = fixed(0.0, "of σ before it is scaled, log-normal")
    log_std: float = fixed(1.0, "of σ before it is scaled, log-normal")
    scale: float = fixed(4.0, "σ is multiplied by this: √(latent frames) in the published system")
    tail_probability: float = fixed(0.05, "share of samples with σ from the log-uniform tail instead")
    tail_range: tuple[float, float] = fixed((200.0, 100_000.0), "lowest and highest σ of the tail")

    def __post_init__(self):
        _require_positive(self, "log_std", "scale")
        _require(0 <= self.tail_probability <= 1, "noise.tail_probability", self.tail_probability, "a probability")
        _require(0 < self.tail_range[0] < self.tail_range[1], "noise.tail_range", self.tail_range, "0 < low < high")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One optimisation run (SPEC 4.4)."""

    steps: int = extends(100_000, "optimiser steps of the whole run")
    batch_size: int = fixed(32, "samples of a step, on all devices together")
    learning_rate: float = fixed(1.778e-4, "at its peak")
    warmup_steps: int = fixed(1000, "in which the rate rises on a straight line")
    schedule: Schedule = fixed("constant", "after the warm-up; wsd: constant, then linear")
    final_fraction: float = fixed(0.2, "of the peak rate, reached at the end unless the rate is constant")
    schedule_steps: int = fixed(0, "where that end is; 0 for `steps`")
    decay_steps: int = fixed(0, "wsd: length of the decay before that end")
    betas: tuple[float, float] = fixed((0.9, 0.99), "AdamW's decays of both moments")
    weight_decay: float = fixed(0.1, "AdamW's, of every trained tensor")
    clip_norm: float = fixed(10.0, "global norm that gradients are clipped to")
    spike_factor: float = fixed(0.0, "steps whose gradient norm is more times its recent average are left out; 0 for none")
    first_moment: Precision = fixed("float32", "AdamW's moving average of gradients")
    micro_batches: int = free(1, "parts of a batch that go through the networks one after another, to need less memory")
    remat: Remat = free("none", "of a block, what the backward pass does not compute again")
    ema_decay: float = fixed(0.0, "of a moving average with a constant horizon; 0 for none")
    ema_std: float = fixed(0.0, "of a power-function average, as a share of training so far; 0 for none (SPEC 4.4)")
    average_generated_only: bool = fixed(True, "False: conditioned latent frames stay in the video loss's denominator (SPEC 4.2)")
    mask_padding: bool = fixed(True, "False: frames and actions beyond an episode's end count in the loss, as published")
    action_draws: int = fixed(1, "action noise draws that share one backbone forward")
    log_every: int = free(50, "steps from one record of metrics to the next")
    wandb_project: str = free("", "of Weights & Biases, where metrics go too; empty for nowhere")
    validate_every: int = free(0, "steps from one validation to the next; 0 switches it off")
    validation_batches: int = free(4, "batches that a validation is the mean of")
    validation_curves: bool = free(False, "also errors over video flow times and predicted videos: as slow as sampling")
    checkpoint_every: int = free(1000, "steps from one checkpoint to the next")
    keep_checkpoints: int = free(3, "how many are kept, the newest")
    keep_every: int = free(0, "and for good those of every so many steps; 0 for none")

    def __post_init__(self):
        _require_positive(
            self,
            "steps",
            "batch_size",
            "learning_rate",
            "clip_norm",
            "action_draws",
            "log_every",
            "micro_batches",
            "validation_batches",
            "checkpoint_every",
            "keep_checkpoints",
        )
        _require(0 <= self.warmup_steps < self.steps, "train.warmup_steps", self.warmup_steps, f"0 to steps-1={self.steps - 1}")
        _require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "two decays of at least 0 and below 1")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "zero or more")
        end = self.schedule_steps or self.steps
        _require(
            self.warmup_steps < end,
            "train.schedule_steps",
            self.schedule_steps,
            f"0, or more than warmup_steps={self.warmup_steps}",
        )
        wsd = self.schedule == "wsd"
        _require(
            0 < self.decay_steps <= end - self.warmup_steps if wsd else not self.decay_steps,
            "train.decay_steps",
            self.decay_steps,
            f"1 to {end - self.warmup_steps} steps of decay" if wsd else "0, since schedule is not 'wsd'",
        )
        _require(
            self.batch_size % self.micro_batches == 0,
            "train.micro_batches",
            self.micro_batches,
            f"a divisor of batch_size={self.batch_size}",
        )
        _require(
            self.spike_factor == 0 or self.spike_factor > 1, "train.spike_factor", self.spike_factor, "0 (off) or more than 1"
        )
        _require(
            self.keep_every % self.checkpoint_every == 0,
            "train.keep_every",
            self.keep_every,
            f"0 (off) or a multiple of checkpoint_every={self.checkpoint_every}",
        )
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 (off) or a decay below 1")
        _require(0 <= self.ema_std < 0.28, "train.ema_std", self.ema_std, "0 (off) or a share below 0.28")
        _require(not (self.ema_decay and self.ema_std), "train.ema_std", self.ema_std, "0, since ema_decay is set too")
        _require(0 <= self.final_fraction <= 1, "train.final_fraction", self.final_fraction, "a fraction")
        _require(self.validate_every >= 0, "train.validate_every", self.validate_every, "0 (off) or a number of steps")

    @property
    def schedule_end(self) -> int:
        """The step at which a falling learning rate reaches its end; 0 for a constant one, which has none."""
        return 0 if self.schedule == "constant" else self.schedule_steps or self.steps

    @property
    def keeps_average(self) -> bool:
        """Whether a moving average of the parameters is kept, and used for inference."""
        return bool(self.ema_decay or self.ema_std)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the network that a stage trains (SPEC 4.3). Targets are the published ones unless changed.

    A parameter is a target if its path, such as 'blocks/self_attn/q_proj/kernel', has one of the names between its slashes.
    """

    rank: int = fixed(0, "0 trains all of the network itself")
    alpha: float = fixed(32.0, "adapters are scaled by alpha/rank")
    targets: tuple[str, ...] = fixed(_LORA_TARGETS, "names of parameters to adapt")
    trained: tuple[str, ...] = fixed(_LORA_TRAINED, "names of parameters trained fully, beside the adapters")

    def __post_init__(self):
        _require(self.rank >= 0, "lora.rank", self.rank, "0 (off) or a rank")
        _require_positive(self, "alpha")
        _require(self.rank == 0 or bool(self.targets), "lora.targets", self.targets, "names of parameters to adapt")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh axes. One axis may be -1: it takes the devices that the others leave.

    Several TPU slices are joined along `data`, which then is a multiple of their number.
    """

    data: int = free(-1, "copies of the parameters; each has a part of the batch")
    fsdp: int = free(1, "parts of the parameters and the optimizer state; each has a part of the batch too")
    sequence: int = free(1, "parts of every sample's video tokens; a divisor of backbone.num_heads")

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.sequence)
        _require(
            all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1, "mesh", sizes, "positive sizes, at most one of them -1"
        )


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How an action chunk is sampled and used (SPEC 5.1, 7, 9.1)."""

    video_steps: int = free(35, "length of the video noise grid")
    stop_step: int = free(0, "video denoising steps before the hidden state is read; 0 is one partial forward on pure noise")
    stop_time: float = free(0.0, "video flow time τ_v at which it is read instead, in (0, 1]; 0 for `stop_step`")
    action_steps: int = free(10, "Euler steps of the action flow")
    strategy: Strategy = free("receding_horizon", "when to plan, and what a plan continues; see `policy.strategies`")
    execute_steps: int = free(5, "actions executed before planning again; all if open_loop, one if temporal_ensembling")
    ensemble_decay: float = free(0.01, "temporal_ensembling: w in weights exp(-w·i) of predictions, the oldest being i = 0")
    guidance_clip: float = free(5.0, "real_time_chunking: bound β on the guidance towards actions that are already committed")
    noise_stream: Literal["jax", "numpy"] = free("jax", "numpy: the published one, the same at every query (SPEC 5, 7)")
    weights: Literal["exact", "int8"] = free("exact", "int8: of the backbone's blocks, eight bits and a scale for each output")

    def __post_init__(self):
        _require_positive(self, "video_steps", "action_steps", "execute_steps", "guidance_clip")
        _require(self.ensemble_decay >= 0, "policy.ensemble_decay", self.ensemble_decay, "zero or more")
        _require(
            0 <= self.stop_step <= self.video_steps, "policy.stop_step", self.stop_step, f"0 to video_steps={self.video_steps}"
        )
        _require(0 <= self.stop_time <= 1, "policy.stop_time", self.stop_time, "a flow time in (0, 1], or 0 for stop_step")
        _require(not (self.stop_step and self.stop_time), "policy.stop_time", self.stop_time, "0, since stop_step is set too")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Closed-loop evaluation in a simulator."""

    simulator: str = free("metaworld", "that policies are evaluated in: a registered one, or 'module:function' of your own")
    layout: str = free("native", "of its actions and proprioception; of Meta-World native, or delta: poses of 10 numbers")
    tasks: tuple[str, ...] = free((), "names of its tasks")
    episodes_per_task: int = free(20, "rollouts of each task")
    first_seed: int = free(1_000_000, "of the first rollout; far from the seeds of any demonstration")
    max_steps: int = free(50, "control steps after which an episode has failed")
    workers: int = free(2, "simulator processes")

    def __post_init__(self):
        _require_positive(self, "episodes_per_task", "max_steps", "workers")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One training run of one stage, and how its policy is evaluated.

    Stage `video` trains the backbone, stage `action` the decoder on the frozen backbone. Tokenizer and backbone start as those
    of the run directory `backbone_run`; with an empty string the backbone starts random, which in stage `action` it stays.
    The network that is trained starts as that of `start_run`, if one is named. A pair (pattern, replacement) of `start_map`
    says where parameters are in that run whose path here matches the regular expression: ("decoder/", "decoder/"); an empty
    replacement leaves them as they start. The first pair that matches counts; other paths are the same in both.
    """

    stage: Literal["video", "action"] = fixed("action", "what is trained: the backbone, or the decoder")
    seed: int = fixed(0, "of initial parameters, the order of samples and noise")
    backbone_run: Path = free("", "run directory where tokenizer and backbone start; kept in the run, and not read again")
    start_run: Path = fixed("", "run directory where the trained network starts")
    start_map: tuple[tuple[str, str], ...] = fixed((), "pairs (pattern, replacement) of parameters' paths in it")
    precision: Precision = fixed("float32", "of activations; optimised parameters stay float32", "rounded_latents")
    attention: Literal["auto", "xla", "cudnn", "splash"] = free("auto", "implementation; auto is the platform's fastest")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    text: TextConfig = TextConfig()
    backbone: VideoDiTConfig = VideoDiTConfig()
    decoder: ActionDecoderConfig = ActionDecoderConfig()
    compat: CompatConfig = CompatConfig()
    noise: NoiseConfig = NoiseConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    policy: PolicyConfig = PolicyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        _require(self.seed >= 0, "seed", self.seed, "zero or more")
        if importlib.util.find_spec("jax") is not None:  # beside a simulator there is none, and nothing is computed
            self._require_networks()
        _require(
            not self.data.latents or bool(self.backbone_run),
            "data.latents",
            self.data.latents,
            "no folder, since 'backbone_run', whose tokenizer makes the latents, is empty",
        )
        _require(
            self.mesh.sequence == -1 or self.backbone.num_heads % self.mesh.sequence == 0,
            "mesh.sequence",
            self.mesh.sequence,
            f"a divisor of backbone.num_heads={self.backbone.num_heads}",
        )
        _require(bool(self.start_run) or not self.start_map, "start_map", self.start_map, "nothing, since 'start_run' is empty")
        for name, width in (("action", self.decoder.action_dim), ("proprio", self.decoder.proprio_dim)):
            dims = getattr(self.data, f"raw_{name}_dims")
            _require(
                all(0 <= dim < width for dim in dims),
                f"data.raw_{name}_dims",
                dims,
                f"dimensions below decoder.{name}_dim={width}",
            )
        _require(
            self.policy.execute_steps <= self.data.action_horizon,
            "policy.execute_steps",
            self.policy.execute_steps,
            f"at most data.action_horizon={self.data.action_horizon}",
        )
        overlapping = self.policy.strategy in ("asynchronous", "real_time_chunking")
        _require(
            not overlapping or self.policy.execute_steps < self.data.action_horizon,
            "policy.execute_steps",
            self.policy.execute_steps,
            f"less than data.action_horizon={self.data.action_horizon}, so that there is "
            f"something left to execute while policy.strategy={self.policy.strategy!r} plans",
        )

    def _require_networks(self) -> None:
        """Checks that the named networks are there, and that windows fit them."""
        BACKBONES[self.backbone.kind], TEXT_ENCODERS[self.text.kind]  # raise ConfigError for names that nothing has
        data, tokenizer = self.data, self.tokenizer.network
        group, (_, rows, columns) = tokenizer.time_stride, self.backbone.patch
        past, future, groups = data.past_frames, data.future_frames, f"a multiple of {group} (groups of the tokenizer)"
        _require((past - 1) % group == 0, "data.past_frames", past, f"1 + {groups}")
        _require(future % group == 0, "data.future_frames", future, groups)
        for size, patch in zip(data.image_size, (rows, columns), strict=True):
            pixels = tokenizer.stride * patch
            _require(
                size > 0 and size % pixels == 0, "data.image_size", data.image_size, f"multiples of {pixels} pixels (a token)"
            )

    @property
    def past_latents(self) -> int:
        """Latent frames that encode the observed frames: the first frame alone, then groups."""
        return 1 + (self.data.past_frames - 1) // self.tokenizer.network.time_stride

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latents of a whole window of one camera."""
        tokenizer, (height, width) = self.tokenizer.network, self.data.image_size
        frames = 1 + (self.data.num_frames - 1) // tokenizer.time_stride
        return frames, height // tokenizer.stride, width // tokenizer.stride, tokenizer.channels


# Fields that configurations had up to 0.1, and what says their value now.
_DERIVED: dict[str, tuple[str, Callable[[ExperimentConfig], int]]] = {
    "text.width": ("backbone.text_width", lambda config: config.backbone.text_width),
    "decoder.action_horizon": ("data.action_horizon", lambda config: config.data.action_horizon),
    "decoder.obs_horizon": ("a window, which has one step of proprioception", lambda config: 1),
    "backbone.views": ("the number of data.cameras", lambda config: config.data.views),
    "backbone.latent_channels": ("the tokenizer", lambda config: config.tokenizer.network.channels),
}


def experiment_from(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds the validated configuration from a nested mapping (an `ml_collections.ConfigDict` or loaded JSON).

    Raises:
        ConfigError: for an unknown field (naming the nearest known one), a value of the wrong type, or a value that
            a dataclass above rejects.
    """
    return _build(ExperimentConfig, values, path="")


def stored_experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """As `experiment_from`, for a configuration that some version of this code has stored.

    Raises:
        ConfigError: also for a field that is derived by now and was stored with another value.
    """
    groups = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    def pop(path: str) -> Any:
        group, _, name = path.partition(".")
        fields = groups.get(group)
        return fields.pop(name, None) if isinstance(fields, dict) else None

    derived = {path: value for path in _DERIVED if (value := pop(path)) is not None}
    if (stream := pop("policy.noise")) is not None:  # its name up to 0.1
        groups["policy"]["noise_stream"] = stream
    compat = groups.setdefault("compat", {})
    if isinstance(compat, dict):
        compat.setdefault("percentile_clamp", True)  # up to 0.1 there was no other normaliser
    config = experiment_from(groups)
    for path, value in derived.items():
        source, derive = _DERIVED[path]
        _require(value == derive(config), path, value, f"{derive(config)}, as follows from {source}")
    return config


def expanded_path(path: str, what: str) -> str:
    """A path with the home directory that a `~` or `~user` at its beginning stands for.

    Shells see to that elsewhere, but not behind the "=" of --NAME=~/folder. Other paths, and gs://..., stay as they are.

    Args:
        what: is this path, for the message.

    Raises:
        ConfigError: if there is no such home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{what} is {path!r}; expected a home directory that is there, or './{path}' for a folder of that name")
    return expanded


def split_paths(text: str, separator: str = ",") -> list[str]:
    """The parts of a list of paths; what stands within double quotes is not divided."""
    return re.split(rf'{separator}(?=(?:[^"]*"[^"]*")*[^"]*$)', text)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration, ready for JSON or `ml_collections.ConfigDict`; `experiment_from` inverts it."""
    return dataclasses.asdict(config)


class Field(NamedTuple):
    """What there is to know about a field: `path` is dotted, `type` as in Python; the last three are described in `_field`."""

    path: str
    type: str
    default: Any
    help: str
    on_resume: OnResume
    shapes: tuple[Shaped, ...]


def describe(config_class: Any, prefix: str = "") -> list[Field]:
    """Every field under a configuration class, in order."""
    fields, hints = [], typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, path = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            fields += describe(hint, f"{path}.")
        else:
            name = hint.__name__ if typing.get_origin(hint) is None else str(hint).replace("typing.", "")
            fields.append(Field(path, name, field.default, **field.metadata))
    return fields


def field_paths(config_class: Any, prefix: str = "") -> list[str]:
    """Every dotted field name under a configuration class."""
    return [field.path for field in describe(config_class, prefix)]


def shaping(*shaped: Shaped) -> list[str]:
    """Dotted names of the fields that one of these presupposes."""
    return [field.path for field in describe(ExperimentConfig) if not set(shaped).isdisjoint(field.shapes)]


def value_at(config: ExperimentConfig, path: str) -> Any:
    """The value of a field by its dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def unknown_field_message(path: str, known: list[str]) -> str:
    """The error text for a misspelt dotted field, or one that nobody sets any more."""
    if path in _DERIVED:
        return f"unknown config field '{path}'; leave it out: it follows from {_DERIVED[path][0]}"
    return f"unknown config field '{path}'; did you mean '{nearest(path, known)}'?"


def _build(config_class: Any, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(config_class, include_extras=True)
    for name in values:
        if name not in hints:
            raise ConfigError(unknown_field_message(path + name, field_paths(config_class, path) + [path + n for n in hints]))
    return config_class(**{name: _convert(hints[name], value, path + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Checks `value` against the type hint; widens int to float and list to tuple, nothing else."""
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, Mapping) or hasattr(value, "items"), path, value, "a group of fields")
        return _build(hint, value, path + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return expanded_path(_convert(arguments[0], value, path), f"config field '{path}'")
    if origin is Literal:
        _require(value in arguments, path, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), path, value, "a tuple")
        if arguments[-1] is ...:
            return tuple(_convert(arguments[0], v, path) for v in value)
        _require(len(value) == len(arguments), path, value, f"{len(arguments)} values")
        return tuple(_convert(h, v, path) for h, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), path, value, f"type {hint.__name__}")
    if hint is float:
        _require(math.isfinite(value), path, value, "a finite number")
    return value
