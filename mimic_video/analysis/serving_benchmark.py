"""What a policy server gives to several robots: chunks a second, and how long each robot waits for its own."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimic_video.analysis.policy_benchmark import ROOT, random_policy
from mimic_video.config import ExperimentConfig
from mimic_video.policy.observations import PolicyLayout
from mimic_video.policy.policy import Policy
from mimic_video.policy.server import PolicyServer, ServerOptions
from mimic_video.runs.storage import RunError

# Robots in a process of their own, which takes no time from the server's interpreter. Each has a connection, shows what it sees
# with its past, and asks again as soon as it has its chunk; the first one is not counted. Prints
# [seconds from start to end, [[milliseconds until the answer, number of the policy's call], ...]].
ROBOTS = """
import concurrent.futures, contextlib, json, sys, time
import numpy as np
from mimic_video_client import PolicyClient
uri, robots, requests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def drive(client):
    answers = []
    for _ in range(requests):
        start = time.perf_counter()
        query = client.infer(seen)["query"]
        answers.append([1e3 * (time.perf_counter() - start), query])
    return answers
with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(robots) as threads:
    clients = [stack.enter_context(PolicyClient(uri)) for _ in range(robots)]
    cameras, state = clients[0].metadata["images"], np.zeros(clients[0].metadata["state"]["dim"], np.float32)
    past = np.zeros((cameras["past_frames"], *cameras["size"], 3), np.uint8)
    seen = {"images": dict.fromkeys(cameras["cameras"], past), "state": state, "prompt": "go"}
    for client in clients: client.infer(seen)
    start = time.perf_counter()
    found = sum(threads.map(drive, clients), [])
    print(json.dumps([time.perf_counter() - start, found]))
"""


def serving(config: ExperimentConfig, largest: Sequence[int], requests: int) -> dict[str, Any]:
    """Chunks a second and latency of a policy with random parameters, for 1, 2, 4, ... robots that ask all the time.

    Args:
        largest: of the server's batch sizes, which are powers of two below it and itself; one server for each.
        requests: of each robot.

    Returns:
        "serving": for each server and number of robots, up to twice the largest batch, `chunks_per_second`, `p50_ms` and `p95_ms`
        from sending an observation to having its chunk, and `mean_batch`, robots in one call of the policy.
    """
    policy = random_policy(config)
    robots = _powers(2 * max(largest))
    rows = [row for size in largest for row in asyncio.run(_served(policy, size, robots, requests))]
    return {"image_size": list(config.data.image_size), "requests_per_robot": requests, "serving": rows}


def _powers(last: int) -> list[int]:
    """Powers of two below `last`, and it."""
    return [2**power for power in range((last - 1).bit_length())] + [last]


async def _served(policy: Policy, largest: int, robots: Sequence[int], requests: int) -> list[dict[str, Any]]:
    sizes, most = tuple(_powers(largest)), max(robots)
    options = ServerOptions(port=0, host="127.0.0.1", batch_sizes=sizes, max_connections=most, max_queue=most)
    rows = []
    async with PolicyServer(policy, PolicyLayout.of(policy), options) as server:
        for count in robots:
            seconds, answers = await _drive(f"ws://127.0.0.1:{server.port}", count, requests)
            times, calls = zip(*answers, strict=True)
            p50, p95 = np.percentile(times, [50, 95])
            rows.append(
                {
                    "largest_batch": largest,
                    "robots": count,
                    "chunks_per_second": round(len(times) / seconds, 2),
                    "p50_ms": round(float(p50), 2),
                    "p95_ms": round(float(p95), 2),
                    "mean_batch": round(len(calls) / len(set(calls)), 2),
                }
            )
    return rows


async def _drive(uri: str, robots: int, requests: int) -> tuple[float, list[tuple[float, int]]]:
    command = [sys.executable, "-c", ROBOTS, uri, str(robots), str(requests)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    if process.returncode:
        raise RunError(f"{robots} robots could not be served: {(errors.decode().strip().splitlines() or ['?'])[-1]}")
    return json.loads(output)
