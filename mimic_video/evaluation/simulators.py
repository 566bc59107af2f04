"""What a simulator that `evaluation.simulator` names has to have, and how an experiment finds it.

    class Point:                         # has the methods of `environment.Environment`, or is a gymnasium.Env
        def __init__(self, task, settings): ...

    @SIMULATORS.register("point")
    def make_point(task, settings):      # called once for each task, in the main process
        return functools.partial(Point, task, settings)

What it returns makes one environment; worker processes get it as a pickle. It may have the methods of `ExpertFactory` and
`HandFactory`, too. The experiment's file imports that module, or names the function:
`config.evaluation.simulator = "my_package.point:make_point"`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.evaluation.environment import Environment, EnvironmentFactory
from mimic_video.registry import SIMULATORS


@dataclasses.dataclass(frozen=True)
class EnvironmentSettings:
    """What an experiment asks of its simulator. One that cannot do so raises ConfigError.

    Attributes:
        image_size: (height, width) of every image in pixels.
        cameras: names of the images in an observation.
        control_hz: rate of actions. Rollouts refuse environments of another rate.
        layout: of actions and proprioception; which there are, is the simulator's to say.
        max_steps: control steps that an episode has to be able to last.
    """

    image_size: tuple[int, int]
    cameras: tuple[str, ...]
    control_hz: float
    layout: str
    max_steps: int


MakeFactory = Callable[[str, EnvironmentSettings], EnvironmentFactory]


class Expert(Protocol):
    """A scripted expert, made for one episode."""

    @property
    def action_layout(self) -> Literal["vector", "delta", "pose"]:
        """What its actions are, as of a `data_pipelines.episode.Episode`."""
        ...

    @property
    def max_steps(self) -> int:
        """Control steps after which it has failed."""
        ...

    def __call__(self, environment: Any, noise: float, random: np.random.Generator, /) -> tuple[np.ndarray, np.ndarray]:
        """What it does in the environment's present state.

        Returns:
            Its action, float32 (m,) in raw units, and the one to be executed in its place: the same with Gaussian noise, whose
            standard deviation is `noise` as a share of the largest action.
        """
        ...


@runtime_checkable
class ExpertFactory(Protocol):
    """An `EnvironmentFactory` whose task has a scripted expert: demonstrations can be collected."""

    def __call__(self) -> Environment: ...

    def expert(self) -> Expert: ...


@runtime_checkable
class HandFactory(Protocol):
    """An `EnvironmentFactory` that knows how the hand of its robot moves: what planning delays do can be measured."""

    def __call__(self) -> Environment: ...

    def hold(self, last: np.ndarray | None, robots: int) -> np.ndarray:
        """Actions (robots, m) of hands that stay where they are, given the actions of the last step; None before any."""
        ...

    def positions(self, proprio: np.ndarray) -> np.ndarray:
        """Where a hand was, in metres: proprioception (steps, p) → (steps, 3)."""
        ...

    def commanded_positions(self, actions: np.ndarray) -> np.ndarray:
        """Where a hand would be, in metres from where it started, if it could follow actions (steps, m): (steps, 3)."""
        ...


def factories(config: ExperimentConfig, cameras: Sequence[str] | None = None) -> Callable[[str], EnvironmentFactory]:
    """Task → what makes its environments, in the experiment's simulator.

    Args:
        cameras: in place of `data.cameras`, those that the robot has.

    Raises:
        ConfigError: if there is no such simulator, listing those there are. What is returned raises it for unknown tasks.
    """
    evaluation, data = config.evaluation, config.data
    settings = EnvironmentSettings(
        data.image_size, tuple(cameras or data.cameras), data.control_hz, evaluation.layout, evaluation.max_steps
    )
    make: MakeFactory = SIMULATORS[evaluation.simulator]
    return lambda task: make(task, settings)


def with_expert(factory: EnvironmentFactory) -> ExpertFactory:
    """The factory itself. Raises ConfigError if it has no expert."""
    if not isinstance(factory, ExpertFactory):
        raise ConfigError(f"{factory} has no scripted expert; expected the method of ExpertFactory")
    return factory


def with_hand(factory: EnvironmentFactory) -> HandFactory:
    """The factory itself. Raises ConfigError if it knows nothing of hands."""
    if not isinstance(factory, HandFactory):
        raise ConfigError(f"{factory} does not know how its robot holds still; expected the methods of HandFactory")
    return factory
