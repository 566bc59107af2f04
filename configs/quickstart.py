"""Meta-World on two CPU cores: action-free videos and a few labelled demonstrations to a policy, in minutes.

    python launch/quickstart.py

runs all of it. The stages by themselves, once `launch/collect.py` has written the datasets:

    python launch/train.py --config=configs/quickstart.py:video --workdir=runs/quickstart/video
    python launch/train.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action
    python launch/evaluate.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action

The networks are those of the 2B system, only narrower.

Sweeps over one field or two are declared below `get_config`, and several are multiplied (docs/sweeps.md):

    python launch/sweep.py --config=configs/quickstart.py:action --sweep=seed,stop_step --workdir=runs/sweep --then=evaluate
"""

import itertools
from collections.abc import Iterator

import ml_collections

from mimic_video.config import ExperimentConfig, to_dict

TASKS = ("drawer-open-v3", "drawer-close-v3")
Points = Iterator[dict[str, object]]  # of a sweep: values by the paths of fields
DEMONSTRATIONS = 20  # of each task that launch/quickstart.py collects; those of one task stand together in the dataset


def get_config(stage: str = "action") -> ml_collections.ConfigDict:
    """`stage` is "video" or "action"."""
    config = ml_collections.ConfigDict(to_dict(ExperimentConfig()))
    config.stage = stage

    # Five past frames and twelve future ones are five latent frames of 6x6: 45 tokens.
    config.data.video_dataset = "runs/quickstart/data/videos/1.0.0"
    config.data.action_dataset = "runs/quickstart/data/demonstrations/1.0.0"
    config.data.image_size = (48, 48)
    config.data.future_frames = 12
    config.data.video_hz = 20.0
    config.data.control_hz = 20.0
    config.data.action_horizon = 12
    config.data.action_delay = 0.0

    config.tokenizer.fit_windows = 128  # 33,000 patches for 16 components

    config.text.rows = 8
    config.backbone.text_width = 64

    config.backbone.width = 128
    config.backbone.num_blocks = 4
    config.backbone.num_heads = 4
    config.backbone.adaln_lora_dim = 32
    config.backbone.hidden_block = 3

    config.decoder.width = 96
    config.decoder.num_blocks = 3
    config.decoder.num_heads = 4
    config.decoder.adaln_lora_dim = 32
    config.decoder.time_rank = 96
    config.decoder.proprio_dim = 4
    config.decoder.action_dim = 4

    # The policy reads the backbone near τ_v = 1, so that end of the range is seen more often than in the 2B recipe.
    config.noise.tail_probability = 0.15
    config.noise.tail_range = (32.0, 1000.0)

    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.final_fraction = 0.05
    config.train.warmup_steps = 50
    config.train.weight_decay = 0.01
    config.train.ema_decay = 0.995
    config.train.log_every = 20
    config.train.validate_every = 400
    config.train.checkpoint_every = 200
    if stage == "video":
        config.train.steps = 600
        config.train.batch_size = 16
        config.train.clip_norm = 100.0  # the loss carries the published factor of 100
    else:
        config.backbone_run = "runs/quickstart/video"
        config.train.steps = 1000
        config.train.batch_size = 16
        config.train.clip_norm = 10.0
        config.train.action_draws = 4

    config.policy.execute_steps = 3
    config.evaluation.tasks = TASKS
    config.evaluation.max_steps = 50
    return config


def sweep() -> Points:
    """Of either stage: learning rate and weight decay."""
    return (rate | decay for rate, decay in itertools.product(sweep_lr(), sweep_weight_decay()))


def sweep_lr() -> Points:
    """Of either stage."""
    for rate in (3e-4, 1e-3, 3e-3):
        yield {"train.learning_rate": rate}


def sweep_weight_decay() -> Points:
    """Of either stage."""
    for decay in (0.0, 0.01, 0.1):
        yield {"train.weight_decay": decay}


def sweep_seed() -> Points:
    """Of either stage."""
    for seed in (0, 1, 2):
        yield {"seed": seed}


def sweep_hidden_block() -> Points:
    """Of stage `action`: the blocks of the backbone that the decoder reads after, from none to all four."""
    for block in (0, 1, 2, 3, 4):
        yield {"backbone.hidden_block": block}


def sweep_stop_step() -> Points:
    """Of stage `action`, and read in evaluation alone, so that all points share one run: steps of the video sampler."""
    for step in (0, 1, 2, 5, 10, 20, 35):
        yield {"policy.stop_step": step}


def sweep_demonstrations() -> Points:
    """Of stage `action`: the first 1 to 20 demonstrations of each of the two tasks."""
    for count in (1, 2, 5, 10, DEMONSTRATIONS):
        first = (task * DEMONSTRATIONS for task in range(len(TASKS)))
        yield {"data.train_split": "+".join(f"train[{start}:{start + count}]" for start in first)}
