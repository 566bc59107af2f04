"""The one in-memory form of a trajectory, whatever it was read from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

CAMERAS = ("primary", "secondary", "wrist")
_BLOCK = 128  # frames; those of a long episode do not fit memory
POSE_DIM = 10  # [position 3 | rot6d 6 | gripper 1]


class Frames(Protocol):
    """Camera frames of one episode; decoded only when asked for."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3)."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayFrames:
    """Frames that are already decoded: uint8 (n, H, W, 3)."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        return self.array[np.asarray(indices, int)]


def blocks(frames: Frames) -> Iterator[np.ndarray]:
    """All frames in order, few in memory at a time: uint8 RGB (k, height, width, 3)."""
    for start in range(0, len(frames), _BLOCK):
        yield frames.take(range(start, min(start + _BLOCK, len(frames))))


ActionLayout = Literal["vector", "delta", "pose"]


@dataclasses.dataclass(frozen=True)
class Episode:
    """One trajectory of n time-aligned steps.

    Attributes:
        name: where it came from, for error messages: dataset, split and index.
        timestamps: float64 (n,), seconds, strictly increasing.
        frames: n RGB frames of the primary camera.
        action_layout: what actions are. "pose": absolute target poses [position | rot6d | gripper] as transforms.py has them,
            with proprioception of the same form; windows interpolate them and make them relative to the current pose. "delta":
            commanded steps of that form; "vector": anything else, joints for example. Those are taken as they are.
        further_cameras: the same of other cameras, by the names "secondary" and "wrist".
        instruction: the task in natural language: of the whole episode or, where it changes, of each step.
        proprio: float32 (n, p) proprioception in raw units, or None when it was not recorded.
        actions: float32 (n, m), the action commanded at each step in raw units, or None for action-free video.
    """

    name: str
    timestamps: np.ndarray
    frames: Frames
    instruction: str | tuple[str, ...]
    proprio: np.ndarray | None = None
    actions: np.ndarray | None = None
    action_layout: ActionLayout = "vector"
    further_cameras: Mapping[str, Frames] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        n = len(self.timestamps)
        if n == 0 or np.any(np.diff(self.timestamps) <= 0):
            raise ValueError(f"{self.name}: timestamps must be non-empty and strictly increasing")
        fields = {"frames": self.frames, "proprio": self.proprio, "actions": self.actions, **self.further_cameras}
        texts = None if isinstance(self.instruction, str) else self.instruction
        for field, values in (*fields.items(), ("instruction", texts)):
            if values is not None and len(values) != n:
                raise ValueError(f"{self.name}: {field} has {len(values)} steps, timestamps have {n}")
        if len(self.instructions) == 1:  # one form only, so that the same data has the same hash
            object.__setattr__(self, "instruction", self.instructions[0])
        if self.action_layout == "pose" and self.actions is not None:
            for field, values in (("actions", self.actions), ("proprio", self.proprio)):
                if values is None or values.shape[1:] != (POSE_DIM,):
                    found = "missing" if values is None else f"of width {values.shape[1]}"
                    raise ValueError(f"{self.name}: {field} of a pose layout are {found}; expected width {POSE_DIM}")

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def instructions(self) -> tuple[str, ...]:
        """Every instruction once, in the order of the steps."""
        return (self.instruction,) if isinstance(self.instruction, str) else tuple(dict.fromkeys(self.instruction))

    def instruction_at(self, step: int) -> str:
        return self.instruction if isinstance(self.instruction, str) else self.instruction[step]

    @property
    def cameras(self) -> dict[str, Frames]:
        """All cameras by name, "primary" first."""
        return {"primary": self.frames, **self.further_cameras}


class EpisodeSource(Protocol):
    """One split of a dataset, or slices of one, as the loader reads it, whatever its format. Thread-safe; may be pickled.

    Attributes:
        name: the directory and the split, for error messages.
        numbers: of the episodes in the whole split, in stored order.
        camera_sizes: (height, width) in pixels of the frames of every camera, by its name.
        action_dim, proprio_dim: widths, or None where the dataset has none.
        control_hz, action_layout: steps per second and `Episode.action_layout`.
        robot: whose the episodes are; empty where the dataset does not say.
        identity: hex digits that tell the dataset's frames from those of others, wherever it lies; that of the whole split.
    """

    @property
    def name(self) -> str: ...
    @property
    def numbers(self) -> Sequence[int]: ...
    @property
    def camera_sizes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def action_dim(self) -> int | None: ...
    @property
    def proprio_dim(self) -> int | None: ...
    @property
    def control_hz(self) -> float: ...
    @property
    def action_layout(self) -> ActionLayout: ...
    @property
    def robot(self) -> str: ...
    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Episode:
        """The episode, its frames not read. Raises DatasetError if it cannot be read."""
        ...


def require_index(name: str, episodes: int, index: int) -> None:
    """Raises IndexError for an index that a source of so many episodes does not have; negative ones count from its end."""
    if not -episodes <= index < episodes:
        raise IndexError(f"{name} has {episodes} episodes; index {index} is out of range")


class ContentHash:
    """32 hexadecimal digits that tell episodes apart by their order and all that they hold, but not by their images or names.

    The same data has the same hash under another path and in another file format. Checkpoints have it.
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(self, episode: Episode) -> None:
        arrays = [values for values in (episode.timestamps, episode.proprio, episode.actions) if values is not None]
        header = [episode.instruction, episode.action_layout, episode.proprio is None, [(a.dtype.str, a.shape) for a in arrays]]
        self._digest.update(json.dumps(header).encode())
        for values in arrays:
            self._digest.update(values.tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def content_hash(episodes: Iterable[Episode]) -> str:
    """The `ContentHash` of all of them."""
    digest = ContentHash()
    for episode in episodes:
        digest.update(episode)
    return digest.hexdigest()
