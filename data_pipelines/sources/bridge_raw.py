"""Episodes of Bridge v2 as it was recorded: folders of JPEG files and pickles (SPEC 8.2, 8.5, 8.6)."""

import concurrent.futures
import dataclasses
import functools
import io
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.episode import Episode, require_index
from data_pipelines.sources.frames import camera_frames, check_roles, frame_steps
from data_pipelines.sources.rlds import DatasetError
from mimic_video.media import MediaError, read_picture
from mimic_video.transforms import rot6d_from_matrix

CONTROL_HZ = 5.0  # nominal; the recorded time stamps jitter

_READERS = 8  # threads that read pickles at opening: waiting for a disk, mostly
_ARRAYS = {"eef_transform": (4, 4), "full_state": (7,), "desired_state": (7,), "time_stamp": ()}  # of obs_dict.pkl, per step


class _Trajectory(NamedTuple):
    """One folder `traj*`, its first step dropped. `cameras`: role → folder of images."""

    folder: Path
    cameras: Mapping[str, Path]
    timestamps: np.ndarray
    instruction: str
    proprio: np.ndarray
    actions: np.ndarray


class BridgeSource(Sequence[Episode]):
    """Raw Bridge v2 as a sequence of episodes, in the order of their paths; thread-safe.

    Reads `**/raw/traj_group*/traj*`. The first step, at which the robot idles, is dropped. Proprioception is the end effector's
    pose `eef_transform` in the robot's base frame and the measured gripper; actions, of the layout "pose", are the same poses
    with the commanded gripper: [position 3 (m) | rot6d 6 | gripper 1 (0 closed to 1 open)]. Time stamps are those recorded,
    from 0. Pickles are read without running code of theirs. Low-dimensional values are read at opening; no image is read before
    `take` or `image_size`.

    Attributes:
        name: the directory, for error messages.
        action_dim, proprio_dim: 10.
        control_hz: 5, nominally.
        skipped: reason → folders that were left out, as the published system leaves them out: in an LMDB copy, without
            `obs_dict.pkl`, `policy_out.pkl` or images of the primary camera, or with fewer images than states or more.

    Args:
        directory: any folder above `raw/`.
        cameras: "primary" and maybe "secondary" and "wrist" → a folder of a trajectory. Trajectories without a folder of a
            further camera lack that camera.
        default_instruction: where no line of `lang.txt` is usable (13 % of the dataset).
        image_size: (height, width) that the frames of every camera are resized to as by `resize_images`; None keeps them.
        skip_damaged: leaves out, and notes in `skipped`, trajectories with a file that cannot be read or is wrong.

    Raises:
        DatasetError: naming the file, if there is no trajectory, or a pickle is damaged, refers to anything but NumPy arrays and
            built-in values, or lacks something.
    """

    action_dim = proprio_dim = 10
    control_hz = CONTROL_HZ

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        cameras: Mapping[str, str] | None = None,
        default_instruction: str = "",
        image_size: tuple[int, int] | None = None,
        skip_damaged: bool = False,
    ):
        directory = Path(directory)
        self.name = os.fspath(directory)
        cameras = dict(cameras) if cameras is not None else {"primary": "images0"}
        check_roles(self.name, cameras)
        self._resize = image_size
        folders = list(_trajectory_folders(directory))
        read = functools.partial(_read_or_reason, directory=directory, cameras=cameras, default_instruction=default_instruction)
        self.skipped: dict[str, list[str]] = {}
        self._trajectories: list[_Trajectory] = []
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            for folder, found in zip(folders, pool.map(read, folders), strict=True):
                if isinstance(found, _Trajectory):
                    self._trajectories.append(found)
                elif isinstance(found, str):
                    self.skipped.setdefault(found, []).append(os.fspath(folder))
                elif skip_damaged:
                    self.skipped.setdefault("it is damaged", []).append(str(found))
                else:
                    raise found
        if not self._trajectories:
            raise DatasetError(f"{directory} has no usable **/raw/traj_group*/traj*; left out: {self.skipped}")

    @functools.cached_property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the primary camera's frames in pixels: those of its first image where they are not resized."""
        if self._resize is not None:
            return self._resize
        height, width, _ = _read_image(self._trajectories[0].cameras["primary"] / _image_name(1)).shape
        return height, width

    def __len__(self) -> int:
        return len(self._trajectories)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]  # no slices
        """The episode, its images not read. Raises IndexError."""
        require_index(self.name, len(self), index)
        trajectory = self._trajectories[index]
        cameras = {role: _ImageFolder(folder, len(trajectory.timestamps)) for role, folder in trajectory.cameras.items()}
        primary, further = camera_frames(cameras, self._resize)
        return Episode(
            name=os.fspath(trajectory.folder),
            timestamps=trajectory.timestamps,
            frames=primary,
            instruction=trajectory.instruction,
            proprio=trajectory.proprio,
            actions=trajectory.actions,
            action_layout="pose",
            further_cameras=further,
        )


