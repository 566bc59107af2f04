"""Requests of many connections become calls of one policy, in batches of a few fixed sizes."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Float32, UInt8

from mimic_video.config import ConfigError
from mimic_video.policy.observations import BadRequest, PolicyLayout, Request
from mimic_video.policy.server_metrics import ServerMetrics
from mimic_video_client import protocol

_log = logging.getLogger(__name__)


class Plan(Protocol):
    """A `Policy`, or anything called like one."""

    def __call__(
        self,
        images: Mapping[str, UInt8[np.ndarray, "n f h w 3"]],
        proprio: Float32[np.ndarray, "n p"],
        instructions: Sequence[str],
        query: int,
    ) -> Float[np.ndarray, "n a m"]: ...


class RequestError(Exception):
    """A request that is answered with an error of this `kind` (`protocol.ERROR_KINDS`)."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Answer:
    """A planned chunk.

    Attributes:
        actions: raw units.
        query: the number that its noise came from.
        waited, planned: seconds in the queue and in the policy.
    """

    actions: Float32[np.ndarray, "n a m"]
    query: int
    waited: float
    planned: float


@dataclasses.dataclass(eq=False)
class _Waiting:
    request: Request
    since: float
    deadline: float  # of the clock
    answer: asyncio.Future[Answer]


class Batcher:
    """A bounded queue in front of the policy, which runs in one thread of its own.

    Whatever waits when the policy is free is computed together, up to the largest batch size, in the order of arrival; the
    batch is filled up to the next of `batch_sizes`, so that the policy is compiled for those and nothing else. A request with a
    `query` of its own is computed by itself: its answer is then a function of the observation, the policy's seed and that
    number, whoever else is connected. Others share a query number that counts the calls.
    """

    def __init__(
        self,
        plan: Plan,
        layout: PolicyLayout,
        batch_sizes: Sequence[int],
        max_queue: int,
        deadline: float,
        metrics: ServerMetrics,
    ):
        """`deadline`: seconds that a request may wait unless it says otherwise."""
        self._plan, self._layout, self._metrics = plan, layout, metrics
        self._sizes, self._max_queue, self._deadline = sorted(batch_sizes), max_queue, deadline
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._arrived = asyncio.Event()
        self._calls = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="policy")

    def warm_up(self) -> None:
        """Compiles the policy for every batch size. Blocks; before `run`."""
        layout = self._layout
        for size in self._sizes:
            frames = np.zeros((size, layout.past_frames, *layout.image_size, 3), np.uint8)
            images = dict.fromkeys(layout.cameras, frames)
            self._call(Request(images, np.zeros((size, layout.proprio_dim), np.float32), [""] * size, True, 0, None, 1), 0)

    async def submit(self, request: Request, arrived: float) -> Answer:
        """The answer to a request that arrived at time `arrived` of the monotonic clock.

        Raises:
            RequestError: if the queue is full, the deadline passes in it, or the policy fails.
        """
        if len(self._queue) >= self._max_queue:
            raise RequestError(protocol.OVERLOADED, f"{len(self._queue)} requests wait already; try again later")
        allowed = self._deadline if request.deadline is None else request.deadline
        waiting = _Waiting(request, arrived, arrived + allowed, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        try:
            return await waiting.answer
        finally:  # a caller that has gone is not computed for
            if waiting in self._queue:
                self._queue.remove(waiting)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def run(self) -> None:
        """Serves the queue until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while batch := self._next_batch():
                    await self._answer(loop, batch)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _next_batch(self) -> list[_Waiting]:
        """Takes what is computed together out of the queue, and refuses what is too late."""
        batch: list[_Waiting] = []
        robots = 0
        while self._queue:
            first, now = self._queue[0], time.monotonic()
            if now > first.deadline and not first.answer.done():
                late = f"the request waited {now - first.since:.3f} s; its deadline was {first.deadline - first.since:g} s"
                first.answer.set_exception(RequestError(protocol.EXPIRED, late))
            if first.answer.done():
                self._queue.popleft()
                continue
            robots += len(first.request.state)
            alone = first.request.query is not None
            if batch and (alone or batch[0].request.query is not None or robots > self._sizes[-1]):
                break
            batch.append(self._queue.popleft())
        return batch

    async def _answer(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        query = batch[0].request.query
        if query is None:
            query, self._calls = self._calls, self._calls + 1
        start = time.monotonic()
        try:
            joined = _join([waiting.request for waiting in batch])
            actions = await loop.run_in_executor(self._thread, self._call, joined, query)
        except Exception as error:  # whatever the policy raises must not end the server
            if len(batch) > 1:  # only one of them may be to blame
                for waiting in batch:
                    await self._answer(loop, [waiting])
                return
            failure = _failure(error)
            if not batch[0].answer.done():
                batch[0].answer.set_exception(failure)
            return
        planned = time.monotonic() - start
        self._metrics.robots.observe(len(actions))
        first = 0
        for waiting in batch:
            count = len(waiting.request.state)
            if not waiting.answer.done():
                own = actions[first : first + count]
                waiting.answer.set_result(Answer(own, query, start - waiting.since, planned))
            first += count

    def _call(self, request: Request, query: int) -> Float32[np.ndarray, "n a m"]:
        """Actions; runs in the policy's thread."""
        count, layout = len(request.state), self._layout
        size = next(size for size in self._sizes if size >= count)

        def filled(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values, np.repeat(values[-1:], size - count, axis=0)]) if size > count else values

        images = {camera: filled(frames) for camera, frames in request.images.items()}
        instructions = [*request.instructions, *request.instructions[-1:] * (size - count)]
        actions = np.asarray(self._plan(images, filled(request.state), instructions, query), np.float32)
        expected = (size, layout.action_horizon, layout.action_dim)
        if actions.shape != expected or not np.isfinite(actions).all():
            raise FloatingPointError(f"the policy's actions of shape {actions.shape} are not finite numbers of shape {expected}")
        return actions[:count]


def _join(requests: Sequence[Request]) -> Request:
    if len(requests) == 1:
        return requests[0]
    images = {camera: np.concatenate([request.images[camera] for request in requests]) for camera in requests[0].images}
    state = np.concatenate([request.state for request in requests])
    instructions = [instruction for request in requests for instruction in request.instructions]
    return dataclasses.replace(requests[0], images=images, state=state, instructions=instructions)


def _failure(error: Exception) -> RequestError:
    if isinstance(error, BadRequest | ConfigError):  # such as an instruction that the text encoder cannot take
        return RequestError(protocol.BAD_REQUEST, str(error))
    _log.error("the policy failed", exc_info=error)
    return RequestError(protocol.INTERNAL, f"the policy failed: {type(error).__name__}: {error}")
