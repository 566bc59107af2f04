"""Raw columns of a dataset → the one convention of proprioception and actions: small pure functions, and the parts of a layout.

The convention: positions in metres, rotations as rot6d rows (`mimic_video.transforms`), grippers in [0, 1] where 1 is open. A
`Layout` is a tuple of parts, each of which reads columns and yields its own dimensions, so a dataset's conversion is plain data.

A reference names what a part reads, relative to `steps/`: `"observation/state[3:6]"`, or `"observation/gripper"` for a feature
of one number. Features of several axes are flattened row by row. Columns are keyed by the whole path, `steps/observation/state`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float, Float32
from scipy.spatial.transform import Rotation

from data_pipelines.episode import POSE_DIM, ActionLayout
from mimic_video.transforms import rot6d_from_matrix

Columns = Mapping[str, np.ndarray]
Encoding = Literal["euler_xyz", "euler_zxy", "ypr", "yaw", "rotvec", "quat_xyzw", "quat_wxyz"]

# Width and meaning of each encoding of a rotation, in radians.
ENCODINGS: dict[str, int] = {
    "euler_xyz": 3,  # roll, pitch, yaw about the fixed axes x, y, z
    "euler_zxy": 3,  # angles about the fixed axes z, x, y, in that order
    "ypr": 3,  # yaw, pitch, roll: euler_xyz written backwards
    "yaw": 1,  # about z
    "rotvec": 3,  # axis times angle
    "quat_xyzw": 4,
    "quat_wxyz": 4,
}
METRES = "m"
RADIANS = "rad"
RAW = "dataset units"  # of a scale that the dataset does not document
NATIVE = "controller units"  # ±1 is the largest command

_REFERENCE = re.compile(r"(?P<path>[^\[\]]+?)(\[(?P<first>\d+):(?P<last>\d+)\])?")
_SHORTEST = 1e-6  # norm of a quaternion that still has a direction
_ZERO = 1e-6  # entries of a homogeneous matrix that must be zero


# Pure functions.


def rot6d(values: Float[np.ndarray, "n k"], encoding: Encoding) -> Float[np.ndarray, "n 6"]:
    """Rotations in radians, or quaternions of any length, as rot6d rows in float64 (SPEC 8.5).

    Raises:
        ValueError: for an unknown encoding or another width than `ENCODINGS` says, or naming the step of a zero quaternion.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"rotation encoding is {encoding!r}; expected one of {', '.join(ENCODINGS)}")
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != ENCODINGS[encoding]:
        raise ValueError(f"rotations of encoding {encoding!r} have shape {values.shape}; expected (n, {ENCODINGS[encoding]})")
    return rot6d_from_matrix(_rotation(values, encoding).as_matrix()).astype(np.float64)


def _rotation(values: np.ndarray, encoding: str) -> Rotation:
    if encoding in ("quat_xyzw", "quat_wxyz"):
        short = np.linalg.norm(values, axis=1) < _SHORTEST
        if short.any():
            raise ValueError(f"the quaternion of step {int(np.argmax(short))} is zero: {values[np.argmax(short)].tolist()}")
        return Rotation.from_quat(values, scalar_first=encoding == "quat_wxyz")
    if encoding == "rotvec":
        return Rotation.from_rotvec(values)
    if encoding == "yaw":
        return Rotation.from_euler("z", values)  # (n, 1): of (n,) a single angle would lose its axis
    if encoding == "euler_zxy":
        return Rotation.from_euler("zxy", values)
    return Rotation.from_euler("xyz", values[:, ::-1] if encoding == "ypr" else values)


