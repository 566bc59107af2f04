"""What clients of the server may send: observations under the names of several robot stacks, checked and resampled in time."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from mimic_video.errors import nearest
from mimic_video.policy.history import FrameHistory
from mimic_video.policy.policy import Policy
from mimic_video.transforms import resize_images

_MAX_INSTRUCTION = 2000  # characters
_MAX_SIDE = 4096  # pixels of an image
_FRAMES_PER_PAST_FRAME = 16  # a history's limit: cameras may be that much faster than the model's video rate
_SPELLINGS = {"task": "prompt", "image": "images.primary", "images": "images.primary", "wrist_image": "images.wrist"}
_FIELDS = ("state", "prompt", "timestamp", "deadline", "query", "robots", "reset", "plan")


class BadRequest(ValueError):
    """An observation that the policy cannot act on. The message names the field, the value and what was expected."""


@dataclasses.dataclass(frozen=True)
class PolicyLayout:
    """What a policy takes and gives; the server tells it to every client that connects."""

    embodiment: str
    cameras: tuple[str, ...]
    image_size: tuple[int, int]  # height, width that images are resized to
    past_frames: int
    video_hz: float
    proprio_dim: int
    action_dim: int
    action_horizon: int
    control_hz: float
    execute_steps: int  # actions that are meant to be executed before planning again
    two_valued: tuple[int, ...] = ()  # dimensions of actions that have two values, which are not to be interpolated

    @classmethod
    def of(cls, policy: Policy) -> "PolicyLayout":
        """That of a loaded policy."""
        data, robot = policy.config.data, policy.embodiment
        return cls(
            embodiment=robot.name,
            cameras=tuple(name for name in data.cameras if name in robot.cameras),
            image_size=data.image_size,
            past_frames=data.past_frames,
            video_hz=data.video_hz,
            proprio_dim=robot.proprio_dim,
            action_dim=robot.action_dim,
            action_horizon=data.action_horizon,
            control_hz=data.control_hz,
            execute_steps=policy.config.policy.execute_steps,
            two_valued=robot.statistics["action"].two_valued,
        )

    def metadata(self) -> dict[str, Any]:
        """Plain values for the handshake."""
        return {
            "embodiment": self.embodiment,
            "action": {
                "horizon": self.action_horizon,
                "dim": self.action_dim,
                "dtype": "float32",
                "two_valued": list(self.two_valued),
            },
            "state": {"dim": self.proprio_dim},
            "images": {
                "cameras": list(self.cameras),
                "size": list(self.image_size),
                "dtype": "uint8",
                "channels": "last",
                "past_frames": self.past_frames,
            },
            "instruction": {"field": "prompt", "required": "after connecting or a reset", "max_characters": _MAX_INSTRUCTION},
            "video_hz": self.video_hz,
            "control_hz": self.control_hz,
            "execute_steps": self.execute_steps,
        }


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of the policy, for the n robots of a connection.

    Attributes:
        images: by camera, `past_frames` of each.
        state: raw units.
        instructions: n.
        batched: whether the client asked for several robots, so that the answer has that axis.
        query: the number that fixes the plan's noise; None leaves it to the server.
        deadline: seconds after which the answer is of no use; None for the server's.
        history_frames: frames that `images` shows of each camera; fewer than past_frames if the past is not known.
    """

    images: dict[str, UInt8[np.ndarray, "n f h w 3"]]
    state: Float32[np.ndarray, "n p"]
    instructions: list[str]
    batched: bool
    query: int | None
    deadline: float | None
    history_frames: int


