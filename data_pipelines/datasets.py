"""The datasets that an experiment names: directories of our own layout or of LeRobot, and entries of the Open-X registry."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipelines.episode import CAMERAS, EpisodeSource
from data_pipelines.loader import WindowDataset
from data_pipelines.mixture import Phase, parse_mixture
from data_pipelines.oxe import registry
from data_pipelines.oxe.mixtures import MIXTURES, effective_weights
from data_pipelines.oxe.spec import DatasetSpec, check_schema, nearest
from data_pipelines.precompute import LatentCache, create_latents, first_rows, latent_key, open_latents
from data_pipelines.sources.folders import VERSION, find_format, format_of, versions
from data_pipelines.sources.records import is_remote
from data_pipelines.sources.rlds import DatasetError, SplitError
from mimic_video.config import ConfigError, ExperimentConfig
from mimic_video.progress import progress
from mimic_video.splits import parse_split


class Datasets(NamedTuple):
    """What a stage learns from: the windows of each dataset by its name, and the phases of their weights."""

    windows: dict[str, WindowDataset]
    phases: tuple[Phase, ...]

    def chosen(self, name: str | None) -> tuple[str, WindowDataset]:
        """The dataset that a flag --dataset names, or the only one there is, by its name. Raises ConfigError, listing all."""
        if name is None and len(self.windows) == 1:
            (name,) = self.windows
        if name not in self.windows:
            raise ConfigError(f"--dataset is {name!r}; expected one of {', '.join(map(repr, self.windows))}")
        return name, self.windows[name]


class Place(NamedTuple):
    """A dataset's directory, and its entry in the registry unless it goes without: in our own layout, or of LeRobot."""

    directory: str
    spec: DatasetSpec | None


def open_datasets(config: ExperimentConfig, split: str) -> Datasets:
    """Opens one split, or the same slices of one, of every dataset that the configured stage learns from.

    The field `data.video_dataset` or `data.action_dataset` names one or several with weights, as `parse_mixture` describes, or a
    mixture of `data_pipelines.oxe.mixtures`. A dataset is a directory of our own layout or of LeRobot, which goes by the name of
    its directory (above a version such as 1.0.0), or the name of a registry entry, which says where it lies, or whose newest
    version is looked for in `data.root`. Images of registry datasets and of LeRobot's are resized to `data.image_size`; others
    have to have that size.

    Raises:
        ConfigError: if the field is empty or cannot be parsed, two datasets have the same name, or `data.robots` names another.
        DatasetError: if a dataset or split is not there, or is not what its entry or the experiment says, or no dataset has a
            camera of `data.cameras`.
    """
    places, phases = find_datasets(config)
    windows = {name: _open(name, place, config, split) for name, place in places.items()}
    for camera in config.data.cameras:
        if not any(camera in each.cameras for each in windows.values()):
            raise DatasetError(f"config field 'data.cameras' has {camera!r}, which none of {', '.join(windows)} has")
    named = MIXTURES.get(_dataset_field(config)[1])
    if named is not None:
        shares = effective_weights(named, {name: len(each) for name, each in windows.items()})
        phases = (Phase(0, tuple(shares.values())),)
    return Datasets(windows, phases)


def with_latents(
    windows: Mapping[str, WindowDataset], config: ExperimentConfig, split: str, tokenizer: Mapping[str, Any]
) -> dict[str, WindowDataset]:
    """The same datasets with the windows that `data.latents` holds in place of frames.

    Slices have the latents of their whole split, of which nothing but the low-dimensional values is read besides.

    Args:
        windows: of `open_datasets` with the same configuration and split.
        tokenizer: parameters that training uses, as for `latent_key`.

    Raises:
        ConfigError: if latents were made with another tokenizer or configuration, or of another dataset.
        DatasetError: if latents are missing or damaged.
    """
    found, name_of_split = {}, parse_split(split).name
    whole = windows if split == name_of_split else open_datasets(config, name_of_split).windows
    for name, each in windows.items():
        chosen, key = each.chosen_of(whole[name]), latent_key(config, tokenizer, whole[name].identity)
        found[name] = each.with_latents(open_latents(latents_folder(config, name, name_of_split), key, chosen), chosen)
    return found


