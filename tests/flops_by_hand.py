"""Model FLOPs as they were counted by hand, of shipped experiments and of what none of them has.

`flops_by_hand.json` says where its numbers come from. They are of published sizes, where attention goes in parts.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from typing import Any

from mimic_video.config import ExperimentConfig, experiment_from

ROOT = pathlib.Path(__file__).parents[1]
COUNTED: dict[str, Any] = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
VIEWS = {"data": {"cameras": ("primary", "wrist")}}
SMALL_IMAGES = {"data": {"image_size": (64, 64)}}
FROM_LATENTS = {"lora": {"rank": 0}, "data": {"latents": "there"}, "backbone_run": "there"}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "64x64 pixels": ("quickstart:action", SMALL_IMAGES | {"train": {"action_draws": 4}}),
    "64x64 pixels, video": ("quickstart:video", SMALL_IMAGES),
    "two cameras": ("published:bridge", VIEWS),
    "two cameras, video": ("published:bridge_video", VIEWS),
    "eight draws": ("published:bridge", {"train": {"action_draws": 8}}),
    "three robots": ("published:libero", {"decoder": {"embodiments": 3}, "train": {"action_draws": 2}}),
    "adapted decoder": (
        "published:bridge",
        {"lora": {"rank": 8, "targets": ("q_proj", "mlp"), "trained": ("final_modulation",)}},
    ),
    "few adapters": ("published:bridge_video", {"lora": {"rank": 16, "targets": ("q_proj", "mlp/up"), "trained": ()}}),
    "whole finetuning from latents": ("published:bridge_video", FROM_LATENTS),
    "video denoised": ("published:bridge", {"policy": {"stop_step": 3}}),
    "video denoised until a flow time": ("published:bridge", {"policy": {"stop_time": 0.9}}),
    "principal components": ("published:bridge", {"tokenizer": {"kind": "pca"}}),
    "kernels, remat and parts": (
        "published:bridge_video",
        {"attention": "cudnn", "train": {"remat": "full", "micro_batches": 4}},
    ),
}


@functools.cache
def experiment(name: str) -> ExperimentConfig:
    """One of `CHANGED`, or FILE:ARGUMENT of a shipped one."""
    if name in CHANGED:
        base, changes = CHANGED[name]
        config = experiment(base)
        parts = {
            part: dataclasses.replace(getattr(config, part), **change) if isinstance(change, dict) else change
            for part, change in changes.items()
        }
        return dataclasses.replace(config, **parts)
    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return experiment_from(module.get_config(argument).to_dict())