@dataclasses.dataclass(frozen=True)
class _ImageFolder:
    """Files im_1.jpg to im_n.jpg: the frames of steps 0 to n − 1."""

    folder: Path
    length: int

    def __len__(self) -> int:
        return self.length

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 RGB (len(indices), height, width, 3). Raises DatasetError for a broken image or one of another size."""
        paths = [self.folder / _image_name(1 + step) for step in frame_steps(indices, self.length).tolist()]
        frames: list[np.ndarray] = []
        for path in paths:
            frames.append(_read_image(path))
            if frames[-1].shape != frames[0].shape:
                raise DatasetError(f"{path} is {frames[-1].shape[:2]}; {paths[0]} is {frames[0].shape[:2]}")
        return np.stack(frames)


def _read_image(path: Path) -> np.ndarray:
    try:
        return read_picture(path)
    except MediaError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _image_name(number: int) -> str:
    return f"im_{number}.jpg"


def _trajectory_folders(directory: Path) -> Iterator[Path]:
    """In the order of their paths, without looking into folders of images. Other folders may be called `raw` as well."""
    for folder, subfolders, _ in os.walk(directory):
        if os.path.basename(folder) == "raw":
            yield from sorted(path for path in Path(folder).glob("traj_group*/traj*") if path.is_dir())
            subfolders[:] = [name for name in subfolders if not name.startswith("traj_group")]
        subfolders.sort()


def _read_or_reason(
    folder: Path, *, directory: Path, cameras: Mapping[str, str], default_instruction: str
) -> _Trajectory | str | DatasetError:
    """The trajectory, why it is left out, or what is wrong with it."""
    if "lmdb" in os.fspath(folder.relative_to(directory)):
        return "it is part of an LMDB copy"
    for file in ("obs_dict.pkl", "policy_out.pkl"):
        if not (folder / file).is_file():
            return f"it has no {file}"
    if not (folder / cameras["primary"]).is_dir():
        return f"it has no {cameras['primary']}"
    try:
        return _read_trajectory(folder, cameras, default_instruction)
    except DatasetError as error:
        return error


def _read_trajectory(folder: Path, cameras: Mapping[str, str], default_instruction: str) -> _Trajectory | str:
    arrays = _read_arrays(folder / "obs_dict.pkl")
    states = len(arrays["eef_transform"])
    found = {}
    for role, name in cameras.items():
        if (folder / name).is_dir():
            files = {entry.name for entry in os.scandir(folder / name)}
            images = sum(file.startswith("im_") and file.endswith(".jpg") for file in files)
            if {len(values) for values in arrays.values()} != {images} or images < 2:
                return f"it has not as many images in {name} as states, or fewer than two"
            if not {_image_name(number) for number in range(1, states)} <= files:
                return f"images in {name} are not numbered im_0.jpg to im_{{n−1}}.jpg"
            found[role] = folder / name
    timestamps = arrays["time_stamp"][1:] - arrays["time_stamp"][1]
    if (np.diff(timestamps) <= 0).any():
        raise DatasetError(f"{folder / 'obs_dict.pkl'}: time_stamp does not increase from step to step")
    poses = arrays["eef_transform"][1:]
    try:
        rotation = rot6d_from_matrix(poses[:, :3, :3])
    except ValueError as error:
        raise DatasetError(f"{folder / 'obs_dict.pkl'}: eef_transform: {error}") from error
    measured, commanded = (np.clip(arrays[key][1:, 6:], 0, 1) for key in ("full_state", "desired_state"))
    language = folder / "lang.txt"
    # Bytes that are not UTF-8 become a sign that `clean_label` refuses.
    text = language.read_text("utf-8-sig", errors="replace") if language.is_file() else ""
    return _Trajectory(
        folder=folder,
        cameras=found,
        timestamps=timestamps,
        instruction=clean_label(text) or default_instruction,
        proprio=np.concatenate([poses[:, :3, 3], rotation, measured], axis=-1).astype(np.float32),
        actions=np.concatenate([poses[:, :3, 3], rotation, commanded], axis=-1).astype(np.float32),
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of `_ARRAYS`, float64 with a leading axis of steps."""
    record = read_pickle(path)
    if not isinstance(record, dict):
        raise DatasetError(f"{path} holds a {type(record).__name__}; expected a dict")
    arrays = {}
    for key, shape in _ARRAYS.items():
        if key not in record:
            raise DatasetError(f"{path} has no '{key}'; it has {', '.join(map(str, record)) or 'nothing'}")
        try:
            values = np.asarray(record[key], np.float64)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{path}: {key} is not an array of numbers: {error}") from error
        if values.ndim == 0 or values.shape[1:] != shape:
            raise DatasetError(f"{path}: {key} has shape {values.shape}; expected {('n', *shape)}")
        if not np.isfinite(values).all():
            raise DatasetError(f"{path}: {key} is not finite at step {int(np.argwhere(~np.isfinite(values))[0, 0])}")
        arrays[key] = values
    return arrays


