"""What is known about one dataset, as plain data; and whether a dataset on disk is what was declared."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.episode import CAMERAS, ActionLayout
from data_pipelines.oxe.standardise import Layout, parse
from mimic_video import errors

_EPISODE = "episode_metadata/"


class SchemaError(ValueError):
    """A dataset whose features are not what its entry declares. The message names each of them."""


class DeclaredFeature(NamedTuple):
    """One feature of a dataset: `kind` is "image", "text" or "tensor"; None in a shape is a size that varies."""

    kind: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {self.shape}" if self.kind != "text" else "text"


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One dataset of episodes: where its cameras, instruction and low-dimensional columns are, and what these mean.

    Attributes:
        name: the dataset's name, as its folder and mixtures have it.
        primary: observation key of the camera that videos are made of; the only camera of a dataset, wherever it is mounted.
        secondary, wrist: observation keys of further cameras, or None.
        language: path of the instruction under `steps/`, or one that starts with `episode_metadata/`.
        control_hz: steps per second, as recorded.
        features: shape per step of every low-dimensional feature that the layouts read, by path under `steps/`.
        proprio, actions: how to compute them and what they are; None where the dataset has none that is usable. Without
            either it serves stage 1 only.
        directory: its folder, wherever it lies; empty for the newest version in the experiment's `data.root`.
        robot: whose it is. Datasets of the same name share its token in a decoder; empty for a robot of its own.
        notes: what else one should know: doubts, approximations, disagreements between sources.

    Raises:
        ValueError: naming the dataset and the field, if a value is impossible or the layouts read other features than declared.
    """

    name: str
    primary: str
    control_hz: float
    secondary: str | None = None
    wrist: str | None = None
    language: str = "language_instruction"
    features: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    proprio: Layout | None = None
    actions: Layout | None = None
    directory: str = ""
    robot: str = ""
    notes: str = ""

    def __post_init__(self):
        for field in ("name", "primary", "language"):
            value = getattr(self, field)
            if not value or not isinstance(value, str):
                raise ValueError(f"dataset {self.name!r}: {field} is {value!r}; expected a string that is not empty")
        if "/" in self.robot:
            raise ValueError(f"dataset '{self.name}': robot is '{self.robot}'; expected a name without '/'")
        if not self.control_hz > 0:
            raise ValueError(f"dataset '{self.name}': control_hz is {self.control_hz}; expected a positive rate")
        if len(set(self.cameras.values())) < len(self.cameras):
            raise ValueError(f"dataset '{self.name}': cameras are {self.cameras}; expected different ones")
        if self.actions is not None and self.actions.kind == "pose" and (self.proprio is None or self.proprio.kind != "pose"):
            raise ValueError(f"dataset '{self.name}': actions are poses but proprio is {self.proprio}; windows need a pose there")
        read: set[str] = set()
        for reference in (r for layout in (self.proprio, self.actions) if layout for r in layout.references):
            path, _, last = parse(reference)
            key = path.removeprefix("steps/")
            if key not in self.features:
                hint = nearest(key, self.features)
                raise ValueError(f"dataset '{self.name}': layouts read '{key}', which features do not declare{hint}")
            if last > (size := int(np.prod(self.features[key]))):
                raise ValueError(f"dataset '{self.name}': '{reference}' reads beyond the {size} dimensions of '{key}'")
            read.add(key)
        if unread := sorted(set(self.features) - read):
            raise ValueError(f"dataset '{self.name}': features {unread} are declared but no layout reads them")

    @property
    def cameras(self) -> dict[str, str]:
        """Camera → observation key, of those there are; "primary" first."""
        return {camera: getattr(self, camera) for camera in CAMERAS if getattr(self, camera)}

    @property
    def columns(self) -> tuple[str, ...]:
        """Paths of the low-dimensional features that `standardise` reads: "steps/action", …"""
        return tuple(f"steps/{path}" for path in self.features)

    @property
    def language_path(self) -> str:
        """Path of the instruction from the root of the dataset."""
        return self.language if self.language.startswith(_EPISODE) else f"steps/{self.language}"

    @property
    def labelled(self) -> bool:
        """Whether it can serve stage 2, which needs both proprio and actions."""
        return self.proprio is not None and self.actions is not None

    @property
    def action_layout(self) -> ActionLayout:
        """What `Episode.action_layout` is to be."""
        return self.actions.kind if self.actions else "vector"

    def standardise(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Raw columns (n, ...) by path → (proprio float32 (n, p) or None, actions float32 (n, m) or None).

        Raises:
            ValueError: naming the dataset, the feature and the step, if a column is missing, too narrow, not finite, or holds
                something that is no rotation.
        """
        values = []
        for field in ("proprio", "actions"):
            layout = getattr(self, field)
            try:
                values.append(None if layout is None else layout(columns))
            except ValueError as error:
                raise ValueError(f"dataset '{self.name}', {field}: {error}") from error
        return values[0], values[1]


def flatten_features(tree: Any, prefix: str = "") -> dict[str, DeclaredFeature]:
    """The features of a tfds feature tree by path; steps are entered as if they were a dictionary."""
    node = getattr(tree, "feature", tree)
    if hasattr(node, "items"):
        children = (flatten_features(child, f"{prefix}/{key}" if prefix else key) for key, child in node.items())
        return {path: feature for child in children for path, feature in child.items()}
    dtype = np.dtype(node.np_dtype)
    kind = {"Image": "image", "Text": "text"}.get(type(node).__name__, "text" if dtype.kind in "OSU" else "tensor")
    return {prefix: DeclaredFeature(kind, tuple(node.shape), dtype.name)}


def check_schema(features: Mapping[str, DeclaredFeature], spec: DatasetSpec) -> None:
    """Checks a dataset's features against its entry, before anything is read.

    Args:
        features: by path from the root, as `flatten_features` gives them.

    Raises:
        SchemaError: with a line for every feature that is missing or has another kind or shape: its path, what was found, what is
            expected, and the existing path that is most like it.
    """
    problems = []
    for path, (expected, fits) in _expectations(spec).items():
        if path not in features:
            problems.append(f"  '{path}' is missing; expected {expected}{nearest(path, features)}")
        elif not fits(features[path]):
            problems.append(f"  '{path}' is {features[path]}; expected {expected}")
    if problems:
        raise SchemaError("\n".join([f"dataset '{spec.name}' does not have the features that its entry declares:", *problems]))


def expected_features(spec: DatasetSpec) -> dict[str, str]:
    """What an entry expects at which path, in words."""
    return {path: expected for path, (expected, _) in _expectations(spec).items()}


def _expectations(spec: DatasetSpec) -> dict[str, tuple[str, Callable[[DeclaredFeature], bool]]]:
    expectations: dict[str, tuple[str, Callable[[DeclaredFeature], bool]]] = {}
    for camera, key in spec.cameras.items():
        expectations[f"steps/observation/{key}"] = (f"the {camera} camera, an image uint8 (height, width, 3)", _is_rgb)
    expectations[spec.language_path] = ("the instruction, text or its bytes as integers", _is_instruction)
    for key, shape in spec.features.items():
        expectations[f"steps/{key}"] = (f"numbers of shape {shape}", functools.partial(_has_shape, shape=shape))
    return expectations


def _is_rgb(feature: DeclaredFeature) -> bool:
    return feature.kind == "image" and feature.dtype == "uint8" and len(feature.shape) == 3 and feature.shape[-1] == 3


def _has_shape(feature: DeclaredFeature, shape: tuple[int, ...]) -> bool:
    return feature.kind == "tensor" and feature.shape == shape


def _is_instruction(feature: DeclaredFeature) -> bool:
    return feature.kind == "text" or (feature.kind == "tensor" and len(feature.shape) == 1 and "int" in feature.dtype)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what of `known` is most like a name that is not among them."""
    names = list(known)
    return f"; the nearest is '{errors.nearest(name, names)}'" if names else "; there are none"
