"""Frozen, validated configuration for every part of the system.

Experiments are written as `ml_collections` files in `configs/`; `experiment_from` turns one into an `ExperimentConfig`
exactly once, at the edge. Everything below the launch scripts takes these dataclasses, so nothing in `mimic_video`
depends on ml_collections and an invalid experiment cannot travel further than this file.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self


class ConfigError(ValueError):
    """A configuration value that cannot be used. The message names the field, the value and what was expected."""


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"config field '{field}' is {value!r}; expected {expected}")


def _require_positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value > 0, f"{type(config).__name__}.{field}", value, "a positive number")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where episodes come from and how one is cut into a training window.

    A window is anchored at one video frame: `past_frames` frames end there, `future_frames` follow, both at `video_hz`;
    `action_horizon` actions start `action_delay` seconds after the anchor, at `control_hz` (SPEC 8.3, 8.4).
    """

    video_dataset: str = ""  # RLDS directory for stage 1, where actions are not needed, or a mixture of them: "A,B*2" by weight
    action_dataset: str = ""  # the same for stage 2; "A,B*2;10000:A" changes weights at a step
    root: str = ""  # folder of Open-X datasets, which those fields may name by their name in the registry
    train_split: str = "train"
    validation_split: str = "val"
    image_size: tuple[int, int] = (480, 640)  # height, width in pixels, as the tokenizer sees them
    cameras: tuple[Literal["primary", "secondary", "wrist"], ...] = ("primary",)  # of a sample, one above the other in its frames
    past_frames: int = 5
    future_frames: int = 56
    video_hz: float = 5.0
    action_horizon: int = 15
    control_hz: float = 5.0
    action_delay: float = 0.2  # seconds
    normalization: Literal["identity", "variance", "squash", "squash_hard"] = "variance"  # of actions and proprio (SPEC 7.1)
    raw_action_dims: tuple[int, ...] = ()  # dimensions that are not normalised: 6-D rotations
    raw_proprio_dims: tuple[int, ...] = ()
    latents: str = ""  # folder of launch/precompute_latents.py, read in training in place of frames; empty for frames
    frame_cache_mb: int = 512  # decoded frames of a dataset that are kept in host memory
    workers: int = 0  # processes that read windows; 0 reads in threads of the training process
    skip_broken: bool = False  # leaves out episodes and windows that cannot be read, counted in the log, instead of ending

    def __post_init__(self):
        _require_positive(self, "past_frames", "future_frames", "video_hz", "action_horizon", "control_hz")
        _require(self.past_frames % 4 == 1, "data.past_frames", self.past_frames, "1 + a multiple of 4 (tokenizer groups)")
        _require(self.future_frames % 4 == 0, "data.future_frames", self.future_frames, "a multiple of 4 (tokenizer groups)")
        _require(self.workers >= 0, "data.workers", self.workers, "0 (threads) or a number of processes")
        _require(self.action_delay >= 0, "data.action_delay", self.action_delay, "zero or more seconds")
        _require(
            self.cameras[:1] == ("primary",) and len(self.cameras) == len(set(self.cameras)),
            "data.cameras",
            self.cameras,
            "'primary', and maybe others after it",
        )
        for size in self.image_size:
            _require(size > 0 and size % 16 == 0, "data.image_size", self.image_size, "multiples of 16 pixels (latents, patches)")

    @property
    def num_frames(self) -> int:
        return self.past_frames + self.future_frames

    @property
    def past_latents(self) -> int:
        """Latent frames that encode the observed frames: the first frame alone, then groups of four."""
        return 1 + (self.past_frames - 1) // 4

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a sample's frames, in which cameras stand one above the other."""
        return len(self.cameras) * self.image_size[0], self.image_size[1]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(t, h, w) of a whole window's latents; those of several cameras stand one above the other."""
        return 1 + (self.num_frames - 1) // 4, self.frame_size[0] // 8, self.frame_size[1] // 8


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Video ↔ latents: the Wan 2.1 VAE (SPEC 1), or `pca`, which is fitted to data and keeps its shape contract."""

    kind: Literal["pca", "wan"] = "pca"
    fit_windows: int = 512  # pca: windows that the basis is fitted on
    width: int = 96  # wan: channels of the first stage
    chunk_latents: int = 1  # wan: latent frames coded in one pass; bounds memory, changes nothing else

    def __post_init__(self):
        _require_positive(self, "fit_windows", "width", "chunk_latents")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Instruction → rows of text features: a T5 encoder (SPEC 2), or `hash`, one fixed random row per word, as a stand-in."""

    kind: Literal["hash", "t5"] = "hash"
    rows: int = 512
    width: int = 1024
    model: str = ""  # t5: folder of the encoder and its tokenizer, or their Hugging Face name
    cache: str = ""  # t5: folder that keeps features of prompts; empty for none
    precision: Literal["float32", "bfloat16"] = "float32"  # t5: of the encoder

    def __post_init__(self):
        _require_positive(self, "rows", "width")
        _require(self.kind != "t5" or bool(self.model), "text.model", self.model, "a T5 folder or name, since text.kind is 't5'")


