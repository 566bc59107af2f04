"""Collects demonstrations of a simulator's scripted experts as two RLDS datasets.

    python launch/collect.py --config=configs/quickstart.py --out=runs/quickstart/data --videos=80 --demonstrations=20

for every task of the experiment's `evaluation.tasks` in its `evaluation.simulator`, at its image size and control rate and in its
`evaluation.layout`.
`OUT/videos` holds action-free videos for stage 1 and `OUT/demonstrations` labelled episodes for stage 2, each with the splits
`train` and `val`; with --datasets=videos only the former. No episode is in two of these. A dataset that exists already is left as
it is. Plain tfds reads TFRecord by `tfds.builder_from_directory(PATH).as_dataset()`, and with --format=array_record ArrayRecord
by `.as_data_source()`.
"""

import concurrent.futures
import itertools
import pathlib
from collections.abc import Iterator

import experiment
from absl import flags

from data_pipelines.episode import Episode
from data_pipelines.sources.experts import demonstrations
from data_pipelines.workers import worker_processes
from data_pipelines.writers import VERSION, write_rlds
from mimic_video.config import ExperimentConfig
from mimic_video.evaluation.simulators import factories, with_expert
from mimic_video.progress import progress

_OUT = flags.DEFINE_string("out", None, "Folder for the datasets", required=True)
_VIDEOS = flags.DEFINE_integer("videos", 100, "Action-free episodes per task", lower_bound=1)
_DEMONSTRATIONS = flags.DEFINE_integer("demonstrations", 20, "Labelled episodes per task", lower_bound=1)
_DATASETS = flags.DEFINE_multi_enum("datasets", ["videos", "demonstrations"], ["videos", "demonstrations"], "Which are collected")
_FORMAT = experiment.define_format()
_VALIDATION = flags.DEFINE_integer("validation", 10, "Held-out episodes per task, of either dataset", lower_bound=1)

_FIRST_SEEDS = {
    ("videos", "train"): 0,
    ("videos", "val"): 100_000,
    ("demonstrations", "train"): 200_000,
    ("demonstrations", "val"): 300_000,
}


def episodes(
    config: ExperimentConfig, dataset: str, split: str, count: int, workers: concurrent.futures.Executor
) -> Iterator[Episode]:
    """`count` successful episodes of every task, with a progress bar."""
    evaluation, labelled = config.evaluation, dataset == "demonstrations"
    for task in evaluation.tasks:
        factory, seeds = with_expert(factories(config)(task)), itertools.count(_FIRST_SEEDS[dataset, split])
        source = demonstrations(factory, f"{evaluation.simulator}/{task}", seeds, workers, labelled, 4 * evaluation.workers)
        yield from progress(itertools.islice(source, count), total=count, desc=f"{dataset}/{split} {task}", unit="episode")


def main(config: ExperimentConfig) -> None:
    with worker_processes(config.evaluation.workers) as workers:
        _collect(config, workers)


def _collect(config: ExperimentConfig, workers: concurrent.futures.Executor) -> None:
    counts = {"videos": _VIDEOS.value, "demonstrations": _DEMONSTRATIONS.value}
    for dataset in _DATASETS.value:
        count, path = counts[dataset], pathlib.Path(_OUT.value) / dataset / VERSION
        if path.exists():
            print(f"{path} exists")
            continue
        splits = {
            "train": episodes(config, dataset, "train", count, workers),
            "val": episodes(config, dataset, "val", _VALIDATION.value, workers),
        }
        write_rlds(
            _OUT.value,
            dataset,
            splits,
            control_hz=config.data.control_hz,
            image_size=config.data.image_size,
            file_format=_FORMAT.value,
            description=f"Scripted experts of {config.evaluation.simulator}: {', '.join(config.evaluation.tasks)}",
        )


if __name__ == "__main__":
    experiment.run(main)
