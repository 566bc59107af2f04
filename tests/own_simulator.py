"""A simulator as a user would write one, without gymnasium: a point moves to a goal. Tests copy this file out of the tree."""

import dataclasses
import types

import numpy as np

from mimic_video.evaluation.simulators import EnvironmentSettings, register_environment

STEP, GOALS = 0.1, {"left": (-0.5, 0.0), "right": (0.5, 0.0)}


@dataclasses.dataclass(frozen=True)
class PointFactory:
    task: str
    settings: EnvironmentSettings

    def __call__(self):
        return Point(self.task, self.settings)

    def expert(self):
        return Expert()

    def hold(self, last, robots):
        return np.zeros((robots, 2), np.float32)

    def positions(self, proprio):
        return proprio

    def commanded_positions(self, actions):
        return np.cumsum(STEP * np.pad(actions, [(0, 0), (0, 1)]), axis=0)


class Point:
    def __init__(self, task, settings):
        self.action_space, self.metadata = types.SimpleNamespace(shape=(2,)), {"render_fps": settings.control_hz}
        self.task, self.settings, self.goal = task, settings, np.array(GOALS[task])

    def reset(self, *, seed=None, options=None):
        self.position = np.random.default_rng(seed).uniform(-1, 1, 2)
        return self.observe(), {"instruction": f"move {self.task}"}

    def step(self, action):
        self.position = np.clip(self.position + STEP * np.clip(action, -1, 1), -1, 1)
        success = np.abs(self.position - self.goal).max() < STEP / 2
        return self.observe(), 0.0, False, False, {"success": success}

    def close(self):
        pass

    def observe(self):
        image = np.zeros((*self.settings.image_size, 3), np.uint8)
        row, column = ((self.position + 1) / 2 * (np.array(image.shape[:2]) - 1)).astype(int)
        image[row, column] = 255
        return dict.fromkeys(self.settings.cameras, image) | {"proprio": np.float32([*self.position, 0])}


class Expert:
    action_layout, max_steps = "vector", 40

    def __call__(self, environment, noise, random):
        action = np.float32(np.clip((environment.goal - environment.position) / STEP, -1, 1))
        return action, action + np.float32(noise * random.standard_normal(2))


register_environment("point", PointFactory)