def split_transforms(flat: Float[np.ndarray, "n 16"]) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3 3"]]:
    """Positions and rotation matrices of flattened homogeneous matrices, whichever of the two orders they were flattened in.

    Franka's own libraries write column after column, NumPy row after row; the row (0, 0, 0, 1) tells which.

    Raises:
        ValueError: naming the first step that is not a homogeneous matrix in the order of the others.
    """
    rows = np.asarray(flat, np.float64).reshape(-1, 4, 4)
    bottom = np.array([0.0, 0.0, 0.0, 1.0])
    by_row = np.abs(rows[:, 3, :] - bottom).max(axis=1) < _ZERO
    by_column = np.abs(rows[:, :, 3] - bottom).max(axis=1) < _ZERO
    if not (by_row.all() or by_column.all()):
        bad = int(np.argmin(by_row if by_row.sum() >= by_column.sum() else by_column))
        raise ValueError(f"step {bad} is no homogeneous matrix: {rows[bad].ravel().tolist()}")
    matrices = rows if by_row.all() else np.swapaxes(rows, 1, 2)
    return matrices[:, :3, 3], matrices[:, :3, :3]


def opening(values: Float[np.ndarray, " n"], closed: float, open: float) -> Float[np.ndarray, " n"]:
    """Gripper widths or positions → [0, 1]: `closed` goes to 0, `open` to 1, linear between and clipped outside.

    `opening(x, 1, 0)` inverts a closedness; `opening(x, 0, 0.08)` scales a width in metres.

    Raises:
        ValueError: if `closed` and `open` are the same.
    """
    if closed == open:
        raise ValueError(f"a gripper is {closed} both closed and open; expected two different values")
    return np.clip((np.asarray(values, np.float64) - closed) / (open - closed), 0.0, 1.0)


def binarise(openings: Float[np.ndarray, " n"], low: float = 0.25, high: float = 0.75) -> Float[np.ndarray, " n"]:
    """Openings → 0 or 1 with hysteresis: open from `high` on until `low` is reached; what lies between keeps the last state.

    Steps before the first that is decided take that first state; a whole episode between the thresholds is open.

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"gripper thresholds are low={low}, high={high}; expected 0 <= low < high <= 1")
    openings = np.asarray(openings)
    return _carry(np.where(openings >= high, 1, np.where(openings <= low, 0, -1)), before=lambda first: first)


def accumulate(commands: Float[np.ndarray, " n"], threshold: float = 0.1) -> Float[np.ndarray, " n"]:
    """Commands to open (< −threshold), to close (> threshold) or to leave the gripper, as the state they command: 0 or 1.

    A command holds until the opposite one. Before the first command the gripper is in the opposite state, since commands are
    given to change something; without any command it is open.
    """
    commands = np.asarray(commands)
    return _carry(np.where(commands < -threshold, 1, np.where(commands > threshold, 0, -1)), before=lambda first: 1 - first)


def _carry(states: np.ndarray, before: Callable[[int], int]) -> np.ndarray:
    """Each step's state (n,), where −1 repeats the last one; `before` gives what stands before the first from that first one."""
    decided = np.flatnonzero(states >= 0)
    if not len(decided):
        return np.ones(len(states))
    last = np.maximum.accumulate(np.where(states >= 0, np.arange(len(states)), -1))
    return np.where(last < 0, before(states[decided[0]]), states[last]).astype(np.float64)


def read(columns: Columns, reference: str) -> Float[np.ndarray, "n d"]:
    """The dimensions that a reference names, in float64.

    Raises:
        ValueError: naming the feature, if it is not there, has fewer dimensions, or is not finite in them, with the step.
    """
    path, first, last = parse(reference)
    if path not in columns:
        raise ValueError(f"feature '{path}' is missing; there are {', '.join(map(repr, sorted(columns))) or 'none'}")
    values = np.asarray(columns[path])
    values = values.reshape(len(values), -1)
    if values.shape[1] < last:
        raise ValueError(f"feature '{path}' has {values.shape[1]} dimensions; '{reference}' needs {last}")
    chosen = values[:, first:last].astype(np.float64)
    if not np.isfinite(chosen).all():
        step, dimension = np.argwhere(~np.isfinite(chosen))[0]
        value = chosen[step, dimension]
        raise ValueError(f"feature '{path}' is not finite at step {step}, dimension {first + dimension}: it is {value}")
    return chosen


