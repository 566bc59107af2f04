"""What a stage reads, assembled as its configuration says.

Both stages, trained from a notebook or a program of one's own; `values` are the fields of an `ExperimentConfig`:

    import json, pathlib
    from data_pipelines.assembly import TrainingData
    from mimic_video import Policy, experiment_from, train

    values = json.loads(pathlib.Path("experiment.json").read_text())
    for stage, backbone in (("video", ""), ("action", "runs/video")):
        config = experiment_from(values | {"stage": stage, "backbone_run": backbone})
        state = train(config, f"runs/{stage}", TrainingData(config))
    batch = next(TrainingData(config).open().batches(step=0))  # what the run saw first
    policy = Policy.load("runs/action")
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines.augmentation import Augmentation
from data_pipelines.datasets import Datasets, open_datasets, with_latents
from data_pipelines.episode import Episode
from data_pipelines.loader import Part, WindowDataset, data_state, make_batches
from data_pipelines.mixture import Mixture
from data_pipelines.statistics import ONE_HOST, Hosts, cached_statistics
from mimic_video.batch import Batch
from mimic_video.config import ConfigError, DataConfig, ExperimentConfig
from mimic_video.embodiments import Embodiment, of_dataset
from mimic_video.models.text import make_text_encoder
from mimic_video.parallel.distributed import gather

Windows = Mapping[str, WindowDataset]
Tokenizer = Callable[[], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What the stage of an experiment reads; nothing is opened yet. It is the `Data` of `mimic_video.training.loop.train`."""

    config: ExperimentConfig

    def open(self, rows: Sequence[int] | None = None, tokenizer: Tokenizer | None = None) -> "OpenTrainingData":
        """Opens the datasets, and looks at everything that can be wrong with them before they are read.

        Args:
            rows: numbers of the rows of every global batch that this process reads; None for all.
            tokenizer: gives the parameters that training uses, as for `with_latents`; asked for with `data.latents` only.

        Raises:
            ConfigError, DatasetError: as `open_datasets`, `with_latents` and `require_alike`; if `decoder.embodiments` is not
                the number of robots; if an instruction does not fit the text encoder.
        """
        config = self.config
        training = _open(config, config.data.train_split, tokenizer)
        if config.stage == "action":
            robots = robots_of(training.windows)
            for names in robots.values():
                require_alike({name: training.windows[name] for name in names})
            if config.decoder.embodiments and len(robots) != config.decoder.embodiments:
                raise ConfigError(
                    f"config field 'decoder.embodiments' is {config.decoder.embodiments}; expected {len(robots)}, the number of "
                    "robots"
                )
        encode_text = make_text_encoder(config.text, config.backbone.text_width)
        for instruction in {text for windows in training.windows.values() for text in windows.instructions}:
            encode_text(instruction)  # so that one that does not fit is an error now
        validation = _open(config, config.data.validation_split, tokenizer).windows if config.train.validate_every else None
        return OpenTrainingData(config, rows, encode_text, training, validation)


@dataclasses.dataclass(frozen=True)
class OpenTrainingData:
    """What `TrainingData.open` has opened: the `OpenData` of `mimic_video.training.data`, which says what methods are for.

    Attributes:
        config: the experiment.
        rows: of every global batch, as for `make_batches`.
        encode_text: instruction → its rows.
        training: windows of the training split, and the phases of their weights.
        validation_windows: of the validation split; None if there is no validation.
    """

    config: ExperimentConfig
    rows: Sequence[int] | None
    encode_text: Callable[[str], np.ndarray]
    training: Datasets
    validation_windows: Windows | None

    def samples(self, count: int) -> Iterator[Mapping[str, np.ndarray]]:
        """At most `count` evenly spaced windows of all datasets."""
        datasets = list(self.training.windows.values())
        first = np.cumsum([0, *map(len, datasets)])
        chosen = np.linspace(0, first[-1] - 1, min(count, first[-1])).astype(int)
        owners = np.searchsorted(first, chosen, side="right") - 1
        return (datasets[owner][int(index - first[owner])] for owner, index in zip(owners, chosen, strict=True))

    def robots(self) -> dict[str, Embodiment]:
        """By name, with statistics that several hosts compute together; all have to call this.

        A warning names the dimensions whose rare values the clamp loses, or that have some far from all others.
        """
        hosts = Hosts(jax.process_index(), jax.process_count(), gather)
        found = find_embodiments(self.training.windows, self.config.data, hosts)
        for robot in found.values():
            for remark in robot.remarks(self.config):
                logging.warning("dataset %s: %s", ", ".join(map(repr, robot.datasets)), remark)
        return found

    def batches(self, step: int, robots: Mapping[str, Embodiment] | None = None) -> Iterator[Batch]:
        """The batches of training after `step` steps. Without `robots` those of `robots()` normalise."""
        data, seed = self.config.data, self.config.seed
        augmentation = Augmentation(data.augmentation, data.cameras, seed) if data.augmentation.on else None
        return self._batches(*self._mixed(self.training.windows, seed, robots), step, augmentation=augmentation)

    def validation(self, robots: Mapping[str, Embodiment] | None = None) -> list[Batch]:
        """The first `train.validation_batches` batches of the validation split; none if there is no validation."""
        if self.validation_windows is None:
            return []
        mixed = self._mixed(self.validation_windows, 0, robots)
        stream = self._batches(*mixed, 0, scales=self.config.train.validation_curves)
        # Copied: those of worker processes are in shared memory, where they would stay as long as the run.
        return [jax.tree.map(np.array, batch) for batch in itertools.islice(stream, self.config.train.validation_batches)]

    def state(self, step: int) -> dict[str, Any]:
        """`data_state` after `step` steps."""
        return data_state(*self._mixed(self.training.windows, self.config.seed, {}), step)

    def _mixed(self, windows: Windows, seed: int, robots: Mapping[str, Embodiment] | None) -> tuple[list[Part], Mixture]:
        if robots is None:
            robots = self.robots() if self.config.stage == "action" else {}
        parts = [_part(name, each, self.config, robots) for name, each in windows.items()]
        sizes = [len(each) for each in windows.values()]
        return parts, Mixture(sizes, self.training.phases, self.config.train.batch_size, seed)

    def _batches(
        self,
        parts: list[Part],
        mixture: Mixture,
        step: int,
        scales: bool = False,
        augmentation: Augmentation | None = None,
    ) -> Iterator[Batch]:
        return make_batches(
            parts,
            mixture,
            batch_size=self.config.train.batch_size,
            start_step=step,
            text=self.encode_text,
            decoder=self.config.decoder,
            rows=self.rows,
            workers=self.config.data.workers,
            skip_broken=self.config.data.skip_broken,
            scales=scales,
            augmentation=augmentation,
        )


