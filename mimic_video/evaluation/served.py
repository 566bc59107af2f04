"""Plans of a policy server for closed-loop evaluation. Needs no JAX: the policy is elsewhere."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.evaluation.environment import EnvironmentFactory
from mimic_video.evaluation.rollouts import EpisodeResult, run_rollouts
from mimic_video_client import PolicyClient

Images = Mapping[str, np.ndarray]


def run_served(
    connect: Callable[[], PolicyClient],
    factory_for: Callable[[str], EnvironmentFactory],
    config: ExperimentConfig,
    connection_per_episode: bool = False,
) -> list[EpisodeResult]:
    """`run_rollouts` by a policy server.

    Args:
        connect: opens a connection to it.
        connection_per_episode: `ConnectionPerEpisodePlan`, in place of `LockstepPlan`.

    Raises:
        ConfigError: if the experiment's rates and sizes are not those of the policy, or for real-time chunking.
        ProtocolError: if the server does not tell them, as openpi's do not.
    """
    if config.policy.strategy == "real_time_chunking":
        raise ConfigError(
            "config field 'policy.strategy' is 'real_time_chunking'; a server is not told what chunks have to continue"
        )
    with connect() as client:
        require_same_layout(client, config)
        if not connection_per_episode:
            return run_rollouts(LockstepPlan(client), factory_for, config)
        plan = ConnectionPerEpisodePlan(connect, config.policy.execute_steps / config.data.control_hz)
        with contextlib.closing(plan):
            return run_rollouts(plan, factory_for, config)


def require_same_layout(client: PolicyClient, config: ExperimentConfig) -> None:
    """Raises ConfigError if the served policy sees or acts in another way than the configuration says."""
    data, (images, action, video_hz, control_hz) = config.data, client.told("images", "action", "video_hz", "control_hz")
    for name, value, served in (
        ("video_hz", data.video_hz, video_hz),
        ("control_hz", data.control_hz, control_hz),
        ("action_horizon", data.action_horizon, action["horizon"]),
        ("past_frames", data.past_frames, images["past_frames"]),
        ("image_size", list(data.image_size), images["size"]),
        ("cameras", list(data.cameras), images["cameras"]),
    ):
        if value != served:
            raise ConfigError(f"config field 'data.{name}' is {value}; the served policy has {served}")


class LockstepPlan:
    """A `Plan` through one connection: all episodes are one request with the whole past, which the server computes by itself.

    The noise is that of the query's number and the episode's row, as in process.
    """

    def __init__(self, client: PolicyClient):
        self._client = client

    def __call__(self, images: Images, proprio: np.ndarray, instructions: Sequence[str], query_index: int) -> np.ndarray:
        message = {
            "images": dict(images),
            "state": proprio,
            "prompt": list(instructions),
            "robots": len(proprio),
            "query": query_index,
        }
        return self._client.infer(message)["actions"]


class ConnectionPerEpisodePlan:
    """A `Plan` through a connection for each episode, like as many robots: each sends the frames that the server has not seen.

    The server keeps the past, and batches what arrives together; the noise is that of its own count of calls.
    """

    def __init__(self, connect: Callable[[], PolicyClient], plan_seconds: float):
        """`plan_seconds`: simulated time from a plan to the next, whole periods of the video (or frames would be missing)."""
        self._connect, self._plan_seconds = connect, plan_seconds
        self._clients: list[PolicyClient] = []

    def __call__(self, images: Images, proprio: np.ndarray, instructions: Sequence[str], query_index: int) -> np.ndarray:
        count = len(proprio)
        while len(self._clients) < count:
            self._clients.append(self._connect())
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            rows = (_at(images, row) for row in range(count))
            plans = pool.map(self._plan_one, self._clients, rows, proprio, instructions, [query_index] * count)
            return np.stack(list(plans))

    def close(self) -> None:
        """Ends all connections."""
        for client in self._clients:
            client.close()

    def _plan_one(
        self, client: PolicyClient, images: Images, proprio: np.ndarray, instruction: str, query_index: int
    ) -> np.ndarray:
        if query_index == 0:
            client.reset()
        video_hz, now = client.metadata["video_hz"], query_index * self._plan_seconds
        new = self._plan_seconds * video_hz
        if abs(new - round(new)) > 1e-6:
            raise ValueError(f"a plan every {self._plan_seconds:g} s is every {new:g} video frames; expected a whole number")
        if query_index > 0:  # frames before the first one only repeat it
            for age in range(min(round(new), *map(len, images.values())) - 1, 0, -1):
                client.observe({"images": _at(images, -1 - age), "timestamp": now - age / video_hz})
        message = {"images": _at(images, -1), "state": proprio, "prompt": instruction, "timestamp": now}
        return client.infer(message)["actions"]


def _at(images: Images, index: int) -> dict[str, np.ndarray]:
    return {camera: frames[index] for camera, frames in images.items()}
