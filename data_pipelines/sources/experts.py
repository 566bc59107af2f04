"""Demonstrations by the scripted experts of simulators."""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import pickle
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipelines.episode import ArrayFrames, Episode
from mimic_video.errors import ConfigError
from mimic_video.evaluation.environment import Environment, views
from mimic_video.evaluation.simulators import Expert, ExpertFactory

NOISE_SCALES = (0.0, 0.25, 0.5)  # of what is executed, as shares of the largest action; episodes cycle through them
STEPS_AFTER_SUCCESS = 8

_log = logging.getLogger(__name__)


def demonstrations(
    factory: ExpertFactory,
    name: str,
    seeds: Iterable[int],
    workers: concurrent.futures.Executor,
    labelled: bool = True,
    ahead: int = 8,
) -> Iterator[Episode]:
    """Successful episodes of a task's scripted expert, in the order of the seeds, simulated in worker processes.

    Each episode is a function of the task and its seed alone. Its actions are the expert's, while what was executed had Gaussian
    noise added: the data then shows how to recover from states that the expert itself would avoid. It ends
    `STEPS_AFTER_SUCCESS` control steps after the first success, or where the environment ends it.

    An episode whose expert fails is left out and logged as a warning, so fewer episodes than seeds may come back. For
    exactly k of them, take the first k of `demonstrations(factory, name, itertools.count(), ...)`.

    Args:
        factory: of the task's environments, picklable; one of its cameras is "primary".
        name: of simulator and task, "metaworld/reach-v3": names of episodes begin with it, and errors have it.
        seeds: one per episode; may be endless.
        workers: of `data_pipelines.workers.worker_processes`; they keep the environment, and may be used again.
        labelled: False yields action-free videos, without proprioception and actions.
        ahead: episodes that are simulated before they are asked for; fewer than workers leave some idle.

    Raises:
        ConfigError: as of the factory.
        RuntimeError: when the simulator fails, naming the seed; and after the last seed, when the expert never succeeded.
    """
    succeeded = attempted = 0
    for seed, episode in _demonstrate_all(factory, name, seeds, workers, ahead):
        attempted += 1
        if episode is None:
            _log.warning("%s, seed %d: the expert failed; episode left out", name, seed)
            continue
        succeeded += 1
        yield episode if labelled else dataclasses.replace(episode, proprio=None, actions=None)
    _log.info("%s: %d of %d demonstrations succeeded", name, succeeded, attempted)
    if attempted and not succeeded:
        raise RuntimeError(f"the expert for {name} succeeded on none of {attempted} seeds")


def demonstrate(environment: Environment, expert: Expert, name: str, seed: int) -> Episode | None:
    """One episode of an expert that was made for it, simulated in this process; None when the expert does not succeed."""
    random = np.random.default_rng(seed)
    noise = NOISE_SCALES[seed % len(NOISE_SCALES)]
    observations, actions = [], []
    observation, information = environment.reset(seed=seed)
    remaining, succeeded = expert.max_steps, False
    while remaining > 0:
        action, executed = expert(environment, noise, random)
        observations.append(observation)
        actions.append(action)
        observation, _, terminated, truncated, info = environment.step(executed)
        remaining -= 1
        if info["success"] and not succeeded:
            succeeded, remaining = True, STEPS_AFTER_SUCCESS
        if terminated or truncated:
            break
    if not succeeded:
        return None
    frames = {camera: ArrayFrames(np.stack([seen[camera] for seen in observations])) for camera in views(observation)}
    return Episode(
        name=f"{name}/seed {seed}",
        timestamps=np.arange(len(observations)) / environment.metadata["render_fps"],
        frames=frames.pop("primary"),
        further_cameras=frames,
        instruction=information["instruction"],
        proprio=np.stack([seen["proprio"] for seen in observations]),
        actions=np.stack(actions),
        action_layout=expert.action_layout,
    )


def _demonstrate_all(
    factory: ExpertFactory, name: str, seeds: Iterable[int], workers: concurrent.futures.Executor, ahead: int
) -> Iterator[tuple[int, Episode | None]]:
    """(seed, episode) in order of the seeds. Few are in flight at a time, so a slow reader does not fill the memory."""
    pickled = pickle.dumps(factory)
    pending: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()

    def finish_oldest() -> tuple[int, Episode | None]:
        seed, future = pending.popleft()
        try:
            return seed, future.result()
        except ConfigError:
            raise
        except Exception as error:
            raise RuntimeError(f"{name}, seed {seed}: the demonstration failed in its worker process") from error

    try:
        for seed in seeds:
            pending.append((seed, workers.submit(_demonstrate, pickled, name, seed)))
            if len(pending) == ahead:
                yield finish_oldest()
        while pending:
            yield finish_oldest()
    finally:  # nobody waits for the others any more
        for _, future in pending:
            future.cancel()


def _demonstrate(factory: bytes, name: str, seed: int) -> Episode | None:
    make_expert, environment = _built(factory)
    return demonstrate(environment, make_expert.expert(), name, seed)


@functools.cache
def _built(factory: bytes) -> tuple[ExpertFactory, Environment]:
    """The worker's one environment of a task: building it costs more than an episode."""
    own: ExpertFactory = pickle.loads(factory)
    return own, own()
