"""Evaluates a served policy in the simulator; runs where there is no JAX. Writes `evaluation.json` into --out.

    python launch/serve.py --policy=runs/quickstart/action --batch_size=20
    python launch/evaluate_served.py --config=configs/quickstart.py:action --server=ws://127.0.0.1:8000 --out=runs/served

Tasks, seeds and steps are the configuration's, as in launch/evaluate.py; that the policy's rates and sizes are, too, is checked.
As a rule all episodes of a task are one request (so the server needs a --batch_size of that many), whose plans are those in
process. With --connections=episodes there is one connection for each, with the history in the server, like as many robots.
"""

import functools
import json
import pathlib
import time

import experiment
from absl import flags

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.evaluation.metaworld import MetaworldFactory
from mimic_video.evaluation.rollouts import run_rollouts, success_table
from mimic_video.evaluation.served import ConnectionPerEpisodePlan, LockstepPlan
from mimic_video_client import PolicyClient, RequestRefused

_SERVER = flags.DEFINE_string("server", None, "ws://HOST:PORT", required=True)
_TOKEN = flags.DEFINE_string("token", None, "The server's secret")
_OUT = flags.DEFINE_string("out", None, "Directory to write to", required=True)
_CONNECTIONS = flags.DEFINE_enum("connections", "one", ["one", "episodes"], "For all episodes, or for each")


def require_same_layout(metadata: dict, config: ExperimentConfig) -> None:
    """Raises ConfigError if the policy sees or acts in another way than the configuration says."""
    data, images = config.data, metadata["images"]
    for name, value, served in (
        ("video_hz", data.video_hz, metadata["video_hz"]),
        ("control_hz", data.control_hz, metadata["control_hz"]),
        ("action_horizon", data.action_horizon, metadata["action"]["horizon"]),
        ("past_frames", data.past_frames, images["past_frames"]),
        ("image_size", list(data.image_size), images["size"]),
        ("cameras", list(data.cameras), images["cameras"]),
    ):
        if value != served:
            raise ConfigError(f"config field 'data.{name}' is {value}; the served policy has {served}")


def main(config: ExperimentConfig) -> None:
    if config.policy.strategy == "real_time_chunking":
        raise ConfigError(
            "config field 'policy.strategy' is 'real_time_chunking'; a server is not told what chunks have to continue"
        )
    connect, start = functools.partial(PolicyClient, _SERVER.value, _TOKEN.value, timeout=600.0), time.perf_counter()
    factory = functools.partial(
        MetaworldFactory, image_size=config.data.image_size, layout=config.evaluation.layout, cameras=config.data.cameras
    )
    with connect() as client:
        require_same_layout(client.metadata, config)
        per_episode = ConnectionPerEpisodePlan(connect, config.policy.execute_steps / config.data.control_hz)
        try:
            results = run_rollouts(LockstepPlan(client) if _CONNECTIONS.value == "one" else per_episode, factory, config)
        finally:
            per_episode.close()
    table = success_table(results)
    episodes = [{"task": r.task, "seed": r.seed, "success": r.success, "steps": r.steps} for r in results]
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    values = {"success": table, "episodes": episodes, "seconds": time.perf_counter() - start}
    (out / "evaluation.json").write_text(json.dumps(values, indent=1))
    for task, row in table.items():
        print(
            f"{task}: {row['successes']}/{row['episodes']} = {row['rate']:.2f}, "
            f"95 % interval {row['low']:.2f} to {row['high']:.2f}"
        )


if __name__ == "__main__":
    experiment.run(main, (RequestRefused, ConnectionError, TimeoutError), compilation_cache=None)
