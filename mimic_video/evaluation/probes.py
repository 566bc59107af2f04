"""Measures what a run makes of recorded windows, and of windows in which one input is another's: for findings.py to judge."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mimic_video.batch import Observation
from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.findings import SCALES, ActionMeasurements, FlowTimeMeasurements, VideoMeasurements
from mimic_video.evaluation.offline import Window, full_batches, planned_chunks
from mimic_video.evaluation.video import make_predictor
from mimic_video.flow import matching, solvers
from mimic_video.policy.latency import percentiles
from mimic_video.policy.policy import Policy
from mimic_video.vam import Conditioning, Latents, Params, VideoActionModel

_ROBOTS = 32  # in one call of a policy
_VIDEOS = 8  # whole windows in one call
_CURVE_POINTS = 6  # τ_v of the action errors


def exchanged(windows: Sequence[Window], *inputs: str) -> tuple[list[Window], str]:
    """The windows, each with these inputs of a window of another episode, in which they differ; or why there are none."""
    order = np.random.default_rng(0).permutation(len(windows))
    found = []
    for place, window in enumerate(windows):
        others = (windows[i] for i in np.roll(order, -place))
        donor = next(
            (other for other in others if other["episode"] != window["episode"] and _differ(window, other, inputs)), None
        )
        if donor is None:
            return [], f"no window of another episode has another {' or '.join(inputs)}"
        found.append({**window, **{name: donor[name] for name in inputs}})
    return found, ""


def _differ(one: Window, other: Window, inputs: Sequence[str]) -> bool:
    return any(not np.array_equal(one[name], other[name]) for name in inputs)


def exchanged_cameras(windows: Sequence[Window], cameras: Sequence[str], names: Sequence[str]) -> dict[str, list[Window]]:
    """For every two cameras that the windows have, "A ↔ B" → the windows with these exchanged.

    Args:
        cameras: of the model, in the order of the views.
        names: those of them that the windows have.
    """
    found = {}
    for one, other in itertools.combinations([camera for camera in cameras if camera in names], 2):
        places = np.arange(len(cameras))
        first, second = cameras.index(one), cameras.index(other)
        places[[first, second]] = second, first
        found[f"{one} ↔ {other}"] = [{**window, "video": window["video"][places]} for window in windows]
    return found


def measure_actions(
    policy: Policy, windows: Sequence[Window], cameras: Sequence[str]
) -> tuple[ActionMeasurements, dict[str, str]]:
    """Plans for windows as they are and changed; and why an input could not be exchanged, by its name.

    Args:
        windows: of the data pipeline, in raw units; each with the number of its "episode", and "held", the command before it as a
            chunk.
        cameras: those of the model's that the windows have.
    """
    data = policy.config.data
    size = min(_ROBOTS, len(windows))

    def twice(images: np.ndarray, proprio: np.ndarray, instructions: list[str], query: int) -> np.ndarray:
        return policy.sample(images, proprio, instructions, 2, query)

    def chunks(windows: Sequence[Window]) -> np.ndarray:
        return planned_chunks(twice, windows, data.past_frames, size)  # one program for all: compiling may take minutes

    pairs = chunks(windows)
    planned, missing = {"recorded": pairs[:, 0], "noise": pairs[:, 1]}, {}
    for name, field in (("prompt", "instruction"), ("video", "video"), ("proprioception", "proprio")):
        changed, reason = exchanged(windows, field)
        if reason:
            missing[name] = reason.replace(field, name)
        else:
            planned[name] = chunks(changed)[:, 0]
    for name, changed in exchanged_cameras(windows, data.cameras, cameras).items():
        planned[name] = chunks(changed)[:, 0]
    measured = ActionMeasurements(
        episodes=np.array([window["episode"] for window in windows]),
        mask=np.stack([window["action_mask"] for window in windows]),
        recorded=np.stack([window["actions"] for window in windows]),
        planned=planned,
        held=np.stack([window["held"] for window in windows]),
        times=data.action_delay + np.arange(data.action_horizon) / data.control_hz,
    )
    return measured, missing


def measure_flow_times(policy: Policy, windows: Sequence[Window]) -> FlowTimeMeasurements:
    """Errors of actions along the video sampler's grid; windows as for `measure_actions`."""
    config, program, vam = policy.config, policy.program, policy.program.vam
    grid = solvers.karras_sigmas(config.policy.video_steps)
    steps = np.unique(np.linspace(0, len(grid) - 1, _CURVE_POINTS).round().astype(int)).tolist()
    times = np.asarray(matching.flow_time(grid[steps]))
    used = config.policy.stop_time or float(matching.flow_time(solvers.stopping_sigmas(config.policy)[-1]))

    @jax.jit
    def start(params: Params, video: Array, proprio: Array, text: Array, key: Array) -> tuple[Any, ...]:
        observation = program.observe(params, video, proprio, text)
        latents, noise = vam.latents(params, observation), program.noise(key, len(video))
        conditioning = vam.condition_on_past(latents, observation)
        return observation, latents, noise, conditioning, vam.sample_path(params, conditioning, noise["video"], steps)

    @jax.jit
    def plan(
        params: Params, seen: Observation, told: Conditioning, noise: Array, x_tau: Latents, time: Float[Array, ""]
    ) -> Float[Array, "b a m"]:
        at = jnp.full(len(x_tau), time)
        conditioning = vam.action_conditioning(params, vam.hidden_at(params, told, x_tau, at), at, seen)
        return program.raw_actions(params, vam.decode_actions(params, conditioning, noise))

    size, scale, found = min(_VIDEOS, len(windows)), policy.normalizers["action"].scale, {"generated": [], "true": []}  # type: ignore[var-annotated]
    for query, places in enumerate(full_batches(len(windows), size)):
        group = [windows[place] for place in places]
        video = np.stack([window["video"] for window in group])
        observed = video[:, :, : config.data.past_frames], np.stack([window["proprio"][-1] for window in group])
        params, _, proprio, text, key = policy.prepare(*observed, [window["instruction"] for window in group], query)
        seen, latents, noise, told, path = start(params, video, proprio, text, key)
        recorded, mask = (np.stack([window[name] for window in group]) for name in ("actions", "action_mask"))
        for name in found:
            errors = []
            for time, x_tau in zip(times, path, strict=True):
                if name == "true":
                    x_tau = (1 - time) * latents + time * noise["video"]
                squares = ((np.asarray(plan(params, seen, told, noise["actions"], x_tau, time)) - recorded) * scale) ** 2
                errors.append((squares.mean(-1) * mask).sum(1) / mask.sum(1))
            found[name].append(np.stack(errors))
    episodes = np.array([window["episode"] for window in windows])
    generated, true = (np.concatenate(found[name], axis=1)[:, : len(windows)] for name in ("generated", "true"))
    return FlowTimeMeasurements(episodes, times, used, generated, true)


