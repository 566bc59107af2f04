"""Every published format comes out in one form of batch, with actions that are known by hand."""

import subprocess
import sys
from math import cos, sin
from pathlib import Path

import foreign_formats
import numpy as np
import oxe_schemas
import pytest
from oxe_schemas import COMMAND, ROLL, STEPS, YAW, position, turn

from data_pipelines.datasets import open_datasets
from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.oxe import registry
from data_pipelines.sources.lerobot import LeRobotSource
from data_pipelines.writers import write_rlds
from mimic_video.batch import fields
from mimic_video.config import ExperimentConfig, experiment_from

SIZE = (32, 48)
ANCHOR = 2
LEROBOT = ("v2.1", "v3.0")
RATES = {name: registry.find(name).control_hz for name in oxe_schemas.SCHEMAS} | dict.fromkeys(LEROBOT, 10.0)
FORMATS = ("array_record", pytest.param("tfrecord", marks=pytest.mark.reference))  # which TensorFlow has to write


def experiment(name: str, dataset: str, root: Path) -> ExperimentConfig:
    """Windows of 1 + 4 frames and two actions, one and two steps after the anchor."""
    hz = RATES[name]
    window = {
        "image_size": SIZE,
        "past_frames": 1,
        "future_frames": 4,
        "video_hz": hz,
        "control_hz": hz,
        "action_horizon": 2,
        "action_delay": 1 / hz,
    }
    decoder = {"action_dim": 10, "proprio_dim": 10, "embodiments": len(RATES)}
    data = window | {"action_dataset": dataset, "root": str(root)}
    return experiment_from({"stage": "action", "data": data, "decoder": decoder, "policy": {"execute_steps": 2}})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """`datasets(file_format)` → the windows of every source by its name."""
    opened = {}

    def open_all(file_format: str) -> dict[str, WindowDataset]:
        if file_format not in opened:
            opened[file_format] = _open_all(tmp_path_factory.mktemp(file_format), file_format)
        return opened[file_format]

    return open_all


def _open_all(root: Path, file_format: str) -> dict[str, WindowDataset]:
    if file_format == "tfrecord":
        subprocess.run([sys.executable, oxe_schemas.__file__, root, file_format], check=True, capture_output=True)
    else:
        for name in oxe_schemas.SCHEMAS:
            oxe_schemas.write(root, name, file_format)
    parts = {name: f"{name}*1" for name in oxe_schemas.SCHEMAS}  # "bridge" alone is the mixture of that name
    for version in LEROBOT:
        source = foreign_formats.write_lerobot(root / f"lerobot {version}", version, (9,))
        episodes = LeRobotSource(source, cameras={"primary": foreign_formats.TOP})
        path = write_rlds(
            root,
            f"lerobot_{version.replace('.', '_')}",
            {"train": episodes},
            control_hz=10.0,
            image_size=SIZE,
            description="",
            file_format=file_format,
        )
        parts[version] = str(path)
    return {
        name: next(iter(open_datasets(experiment(name, part, root), "train").windows.values())) for name, part in parts.items()
    }


