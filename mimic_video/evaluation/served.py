"""Plans of a policy server for closed-loop evaluation. Needs no JAX: the policy is elsewhere."""

import concurrent.futures
from collections.abc import Callable, Sequence

import numpy as np

from mimic_video_client import PolicyClient


class LockstepPlan:
    """A `Plan` through one connection: all episodes are one request with the whole past, which the server computes by itself.

    The noise is that of the query's number and the episode's row, as in process.
    """

    def __init__(self, client: PolicyClient):
        self._client = client

    def __call__(self, images: np.ndarray, proprio: np.ndarray, instructions: Sequence[str], query_index: int) -> np.ndarray:
        message = {
            "images": _by_camera(images, self._client),
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

    def __call__(self, images: np.ndarray, proprio: np.ndarray, instructions: Sequence[str], query_index: int) -> np.ndarray:
        count = len(proprio)
        while len(self._clients) < count:
            self._clients.append(self._connect())
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            plans = pool.map(self._plan_one, self._clients, images, proprio, instructions, [query_index] * count)
            return np.stack(list(plans))

    def close(self) -> None:
        """Ends all connections."""
        for client in self._clients:
            client.close()

    def _plan_one(
        self, client: PolicyClient, images: np.ndarray, proprio: np.ndarray, instruction: str, query_index: int
    ) -> np.ndarray:
        if query_index == 0:
            client.reset()
        video_hz, now = client.metadata["video_hz"], query_index * self._plan_seconds
        new = self._plan_seconds * video_hz
        if abs(new - round(new)) > 1e-6:
            raise ValueError(f"a plan every {self._plan_seconds:g} s is every {new:g} video frames; expected a whole number")
        if query_index > 0:  # frames before the first one only repeat it
            for age in range(min(round(new), len(images)) - 1, 0, -1):
                client.observe({"images": _by_camera(images[-1 - age], client), "timestamp": now - age / video_hz})
        message = {"images": _by_camera(images[-1], client), "state": proprio, "prompt": instruction, "timestamp": now}
        return client.infer(message)["actions"]


def _by_camera(images: np.ndarray, client: PolicyClient) -> dict[str, np.ndarray]:
    """Views that stand one above the other, by their names."""
    cameras = client.metadata["images"]["cameras"]
    return dict(zip(cameras, np.split(images, len(cameras), axis=-3), strict=True))
