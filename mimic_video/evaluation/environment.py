"""What a simulator looks like to the evaluation, and a pool that steps many of them in worker processes."""

import contextlib
import dataclasses
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np

_CLOSE_SECONDS = 5.0  # a worker that has not left by then is killed


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a policy sees at one control step. From a pool, both arrays gain a leading axis: one row per environment.

    Attributes:
        image: uint8 (H, W, 3), RGB, top row first.
        proprio: float32 (p,), raw units.
    """

    image: np.ndarray
    proprio: np.ndarray

    def __post_init__(self):
        if self.image.dtype != np.uint8 or self.image.ndim < 3 or self.image.shape[-1] != 3:
            raise ValueError(f"image is {self.image.dtype} {self.image.shape}; expected uint8 (H, W, 3)")
        if self.proprio.dtype != np.float32:
            raise ValueError(f"proprio is {self.proprio.dtype}; expected float32")


class Environment(Protocol):
    """One task in one simulator.

    Attributes:
        instruction: the task in natural language.
        control_hz: control steps per simulated second.
        action_dim: m.
        proprio_dim: p.
    """

    instruction: str
    control_hz: float
    action_dim: int
    proprio_dim: int

    def reset(self, seed: int) -> Observation:
        """Starts the episode that `seed` alone determines, whatever was simulated before."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Applies one action, float32 (m,) in raw units, for one control step.

        Returns:
            The observation at the end of the step, and whether the task succeeded at any time during it.

        Raises:
            ValueError: for an action of the wrong shape or with a value that is not finite. A finite value beyond what
                the controller can do saturates there, as on a real robot; the environment documents its range.
        """
        ...

    def close(self) -> None:
        """Releases the simulator. The environment cannot be used afterwards."""
        ...


def checked_action(action: np.ndarray, action_dim: int) -> np.ndarray:
    """The action as float32 (action_dim,); every `Environment.step` starts with this. Raises ValueError as promised there."""
    action = np.asarray(action, np.float32)
    if action.shape != (action_dim,):
        raise ValueError(f"action has shape {action.shape}; expected ({action_dim},)")
    if not np.all(np.isfinite(action)):
        raise ValueError(f"action {action.tolist()} is not finite")
    return action


class WorkerError(RuntimeError):
    """A simulator process failed. The message names the factory (so the task) and seed and carries the worker's traceback."""


