"""A simulator as a user would write one, without gymnasium: a point moves to a goal. Tests copy this file out of the tree."""

import dataclasses

import numpy as np

from mimic_video.registry import SIMULATORS

STEP, GOALS = 0.1, {"left": (-0.5, 0.0), "right": (0.5, 0.0)}


class Point:
    action_space = np.zeros(2)  # of which only the shape is read

    def __init__(self, task, settings):
        self.metadata, self.task, self.settings = {"render_fps": settings.control_hz}, task, settings

    def reset(self, *, seed=None, options=None):
        self.position = np.random.default_rng(seed).uniform(-1, 1, 2)
        return self.observe(), {"instruction": f"move {self.task}"}

    def step(self, action):
        self.position = np.clip(self.position + STEP * np.clip(action, -1, 1), -1, 1)
        return self.observe(), 0.0, False, False, {"success": np.abs(self.position - GOALS[self.task]).max() < STEP / 2}

    def close(self):
        pass

    def observe(self):
        image = np.zeros((*self.settings.image_size, 3), np.uint8)
        image[*((self.position + 1) / 2 * (np.array(image.shape[:2]) - 1)).astype(int)] = 255
        return dict.fromkeys(self.settings.cameras, image) | {"proprio": np.float32([*self.position, 0])}


class Expert:
    action_layout, max_steps = "vector", 40

    def __call__(self, point, noise, random):
        action = np.float32(np.clip((GOALS[point.task] - point.position) / STEP, -1, 1))
        return action, action + np.float32(noise * random.standard_normal(2))


@SIMULATORS.register("point")
@dataclasses.dataclass(frozen=True)
class PointFactory:
    task: str
    settings: object
    expert = staticmethod(Expert)

    def __call__(self):
        return Point(self.task, self.settings)

    def hold(self, last, robots):
        return np.zeros((robots, 2), np.float32)

    def positions(self, proprio):
        return proprio

    def commanded_positions(self, actions):
        return np.cumsum(STEP * np.pad(actions, [(0, 0), (0, 1)]), axis=0)