def create_caches(
    config: ExperimentConfig, tokenizer: Mapping[str, Any], stride: int, dtype: str
) -> list[tuple[LatentCache, WindowDataset, set[int]]]:
    """The caches of `data.latents` that training with a configuration reads, new or to be continued.

    A cache is of a whole split.

    Args:
        tokenizer: parameters that training uses, as for `latent_key`.
        stride: steps of an episode from one window to the next.
        dtype: in which latents are kept: what the tokenizer computes in.

    Returns:
        Of each cache the windows that it is of, and the shards that training reads: all, or of slices of the split theirs.

    Raises:
        ConfigError, DatasetError: as `open_datasets` and `create_latents`.
    """
    data, caches, (frames, height, *rest) = config.data, [], config.latent_shape
    read: dict[str, list[str]] = {}
    for text in [data.train_split] + [data.validation_split] * bool(config.train.validate_every):
        read.setdefault(parse_split(text).name, []).append(text)
    for split, texts in read.items():
        whole = open_datasets(config, split).windows
        slices = [whole if text == split else open_datasets(config, text).windows for text in texts]
        for name, windows in whole.items():
            cache = create_latents(
                latents_folder(config, name, split),
                latent_key(config, tokenizer, windows.identity),
                stride=stride,
                rows=int(first_rows(windows.lengths, stride)[-1]),
                shape=(frames, data.views * height, *rest),
                dtype=dtype,
            )
            shards = set().union(*(cache.shards_of(each[name].chosen_of(windows)) for each in slices))
            caches.append((cache, windows, shards))
    return caches


def latents_folder(config: ExperimentConfig, dataset: str, split: str) -> Path:
    """Of a whole split, by its name."""
    return Path(config.data.latents) / dataset / split


def find_datasets(config: ExperimentConfig) -> tuple[dict[str, Place], tuple[Phase, ...]]:
    """Where the datasets of `open_datasets` are, by their names, and the phases of their weights; with the same errors."""
    field, text = _dataset_field(config)
    if not text:
        raise ConfigError(f"config field '{field}' is empty; expected a dataset's directory, or several as in 'A,B*2'")
    parts, phases = parse_mixture(",".join(MIXTURES.get(text, (text,))), field)
    places: dict[str, Place] = {}
    for part in parts:
        name = directory_name(Path(part))
        if name in places:
            raise ConfigError(f"config field '{field}' names two datasets {name!r}; rename a directory")
        places[name] = _find(part, config, field)
    for name in dict(config.data.robots) if config.stage == "action" else ():
        if name not in places:
            raise ConfigError(f"config field 'data.robots' has a dataset {name!r}; those of '{field}' are {', '.join(places)}")
    return places, phases


def find_instructions(config: ExperimentConfig) -> dict[str, None]:
    """Every instruction, once, of the datasets that the fields of both stages name, in all of their splits.

    With a progress bar per split. Raises what `open_datasets` raises for datasets that cannot be read.
    """
    stages: dict[Literal["video", "action"], str] = {"video": config.data.video_dataset, "action": config.data.action_dataset}
    configs = [dataclasses.replace(config, stage=stage) for stage, datasets in stages.items() if datasets]
    places = {place.directory: place for each in configs for place in find_datasets(each)[0].values()}
    return dict.fromkeys(instruction for place in places.values() for instruction in _instructions(place, config))


def _instructions(place: Place, config: ExperimentConfig) -> Iterator[str]:
    format, size = format_of(place.directory), config.data.image_size
    splits = format.splits(place.directory)
    for split in dict.fromkeys((parse_split(config.data.train_split).name, *splits)):  # the first raises what training would
        source = format.open(place.directory, split, place.spec, (), size)
        for index in progress(range(len(source)), desc=source.name, unit="episode"):
            yield from source[index].instructions


def directory_name(directory: Path) -> str:
    """The name of a dataset's folder, or of the one above if it is a version such as 1.0.0."""
    return directory.parent.name if VERSION.fullmatch(directory.name) else directory.name


