"""Both stages at 240x320, on eight TPU v5e or one large GPU, and sizes for Colab.

    python launch/train.py --config=configs/small.py:half_video --config.backbone_run=runs/cosmos --workdir=runs/video
    python launch/train.py --config=configs/small.py:half_action --config.backbone_run=runs/video --workdir=runs/action

`half_*` are windows of 61 frames at 240x320, 4,800 tokens, with the published adapters (v5e:2x4; on one GPU raise
train.micro_batches until it fits). `colab_*` are windows of 21 frames, 1,800 tokens, with small adapters of attention alone and a
decoder of half the depth, for the 16 GB of Colab's one TPU v5e. All start from NVIDIA's model as converted with the same window
(configs/published.py:cosmos, with --config.data.image_size=240,320 and for Colab --config.data.future_frames=16) and read the
registry's Bridge from `data.root`. Whether they fit:

    python launch/compile.py --config=configs/small.py:half_video --topology=v5e:2x4
    python launch/compile.py --config=configs/small.py:colab_video --topology=v5e:1x1

Sweeps (docs/sweeps.md) are declared below `get_config`.
"""

import itertools
from collections.abc import Iterator

import ml_collections

from mimic_video.config import CompatConfig, ExperimentConfig, to_dict

ROTATION_DIMS = tuple(range(3, 9))
Points = Iterator[dict[str, object]]  # of a sweep: values by the paths of fields
TOPOLOGIES = {"half_video": "v5e:2x4", "half_action": "v5e:2x4", "colab_video": "v5e:1x1", "colab_action": "v5e:1x1"}


def get_config(name: str = "colab_action") -> ml_collections.ConfigDict:
    """`name` is one of `TOPOLOGIES`: a size, an underscore and a stage."""
    if name not in TOPOLOGIES:
        raise ValueError(f"configs/small.py:{name} is unknown; expected one of {', '.join(TOPOLOGIES)}")
    size, _, stage = name.partition("_")
    config = ml_collections.ConfigDict(to_dict(ExperimentConfig(compat=CompatConfig.published())))
    config.compat.percentile_clamp = False  # of the decoder, which is no published one: rare commands are kept
    config.stage = stage
    config.precision = "bfloat16"
    config.tokenizer.kind = "wan"
    config.text.kind = "t5"
    config.text.model = "google-t5/t5-11b"
    config.text.cache = "runs/text"
    config.data.root = "/data/oxe"
    config.data.video_dataset = config.data.action_dataset = "bridge_orig"
    config.data.raw_action_dims = config.data.raw_proprio_dims = ROTATION_DIMS
    config.data.image_size = (240, 320)
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.train.remat = "full"
    config.train.batch_size = 32
    config.train.log_every = 20
    if stage == "video":
        config.train.steps = 20_000
        config.train.learning_rate = 10**-3.75
        config.train.warmup_steps = 0
        config.lora.rank = 256
    else:
        config.train.steps = 30_000
        config.train.learning_rate = 1e-4
        config.train.schedule = "linear"
        config.train.schedule_steps = 500_000
        config.train.action_draws = 4

    if size == "colab":
        config.data.future_frames = 16
        config.decoder.num_blocks = 12
        config.train.batch_size = 8
        config.train.micro_batches = 8 if stage == "video" else 4
        config.train.first_moment = "bfloat16"
        if stage == "video":
            config.lora.rank = 16
            config.lora.alpha = 16.0
            config.lora.targets = ("q_proj", "k_proj", "v_proj", "out_proj")
            config.lora.trained = ()
    return config


def sweep() -> Points:
    """Of either stage: learning rate and weight decay."""
    return (rate | decay for rate, decay in itertools.product(sweep_lr(), sweep_weight_decay()))


def sweep_lr() -> Points:
    """Of either stage: about the published rates of both."""
    for rate in (3e-5, 1e-4, 3e-4):
        yield {"train.learning_rate": rate}


def sweep_weight_decay() -> Points:
    """Of either stage."""
    for decay in (0.01, 0.1):
        yield {"train.weight_decay": decay}


def sweep_seed() -> Points:
    """Of either stage."""
    for seed in (0, 1, 2):
        yield {"seed": seed}


def sweep_lora_rank() -> Points:
    """Of stage `video`, whose adapters are of NVIDIA's model."""
    for rank in (4, 16, 64, 256):
        yield {"lora.rank": rank}


def sweep_hidden_block() -> Points:
    """Of stage `action`: the blocks of the backbone that the decoder reads after, from none to all 28."""
    for block in (0, 7, 14, 20, 28):
        yield {"backbone.hidden_block": block}


def sweep_demonstrations() -> Points:
    """Of stage `action`: a share of Bridge's episodes, whose stored order is random."""
    for share in (1, 3, 10, 30, 100):
        yield {"data.train_split": f"train[:{share}%]"}
