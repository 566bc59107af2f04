"""How a robot uses action chunks: when it plans, what a plan has to continue, and what is executed meanwhile.

A `Strategy` keeps account of chunks and actions, and knows no clock. A `Planner` runs plans: `ThreadPlanner` beside a robot's
control loop, `SimulatedDelay` in a simulator. An `Executor` joins the two, one control step after another, so that what is
evaluated in simulation is what drives the robot:

    with ThreadPlanner() as planner:
        executor = Executor(make_strategy(config.policy), policy, planner)
        control_loop(lambda: robot.execute(executor.step(robot.observe)), config.data.control_hz, steps)

Programs are compiled when they are first run, which would count as delay: call a policy once before, for real-time chunking also
with something committed.

An action is taken to mean the same whenever it is executed: absolute poses, joint positions, or commanded steps. Plans of poses
as seen from the current hand (SPEC 8.5) go through `in_base_frame`.
"""

import collections
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from jaxtyping import Float

from mimic_video.config import PolicyConfig
from mimic_video.transforms import absolute_poses, relative_poses

Actions = Float[np.ndarray, "b m"]
Chunk = Float[np.ndarray, "b a m"]

_DELAYS = 10  # recent delays whose maximum is expected of the next plan


class Committed(NamedTuple):
    """What a plan has to continue.

    Attributes:
        actions: (b, n, m) in raw units, n ≥ 1: what is left of the chunk in execution, the first one due now.
        delay: how many of them will have been executed when the plan arrives, at most n.
    """

    actions: Float[np.ndarray, "b n m"]
    delay: int


class Strategy:
    """Receding horizon: plans when it has no action left, then executes `execute_steps` of the chunk; with all, open loop.

    The robot stands still while a plan is made, so a chunk is executed from its first action on.
    """

    def __init__(self, execute_steps: int | None = None):
        """`execute_steps` None is all of a chunk."""
        self._execute_steps = execute_steps
        self._queue: collections.deque[Actions] = collections.deque()

    def wants_plan(self) -> bool:
        """Whether to begin a plan at this control step, if none is being made."""
        return not self._queue

    def begin_plan(self) -> Committed | None:
        """Notes that a plan begins, on what is observed at this control step; what it has to continue, if anything."""
        return None

    def receive(self, chunk: Chunk) -> None:
        """Takes the plan that was begun last; between control steps."""
        self._queue = collections.deque(chunk.swapaxes(0, 1)[: self._execute_steps])

    def next_action(self) -> Actions | None:
        """What every robot executes in this control step; None if there is nothing, and robots have to hold still."""
        return self._queue.popleft() if self._queue else None


class Asynchronous(Strategy):
    """Plans while it executes: the next plan begins once `execute_steps` actions have been executed since the last one began.

    It begins earlier if the actions left would not outlast the delay that is expected, the longest of the last ten plans. A new
    chunk replaces what is left of the old one, from the action on that is due when it arrives.
    """

    def __init__(self, execute_steps: int):
        super().__init__()
        self._start_after = execute_steps
        self._steps = self._executed = 0  # control steps, and those with an action, since the last plan began
        self._delays: collections.deque[int] = collections.deque([0], maxlen=_DELAYS)

    def wants_plan(self) -> bool:
        return self._executed >= self._start_after or len(self._queue) <= max(self._delays)

    def begin_plan(self) -> Committed | None:
        self._steps = self._executed = 0
        return None

    def receive(self, chunk: Chunk) -> None:
        self._delays.append(self._steps)
        super().receive(chunk[:, self._executed :])

    def next_action(self) -> Actions | None:
        action = super().next_action()
        self._steps += 1
        self._executed += action is not None
        return action


class RealTimeChunking(Asynchronous):
    """Asynchronous plans that continue the chunk in execution (Black, Galliker and Levine, 2025)."""

    def begin_plan(self) -> Committed | None:
        super().begin_plan()
        if not self._queue:
            return None
        return Committed(np.stack(self._queue, axis=1), min(max(self._delays), len(self._queue)))


class TemporalEnsembling(Strategy):
    """Plans all the time and executes the mean of all predictions of an action, as in ACT (Zhao et al., 2023).

    The i-th oldest prediction has the weight exp(−decay·i).
    """

    def __init__(self, decay: float):
        super().__init__()
        self._decay = decay
        self._executed = self._begun = 0  # actions executed so far, and when the last plan began
        self._chunks: list[tuple[int, Chunk]] = []

    def wants_plan(self) -> bool:
        return True

    def begin_plan(self) -> Committed | None:
        self._begun = self._executed
        return None

    def receive(self, chunk: Chunk) -> None:
        self._chunks.append((self._begun, chunk))

    def next_action(self) -> Actions | None:
        self._chunks = [(start, chunk) for start, chunk in self._chunks if self._executed < start + chunk.shape[1]]
        if not self._chunks:
            return None
        predictions = [chunk[:, self._executed - start] for start, chunk in self._chunks]
        self._executed += 1
        return np.average(predictions, axis=0, weights=np.exp(-self._decay * np.arange(len(predictions)))).astype(np.float32)


