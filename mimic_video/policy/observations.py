"""What clients of the server may send: observations under the names of several robot stacks, checked and resampled in time."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from mimic_video.errors import nearest
from mimic_video.policy.history import FrameHistory
from mimic_video.policy.policy import Policy
from mimic_video.transforms import resize_images

_log = logging.getLogger(__name__)
_MAX_INSTRUCTION = 2000  # characters
_MAX_SIDE = 4096  # pixels of an image
_FRAMES_PER_PAST_FRAME = 16  # a history's limit: cameras may be that much faster than the model's video rate
_SPELLINGS = {"task": "prompt", "image": "images.primary", "images": "images.primary", "wrist_image": "images.wrist"}
_FIELDS = ("state", "prompt", "timestamp", "deadline", "query", "robots", "reset", "plan")
EPISODE_GAP = 2.0  # seconds: as a rule more than a chunk takes, planned and executed, and less than setting up an episode
_LATEST = 1e11  # seconds: of any clock in seconds that is in use, none shows more; Unix time in milliseconds is above
_FASTER = 100  # times that a clock may run as fast as the arrivals: simulated ones do run faster, in milliseconds it is 1000
_SELDOM = 1.5  # periods of the video between frames, above which the policy does not see what it was trained on


class BadRequest(ValueError):
    """An observation that the policy cannot act on. The message names the field, the value and what was expected."""


@dataclasses.dataclass(frozen=True)
class ClientFormat:
    """How the observations of one kind of client differ from those that `Session` takes of any.

    Attributes:
        renames: its fields by the names that they have here. Of cameras that the policy does not have they are left out.
        channels_first: images are (..., 3, H, W).
        float_images: images may also be floats from 0 to 1.
    """

    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    channels_first: bool = False
    float_images: bool = False


# As the examples of openpi send them, and as its servers take them; the empty name stands for clients that need no format.
CLIENTS = {
    "": ClientFormat(),
    "openpi_libero": ClientFormat({"image": "images.primary", "wrist_image": "images.wrist"}, float_images=True),
    "openpi_droid": ClientFormat(
        {
            "exterior_image_1_left": "images.primary",
            "wrist_image_left": "images.wrist",
            "joint_position": "state",
            "gripper_position": "state",
        },
        float_images=True,
    ),
    "openpi_aloha": ClientFormat(
        {
            "images.cam_high": "images.primary",
            "images.cam_low": "images.secondary",
            "images.cam_left_wrist": "images.wrist",
            "images.cam_right_wrist": "",  # there is one role for wrists
        },
        channels_first=True,
        float_images=True,
    ),
}


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
        warning: what the client is to be told beside the answer; empty for nothing.
    """

    images: dict[str, UInt8[np.ndarray, "n f h w 3"]]
    state: Float32[np.ndarray, "n p"]
    instructions: list[str]
    batched: bool
    query: int | None
    deadline: float | None
    history_frames: int
    warning: str = ""


