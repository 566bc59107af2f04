"""From action chunks to commands of a robot: other rates, and limits on how far a command may be from the last one."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

_log = logging.getLogger(__name__)


class ActionTooFar(RuntimeError):
    """A command is further from the last one than the robot's limit allows."""


def resample_actions(actions: np.ndarray, control_hz: float, robot_hz: float, two_valued: Sequence[int] = ()) -> np.ndarray:
    """A chunk (a, m) at `control_hz` as one at `robot_hz`, from the first action to the last, with linear interpolation.

    Only for actions that are targets, such as joint positions: parts of a displacement would each be executed in full.

    Args:
        two_valued: dimensions of 0 to m−1 in which there is nothing between two values, such as a gripper that opens or closes.
            Those are the nearest action's, the earlier of two as near, and not rounded: what a policy gives is close to one of
            the values. A server names them in its metadata, under "action".

    Raises:
        ValueError: for a chunk of no actions, a rate that is not positive, or a dimension that there is not.
    """
    if actions.ndim != 2 or len(actions) == 0 or min(control_hz, robot_hz) <= 0:
        raise ValueError(
            f"actions have shape {actions.shape} at {control_hz:g} Hz, wanted at {robot_hz:g} Hz; expected (a, m) "
            "at positive rates"
        )
    if not set(two_valued) <= set(range(actions.shape[1])):
        raise ValueError(f"two_valued is {list(two_valued)}; expected dimensions of 0 to {actions.shape[1] - 1}")
    duration = (len(actions) - 1) / control_hz
    times = np.arange(int(duration * robot_hz + 1e-6) + 1) / robot_hz
    known = np.arange(len(actions)) / control_hz
    resampled = np.stack([np.interp(times, known, column) for column in actions.T], axis=1)
    nearest = np.ceil(times * control_hz - 0.5 - 1e-6).astype(int)
    resampled[:, list(two_valued)] = actions[nearest][:, list(two_valued)]
    return resampled


def limit_step(action: np.ndarray, last: np.ndarray, limits: np.ndarray | float, excess: Literal["error", "limit"]) -> np.ndarray:
    """The action (m,), which may differ from the `last` command by at most `limits` (m,) or one number in each joint.

    Args:
        excess: what to do with one that is further: "error" raises, "limit" goes as far as allowed and logs a warning.

    Raises:
        ActionTooFar: naming the joint, if `excess` is "error"; always for an action that is not finite.
        ValueError: if the limits are not positive, or shapes differ.
    """
    action, last = np.asarray(action, np.float64), np.asarray(last, np.float64)
    bounds = np.asarray(limits, np.float64)
    if action.shape != last.shape or bounds.size not in (1, action.size) or not (bounds > 0).all():
        raise ValueError(
            f"an action of shape {action.shape} after one of {last.shape} with limits {limits}; expected equal "
            "shapes, and one positive limit or one for each joint"
        )
    bounds = np.broadcast_to(bounds, action.shape)
    if not np.isfinite(action).all():
        raise ActionTooFar(f"action {action.tolist()} is not finite")
    steps = action - last
    joint = int(np.argmax(np.abs(steps) / bounds))
    if abs(steps[joint]) <= bounds[joint] * (1 + 1e-6):  # rounding is no excess
        return action
    message = f"joint {joint} would move by {steps[joint]:g}; its limit is {bounds[joint]:g}"
    if excess == "error":
        raise ActionTooFar(message)
    _log.warning("%s: limited", message)
    return last + np.clip(steps, -bounds, bounds)