def _open(config: ExperimentConfig, split: str, tokenizer: Tokenizer | None) -> Datasets:
    """What training reads of a split: frames, or the latents in their place that fit the tokenizer it uses."""
    datasets = open_datasets(config, split)
    if not config.data.latents:
        return datasets
    if tokenizer is None:
        raise ConfigError(
            f"config field 'data.latents' is {config.data.latents!r}; expected '', or the tokenizer that made it in `open`"
        )
    return datasets._replace(windows=with_latents(datasets.windows, config, split, tokenizer()))


def _part(name: str, windows: WindowDataset, config: ExperimentConfig, robots: Mapping[str, Embodiment]) -> Part:
    if not robots:
        return Part(name, windows)
    robot = of_dataset(robots, name)
    return Part(name, windows, robot.normalizers(config), robot.index)


def robots_of(windows: Windows) -> dict[str, list[str]]:
    """Robot → its datasets, both in the order of the datasets."""
    robots: dict[str, list[str]] = {}
    for name, each in windows.items():
        robots.setdefault(each.robot or name, []).append(name)
    return robots


def require_alike(windows: Windows) -> None:
    """Checks that datasets of one robot say the same of its actions and proprioception.

    Raises:
        ConfigError: naming two of them and the first thing that differs.
    """
    (first, one), *others = ((name, _described(each)) for name, each in windows.items())
    for other, two in others:
        for what, value in one.items():
            if two[what] != value:
                raise ConfigError(
                    f"datasets {first!r} and {other!r} are of one robot, {windows[first].robot or first!r}, but their {what} are "
                    f"{value!r} and {two[what]!r}; expected the same, or another robot in config field 'data.robots'"
                )


def _described(windows: WindowDataset) -> dict[str, Any]:
    episode = windows.episodes[0]
    assert episode.actions is not None and episode.proprio is not None  # of stage `action`
    return {
        "action widths": episode.actions.shape[1],
        "proprio widths": episode.proprio.shape[1],
        "action layouts": episode.action_layout,
        "dimensions that are not normalised": dict(windows.raw_dims),
    }


def find_embodiments(windows: Windows, config: DataConfig, hosts: Hosts = ONE_HOST) -> dict[str, Embodiment]:
    """The robots of datasets by name, numbered in their order, with statistics.

    Those of a robot are over all of its datasets as if they were one, so that a dataset counts by its steps; with
    `data.statistics` = "dataset" a robot of several datasets is several embodiments of one number, each with its own statistics.
    """
    found: dict[str, Embodiment] = {}
    for index, (robot, names) in enumerate(robots_of(windows).items()):
        apart = config.statistics == "dataset" and len(names) > 1
        for name, datasets in {f"{robot}/{each}": [each] for each in names}.items() if apart else [(robot, names)]:
            own = [windows[each] for each in datasets]
            content = "+".join(each.content for each in own)
            statistics = cached_statistics(_Joined(own), config, hosts, content)
            cameras = tuple(camera for camera in config.cameras if any(camera in each.cameras for each in own))
            found[name] = Embodiment(name, index, statistics, own[0].raw_dims, cameras, tuple(datasets))
    return found


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The episodes of several datasets, read anew whenever they are iterated over."""

    windows: Sequence[WindowDataset]

    def __iter__(self) -> Iterator[Episode]:
        return itertools.chain.from_iterable(each.episodes for each in self.windows)