def make_strategy(config: PolicyConfig) -> Strategy:
    """The strategy that is configured, at the start of an episode."""
    return {
        "open_loop": lambda: Strategy(),
        "receding_horizon": lambda: Strategy(config.execute_steps),
        "temporal_ensembling": lambda: TemporalEnsembling(config.ensemble_decay),
        "asynchronous": lambda: Asynchronous(config.execute_steps),
        "real_time_chunking": lambda: RealTimeChunking(config.execute_steps),
    }[config.strategy]()


class Planner(Protocol):
    """Runs one plan at a time."""

    @property
    def idle(self) -> bool:
        """Whether no plan is in progress."""
        ...

    def start(self, plan: Callable[[], Chunk]) -> None:
        """Begins a plan; only when idle."""
        ...

    def poll(self) -> Chunk | None:
        """The chunk, if it has arrived, which makes the planner idle again. Raises what the plan raised."""
        ...


class ThreadPlanner:
    """Runs plans in a thread, so that control goes on. Use as a context manager; leaving it waits for the plan in progress."""

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._future: concurrent.futures.Future[Chunk] | None = None

    @property
    def idle(self) -> bool:
        return self._future is None

    def start(self, plan: Callable[[], Chunk]) -> None:
        self._future = self._pool.submit(plan)

    def poll(self) -> Chunk | None:
        if self._future is None or not self._future.done():
            return None
        future, self._future = self._future, None
        return future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()


class SimulatedDelay:
    """Runs plans at once and hands them over `steps` control steps later: polled at every step, before and after `start`."""

    def __init__(self, steps: int):
        """Raises ValueError for a negative number of steps."""
        if steps < 0:
            raise ValueError(f"a simulated delay is {steps} steps; expected zero or more")
        self._delay, self._left = steps, 0
        self._chunk: Chunk | None = None

    @property
    def idle(self) -> bool:
        return self._chunk is None

    def start(self, plan: Callable[[], Chunk]) -> None:
        self._chunk, self._left = plan(), self._delay

    def poll(self) -> Chunk | None:
        if self._left or self._chunk is None:
            self._left = max(0, self._left - 1)
            return None
        chunk, self._chunk = self._chunk, None
        return chunk


class Executor:
    """Drives a batch of robots, all in the same step, with the plans of one policy, for one episode.

    `plan` is a `Policy` or anything that is called like one: with images, proprioception, instructions and the number of plans
    before, and if there is something to continue with a `Committed` last.
    """

    def __init__(self, strategy: Strategy, plan: Callable[..., Chunk], planner: Planner):
        self._strategy, self._plan, self._planner = strategy, plan, planner
        self._queries = 0

    def step(self, observe: Callable[[], tuple[Any, ...]]) -> Actions | None:
        """One control step; it takes no longer than `observe`, unless the planner plans at once.

        Args:
            observe: the present images, proprioception and instructions; only called if a plan begins.

        Returns:
            What to execute in this step, (b, m); None to hold still.

        Raises:
            Whatever the plan raised, at the first step after.
        """
        self._receive()
        if self._planner.idle and self._strategy.wants_plan():
            committed = self._strategy.begin_plan()
            arguments = (*observe(), self._queries) if committed is None else (*observe(), self._queries, committed)
            self._queries += 1
            self._planner.start(lambda: self._plan(*arguments))
            self._receive()
        return self._strategy.next_action()

    def _receive(self) -> None:
        chunk = self._planner.poll()
        if chunk is not None:
            self._strategy.receive(chunk)


def control_loop(step: Callable[[], None], control_hz: float, steps: int) -> int:
    """Calls `step` at a fixed rate of the monotonic clock.

    Returns:
        The number of steps that started more than half a period late. These move all later ones, so that none is rushed.
    """
    period, due, late = 1 / control_hz, time.monotonic(), 0
    for _ in range(steps):
        time.sleep(max(0.0, due - time.monotonic()))
        delay = time.monotonic() - due
        if delay > period / 2:
            late, due = late + 1, due + delay
        step()
        due += period
    return late


def in_base_frame(plan: Callable[..., Chunk]) -> Callable[..., Chunk]:
    """Turns a plan of poses as seen from the current hand into one of poses in the base frame (SPEC 9.2), committed ones too.

    Proprioception has to be the current pose vector, as in training.
    """

    def absolute(images: Any, proprio: np.ndarray, instructions: Any, query: int, *committed: Committed) -> Chunk:
        current = proprio[:, None]
        seen = (c._replace(actions=relative_poses(current, c.actions)) for c in committed)
        return absolute_poses(current, plan(images, proprio, instructions, query, *seen))

    return absolute
