"""A toy environment that counts, importable by worker processes."""

import dataclasses
import os
import types

import numpy as np

from mimic_video.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CountingFactory:
    """Makes environments that succeed once their actions add up to `goal`. `break_seed` fails in the way `breakage` says.

    After `limit` steps an episode is over.
    """

    goal: float = 3.0
    limit: int = 1000
    break_seed: int | None = None
    breakage: str = ""  # "build", "mistake", "reset", "raise" or "die"

    def __call__(self):
        if self.breakage == "build":
            raise OSError("no such simulator")
        if self.breakage == "mistake":
            raise ConfigError("no such task")
        return CountingEnvironment(self)


class CountingEnvironment:
    """Proprioception is (seed, sum of actions, steps, process id); pixels hold the number of steps."""

    def __init__(self, factory):
        self.action_space, self.metadata = types.SimpleNamespace(shape=(2,)), {"render_fps": 20.0}
        self._factory = factory

    def reset(self, *, seed=None, options=None):
        self._seed, self._total, self._steps = seed, 0.0, 0
        return self._observe(), {} if self._factory.breakage == "reset" else {"instruction": "count"}

    def step(self, action):
        if self._seed == self._factory.break_seed:
            if self._factory.breakage == "die":
                os._exit(3)
            raise ZeroDivisionError("the simulator exploded")
        self._total += float(action.sum())
        self._steps += 1
        success = self._total >= self._factory.goal
        return self._observe(), 0.0, False, self._steps == self._factory.limit, {"success": success}

    def close(self):
        pass

    def _observe(self):
        proprio = np.array([self._seed, self._total, self._steps, os.getpid()], np.float32)
        return {"primary": np.full((2, 2, 3), self._steps, np.uint8), "proprio": proprio}
