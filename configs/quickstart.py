"""Meta-World on two CPU cores: action-free videos and a few labelled demonstrations to a policy, in minutes.

    python launch/quickstart.py

runs all of it. The stages by themselves, once `launch/collect.py` has written the datasets:

    python launch/train.py --config=configs/quickstart.py:video --workdir=runs/quickstart/video
    python launch/train.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action
    python launch/evaluate.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action

The networks are those of the 2B system, only narrower.
"""

import ml_collections

from mimic_video.config import ExperimentConfig, to_dict

TASKS = ("drawer-open-v3", "drawer-close-v3")


def get_config(stage: str = "action") -> ml_collections.ConfigDict:
    """`stage` is "video" or "action"."""
    config = ml_collections.ConfigDict(to_dict(ExperimentConfig()))
    config.stage = stage

    # Five past frames and twelve future ones are five latent frames of 8x8: 80 tokens.
    config.data.video_dataset = "runs/quickstart/data/videos/1.0.0"
    config.data.action_dataset = "runs/quickstart/data/demonstrations/1.0.0"
    config.data.image_size = (64, 64)
    config.data.future_frames = 12
    config.data.video_hz = 20.0
    config.data.control_hz = 20.0
    config.data.action_horizon = 12
    config.data.action_delay = 0.0

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
    config.train.validate_every = 200
    config.train.checkpoint_every = 200
    if stage == "video":
        config.train.steps = 1000
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