@pytest.fixture(scope="module", params=FORMATS)
def rows(request, datasets):
    """The row of the window at step `ANCHOR` of every source, from a stream of batches that mixes all of them."""
    windows = datasets(request.param)
    parts = [Part(name, each) for name, each in windows.items()]
    mixture = Mixture([len(each) for each in windows.values()], [Phase(0, (1.0,) * len(parts))], 8, seed=0)
    stream = make_batches(
        parts,
        mixture,
        batch_size=8,
        start_step=0,
        text=lambda words: np.full((2, 3), len(words), np.float32),
        decoder=experiment("bridge", "bridge", Path()).decoder,
    )
    found: dict[str, dict[str, np.ndarray]] = {}
    names = list(windows)
    for _ in range(1024 // 8):  # a block has every window of each dataset several times
        batch = next(stream)
        assert {key: (value.shape, value.dtype.name) for key, value in fields(batch).items()} == {
            "video": ((8, 1, 5, *SIZE, 3), "uint8"),
            "frame_mask": ((8, 5), "bool"),
            "text": ((8, 2, 3), "float32"),
            "proprio": ((8, 1, 10), "float32"),
            "actions": ((8, 2, 10), "float32"),
            "action_mask": ((8, 2), "bool"),
            "action_dims": ((8, 10), "bool"),
            "embodiment": ((8,), "int32"),
        }
        for row in range(8):
            name = names[batch.observation.embodiment[row]]
            x = ANCHOR if name in LEROBOT else position(ANCHOR)[0]
            if abs(batch.observation.proprio[row, 0, 0] - x) < 1e-3:
                found[name] = {key: value[row] for key, value in fields(batch).items()}
    return found


# By hand. A pose layout: the change from the anchor, 0.02 m along the base's x and 0.1 rad about its z a step, as the hand sees
# it, whose x and y axes are turned by the angle t about that z.
t = turn(ANCHOR)
DROID = [
    [0.02 * n * cos(t), -0.02 * n * sin(t), 0, cos(0.1 * n), -sin(0.1 * n), 0, sin(0.1 * n), cos(0.1 * n), 0, 0.75]
    for n in (3, 4)
]  # a command is two steps ahead
# Of BridgeData the hand's axes are further turned: its z is the x and its −x is the z of that frame.
BRIDGE = [
    [0, -0.02 * n * sin(t), 0.02 * n * cos(t), 1, 0, 0, 0, cos(0.1 * n), sin(0.1 * n), gripper] for n, gripper in ((1, 1), (2, 0))
]  # commanded at steps 2 and 3
# A delta layout: rows of the rotation first by ROLL about x, then by YAW about z.
TURNED = [cos(YAW), -sin(YAW) * cos(ROLL), sin(YAW) * sin(ROLL), sin(YAW), cos(YAW) * cos(ROLL), -cos(YAW) * sin(ROLL)]
ABOUT_Z = [cos(YAW), -sin(YAW), 0, sin(YAW), cos(YAW), 0]
UNTURNED = [1, 0, 0, 0, 1, 0]
HAND = [cos(t), -sin(t), 0, sin(t), cos(t), 0]
# Rz(t) times the tool's matrix, whose rows are (0, 0, 1), (0, 1, 0), (−1, 0, 0).
BRIDGE_HAND = [*position(ANCHOR), 0, -sin(t), cos(t), 0, cos(t), sin(t), 0.75]
PADDING = [0.0] * 7

ACTIONS = {
    "bridge": BRIDGE,
    "bridge_orig": BRIDGE,
    "fractal20220817_data": [[*COMMAND, *TURNED, 0]] * 2,  # closed at step 3, and left so
    "kuka": [[*COMMAND, *TURNED, 0]] * 2,
    "droid": DROID,
    "libero_spatial_no_noops": [[*COMMAND, *ABOUT_Z, 0]] * 2,
    "taco_play": [[*COMMAND, *TURNED, 0]] * 2,
    "language_table": [[0.1, -0.2, 0, *UNTURNED, 1]] * 2,
    **{version: [[k + 0.5, k + 0.75, k + 1.0, *PADDING] for k in (3, 4)] for version in LEROBOT},
}
PROPRIO = {
    "bridge": BRIDGE_HAND,
    "bridge_orig": BRIDGE_HAND,
    "fractal20220817_data": [*position(ANCHOR), *HAND, 0.75],
    "kuka": [*position(ANCHOR), *HAND, 0.75],
    "droid": [*position(ANCHOR), *HAND, 0],
    "libero_spatial_no_noops": [*position(ANCHOR), *HAND, 0.75],
    "taco_play": [*position(ANCHOR), *HAND, 1],
    "language_table": [*position(ANCHOR)[:2], *[0] * 8],
    **{version: [2, 2.25, 2.5, *PADDING] for version in LEROBOT},
}
CAMERA = {"taco_play": 1}  # place of the primary camera among all by name, where it is not the first


@pytest.mark.parametrize("name", RATES)
def test_every_published_format_streams_as_the_same_batches(rows, name):
    row = rows[name]
    np.testing.assert_allclose(row["actions"], ACTIONS[name], atol=1e-5)
    np.testing.assert_allclose(row["proprio"], [PROPRIO[name]], atol=1e-5)
    recorded = name in LEROBOT
    np.testing.assert_array_equal(row["action_dims"], np.arange(10) < (3 if recorded else 10))
    steps = np.arange(ANCHOR, ANCHOR + 5)
    greys = [foreign_formats.grey(0, k) for k in steps] if recorded else 30 * steps + CAMERA.get(name, 0)
    np.testing.assert_allclose(row["video"][0].mean((1, 2, 3)), greys, atol=3 if recorded else 1)
    assert row["frame_mask"].all() and row["action_mask"].all()
    words = foreign_formats.TASKS[0] if recorded else oxe_schemas.instruction(name, 0)
    assert row["text"][0, 0] == len(words)


@pytest.mark.reference
@pytest.mark.parametrize("name", RATES)
def test_both_file_formats_hold_the_same_windows(datasets, name):
    arrays, records = (datasets(file_format)[name] for file_format in ("array_record", "tfrecord"))
    assert len(arrays) == len(records) == (8 if name in LEROBOT else STEPS - 1)
    for key, value in arrays[ANCHOR].items():
        np.testing.assert_array_equal(records[ANCHOR][key], value)
