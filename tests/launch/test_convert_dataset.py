"""launch/convert_dataset.py as a user runs it, and what its mistakes say."""

import io
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from PIL import Image

from data_pipelines.oxe import registry
from data_pipelines.sources.records import RecordWriter
from data_pipelines.sources.rlds import RldsSource, open_dataset
from data_pipelines.writers import SplitSize, shard_path, write_metadata, write_rlds


@pytest.fixture
def own(tmp_path):
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)], "val": [tiny.episode(9, 2)]}
    return write_rlds(tmp_path / "data", "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")


@pytest.fixture
def bridge(tmp_path):
    """Two episodes with the features that the registry expects of bridge_orig, and one that it does not know."""
    folder = tmp_path / "data" / "bridge_orig" / "1.0.0"
    folder.mkdir(parents=True)
    cameras = {f"image_{k}": tfds.features.Image(shape=(12, 16, 3), encoding_format="jpeg") for k in range(2)}
    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": cameras | {"state": tfds.features.Tensor(shape=(7,), dtype=np.float32)},
                    "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
                    "language_instruction": tfds.features.Text(),
                    "is_first": tfds.features.Scalar(np.bool_),
                    "language_embedding": tfds.features.Tensor(shape=(5,), dtype=np.float32),
                }
            ),
        }
    )
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(file, "JPEG")
    with RecordWriter(shard_path(folder, "bridge_orig", "train", "tfrecord", 0), "tfrecord") as writer:
        for number in range(2):
            writer.write(
                features.serialize_example(
                    {
                        "steps": [
                            {
                                "observation": {key: io.BytesIO(file.getvalue()) for key in cameras}
                                | {"state": rng.uniform(0, 1, 7).astype(np.float32)},
                                "action": rng.uniform(0, 1, 7).astype(np.float32),
                                "language_instruction": f"task {number}",
                                "is_first": k == 0,
                                "language_embedding": rng.normal(size=5).astype(np.float32),
                            }
                            for k in range(10)
                        ]
                    }
                )
            )
    write_metadata(folder, "bridge_orig", "1.0.0", features, {"train": SplitSize([2], 0)}, file_format="tfrecord", description="")
    return folder


def test_own_datasets(launch, own, tmp_path):
    output = launch(
        "convert_dataset",
        f"--source={own}",
        f"--out={tmp_path / 'out'}",
        "--format=tfrecord",
        "--workers=1",
        "--camera=primary",
        "--image_size=8x10",
        "--chunk_steps=4",
    )
    path = tmp_path / "out" / "tiny" / "1.0.0"
    assert f"wrote {path}\n" in output and "train: 8 records, 2 episodes" in output and "val: 3 records, 1 episodes" in output
    assert open_dataset(path).file_format == "tfrecord"
    source = RldsSource(path, "train")
    assert source.image_size == (8, 10) and len(source[0]) == 15
    np.testing.assert_array_equal(source[1].actions, RldsSource(own, "train")[1].actions)


def test_datasets_of_the_registry(launch, bridge, tmp_path):
    output = launch(
        "convert_dataset",
        f"--source={bridge}",
        f"--out={tmp_path / 'out'}",
        "--dataset=bridge_orig",
        "--camera=primary",
        "--workers=2",
    )
    assert "train: 2 records, 2 episodes" in output
    spec = registry.find("bridge_orig")
    before, after = (RldsSource(path, "train", spec=spec)[1] for path in (bridge, tmp_path / "out" / "bridge_orig" / "1.0.0"))
    np.testing.assert_array_equal(after.actions, before.actions)
    np.testing.assert_array_equal(after.proprio, before.proprio)
    np.testing.assert_array_equal(after.frames.take([3]), before.frames.take([3]))
    assert before.further_cameras and not after.further_cameras


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera=top"], "has no image 'steps/observation/top'"),
        (["--camera=wrist"], "has no image 'steps/observation/image_wrist'"),
        (["--image_size=8"], "--image_size=8: expected HEIGHTxWIDTH"),
        (["--image_size=8xx"], "--image_size=8xx: expected HEIGHTxWIDTH"),
        (["--image_size=8x0"], "--image_size=8x0: expected HEIGHTxWIDTH"),
        (["--dataset=bridge_orgi"], "no dataset 'bridge_orgi' is registered; the nearest are .*'bridge_orig'"),
        (["--dataset=bridge_orig", "--camera=wrist"], "--camera=wrist is one that 'bridge_orig' has not got"),
        (["--source=nowhere"], "dataset directory nowhere does not exist"),
        (["--format=riegeli"], "riegeli"),
    ],
)
def test_the_message_names_the_mistake(launch, own, tmp_path, arguments, message):
    output = launch("convert_dataset", f"--source={own}", f"--out={tmp_path / 'out'}", *arguments)
    assert re.search(message, output)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_kept(launch, own, tmp_path):
    launch("convert_dataset", f"--source={own}", f"--out={tmp_path / 'out'}", "--workers=1")
    output = launch("convert_dataset", f"--source={own}", f"--out={tmp_path / 'out'}", "--workers=1")
    assert re.search(r"error: dataset .*tiny/1\.0\.0 exists already", output)


def test_the_robot_and_an_entry_of_ones_own(launch, bridge, own, tmp_path, monkeypatch):
    """Bridge's dataset under the name of an entry that only a file of the user's registers."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    output = launch("convert_dataset", f"--source={own}", f"--out={tmp_path / 'out'}", "--robot=franka", "--workers=1")
    path = tmp_path / "out" / "tiny" / "1.0.0"
    assert f"wrote {path}\n" in output and RldsSource(path, "train").robot == "franka"
    entry = tmp_path / "entry.py"
    entry.write_text(
        "import dataclasses\nfrom data_pipelines.oxe import registry\n"
        "registry.register(dataclasses.replace(registry.find('bridge_orig'), name='mine'))\n"
    )
    arguments = (f"--source={bridge}", f"--out={tmp_path / 'out'}", "--dataset=mine", "--camera=primary", "--workers=1")
    assert "no dataset 'mine' is registered" in launch("convert_dataset", *arguments)
    assert "train: 2 records, 2 episodes" in launch("convert_dataset", *arguments, f"--register={entry}")
    assert "No such file" in launch("convert_dataset", *arguments, "--register=nowhere.py")
    assert "robot is 'a/b'" in launch("convert_dataset", *arguments, f"--register={entry}", "--robot=a/b")