class Session:
    """One connection: it turns messages into requests, and remembers frames and instructions in between."""

    def __init__(
        self,
        layout: PolicyLayout,
        renames: Mapping[str, str],
        max_robots: int,
        client: ClientFormat = CLIENTS[""],
        prompt: str = "",
        episode_gap: float = EPISODE_GAP,
    ):
        """See `ServerOptions` for the arguments; `renames` go before those of the client's format."""
        self._layout, self._max_robots, self._client = layout, max_robots, client
        self._prompt, self._episode_gap = prompt, episode_gap
        spare = {known for known in client.renames.values() if known.startswith("images.")} - set(_camera_fields(layout))
        own = {_plain(name): "" if known in spare else known for name, known in client.renames.items()}
        self._renames = own | {_plain(name): known for name, known in renames.items()}
        self._frames = FrameHistory(layout.past_frames, layout.video_hz)
        self._instructions: list[str] = []
        self._arrived = -math.inf  # when the newest frame came first
        self._seldom = 0  # plans in a row whose frame came long after the one before
        self._warned = False

    def accept(self, message: Mapping[str, Any], now: float) -> Request | dict[str, Any]:
        """The request of a message that arrived at time `now` in seconds; or its answer, if there is nothing to plan.

        Raises:
            BadRequest: naming the field. The session is then as it was before the message.
        """
        fields = _flat(message, self._renames)
        self._check_names(fields)
        reset = _flag(fields, "reset", default=False)
        last = [] if reset else self._instructions
        if set(fields) == {"reset"} and reset:
            self._frames, self._instructions = self._no_frames(), last
            return {"reset": True}
        robots = _integer(fields, "robots", 1, self._max_robots)
        batched, count = robots is not None, robots or 1
        images, whole_past = self._images(fields, count, batched)
        planned = _flag(fields, "plan", default=True)
        instructions = _prompts(fields.get("prompt", last or self._prompt or None), count, planned)
        state = self._state(fields, count, batched) if planned else np.empty(0)
        query = _integer(fields, "query", 0, 2**31 - 1)
        timestamp, deadline = self._timestamp(fields), _number(fields, "deadline")
        if deadline is not None and deadline <= 0:
            raise BadRequest(f"field 'deadline' is {deadline:g}; expected a positive number of seconds")
        frames, seen, warning = self._no_frames() if reset else self._frames, self._layout.past_frames, ""
        if not whole_past:
            before, time = frames.newest, now if timestamp is None else timestamp
            frames = self._append(frames, images, time, now)
            if before is not None:
                warning = self._warning(time - before[0], now - self._arrived, planned)
            if before is None or time > before[0]:
                self._arrived = now
            images, seen = frames.window(), frames.distinct
        self._frames, self._instructions = frames, instructions
        if not planned:
            return {"history_frames": seen} | ({"warning": warning} if warning else {})
        views = {camera: images[:, index] for index, camera in enumerate(self._layout.cameras)}
        return Request(views, state, instructions, batched, query, deadline, seen, warning)

    def _no_frames(self) -> FrameHistory:
        return FrameHistory(self._layout.past_frames, self._layout.video_hz)

    def _append(
        self, frames: FrameHistory, images: UInt8[np.ndarray, "n cameras h w 3"], time: float, now: float
    ) -> FrameHistory:
        """The history with a frame of that time, which arrived now; a new one after a pause that ends an episode."""
        past, hz = self._layout.past_frames, self._layout.video_hz
        if frames.newest is not None:
            last, picture = frames.newest
            if time == last and now - self._arrived > 1 / hz and not np.array_equal(picture, images):
                raise BadRequest(
                    f"field 'timestamp' is {time:.3f}, as that of another picture {now - self._arrived:.3f} s before; expected "
                    "the time of each frame, in seconds as float64"
                )
            if time - last > self._episode_gap:
                frames = self._no_frames()
        if len(frames) > past * _FRAMES_PER_PAST_FRAME:
            raise BadRequest(
                f"{len(frames)} frames came within {past / hz:g} s; expected at most "
                f"{_FRAMES_PER_PAST_FRAME * hz:g} a second (or a reset)"
            )
        try:
            frames.append(images, time)
        except ValueError as error:
            raise BadRequest(f"'images', 'robots' or 'timestamp' do not go with those before (or a reset): {error}") from error
        return frames

    def _warning(self, pause: float, elapsed: float, planned: bool) -> str:
        """What keeps the policy from seeing the past, told and logged once; else nothing.

        Args:
            pause, elapsed: seconds since the frame before, by the frames' times and by their arrivals.
        """
        past, hz = self._layout.past_frames, self._layout.video_hz
        if past == 1:
            return ""
        if planned:
            self._seldom = self._seldom + 1 if pause > _SELDOM / hz else 0
        if pause > max(past / hz, _FASTER * elapsed):
            return self._once(
                f"field 'timestamp' went {pause:g} s ahead within {elapsed:.3f} s, past all {past} frames that the policy sees; "
                "is it in seconds?"
            )
        if self._seldom > 1:
            return self._once(
                f"frames come every {pause:.3f} s; the policy was trained on {hz:g} a second: send those in between, too, with "
                f"'plan': false, or the past {past} at once"
            )
        return ""

    def _once(self, warning: str) -> str:
        if self._warned:
            return ""
        self._warned = True
        _log.warning(warning)
        return warning

    def _check_names(self, fields: Mapping[str, Any]) -> None:
        known = [*_FIELDS, *_camera_fields(self._layout)]
        for name in fields:
            if name not in known:
                raise BadRequest(
                    f"unknown field '{name[:80]}'; expected {', '.join(known)} (did you mean '{nearest(name, known)}'? the "
                    "server's --rename and --client map a robot's names to these, or leave them out)"
                )

    def _images(
        self, fields: Mapping[str, Any], count: int, batched: bool
    ) -> tuple[UInt8[np.ndarray, "{count} cameras *f h w 3"], bool]:
        """Those of the present, or the past frames of each camera, resized; and whether it is the latter."""
        views: list[np.ndarray] = []
        past, first = self._layout.past_frames, self._client.channels_first
        lead, names = ((count,), f"({count}, ") if batched else ((), "(")
        sizes = "3, H, W" if first else "H, W, 3"
        for name in _camera_fields(self._layout):
            sent = _array(fields, name)
            value = np.moveaxis(sent, -3, -1) if first and sent.ndim >= 3 else sent
            single, whole = value.ndim == len(lead) + 3, value.ndim == len(lead) + 4
            sides = value.shape[-3:-1]
            right = (single or (whole and value.shape[-4] == past)) and value.shape[: len(lead)] == lead
            if not right or value.shape[-1] != 3 or not all(1 <= side <= _MAX_SIDE for side in sides):
                raise BadRequest(
                    f"field '{name}' has shape {sent.shape}; expected {names}{sizes}) or {names}{past}, {sizes}) "
                    f"with sides of up to {_MAX_SIDE} pixels"
                )
            if self._client.float_images and value.dtype.kind == "f":
                value = _from_floats(name, value)
            if value.dtype != np.uint8:
                raise BadRequest(f"field '{name}' has dtype {value.dtype}; expected uint8")
            if views and views[0].ndim != value.ndim + (not batched):
                raise BadRequest(f"field '{name}' has shape {sent.shape}; expected one frame, or the past, of each camera")
            resized = resize_images(value, self._layout.image_size)
            views.append(resized if batched else resized[None])
        # A view of the message would keep all of it in memory for as long as the history holds the frame.
        return np.stack(views, axis=1), whole

    def _timestamp(self, fields: Mapping[str, Any]) -> float | None:
        """Seconds of the robot's clock, in a type that tells the frames of a video apart."""
        value, seconds = fields.get("timestamp"), _number(fields, "timestamp")
        if seconds is None:
            return None
        if abs(seconds) > _LATEST:
            raise BadRequest(f"field 'timestamp' is {seconds:.0f}; expected seconds, not milliseconds or nanoseconds")
        step, period = float(np.spacing(value if isinstance(value, np.floating) else seconds)), 1 / self._layout.video_hz
        if step > period / 4:
            raise BadRequest(
                f"field 'timestamp' is {seconds:.0f} as {np.dtype(type(value))}, which goes in steps of {step:g} s there; "
                "expected float64"
            )
        return seconds

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


