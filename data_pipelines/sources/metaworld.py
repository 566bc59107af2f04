"""Demonstrations by Meta-World's scripted experts."""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from data_pipelines.episode import ArrayFrames, Episode
from mimic_video.evaluation.metaworld import MetaworldEnvironment, MetaworldFactory, to_delta

NOISE_SCALES = (0.0, 0.25, 0.5)  # standard deviation of the noise on executed x, y, z; episodes cycle through them
MAX_STEPS = 125  # control steps, Meta-World's own limit: an expert that has not succeeded by then has failed
STEPS_AFTER_SUCCESS = 8

_log = logging.getLogger(__name__)


def demonstrations(
    factory: MetaworldFactory, seeds: Iterable[int], labelled: bool = True, num_workers: int = 2
) -> Iterator[Episode]:
    """Successful episodes of a task's scripted expert, in the order of the seeds, simulated in worker processes.

    Each episode is a function of (task, seed) alone. Its actions are the expert's, clipped to ±1, while what was executed
    had Gaussian noise added to x, y, z: the data then shows how to recover from states that the expert itself would avoid.
    It ends `STEPS_AFTER_SUCCESS` control steps after the first success.

    An episode whose expert fails is left out and logged as a warning, so fewer episodes than seeds may come back. For
    exactly k of them, take the first k of `demonstrations(task, itertools.count(), ...)`.

    Args:
        factory: of the task's environments; one of its cameras is "primary".
        seeds: one per episode; may be endless.
        labelled: False yields action-free videos, without proprioception and actions.
        num_workers: simulator processes.

    Raises:
        RuntimeError: when the simulator fails, naming the seed; and after the last seed, when the expert never succeeded.
    """
    succeeded = attempted = 0
    for seed, episode in _demonstrate_all(factory, seeds, num_workers):
        attempted += 1
        if episode is None:
            _log.warning("%s, seed %d: the expert failed; episode left out", factory.task, seed)
            continue
        succeeded += 1
        yield episode if labelled else dataclasses.replace(episode, proprio=None, actions=None)
    _log.info("%s: %d of %d demonstrations succeeded", factory.task, succeeded, attempted)
    if attempted and not succeeded:
        raise RuntimeError(f"the expert for {factory.task} succeeded on none of {attempted} seeds")


def demonstrate(factory: MetaworldFactory, seed: int) -> Episode | None:
    """One episode of the scripted expert, simulated in this process; None when the expert does not succeed."""
    environment = _environment(factory)
    expert = _expert(factory.task)
    noise = np.random.default_rng(seed)
    noise_scale = NOISE_SCALES[seed % len(NOISE_SCALES)]
    images, proprio, actions = [], [], []
    observation = environment.reset(seed)
    remaining = MAX_STEPS
    succeeded = False
    while remaining > 0:
        action = expert(environment.state)
        images.append(observation.image)
        proprio.append(observation.proprio)
        actions.append(_in_layout(action, factory))
        executed = action.copy()
        executed[:3] += noise_scale * noise.standard_normal(3)
        observation, success = environment.step(_in_layout(executed, factory))
        remaining -= 1
        if success and not succeeded:
            succeeded, remaining = True, STEPS_AFTER_SUCCESS
    if not succeeded:
        return None
    views = dict(zip(factory.cameras, np.split(np.stack(images), len(factory.cameras), axis=1), strict=True))
    return Episode(
        name=f"metaworld/{factory.task}/seed {seed}",
        timestamps=np.arange(len(images)) / environment.control_hz,
        frames=ArrayFrames(views["primary"]),
        further_cameras={camera: ArrayFrames(frames) for camera, frames in views.items() if camera != "primary"},
        instruction=environment.instruction,
        proprio=np.stack(proprio),
        actions=np.stack(actions),
        action_layout="vector" if factory.layout == "native" else "delta",
    )


def expert_steps(factory: MetaworldFactory, seed: int, max_steps: int) -> int | None:
    """Control steps that the scripted expert needs without noise; None if `max_steps` are not enough: a policy's ceiling."""
    environment, expert = _environment(factory), _expert(factory.task)
    environment.reset(seed)
    for step in range(1, max_steps + 1):
        _, success = environment.step(_in_layout(expert(environment.state), factory))
        if success:
            return step
    return None


def _in_layout(action: np.ndarray, factory: MetaworldFactory) -> np.ndarray:
    return action if factory.layout == "native" else to_delta(action)


def _expert(task: str) -> Callable[[np.ndarray], np.ndarray]:
    """The scripted expert: simulator state (39,) → float32 action (4,) in [−1, 1]. Call once an environment exists."""
    from metaworld.policies import ENV_POLICY_MAP  # only now: the environment has settled how MuJoCo draws

    make_expert: Any = ENV_POLICY_MAP[task]
    expert = make_expert()

    def act(state: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant")  # "... may be too high": the clip below is what it asks for
            return np.clip(expert.get_action(state), -1, 1).astype(np.float32)

    return act


def _demonstrate_all(factory: MetaworldFactory, seeds: Iterable[int], num_workers: int) -> Iterator[tuple[int, Episode | None]]:
    """(seed, episode) in order of the seeds. Few are in flight at a time, so a slow reader does not fill the memory."""
    executor = concurrent.futures.ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # graphics contexts and JAX do not survive a fork
        initializer=_tie_to_parent,
    )
    pending: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()

    def finish_oldest() -> tuple[int, Episode | None]:
        seed, future = pending.popleft()
        try:
            return seed, future.result()
        except Exception as error:
            raise RuntimeError(f"{factory}, seed {seed}: the demonstration failed in its worker process") from error

    try:
        for seed in seeds:
            pending.append((seed, executor.submit(demonstrate, factory, seed)))
            if len(pending) == 4 * num_workers:
                yield finish_oldest()
        while pending:
            yield finish_oldest()
    finally:
        executor.shutdown(cancel_futures=True)


def _tie_to_parent() -> None:
    """Makes this worker end when its parent does and not before: the executor alone leaves workers of a killed parent running."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers itself
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def leave_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _environment(factory: MetaworldFactory) -> MetaworldEnvironment:
    """The process's one environment for demonstrations: building it costs more than an episode."""
    return factory()
