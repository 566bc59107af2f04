"""What planning delays do to a policy in the simulator, by execution strategy; writes `delays.json` into the run's directory.

    python launch/evaluate_delay.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action-trained-0 \\
        --config.evaluation.max_steps=80

Of the experiment, `policy` and `evaluation` count; everything else is as the run was trained. Every strategy sees the same seeds
and, in its n-th plan, the same noise. While a plan is made, robots execute what is left of the chunk before, and hold still if
nothing is: always in the strategies that plan only when they have run out of actions, which therefore need more control steps
than the quickstart's 50. The jerk is the root of `mean_squared_jerk`, in m/s³: of the hand as it moved, and as it was commanded
to.
"""

import dataclasses
import math
import time
from functools import partial
from typing import Any, get_args, get_type_hints

import experiment
import jax
from absl import flags

from mimic_video.config import ConfigError, ExperimentConfig, PolicyConfig
from mimic_video.evaluation import metaworld
from mimic_video.evaluation.environment import EnvironmentPool
from mimic_video.evaluation.rollouts import EpisodeResult, run_task, success_table
from mimic_video.evaluation.smoothness import mean_squared_jerk
from mimic_video.policy.policy import Policy
from mimic_video.runs import directory
from mimic_video.runs.storage import RunError, run_path

STRATEGIES = get_args(get_type_hints(PolicyConfig)["strategy"])

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of stage `action`", required=True)
_DELAYS = flags.DEFINE_list("delays", "0,100,200,300", "Delays in milliseconds, rounded up to control steps")
_STRATEGIES: flags.FlagHolder[Any] = flags.DEFINE_multi_enum(
    "strategy", STRATEGIES, STRATEGIES, "A strategy to evaluate; may be repeated"
)
_EMBODIMENT = flags.DEFINE_string("embodiment", None, "Robot to drive, by its name, if the policy knows several")


def delays_in_steps(control_hz: float) -> dict[float, int]:
    """Milliseconds → control steps, of --delays."""
    try:
        delays = [float(value) for value in _DELAYS.value]
        if not all(0 <= delay < math.inf for delay in delays):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--delays is {','.join(_DELAYS.value)!r}; expected milliseconds, such as 0,100") from None
    return {delay: math.ceil(delay / 1000 * control_hz - 1e-9) for delay in delays}


def row(strategy: str, milliseconds: float, steps: int, results: list[EpisodeResult], config: ExperimentConfig) -> dict:
    """One cell of the table, ready for JSON."""
    hz, layout = config.data.control_hz, config.evaluation.layout
    succeeded = [result.steps / hz for result in results if result.success]
    moved = [result.proprio[:, :3] for result in results if result.proprio is not None]
    commanded = [metaworld.commanded_positions(result.actions, layout) for result in results if result.actions is not None]
    return {
        "strategy": strategy,
        "delay_ms": milliseconds,
        "delay_steps": steps,
        "success": success_table(results),
        "seconds_to_success": sum(succeeded) / len(succeeded) if succeeded else None,
        "jerk": math.sqrt(mean_squared_jerk(moved, hz)),
        "commanded_jerk": math.sqrt(mean_squared_jerk(commanded, hz)),
        "episodes": [{"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps} for r in results],
    }


def main(given: ExperimentConfig) -> None:
    run, start = run_path(_WORKDIR.value), time.perf_counter()
    config = dataclasses.replace(directory.read_config(run), policy=given.policy, evaluation=given.evaluation)
    evaluation, delays = config.evaluation, delays_in_steps(config.data.control_hz)
    policy = Policy.load(run, config, _EMBODIMENT.value)
    seeds = range(evaluation.first_seed, evaluation.first_seed + evaluation.episodes_per_task)
    results: dict[tuple[Any, float], list[EpisodeResult]] = {(s, d): [] for s in _STRATEGIES.value for d in delays}
    for task in evaluation.tasks:
        factory = metaworld.MetaworldFactory(task, config.data.image_size, evaluation.layout, config.data.cameras)
        with EnvironmentPool(factory, seeds, evaluation.workers) as pool:
            for (strategy, milliseconds), episodes in results.items():
                changed = dataclasses.replace(config, policy=dataclasses.replace(config.policy, strategy=strategy))
                hold = partial(metaworld.hold, layout=evaluation.layout)
                episodes += run_task(policy, pool, task, changed, delay=delays[milliseconds], hold=hold)
                successes = sum(episode.success for episode in episodes[-len(seeds) :])
                print(f"{task}, {strategy}, {milliseconds:g} ms: {successes} of {len(seeds)}", flush=True)
    rows = [row(strategy, ms, delays[ms], episodes, config) for (strategy, ms), episodes in results.items()]
    values = {
        "rows": rows,
        "policy": dataclasses.asdict(config.policy),
        "evaluation": dataclasses.asdict(evaluation),
        "device": jax.devices()[0].device_kind,
        "seconds": time.perf_counter() - start,
    }
    directory.write_json(run / "delays.json", values)
    print(f"\n{'strategy':<20}{'delay ms':>9}{'success':>9}  {'95 % interval':<14}{'seconds':>8}{'jerk':>8}{'commanded':>11}")
    for r in rows:
        overall, seconds = r["success"]["overall"], r["seconds_to_success"]
        print(
            f"{r['strategy']:<20}{r['delay_ms']:>9g}{overall['successes']:>5}/{overall['episodes']:<3}  "
            f"{overall['low']:.2f} to {overall['high']:.2f}  {'-' if seconds is None else format(seconds, '.2f'):>8}"
            f"{r['jerk']:>8.1f}{r['commanded_jerk']:>11.1f}"
        )


if __name__ == "__main__":
    experiment.run(main, (RunError,))
