"""Latency of a policy, and how fast one starts."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from mimic_video.analysis import torch_reference
from mimic_video.analysis.aot import widest_robot
from mimic_video.analysis.policy_flops import policy_flops
from mimic_video.config import ExperimentConfig
from mimic_video.policy.latency import measure
from mimic_video.policy.policy import Policy
from mimic_video.runs.storage import RunError
from mimic_video.training.flops import video_tokens
from mimic_video.vam import VideoActionModel

ROOT = pathlib.Path(__file__).resolve().parents[2]
START = """
import json, sys, time
from mimic_video.cache import keep_compiled_programs
keep_compiled_programs()
from mimic_video.policy.policy import Policy
times = {"imported": time.time()}
policy = Policy.load(sys.argv[1], embodiment=sys.argv[2] or None)
times["loaded"] = time.time()
policy.warm_up()
print(json.dumps(times | {"acted": time.time()}))
"""


def random_policy(config: ExperimentConfig) -> Policy:
    """With random parameters, in the precision of the policy, and text features that are the same for all instructions."""
    vam = VideoActionModel(config)
    params = jax.jit(lambda: vam.cast(vam.init(jax.random.key(0))))()
    text = np.random.default_rng(0).standard_normal((config.text.rows, config.backbone.text_width), np.float32)
    return Policy(config, params, widest_robot(config), encode_text=lambda _: text)


def policy_latency(config: ExperimentConfig, batch: int, repeats: int, rate: float, reference: bool) -> dict[str, Any]:
    """Stages and total of a policy with random parameters, beside the time that its matrix products need at `rate` a second."""
    policy, counted = random_policy(dataclasses.replace(config, stage="action")), policy_flops(config)
    stages = measure(policy, batch, repeats)
    for name, flops in dataclasses.asdict(counted).items():
        floor = batch * flops / rate * 1e3
        stages[name] |= {
            "gflops": round(batch * flops / 1e9, 3),
            "floor_ms": round(floor, 3),
            "over_floor": round(stages[name]["p50_ms"] / floor, 2),
        }
    floor = batch * counted.total / rate * 1e3
    result: dict[str, Any] = {
        "image_size": list(config.data.image_size),
        "batch": batch,
        "precision": config.precision,
        "tokens": video_tokens(policy.program.vam),
        "policy": dataclasses.asdict(config.policy),
        "stages": stages,
        "product_tflops_per_second": round(rate / 1e12, 4),
        "total_gflops": round(batch * counted.total / 1e9, 3),
        "floor_ms": round(floor, 3),
        "over_floor": round(stages["program"]["p50_ms"] / floor, 2),
    }
    if reference:
        ours = sum(stages[name]["p50_ms"] for name in ("video", "context", "steps"))
        theirs = torch_reference.times(policy, batch, repeats)
        result["torch"] = theirs
        result["video_to_actions_ms"] = round(ours, 3)
        for kind in ("recomputed", "cached"):
            result[f"faster_than_torch_{kind}"] = round((theirs["video"]["p50_ms"] + theirs[kind]["p50_ms"]) / ours, 2)
    return result


def cold_start(policy: str, embodiment: str | None) -> dict[str, Any]:
    """Seconds from the start of a process to its first action, for one robot: without compiled programs and with those of before.

    Raises:
        RunError: if the process fails, with what it said last.
    """
    result: dict[str, Any] = {"policy": policy}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache}
        for name in ("empty_cache", "filled_cache"):
            start = time.time()
            ended = subprocess.run(
                [sys.executable, "-c", START, policy, embodiment or ""], env=environment, capture_output=True, text=True
            )
            if ended.returncode:
                raise RunError(f"{policy} cannot be started: {(ended.stderr.strip().splitlines() or ['?'])[-1]}")
            times = json.loads(ended.stdout.splitlines()[-1])
            result[name] = {
                "import_s": round(times["imported"] - start, 2),
                "load_s": round(times["loaded"] - times["imported"], 2),
                "first_action_s": round(times["acted"] - times["loaded"], 2),
                "total_s": round(times["acted"] - start, 2),
            }
    return result
