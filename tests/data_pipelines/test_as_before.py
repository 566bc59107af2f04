"""Windows, batches and fingerprints of splits are those of the time when every episode was read when a split was opened.

Recorded by commit 5ae5273: runs from before go on with the same samples only if all of these numbers stay.
"""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from synthetic import SIZE, step_episode
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import Gripper, Values, vector
from data_pipelines.sources.records import RecordWriter, open_records
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds
from mimic_video.batch import fields
from mimic_video.config import ActionDecoderConfig, DataConfig

LENGTHS = (12, 20, 9, 1, 15, 12)
CONFIG = {"image_size": SIZE, "past_frames": 1, "future_frames": 4, "video_hz": 10.0, "action_horizon": 4, "control_hz": 10.0}
SPEC = DatasetSpec(
    name="steps",
    primary="image_primary",
    control_hz=10.0,
    features={"observation/proprio": (3,), "action": (2,)},
    proprio=vector(Values("observation/proprio[0:2]", scale=0.125, plus="action[0:2]")),
    actions=vector(Values("action[0:1]"), Gripper("observation/proprio[2:3]", closed=0.0, open=500.0, binary=True)),
)
# Of each case the options of source and configuration, and what was recorded: windows, content, the first samples as
# 100 · episode + step, and a hash of all low-dimensional values and masks of 40 batches.
CASES = {
    "own layout": (
        {},
        {"action_delay": 0.1},
        (63, "5a06fa2f42ca2d3b9632864601470341", [100, 8, 504, 207, 204, 405], "a679f7261f5722317c5669db"),
    ),
    "without a delay": (
        {},
        {"action_delay": 0.0},
        (69, "5a06fa2f42ca2d3b9632864601470341", [412, 200, 300, 503, 114, 403], "2a760979c38e6dd52166da46"),
    ),
    "another grid": (
        {},
        {"action_delay": 0.25, "control_hz": 7.0, "video_hz": 3.0},
        (54, "5a06fa2f42ca2d3b9632864601470341", [102, 8, 502, 405, 402, 411], "ea5bec1191c617aa1d755486"),
    ),
    "slices": (
        {"split": "train[3:]+train[:2]"},
        {"action_delay": 0.1},
        (55, "64810fb7c0b4e99f0e9aa10d261f2835", [411, 408, 111, 101, 9, 107], "36a1ad00363203abec156732"),
    ),
    "an entry of the registry": (
        {"spec": SPEC},
        {"action_delay": 0.1},
        (63, "6204cdc2e5d3c0b7647ac9397b14756b", [], "72da852712610ea3b0680d1f"),
    ),
    "broken episodes": (
        {"split": "broken"},
        {"action_delay": 0.1, "skip_broken": True},
        (55, "c3cad897eab1a305262878bc79148bcd", [100, 8, 503, 407, 404, 413], "960c88d73b5caa4aec2f3eaa"),
    ),
}


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def directory(request, tmp_path_factory):
    """Episodes of two rates and with changing instructions; in the split `broken`, one has a value that is not a number."""
    episodes = [step_episode(length, episode=number) for number, length in enumerate(LENGTHS)]
    episodes[1] = dataclasses.replace(episodes[1], instruction=("wait",) * 3 + ("reach",) * 17)
    path = write_rlds(
        tmp_path_factory.mktemp("as_before"),
        "steps",
        {"train": episodes, "broken": episodes},
        control_hz=10.0,
        image_size=SIZE,
        description="Steps that count.",
        file_format=request.param,
    )
    for split in ("train", "broken"):
        (shard,) = path.glob(f"*-{split}.*")
        file = open_records(str(shard), request.param)
        records = [tf_example_pb2.Example.FromString(bytes(file.read(i))) for i in range(len(file))]
        records[4].features.feature["episode_metadata/control_hz"].float_list.value[0] = 5.0
        if split == "broken":
            records[2].features.feature["steps/action"].float_list.value[3] = np.nan
        with RecordWriter(shard, request.param) as writer:
            for record in records:
                writer.write(record.SerializeToString())
    return path


def batches(windows, count):
    width = {"action_dim": windows.action_dim, "proprio_dim": windows[0]["proprio"].shape[-1]}
    stream = make_batches(
        [Part("steps", windows)],
        Mixture([len(windows)], [Phase(0, (1.0,))], 8, seed=3),
        batch_size=8,
        start_step=0,
        text=lambda text: np.frombuffer(text.encode().ljust(16), np.uint8)[None].astype(np.float32),
        decoder=ActionDecoderConfig(**width),
    )
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("name", CASES)
def test_everything_is_as_before(directory, name):
    (options, data, expected) = CASES[name]
    source = RldsSource(directory, options.get("split", "train"), spec=options.get("spec"))
    config = DataConfig(**CONFIG | data)
    windows = WindowDataset(source, config, actions=True)
    digest, ids = hashlib.sha256(), []
    for batch in batches(windows, 40):
        for key, value in sorted(fields(batch).items()):
            if key != "video":  # whose JPEGs another library decodes otherwise
                digest.update(f"{key} {value.dtype} {value.shape}".encode() + value.tobytes())
        if name != "an entry of the registry":
            ids += batch.observation.proprio[:, 0, 0].astype(int).tolist()
            shades = batch.observation.video[:, 0, 0, 0, 0, 0].astype(int)
            assert np.abs(shades - 4 * (np.array(ids[-8:]) % 100)).max() <= 1
    found = (len(windows), windows.content, ids[:6], digest.hexdigest()[:24])
    assert found == expected