def _camera_fields(layout: PolicyLayout) -> list[str]:
    return [f"images.{camera}" for camera in layout.cameras]


def _from_floats(name: str, image: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """From 0 to 1 as 0 to 255, to the nearest."""
    levels = np.round(image.astype(np.float32) * 255)
    if not ((levels >= 0) & (levels <= 255)).all():
        raise BadRequest(
            f"field '{name}' has values from {image.min():g} to {image.max():g} as {image.dtype}; expected 0 to 1, or uint8"
        )
    return levels.astype(np.uint8)


def _prompts(value: Any, count: int, planned: bool) -> list[str]:
    """One instruction for each robot; none only where there is nothing to plan."""
    value = [_text(entry) for entry in value] if isinstance(value, list) else _text(value)
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


def _text(value: Any) -> Any:
    """Bytes as the text that they are in UTF-8."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise BadRequest(f"field 'prompt' is {value[:80]!r}; expected text in UTF-8") from error


def _flat(message: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """Fields by the names that they have here: `observation/images/top` and `observation.images.top` are `images.top`.

    Several that are renamed to 'state' become one, in the order of `renames`. Arrays without axes become scalars.
    """
    parts = [name for name, known in renames.items() if known == "state"]
    if len(parts) > 1:
        renames = {name: name if name in parts else known for name, known in renames.items()}
    flat: dict[str, Any] = {}
    for name, value in message.items():
        nested = {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, Mapping) else {name: value}
        for path, entry in nested.items():
            plain = _plain(path)
            target = renames.get(plain, _SPELLINGS.get(plain, plain))
            if target in flat:
                raise BadRequest(f"field '{path[:80]}' is '{target}', which the message has already")
            if target:
                flat[target] = entry[()] if isinstance(entry, np.ndarray) and not entry.ndim else entry
    if len(parts) > 1 and any(part in flat for part in parts):
        if "state" in flat:
            raise BadRequest(f"field 'state' is there beside {', '.join(parts)}; expected one or the other")
        flat["state"] = _joined({part: _array(flat, part) for part in parts})
        flat = {name: value for name, value in flat.items() if name not in parts}
    return flat


def _joined(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The parts of a state, side by side along the last axis."""
    if len({part.shape[:-1] for part in parts.values()}) > 1 or any(part.dtype.kind not in "iuf" for part in parts.values()):
        found = ", ".join(f"'{name}' {part.shape} {part.dtype}" for name, part in parts.items())
        raise BadRequest(f"the state's fields are {found}; expected numbers that differ only in their last axis")
    return np.concatenate(list(parts.values()), axis=-1)


def _plain(name: str) -> str:
    return name.replace("/", ".").removeprefix("observation.")


def _array(fields: Mapping[str, Any], name: str) -> np.ndarray:
    value = fields.get(name)
    entries = value if isinstance(value, list) else [value]
    if not name.startswith("images.") and all(isinstance(entry, int | float | np.number) for entry in entries):
        value = np.array(entries)  # a state, or a part of one, as plain numbers
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