def measure_latency(policy: Policy, window: Window, repeats: int) -> dict[str, float]:
    """Percentiles of a plan for one robot, from a call to its arrival, in milliseconds."""
    images = window["video"][None, :, : policy.config.data.past_frames]
    return percentiles(lambda: policy(images, window["proprio"], [window["instruction"]]), repeats)


def measure_video(
    config: ExperimentConfig, params: Params, windows: Sequence[Window], cameras: Sequence[str], inputs: bool
) -> tuple[VideoMeasurements, str]:
    """Errors of predicted futures; and why prompts could not be exchanged.

    Args:
        windows: each with the number of its "episode".
        cameras: those of the model's that the windows have.
        inputs: whether predictions are also made with other prompts, and with cameras that are exchanged.
    """
    predict, past = make_predictor(config, params, cameras, _VIDEOS), config.data.past_frames
    views = np.isin(config.data.cameras, cameras)
    real = np.stack([window["video"] for window in windows])[:, views]
    mask = np.stack([window["frame_mask"] for window in windows])[:, past:]

    def errors(video: np.ndarray, truth: np.ndarray) -> Float[np.ndarray, "n f"]:
        squares = [np.mean((np.float32(a) - np.float32(b)) ** 2, axis=(0, 2, 3, 4)) for a, b in zip(video, truth, strict=True)]
        return np.where(mask, np.stack(squares)[:, past:] / 255**2, np.nan)

    whole = predict(windows)[:, views]
    predicted, missing = {"recorded": errors(whole, real)}, ""
    if inputs:
        changed, missing = exchanged(windows, "instruction")
        if changed:
            predicted["prompt"] = errors(predict(changed)[:, views], real)
        for name, changed in exchanged_cameras(windows, config.data.cameras, cameras).items():
            truth = np.stack([window["video"] for window in changed])[:, views]
            predicted[name] = errors(predict(changed)[:, views], truth)
    repeated = real.copy()
    repeated[:, :, past:] = real[:, :, past - 1 : past]
    scaled = {factor: parts for factor in SCALES if (parts := _scaled(whole, real, mask, past, factor))}
    measured = VideoMeasurements(
        episodes=np.array([window["episode"] for window in windows]),
        predicted=predicted,
        repeated=errors(repeated, real),
        tokenized=errors(_tokenized(config, params, windows)[:, views], real),
        scaled=scaled,
    )
    return measured, missing.replace("instruction", "prompt")


def _scaled(predicted: np.ndarray, real: np.ndarray, mask: np.ndarray, past: int, factor: float) -> tuple[np.ndarray, ...]:
    """As `VideoMeasurements.scaled`; empty if no frame has such a partner in the window."""
    frames = mask.shape[1]
    pairs = [(k, round(k * factor)) for k in range(1, frames + 1) if abs(k * factor - round(k * factor)) < 1e-6]
    pairs = [(k, other) for k, other in pairs if 1 <= other <= frames]
    if not pairs:
        return ()

    def error(video: np.ndarray, places: Callable[[int, int], int]) -> np.ndarray:
        parts = []
        for k, other in pairs:
            truth, guess = np.float32(real[:, :, past - 1 + k]), np.float32(video[:, :, past - 1 + places(k, other)])
            parts.append(np.where(mask[:, k - 1], ((truth - guess) ** 2).mean((1, 2, 3, 4)) / 255**2, np.nan))
        there = np.isfinite(parts)
        sums = np.where(there, parts, 0).sum(0)
        return np.where(there.any(0), sums / np.maximum(there.sum(0), 1), np.nan)

    at_scale, as_is = error(predicted, lambda k, other: other), error(predicted, lambda k, other: k)
    return at_scale, as_is, error(real, lambda k, other: 0)


def _tokenized(config: ExperimentConfig, params: Params, windows: Sequence[Window]) -> np.ndarray:
    """Videos through latents and back."""
    vam, size = VideoActionModel(config), min(_VIDEOS, len(windows))
    through = jax.jit(lambda params, video: vam.decode_video(params, vam.encode_video(params, video)))
    found = []
    for places in full_batches(len(windows), size):
        found.append(np.asarray(through(params, np.stack([windows[place]["video"] for place in places]))))
    return np.concatenate(found)[: len(windows)]
