"""Collects demonstrations of Meta-World's scripted experts as two RLDS datasets.

    python launch/collect.py --out=runs/quickstart/data --tasks=drawer-open-v3 --videos=100 --demonstrations=20

`OUT/videos` holds action-free videos for stage 1 and `OUT/demonstrations` labelled episodes for stage 2, each with the splits
`train` and `val`. No episode is in two of these. A dataset that exists already is left as it is.
"""

import itertools
import pathlib
from collections.abc import Iterator

from absl import app, flags
from tqdm import tqdm

from data_pipelines.episode import Episode
from data_pipelines.sources.metaworld import demonstrations
from data_pipelines.writers import VERSION, write_rlds

_OUT = flags.DEFINE_string("out", None, "Folder for the datasets", required=True)
_TASKS = flags.DEFINE_list("tasks", None, "Meta-World tasks", required=True)
_VIDEOS = flags.DEFINE_integer("videos", 100, "Action-free episodes per task", lower_bound=1)
_DEMONSTRATIONS = flags.DEFINE_integer("demonstrations", 20, "Labelled episodes per task", lower_bound=1)
_VALIDATION = flags.DEFINE_integer("validation", 10, "Held-out episodes per task, of either dataset", lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Height and width in pixels", lower_bound=16)
_WORKERS = flags.DEFINE_integer("workers", 2, "Simulator processes", lower_bound=1)

CONTROL_HZ = 20.0
_FIRST_SEEDS = {("videos", "train"): 0, ("videos", "val"): 100_000, ("demonstrations", "train"): 200_000, ("demonstrations", "val"): 300_000}


def episodes(dataset: str, split: str, count: int) -> Iterator[Episode]:
    """`count` successful episodes of every task, with a progress bar."""
    size = (_IMAGE_SIZE.value, _IMAGE_SIZE.value)
    for task in _TASKS.value:
        seeds = itertools.count(_FIRST_SEEDS[dataset, split])
        source = demonstrations(task, seeds, size, labelled=dataset == "demonstrations", num_workers=_WORKERS.value)
        yield from tqdm(itertools.islice(source, count), total=count, desc=f"{dataset}/{split} {task}", unit="episode")


def main(_: list[str]) -> None:
    counts = {"videos": _VIDEOS.value, "demonstrations": _DEMONSTRATIONS.value}
    for dataset, count in counts.items():
        path = pathlib.Path(_OUT.value) / dataset / VERSION
        if path.exists():
            print(f"{path} exists")
            continue
        splits = {"train": episodes(dataset, "train", count), "val": episodes(dataset, "val", _VALIDATION.value)}
        write_rlds(
            _OUT.value, dataset, splits, control_hz=CONTROL_HZ, image_size=(_IMAGE_SIZE.value, _IMAGE_SIZE.value),
            description=f"Scripted experts of Meta-World: {', '.join(_TASKS.value)}",
        )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
