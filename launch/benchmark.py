"""Measures the training step of either stage and action chunks of an experiment, on random data; prints one JSON object.

    python launch/benchmark.py --config=configs/quickstart.py [--batch_sizes=1,20]

Each time is of one call up to the arrival of its result; compilation is reported apart.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import experiment
import jax
import numpy as np
from absl import flags

from mimic_video.config import ExperimentConfig
from mimic_video.training.sharding import global_batch, make_mesh
from mimic_video.training.steps import make_state, make_train_step, place, split_params
from mimic_video.vam import VideoActionModel

_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed calls of each kind", lower_bound=2)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "20"], "Robots that a chunk is planned for at once")


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the first call (compilation included) and percentiles of the others, in milliseconds."""
    times = []
    for _ in range(_REPEATS.value + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    p50, p95 = np.percentile(times[1:], [50, 95]) * 1e3
    return {"first_call_s": round(times[0], 2), "p50_ms": round(p50, 2), "p95_ms": round(p95, 2)}


def random_batch(config: ExperimentConfig, size: int) -> dict[str, np.ndarray]:
    data, decoder, random = config.data, config.decoder, np.random.default_rng(0)
    return {
        "video": random.integers(0, 256, (size, data.num_frames, *data.frame_size, 3), np.uint8),
        "video_mask": np.ones((size, data.num_frames), bool),
        "text": random.standard_normal((size, config.text.rows, config.text.width)).astype(np.float32),
        "proprio": random.standard_normal((size, decoder.obs_horizon, decoder.proprio_dim)).astype(np.float32),
        "actions": random.standard_normal((size, decoder.action_horizon, decoder.action_dim)).astype(np.float32),
        "action_mask": np.ones((size, decoder.action_horizon), bool),
    }


def training(config: ExperimentConfig) -> dict[str, float]:
    vam, mesh = VideoActionModel(config), make_mesh(config.mesh)
    trained, frozen = split_params(vam.init(jax.random.key(0)), config)
    state, frozen = place(make_state(config, trained), mesh), place(frozen, mesh)
    batch = global_batch(random_batch(config, config.train.batch_size), mesh)
    step = make_train_step(vam, mesh, state)

    def call():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    result = timed(call)
    return result | {"steps_per_second": round(1e3 / result["p50_ms"], 2), "batch_size": config.train.batch_size}


def chunks(config: ExperimentConfig, size: int) -> dict[str, float]:
    vam, batch = VideoActionModel(config), random_batch(config, size)
    params, noise = vam.init(jax.random.key(0)), vam.draw_noise(jax.random.key(0), size)
    plan = jax.jit(vam.sample_actions)
    past = batch["video"][:, : config.data.past_frames]
    return timed(lambda: plan(params, past, batch["proprio"], batch["text"], noise))


def main(config: ExperimentConfig) -> None:
    device = jax.devices()[0]
    print(json.dumps({
        "devices": f"{jax.device_count()} x {device.device_kind}",
        **{f"{stage}_training": training(dataclasses.replace(config, stage=stage)) for stage in ("video", "action")},
        **{f"chunk_for_{size}": chunks(config, int(size)) for size in _BATCH_SIZES.value},
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    experiment.run(main)