def parse(reference: str) -> tuple[str, int, int]:
    """(path with `steps/`, first dimension, one after the last). Raises ValueError for another form."""
    match = _REFERENCE.fullmatch(reference)
    first, last = (int(match["first"]), int(match["last"])) if match and match["first"] else (0, 1)
    if not match or first >= last:
        raise ValueError(f"reference is {reference!r}; expected 'path' or 'path[first:last]' with first < last")
    return f"steps/{match['path']}", first, last


# Parts of layouts.


class LayoutPart(Protocol):
    """Some dimensions of a layout: a name and a unit for people, a width, what it reads, and its values."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def references(self) -> tuple[str, ...]: ...
    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]: ...


@dataclasses.dataclass(frozen=True)
class Values:
    """Dimensions as they are, times `scale`; with `plus`, the sum with other dimensions: a residual on a state.

    Without a name and a unit they are the position of a pose or of a step, in metres; of a `vector`, values in dataset units.
    """

    column: str
    name: str = ""
    unit: str = ""
    scale: float = 1.0
    plus: str | None = None

    @property
    def width(self) -> int:
        return _width(self.column)

    @property
    def references(self) -> tuple[str, ...]:
        return (self.column,) if self.plus is None else (self.column, self.plus)

    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]:
        values = self.scale * read(columns, self.column)
        return values if self.plus is None else values + read(columns, self.plus)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A rotation as rot6d rows: `scale` times the angles, plus those of `plus`; turned on the right by the matrix `tool`."""

    column: str
    encoding: Encoding
    scale: float = 1.0
    plus: str | None = None
    tool: tuple[tuple[float, float, float], ...] | None = None
    name: str = "rotation"
    unit: str = "rot6d rows"
    width: int = 6

    @property
    def references(self) -> tuple[str, ...]:
        return (self.column,) if self.plus is None else (self.column, self.plus)

    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]:
        angles = self.scale * read(columns, self.column)
        if self.plus is not None:
            angles = angles + read(columns, self.plus)
        if self.tool is None:
            return rot6d(angles, self.encoding)
        return rot6d_from_matrix(_rotation(angles, self.encoding).as_matrix() @ np.asarray(self.tool)).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Transform:
    """Position and rotation of a flattened homogeneous matrix: [position 3 | rot6d 6]."""

    column: str
    name: str = "pose"
    unit: str = "m, rot6d rows"
    width: int = 9

    @property
    def references(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]:
        position, rotation = split_transforms(read(columns, self.column))
        return np.concatenate([position, rot6d_from_matrix(rotation)], axis=1)


@dataclasses.dataclass(frozen=True)
class Gripper:
    """The opening of a gripper whose raw values are `closed` and `open` at its ends.

    Attributes:
        relative: if positive, raw values are commands to change: beyond this threshold on the side of `closed` they close, on
            the side of `open` they open, and between they leave the gripper as it is.
        binary: whether openings are rounded to 0 or 1 with hysteresis.
    """

    column: str
    closed: float = 0.0
    open: float = 1.0
    relative: float = 0.0
    binary: bool = False
    name: str = "gripper"
    unit: str = "1 = open"
    width: int = 1

    @property
    def references(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]:
        raw = read(columns, self.column)[:, 0]
        if self.relative:
            return accumulate(raw if self.closed > self.open else -raw, self.relative)[:, None]
        openings = opening(raw, self.closed, self.open)
        return (binarise(openings) if self.binary else openings)[:, None]


@dataclasses.dataclass(frozen=True)
class LastCommand:
    """The gripper command that led to each step: the one before it, which is what an achieved pose was commanded with.

    The first step has its own command. An episode's first action is a placeholder if all of `action` is zero there; the second
    command stands for it.
    """

    gripper: Gripper
    action: tuple[str, ...]
    name: str = "gripper"
    unit: str = "1 = open"
    width: int = 1

    @property
    def references(self) -> tuple[str, ...]:
        return (*self.gripper.references, *self.action)

    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]:
        commands = self.gripper(columns)
        placeholder = not any(read(columns, reference)[0].any() for reference in self.action)
        if placeholder and len(commands) > 1:
            commands = np.concatenate([commands[1:2], commands[1:]])
        return np.concatenate([commands[:1], commands[:-1]])


