"""A recording → an experiment file that trains on it: what can be read off the recording, and what somebody should look at.

Proposals follow one rule each, and what a rule cannot tell becomes a `Doubt`, never a silent choice. The file that is written
stands alone: the dataset's entry of the registry, and both stages at the size of configs/quickstart.py.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import runpy
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.assembly import TrainingData
from data_pipelines.episode import CAMERAS, EpisodeSource
from data_pipelines.importing import dataset_name
from data_pipelines.oxe import registry
from data_pipelines.oxe.spec import DatasetSpec, DeclaredFeature, SchemaError, check_schema
from data_pipelines.oxe.standardise import Gripper, Layout, LayoutPart, Turn, Values
from data_pipelines.sources.folders import VERSION, find_format, format_of, versions
from data_pipelines.sources.records import DatasetError
from mimic_video.atomic import atomically
from mimic_video.config import expanded_path, experiment_from

_WRIST_WORDS = ("wrist", "hand", "gripper")
_GUESSED_HZ = 10.0
_VIDEO_HZ = 10.0  # about which videos are read
_WINDOWS = ((5, 12), (5, 8), (5, 4), (1, 4))  # past and future frames that are tried, the longest first
_LONGER_SIDE, _PIXELS = 128, 16  # of images at this size of the networks, and of a token
_HELD_OUT, _ENOUGH = 0.1, 10  # share of episodes for validation, of so many or more
_LOOKED_AT = 200  # episodes whose values are read
_UNITS = "as recorded"
_ROTATIONS = {
    ("roll", "pitch", "yaw"): "euler_xyz",
    ("rx", "ry", "rz"): "rotvec",
    ("wx", "wy", "wz"): "rotvec",
    ("qx", "qy", "qz", "qw"): "quat_xyzw",
    ("qw", "qx", "qy", "qz"): "quat_wxyz",
}


Parts = Mapping[str, tuple[str, tuple[LayoutPart, ...]]]  # of the layouts of "proprio" and "actions": kind and parts


class Doubt(NamedTuple):
    """What the recording does not tell for sure, and what to change in the file if it is otherwise."""

    what: str
    change: str


class Vector(NamedTuple):
    """A low-dimensional feature: its key as references have it, its width, and what its dimensions are called, if known."""

    key: str
    width: int
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recording:
    """What the metadata of a recording say; nothing else has been read.

    Attributes:
        directory: its folder; `format` of FORMATS.
        name: for the registry.
        robot: its kind, where the recording says; else the name.
        cameras: key → (height, width) in pixels, or None if it varies.
        state, action: vectors of proprioception and actions, whose dimensions come one after another; empty if there are none.
        language: path of the instruction.
        hz: steps per second; None if the recording does not say.
        splits: names of its splits.
        own: whether it has the layout that this project writes.
        entry: what the registry says of a dataset of that name and features; None for one that it does not have.
    """

    directory: Path
    format: str
    name: str
    robot: str
    cameras: Mapping[str, tuple[int, int] | None]
    state: tuple[Vector, ...]
    action: tuple[Vector, ...]
    language: str
    hz: float | None
    splits: tuple[str, ...]
    own: bool = False
    entry: DatasetSpec | None = None


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What is written, but for words; `remarks` are on the dimensions of proprioception and actions."""

    recording: Recording
    cameras: Mapping[str, str]
    image_size: tuple[int, int]
    hz: float
    video_hz: float
    past_frames: int
    future_frames: int
    action_horizon: int
    train_split: str
    validation_split: str
    validated: bool
    text_rows: int
    parts: Parts
    remarks: Mapping[str, Sequence[str]]
    doubts: tuple[Doubt, ...]


