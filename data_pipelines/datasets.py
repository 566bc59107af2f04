"""The datasets that an experiment names: directories of our own layout, and entries of the Open-X registry."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from data_pipelines.episode import CAMERAS
from data_pipelines.loader import WindowDataset
from data_pipelines.mixture import Phase, parse_mixture
from data_pipelines.oxe import registry
from data_pipelines.oxe.mixtures import MIXTURES, effective_weights
from data_pipelines.oxe.spec import DatasetSpec, check_schema, flatten_features
from data_pipelines.precompute import LatentCache, create_latents, first_rows, latent_key, open_latents
from data_pipelines.sources.rlds import DatasetError, RldsSource, open_dataset
from mimic_video.config import ConfigError, ExperimentConfig

_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Datasets(NamedTuple):
    """What a stage learns from: the windows of each dataset by its name, and the phases of their weights."""

    windows: dict[str, WindowDataset]
    phases: tuple[Phase, ...]


class Place(NamedTuple):
    """A dataset's prepared directory, and its entry in the registry unless it has our own layout."""

    directory: str
    spec: DatasetSpec | None


def open_datasets(config: ExperimentConfig, split: str) -> Datasets:
    """Opens one split of every dataset that the configured stage learns from.

    The field `data.video_dataset` or `data.action_dataset` names one or several with weights, as `parse_mixture` describes, or a
    mixture of `data_pipelines.oxe.mixtures`. A dataset is a prepared directory of our own layout, which goes by the name of its
    directory (above a version such as 1.0.0), or the name of a registry entry, whose newest version is looked for in `data.root`.
    Images of registry datasets are resized to `data.image_size`; others have to have that size.

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

    Args:
        windows: of `open_datasets` with the same configuration and split.
        tokenizer: parameters that training uses, as for `latent_key`.

    Raises:
        ConfigError: if latents were made with another tokenizer or configuration, or of another dataset.
        DatasetError: if latents are missing or damaged.
    """
    return {
        name: each.with_latents(open_latents(latents_folder(config, name, split), latent_key(config, tokenizer, each.identity)))
        for name, each in windows.items()
    }


def create_caches(
    config: ExperimentConfig, tokenizer: Mapping[str, Any], stride: int, dtype: str
) -> list[tuple[LatentCache, WindowDataset]]:
    """The caches of `data.latents` that training with a configuration reads, new or to be continued, and what they are of.

    Args:
        tokenizer: parameters that training uses, as for `latent_key`.
        stride: steps of an episode from one window to the next.
        dtype: in which latents are kept: what the tokenizer computes in.

    Raises:
        ConfigError, DatasetError: as `open_datasets` and `create_latents`.
    """
    data, caches, (frames, height, *rest) = config.data, [], config.latent_shape
    for split in [data.train_split] + [data.validation_split] * bool(config.train.validate_every):
        for name, windows in open_datasets(config, split).windows.items():
            cache = create_latents(
                latents_folder(config, name, split),
                latent_key(config, tokenizer, windows.identity),
                stride=stride,
                rows=int(first_rows(list(map(len, windows.episodes)), stride)[-1]),
                shape=(frames, data.views * height, *rest),
                dtype=dtype,
            )
            caches.append((cache, windows))
    return caches


def latents_folder(config: ExperimentConfig, dataset: str, split: str) -> Path:
    return Path(config.data.latents) / dataset / split


def find_datasets(config: ExperimentConfig) -> tuple[dict[str, Place], tuple[Phase, ...]]:
    """Where the datasets of `open_datasets` are, by their names, and the phases of their weights; with the same errors."""
    field, text = _dataset_field(config)
    if not text:
        raise ConfigError(f"config field '{field}' is empty; expected a prepared RLDS directory, or several as in 'A,B*2'")
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
    dataset, size = open_dataset(place.directory), config.data.image_size  # a size, since images may have any
    dataset.shards(config.data.train_split)  # raises what training would
    for split in dataset.info.splits:
        source = RldsSource(place.directory, split, spec=place.spec, image_size=size)
        for index in tqdm(range(len(source)), desc=source.name, unit="episode"):
            yield from source[index].instructions


def directory_name(directory: Path) -> str:
    """The name of a dataset's folder, or of the one above if it is a version such as 1.0.0."""
    return directory.parent.name if _VERSION.fullmatch(directory.name) else directory.name


def _dataset_field(config: ExperimentConfig) -> tuple[str, str]:
    """Name and value of the field that says what the configured stage learns from."""
    name = f"{config.stage}_dataset"
    return f"data.{name}", getattr(config.data, name)


def _find(part: str, config: ExperimentConfig, field: str) -> Place:
    if part not in registry.names() or Path(part).is_dir():
        return Place(part, None)
    if not config.data.root:
        raise ConfigError(f"config field 'data.root' is empty; expected the folder with the dataset {part!r} of '{field}'")
    directory = _newest_version(Path(config.data.root) / part)
    spec = registry.find(part)
    secondary, wrist = (getattr(spec, name) if name in config.data.cameras else None for name in CAMERAS[1:])
    spec = dataclasses.replace(spec, secondary=secondary, wrist=wrist)
    try:  # a conversion may have dropped further cameras
        check_schema(flatten_features(open_dataset(directory).features), dataclasses.replace(spec, secondary=None, wrist=None))
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{directory}: {error}") from error
    return Place(str(directory), spec)


def _open(name: str, place: Place, config: ExperimentConfig, split: str) -> WindowDataset:
    size = None if place.spec is None else config.data.image_size
    source = RldsSource(place.directory, split, spec=place.spec, cameras=config.data.cameras, image_size=size)
    check_dataset(source, config)
    raw_dims = None if place.spec is None else _raw_dims(place.spec)
    robot = dict(config.data.robots).get(name) or (place.spec and place.spec.robot) or source.robot or None
    return WindowDataset(source, config.data, actions=config.stage == "action", raw_dims=raw_dims, robot=robot)


def _raw_dims(spec: DatasetSpec) -> dict[str, tuple[int, ...]]:
    layouts = {"action": spec.actions, "proprio": spec.proprio}
    return {key: () if layout is None else layout.rotation_dims for key, layout in layouts.items()}


def _newest_version(folder: Path) -> Path:
    versions = [path for path in folder.glob("*") if _VERSION.fullmatch(path.name)]
    if not versions:
        raise DatasetError(f"there is no dataset {folder}: expected a folder with a version, such as {folder / '1.0.0'}")
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))


def check_dataset(source: RldsSource, config: ExperimentConfig) -> None:
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


def _require_equal(source: RldsSource, what: str, found: object, field: str, wanted: object) -> None:
    if found is None:
        raise DatasetError(f"{source.name} has no {what.split()[0]}; the config field '{field}' is {wanted}")
    if found != wanted:
        raise DatasetError(f"{source.name} has {what} {found}; the config field '{field}' is {wanted}")
