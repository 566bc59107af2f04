"""How long a policy takes, stage by stage."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mimic_video.policy.policy import Policy


def measure(policy: Policy, batch: int = 1, repeats: int = 30, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Times of planning for `batch` robots, each from a call to the arrival of its result, on observations of nothing.

    The stages are programs of their own here; what the policy runs is the one program, which saves the way between them.

    Args:
        image_size: (height, width) of the cameras; None for the size that the policy sees, at which nothing is resized.

    Returns:
        {name: {"p50_ms", "p95_ms", "p99_ms"}}, of compiled programs also "compile_s". "host": checking, resizing, text features;
        "noise": drawing it; "encode": of the observed frames; "video": the backbone; "context": keys and values; "steps": the
        action flow; "unnormalize"; "program": all but the host's part, in one; "call":
        all of it.
    """
    data, program, params = policy.config.data, policy.program, policy.params
    height, width = image_size or data.image_size
    random = np.random.default_rng(0)
    cameras: list[str] = [name for name in data.cameras if name in policy.embodiment.cameras]
    images = {name: random.integers(0, 256, (batch, data.past_frames, height, width, 3), np.uint8) for name in cameras}
    proprio = np.tile(policy.embodiment.statistics["proprio"].mean_clamped.astype(np.float32), (batch, 1))
    observation = images, proprio, [""] * batch
    report = {"host": percentiles(lambda: policy.prepare(*observation), repeats)}
    _, *inputs = policy.prepare(*observation)
    video, proprio, text, key_data = jax.device_put(tuple(inputs))
    vam = program.vam

    def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a stage, whose times go into the report."""
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        report[name] = percentiles(lambda: compiled(*arguments), repeats) | {"compile_s": round(seconds, 2)}
        return compiled(*arguments)

    noise = run("noise", lambda key_data: program.noise(key_data, batch), key_data)
    observed = jax.jit(program.observe)(params, video, proprio, text)
    conditioning = run("encode", vam.condition, params, observed)
    hidden, at = run("video", vam.sample_hidden, params, conditioning, noise["video"])
    told = run("context", vam.action_conditioning, params, hidden, at, observed)
    chunk = run("steps", vam.decode_actions, params, told, noise["actions"])
    run("unnormalize", program.raw_actions, params, chunk)
    run("program", program, params, video, proprio, text, key_data)
    policy(*observation)  # compiles
    return report | {"call": percentiles(lambda: policy(*observation), repeats)}


def percentiles(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Percentiles of the calls after a first one, in milliseconds."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    p50, p95, p99 = np.percentile(times, [50, 95, 99]) * 1e3
    return {"p50_ms": round(p50, 3), "p95_ms": round(p95, 3), "p99_ms": round(p99, 3)}
