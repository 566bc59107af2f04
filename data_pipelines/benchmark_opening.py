"""How long a split of many episodes takes to open, and how much memory, on made-up episodes of one grey pixel.

Each measurement is a process of its own: `python -m data_pipelines.benchmark_opening FOLDER WORKERS` opens the split, takes one
batch and prints a line of JSON.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from data_pipelines.assembly import TrainingData
from data_pipelines.sources.records import RecordWriter
from data_pipelines.writers import VERSION, SplitSize, shard_path, write_metadata
from mimic_video.config import experiment_from

_HZ, _PROPRIO, _ACTION = 5.0, 8, 7
_SHORTEST, _LONGEST = 20, 80  # steps of an episode, 50 on average
_INSTRUCTIONS = 5000  # different ones
_SHARD = 2500  # episodes, about 10 MB
_BARE = 100  # episodes of the split that a process opens which holds next to nothing
_SIZE = 16  # pixels, the least that a tokenizer takes
_EXPERIMENT: dict[str, Any] = {
    "stage": "action",
    "data": {"image_size": (_SIZE, _SIZE), "past_frames": 5, "future_frames": 4, "frame_cache_mb": 0},
    "text": {"rows": 8},
    "backbone": {"text_width": 8},
    "decoder": {"action_dim": _ACTION, "proprio_dim": _PROPRIO},
    "train": {"batch_size": 64},
}


def write_split(folder: Path, episodes: int) -> Path:
    """A prepared dataset of our own layout whose split `train` has so many episodes; its folder. Some 2,500 are made a second."""
    directory = folder / VERSION
    directory.mkdir(parents=True)
    lengths = []
    records = _records(episodes)
    for shard in range(-(-episodes // _SHARD)):
        with RecordWriter(shard_path(directory, folder.name, "train", "tfrecord", shard), "tfrecord") as writer:
            for record in itertools.islice(records, _SHARD):
                writer.write(record)
        lengths.append((writer.count, writer.num_bytes))
    size = SplitSize([count for count, _ in lengths], sum(size for _, size in lengths))
    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {
                        "image_primary": tfds.features.Image(shape=(_SIZE, _SIZE, 3), encoding_format="png"),
                        "proprio": tfds.features.Tensor(shape=(_PROPRIO,), dtype=np.float32),
                    },
                    "action": tfds.features.Tensor(shape=(_ACTION,), dtype=np.float32),
                    "language_instruction": tfds.features.Text(),
                }
            ),
            "episode_metadata": {"control_hz": tfds.features.Scalar(np.float32)},
        }
    )
    write_metadata(
        directory, folder.name, VERSION, features, {"train": size}, file_format="tfrecord", description="Made up of noise."
    )
    return directory


def _records(count: int) -> Iterator[bytes]:
    """tf.Examples: what all episodes of a length share is encoded once, since messages that follow each other are one."""
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.new("RGB", (_SIZE, _SIZE), (128, 128, 128)).save(file, "PNG")
    images = [
        _example(
            {
                "steps/observation/image_primary": _bytes([file.getvalue()] * length),
                "episode_metadata/control_hz": _floats(np.full(1, _HZ)),
            }
        )
        for length in range(_LONGEST + 1)
    ]
    for _ in range(count):
        length = int(random.integers(_SHORTEST, _LONGEST, endpoint=True))
        text = f"put object {random.integers(_INSTRUCTIONS)} on the shelf".encode()
        yield images[length] + _example(
            {
                "steps/observation/proprio": _floats(random.standard_normal(length * _PROPRIO, np.float32)),
                "steps/action": _floats(random.standard_normal(length * _ACTION, np.float32)),
                "steps/language_instruction": _bytes([text] * length),
            }
        )


def _example(features: dict[str, tf_feature_pb2.Feature]) -> bytes:
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString()


def _bytes(values: list[bytes]) -> tf_feature_pb2.Feature:
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))


def _floats(values: np.ndarray) -> tf_feature_pb2.Feature:
    return tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))


def measure_opening(episodes: int, workers: int) -> dict[str, Any]:
    """Seconds and MB that a split of so many episodes takes to open: the first time, which indexes it, and again.

    `open` is until everything is known that training asks for before its first batch, but for statistics; `first_batch` is what
    that takes then. `resident_mb` is of the process and its workers, mapped files included, over those of one that has opened a
    split of 100 episodes.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        directory = write_split(Path(folder) / "many", episodes)
        made = time.perf_counter() - start
        few = write_split(Path(folder) / "few", _BARE)
        bare, first, again = (_run(path, workers) for path in (few, directory, directory))
        windows = again.pop("windows")
    return {
        "episodes": episodes,
        "windows": windows,
        "workers": workers,
        "cores": len(os.sched_getaffinity(0)),
        "made_s": made,
        "first_open_s": first["open_s"],
        **{key: again[key] for key in ("open_s", "first_batch_s")},
        **{f"{key}_over_bare": again[key] - bare[key] for key in again if key.endswith("_mb")},
        "bare": {key: value for key, value in bare.items() if key != "windows"},
    }


def _run(directory: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "data_pipelines.benchmark_opening", os.fspath(directory), str(workers)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _memory() -> dict[str, float]:
    """MB of this process and its children: all that is resident, and what of it is of no file and so cannot be given back."""
    threads = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [str(os.getpid()), *(pid for thread in threads for pid in thread.read_text().split())]
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    sizes = {key: sum(int(line[1]) for line in lines if line[0] == f"{key}:") / 1024 for key in ("Pss", "Pss_File")}
    return {"resident_mb": sizes["Pss"], "own_mb": sizes["Pss"] - sizes["Pss_File"]}


def main(directory: str, workers: int) -> None:
    data = {**_EXPERIMENT["data"], "action_dataset": directory, "workers": workers}
    config = experiment_from(
        {**_EXPERIMENT, "backbone_run": "none", "data": data, "train": _EXPERIMENT["train"] | {"validate_every": 0}}
    )
    start = time.perf_counter()
    training = TrainingData(config).open()
    state = training.state(0)
    opened = time.perf_counter()
    batches = training.batches(0, {})  # with a name, since workers are there as long as it is
    next(batches)
    first = time.perf_counter()
    memory = _memory()
    (dataset,) = state["datasets"].values()
    print(json.dumps({"windows": dataset["windows"], "open_s": opened - start, "first_batch_s": first - opened, **memory}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