def locate(source: str) -> Path:
    """The folder of a dataset: the one that is named, its newest version, or a dataset of the Hugging Face Hub, downloaded.

    Raises:
        DatasetError: if it is neither, or the Hub cannot be asked or does not have it.
    """
    folder = Path(expanded_path(source, "--source"))
    if folder.is_dir():
        if find_format(folder) is None and (found := versions(folder)):
            folder = found[-1]
        format_of(folder)
        return folder.resolve()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        raise DatasetError(f"--source is {source!r}; expected a folder that is there, or OWNER/NAME of the Hugging Face Hub")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise DatasetError(
            f"there is no folder {source}, and to look for it on the Hugging Face Hub {error.name} is needed: "
            "pip install -e '.[hub]'"
        ) from error
    try:
        downloaded = Path(huggingface_hub.snapshot_download(source, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"there is no folder {source}, and the Hugging Face Hub does not give a dataset of that name: {reason}"
        ) from error
    format_of(downloaded)
    return downloaded


def read_recording(directory: Path, name: str | None = None) -> Recording:
    """The metadata of the dataset in a folder. `name` is made from the folder's unless given. Raises DatasetError."""
    base = directory.parent if VERSION.fullmatch(directory.name) else directory
    name = name or dataset_name(base)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        name = f"robot_{name}".rstrip("_")
    if find_format(directory) == "LeRobot":
        return _lerobot_recording(directory, name)
    features = format_of(directory).features(directory)
    assert features is not None  # of RLDS
    recording = _rlds_recording(directory, name, features)
    if name not in registry.names():
        return recording
    entry = registry.find(name)
    try:
        check_schema(features, dataclasses.replace(entry, secondary=None, wrist=None))
    except SchemaError:
        return recording  # another dataset of that name
    cameras = {key: recording.cameras.get(key) for key in entry.cameras.values() if key in recording.cameras}
    return dataclasses.replace(recording, cameras=cameras, hz=entry.control_hz, entry=entry)


def _lerobot_recording(directory: Path, name: str) -> Recording:
    from data_pipelines.sources.lerobot import camera_sizes, read_info

    info = read_info(directory)
    vectors = [
        Vector(key, int(feature["shape"][0]), _dimension_names(feature.get("names")))
        for key, feature in info["features"].items()
        if len(feature.get("shape") or []) == 1 and str(feature.get("dtype")).startswith("float") and key != "timestamp"
    ]
    state = _chosen(vectors, ("observation.state", "state"), ("state", "qpos", "proprio"))
    action = _chosen(vectors, ("action", "actions"), ("action",))
    robot = re.sub(r"[^\w-]+", "_", str(info.get("robot_type") or name))
    return Recording(directory, "LeRobot", name, robot, camera_sizes(info), state, action, "task", float(info["fps"]), ("train",))


def _rlds_recording(directory: Path, name: str, features: Mapping[str, DeclaredFeature]) -> Recording:
    ordered = sorted(features.items())  # tfds keeps no order
    steps = {path.removeprefix("steps/"): feature for path, feature in ordered if path.startswith("steps/")}
    cameras: dict[str, tuple[int, int] | None] = {}
    for path, feature in steps.items():
        if (
            feature.kind == "image"
            and path.startswith("observation/")
            and feature.shape[-1:] == (3,)
            and feature.dtype == "uint8"
        ):
            height, width = feature.shape[:2]
            cameras[path.removeprefix("observation/")] = None if height is None or width is None else (height, width)
    vectors = [
        Vector(path, int(np.prod([size or 1 for size in feature.shape])))
        for path, feature in steps.items()
        if feature.kind == "tensor"
        and feature.dtype.startswith("float")
        and len(feature.shape) <= 1
        and None not in feature.shape
    ]
    own = "image_primary" in cameras
    actions = [vector for vector in vectors if vector.key.startswith("action")]
    observed = [vector for vector in vectors if vector.key.startswith("observation/")]
    state = _chosen(observed, ("observation/proprio", "observation/state"), ("state", "proprio"))
    texts = [path for path, feature in features.items() if feature.kind == "text"]
    words = [path for path in texts if "instruction" in path or "language" in path] or [
        path for path in texts if path.startswith("steps/")
    ]
    language = words[0].removeprefix("steps/") if words else "language_instruction"
    rated = "episode_metadata/control_hz" in features
    source = format_of(directory)
    splits = tuple(source.splits(directory))
    hz = source.open(directory, splits[0], None, (), (0, 0)).control_hz if own and rated else None
    return Recording(
        directory,
        "RLDS",
        name,
        name,
        cameras,
        state or tuple(observed),
        tuple(vector for vector in actions if vector.key == "action") or tuple(actions),
        language,
        hz,
        splits,
        own,
    )


def _dimension_names(names: Any) -> tuple[str, ...]:
    """LeRobot's names of dimensions: a list, lists by what they are of, or places by name."""
    if isinstance(names, Mapping):
        if all(isinstance(value, int) for value in names.values()):
            return tuple(str(name) for name in sorted(names, key=lambda name: names[name]))
        return tuple(str(name) for each in names.values() if isinstance(each, list) for name in each)
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _chosen(vectors: Sequence[Vector], exact: Sequence[str], words: Sequence[str]) -> tuple[Vector, ...]:
    """The vector that has one of these keys, or one of these words in its key."""
    for key in exact:
        if found := [vector for vector in vectors if vector.key == key]:
            return tuple(found)
    return tuple(vector for vector in vectors if any(word in vector.key for word in words))[:1]


def propose(recording: Recording, control_hz: float | None = None) -> Proposal:
    """Looks at a recording's episodes and proposes an experiment.

    Args:
        control_hz: steps per second, for recordings that do not say.

    Raises:
        DatasetError: if there is no camera, no episode can be read, or all are too short for the shortest window.
    """
    doubts: list[Doubt] = []
    cameras = _camera_roles(recording, doubts)
    hz = recording.hz or control_hz
    if hz is None:
        hz = _GUESSED_HZ
        doubts.append(Doubt(f"the recording does not tell its rate; {hz:g} steps a second are a guess", "CONTROL_HZ"))
    parts: Parts = {key: ("vector", _vector_parts(vectors)) for key, vectors in _vectors(recording).items()}
    if recording.entry is not None:
        known = {"proprio": recording.entry.proprio, "actions": recording.entry.actions}
        parts = {key: ("", ()) if layout is None else (layout.kind, layout.parts) for key, layout in known.items()}
    split = "train" if "train" in recording.splits else recording.splits[0]
    spec = _spec(recording, cameras, hz, parts)
    source = format_of(recording.directory).open(recording.directory, split, spec, (), (_PIXELS, _PIXELS))
    episodes, damaged = _read(source)
    values = {
        "proprio": np.concatenate([e.proprio for e in episodes]) if episodes[0].proprio is not None else None,
        "actions": np.concatenate([e.actions for e in episodes]) if episodes[0].actions is not None else None,
    }
    if damaged:
        doubts.append(
            Doubt(f"{len(damaged)} episodes cannot be read and are left out; the first: {damaged[0]}", "data.skip_broken")
        )
    if not any(text for episode in episodes for text in episode.instructions):
        doubts.append(Doubt("no episode has an instruction, so the policy will not depend on one", "language, in the entry"))
    parts = _layouts(recording, parts, source.action_layout, values, doubts)

    validation = next((name for name in ("val", "validation", "test") if name in recording.splits), None)
    train_split, validation_split, validated = split, validation or split, validation is not None
    count = len(source)
    groups = [[len(episode) for episode in episodes]]
    if validation is None and count >= _ENOUGH:
        held_out = max(1, round(_HELD_OUT * count))
        train_split, validation_split, validated = f"{split}[:-{held_out}]", f"{split}[-{held_out}:]", True
        groups += [
            list(_lengths(source, range(start, stop))) for start, stop in ((0, count - held_out), (count - held_out, count))
        ]
    elif validation is None:
        doubts.append(
            Doubt(
                f"{count} episodes are too few to hold some out: nothing is validated, and evaluation reads what was trained on",
                f"data.train_split, data.validation_split ('{split}[-1:]') and train.validate_every",
            )
        )
    video_hz = hz / max(1, round(hz / _VIDEO_HZ))
    words = max(len(re.findall(r"\w+", text)) for episode in episodes for text in episode.instructions)
    past, future = _window(recording, groups, hz, video_hz, doubts)
    return Proposal(
        recording=recording,
        cameras=cameras,
        image_size=_image_size(recording, cameras, doubts),
        hz=hz,
        video_hz=video_hz,
        past_frames=past,
        future_frames=future,
        action_horizon=max(1, round(future / video_hz * hz)),
        train_split=train_split,
        validation_split=validation_split,
        validated=validated,
        text_rows=8 * max(2, -(-words // 8)),
        parts=parts,
        remarks={key: list(_remarks(vectors, values[key])) for key, vectors in _vectors(recording).items()},
        doubts=tuple(doubts),
    )


def _vectors(recording: Recording) -> dict[str, tuple[Vector, ...]]:
    return {"proprio": recording.state, "actions": recording.action}


def _read(source: EpisodeSource) -> tuple[list[Any], list[DatasetError]]:
    """Evenly spaced episodes, and what is wrong with others."""
    episodes, damaged = [], []
    for number in np.unique(np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int)).tolist():
        try:
            episodes.append(source[number])
        except DatasetError as error:
            damaged.append(error)
    if not episodes:
        raise DatasetError(f"{source.name}: none of {len(damaged)} episodes can be read; the first: {damaged[0]}")
    return episodes, damaged


def _lengths(source: EpisodeSource, numbers: Iterable[int]) -> Iterator[int]:
    for number in numbers:
        with contextlib.suppress(DatasetError):  # which `_read` has told of, or training will
            yield len(source[number])


def _camera_roles(recording: Recording, doubts: list[Doubt]) -> dict[str, str]:
    """Role → key: cameras with a word for a wrist in their name are wrist cameras; the others come in the recording's order."""
    keys = list(recording.cameras)
    if not keys:
        raise DatasetError(f"{recording.directory} has no colour camera, of which videos are made")
    if recording.entry is not None:
        return {role: key for role, key in recording.entry.cameras.items() if key in keys}
    if recording.own:
        return {role: f"image_{role}" for role in CAMERAS if f"image_{role}" in keys}
    wrists = [key for key in keys if any(word in key.lower() for word in _WRIST_WORDS)]
    others = [key for key in keys if key not in wrists]
    if not others:
        others, wrists = wrists[:1], wrists[1:]
    roles = dict(zip(("primary", "secondary"), others, strict=False)) | dict(zip(("wrist",), wrists, strict=False))
    left_out = [key for key in keys if key not in roles.values()]
    if left_out:
        doubts.append(Doubt(f"a sample has three cameras at most; {', '.join(left_out)} are left out", "cameras, in the entry"))
    if len(others) > 1:
        doubts.append(
            Doubt(
                f"that '{others[0]}' is the primary camera follows from the order of the recording alone", "primary, in the entry"
            )
        )
    return roles


def _image_size(recording: Recording, cameras: Mapping[str, str], doubts: list[Doubt]) -> tuple[int, int]:
    """Of the primary camera, made smaller to sides that are whole tokens."""
    size = recording.cameras[cameras["primary"]]
    if size is None:
        doubts.append(Doubt("images of the recording may have any size; 64x64 is a guess", "data.image_size"))
        return 64, 64
    scale = min(1.0, _LONGER_SIDE / max(size))
    height, width = (max(_PIXELS, round(side * scale / _PIXELS) * _PIXELS) for side in size)
    stretched = max(height * size[1], width * size[0]) / min(height * size[1], width * size[0]) - 1
    others = {recording.cameras[key] for key in cameras.values()} - {size}
    if stretched > 0.1 or others:
        found = ", ".join(f"{h}x{w}" for h, w in sorted({size, *(o for o in others if o is not None)}))
        doubts.append(Doubt(f"images of {found} become {height}x{width}, which changes their shape", "data.image_size"))
    return height, width


def _window(
    recording: Recording, groups: Sequence[Sequence[int]], hz: float, video_hz: float, doubts: list[Doubt]
) -> tuple[int, int]:
    """Past and future frames: the longest window that half of the episodes, and one of those held out, are as long as."""
    middle = min(float(np.median(groups[0])), *(max(lengths, default=0) for lengths in groups))
    for past, future in _WINDOWS:
        if (past + future - 1) / video_hz <= (middle - 1) / hz + 1e-6:
            break
    else:
        raise DatasetError(
            f"{recording.directory}: its episodes have {min(groups[0])} to {max(groups[0])} steps at {hz:g} a second; expected "
            f"half of them to be as long as the shortest window, {sum(_WINDOWS[-1]) - 1} frames at {video_hz:g} a second"
        )
    if (past, future) != _WINDOWS[0]:
        text = f"episodes are short, half of them {(middle - 1) / hz:.2g} s or less; so windows have {past}+{future} frames"
        doubts.append(Doubt(text, "data.past_frames, data.future_frames, data.action_horizon"))
    return past, future


def _vector_parts(vectors: Sequence[Vector]) -> tuple[LayoutPart, ...]:
    """All dimensions as they are; grippers and what is between them apart, where names tell."""
    parts = []
    for vector in vectors:
        names = vector.names if len(vector.names) == vector.width else ()
        first = 0
        for dim in range(1, vector.width + 1):
            if dim == vector.width or (names and _is_gripper(names[dim]) != _is_gripper(names[first])):
                label = (
                    "gripper" if names and _is_gripper(names[first]) else "joints" if _are_joints(names[first:dim]) else "values"
                )
                parts.append(Values(f"{vector.key}[{first}:{dim}]", label, _UNITS))
                first = dim
    return tuple(parts)


def _is_gripper(name: str) -> bool:
    return "grip" in name.lower() or "jaw" in name.lower()


def _are_joints(names: Sequence[str]) -> bool:
    words = ("joint", "shoulder", "elbow", "wrist", "waist", "motor", "forearm", "finger", ".pos")
    return bool(names) and all(any(word in name.lower() for word in words) for name in names)


def _layouts(
    recording: Recording,
    parts: Parts,
    layout: str,
    values: Mapping[str, np.ndarray | None],
    doubts: list[Doubt],
) -> Parts:
    """Poses where the recording says so, or names of dimensions and values do; vectors as recorded otherwise."""
    if values["proprio"] is None or values["actions"] is None:
        missing = " and ".join(key for key, each in values.items() if each is None)
        doubts.append(
            Doubt(f"the recording has no {missing}: it serves the stage `video` alone", "proprio and actions, in the entry")
        )
        return dict.fromkeys(parts, ("", ()))
    if recording.entry is not None:
        return parts
    if recording.own and layout in ("pose", "delta"):  # of deltas proprioception may be anything
        proprio = ("pose", _own_pose(recording.state[0].key)) if layout == "pose" else parts["proprio"]
        return {"proprio": proprio, "actions": (layout, _own_pose(recording.action[0].key))}
    for key, vectors in _vectors(recording).items():
        if any(len(vector.names) != vector.width for vector in vectors) and not recording.own:
            dims = sum(vector.width for vector in vectors)
            doubts.append(
                Doubt(f"nothing says what the {dims} dimensions of {key} are; they are taken as they are", f"{key}, in the entry")
            )
    if len(recording.state) != 1 or len(recording.action) != 1:
        return parts
    encodings = {key: _pose_encoding(vector.names) for key, (vector,) in _vectors(recording).items()}
    if None in encodings.values():
        return parts
    if not _follows(values["proprio"][:, :3], values["actions"][:, :3]):
        doubts.append(
            Doubt(
                "names of actions are those of a pose, but values are far from the hand's: displacements, taken as they are",
                "actions, in the entry: `delta(...)` in place of `vector(...)`",
            )
        )
        return parts
    found = {}
    for key, (vector,) in _vectors(recording).items():
        grips, last = values[key][:, -1], vector.width - 1  # type: ignore[index]  # both are there
        low, high = float(grips.min()), float(grips.max())
        found[key] = (
            "pose",
            (
                Values(f"{vector.key}[0:3]"),
                Turn(f"{vector.key}[3:{last}]", encodings[key]),  # type: ignore[arg-type]  # one of `_ROTATIONS`
                Gripper(f"{vector.key}[{last}:{last + 1}]", closed=low if low < high else low - 1.0, open=high),
            ),
        )
    doubts.append(
        Doubt(
            "dimensions are called those of a pose, so actions are poses relative to the hand; that positions are in metres, "
            f"rotations {encodings['actions']} in radians, and a gripper's least value is closed, is assumed. A robot needs "
            "them in its base frame: CONTRIBUTING, A robot",
            "proprio and actions, in the entry: `vector(Values(...))` takes them as they are",
        )
    )
    return found


def _follows(positions: np.ndarray, targets: np.ndarray) -> bool:
    """Whether targets (n, 3) are closer to the positions (n, 3) of the same steps than these are to their mean."""
    return bool(np.square(targets - positions).mean() < np.square(positions - positions.mean(0)).mean())


def _own_pose(key: str) -> tuple[LayoutPart, ...]:
    return Values(f"{key}[0:3]"), Values(f"{key}[3:9]", "rotation", "rot6d rows"), Values(f"{key}[9:10]", "gripper", "1 = open")


def _pose_encoding(names: Sequence[str]) -> str | None:
    """How the rotation of a pose is written whose dimensions have these names: x, y, z, rotation, gripper; None of others."""
    plain = [re.sub(r"^(ee|eef|tcp|end_effector)[._]|[._](pos|state)$", "", name.lower()) for name in names]
    if plain[:3] != ["x", "y", "z"] or not plain or not _is_gripper(plain[-1]):
        return None
    return _ROTATIONS.get(tuple(plain[3:-1]))


def _remarks(vectors: Sequence[Vector], values: np.ndarray | None) -> Iterator[str]:
    """What a reader of the file should know of each dimension: its name, its range, and whether it hardly has one."""
    if values is None:
        return
    names = [
        vector.names[dim] if len(vector.names) == vector.width else f"{dim}" for vector in vectors for dim in range(vector.width)
    ]
    for dim, name in enumerate(names[: values.shape[1]]):
        found = np.unique(values[:, dim])
        low, high = f"{found[0]:.4g}", f"{found[-1]:.4g}"
        if len(found) == 1:
            yield f"{name}: always {low}, which normalisation leaves alone"
        elif len(found) == 2:
            yield f"{name}: {low} or {high}, which clients do not interpolate"
        else:
            yield f"{name}: {low} to {high}"


def _spec(recording: Recording, cameras: Mapping[str, str], hz: float, parts: Parts) -> DatasetSpec:
    if recording.entry is not None:
        return recording.entry
    layouts: dict[str, Any] = {key: Layout(kind, each) for key, (kind, each) in parts.items() if each}  # type: ignore[arg-type]
    features = {vector.key: (vector.width,) for key, each in _vectors(recording).items() if key in layouts for vector in each}
    roles: dict[str, Any] = dict(cameras)
    return DatasetSpec(name=recording.name, control_hz=hz, language=recording.language, features=features, **roles, **layouts)


def experiment_text(proposal: Proposal, file: str) -> str:
    """The experiment file. `file` is where it will stand, for the commands in its text."""
    recording = proposal.recording
    labelled = all(parts for _, parts in proposal.parts.values())
    widths = {key: sum(part.width for part in parts) or 1 for key, (_, parts) in proposal.parts.items()}
    past, future, hz = proposal.past_frames, proposal.future_frames, proposal.video_hz
    config = _CONFIG.format(
        stages='"video" or "action"' if labelled else '"video": the recording has nothing that actions can be learnt from',
        default=_quoted("action" if labelled else "video"),
        name=_quoted(recording.name),
        train_split=_quoted(proposal.train_split),
        validation_split=_quoted(proposal.validation_split),
        cameras=_tuple(proposal.cameras),
        image_size=proposal.image_size,
        past=past,
        future=future,
        span=f"{(past - 1) / hz:.2g} s of past, {future / hz:.2g} s ahead",
        video_hz=repr(hz),
        horizon=proposal.action_horizon,
        execute=max(1, proposal.action_horizon // 3),
        text_rows=proposal.text_rows,
        proprio=widths["proprio"],
        action=widths["actions"],
        validate=200 if proposal.validated else 0,
        skip=any("skip_broken" in doubt.change for doubt in proposal.doubts),
        video_run=_quoted(f"runs/{recording.name}/video"),
    )
    parts = [_header(proposal, file, labelled), _entry(proposal, labelled), config.strip()]
    return "\n\n\n".join(parts) + "\n"


def _header(proposal: Proposal, file: str, labelled: bool) -> str:
    """The file's text and imports."""
    recording = proposal.recording
    lines = [f"{recording.robot} as recorded in {recording.directory.name}: both stages, and what the dataset is.", ""]
    for stage in ("video", "action")[: 1 + labelled]:
        lines.append(f"    python launch/train.py --config={file}:{stage} --workdir=runs/{recording.name}/{stage}")
    lines += ["", "launch/new_robot.py has written it from the recording. What it was not sure of:", ""]
    for doubt in proposal.doubts or (Doubt("nothing", ""),):
        text = f"{doubt.what}. To change: {doubt.change}" if doubt.change else doubt.what
        lines += textwrap.wrap(text, 126, initial_indent="* ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "Networks have the size of configs/quickstart.py, for two CPU cores; larger ones are in configs/small.py."]
    text = "\n".join(lines).replace("\\", "\\\\").replace('"' * 3, "'" * 3)
    imports = ["from data_pipelines.oxe.registry import register"]
    if recording.entry is not None:
        imports = [
            "import dataclasses",
            "",
            "import ml_collections",
            "",
            "from data_pipelines.oxe.registry import find, register",
        ]
    else:
        imports = ["import ml_collections", "", *imports, "from data_pipelines.oxe.spec import DatasetSpec"]
        names = {kind for kind, parts in proposal.parts.values() if parts}
        names |= {type(part).__name__ for _, parts in proposal.parts.values() for part in parts}
        if names:
            ordered = ", ".join(sorted(names, key=lambda name: (name.islower(), name)))
            imports.append(f"from data_pipelines.oxe.standardise import {ordered}")
    imports.append("from mimic_video.config import ExperimentConfig, to_dict")
    return f'"""{text}\n"""\n\n' + "\n".join(imports) + f"\n\nCONTROL_HZ = {proposal.hz!r}  # steps per second as recorded"


def _entry(proposal: Proposal, labelled: bool) -> str:
    """What registers the dataset."""
    recording = proposal.recording
    place = f"directory={_quoted(os.fspath(recording.directory))},"
    if recording.entry is not None:
        known = f"dataclasses.replace(find({_quoted(recording.entry.name)}), name={_quoted(recording.name)}, {place[:-1]})"
        return f"register({known})"
    lines = [f"name={_quoted(recording.name)},", place]
    lines.append(f"robot={_quoted(recording.robot)},  # datasets of one robot share its token and statistics")
    for role, key in proposal.cameras.items():
        size = recording.cameras[key]
        lines.append(f"{role}={_quoted(key)}," + (f"  # {size[0]}x{size[1]} pixels" if size else ""))
    lines += [f"language={_quoted(recording.language)},", "control_hz=CONTROL_HZ,"]
    if labelled:
        shapes = {vector.key: (vector.width,) for each in _vectors(recording).values() for vector in each}
        lines.append("features={" + ", ".join(f"{_quoted(key)}: {shape}" for key, shape in shapes.items()) + "},")
        for key, (kind, parts) in proposal.parts.items():
            lines += [f"# {remark}" for remark in proposal.remarks[key]]
            lines += [f"{key}={kind}(", *(f"    {_call(part)}," for part in parts), "),"]
    return "register(\n    DatasetSpec(\n" + "".join(f"        {line}\n" for line in lines) + "    )\n)"


def _quoted(text: str) -> str:
    """As Python, in the quotes of this project."""
    return json.dumps(text, ensure_ascii=False)


def _tuple(texts: Sequence[str] | Mapping[str, str]) -> str:
    return "(" + ", ".join(map(_quoted, texts)) + ("," if len(texts) == 1 else "") + ")"


def _call(part: LayoutPart) -> str:
    """Source text that makes the part again."""
    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    given = {field.name: getattr(part, field.name) for field in fields if getattr(part, field.name) != field.default}
    texts = {name: _quoted(value) if isinstance(value, str) else repr(value) for name, value in given.items()}
    values = (text if name in ("column", "encoding") else f"{name}={text}" for name, text in texts.items())
    return f"{type(part).__name__}({', '.join(values)})"


_CONFIG = '''
def get_config(stage={default}):
    """`stage` is {stages}."""
    config = ml_collections.ConfigDict(to_dict(ExperimentConfig()))
    config.stage = stage

    config.data.video_dataset = config.data.action_dataset = {name}
    config.data.train_split = {train_split}
    config.data.validation_split = {validation_split}
    config.data.skip_broken = {skip}
    config.data.cameras = {cameras}
    config.data.image_size = {image_size}  # multiples of 16
    config.data.past_frames = {past}  # {span}
    config.data.future_frames = {future}
    config.data.video_hz = {video_hz}
    config.data.control_hz = CONTROL_HZ
    config.data.action_horizon = {horizon}  # as long as the frames ahead
    config.data.action_delay = 0.0  # a step's action is what was commanded when its frame was seen

    config.text.rows = {text_rows}  # words of an instruction at most
    config.backbone.text_width = 64

    config.backbone.width = 128
    config.backbone.num_blocks = 4
    config.backbone.num_heads = 4
    config.backbone.adaln_lora_dim = 32
    config.backbone.hidden_block = 3

    config.decoder.width = 96
    config.decoder.num_blocks = 3
    config.decoder.num_heads = 4
    config.decoder.adaln_lora_dim = 32
    config.decoder.time_rank = 96
    config.decoder.proprio_dim = {proprio}
    config.decoder.action_dim = {action}

    # The policy reads the backbone near τ_v = 1, so that end of the range is seen more often than in the 2B recipe.
    config.noise.tail_probability = 0.15
    config.noise.tail_range = (32.0, 1000.0)

    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.final_fraction = 0.05
    config.train.warmup_steps = 50
    config.train.weight_decay = 0.01
    config.train.ema_decay = 0.995
    config.train.log_every = 20
    config.train.validate_every = {validate}
    config.train.checkpoint_every = 200
    if stage == "video":
        config.train.clip_norm = 100.0  # the loss carries the published factor of 100
    else:
        config.backbone_run = {video_run}
        config.train.clip_norm = 10.0
        config.train.action_draws = 4

    config.policy.execute_steps = {execute}  # of a chunk, until the policy plans again
    return config
'''


def new_robot(source: str, out: str | os.PathLike | None = None, control_hz: float | None = None) -> Path:
    """Writes the experiment file of a recording, opens both stages with it, and prints what it found and was not sure of.

    Args:
        source: as for `locate`.
        out: the file; `configs/NAME.py` unless given.
        control_hz: as for `propose`.

    Returns:
        The file.

    Raises:
        DatasetError: as `locate` and `propose`.
        FileExistsError: if the file is there.
    """
    recording = read_recording(locate(source))
    if recording.name in registry.names():
        recording = dataclasses.replace(recording, name=f"{recording.name}_own")
    path = Path(out) if out is not None else Path("configs") / f"{recording.name}.py"
    if path.exists():
        raise FileExistsError(f"{path} exists; expected another --out, so that nothing is lost")
    proposal = propose(recording, control_hz)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as partial:
        partial.write_text(experiment_text(proposal, os.fspath(path)), encoding="utf-8")
    make = runpy.run_path(os.fspath(path))["get_config"]
    stages = ["video"] + ["action"] * all(parts for _, parts in proposal.parts.values())
    for stage in stages:  # what is wrong with the file shows now
        config = experiment_from(make(stage).to_dict())
        opened = TrainingData(config).open()
        next(iter(opened.samples(1)))
    windows = next(iter(opened.training.windows.values()))
    print(
        f"{recording.format} dataset {recording.directory}: {len(windows.episodes)} episodes, {len(windows)} windows to train on"
    )
    for role, key in proposal.cameras.items():
        print(f"  camera {role}: {key}")
    for key, (kind, parts) in proposal.parts.items():
        print(f"  {key}: {Layout(kind, parts) if parts else 'none'}")  # type: ignore[arg-type]
    print(f"  {proposal.hz:g} steps and {proposal.video_hz:g} frames a second, chunks of {proposal.action_horizon} actions")
    instructions = collections.Counter(text for episode in windows.episodes for text in episode.instructions)
    print(f"  instructions: {len(instructions)}, such as {next(iter(instructions))!r}")
    print("not sure of:" if proposal.doubts else "nothing was left unsure")
    for doubt in proposal.doubts:
        print(f"  * {doubt.what}\n    to change: {doubt.change}")
    print(f"wrote {path}; next:")
    for stage in stages:
        print(f"  python launch/train.py --config={path}:{stage} --workdir=runs/{recording.name}/{stage}")
    return path
