"""The smallest experiment whose every part still does something, and data for it; shared by the tests.

Images of 16x32 pixels are 2x4 latents, so two tokens a frame; a window is three latent frames, two of them observed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np

from data_pipelines.episode import Episode
from mimic_video.batch import Batch, Observation
from mimic_video.config import ExperimentConfig, experiment_from
from mimic_video.embodiments import Embodiment
from mimic_video.transforms import compute_statistics
from mimic_video.vam import VideoActionModel

SIZE = (16, 32)
VALUES: dict[str, Any] = {
    "stage": "action",
    "data": {
        "image_size": SIZE,
        "past_frames": 5,
        "future_frames": 4,
        "video_hz": 10.0,
        "action_horizon": 4,
        "control_hz": 10.0,
        "action_delay": 0.1,
    },
    "tokenizer": {"fit_windows": 8},
    "text": {"rows": 4},
    "backbone": {
        "width": 16,
        "num_blocks": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "text_width": 8,
        "adaln_lora_dim": 4,
        "hidden_block": 1,
    },
    "decoder": {
        "width": 16,
        "num_blocks": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "adaln_lora_dim": 4,
        "time_rank": 8,
        "proprio_dim": 3,
        "action_dim": 2,
    },
    "train": {
        "steps": 4,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "ema_decay": 0.9,
        "log_every": 1,
        "checkpoint_every": 2,
    },
    "policy": {"video_steps": 3, "action_steps": 2, "execute_steps": 2},
}


def experiment(**changes: Any) -> ExperimentConfig:
    """`VALUES` with changed fields: experiment(stage="video", train={"steps": 9})."""
    values = dict(VALUES)
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return experiment_from(values)


@functools.cache
def model(config: ExperimentConfig) -> VideoActionModel:
    """One model for all tests of a process that have the same experiment: what is compiled for one is there for the next."""
    return VideoActionModel(config)


@functools.cache
def shapes(config: ExperimentConfig) -> dict:
    """What `init` makes, as shapes: the networks are traced, and nothing is compiled."""
    return jax.eval_shape(model(config).init, jax.random.key(0))


def params(config: ExperimentConfig, seed: int = 0) -> dict:
    """Random parameters in which nothing is zero: not the tokenizer's basis, nor biases or the modulations' last layers."""
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = random.standard_normal(leaf.shape, np.float32)
        match name.split("/")[-1]:
            case "scale" if name.startswith("tokenizer"):
                return np.full(leaf.shape, 0.5, np.float32)
            case "scale":
                return 1 + np.float32(0.1) * noise
            case "bias":
                return np.float32(0.1) * noise
            case "kernel" if name.startswith("tokenizer"):  # a convolution's, of a single layer
                return noise / np.float32(math.prod(leaf.shape[:-1]) ** 0.5)
            case "kernel" if name.endswith("modulation/up/kernel"):
                return np.float32(0.1) * noise
            case "basis":
                return noise / np.float32(leaf.shape[0] ** 0.5)
            case "mean":
                return np.zeros(leaf.shape, np.float32)
        return noise / np.float32(leaf.shape[-2] ** 0.5)

    return jax.tree_util.tree_map_with_path(fill, shapes(config))


def batch(config: ExperimentConfig, size: int, seed: int = 0) -> Batch:
    """What the loader makes of `size` windows; nothing is padded, and every sample has all views."""
    data, decoder, random = config.data, config.decoder, np.random.default_rng(seed)
    views = len(data.cameras)
    video = random.integers(0, 256, (size, views, data.num_frames, *data.image_size, 3), np.uint8)
    text = random.standard_normal((size, config.text.rows, config.backbone.text_width)).astype(np.float32)
    observation = Observation(text, video, view_mask=np.ones((size, views), bool) if views > 1 else None)
    windows = Batch(observation, np.ones((size, data.num_frames), bool))
    if config.stage == "video":
        return windows
    return changed(
        windows,
        proprio=random.standard_normal((size, 1, decoder.proprio_dim)).astype(np.float32),
        actions=random.standard_normal((size, data.action_horizon, decoder.action_dim)).astype(np.float32),
        action_mask=np.ones((size, data.action_horizon), bool),
    )


def changed(batch: Batch, **fields: Any) -> Batch:
    """A batch with other fields of its own or of its observation."""
    observed = {name: fields.pop(name) for name in Observation._fields if name in fields}
    return batch._replace(observation=batch.observation._replace(**observed), **fields)


@dataclasses.dataclass(frozen=True)
class Data:
    """Data of the training loop that are not on disk: random batches, step by step.

    Attributes:
        config: the experiment.
        stream: step → the whole batches after it; None for those of `batch`.
        held_out: whole batches to validate on.
        seed: of what a tokenizer is fitted to.
        rows: of a batch that this process reads.
    """

    config: ExperimentConfig
    stream: Callable[[int], Iterator[Batch]] | None = None
    held_out: tuple[Batch, ...] = ()
    seed: int = 0
    rows: Sequence[int] = ()

    def open(self, rows: Sequence[int], tokenizer: Any) -> Self:
        return dataclasses.replace(self, rows=rows)

    def samples(self, count: int) -> list[dict[str, np.ndarray]]:
        return [{"video": video} for video in batch(self.config, count, self.seed).observation.video]

    def robots(self) -> dict[str, Embodiment]:
        decoder, random = self.config.decoder, np.random.default_rng(0)
        widths = {"action": (self.config.data.action_horizon, decoder.action_dim), "proprio": (1, decoder.proprio_dim)}
        statistics = {key: compute_statistics(random.standard_normal((20, *shape))) for key, shape in widths.items()}
        return {"tiny": Embodiment("tiny", 0, statistics, {"action": (), "proprio": ()})}

    def batches(self, step: int, robots: Any) -> Iterator[Batch]:
        size = self.config.train.batch_size
        stream = self.stream(step) if self.stream else (batch(self.config, size, n) for n in itertools.count(step + 1))
        return map(self._own, stream)

    def validation(self, robots: Any) -> list[Batch]:
        return list(map(self._own, self.held_out))

    def state(self, step: int) -> dict[str, Any]:
        return {"next_step": step}

    def _own(self, whole: Batch) -> Batch:
        return jax.tree.map(lambda value: value[list(self.rows)], whole)


@dataclasses.dataclass(frozen=True)
class NoiseFrames:
    """Frames of smooth random colours, a function of the seed."""

    length: int
    seed: int

    def __len__(self) -> int:
        return self.length

    def take(self, indices):
        random = np.random.default_rng(self.seed)
        coarse = random.integers(0, 256, (self.length, SIZE[0] // 8, SIZE[1] // 8, 3), np.uint8)
        return np.kron(coarse[list(indices)], np.ones((1, 8, 8, 1), np.uint8))


def episode(length: int, seed: int, hz: float = 10.0) -> Episode:
    random = np.random.default_rng(seed)
    return Episode(
        name=f"episode {seed}",
        timestamps=np.arange(length) / hz,
        frames=NoiseFrames(length, seed),
        instruction=f"do task {seed % 2}",
        proprio=random.standard_normal((length, 3)).astype(np.float32),
        actions=random.standard_normal((length, 2)).astype(np.float32),
    )
