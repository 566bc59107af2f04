"""Episodes of LIBERO's HDF5 demonstrations (SPEC 8.2, 8.5, 8.6).

A file `TASK_demo.hdf5` holds `data/demo_K` with `actions`, `dones` and `obs/{agentview_rgb, eye_in_hand_rgb, ee_pos, ee_ori,
gripper_states}`. Three programs wrote the files in use, and they differ:

    written by                      images       ee_ori            the observation of row k is from
    LIBERO (attribute               upside down  rotation vector   after action k
      macros_image_convention)
    OpenVLA's regeneration          upside down  rotation vector   before action k
    the published system's          upright      quaternion xyzw   before action k

The orientation is told from the width of `ee_ori` and so is, unless the caller knows better, whether the images are upside down.
Rows of LIBERO's own files are shifted by one, so that an action always follows its observation.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from data_pipelines.episode import Episode, require_index
from data_pipelines.sources.frames import camera_frames, frame_steps
from data_pipelines.sources.rlds import DatasetError
from mimic_video.transforms import rot6d_from_matrix

CONTROL_HZ = 20.0
NO_OP = 1e-4  # norm of the commanded motion, in the controller's units, below which an action does not move the arm

_CAMERAS = {"primary": "agentview_rgb", "wrist": "eye_in_hand_rgb"}


@dataclasses.dataclass(frozen=True)
class _Demonstration:
    path: str
    demo: str
    instruction: str
    rows: np.ndarray  # of the images that are kept
    upside_down: bool
    cameras: Mapping[str, tuple[int, int]]  # role → (height, width)
    proprio: np.ndarray
    actions: np.ndarray


class LiberoSource(Sequence[Episode]):
    """LIBERO's demonstrations as a sequence of episodes, in the order of file names and demonstration numbers; thread-safe.

    Steps that command nothing are left out (see `moving_steps`) and the remaining ones are 1/20 s apart, so time is compressed
    where there were such steps. Proprioception is [ee_pos 3 (m) | rot6d 6 | gripper_states[0] (m, larger is wider)]; actions are
    the controller's commands, layout "delta": [Δposition 3 | rot6d 6 of the rotation vector | gripper 1 (−1 open, +1 closed)],
    the motion in its units of −1 to 1. The wrist camera is there where the file has one of RGB images. Low-dimensional values are
    read at opening; no image is read before `take`.

    Attributes:
        name: the directory or file, for error messages.
        image_size: (height, width) of the primary camera's frames in pixels.
        action_dim, proprio_dim: 10.
        control_hz: 20.
        skipped: reason → names of demonstrations, and of wrist cameras, that were left out.

    Args:
        path: a folder, whose `**/*.hdf5` and `**/*.h5` are read, or one such file.
        upside_down: whether the stored images are to be rotated by 180°; None tells it from `ee_ori`, as the table above says.
        instructions: "published" makes them from file names, see `published_prompt`; "recorded" takes those in the files'
            `problem_info`, which only LIBERO's own files have.
        image_size: (height, width) that the frames of every camera are resized to as by `resize_images`; None keeps them.
        skip_damaged: leaves out, and notes in `skipped`, demonstrations and files that cannot be read or are wrong.

    Raises:
        DatasetError: naming the file and demonstration, if there is no such file, it is not HDF5 or cut off, something is
            missing, not finite or of another shape, or images have another size than those of the first demonstration.
    """

    action_dim = proprio_dim = 10
    control_hz = CONTROL_HZ

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        upside_down: bool | None = None,
        instructions: Literal["published", "recorded"] = "published",
        image_size: tuple[int, int] | None = None,
        skip_damaged: bool = False,
    ):
        path = Path(path)
        self.name = os.fspath(path)
        if instructions not in ("published", "recorded"):
            raise ValueError(f"instructions is {instructions!r}; expected 'published' or 'recorded'")
        files = [path] if path.is_file() else sorted([*path.glob("**/*.hdf5"), *path.glob("**/*.h5")])
        if not files:
            raise DatasetError(f"{path} is not an HDF5 file nor a folder with any")
        self.skipped: dict[str, list[str]] = {}
        self._demonstrations: list[_Demonstration] = []
        for file in files:
            with self._noting(skip_damaged), _opened(file) as data:
                instruction = published_prompt(file.stem) if instructions == "published" else _recorded_prompt(file, data)
                shifted = "macros_image_convention" in data.attrs
                for demo in sorted(data, key=_number):
                    with self._noting(skip_damaged):
                        self._read_demo(file, demo, data[demo], instruction, shifted, upside_down)
        if not self._demonstrations:
            raise DatasetError(f"{path} has no usable demonstration; left out: {self.skipped}")
        stored = self._demonstrations[0].cameras["primary"]
        for demonstration in self._demonstrations:
            if image_size is None and (size := demonstration.cameras["primary"]) != stored:
                raise DatasetError(
                    f"{demonstration.path}, {demonstration.demo}: images are {size}; those of the first one are "
                    f"{stored}; pass image_size to resize them"
                )
        self._resize = image_size
        self.image_size = image_size or stored

    def __len__(self) -> int:
        return len(self._demonstrations)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]  # no slices
        """The episode, its images not read. Raises IndexError."""
        require_index(self.name, len(self), index)
        demo = self._demonstrations[index]
        cameras = {
            role: _StoredFrames(demo.path, f"{demo.demo}/obs/{_CAMERAS[role]}", demo.rows, size, demo.upside_down)
            for role, size in demo.cameras.items()
        }
        primary, further = camera_frames(cameras, self._resize)
        return Episode(
            name=f"{demo.path}, {demo.demo}",
            timestamps=np.arange(len(demo.rows)) / CONTROL_HZ,
            frames=primary,
            instruction=demo.instruction,
            proprio=demo.proprio,
            actions=demo.actions,
            action_layout="delta",
            further_cameras=further,
        )

    @contextlib.contextmanager
    def _noting(self, skip_damaged: bool, reason: str = "it is damaged") -> Iterator[None]:
        """Notes what is damaged instead of raising it, if asked to."""
        try:
            yield
        except DatasetError as error:
            if not skip_damaged:
                raise
            self.skipped.setdefault(reason, []).append(str(error))

    def _read_demo(
        self, path: Path, demo: str, group: h5py.Group, instruction: str, shifted: bool, upside_down: bool | None
    ) -> None:
        name = f"{path}, {demo}"
        actions = _values(name, group, "actions", (7,))
        position = _values(name, group, "obs/ee_pos", (3,))
        orientation = _values(name, group, "obs/ee_ori", (None,))
        gripper = _values(name, group, "obs/gripper_states", (None,))
        if orientation.shape[1] not in (3, 4):
            raise DatasetError(
                f"{name}: obs/ee_ori has width {orientation.shape[1]}; expected 3, a rotation vector, or 4, a quaternion"
            )
        cameras = {"primary": _image_size(name, group, f"obs/{_CAMERAS['primary']}")}
        if (wrist := f"obs/{_CAMERAS['wrist']}") in group:
            with self._noting(True, "it is no camera of RGB images"):  # nobody chose it
                cameras["wrist"] = _image_size(name, group, wrist)
        for key in ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states", *(f"obs/{_CAMERAS[role]}" for role in cameras)):
            if len(group[key]) != len(actions):
                raise DatasetError(f"{name}: {key} has {len(group[key])} steps, actions have {len(actions)}")
        if "dones" in group and not (len(group["dones"]) and group["dones"][-1]):
            self.skipped.setdefault("its last step does not report success", []).append(name)
            return
        rows = np.arange(len(actions))
        if shifted:
            actions, rows = actions[1:], rows[:-1]
        kept = moving_steps(actions)
        if len(kept) == 0:
            self.skipped.setdefault("it has no action that moves the robot", []).append(name)
            return
        actions, rows = actions[kept], rows[kept]
        quaternions = orientation.shape[1] == 4
        try:
            turned = (Rotation.from_quat if quaternions else Rotation.from_rotvec)(orientation[rows].astype(np.float64))
        except ValueError as error:
            raise DatasetError(f"{name}: obs/ee_ori is not an orientation: {error}") from error
        commanded = Rotation.from_rotvec(actions[:, 3:6].astype(np.float64))
        self._demonstrations.append(
            _Demonstration(
                path=os.fspath(path),
                demo=demo,
                instruction=instruction,
                rows=rows,
                upside_down=not quaternions if upside_down is None else upside_down,
                cameras=cameras,
                proprio=_poses(position[rows], turned, gripper[rows, :1]),
                actions=_poses(actions[:, :3], commanded, actions[:, 6:]),
            )
        )


def moving_steps(actions: np.ndarray) -> np.ndarray:
    """int64 steps of actions (n, 7) that are not no-ops (SPEC 8.6).

    A no-op commands a motion shorter than `NO_OP` and leaves the gripper's command as it is at the last step that was kept;
    before the first one, the gripper does not matter. Filtering twice is filtering once.
    """
    kept: list[int] = []
    for step, action in enumerate(actions):
        still = np.linalg.norm(action[:6]) < NO_OP
        if not (still and (not kept or action[6] == actions[kept[-1]][6])):
            kept.append(step)
    return np.array(kept, np.int64)


def published_prompt(stem: str) -> str:
    """The training prompt that belongs to a file name without its suffix (SPEC 2), full stop included.

    `KITCHEN_SCENE3_` and the like, which name the scene of LIBERO-90 and LIBERO-10, are not part of it.
    """
    task = re.sub(r"^[A-Z0-9_]+(?=[a-z])", "", stem.removesuffix("_demo"))
    return task.replace("_", " ").replace("black bowl", "bowl") + "."


@dataclasses.dataclass(frozen=True)
class _StoredFrames:
    """Rows of a uint8 data set of images, (rows, H, W, 3), in an HDF5 file."""

    path: str
    key: str
    rows: np.ndarray
    size: tuple[int, int]
    upside_down: bool

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3). Raises DatasetError if the file cannot be read."""
        wanted, inverse = np.unique(self.rows[frame_steps(indices, len(self))], return_inverse=True)
        with _opened(self.path) as data:
            frames = data[self.key][wanted] if len(wanted) else np.empty((0, *self.size, 3), np.uint8)
        if self.upside_down:
            frames = frames[:, ::-1, ::-1]
        return frames[inverse]


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[h5py.Group]:
    """The group `data` of a file. What h5py raises inside becomes a DatasetError that names the file."""
    try:
        with h5py.File(path, "r") as file:
            if "data" not in file:
                raise DatasetError(f"{path} has no group 'data'")
            yield file["data"]
    except (OSError, RuntimeError, KeyError) as error:  # h5py's own of files that are no HDF5, cut off or inconsistent
        raise DatasetError(f"{path} cannot be read as HDF5: {error}") from error


