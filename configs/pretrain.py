"""The 2B video model trained whole on a mixture of Open X-Embodiment, and decoders on top of it, on TPU pods.

    python launch/train.py --config=configs/pretrain.py:video_v5e --workdir=/mnt/runs/pretrain
    python launch/train.py --config=configs/pretrain.py:action_v5e --workdir=/mnt/runs/action

The argument is a stage and a pod: `v5e` (256 chips, v5e:16x16), `v5e_32` (the same with a global batch of 32, eight chips to a
sample), `v5p` (128 chips, v5p:4x4x8) or `v6e` (256 chips, v6e:16x16). Whether a step fits, and what bounds it, is known before:

    python launch/compile.py --config=configs/pretrain.py:video_v5e --topology=v5e:16x16

Before stage 1, NVIDIA's model becomes `runs/cosmos` (configs/published.py:cosmos), where the weights start and whose tokenizer
makes the latents: encoding 61 frames of 480x640 takes 93 TFLOP a window, beside 450 for training on it (`step_flops`), so it is
done once:

    python launch/precompute_latents.py --config=configs/pretrain.py:video_v5e

Stage 2 is a Bridge decoder on the model of stage 1. The rates of stage 1 are ours, as the authors only finetune adapters.
"""

from typing import NamedTuple

import ml_collections

from mimic_video.config import CompatConfig, ExperimentConfig, to_dict

ROTATION_DIMS = tuple(range(3, 9))


class Pod(NamedTuple):
    """How a step is laid out on the chips of a topology: fsdp x sequence of them, with fsdp a divisor of the batch."""

    topology: str
    batch_size: int
    fsdp: int
    sequence: int


PODS = {
    "v5e": Pod("v5e:16x16", batch_size=256, fsdp=256, sequence=1),
    "v5e_32": Pod("v5e:16x16", batch_size=32, fsdp=32, sequence=8),
    "v5p": Pod("v5p:4x4x8", batch_size=256, fsdp=128, sequence=1),
    "v6e": Pod("v6e:16x16", batch_size=256, fsdp=256, sequence=1),
}


TOPOLOGIES = {f"{stage}_{name}": pod.topology for stage in ("video", "action") for name, pod in PODS.items()}


def get_config(name: str = "video_v5e") -> ml_collections.ConfigDict:
    """`name` is one of `TOPOLOGIES`: a stage, an underscore and a pod."""
    if name not in TOPOLOGIES:
        raise ValueError(f"configs/pretrain.py:{name} is unknown; expected one of {', '.join(TOPOLOGIES)}")
    stage, _, pod_name = name.partition("_")
    pod = PODS[pod_name]
    # The defaults of the networks, the window and the noise are those of the 2B system: 61 frames of 480x640, 19,200 tokens.
    config = ml_collections.ConfigDict(to_dict(ExperimentConfig(compat=CompatConfig(bfloat16_rope=True))))
    config.stage = stage
    config.precision = "bfloat16"
    config.tokenizer.kind = "wan"
    config.text.kind = "t5"
    config.text.model = "google-t5/t5-11b"
    config.text.cache = "runs/text"
    config.data.root = "/data/oxe"
    config.data.latents = "/data/latents"
    config.data.workers = 8
    config.data.skip_broken = True
    config.mesh.data, config.mesh.fsdp, config.mesh.sequence = 1, pod.fsdp, pod.sequence

    config.train.batch_size = pod.batch_size
    config.train.remat = "attention"
    config.train.log_every = 50
    config.train.checkpoint_every = 1000
    config.train.keep_every = 10_000
    config.train.spike_factor = 4.0
    if stage == "video":
        config.data.video_dataset = "oxe_magic_soup_plus_minus"
        config.backbone_run = "runs/cosmos"
        config.train.steps = 100_000
        config.train.learning_rate = 5e-5
        config.train.warmup_steps = 2000
        config.train.schedule = "wsd"
        config.train.decay_steps = 20_000
        config.train.final_fraction = 0.0
        config.train.ema_std = 0.1
    else:
        config.data.action_dataset = "bridge_orig"
        config.data.raw_action_dims = config.data.raw_proprio_dims = ROTATION_DIMS
        config.backbone_run = "runs/pretrain"
        config.train.steps = 50_000
        config.train.learning_rate = 1e-4
        config.train.schedule = "linear"
        config.train.schedule_steps = 500_000
        config.train.action_draws = 4
    return config
