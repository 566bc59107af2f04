"""Closed-loop evaluation: a plan function drives batches of simulated episodes, and success is counted."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.evaluation.environment import EnvironmentFactory, EnvironmentPool, GymObservation, views
from mimic_video.evaluation.simulators import ExpertFactory, with_expert
from mimic_video.media import write_video
from mimic_video.policy.history import FrameHistory
from mimic_video.policy.strategies import Executor, SimulatedDelay, make_strategy
from mimic_video.rerun_log import RerunLog
from mimic_video.transforms import resize_images

_log = logging.getLogger(__name__)


class Plan(Protocol):
    """Observations to action chunks, for a batch of b episodes. Raw units on both sides."""

    def __call__(
        self, images: Mapping[str, np.ndarray], proprio: np.ndarray, instructions: list[str], query_index: int, /
    ) -> np.ndarray:
        """Plans the next actions of every episode. In real-time chunking there is one argument more, a `Committed`.

        Args:
            images: of each camera uint8 (b, past_frames, H, W, 3) at the video rate; the last one is the present.
            proprio: float32 (b, p), the present.
            instructions: b strings.
            query_index: calls made earlier in these episodes, e.g. to fold into a random key.

        Returns:
            float32 (b, a, m) with a ≥ execute_steps, at the control rate; the first action is executed now.
        """
        ...


class Hold(Protocol):
    """What robots are told that have no action and hold still."""

    def __call__(self, last: np.ndarray | None, robots: int) -> np.ndarray:
        """(robots, m), given the actions of the last step; None before any."""
        ...


def _cannot_hold(last: np.ndarray | None, robots: int) -> np.ndarray:
    raise ValueError("robots have to hold still while a plan is made: pass `hold` to say how")


class PlannedChunk(NamedTuple):
    """What a plan was for one episode.

    Attributes:
        step: control step that it was made at.
        seconds: that planning took, for all episodes together.
        actions: (a, m), raw units.
        committed: (n, m), what the plan had to continue; None if nothing.
    """

    step: int
    seconds: float
    actions: np.ndarray
    committed: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended.

    Attributes:
        task: the simulator's name for it.
        seed: with `task`, determines the episode's start.
        success: whether the task succeeded within the step limit.
        steps: control steps taken: up to the success, or the limit.
        actions: float32 (steps, m), as executed, raw units.
        proprio: float32 (steps + 1, p), raw units, the first before any action.
        frames: of each camera uint8 (steps + 1, H, W, 3) at the control rate, the first before any action; None unless recorded.
        instruction: what the policy was told.
        plans: in their order; none unless recorded.
    """

    task: str
    seed: int
    success: bool
    steps: int
    actions: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    proprio: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    frames: Mapping[str, np.ndarray] | None = dataclasses.field(default=None, repr=False, compare=False)
    instruction: str = dataclasses.field(default="", repr=False, compare=False)
    plans: Sequence[PlannedChunk] = dataclasses.field(default=(), repr=False, compare=False)


def run_rollouts(
    plan: Plan, factory_for: Callable[[str], EnvironmentFactory], config: ExperimentConfig, record: int = 0
) -> list[EpisodeResult]:
    """Runs `config.evaluation.episodes_per_task` episodes of every task, from seeds `first_seed`, `first_seed + 1`, ...

    The episodes of a task run in lockstep: one plan call of constant batch size for all of them, whenever
    `config.policy.strategy` wants one. Episodes that have succeeded stay in the batch but are not simulated further.

    Args:
        plan: the policy.
        factory_for: task → what makes its environments, picklable: `simulators.factories(config)`.
        config: `evaluation`, `policy`, and from `data` the observed past (`past_frames`, `video_hz`) and the `control_hz` that
            the policy was trained for.
        record: the first so many episodes of each task keep their frames and plans.

    Returns:
        One result per episode, in order of tasks, then seeds.

    Raises:
        ConfigError: when there are no tasks, or when a task's control rate is not `data.control_hz`.
        ValueError: when the plan's output has the wrong shape.
        WorkerError: when a simulator fails.
    """
    results, seeds = [], evaluated_seeds(config)
    for task in evaluated_tasks(config):
        with EnvironmentPool(factory_for(task), seeds, config.evaluation.workers) as pool:
            results += run_task(plan, pool, task, config, record)
        successes = sum(result.success for result in results[-len(seeds) :])
        _log.info("%s: %d of %d episodes succeeded", task, successes, len(seeds))
    return results