def read_pickle(path: str | os.PathLike) -> Any:
    """A pickle of NumPy arrays and built-in values, read without running code of its choice.

    Raises:
        DatasetError: naming the file, if it cannot be read, is cut off, or refers to any other class or function.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(io.BytesIO(file.read())).load()
    except Exception as error:  # a pickle that is damaged can make its reader raise anything
        raise DatasetError(f"{path} cannot be read as a pickle of arrays: {type(error).__name__}: {error}") from error


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What pickles of protocol 2 keep bytes as."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _plain_globals() -> dict[tuple[str, str], Any]:
    """What a pickle of arrays refers to: (module, name) → the object, under the module names of NumPy 1 and 2."""
    plain: dict[tuple[str, str], Any] = {("_codecs", "encode"): _latin1}
    for package in ("numpy.core", "numpy._core"):
        plain[f"{package}.multiarray", "_reconstruct"] = np.empty(1).__reduce__()[0]
        plain[f"{package}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
        plain[f"{package}.numeric", "_frombuffer"] = np.empty(1).__reduce_ex__(5)[0]
    plain |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    plain |= {(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)}
    return plain


class _PlainUnpickler(pickle.Unpickler):
    _GLOBALS = _plain_globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of an array") from None


# Language labels (SPEC 8.6). Crowd workers wrote them; what cannot be mended is dropped.
_COMPLAINTS = (
    "no image",
    "did not load",
    "not loaded",
    "not downloading",
    "images loaded",
    "pictures aren't working",
    "not showing",
)
_MENDED = {
    "4fbox": " cardboard box",
    "1fbox": " cardboard box",
    "clockwise90": "clockwise 90 degrees",
    "bpttle": "bottle",
    "thng": "thing",
    "upawrds": "upwards",
}
_ODD_SIGNS = '"_^~@#$%*+=|?ëěẽēėęćčċ\N{REPLACEMENT CHARACTER}'
_PAIRS = ("gh", "ng", "th", "ch", "sh", "ph", "wh", "ck", "qu", *(2 * letter for letter in "bcdfglmnprstz"))  # of English words
_SHOUTED = re.compile(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])")
# Four letters in a row that are no vowels (dots and digits count as such) and of which none begins one of those pairs.
_GIBBERISH = re.compile(rf"(?:(?!{'|'.join(_PAIRS)})[bcdfghjklmnpqrstvwxz.0-9]){{4}}", re.IGNORECASE)
_REMARK = " (does not mention the locations of the objects)"


def clean_label(text: str) -> str:
    """The first usable line of a `lang.txt`, mended; "" if there is none (SPEC 8.6)."""
    return next((label for label in map(_clean_line, text.split("\n")) if label is not None), "")


def _clean_line(line: str) -> str | None:
    label = line.strip()
    if "confidence" in line or " " not in label or any(complaint in label for complaint in _COMPLAINTS):
        return None
    label = label.removesuffix(" cardboard fence").strip()
    label = re.sub(r"\s+", " ", label.replace(",", ", ").replace(" ,", ","))
    if _SHOUTED.search(label):
        label = label.lower()
    for wrong, right in _MENDED.items():
        label = label.replace(wrong, right)
    label = re.sub(r"stuffed([a-z]+)", r"stuffed \1", label)
    if _GIBBERISH.search(label):
        return None
    label = label.removesuffix(_REMARK).removeprefix('"').removesuffix('"')
    return None if any(sign in label for sign in _ODD_SIGNS) else label