class EnvironmentPool:
    """One environment per seed, spread over worker processes and stepped in lockstep.

    Workers are spawned, never forked: simulators hold graphics contexts and the parent holds JAX, neither survives a fork.
    The factory therefore has to be picklable, e.g. a frozen dataclass with a `__call__`. Its repr appears in errors.

    Any failure, Ctrl-C included, closes the whole pool before it propagates, so no process outlives it. Use as a context
    manager:

        with EnvironmentPool(MetaworldFactory("drawer-open-v3", (64, 64)), seeds=range(20), num_workers=2) as pool:
            observation = pool.reset()
            observation, success = pool.step(actions, active=np.ones(20, bool))

    Attributes:
        seeds: n seeds, in row order.
        instruction, control_hz, action_dim, proprio_dim: as in `Environment`, shared by all rows.
    """

    def __init__(self, factory: Callable[[], Environment], seeds: Sequence[int], num_workers: int):
        """Starts the workers and builds every environment. Raises WorkerError when one cannot be built."""
        if len(seeds) == 0 or num_workers < 1:
            raise ValueError(f"{factory}: a pool needs at least one seed and one worker, not {len(seeds)} and {num_workers}")
        self.seeds = tuple(int(seed) for seed in seeds)
        self._latest: list[Observation] | None = None
        self._workers: list[_Worker] = []
        try:
            for rows in np.array_split(np.arange(len(seeds)), min(num_workers, len(seeds))):
                self._workers.append(_Worker(factory, tuple(self.seeds[row] for row in rows)))
            descriptions = [worker.receive() for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.instruction: str = descriptions[0].instruction
        self.control_hz: float = descriptions[0].control_hz
        self.action_dim: int = descriptions[0].action_dim
        self.proprio_dim: int = descriptions[0].proprio_dim

    def reset(self) -> Observation:
        """Starts every episode from its seed. Returns image uint8 (n, H, W, 3) and proprio float32 (n, p)."""
        self._latest = [observation for observation, _ in self._exchange([_RESET] * len(self.seeds))]
        return _stack(self._latest)

    def step(self, actions: np.ndarray, active: np.ndarray) -> tuple[Observation, np.ndarray]:
        """Steps the active environments; the others are neither simulated nor rendered and keep their last observation.

        Args:
            actions: float32 (n, m), raw units. Inactive rows are not looked at.
            active: bool (n,).

        Returns:
            Image uint8 (n, H, W, 3) and proprio float32 (n, p), and bool (n,): success during this step, False where inactive.

        Raises:
            ValueError: for arrays of the wrong shape. The pool stays usable.
            WorkerError: when an environment rejects its action or fails. The pool is closed.
        """
        n = len(self.seeds)
        if np.shape(actions) != (n, self.action_dim) or np.shape(active) != (n,):
            raise ValueError(
                f"actions have shape {np.shape(actions)} and active {np.shape(active)}; "
                f"expected ({n}, {self.action_dim}) and ({n},)"
            )
        if self._latest is None:
            raise RuntimeError("reset the pool before stepping it")
        replies = self._exchange([action if on else None for action, on in zip(actions, active, strict=True)])
        self._latest = [old if reply is None else reply[0] for old, reply in zip(self._latest, replies, strict=True)]
        return _stack(self._latest), np.array([reply is not None and reply[1] for reply in replies])

    def close(self) -> None:
        """Ends every worker process; does nothing the second time."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.join()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _exchange(self, commands: list[Any]) -> list[Any]:
        """Sends each environment its command and returns the replies, both in row order."""
        if not self._workers:
            raise RuntimeError("the environment pool is closed")
        remaining = iter(commands)
        try:
            for worker in self._workers:
                worker.send([next(remaining) for _ in worker.seeds])
            return [reply for worker in self._workers for reply in worker.receive()]
        except BaseException:
            self.close()  # a reply left unread here would be taken for the answer to the next request
            raise


_RESET = "reset"  # the command to an environment: _RESET, an action, or None to leave it alone


@dataclasses.dataclass(frozen=True)
class _Description:
    instruction: str
    control_hz: float
    action_dim: int
    proprio_dim: int


@dataclasses.dataclass(frozen=True)
class _Failure:
    seed: int
    traceback: str


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, factory: Callable[[], Environment], seeds: tuple[int, ...]):
        self.seeds = seeds
        self._factory = factory
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, factory, seeds), daemon=True)
        with theirs:  # once this copy is closed, the death of the worker reads as end-of-file
            self._process.start()

    def send(self, commands: list[Any]) -> None:
        try:
            self.connection.send(commands)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def receive(self) -> Any:
        try:
            reply = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(reply, _Failure):
            raise WorkerError(f"{self._factory}, seed {reply.seed}: the environment failed in its worker:\n\n{reply.traceback}")
        return reply

    def join(self) -> None:
        if self._process.pid is None:  # it never started
            return
        self._process.join(_CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def _death(self) -> WorkerError:
        self._process.join(_CLOSE_SECONDS)
        return WorkerError(
            f"{self._factory}, seeds {list(self.seeds)}: the worker process died with exit code "
            f"{self._process.exitcode} and no Python traceback; its standard error may say why"
        )


def _serve(connection: Connection, factory: Callable[[], Environment], seeds: tuple[int, ...]) -> None:
    """The worker process: builds the environments, then answers one list of commands after another until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers itself
    environments: list[Environment] = []

    def build(seed: int) -> _Description:
        environments.append(factory())
        env = environments[-1]
        return _Description(env.instruction, env.control_hz, env.action_dim, env.proprio_dim)

    def obey(seed: int, environment: Environment, command: Any) -> tuple[Observation, bool] | None:
        if command is None:
            return None
        if isinstance(command, str):
            return environment.reset(seed), False
        return environment.step(command)

    def attempt(function: Callable, *columns: Sequence) -> list[Any] | _Failure:
        results = []
        for row in zip(seeds, *columns, strict=True):
            try:
                results.append(function(*row))
            except Exception:
                return _Failure(row[0], traceback.format_exc())
        return results

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent closed its end: time to leave
        built = attempt(build)
        connection.send(built if isinstance(built, _Failure) else built[0])
        while not isinstance(built, _Failure):
            connection.send(attempt(obey, environments, connection.recv()))
    for environment in environments:
        environment.close()


def _stack(observations: list[Observation]) -> Observation:
    return Observation(np.stack([o.image for o in observations]), np.stack([o.proprio for o in observations]))