def evaluated_tasks(config: ExperimentConfig) -> tuple[str, ...]:
    """`evaluation.tasks`. Raises ConfigError if there are none."""
    if not config.evaluation.tasks:
        raise ConfigError("evaluation.tasks is empty: name at least one task")
    return config.evaluation.tasks


def evaluated_seeds(config: ExperimentConfig) -> range:
    """The seeds of every task's episodes."""
    return range(config.evaluation.first_seed, config.evaluation.first_seed + config.evaluation.episodes_per_task)


def run_task(
    plan: Plan,
    pool: EnvironmentPool,
    task: str,
    config: ExperimentConfig,
    record: int = 0,
    delay: int = 0,
    hold: Hold = _cannot_hold,
) -> list[EpisodeResult]:
    """One task of `run_rollouts`, in a pool of its environments, which may be used again.

    Args:
        delay: control steps that go by between the observation that a plan is made on and its arrival.
        hold: actions of robots that have none and hold still, as they have to at times if there is a delay.
    """
    data, execute_steps, n = config.data, config.policy.execute_steps, len(pool.seeds)
    if not math.isclose(pool.control_hz, data.control_hz, rel_tol=1e-6):
        raise ConfigError(f"{task} is controlled at {pool.control_hz:g} Hz, but data.control_hz={data.control_hz:g}")

    def checked_plan(*arguments: Any) -> np.ndarray:
        start = time.perf_counter()
        actions = np.asarray(plan(*arguments))
        seconds = time.perf_counter() - start
        if actions.ndim != 3 or (len(actions), actions.shape[2]) != (n, pool.action_dim) or actions.shape[1] < execute_steps:
            raise ConfigError(
                f"{task}: the plan has shape {actions.shape}; expected ({n}, {execute_steps} or more, {pool.action_dim})"
            )
        committed = arguments[4].actions if len(arguments) > 4 and arguments[4] is not None else None
        for row in range(min(record, n)):
            own = None if committed is None else committed[row]
            plans[row].append(PlannedChunk(len(executed), seconds, actions[row], own))
        return actions

    executor = Executor(make_strategy(config.policy), checked_plan, SimulatedDelay(delay))
    observation, instructions = pool.reset()
    histories = {camera: FrameHistory(data.past_frames, data.video_hz) for camera in views(observation)}

    def observe() -> tuple[Any, ...]:
        return {camera: history.window() for camera, history in histories.items()}, proprio[-1], instructions

    def remember(observation: GymObservation, step: int) -> None:
        for camera, history in histories.items():
            history.append(observation[camera], step / data.control_hz)
        proprio.append(observation["proprio"])
        recorded.append({camera: image[:record].copy() for camera, image in views(observation).items()})

    proprio: list[np.ndarray] = []
    recorded: list[dict[str, np.ndarray]] = []
    executed: list[np.ndarray] = []
    plans: list[list[PlannedChunk]] = [[] for _ in range(n)]
    remember(observation, 0)
    active, succeeded, steps = np.ones(n, bool), np.zeros(n, bool), np.zeros(n, int)
    for step in range(config.evaluation.max_steps):
        actions = executor.step(observe)
        executed.append(hold(executed[-1] if executed else None, n) if actions is None else actions)
        observation, success, ended = pool.step(executed[-1], active)
        remember(observation, step + 1)
        steps += active
        succeeded |= success
        active &= ~(success | ended)
        if not active.any():
            break

    def frames(row: int, taken: int) -> dict[str, np.ndarray] | None:
        if row >= record:
            return None
        return {camera: np.stack([images[camera][row] for images in recorded[: taken + 1]]) for camera in histories}

    return [
        EpisodeResult(
            task,
            seed,
            bool(succeeded[row]),
            taken,
            np.stack(executed)[:taken, row],
            np.stack(proprio)[: taken + 1, row],
            frames(row, taken),
            instructions[row],
            [each for each in plans[row] if each.step < taken],  # others of its batch may have gone on
        )
        for row, (seed, taken) in enumerate(zip(pool.seeds, steps.tolist(), strict=True))
    ]


