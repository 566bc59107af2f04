"""What planning delays do to a policy in a simulator, by execution strategy."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.environment import EnvironmentFactory, EnvironmentPool
from mimic_video.evaluation.rollouts import EpisodeResult, Plan, evaluated_seeds, evaluated_tasks, run_task, summary
from mimic_video.evaluation.simulators import HandFactory, with_hand
from mimic_video.evaluation.smoothness import mean_squared_jerk


def evaluate_delays(
    plan: Plan,
    factory_for: Callable[[str], EnvironmentFactory],
    config: ExperimentConfig,
    strategies: Sequence[Any],
    delays: Mapping[float, int],
) -> list[dict[str, Any]]:
    """The episodes of `run_rollouts` for every strategy and every delay: on the same seeds, in pools that are used again.

    While a plan is made, robots execute what is left of the chunk before, and hold still if nothing is.

    Args:
        strategies: values of `policy.strategy`.
        delays: milliseconds → control steps.

    Returns:
        A row for each pair, in order of strategies, then delays, ready for JSON: `strategy`, `delay_ms`, `delay_steps`,
        `success`, `episodes`, `seconds_to_success` (None without one), and in m/s³ the roots of `mean_squared_jerk`, of the hand
        as it moved (`jerk`) and as it was commanded to (`commanded_jerk`).

    Raises:
        ConfigError: as `run_rollouts`, and if the simulator does not know how a robot holds still.
    """
    seeds, hands = evaluated_seeds(config), {}
    results: dict[tuple[Any, float], list[EpisodeResult]] = {(s, d): [] for s in strategies for d in delays}
    for task in evaluated_tasks(config):
        hands[task] = hand = with_hand(factory_for(task))
        with EnvironmentPool(hand, seeds, config.evaluation.workers) as pool:
            for (strategy, milliseconds), episodes in results.items():
                changed = dataclasses.replace(config, policy=dataclasses.replace(config.policy, strategy=strategy))
                episodes += run_task(plan, pool, task, changed, delay=delays[milliseconds], hold=hand.hold)
                successes = sum(episode.success for episode in episodes[-len(seeds) :])
                print(f"{task}, {strategy}, {milliseconds:g} ms: {successes} of {len(seeds)}", flush=True)
    return [
        {
            "strategy": strategy,
            "delay_ms": milliseconds,
            "delay_steps": delays[milliseconds],
            **_row(episodes, hands, config.data.control_hz),
        }
        for (strategy, milliseconds), episodes in results.items()
    ]


def _row(episodes: Sequence[EpisodeResult], hands: Mapping[str, HandFactory], hz: float) -> dict[str, Any]:
    succeeded = [episode.steps / hz for episode in episodes if episode.success]
    moved = [hands[e.task].positions(e.proprio) for e in episodes if e.proprio is not None]
    commanded = [hands[e.task].commanded_positions(e.actions) for e in episodes if e.actions is not None]
    return {
        **summary(episodes),
        "seconds_to_success": sum(succeeded) / len(succeeded) if succeeded else None,
        "jerk": math.sqrt(mean_squared_jerk(moved, hz)),
        "commanded_jerk": math.sqrt(mean_squared_jerk(commanded, hz)),
    }


def delay_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`evaluate_delays` as text."""
    lines = [f"{'strategy':<20}{'delay ms':>9}{'success':>9}  {'95 % interval':<14}{'seconds':>8}{'jerk':>8}{'commanded':>11}"]
    for r in rows:
        overall, seconds = r["success"]["overall"], r["seconds_to_success"]
        lines.append(
            f"{r['strategy']:<20}{r['delay_ms']:>9g}{overall['successes']:>5}/{overall['episodes']:<3}  "
            f"{overall['low']:.2f} to {overall['high']:.2f}  {'-' if seconds is None else format(seconds, '.2f'):>8}"
            f"{r['jerk']:>8.1f}{r['commanded_jerk']:>11.1f}"
        )
    return "\n".join(lines)
