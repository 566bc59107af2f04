"""What a simulator looks like to the evaluation: gymnasium's `Env`; and a pool that steps many of them in worker processes."""

import contextlib
import dataclasses
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, SupportsFloat

import numpy as np

from mimic_video.errors import ConfigError

_CLOSE_SECONDS = 5.0  # a worker that has not left by then is killed


# What a policy sees at one control step: "proprio", float32 (p,) in raw units, and by the name of each camera its image, uint8
# (H, W, 3), RGB, top row first. From a pool, all arrays have a leading axis: one row per environment.
GymObservation = Mapping[str, np.ndarray]


class Environment(Protocol):
    """One task in one simulator: what is read of gymnasium's `Env`. Subclasses of that are environments, and so is any class that
    has the same methods, without gymnasium.

    Attributes:
        action_space: its `shape` is (m,).
        metadata: "render_fps" is the control rate in Hz, of simulated time.
    """

    action_space: Any
    metadata: dict[str, Any]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[GymObservation, dict[str, Any]]:
        """Starts the episode that `seed` alone determines, whatever was simulated before.

        Returns:
            The first observation, and information: "instruction" is the task in natural language.
        """
        ...

    def step(self, action: np.ndarray, /) -> tuple[GymObservation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Applies one action, float32 (m,) in raw units, for one control step. A pool passes finite values only; one beyond what
        the controller can do saturates there, as on a real robot, and the environment documents its range.

        Returns:
            The observation at the end of the step, the reward (not read), whether the episode is over by its own rules
            (`terminated`) or by a limit of time (`truncated`), and information: "success" says whether the task succeeded at any
            time during the step.
        """
        ...

    def close(self) -> None:
        """Releases the simulator. The environment cannot be used afterwards."""
        ...


EnvironmentFactory = Callable[[], Environment]


def views(observation: GymObservation) -> dict[str, np.ndarray]:
    """The images of an observation, by camera."""
    return {name: image for name, image in observation.items() if name != "proprio"}


def checked_observation(observation: GymObservation) -> GymObservation:
    """The observation of one environment. Raises ValueError, naming the entry, if it is not as said above."""
    if "proprio" not in observation or len(observation) < 2:
        raise ValueError(f"observation has {list(observation)}; expected 'proprio' and, by the names of cameras, images")
    for camera, image in views(observation).items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"image of '{camera}' is {image.dtype} {image.shape}; expected uint8 (H, W, 3)")
    proprio = observation["proprio"]
    if proprio.dtype != np.float32 or proprio.ndim != 1:
        raise ValueError(f"proprio is {proprio.dtype} {proprio.shape}; expected float32 (p,)")
    return observation


def checked_action(action: np.ndarray, action_dim: int) -> np.ndarray:
    """The action as float32 (action_dim,). Raises ValueError for another shape, or a value that is not finite."""
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
    The factory therefore has to be picklable, e.g. a frozen dataclass with a `__call__`, and of a module that workers can import,
    as they do from this process's `sys.path`. Its repr appears in errors.

    Any failure, Ctrl-C included, closes the whole pool before it propagates, so no process outlives it. Use as a context
    manager:

        with EnvironmentPool(MetaworldFactory("drawer-open-v3", (64, 64)), seeds=range(20), num_workers=2) as pool:
            observation, instructions = pool.reset()
            observation, success, ended = pool.step(actions, active=np.ones(20, bool))

    Attributes:
        seeds: n seeds, in row order.
        control_hz, action_dim: of every environment.
    """

    def __init__(self, factory: EnvironmentFactory, seeds: Sequence[int], num_workers: int):
        """Starts the workers and builds every environment.

        Raises:
            ValueError: without seeds or workers, or if the factory cannot be pickled.
            ConfigError: as of the factory.
            WorkerError: when an environment cannot be built.
        """
        if len(seeds) == 0 or num_workers < 1:
            raise ValueError(f"{factory}: a pool needs at least one seed and one worker, not {len(seeds)} and {num_workers}")
        self.seeds = tuple(int(seed) for seed in seeds)
        try:
            pickled = pickle.dumps(factory)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"{factory} cannot go to worker processes ({error}); expected what pickle takes") from error
        self._latest: list[GymObservation] | None = None
        self._workers: list[_Worker] = []
        try:
            for rows in np.array_split(np.arange(len(seeds)), min(num_workers, len(seeds))):
                self._workers.append(_Worker(str(factory), pickled, tuple(self.seeds[row] for row in rows)))
            descriptions = [worker.receive() for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.control_hz: float = descriptions[0].control_hz
        self.action_dim: int = descriptions[0].action_dim

    def reset(self) -> tuple[GymObservation, list[str]]:
        """Starts every episode from its seed. Returns images (n, H, W, 3) and proprioception (n, p), and n instructions."""
        replies = self._exchange([_RESET] * len(self.seeds))
        self._latest = [observation for observation, _ in replies]
        return _stack(self._latest), [instruction for _, instruction in replies]

    def step(self, actions: np.ndarray, active: np.ndarray) -> tuple[GymObservation, np.ndarray, np.ndarray]:
        """Steps the active environments; the others are neither simulated nor rendered and keep their last observation.

        Args:
            actions: float32 (n, m), raw units. Inactive rows are not looked at.
            active: bool (n,).

        Returns:
            Images uint8 (n, H, W, 3) and proprio float32 (n, p); bool (n,), success during this step; and bool (n,), whether the
            environment says that the episode is over. Both are False where inactive.

        Raises:
            ValueError: for arrays of the wrong shape. The pool stays usable.
            WorkerError: for an action that is not finite, or when an environment fails. The pool is closed.
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
        success, ended = ([reply is not None and reply[i] for reply in replies] for i in (1, 2))
        return _stack(self._latest), np.array(success), np.array(ended)

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
    control_hz: float
    action_dim: int


@dataclasses.dataclass(frozen=True)
class _Failure:
    seed: int
    traceback: str
    mistake: str  # the user's, if it is one


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, name: str, factory: bytes, seeds: tuple[int, ...]):
        self.seeds = seeds
        self._name = name
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
            if reply.mistake:
                raise ConfigError(reply.mistake)
            raise WorkerError(f"{self._name}, seed {reply.seed}: the environment failed in its worker:\n\n{reply.traceback}")
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
            f"{self._name}, seeds {list(self.seeds)}: the worker process died with exit code "
            f"{self._process.exitcode} and no Python traceback; its standard error may say why"
        )


def _serve(connection: Connection, factory: bytes, seeds: tuple[int, ...]) -> None:
    """The worker process: builds the environments, then answers one list of commands after another until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers itself
    environments: list[Environment] = []

    def build(seed: int) -> _Description:
        environments.append(pickle.loads(factory)())
        (action_dim,) = environments[-1].action_space.shape
        return _Description(float(_entry(environments[-1].metadata, "render_fps", "metadata")), action_dim)

    def obey(seed: int, environment: Environment, command: Any) -> tuple | None:
        if command is None:
            return None
        if isinstance(command, str):
            observation, info = environment.reset(seed=seed)
            return checked_observation(observation), str(_entry(info, "instruction", "what reset returns as info"))
        observation, _, terminated, truncated, info = environment.step(checked_action(command, len(command)))
        return (
            checked_observation(observation),
            bool(_entry(info, "success", "what step returns as info")),
            bool(terminated or truncated),
        )

    def attempt(function: Callable, *columns: Sequence) -> list[Any] | _Failure:
        results = []
        for row in zip(seeds, *columns, strict=True):
            try:
                results.append(function(*row))
            except Exception as error:
                return _Failure(row[0], traceback.format_exc(), str(error) if isinstance(error, ConfigError) else "")
        return results

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent closed its end: time to leave
        built = attempt(build)
        connection.send(built if isinstance(built, _Failure) else built[0])
        while not isinstance(built, _Failure):
            connection.send(attempt(obey, environments, connection.recv()))
    for environment in environments:
        environment.close()


def _entry(values: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in values:
        raise ValueError(f"{where} has {list(values)}; expected '{key}' among them")
    return values[key]


def _stack(observations: list[GymObservation]) -> GymObservation:
    return {name: np.stack([observation[name] for observation in observations]) for name in observations[0]}
