"""What planning delays do to a policy in the simulator, by execution strategy; writes `delays.json` into the run's directory.

    python launch/evaluate_delay.py --config=configs/quickstart.py:action --workdir=runs/quickstart/action \\
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
from typing import Any, get_args, get_type_hints

import experiment
import jax
from absl import flags

from mimic_video.config import ConfigError, ExperimentConfig, PolicyConfig
from mimic_video.evaluation.delays import delay_table, evaluate_delays
from mimic_video.evaluation.simulators import factories
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


def main(given: ExperimentConfig) -> None:
    run, start = run_path(_WORKDIR.value), time.perf_counter()
    config = dataclasses.replace(directory.read_config(run), policy=given.policy, evaluation=given.evaluation)
    delays = delays_in_steps(config.data.control_hz)
    policy = Policy.load(run, config, _EMBODIMENT.value)
    rows = evaluate_delays(policy, factories(config, policy.embodiment.cameras), config, _STRATEGIES.value, delays)
    values = {
        "rows": rows,
        "policy": dataclasses.asdict(config.policy),
        "evaluation": dataclasses.asdict(config.evaluation),
        "device": jax.devices()[0].device_kind,
        "seconds": time.perf_counter() - start,
    }
    directory.write_json(run / "delays.json", values)
    print(f"\n{delay_table(rows)}")


if __name__ == "__main__":
    experiment.run(main, (RunError,))
