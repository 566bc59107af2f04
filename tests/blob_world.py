"""A small world whose video, prompts and proprioception all say something that the other two do not.

A hand moves along x as the prompt says, along y as the row of a blob in the primary camera says, and closes its gripper once
what the wrist camera shows is bright. Commands are targets: absolute positions, which the state follows with a delay, so that
where the hand is now is known from proprioception alone. The blob moves as the prompt says, and the wrist camera gets brighter.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tiny

from data_pipelines.assembly import OpenTrainingData, TrainingData
from data_pipelines.episode import ArrayFrames, Episode
from mimic_video.batch import fields, make_batch
from mimic_video.config import ExperimentConfig

SIZE, HZ, LENGTH = (16, 32), 2.0, 13
PROMPTS = {"move left": -1, "move right": 1}
SPEED, FOLLOWS = 0.3, 0.6  # of targets in a step; the part of the way to its target that the state goes in a step
_BLOB, _PIXELS = 8, 2  # size of the blob, and how far it goes in a step
_READ = 30  # batches that are read from files
_WINDOWS: dict[tuple[str, str], dict[str, np.ndarray]] = {}  # of a stage and a dataset: several runs learn from the same

VALUES: dict[str, Any] = {
    "data": {
        "past_frames": 1,
        "future_frames": 4,
        "video_hz": HZ,
        "control_hz": HZ,
        "action_delay": 0.0,
        "cameras": ("primary", "wrist"),
    },
    "backbone": {"width": 32, "hidden_block": 2},
    "decoder": {"width": 32, "action_dim": 3, "proprio_dim": 3, "proprio_dropout": 0.0},
    "tokenizer": {"fit_windows": 64},
    "policy": {"video_steps": 6, "action_steps": 5, "execute_steps": 4},
}


def experiment(stage: str, dataset: Any, steps: int, **changes: Any) -> ExperimentConfig:
    """An experiment on one dataset of this world."""
    data = VALUES["data"] | {"video_dataset": str(dataset), "action_dataset": str(dataset)}
    train = {
        "steps": steps,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "log_every": 50,
        "checkpoint_every": steps,
        "ema_decay": 0.0,
    }
    return tiny.experiment(**{**VALUES, "stage": stage, "data": data, "train": train | {"warmup_steps": 20}, **changes})


def episode(seed: int, slower: int = 1) -> Episode:
    """`slower`: how many times as many steps a second there are as its time stamps say."""
    random = np.random.default_rng(seed)
    prompt = list(PROMPTS)[seed % 2]
    row, steps = int(random.integers(2)), np.arange(1 + (LENGTH - 1) * slower)
    moves, follows = np.array([PROMPTS[prompt], 1 - 2 * row]) * SPEED / slower, FOLLOWS / slower
    targets = random.normal(0, 1, 2) + steps[:, None] * moves
    brightness = np.clip(random.uniform(-0.3, 0.3) + steps / slower / 10, 0, 1)
    commands = np.concatenate([targets, (brightness[:, None] > 0.5)], axis=1)
    states = np.empty_like(commands)
    states[0] = commands[0] - [*moves / follows, 0]  # as far behind as it will stay
    for step in steps[1:]:
        states[step] = states[step - 1] + follows * (commands[step - 1] - states[step - 1])
    return Episode(
        name=f"episode {seed}",
        timestamps=steps / HZ,
        frames=ArrayFrames(_primary(random, row, steps * PROMPTS[prompt] / slower)),
        further_cameras={"wrist": ArrayFrames(_wrist(brightness))},
        instruction=prompt,
        proprio=states.astype(np.float32),
        actions=commands.astype(np.float32),
    )


def _primary(random: np.random.Generator, row: int, way: np.ndarray) -> np.ndarray:
    """A blob in the upper or the lower half, which has gone this way and comes in again at the other side."""
    frames = np.full((len(way), *SIZE, 3), 40, np.uint8)
    start = int(random.integers(SIZE[1]))
    for gone, frame in zip(way, frames, strict=True):
        columns = (start + round(_PIXELS * gone) + np.arange(_BLOB)) % SIZE[1]
        frame[8 * row : 8 * row + 8, columns] = (230, 200, 40)
    return frames


def _wrist(brightness: np.ndarray) -> np.ndarray:
    """A picture, all of which gets brighter, in blue."""
    levels = (40 + 200 * brightness).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None] // np.array([4, 2, 1], np.uint8), (len(levels), *SIZE, 3)).copy()


def episodes(count: int, first: int = 0, slower: int = 1) -> list[Episode]:
    return [episode(first + number, slower) for number in range(count)]


def changed(episodes: Sequence[Episode], **fields: Any) -> list[Episode]:
    """Episodes with fields that are functions of (episode, its number)."""
    return [
        dataclasses.replace(each, **{name: change(each, number) for name, change in fields.items()})
        for number, each in enumerate(episodes)
    ]


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Data of the training loop: those of `TrainingData`, whose first windows are read once and drawn from again and again.

    Attributes:
        cut: fields of a batch that are dealt out anew among its samples, so that they say nothing.
    """

    config: ExperimentConfig
    cut: tuple[str, ...] = ()

    def open(self, rows, tokenizer):
        return _Opened(TrainingData(self.config).open(rows, tokenizer), self.config, self.cut)


@dataclasses.dataclass(frozen=True)
class _Opened:
    opened: OpenTrainingData
    config: ExperimentConfig
    cut: tuple[str, ...]

    def __getattr__(self, name):
        return getattr(self.opened, name)

    def batches(self, step, robots):
        data, train = self.config.data, self.config.train
        known = self.config.stage, data.action_dataset
        if known not in _WINDOWS:
            parts = [fields(batch) for batch in itertools.islice(self.opened.batches(0, robots), _READ)]
            _WINDOWS[known] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        values = _WINDOWS[known]
        for number in itertools.count(step):
            random = np.random.default_rng(number)
            chosen = random.integers(len(values["text"]), size=train.batch_size)
            others = {name: random.permutation(chosen) for name in self.cut}
            yield make_batch({name: array[others.get(name, chosen)] for name, array in values.items()})
