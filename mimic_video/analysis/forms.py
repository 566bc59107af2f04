"""Every form that the programs of this package have: steps of experiments, and a policy's plans."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from mimic_video.analysis.aot import widest_robot
from mimic_video.config import ExperimentConfig
from mimic_video.models.layers import Remat
from mimic_video.transforms import compute_statistics


def narrow(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment with two narrow blocks a network and small windows, of latents; what decides about programs is as it was."""

    def head(width: int, heads: int) -> int:
        return min(width // heads, 128)

    backbone, decoder = config.backbone, config.decoder
    backbone = dataclasses.replace(
        backbone,
        width=2 * head(backbone.width, backbone.num_heads),
        num_heads=2,
        num_blocks=2,
        hidden_block=1,
        text_width=64,
        adaln_lora_dim=16,
    )
    decoder = dataclasses.replace(
        decoder, width=2 * head(decoder.width, decoder.num_heads), num_heads=2, num_blocks=2, adaln_lora_dim=16, time_rank=32
    )
    data = dataclasses.replace(config.data, image_size=(64, 96), future_frames=8, latents="precomputed")
    micro = config.train.micro_batches
    kept = dataclasses.replace(config.train, batch_size=2 * micro, warmup_steps=0)
    return dataclasses.replace(
        config,
        backbone=backbone,
        decoder=decoder,
        data=data,
        train=kept,
        backbone_run="any",
        text=dataclasses.replace(config.text, kind="hash", rows=16),
        tokenizer=dataclasses.replace(config.tokenizer, width=16),
        lora=dataclasses.replace(config.lora, rank=min(config.lora.rank, 8)),
    )


def policy_forms(config: ExperimentConfig) -> Iterator[tuple[str, ExperimentConfig, dict[str, Any]]]:
    """(name, experiment, arguments of `policy_program`) of all that a policy's program may be."""

    def changed(**parts: Any) -> ExperimentConfig:
        """With fields of parts of the experiment changed, or fields of its own."""
        values = {
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in parts.items()
        }
        return dataclasses.replace(config, **values)

    views = changed(data={"cameras": ("primary", "wrist")})
    robots = changed(decoder={"embodiments": 2})
    robot = widest_robot(robots)
    four = compute_statistics(np.random.default_rng(0).normal(size=(100, config.data.action_horizon, 4)))
    narrower = dataclasses.replace(robot, statistics={**robot.statistics, "action": four})
    for batch in (1, 8):
        yield f"one chunk, batch {batch}", config, {"batch": batch}
        yield f"three samples, batch {batch}", config, {"batch": batch, "samples": 3}
        yield f"real-time chunking, batch {batch}", config, {"batch": batch, "continuing": True}
    yield "video denoised", changed(policy={"stop_step": 2}), {"batch": 1}
    yield "int8", changed(policy={"weights": "int8"}), {"batch": 1}
    yield "float32", changed(precision="float32"), {"batch": 1}
    yield "float32, three samples", changed(precision="float32"), {"batch": 2, "samples": 3}
    yield "two cameras", views, {"batch": 2}
    yield "a missing camera", views, {"batch": 2, "robot": dataclasses.replace(widest_robot(views), cameras=("primary",))}
    yield "two robots", robots, {"batch": 2, "samples": 3}
    yield "a narrower robot, real-time chunking", robots, {"batch": 2, "continuing": True, "robot": narrower}


def step_forms(shipped: Mapping[str, ExperimentConfig]) -> Iterator[tuple[str, ExperimentConfig]]:
    """(name, narrow experiment) of a step of every shipped experiment, and of what none of them has."""
    for name, config in shipped.items():
        yield name, narrow(config)
    bridge, video = narrow(shipped["published:bridge"]), narrow(shipped["published:bridge_video"])
    yield "action, from frames", dataclasses.replace(bridge, data=dataclasses.replace(bridge.data, latents=""))
    yield "eight draws", dataclasses.replace(bridge, train=dataclasses.replace(bridge.train, action_draws=8))
    yield "two robots", dataclasses.replace(bridge, decoder=dataclasses.replace(bridge.decoder, embodiments=2))
    for name, config in (("action, two cameras", bridge), ("video, two cameras", video)):
        yield name, dataclasses.replace(config, data=dataclasses.replace(config.data, cameras=("primary", "wrist")))
    computed: tuple[tuple[Literal["float32", "bfloat16"], Remat], ...] = (("float32", "none"), ("bfloat16", "attention"))
    for precision, remat in computed:
        for name, config in (("action", bridge), ("video", video)):
            train = dataclasses.replace(config.train, remat=remat)
            yield f"{name}, {precision}, remat {remat}", dataclasses.replace(config, precision=precision, train=train)