class Session:
    """One connection: it turns messages into requests, and remembers frames and instructions in between."""

    def __init__(self, layout: PolicyLayout, renames: Mapping[str, str], max_robots: int):
        """`renames`: names of fields in a client's messages to those here; an empty one leaves the field out."""
        self._layout, self._max_robots = layout, max_robots
        self._renames = {_plain(name): known for name, known in renames.items()}
        self._frames = FrameHistory(layout.past_frames, layout.video_hz)
        self._instructions: list[str] = []

    def accept(self, message: Mapping[str, Any], now: float) -> Request | dict[str, Any]:
        """The request of a message that arrived at time `now` in seconds; or its answer, if there is nothing to plan.

        Raises:
            BadRequest: naming the field. The session is then as it was before the message.
        """
        fields = _flat(message, self._renames)
        self._check_names(fields)
        reset = _flag(fields, "reset", default=False)
        frames = FrameHistory(self._layout.past_frames, self._layout.video_hz) if reset else self._frames
        last = [] if reset else self._instructions
        if set(fields) == {"reset"} and reset:
            self._frames, self._instructions = frames, last
            return {"reset": True}
        robots = _integer(fields, "robots", 1, self._max_robots)
        batched, count = robots is not None, robots or 1
        images, whole_past = self._images(fields, count, batched)
        planned = _flag(fields, "plan", default=True)
        instructions = _prompts(fields.get("prompt", last), count, planned)
        state = self._state(fields, count, batched) if planned else np.empty(0)
        query = _integer(fields, "query", 0, 2**31 - 1)
        timestamp, deadline = _number(fields, "timestamp"), _number(fields, "deadline")
        if deadline is not None and deadline <= 0:
            raise BadRequest(f"field 'deadline' is {deadline:g}; expected a positive number of seconds")
        seen = self._layout.past_frames
        if not whole_past:
            self._append(frames, images, now if timestamp is None else timestamp)
            images, seen = frames.window(), frames.distinct
        self._frames, self._instructions = frames, instructions
        if not planned:
            return {"history_frames": seen}
        views = {camera: images[:, index] for index, camera in enumerate(self._layout.cameras)}
        return Request(views, state, instructions, batched, query, deadline, seen)

    def _append(self, frames: FrameHistory, images: UInt8[np.ndarray, "n cameras h w 3"], timestamp: float) -> None:
        past, hz = self._layout.past_frames, self._layout.video_hz
        if len(frames) > past * _FRAMES_PER_PAST_FRAME:
            raise BadRequest(
                f"{len(frames)} frames came within {past / hz:g} s; expected at most "
                f"{_FRAMES_PER_PAST_FRAME * hz:g} a second (or a reset)"
            )
        try:
            frames.append(images, timestamp)
        except ValueError as error:
            raise BadRequest(f"'images', 'robots' or 'timestamp' do not go with those before (or a reset): {error}") from error

    def _check_names(self, fields: Mapping[str, Any]) -> None:
        known = [*_FIELDS, *(f"images.{camera}" for camera in self._layout.cameras)]
        for name in fields:
            if name not in known:
                raise BadRequest(
                    f"unknown field '{name[:80]}'; expected {', '.join(known)} (did you mean '{nearest(name, known)}'? the "
                    "server's --rename maps a robot's names to these, or leaves them out)"
                )

    def _images(
        self, fields: Mapping[str, Any], count: int, batched: bool
    ) -> tuple[UInt8[np.ndarray, "{count} cameras *f h w 3"], bool]:
        """Those of the present, or the past frames of each camera, resized; and whether it is the latter."""
        views: list[np.ndarray] = []
        past = self._layout.past_frames
        lead, names = ((count,), f"({count}, ") if batched else ((), "(")
        for camera in self._layout.cameras:
            name = f"images.{camera}"
            value = _array(fields, name)
            single, whole = value.ndim == len(lead) + 3, value.ndim == len(lead) + 4
            sides = value.shape[-3:-1]
            right = (single or (whole and value.shape[-4] == past)) and value.shape[: len(lead)] == lead
            if not right or value.shape[-1] != 3 or not all(1 <= side <= _MAX_SIDE for side in sides):
                raise BadRequest(
                    f"field '{name}' has shape {value.shape}; expected {names}H, W, 3) or {names}{past}, H, W, 3) "
                    f"with sides of up to {_MAX_SIDE} pixels"
                )
            if value.dtype != np.uint8:
                raise BadRequest(f"field '{name}' has dtype {value.dtype}; expected uint8")
            if views and views[0].ndim != value.ndim + (not batched):
                raise BadRequest(f"field '{name}' has shape {value.shape}; expected one frame, or the past, of each camera")
            resized = resize_images(value, self._layout.image_size)
            views.append(resized if batched else resized[None])
        # A view of the message would keep all of it in memory for as long as the history holds the frame.
        return np.stack(views, axis=1), whole

    def _state(self, fields: Mapping[str, Any], count: int, batched: bool) -> Float32[np.ndarray, "{count} p"]:
        value, dim = _array(fields, "state"), self._layout.proprio_dim
        expected = (count, dim) if batched else (dim,)
        if value.shape != expected:
            raise BadRequest(f"field 'state' has shape {value.shape}; expected {expected}")
        if value.dtype.kind not in "iuf":
            raise BadRequest(f"field 'state' has dtype {value.dtype}; expected numbers")
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            state = value.astype(np.float32).reshape(count, dim)
        if not np.isfinite(state).all():
            raise BadRequest(f"field 'state' is {value.tolist()}; expected finite numbers"[:500])
        return state


def _prompts(value: Any, count: int, planned: bool) -> list[str]:
    """One instruction for each robot; none only where there is nothing to plan."""
    if value is None or (isinstance(value, list) and not value):
        if planned:
            raise BadRequest("field 'prompt' is missing; expected it once after connecting or a reset")
        return []
    prompts = [value] * count if isinstance(value, str) else value
    if not isinstance(prompts, list) or len(prompts) != count or not all(isinstance(prompt, str) for prompt in prompts):
        expected = "a string" + (f", or a list of {count}" if count > 1 else "")
        raise BadRequest(f"field 'prompt' is {str(value)[:80]!r}; expected {expected}")
    for prompt in prompts:
        if not prompt.strip() or len(prompt) > _MAX_INSTRUCTION:
            raise BadRequest(f"field 'prompt' is {prompt[:80]!r}, {len(prompt)} characters; expected 1 to {_MAX_INSTRUCTION}")
    return prompts


def _flat(message: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """Fields by the names that they have here: `observation/images/top` and `observation.images.top` are `images.top`."""
    flat: dict[str, Any] = {}
    for name, value in message.items():
        nested = {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, Mapping) else {name: value}
        for path, entry in nested.items():
            plain = _plain(path)
            target = renames.get(plain, _SPELLINGS.get(plain, plain))
            if target in flat:
                raise BadRequest(f"field '{path[:80]}' is '{target}', which the message has already")
            if target:
                flat[target] = entry
    return flat


def _plain(name: str) -> str:
    return name.replace("/", ".").removeprefix("observation.")


def _array(fields: Mapping[str, Any], name: str) -> np.ndarray:
    value = fields.get(name)
    if isinstance(value, list) and name == "state":
        value = np.asarray(value) if all(isinstance(entry, int | float) for entry in value) else value
    if not isinstance(value, np.ndarray):
        kind = "missing" if value is None else f"a {type(value).__name__}"
        raise BadRequest(f"field '{name}' is {kind}; expected an array")
    return value


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool | np.bool_):
        raise BadRequest(f"field '{name}' is {str(value)[:80]!r}; expected true or false")
    return bool(value)


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high):
        raise BadRequest(f"field '{name}' is {str(value)[:80]!r}; expected a whole number from {low} to {high}")
    return None if value is None else int(value)


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not math.isfinite(value):
        raise BadRequest(f"field '{name}' is {str(value)[:80]!r}; expected a finite number")
    return float(value)
