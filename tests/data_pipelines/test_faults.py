"""What damaged datasets do to a stream of batches: an error that names the damage, or with `skip_broken` a counted omission."""

import dataclasses
import json
import multiprocessing
import os
import queue
import re
import signal
import threading

import numpy as np
import pytest
from synthetic import SIZE, step_episode
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import writers
from data_pipelines.datasets import open_datasets
from data_pipelines.loader import Part, make_batches
from data_pipelines.mixture import Mixture
from data_pipelines.sources.records import RecordWriter, open_records
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.writers import write_rlds
from mimic_video.batch import fields
from mimic_video.config import ActionDecoderConfig, ExperimentConfig, PolicyConfig

LENGTHS = (12, 20, 15, 9)
BATCH = 4


def text(instruction):
    return np.zeros((1, 2), np.float32)


@pytest.fixture(params=["tfrecord", "array_record"])
def file_format(request):
    return request.param


@pytest.fixture
def dataset(tmp_path, monkeypatch, file_format):
    """Two shards of two episodes."""
    monkeypatch.setattr(writers, "_EPISODES_PER_SHARD", 2)
    return write(tmp_path, file_format, LENGTHS)


def write(folder, file_format, lengths):
    splits = {"train": [step_episode(n, episode=e) for e, n in enumerate(lengths)]}
    return write_rlds(folder, "demo", splits, control_hz=10.0, image_size=SIZE, description="", file_format=file_format)


def stream(path, config, *, skip_broken=False, workers=0):
    """Batches of a dataset as training has them."""
    data = dataclasses.replace(config, action_dataset=str(path), skip_broken=skip_broken)
    decoder = ActionDecoderConfig(action_dim=2, proprio_dim=3)
    experiment = ExperimentConfig(stage="action", data=data, decoder=decoder, policy=PolicyConfig(execute_steps=2))
    windows, phases = open_datasets(experiment, "train")
    mixture = Mixture([len(each) for each in windows.values()], phases, BATCH, seed=0)
    return make_batches(
        [Part(name, each) for name, each in windows.items()],
        mixture,
        batch_size=BATCH,
        start_step=0,
        text=text,
        decoder=decoder,
        skip_broken=skip_broken,
        workers=workers,
    )


def anchors(batches, count):
    """Which windows there are in so many batches, as 100 · episode + step."""
    return {int(value) for _ in range(count) for value in next(batches).observation.proprio[:, 0, 0]}


def expected_anchors(episodes):
    return {100 * e + step for e in episodes for step in range(LENGTHS[e] - 1)}


def shard_of(path, number):
    return sorted(path.glob("*train*"))[number]


def change_record(path, file_format, number, change):
    """Changes the tf.Example of a record of the first shard; checksums stay right."""
    shard = shard_of(path, 0)
    file = open_records(str(shard), file_format)
    records = [tf_example_pb2.Example.FromString(bytes(file.read(i))) for i in range(len(file))]
    change(records[number].features.feature)
    with RecordWriter(shard, file_format) as writer:
        for record in records:
            writer.write(record.SerializeToString())


def corrupt_record(path, file_format):
    shard = shard_of(path, 0)
    record, data = bytes(open_records(str(shard), file_format).read(1)), bytearray(shard.read_bytes())
    data[data.index(record) + record.index(b"\xff\xd8") + 30] ^= 0xFF  # within its first image
    shard.write_bytes(data)