def _dataset_field(config: ExperimentConfig) -> tuple[str, str]:
    """Name and value of the field that says what the configured stage learns from."""
    name = f"{config.stage}_dataset"
    return f"data.{name}", getattr(config.data, name)


def _find(part: str, config: ExperimentConfig, field: str) -> Place:
    if part not in registry.names() or os.path.isdir(part):
        if not (is_remote(part) or os.sep in part or part.startswith("~") or os.path.isdir(part)):
            raise DatasetError(
                f"config field '{field}' names {part!r}: there is no such folder, and no dataset of that name is registered"
                f"{nearest(part, registry.names())}"
            )
        format_of(part)
        return Place(part, None)
    spec = registry.find(part)
    if not (config.data.root or spec.directory):
        raise ConfigError(f"config field 'data.root' is empty; expected the folder with the dataset {part!r} of '{field}'")
    directory = spec.directory or _newest_version(Path(config.data.root) / part)
    secondary, wrist = (getattr(spec, name) if name in config.data.cameras else None for name in CAMERAS[1:])
    spec = dataclasses.replace(spec, secondary=secondary, wrist=wrist)
    try:  # a conversion may have dropped further cameras
        features = format_of(directory).features(directory)
        if features is not None:
            check_schema(features, dataclasses.replace(spec, secondary=None, wrist=None))
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{directory}: {error}") from error
    return Place(str(directory), spec)


def _open(name: str, place: Place, config: ExperimentConfig, split: str) -> WindowDataset:
    data = config.data
    try:
        source = format_of(place.directory).open(place.directory, split, place.spec, data.cameras, data.image_size)
    except SplitError as error:
        field = "train_split" if split == config.data.train_split else "validation_split"
        raise SplitError(f"config field 'data.{field}': {error}") from error
    check_dataset(source, config)
    raw_dims = None if place.spec is None else _raw_dims(place.spec)
    robot = dict(config.data.robots).get(name) or (place.spec and place.spec.robot) or source.robot or None
    return WindowDataset(source, config.data, actions=config.stage == "action", raw_dims=raw_dims, robot=robot)


def _raw_dims(spec: DatasetSpec) -> dict[str, tuple[int, ...]]:
    layouts = {"action": spec.actions, "proprio": spec.proprio}
    return {key: () if layout is None else layout.rotation_dims for key, layout in layouts.items()}


def _newest_version(folder: Path) -> Path:
    if find_format(folder) is not None:  # a format without versions
        return folder
    if not (found := versions(folder)):
        raise DatasetError(f"there is no dataset {folder}: expected a folder with a version, such as {folder / '1.0.0'}")
    return found[-1]


def check_dataset(source: EpisodeSource, config: ExperimentConfig) -> None:
    """Checks a dataset against the experiment, before anything is read.

    Raises:
        DatasetError: naming the dataset, the field and both values, if the image size, or for the stage `action` the action or
            proprio width or the rate of commanded steps, is not what the configuration says.
    """
    for camera in config.data.cameras:
        if camera in source.camera_sizes:
            what = f"image size of camera '{camera}'"
            _require_equal(source, what, source.camera_sizes[camera], "data.image_size", tuple(config.data.image_size))
    if config.stage == "action":
        mixed = config.decoder.embodiments > 1  # then narrower datasets are padded
        for what, found, field, wanted in (
            ("action width", source.action_dim, "decoder.action_dim", config.decoder.action_dim),
            ("proprio width", source.proprio_dim, "decoder.proprio_dim", config.decoder.proprio_dim),
        ):
            if not (mixed and found is not None and found <= wanted):
                _require_equal(source, what, found, field, wanted)
        if source.action_layout == "delta":  # which, unlike poses, cannot be interpolated
            hz = round(source.control_hz, 3)
            _require_equal(source, "action rate", hz, "data.control_hz", round(config.data.control_hz, 3))


def _require_equal(source: EpisodeSource, what: str, found: object, field: str, wanted: object) -> None:
    if found is None:
        raise DatasetError(f"{source.name} has no {what.split()[0]}; the config field '{field}' is {wanted}")
    if found != wanted:
        raise DatasetError(f"{source.name} has {what} {found}; the config field '{field}' is {wanted}")
