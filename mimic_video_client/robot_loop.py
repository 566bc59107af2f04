"""A robot driven by a policy server: an example to start from, and a dry run that needs no robot.

    python -m mimic_video_client.robot_loop --server=ws://HOST:8000 --prompt='open the drawer' \\
        --actions=targets --max_step=0.05 --excess=error --dry_run
    python -m mimic_video_client.robot_loop ... --robot=my_package.my_robot:make_robot --robot_hz=50

`make_robot()` returns a `Robot`. With --dry_run its actions are printed instead of executed; without --robot, pictures and state
are made up, too. The loop plans, executes `execute_steps` of the chunk, and plans again; the robot holds still while it waits for
a plan. A server on another machine needs `--token`, or MIMIC_VIDEO_TOKEN, if it was started with one.
"""

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from mimic_video_client.client import PolicyClient, RequestRefused, ServerUnavailable
from mimic_video_client.execution import ActionTooFar, limit_step, resample_actions

_log = logging.getLogger(__name__)


class Robot(Protocol):
    """What the loop needs of a robot."""

    def observe(self) -> dict[str, np.ndarray]:
        """LeRobot's names: "observation.images.NAME" uint8 (H, W, 3) of each camera, "observation.state" (p,)."""
        ...

    def position(self) -> np.ndarray:
        """Where it is (m,), in the units of targets. Not asked where actions are displacements."""
        ...

    def act(self, action: np.ndarray) -> None:
        """Starts to execute one command (m,) and returns."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How chunks become commands.

    Attributes:
        actions: "targets" are where to go, such as joint positions; "displacements" how far from here.
        max_step: limit of what one command moves in each dimension, (m,) or one number for all.
        excess: what to do with a command beyond it: "error" ends the loop, "limit" goes as far as allowed and logs it.
        robot_hz: commands per second, a whole multiple of the policy's rate; 0 for that rate. Targets are interpolated, but for
            dimensions that have two values by the server's description, such as a gripper's: `max_step` has to allow their jump.
    """

    actions: Literal["targets", "displacements"]
    max_step: np.ndarray | float
    excess: Literal["error", "limit"]
    robot_hz: float = 0.0

    def commands_per_action(self, control_hz: float) -> int:
        """Raises ValueError if the robot's rate is no whole multiple of the policy's, or displacements would be repeated."""
        ratio = (self.robot_hz or control_hz) / control_hz
        if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise ValueError(f"robot_hz is {self.robot_hz:g}; expected a whole multiple of the policy's {control_hz:g} Hz")
        if self.actions == "displacements" and round(ratio) > 1:
            raise ValueError(f"robot_hz is {self.robot_hz:g}; expected {control_hz:g}: displacements cannot be interpolated")
        return round(ratio)


def run_robot(
    client: PolicyClient,
    robot: Robot,
    task: str,
    settings: LoopSettings,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """One episode of at most `seconds`.

    Raises:
        ActionTooFar: if a command is beyond the limit and that is an error.
        ValueError: if the robot's rate does not fit the policy's.
        RequestRefused, PolicyTimeout, ConnectionLost: as `PolicyClient.infer`. The robot has its last command then.
        ProtocolError: if the server does not tell its policy's rates, as openpi's do not.
    """
    control_hz, execute_steps, action = client.told("control_hz", "execute_steps", "action")
    two_valued = action.get("two_valued", ())  # earlier servers do not say
    repeat = settings.commands_per_action(control_hz)
    period = 1 / (repeat * control_hz)
    client.reset()
    last = robot.position() if settings.actions == "targets" else np.zeros(action["dim"])
    commands, due = np.empty((0, 0)), clock()
    for tick in range(round(seconds / period)):
        step, part = divmod(tick, repeat)
        if part == 0:
            observation = {**robot.observe(), "task": task, "timestamp": clock()}
            if step % execute_steps == 0:
                chunk = client.infer(observation)["actions"]
                commands = resample_actions(chunk, control_hz, repeat * control_hz, two_valued)
                due = max(due, clock())  # the plan starts now, however long it took
            else:
                client.observe(observation)
        index = min(tick % (execute_steps * repeat), len(commands) - 1)
        command = limit_step(commands[index], last, settings.max_step, settings.excess)
        robot.act(command)
        if settings.actions == "targets":
            last = command
        due += period
        late = clock() - due
        if late > 0:
            _log.warning("command %d ended %.0f ms late", tick, 1e3 * late)
            due += late  # no burst of commands to catch up
        else:
            sleep(-late)


class MadeUpRobot:
    """Moving squares as pictures; it is wherever it was told to go. For dry runs."""

    def __init__(self, client: PolicyClient):
        self._images, self._state, action = client.told("images", "state", "action")
        self._position, self._count = np.zeros(action["dim"]), 0

    def observe(self) -> dict[str, np.ndarray]:
        height, width = self._images["size"]
        image = np.full((height, width, 3), 128, np.uint8)
        left = self._count % max(1, width - width // 4)
        image[height // 4 : height // 2, left : left + width // 4] = 255
        self._count += 1
        pictures = {f"observation.images.{camera}": image for camera in self._images["cameras"]}
        return {**pictures, "observation.state": np.zeros(self._state["dim"], np.float32)}

    def position(self) -> np.ndarray:
        return self._position

    def act(self, action: np.ndarray) -> None:
        self._position = action


class DryRun:
    """Another robot's eyes; its actions are printed."""

    def __init__(self, robot: Robot):
        self._robot = robot
        self.observe, self.position = robot.observe, robot.position

    def act(self, action: np.ndarray) -> None:
        print("would do", np.array2string(action, precision=4, suppress_small=True, max_line_width=200), flush=True)


def make_robot(name: str) -> Robot:
    """The robot that MODULE:FUNCTION returns. Raises ValueError if there is no such function."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--robot={name}: expected MODULE:FUNCTION, but {error}") from error


def _numbers(text: str) -> np.ndarray:
    return np.array([float(number) for number in text.split(",")])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Drives a robot by a policy server.")
    parser.add_argument("--server", required=True, help="ws://HOST:PORT")
    parser.add_argument("--token", default=os.environ.get("MIMIC_VIDEO_TOKEN"), help="the server's secret")
    parser.add_argument("--proxy", help="http://HOST:PORT or socks5h://HOST:PORT to connect through; none unless given")
    parser.add_argument("--prompt", required=True, help="instruction")
    parser.add_argument("--actions", required=True, choices=("targets", "displacements"), help="what the policy's actions are")
    parser.add_argument("--max_step", required=True, type=_numbers, help="limit of one command: a number, or LIMIT,LIMIT,...")
    parser.add_argument("--excess", required=True, choices=("error", "limit"), help="what to do with a command beyond it")
    parser.add_argument("--robot", help="MODULE:FUNCTION that returns the robot")
    parser.add_argument("--robot_hz", type=float, default=0.0, help="commands per second; the policy's rate unless given")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the episode")
    parser.add_argument("--dry_run", action="store_true", help="print actions instead of executing them")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not (options.robot or options.dry_run):
        parser.error("expected --robot=MODULE:FUNCTION, or --dry_run")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    settings = LoopSettings(options.actions, options.max_step, options.excess, options.robot_hz)
    try:
        with PolicyClient(options.server, options.token, proxy=options.proxy) as client:
            robot = make_robot(options.robot) if options.robot else MadeUpRobot(client)
            run_robot(client, DryRun(robot) if options.dry_run else robot, options.prompt, settings, options.seconds)
    except (ServerUnavailable, RequestRefused, ActionTooFar, ConnectionError, TimeoutError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