@dataclasses.dataclass(frozen=True)
class VideoDiTConfig:
    """The video backbone (SPEC 3.1). Defaults are the 2B model."""

    width: int = 2048
    num_blocks: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    text_width: int = 1024
    adaln_lora_dim: int = 256
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)  # t, h, w
    rope_ratio: tuple[float, float, float] = (1.0, 3.0, 3.0)  # t, h, w extrapolation
    hidden_block: int = 20  # blocks run before the decoder reads the residual stream (SPEC 3.8)
    views: int = 1  # cameras of a sample; several are told apart by a learned embedding, which published weights do not have

    def __post_init__(self):
        _require_positive(
            self, "width", "num_blocks", "num_heads", "mlp_ratio", "text_width", "adaln_lora_dim", "latent_channels", "views"
        )
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

    width: int = 1024
    num_blocks: int = 24
    num_heads: int = 8
    mlp_ratio: float = 4.0
    adaln_lora_dim: int = 128
    time_rank: int = 1024
    obs_horizon: int = 1
    action_horizon: int = 15
    proprio_dim: int = 10
    action_dim: int = 10
    proprio_dropout: float = 0.2  # training only; the tokens are replaced by a learned mask token
    embodiments: int = 0  # robots that a learned token tells apart; 0 for no such token, as published

    def __post_init__(self):
        _require_positive(
            self,
            "width",
            "num_blocks",
            "num_heads",
            "mlp_ratio",
            "adaln_lora_dim",
            "time_rank",
            "obs_horizon",
            "action_horizon",
            "proprio_dim",
            "action_dim",
        )
        _require(self.width % self.num_heads == 0, "decoder.width", self.width, f"a multiple of num_heads={self.num_heads}")
        _require(self.embodiments >= 0, "decoder.embodiments", self.embodiments, "0 (no token) or a number of robots")
        _require(0 <= self.proprio_dropout < 1, "decoder.proprio_dropout", self.proprio_dropout, "a probability below 1")


