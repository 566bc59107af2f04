"""Converts a prepared RLDS dataset between TFRecord and ArrayRecord, with fewer cameras, other images and shorter records.

    python launch/convert_dataset.py --source=/data/bridge_orig/1.0.0 --out=/data/converted --dataset=bridge_orig \\
        --camera=primary --image_size=480x640
    python launch/convert_dataset.py --source=/data/converted/bridge_orig/1.0.0 --out=/data/array_record --format=array_record \\
        --chunk_steps=64

writes OUT/NAME/VERSION, which plain tfds reads: TFRecord by `tfds.builder_from_directory(PATH).as_dataset()`, as other loaders
do, and ArrayRecord by `.as_data_source()`. What is not an image is kept bit for bit, so a dataset of the registry is read by the
same entry as before, and images that change neither size nor --jpeg_quality are copied as they are. Every shard is read back and
compared with its source. The same command continues after an interruption. --register runs a Python file first, which registers a
dataset of your own; --robot names whose episodes they are, for training on several datasets of one robot.

A window reads the whole of every ArrayRecord record that it touches, and of TFRecord little more than its own frames. For
ArrayRecord choose --chunk_steps about as long as a window, in steps of the dataset. Pieces do not overlap: training joins them
again, and loses no window at their borders.
"""

import os
import runpy

import experiment
from absl import flags

from data_pipelines.episode import CAMERAS
from data_pipelines.oxe import registry
from data_pipelines.rewrite import Conversion, convert_rlds
from data_pipelines.sources.rlds import RldsSource, open_dataset

_SOURCE = flags.DEFINE_string("source", None, "Prepared dataset, .../NAME/VERSION", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder that holds one folder per dataset", required=True)
_FORMAT = experiment.define_format()
_DATASET = flags.DEFINE_string("dataset", None, "Entry of the registry, if the dataset has not our own layout")
_REGISTER = flags.DEFINE_string("register", None, "Python file that registers a dataset, such as configs/my_robot.py")
_ROBOT = flags.DEFINE_string("robot", "", "Name of the robot; what the source says by default")
_CAMERAS = flags.DEFINE_multi_string("camera", None, "Image to keep: primary, secondary, wrist, or a key; all by default")
_IMAGE_SIZE = experiment.define_size("image_size", None, "Size to resize to; as recorded by default")
_QUALITY = flags.DEFINE_integer("jpeg_quality", None, "Encode images anew with this quality", lower_bound=1, upper_bound=100)
_CHUNK = flags.DEFINE_integer("chunk_steps", None, "Longest record, in steps; without it episodes stay whole", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes", lower_bound=1)


def camera_keys(spec: registry.DatasetSpec | None) -> tuple[str, ...] | None:
    """Keys of the images to keep. Raises ValueError for a camera that the dataset's entry has not."""
    if _CAMERAS.value is None:
        return None
    roles = {camera: getattr(spec, camera) if spec else f"image_{camera}" for camera in CAMERAS}
    for camera in _CAMERAS.value:
        if roles.get(camera, camera) is None:
            raise ValueError(f"--camera={camera} is one that '{_DATASET.value}' has not got")
    return tuple(roles.get(camera, camera) for camera in _CAMERAS.value)


def main() -> None:
    if _REGISTER.value:
        runpy.run_path(_REGISTER.value)
    spec = registry.find(_DATASET.value) if _DATASET.value else None
    conversion = Conversion(
        file_format=_FORMAT.value,
        cameras=camera_keys(spec),
        image_size=_IMAGE_SIZE.value,
        jpeg_quality=_QUALITY.value,
        chunk_steps=_CHUNK.value,
        robot=_ROBOT.value,
    )
    path = convert_rlds(
        _SOURCE.value,
        _OUT.value,
        conversion,
        processes=_WORKERS.value,
        progress=lambda split, done, total: print(f"{split}: {done} of {total} shards", flush=True),
    )
    dataset = open_dataset(path)
    print(f"wrote {path}")
    for split in dataset.info.splits:
        records = f"{split}: {dataset.info.splits[split].num_examples} records"
        if spec is None and "image_primary" not in dataset.features["steps"]["observation"]:
            print(records)
        else:
            source = RldsSource(path, split, spec=spec, image_size=_IMAGE_SIZE.value)  # builds the index
            print(f"{records}, {len(source)} episodes")


if __name__ == "__main__":  # DatasetError is a ValueError
    experiment.run(main, (ValueError, OSError, ModuleNotFoundError), config=False, compilation_cache=None)