@dataclasses.dataclass(frozen=True)
class Constant:
    """What a dataset does not have, as fixed numbers."""

    values: tuple[float, ...]
    name: str
    unit: str = "constant"
    references: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return len(self.values)

    def __call__(self, columns: Columns) -> Float[np.ndarray, "n {self.width}"]:
        return np.tile(np.asarray(self.values, np.float64), (len(next(iter(columns.values()))), 1))


NO_TURN = Constant((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "rotation", "none")
NO_GRIPPER = Constant((1.0,), "gripper", "not recorded: 1")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the dimensions of proprio or actions are, and how to compute them.

    Attributes:
        kind: "pose", absolute poses, or "delta", commanded steps, both [position 3 | rot6d 6 | gripper 1]; "vector" for any
            other declared dimensions, such as joints.
        parts: their dimensions, one after the other.
    """

    kind: ActionLayout
    parts: tuple[LayoutPart, ...]

    def __post_init__(self):
        if self.kind not in ("pose", "delta", "vector"):
            raise ValueError(f"layout kind is {self.kind!r}; expected pose, delta or vector")
        if self.kind != "vector" and (self.width != POSE_DIM or self._bounds().isdisjoint({(3, 9), (0, 9)})):
            widths = [part.width for part in self.parts]
            raise ValueError(
                f"a layout of kind {self.kind!r} has parts of widths {widths}; expected position 3, rotation 6, gripper 1"
            )
        name, unit = ("value", RAW) if self.kind == "vector" else ("position", METRES)
        labelled = (
            dataclasses.replace(part, name=part.name or name, unit=part.unit or unit) if isinstance(part, Values) else part
            for part in self.parts
        )
        object.__setattr__(self, "parts", tuple(labelled))

    @property
    def width(self) -> int:
        return sum(part.width for part in self.parts)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(reference for part in self.parts for reference in part.references)

    @property
    def rotation_dims(self) -> tuple[int, ...]:
        """Dimensions that are rot6d rows, which a normaliser leaves as they are."""
        return () if self.kind == "vector" else tuple(range(3, 9))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """A label per dimension: "position 0 [m]", …"""
        return tuple(
            f"{part.name} {i} [{part.unit}]" if part.width > 1 else f"{part.name} [{part.unit}]"
            for part in self.parts
            for i in range(part.width)
        )

    def __call__(self, columns: Columns) -> Float32[np.ndarray, "n {self.width}"]:
        """Raises ValueError naming the feature and the step, as `read` and the parts do."""
        return np.concatenate([part(columns) for part in self.parts], axis=1).astype(np.float32)

    def __str__(self) -> str:
        return f"{self.kind} ({self.width}): " + " | ".join(f"{part.name} {part.width} [{part.unit}]" for part in self.parts)

    def _bounds(self) -> set[tuple[int, int]]:
        ends = np.cumsum([part.width for part in self.parts]).tolist()
        return set(zip([0, *ends], ends, strict=False))


def pose(*parts: LayoutPart) -> Layout:
    """Absolute poses in the base frame."""
    return Layout("pose", parts)


def delta(*parts: LayoutPart) -> Layout:
    """Commanded steps."""
    return Layout("delta", parts)


def vector(*parts: LayoutPart) -> Layout:
    """Declared dimensions of any other meaning."""
    return Layout("vector", parts)


def joints(column: str, name: str = "joints", unit: str = RADIANS) -> Values:
    """Joint angles."""
    return Values(column, name, unit)


def _width(reference: str) -> int:
    _, first, last = parse(reference)
    return last - first
