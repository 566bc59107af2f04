"""The published system, for its released checkpoints and for training as its authors did.

    python launch/convert.py --config=configs/published.py:bridge --source=DIR --workdir=runs/bridge --backbone=... --decoder=...

turns released weights into a run directory that every other command reads (docs/checkpoints.md).

    python launch/train.py --config=configs/published.py:bridge --config.backbone_run=runs/cosmos --workdir=runs/action

trains a Bridge decoder on a converted backbone, with the published hyperparameters (SPEC 4.4), on RLDS that has been prepared
in the published layout: images of 480x640, proprioception and actions as [position 3 | rotation 6 | gripper 1].

`cosmos` and `cosmos_14b` are NVIDIA's video models alone (stage `video`); `bridge` and `libero` are video-action models, and
`bridge_video` and `libero_video` their backbones as the authors finetuned them, by adapters of rank 256 (SPEC 4.3):

    python launch/train.py --config=configs/published.py:bridge_video --config.backbone_run=runs/cosmos --workdir=runs/video

Batches are spread over all the chips there are; those of `TOPOLOGIES` have one sample each.
"""

import ml_collections

from mimic_video.config import CompatConfig, ExperimentConfig, to_dict

ROTATION_DIMS = tuple(range(3, 9))  # two rows of a rotation matrix, which are never normalised
TOPOLOGIES = {
    "bridge": "v5e:16x16",
    "bridge_video": "v5e:8x8",
    "libero": "v5e:8x16",
    "libero_video": "v5e:4x8",
    "cosmos": "v5e:4x8",
    "cosmos_14b": "v5p:2x4x4",
}


def get_config(name: str = "bridge") -> ml_collections.ConfigDict:
    """`name` is one of `TOPOLOGIES`."""
    if name not in TOPOLOGIES:
        raise ValueError(f"configs/published.py:{name} is unknown; expected one of {', '.join(TOPOLOGIES)}")
    # The defaults of the networks, the window and the training noise are those of the 2B system on Bridge.
    config = ml_collections.ConfigDict(to_dict(ExperimentConfig(compat=CompatConfig.published())))
    config.precision = "bfloat16"
    config.tokenizer.kind = "wan"
    config.text.kind = "t5"
    config.text.model = "google-t5/t5-11b"
    config.text.cache = "runs/text"
    config.train.mask_padding = False
    config.data.raw_action_dims = config.data.raw_proprio_dims = ROTATION_DIMS

    config.mesh.data, config.mesh.fsdp = 1, -1
    config.train.remat = "full"

    if name == "bridge":
        _train_decoder(config, batch_size=256)
    elif name in ("bridge_video", "libero_video"):
        _train_backbone(config, batch_size=64 if name == "bridge_video" else 32)
        config.lora.rank, config.lora.alpha = 256, 32.0
    elif name == "libero":
        config.data.action_horizon = 60
        config.data.control_hz = 20.0
        config.data.action_delay = 0.0
        _train_decoder(config, batch_size=128)
    else:
        _train_backbone(config, batch_size=32)
        if name == "cosmos_14b":
            config.backbone.width, config.backbone.num_blocks, config.backbone.num_heads = 5120, 36, 40
            config.backbone.rope_ratio = (20 / 24, 2.0, 2.0)
    return config


def _train_decoder(config: ml_collections.ConfigDict, batch_size: int) -> None:
    config.stage = "action"
    config.train.batch_size = batch_size
    config.train.learning_rate = 1e-4
    config.train.warmup_steps = 1000
    config.train.schedule = "linear"
    config.train.schedule_steps = 500_000
    config.train.steps = 50_000  # the released decoders stopped between 14,000 and 52,000


def _train_backbone(config: ml_collections.ConfigDict, batch_size: int) -> None:
    config.stage = "video"
    config.train.batch_size = batch_size
    config.train.learning_rate = 10**-3.75
    config.train.warmup_steps = 0
    config.train.schedule = "constant"
    config.train.average_generated_only = False