def run_expert(factory_for: Callable[[str], EnvironmentFactory], config: ExperimentConfig) -> list[EpisodeResult]:
    """The ceiling of `run_rollouts`: the simulator's scripted expert in the same episodes, without noise, in this process.

    Raises:
        ConfigError: when there are no tasks, or no expert.
    """
    results, limit = [], config.evaluation.max_steps
    for task in evaluated_tasks(config):
        factory = with_expert(factory_for(task))
        with contextlib.closing(factory()) as environment:
            for seed in evaluated_seeds(config):
                steps = _expert_steps(factory, environment, seed, limit)
                results.append(EpisodeResult(task, seed, steps is not None, steps or limit))
    return results


def _expert_steps(factory: ExpertFactory, environment: Any, seed: int, limit: int) -> int | None:
    """Control steps that the expert needs; None if it does not succeed within the limit."""
    expert, random = factory.expert(), np.random.default_rng(seed)
    environment.reset(seed=seed)
    for step in range(1, limit + 1):
        action, _ = expert(environment, 0.0, random)
        _, _, terminated, truncated, info = environment.step(action)
        if info["success"]:
            return step
        if terminated or truncated:
            return None
    return None


def write_recordings(results: Sequence[EpisodeResult], folder: pathlib.Path, hz: float) -> None:
    """One GIF for each recorded episode, named by task, seed and outcome; cameras stand one above the other."""
    for result in results:
        if result.frames is not None:
            first, *others = result.frames.values()
            stacked = np.concatenate([first, *(resize_images(view, first.shape[1:3]) for view in others)], axis=1)
            outcome = "success" if result.success else "failure"
            write_video(folder / f"{result.task}_{result.seed}_{outcome}.gif", stacked, hz)


def log_recordings(log: RerunLog, results: Sequence[EpisodeResult], config: ExperimentConfig) -> None:
    """Recorded episodes: frames, instruction, proprioception, what was executed and planned, what plans had to continue."""
    hz, execute = config.data.control_hz, config.policy.execute_steps
    for result in results:
        if result.frames is None or result.actions is None or result.proprio is None:
            continue
        place, times = f"{result.task}/{result.seed}", np.arange(result.steps + 1) / hz
        log.episode(place, times, result.frames, result.proprio, result.actions, [result.instruction])
        for number, (step, seconds, actions, committed) in enumerate(result.plans):
            log.chunk(f"{place}/plans", number, actions, step / hz, hz, execute)
            if committed is not None:
                log.chunk(f"{place}/committed", number, committed, step / hz, hz, execute)
            log.values(f"{place}/latency_ms", np.array([[1e3 * seconds]]), np.array([step / hz]), ["plan"])
        log.text(f"{place}/outcome", "success" if result.success else "failure", result.steps / hz)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a success probability, in [0, 1]. Sound for few trials and for rates of 0 and 1.

    Raises:
        ValueError: without trials, or with more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials have no interval")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    margin = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def success_table(results: Sequence[EpisodeResult]) -> dict[str, dict[str, Any]]:
    """Task → {successes, episodes, rate, low, high}, with the 95 % Wilson interval; the last entry, "overall", pools the tasks.

    The values are plain numbers, ready for JSON.
    """
    outcomes: dict[str, list[bool]] = {}
    for result in results:
        outcomes.setdefault(result.task, []).append(result.success)
    outcomes["overall"] = [result.success for result in results]
    return {task: _success_row(flags) for task, flags in outcomes.items()}


def _success_row(flags: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(flags), len(flags))
    return {"successes": sum(flags), "episodes": len(flags), "rate": sum(flags) / len(flags), "low": low, "high": high}


def summary(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """`success`, as of `success_table`, and `episodes`, how each ended; ready for JSON."""
    episodes = [{"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps} for r in results]
    return {"success": success_table(results), "episodes": episodes}


def success_lines(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A `success_table` as text, one line a task."""
    return [
        f"{task}: {row['successes']}/{row['episodes']} = {row['rate']:.2f}, 95 % interval {row['low']:.2f} to {row['high']:.2f}"
        for task, row in table.items()
    ]