def truncate_shard(path, file_format):
    os.truncate(shard_of(path, 1), shard_of(path, 1).stat().st_size // 2)


def drop_feature(path, file_format):
    change_record(path, file_format, 1, lambda features: features.pop("steps/action"))


def drop_images(path, file_format):
    change_record(path, file_format, 1, lambda features: features.pop("steps/observation/image_primary"))


def spoil_action(path, file_format):
    def change(features):
        features["steps/action"].float_list.value[2 * 7 + 1] = np.nan

    change_record(path, file_format, 0, change)


# Fault, the episodes that it takes, and how the message names it. Every message begins with a file or with the dataset's split.
FAULTS = [
    (corrupt_record, {1}, r"shard .*{first}, record 1(: its checksum does not match| cannot be read)"),
    (truncate_shard, {2, 3}, r"split 'train' episode 2 cannot be read: shard .*{second}.*(ends within it|it has 0 of its 2)"),
    (drop_feature, {1}, r"split 'train' episode 1 cannot be read: shard .*{first}, record 1: feature 'steps/action' is missing"),
    (drop_images, {1}, r"shard .*{first}, record 1: feature 'steps/observation/image_primary': it is missing"),
    (spoil_action, {0}, r"split 'train' episode 0: 'steps/action' of step 7 is \[7\.5, nan\]; expected finite numbers"),
]


@pytest.mark.parametrize(("damage", "episodes", "message"), FAULTS, ids=[damage.__name__ for damage, *_ in FAULTS])
def test_damage_is_a_named_error_or_a_counted_omission(dataset, file_format, config, caplog, damage, episodes, message):
    epoch = sum(length - 1 for length in LENGTHS) // BATCH
    assert anchors(stream(dataset, config), epoch) == expected_anchors(range(4))
    damage(dataset, file_format)
    for path in (dataset / ".mimic_video_index").iterdir():  # which a dataset that arrives damaged would not have
        (path / "index.json").unlink()
    message = message.format(first=shard_of(dataset, 0).name, second=shard_of(dataset, 1).name)
    with pytest.raises(DatasetError, match=message) as error:
        anchors(stream(dataset, config), epoch)
    assert str(dataset) in str(error.value)

    with caplog.at_level("WARNING", logger="absl"):
        assert anchors(stream(dataset, config, skip_broken=True), epoch) == expected_anchors(set(range(4)) - episodes)
    assert re.search(rf"skipped an? (episode|window) \(1 so far\): .*{message}", caplog.text)
    counted = [int(number) for number in re.findall(r"skipped an episode \((\d+) so far\)", caplog.text)]
    assert counted in ([], list(range(1, len(episodes) + 1)))  # where only images are damaged, windows are counted
    if not counted:
        assert len(re.findall(r"skipped a window \(\d+ so far\)", caplog.text)) >= LENGTHS[1] - 1


def test_a_feature_that_the_schema_lacks(dataset, config):
    file = dataset / "features.json"
    tree = json.loads(file.read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    del steps["action"]
    file.write_text(json.dumps(tree))
    for skip_broken in (False, True):  # nothing would be left
        with pytest.raises(DatasetError, match=rf"{dataset} split 'train' has no action; the config field 'decoder\.action_dim'"):
            stream(dataset, config, skip_broken=skip_broken)


def test_an_empty_split(dataset, config):
    file = dataset / "dataset_info.json"
    info = json.loads(file.read_text())
    info["splits"][0]["shardLengths"] = ["0"]
    file.write_text(json.dumps(info))
    for skip_broken in (False, True):
        with pytest.raises(DatasetError, match=rf"{dataset} split 'train' has no episodes"):
            stream(dataset, config, skip_broken=skip_broken)


def test_a_dataset_of_which_nothing_can_be_read(dataset, file_format, config):
    for number in (0, 1):
        os.truncate(shard_of(dataset, number), shard_of(dataset, number).stat().st_size // 2)
    with pytest.raises(DatasetError, match=rf"{dataset} split 'train': none of its 4 episodes can be read; .*shard"):
        stream(dataset, config, skip_broken=True)


def test_episodes_shorter_than_the_window(tmp_path, file_format, config, caplog):
    path = write(tmp_path, file_format, (12, 3, 1))
    with caplog.at_level("WARNING", logger="absl"):
        batches = stream(path, config)
    assert f"1 of 3 episodes of {path} split 'train' have no window" in caplog.text
    rows = {}
    for _ in range(13):  # four epochs of 11 + 2 + 0 windows
        batch = next(batches)
        rows |= {
            int(batch.observation.proprio[i, 0, 0]): {key: value[i] for key, value in fields(batch).items()} for i in range(BATCH)
        }
    assert set(rows) == {*range(11), 100, 101}
    row = rows[101]  # four steps before the anchor and four after it, of an episode that has one of either
    np.testing.assert_array_equal(row["frame_mask"], [False] * 3 + [True] * 3 + [False] * 3)
    np.testing.assert_allclose(row["video"][0].mean((1, 2, 3)), [0, 0, 0, 0, 4, 8, 8, 8, 8], atol=1)
    np.testing.assert_array_equal(row["action_mask"], [True, False, False, False])
    np.testing.assert_array_equal(row["actions"], np.full((4, 2), 102.5))


@pytest.mark.processes
def test_a_worker_process_that_dies_is_an_error(tmp_path, config):
    before = set(multiprocessing.active_children())
    batches = stream(write(tmp_path, "array_record", LENGTHS), config, workers=2)
    next(batches)
    worker = next(iter(set(multiprocessing.active_children()) - before))
    os.kill(worker.pid, signal.SIGKILL)
    outcome: queue.Queue = queue.Queue()

    def read():
        try:
            outcome.put([next(batches) for _ in range(50)])
        except RuntimeError as error:
            outcome.put(str(error))

    threading.Thread(target=read, daemon=True).start()  # a stream that waits for ever must not hold up the tests
    assert "Worker process was terminated unexpectedly with exit code -9" in outcome.get(timeout=60)
