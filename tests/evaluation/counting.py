"""A toy environment that counts, importable by worker processes."""

import dataclasses
import os

import numpy as np

from mimic_video.evaluation.environment import Observation, checked_action


@dataclasses.dataclass(frozen=True)
class CountingFactory:
    """Makes environments that succeed once their actions add up to `goal`. `break_seed` fails in the way `breakage` says."""

    goal: float = 3.0
    break_seed: int | None = None
    breakage: str = ""  # "build", "raise" or "die"

    def __call__(self):
        if self.breakage == "build":
            raise OSError("no such simulator")
        return CountingEnvironment(self)


class CountingEnvironment:
    """Proprioception is (seed, sum of actions, steps, process id); pixels hold the number of steps."""

    instruction = "count"
    control_hz = 20.0
    action_dim = 2
    proprio_dim = 4

    def __init__(self, factory):
        self._factory = factory

    def reset(self, seed):
        self._seed, self._total, self._steps = seed, 0.0, 0
        return self._observe()

    def step(self, action):
        action = checked_action(action, self.action_dim)
        if self._seed == self._factory.break_seed:
            if self._factory.breakage == "die":
                os._exit(3)
            raise ZeroDivisionError("the simulator exploded")
        self._total += float(action.sum())
        self._steps += 1
        return self._observe(), self._total >= self._factory.goal

    def close(self):
        pass

    def _observe(self):
        proprio = np.array([self._seed, self._total, self._steps, os.getpid()], np.float32)
        return Observation(np.full((2, 2, 3), self._steps, np.uint8), proprio)
