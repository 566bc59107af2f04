"""Imports other people's recordings as an RLDS dataset, which this project trains from and plain tfds reads.

    python launch/import_dataset.py --source_format=lerobot --source=/data/my_recording --out=data \\
        --camera=primary=observation.images.top --camera=wrist=observation.images.wrist --validation_share=0.05
    python launch/import_dataset.py --source_format=libero --source=/data/libero_goal --out=data --image_size=480x640
    python launch/import_dataset.py --source_format=bridge --source=/data/bridge/raw --out=data --skip_damaged

writes `OUT/NAME/1.0.0` with the splits `train` and `val`. Plain tfds reads it by
`tfds.builder_from_directory(PATH).as_dataset()`, as other loaders do; with --format=array_record by `.as_data_source()`. Formats:
LeRobot folders of v2.0 to v3.0; HDF5 demonstrations of LIBERO; raw folders of Bridge v2 (data_pipelines/sources). The dataset
appears whole or not at all, so after an interruption the same command starts anew. What is left out is counted and named by
reason. --robot names whose episodes they are, for training on several datasets of one robot.

Steps are stored at one rate. Episodes whose time stamps are not at that rate are resampled: images, joints and commands as the
nearest step has them, poses interpolated (SPEC 8.3).
"""

import pathlib
from typing import Any

import experiment
from absl import flags

from data_pipelines.importing import FORMATS, dataset_name, import_dataset
from data_pipelines.sources.rlds import DatasetError

_SOURCE_FORMAT = flags.DEFINE_enum("source_format", None, list(FORMATS), "Of the source", required=True)
_SOURCE = flags.DEFINE_string("source", None, "Folder, or one file, to import", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the dataset's folder", required=True)
_DATASET = flags.DEFINE_string("dataset", None, "Name of the dataset, in snake_case; by default made from the source's name")
_IMAGE_SIZE = experiment.define_size("image_size", None, "Of stored images; by default that of the primary camera")
_JPEG_QUALITY = flags.DEFINE_integer("jpeg_quality", 95, "Of stored images", lower_bound=1, upper_bound=100)
_CONTROL_HZ = flags.DEFINE_float("control_hz", None, "Steps per second; by default the source's own (Bridge: 5)")
_VALIDATION = flags.DEFINE_float("validation_share", 0.0, "Of the episodes, goes to `val`", lower_bound=0.0, upper_bound=0.9)
_FORMAT = experiment.define_format()
_ROBOT = flags.DEFINE_string("robot", "", "Name of the robot; empty leaves it to the experiment")
_SKIP_DAMAGED = flags.DEFINE_bool("skip_damaged", False, "Leave damaged episodes out instead of giving up")

_OWN = {
    "camera": flags.DEFINE_multi_string("camera", None, "ROLE=KEY: primary, secondary or wrist, and a feature or image folder"),
    "state": flags.DEFINE_string("state", None, "Feature of the proprioception; empty for none"),
    "action": flags.DEFINE_string("action", None, "Feature of the actions; empty for none"),
    "action_layout": flags.DEFINE_enum("action_layout", None, ["vector", "delta", "pose"], "What actions are, see Episode"),
    "upside_down": flags.DEFINE_bool("upside_down", None, "Whether images are to be rotated by 180 degrees"),
    "instructions": flags.DEFINE_enum("instructions", None, ["published", "recorded"], "From file names, or from the files"),
    "default_instruction": flags.DEFINE_string("default_instruction", None, "Where no label is usable"),
}


def source_options() -> dict[str, Any]:
    """Arguments of the format's source from its own flags. Raises DatasetError for a flag of another format."""
    options: dict[str, Any] = {name: flag.value for name, flag in _OWN.items() if flag.value is not None}
    for name in options:
        if name not in FORMATS[_SOURCE_FORMAT.value][1]:
            raise DatasetError(f"--{name} does not apply to --source_format={_SOURCE_FORMAT.value}")
    if "camera" in options:
        pairs = [camera.partition("=") for camera in options.pop("camera")]
        for role, equals, key in pairs:
            if not (role and equals and key):
                raise DatasetError(f"--camera={role}{equals}{key}; expected ROLE=KEY, e.g. primary=observation.images.top")
        if len({role for role, _, _ in pairs}) != len(pairs):
            raise DatasetError(f"--camera names a role twice: {', '.join(role for role, _, _ in pairs)}")
        options["cameras"] = {role: key for role, _, key in pairs}
    for name in ("state", "action"):
        if options.get(name) == "":
            options[name] = None
    return options | {"skip_damaged": _SKIP_DAMAGED.value}


def main() -> None:
    options = source_options()
    import_dataset(
        FORMATS[_SOURCE_FORMAT.value][0](_SOURCE.value, **options),
        _OUT.value,
        dataset_name(_SOURCE.value) if _DATASET.value is None else _DATASET.value,
        description=f"Imported from {_SOURCE_FORMAT.value}: {pathlib.Path(_SOURCE.value).name}",
        control_hz=_CONTROL_HZ.value,
        image_size=_IMAGE_SIZE.value,
        jpeg_quality=_JPEG_QUALITY.value,
        file_format=_FORMAT.value,
        robot=_ROBOT.value,
        validation_share=_VALIDATION.value,
        cameras=list(options.get("cameras", ())),
        skip_damaged=_SKIP_DAMAGED.value,
    )


if __name__ == "__main__":  # DatasetError is a ValueError
    experiment.run(main, (FileExistsError, ModuleNotFoundError, ValueError), config=False, compilation_cache=None)
