"""Measures the loader on made-up episodes of JPEG frames, beside OpenCV and tf.data; prints one JSON line.

    python launch/benchmark_data.py [--image_size=480x640] [--workers=0] [--windows=240] [--memory_windows=20000]

Readers take random windows of 61 frames of the same dataset in turns, each with the machine to itself and as many threads as it
has cores: the loader; OpenCV, which decodes frames that are in memory already to RGB, in one array a window, and resizes them
with INTER_AREA if --image_size is not what was recorded; and plain tfds with tf.data (`data_pipelines/benchmark_tfdata.py`).
`ratio_to_*` is the loader's frames per second over theirs; of tf.data they are null without TensorFlow. `opencv_pillow` is OpenCV
with the loader's own way of resizing, an antialiased bilinear filter. `augmented`, with --augment, is the loader with random
crops and colours (`data.augmentation`).

`memory` is of the process and its workers while --memory_windows windows of --memory_size pass, averaged over each twentieth
after one to warm up: the first in MB, and the last and the largest over the first.

    python launch/benchmark_data.py --source=/data/my_recording [--image_size=96x128]

measures videos of a LeRobot dataset in place of made-up episodes: the loader reads random windows of 17 frames, as in training,
beside PyAV that decodes the same frames to RGB and does nothing else (`data_pipelines/benchmark_video.py`), in turns; `memory`
is that of such windows.

    python launch/benchmark_data.py --split_episodes=200000 [--workers=0]

makes a split of so many episodes of a grey pixel, and measures the seconds and the memory that opening it takes, the first time
and again (`data_pipelines/benchmark_opening.py`).
"""

import json
import pathlib
from typing import Any

import experiment
from absl import flags

from data_pipelines.benchmark import Settings, measure
from data_pipelines.sources.records import DatasetError
from mimic_video.analysis.provenance import provenance

_SOURCE = flags.DEFINE_string("source", None, "Folder of a LeRobot dataset, whose videos are read in place of made-up frames")
_RECORDED_SIZE = experiment.define_size("recorded_size", (480, 640), "Size of recorded frames")
_IMAGE_SIZE = experiment.define_size("image_size", None, "Size that windows have; as recorded by default")
_WORKERS = flags.DEFINE_integer("workers", 0, "The loader's processes; 0 is threads", lower_bound=0)
_WINDOWS = flags.DEFINE_integer("windows", 240, "Windows that each reader reads", lower_bound=8)
_EPISODES = flags.DEFINE_integer("episodes", 20, "Episodes of 100 frames", lower_bound=1)
_FORMAT: flags.FlagHolder[Any] = flags.DEFINE_enum("format", "tfrecord", ["tfrecord", "array_record"], "Of the dataset")
_MEMORY_WINDOWS = flags.DEFINE_integer("memory_windows", 0, "Windows to watch memory over; 0 leaves it out", lower_bound=0)
_MEMORY_SIZE = experiment.define_size("memory_size", (96, 128), "Size of those")
_SPLIT_EPISODES = flags.DEFINE_integer("split_episodes", 0, "Episodes of a split that is opened and no more", lower_bound=0)
_AUGMENT = flags.DEFINE_bool("augment", False, "Also measures the loader with random crops and colours")


def main() -> None:
    if _SOURCE.value:
        from data_pipelines.benchmark_video import measure_source  # PyAV is for such datasets alone

        measured = pathlib.Path(_SOURCE.value), _WINDOWS.value, _WORKERS.value, _IMAGE_SIZE.value, _MEMORY_WINDOWS.value
        result = measure_source(*measured)
        print(json.dumps({**provenance(), **result}))
        return
    if _SPLIT_EPISODES.value:
        from data_pipelines.benchmark_opening import measure_opening  # which needs JAX

        result = measure_opening(_SPLIT_EPISODES.value, _WORKERS.value)
        print(json.dumps({**provenance(), **result}))
        return
    settings = Settings(
        recorded_size=_RECORDED_SIZE.value,
        image_size=_IMAGE_SIZE.value or _RECORDED_SIZE.value,
        episodes=_EPISODES.value,
        windows=_WINDOWS.value,
        workers=_WORKERS.value,
        format=_FORMAT.value,
        memory_windows=_MEMORY_WINDOWS.value,
        memory_size=_MEMORY_SIZE.value,
        augment=_AUGMENT.value,
    )
    print(json.dumps({**provenance(), **measure(settings)}))


if __name__ == "__main__":
    experiment.run(main, (DatasetError,), config=False, compilation_cache=None)