def _number(demo: str) -> tuple[int, str]:
    """Sorts demo_2 before demo_10."""
    return int(re.sub(r"\D", "", demo) or 0), demo


def _values(name: str, group: h5py.Group, key: str, widths: tuple[int | None, ...]) -> np.ndarray:
    """A numeric data set (n, *widths) in float32."""
    if key not in group:
        raise _missing(name, group, key)
    stored = group[key]
    shape = stored.shape[1:]
    if len(shape) != len(widths) or any(wide is not None and wide != found for wide, found in zip(widths, shape, strict=True)):
        raise DatasetError(f"{name}: {key} has shape {stored.shape}; expected (n, {', '.join(str(w or 'd') for w in widths)})")
    values = stored[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise DatasetError(f"{name}: {key} is not finite at step {int(np.argwhere(~np.isfinite(values))[0, 0])}")
    return values


def _missing(name: str, group: h5py.Group, key: str) -> DatasetError:
    found = sorted([*group, *(f"obs/{other}" for other in group.get("obs", ()))])
    return DatasetError(f"{name} has no '{key}'; it has {', '.join(found) or 'nothing'}")


def _image_size(name: str, group: h5py.Group, key: str) -> tuple[int, int]:
    if key not in group:
        raise _missing(name, group, key)
    images = group[key]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise DatasetError(f"{name}: {key} is {images.dtype} {images.shape}; expected uint8 (n, H, W, 3)")
    return images.shape[1:3]


def _poses(position: np.ndarray, rotation: Rotation, gripper: np.ndarray) -> np.ndarray:
    return np.concatenate([position, rot6d_from_matrix(rotation.as_matrix()), gripper], axis=-1).astype(np.float32)


def _recorded_prompt(path: Path, data: h5py.Group) -> str:
    try:
        prompt = "".join(json.loads(data.attrs["problem_info"])["language_instruction"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path}: attribute 'problem_info' of 'data' records no language_instruction: {error}; "
            "pass instructions='published' to go by file names"
        ) from error
    return prompt.strip('"')  # some files have a list of characters, some quote it
