"""Serves a trained policy to robots and simulators over a websocket, until SIGTERM or Ctrl-C.

    python launch/serve.py --policy=runs/quickstart/action [--embodiment=NAME] [--host=0.0.0.0 --port=8000 --token=SECRET]

A policy is a run, or a bundle of launch/export.py on this machine or on the Hugging Face Hub, `--policy=hf://USER/NAME[@REVISION]`.

Clients are `mimic_video_client` (see its robot loop) and openpi's. `--rename=observation.images.front=images.primary` maps a
field of a robot's observations to a name that the server knows, `--rename=observation.gripper=` leaves one out, and
`--rename=joints=state --rename=gripper=state` joins two. `--client=openpi_libero`, `openpi_droid` or `openpi_aloha` takes what
openpi's examples send: their names, images with the channels first or as floats from 0 to 1, cameras that the policy has not.

Frames have the times of their arrival unless they come with a `timestamp` in seconds. openpi's clients tell the server nothing
of a reset: an episode starts after --episode_gap seconds without a frame, or with `client.infer({"reset": True})`.

`/healthz` and `/metrics` answer plain HTTP on the same port. On SIGTERM, what was asked before is answered, and new requests are
refused. --rerun=FILE.rrd or --rerun=connect logs what robots send and are answered to a recording of Rerun or to its viewer
(docs/rerun.md). There is no encryption: across networks that others use, put a proxy with TLS in front.
"""

import asyncio
import contextlib
import os

import experiment
from absl import flags, logging

from mimic_video.policy.observations import CLIENTS
from mimic_video.policy.policy import Policy
from mimic_video.policy.server import ServerOptions, bind, parse_renames, serve_until_stopped
from mimic_video.rerun_log import HELP, RerunLog
from mimic_video.runs.storage import RunError

_DEFAULTS = ServerOptions()
_POLICY = flags.DEFINE_string("policy", None, "Bundle, also hf://USER/NAME[@REVISION], or run of stage `action`", required=True)
_EMBODIMENT = flags.DEFINE_string("embodiment", None, "Robot to drive, by its name, if the policy knows several")
_HOST = flags.DEFINE_string("host", _DEFAULTS.host, "Address to listen at; 0.0.0.0 for all of this machine's")
_PORT = flags.DEFINE_integer("port", _DEFAULTS.port, "Port to listen at; 0 for a free one")
_TOKEN = flags.DEFINE_string("token", None, "Secret that clients have to send; MIMIC_VIDEO_TOKEN unless given")
_BATCH_SIZES = flags.DEFINE_multi_integer("batch_size", list(_DEFAULTS.batch_sizes), "Robots in one call; once for each size")
_MAX_QUEUE = flags.DEFINE_integer("max_queue", _DEFAULTS.max_queue, "Requests that wait at most")
_MAX_MESSAGE = flags.DEFINE_integer("max_message_mb", _DEFAULTS.max_message_bytes // 2**20, "Size of a message at most")
_DEADLINE = flags.DEFINE_float("deadline", _DEFAULTS.deadline, "Seconds that a request may wait, unless it says otherwise")
_RENAMES = flags.DEFINE_multi_string("rename", [], "NAME=KNOWN: a field of the robots' observations; NAME= leaves it out")
_CLIENT = flags.DEFINE_enum("client", _DEFAULTS.client, list(CLIENTS), "Whose format the robots' observations have")
_PROMPT = flags.DEFINE_string("prompt", _DEFAULTS.prompt, "Instruction of clients that send none")
_EPISODE_GAP = flags.DEFINE_float("episode_gap", _DEFAULTS.episode_gap, "Seconds without a frame after which an episode starts")
_RERUN = flags.DEFINE_string("rerun", None, HELP)


def main() -> None:
    options = ServerOptions(
        host=_HOST.value,
        port=_PORT.value,
        token=os.environ.get("MIMIC_VIDEO_TOKEN", "") if _TOKEN.value is None else _TOKEN.value,
        batch_sizes=tuple(_BATCH_SIZES.value),
        max_queue=_MAX_QUEUE.value,
        max_message_bytes=_MAX_MESSAGE.value * 2**20,
        deadline=_DEADLINE.value,
        renames=parse_renames(_RENAMES.value),
        client=_CLIENT.value,
        prompt=_PROMPT.value,
        episode_gap=_EPISODE_GAP.value,
    )
    address = bind(options)
    log = RerunLog(_RERUN.value, "mimic-video policy") if _RERUN.value else None
    policy = Policy.load(_POLICY.value, embodiment=_EMBODIMENT.value)
    if not options.token and options.host not in ("127.0.0.1", "::1", "localhost"):
        logging.warning("no --token: anybody who reaches %s:%d may use the policy", options.host, options.port)
    with log or contextlib.nullcontext():
        asyncio.run(serve_until_stopped(policy, options, address, log))


if __name__ == "__main__":
    experiment.run(main, (ValueError, RunError), config=False)