@dataclasses.dataclass(frozen=True)
class CompatConfig:
    """Roundings of the published system that its released weights were trained with (SPEC 12). All off unless asked for."""

    bfloat16_rope: bool = False  # the backbone's rotary frequencies and angles (SPEC 3.4)
    bfloat16_times: bool = False  # the backbone's flow times (SPEC 4.1)
    bfloat16_latent_statistics: bool = False  # the Wan VAE's means and scales (SPEC 1.3)
    bfloat16_low_dim: bool = False  # proprioception, actions and their normaliser (SPEC 7.1)
    bfloat16_action_state: bool = False  # the action sampler's state after each step (SPEC 7)

    @classmethod
    def published(cls) -> Self:
        """All on."""
        return cls(**{field.name: True for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Distribution of the video noise level σ = τ/(1−τ) in training (SPEC 4.2)."""

    log_mean: float = 0.0
    log_std: float = 1.0
    scale: float = 4.0  # σ is multiplied by this: √(latent frames) in the published system
    tail_probability: float = 0.05  # share of samples with σ from the log-uniform tail instead
    tail_range: tuple[float, float] = (200.0, 100_000.0)

    def __post_init__(self):
        _require_positive(self, "log_std", "scale")
        _require(0 <= self.tail_probability <= 1, "noise.tail_probability", self.tail_probability, "a probability")
        _require(0 < self.tail_range[0] < self.tail_range[1], "noise.tail_range", self.tail_range, "0 < low < high")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One optimisation run (SPEC 4.4)."""

    steps: int = 100_000
    batch_size: int = 32  # global
    learning_rate: float = 1.778e-4
    warmup_steps: int = 1000
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"  # after the warm-up; wsd: constant, then linear
    final_fraction: float = 0.2  # of the peak rate, reached at the end unless the rate is constant
    schedule_steps: int = 0  # where that end is; 0 for `steps`
    decay_steps: int = 0  # wsd: length of the decay before that end
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip_norm: float = 10.0
    spike_factor: float = 0.0  # steps whose gradient norm is more times its recent average are left out; 0 for none
    first_moment: Literal["float32", "bfloat16"] = "float32"  # AdamW's moving average of gradients
    micro_batches: int = 1  # parts of a batch that go through the networks one after another, to need less memory
    remat: Literal["none", "attention", "full", "offload"] = "none"  # of a block, what the backward pass does not compute again
    ema_decay: float = 0.0  # of a moving average with a constant horizon; 0 for none
    ema_std: float = 0.0  # of a power-function average, as a share of training so far; 0 for none (SPEC 4.4)
    average_generated_only: bool = True  # False: conditioned latent frames stay in the video loss's denominator (SPEC 4.2)
    mask_padding: bool = True  # False: frames and actions beyond an episode's end count in the loss, as published
    action_draws: int = 1  # action noise draws that share one backbone forward
    log_every: int = 50
    wandb_project: str = ""  # of Weights & Biases, where metrics go too; empty for nowhere
    validate_every: int = 0  # 0 switches validation off
    validation_batches: int = 4
    validation_curves: bool = False  # also errors over video flow times, and predicted videos, which take as long as sampling
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3  # the newest
    keep_every: int = 0  # and for good those of every so many steps; 0 for none

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
    def keeps_average(self) -> bool:
        """Whether a moving average of the parameters is kept, and used for inference."""
        return bool(self.ema_decay or self.ema_std)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the network that a stage trains (SPEC 4.3). Targets are the published ones unless changed.

    A parameter is a target if its path, such as 'blocks/self_attn/q_proj/kernel', has one of the names between its slashes.
    """

    rank: int = 0  # 0 trains all of the network itself
    alpha: float = 32.0  # adapters are scaled by alpha/rank
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp/up",
        "mlp/down",
        "patch_proj",
        "time_in",
        "time_out",
    )
    trained: tuple[str, ...] = (  # fully, beside the adapters
        "self_attn_modulation",
        "cross_attn_modulation",
        "mlp_modulation",
        "final_modulation",
    )

    def __post_init__(self):
        _require(self.rank >= 0, "lora.rank", self.rank, "0 (off) or a rank")
        _require_positive(self, "alpha")
        _require(self.rank == 0 or bool(self.targets), "lora.targets", self.targets, "names of parameters to adapt")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh axes. One axis may be -1: it takes the devices that the others leave.

    Several TPU slices are joined along `data`, which then is a multiple of their number.
    """

    data: int = -1  # copies of the parameters; each has a part of the batch
    fsdp: int = 1  # parts of the parameters and the optimizer state; each has a part of the batch too
    sequence: int = 1  # parts of every sample's video tokens; a divisor of backbone.num_heads

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.sequence)
        _require(
            all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1, "mesh", sizes, "positive sizes, at most one of them -1"
        )


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How an action chunk is sampled and used (SPEC 5.1, 7, 9.1)."""

    video_steps: int = 35  # length of the video noise grid
    stop_step: int = 0  # video denoising steps before the hidden state is read; 0 is one partial forward on pure noise
    stop_time: float = 0.0  # video flow time τ_v at which it is read instead, in (0, 1]; 0 for `stop_step`
    action_steps: int = 10  # Euler steps of the action flow
    strategy: Literal["open_loop", "receding_horizon", "temporal_ensembling", "asynchronous", "real_time_chunking"] = (
        "receding_horizon"  # see `policy.execution`
    )
    execute_steps: int = 5  # actions executed before planning again; all of a chunk if open_loop, one if temporal_ensembling
    ensemble_decay: float = 0.01  # temporal_ensembling: w in the weights exp(-w·i) of predictions, the oldest being i = 0
    guidance_clip: float = 5.0  # real_time_chunking: bound β on the guidance towards actions that are already committed
    noise: Literal["jax", "numpy"] = "jax"  # numpy: the published stream, which is the same at every query (SPEC 5, 7)
    weights: Literal["exact", "int8"] = "exact"  # int8: of the backbone's blocks, eight bits and a scale for each output

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

    simulator: str = "metaworld"  # registered in evaluation/simulators.py, or "module:function" of your own
    layout: str = "native"  # of actions and proprioception, as the simulator knows it; of Meta-World "native", or "delta": poses
    tasks: tuple[str, ...] = ()
    episodes_per_task: int = 20
    first_seed: int = 1_000_000  # far from the seeds of any demonstration
    max_steps: int = 50  # control steps
    workers: int = 2  # simulator processes

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

    stage: Literal["video", "action"] = "action"
    seed: int = 0
    backbone_run: str = ""
    start_run: str = ""
    start_map: tuple[tuple[str, str], ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"  # of activations; optimised parameters stay float32
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"  # implementation; auto is the platform's fastest
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
        _require(self.decoder.obs_horizon == 1, "decoder.obs_horizon", self.decoder.obs_horizon, "1, what a window has")
        _require(
            self.backbone.latent_channels == 16, "backbone.latent_channels", self.backbone.latent_channels, "16, the tokenizer's"
        )
        _, rows, columns = self.backbone.patch
        height, width = (size // 8 for size in self.data.image_size)
        _require(
            height % rows == 0 and width % columns == 0,
            "backbone.patch",
            self.backbone.patch,
            f"a divisor of the {height}x{width} latent pixels",
        )
        _require(
            self.backbone.views == len(self.data.cameras),
            "backbone.views",
            self.backbone.views,
            f"{len(self.data.cameras)}, the number of data.cameras",
        )
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
        _require(
            self.text.width == self.backbone.text_width,
            "text.width",
            self.text.width,
            f"backbone.text_width={self.backbone.text_width}",
        )
        for name, width in (("action", self.decoder.action_dim), ("proprio", self.decoder.proprio_dim)):
            dims = getattr(self.data, f"raw_{name}_dims")
            _require(
                all(0 <= dim < width for dim in dims),
                f"data.raw_{name}_dims",
                dims,
                f"dimensions below decoder.{name}_dim={width}",
            )
        _require(
            self.decoder.action_horizon == self.data.action_horizon,
            "decoder.action_horizon",
            self.decoder.action_horizon,
            f"data.action_horizon={self.data.action_horizon}",
        )
        _require(
            self.policy.execute_steps <= self.decoder.action_horizon,
            "policy.execute_steps",
            self.policy.execute_steps,
            f"at most decoder.action_horizon={self.decoder.action_horizon}",
        )
        overlapping = self.policy.strategy in ("asynchronous", "real_time_chunking")
        _require(
            not overlapping or self.policy.execute_steps < self.decoder.action_horizon,
            "policy.execute_steps",
            self.policy.execute_steps,
            f"less than decoder.action_horizon={self.decoder.action_horizon}, so that there is "
            f"something left to execute while policy.strategy={self.policy.strategy!r} plans",
        )


def experiment_from(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds the validated configuration from a nested mapping (an `ml_collections.ConfigDict` or loaded JSON).

    Raises:
        ConfigError: for an unknown field (naming the nearest known one), a value of the wrong type, or a value that
            a dataclass above rejects.
    """
    return _build(ExperimentConfig, values, path="")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration, ready for JSON or `ml_collections.ConfigDict`; `experiment_from` inverts it."""
    return dataclasses.asdict(config)


def unknown_field_message(path: str, known: list[str]) -> str:
    """The error text for a misspelt dotted field."""
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
    return f"unknown config field '{path}'; did you mean '{nearest[0]}'?"


def field_paths(config_class: Any, prefix: str = "") -> list[str]:
    """Every dotted field name under a configuration class."""
    paths = []
    for name, hint in typing.get_type_hints(config_class).items():
        paths += field_paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return paths


def _build(config_class: Any, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(config_class)
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
