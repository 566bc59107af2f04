"""Closed-loop evaluation: a plan function drives batches of simulated episodes, and success is counted."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.environment import Environment, EnvironmentPool
from mimic_video.policy.execution import Executor, SimulatedDelay, make_strategy
from mimic_video.policy.history import FrameHistory

_log = logging.getLogger(__name__)


class Plan(Protocol):
    """Observations to action chunks, for a batch of b episodes. Raw units on both sides."""

    def __call__(self, images: np.ndarray, proprio: np.ndarray, instructions: list[str], query_index: int, /) -> np.ndarray:
        """Plans the next actions of every episode. In real-time chunking there is one argument more, a `Committed`.

        Args:
            images: uint8 (b, past_frames, H, W, 3) at the video rate; the last one is the present.
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
        frames: uint8 (steps + 1, H, W, 3) at the control rate, the first before any action; None unless recorded.
    """

    task: str
    seed: int
    success: bool
    steps: int
    actions: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    proprio: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    frames: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)


def run_rollouts(
    plan: Plan, factory_for: Callable[[str], Callable[[], Environment]], config: ExperimentConfig, record: int = 0
) -> list[EpisodeResult]:
    """Runs `config.evaluation.episodes_per_task` episodes of every task, from seeds `first_seed`, `first_seed + 1`, ...

    The episodes of a task run in lockstep: one plan call of constant batch size for all of them, whenever
    `config.policy.strategy` wants one. Episodes that have succeeded stay in the batch but are not simulated further.

    Args:
        plan: the policy.
        factory_for: task name to a picklable environment factory, e.g. `partial(MetaworldFactory, image_size=(64, 64))`.
        config: `evaluation`, `policy`, and from `data` the observed past (`past_frames`, `video_hz`) and the `control_hz` that
            the policy was trained for.
        record: the first so many episodes of each task keep their frames.

    Returns:
        One result per episode, in order of tasks, then seeds.

    Raises:
        ValueError: when there are no tasks, when a task's control rate is not `data.control_hz`, or when the plan's output has
            the wrong shape.
        WorkerError: when a simulator fails.
    """
    evaluation = config.evaluation
    if not evaluation.tasks:
        raise ValueError("evaluation.tasks is empty: name at least one task")
    seeds = range(evaluation.first_seed, evaluation.first_seed + evaluation.episodes_per_task)
    results = []
    for task in evaluation.tasks:
        with EnvironmentPool(factory_for(task), seeds, evaluation.workers) as pool:
            results += run_task(plan, pool, task, config, record)
        successes = sum(result.success for result in results[-len(seeds) :])
        _log.info("%s: %d of %d episodes succeeded", task, successes, len(seeds))
    return results


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
        raise ValueError(f"{task} is controlled at {pool.control_hz:g} Hz, but data.control_hz={data.control_hz:g}")

    def checked_plan(*arguments: Any) -> np.ndarray:
        actions = np.asarray(plan(*arguments))
        if actions.ndim != 3 or (len(actions), actions.shape[2]) != (n, pool.action_dim) or actions.shape[1] < execute_steps:
            raise ValueError(
                f"{task}: the plan has shape {actions.shape}; expected ({n}, {execute_steps} or more, {pool.action_dim})"
            )
        return actions

    executor = Executor(make_strategy(config.policy), checked_plan, SimulatedDelay(delay))
    history = FrameHistory(data.past_frames, data.video_hz)
    observation = pool.reset()
    history.append(observation.image, 0.0)
    recordings, proprio = [[image] for image in observation.image[:record]], [observation.proprio]
    executed: list[np.ndarray] = []
    active, steps = np.ones(n, bool), np.zeros(n, int)
    for step in range(config.evaluation.max_steps):
        actions = executor.step(lambda: (history.window(), proprio[-1], [pool.instruction] * n))
        executed.append(hold(executed[-1] if executed else None, n) if actions is None else actions)
        observation, success = pool.step(executed[-1], active)
        history.append(observation.image, (step + 1) / data.control_hz)
        proprio.append(observation.proprio)
        for row, recording in enumerate(recordings):
            if active[row]:
                recording.append(observation.image[row])
        steps += active
        active &= ~success
        if not active.any():
            break
    frames = [np.stack(recording) for recording in recordings] + [None] * (n - len(recordings))
    return [
        EpisodeResult(
            task,
            seed,
            not bool(active[row]),
            taken,
            np.stack(executed)[:taken, row],
            np.stack(proprio)[: taken + 1, row],
            frames[row],
        )
        for row, (seed, taken) in enumerate(zip(pool.seeds, steps.tolist(), strict=True))
    ]


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
