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

from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.rollouts import success_lines, summary
from mimic_video.evaluation.served import run_served
from mimic_video.evaluation.simulators import factories
from mimic_video_client import PolicyClient, ProtocolError, RequestRefused

_SERVER = flags.DEFINE_string("server", None, "ws://HOST:PORT", required=True)
_TOKEN = flags.DEFINE_string("token", None, "The server's secret")
_PROXY = flags.DEFINE_string("proxy", None, "http://HOST:PORT or socks5h://HOST:PORT to connect through; none unless given")
_OUT = flags.DEFINE_string("out", None, "Directory to write to", required=True)
_CONNECTIONS = flags.DEFINE_enum("connections", "one", ["one", "episodes"], "For all episodes, or for each")


def main(config: ExperimentConfig) -> None:
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)  # not after hours
    connect = functools.partial(PolicyClient, _SERVER.value, _TOKEN.value, timeout=600.0, proxy=_PROXY.value)
    start = time.perf_counter()
    values = summary(run_served(connect, factories(config), config, _CONNECTIONS.value == "episodes"))
    (out / "evaluation.json").write_text(json.dumps(values | {"seconds": time.perf_counter() - start}, indent=1))
    print("\n".join(success_lines(values["success"])))


if __name__ == "__main__":
    experiment.run(main, (RequestRefused, ProtocolError, ConnectionError, TimeoutError), compilation_cache=None)
