"""LeRobot datasets read in training as they are: beside lerobot's own reading, and beside their import."""

import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_formats import SIZE, TASKS, TOP, WRIST, frames, state, write_lerobot

from data_pipelines.datasets import find_instructions, open_datasets
from data_pipelines.episode import content_hash
from data_pipelines.importing import import_dataset
from data_pipelines.loader import WindowDataset
from data_pipelines.oxe import registry
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import Values, vector
from data_pipelines.sources import folders
from data_pipelines.sources.lerobot import LeRobotSource
from data_pipelines.sources.lerobot_split import LeRobotSplit
from data_pipelines.sources.rlds import DatasetError, RldsSource, SplitError
from mimic_video.config import experiment_from

RECORDINGS = Path(__file__).parents[1] / "lerobot_recordings"
VERSIONS = ("v2.1", "v3.0")
WINDOW = {"image_size": SIZE, "past_frames": 5, "future_frames": 4, "video_hz": 10.0, "action_horizon": 4, "control_hz": 10.0}


def experiment(dataset, stage="action", width=3, **data):
    return experiment_from(
        {
            "stage": stage,
            "data": WINDOW | {f"{stage}_dataset": str(dataset), "action_delay": 0.1} | data,
            "decoder": {"action_dim": width, "proprio_dim": width},
            "policy": {"execute_steps": 2},
        }
    )


def windows_of(config, split="train"):
    (windows,) = open_datasets(config, split).windows.values()
    return windows


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_values_and_frames_are_those_that_lerobot_reads(version):
    read = np.load(RECORDINGS / f"{version}_read.npz")
    source = LeRobotSplit(RECORDINGS / version, "train")
    assert (source.action_dim, source.proprio_dim, source.control_hz, source.robot) == (7, 7, 10.0, "")
    assert source.camera_sizes == {"primary": (48, 64), "wrist": (48, 64)}
    for number, episode in enumerate(source):
        (rows,) = np.nonzero(read["episode"] == number)
        np.testing.assert_array_equal(episode.proprio, read["state"][rows])
        np.testing.assert_array_equal(episode.actions, read["action"][rows])
        np.testing.assert_allclose(episode.timestamps, read["timestamp"][rows], atol=1e-6)  # lerobot stores float32
        assert {episode.instruction_at(step) for step in range(len(rows))} == set(read["task"][rows])
        for camera, key in (("primary", "top"), ("wrist", "wrist")):
            chosen = [place for place, step in enumerate(read["frame_steps"]) if step in rows]
            taken = episode.cameras[camera].take([int(read["frame_steps"][place] - rows[0]) for place in chosen])
            # AV1 is decoded to the bit; other builds of swscale may round the conversion to RGB otherwise.
            np.testing.assert_allclose(taken.astype(int), read[key][chosen], atol=1)


def imported(source, folder, **options):
    return import_dataset(source, folder, "copy", description="", jpeg_quality=100, **options)


def assert_same_windows(streamed, copied, frame_error):
    """All that is not a picture is equal to the bit; pictures are within the error of JPEG."""
    assert streamed.content == copied.content and len(streamed) == len(copied) > 20
    for index in range(0, len(streamed), 5):
        one, two = streamed[index], copied[index]
        assert (
            one.keys()
            == two.keys()
            == {"instruction", "video", "frame_mask", "proprio", "actions", "action_mask"}
            | ({"view_mask"} if "view_mask" in one else set())
        )
        for name, value in one.items():
            if name == "video":
                assert np.abs(value.astype(int) - two[name]).max() <= frame_error
            else:
                np.testing.assert_array_equal(value, two[name])


# Pictures of one grey: at quality 100 JPEG keeps the mean of a block to 1/8, and both conversions of colours round by up to 1.
@pytest.mark.parametrize(
    "version, options, data",
    [
        ("v2.1", {}, {}),
        ("v3.0", {"fps": 30}, {"control_hz": 15.0, "cameras": ("primary", "wrist")}),
        ("v2.0", {"fps": 29.97, "stored_as": "image"}, {"video_hz": 7.0, "action_delay": 0.0}),
    ],
)
def test_windows_are_those_of_the_import(tmp_path, version, options, data):
    folder = write_lerobot(tmp_path / "demo", version, (40, 52, 31), **options)
    copy = imported(LeRobotSource(folder), tmp_path / "rlds")
    assert_same_windows(windows_of(experiment(folder, **data)), windows_of(experiment(copy, **data)), 2)


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_values_of_a_real_recording_are_those_of_its_import(tmp_path, version):
    copy = imported(LeRobotSource(RECORDINGS / version), tmp_path)
    data = {"image_size": (48, 64), "cameras": ("primary", "wrist")}
    streamed, copied = (windows_of(experiment(place, width=7, **data)) for place in (RECORDINGS / version, copy))
    assert_same_windows(streamed, copied, 255)  # noisy pictures: of those the test above says more


def test_steps_that_are_not_at_the_rate_are_resampled_as_in_an_import(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (40, 30), stored_as="image", cameras=(TOP,))
    for path in folder.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        times = np.arange(len(table)) * 0.13 + 0.4  # slower than the 10 steps a second that meta says, and begun late
        place = table.schema.get_field_index("timestamp")
        pq.write_table(table.set_column(place, "timestamp", pa.array(times.astype(np.float32))), path, row_group_size=5)
    copy = imported(LeRobotSource(folder), tmp_path / "rlds")
    streamed = windows_of(experiment(folder))
    assert_same_windows(streamed, windows_of(experiment(copy)), 2)
    assert len(streamed.episodes[0]) == 51 and streamed.episodes[0].timestamps[-1] == 5.0  # 39 periods of 0.13 s are 5.07 s


def test_slices_are_of_episodes_and_there_is_no_other_split(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v3.0", (20, 21, 22, 23))
    assert windows_of(experiment(folder), "train[1:3]").numbers == [1, 2]
    assert [len(episode) for episode in LeRobotSplit(folder, "train[-1:]+train[:1]")] == [23, 20]
    with pytest.raises(
        SplitError, match=r"^config field 'data\.validation_split': .*/demo has no split 'val': LeRobot datasets "
    ):
        open_datasets(experiment(folder), "val")
    with pytest.raises(
        SplitError, match=r"^config field 'data\.train_split': split 'train\[:9\]' of .* is beyond its 4 episodes"
    ):
        open_datasets(experiment(folder, train_split="train[:9]"), "train[:9]")
    assert list(find_instructions(experiment(folder))) == list(TASKS)


@pytest.mark.parametrize("version, lost", [("v2.1", [1]), ("v3.0", [0, 1])])  # of v3.0, two episodes are in a file
def test_a_video_that_is_cut_off_loses_its_episodes_alone(tmp_path, version, lost):
    folder = write_lerobot(tmp_path / "demo", version, (20, 21, 22))
    name = "episode_000001.mp4" if version == "v2.1" else "file-000.mp4"
    (video,) = (path for path in folder.rglob(name) if TOP in str(path))
    video.write_bytes(video.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=rf"episode {lost[0]}, feature '{TOP}': .*{name} is truncated, or no MP4 file: it has"):
        open_datasets(experiment(folder), "train")
    windows = windows_of(experiment(folder, skip_broken=True))
    assert windows.numbers == [number for number in range(3) if number not in lost]
    assert windows[0]["video"].shape == (1, 9, *SIZE, 3)
    # Slices count episodes that are damaged, so that the others stay in their place.
    assert [len(episode) for episode in windows_of(experiment(folder, skip_broken=True), "train[2:]").episodes] == [22]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda video, data: video.unlink(), r"the video .*episode_000002\.mp4 of feature .* is missing"),
        (lambda video, data: data.unlink(), r"episode_000002\.parquet cannot be read"),
        (lambda video, data: data.write_bytes(data.read_bytes()[:300]), r"episode_000002\.parquet cannot be read"),
        (lambda video, data: video.write_bytes(b""), r"episode_000002\.mp4 is truncated, or no MP4 file: it has 0 bytes"),
        (lambda video, data: video.write_bytes(b"\0" * 64), r"no MP4 file, or damaged: at byte 0|is truncated"),
    ],
)
def test_other_damage_is_named(tmp_path, damage, message):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (20, 21, 22))
    damage(folder / f"videos/chunk-000/{TOP}/episode_000002.mp4", folder / "data/chunk-000/episode_000002.parquet")
    source = LeRobotSplit(folder, "train")
    assert len(source) == 3 and len(source[1]) == 21
    with pytest.raises(DatasetError, match=message):
        source[2]
    assert windows_of(experiment(folder, skip_broken=True)).numbers == [0, 1]
    with pytest.raises(DatasetError, match=rf"train\[2:\]'.* none of its 1 episodes can be read; .*{message}"):
        LeRobotSplit(folder, "train[2:]")


def test_a_frame_that_cannot_be_decoded_is_an_error_of_its_window(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (20, 20), cameras=(TOP,))
    video = folder / f"videos/chunk-000/{TOP}/episode_000001.mp4"
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat")
    content[start + 4 : start + 200] = b"\xff" * 196
    video.write_bytes(content)
    windows = windows_of(experiment(folder))
    assert windows[3]["video"].shape == (1, 9, *SIZE, 3)
    with pytest.raises(DatasetError, match=r"episode 1, feature '.*': .*episode_000001\.mp4"):
        windows[20]


def test_a_camera_that_nobody_asked_for_may_be_missing(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (20, 21))
    shutil.rmtree(folder / "videos" / "chunk-000" / WRIST)
    assert windows_of(experiment(folder)).cameras == ("primary",)
    with pytest.raises(DatasetError, match=f"feature '{WRIST}' is missing"):
        open_datasets(experiment(folder, cameras=("primary", "wrist")), "train")


def test_pictures_have_the_experiments_size(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v3.0", (20,))
    window = windows_of(experiment(folder, image_size=(16, 32)))[10]
    assert window["video"].shape == (1, 9, 16, 32, 3)
    np.testing.assert_allclose(window["video"].mean((0, 2, 3, 4)), frames(0, 20)[6:15].mean((1, 2, 3)), atol=3)  # H.264


def test_few_videos_stay_open(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (12,) * 14)
    windows = windows_of(experiment(folder, cameras=("primary", "wrist"), frame_cache_mb=0))
    for index in range(0, len(windows), 7):
        assert windows[index]["video"].shape[0] == 2
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    opened = [link for link in links if link.is_symlink() and os.readlink(link).startswith(str(folder))]
    assert 0 < len(opened) <= 8  # of 28


def test_a_copy_for_another_process_reads_the_same(tmp_path):
    source = LeRobotSplit(write_lerobot(tmp_path / "demo", "v3.0", (20, 21)), "train")
    windows = WindowDataset(source, experiment("").data, actions=True)
    windows[3]
    copy = pickle.loads(pickle.dumps(windows))
    np.testing.assert_array_equal(copy[3]["video"], windows[3]["video"])
    assert copy.content == windows.content


def test_a_run_that_goes_on_notices_changed_data(tmp_path):
    one, two = (write_lerobot(tmp_path / name / "demo", "v2.1", (20, 21)) for name in ("one", "two"))
    first, second = (windows_of(experiment(folder)) for folder in (one, two))
    assert first.content == second.content and first.identity == second.identity  # wherever it lies
    tasks = two / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("cup", "jug"))
    assert windows_of(experiment(two)).content != first.content
    video = one / f"videos/chunk-000/{TOP}/episode_000001.mp4"
    video.write_bytes(video.read_bytes() + b"\0\0\0\x08free")
    changed = windows_of(experiment(one))
    assert changed.content == first.content and changed.identity != first.identity


def test_an_entry_says_what_columns_and_cameras_are(tmp_path):
    spec = DatasetSpec(
        name="arm_by_entry",
        directory=str(write_lerobot(tmp_path / "demo", "v2.1", (20, 21))),
        robot="arm",
        primary=WRIST,
        secondary=TOP,
        control_hz=10.0,
        features={"observation.state": (3,), "action": (3,)},
        proprio=vector(Values("observation.state[1:3]")),
        actions=vector(Values("action[2:3]"), Values("action[0:1]", scale=2.0)),
    )
    registry.register(spec)
    config = experiment("arm_by_entry", width=2, cameras=("primary", "secondary"))
    windows = windows_of(config)
    assert (windows.robot, windows.cameras) == ("arm", ("primary", "secondary"))
    np.testing.assert_array_equal(windows.episodes[1].proprio, state(1, 21)[:, 1:])
    np.testing.assert_array_equal(windows.episodes[1].actions, (state(1, 21) + np.float32(0.5))[:, [2, 0]] * [1, 2])
    np.testing.assert_allclose(windows[10]["video"][0].mean((1, 2, 3)), frames(0, 20, 1)[6:15].mean((1, 2, 3)), atol=3)

    wrong = dataclasses.replace(spec, name="arm_without", primary="observation.images.side", secondary=None)
    registry.register(wrong)
    with pytest.raises(DatasetError, match=f"no camera feature 'observation.images.side' for the role 'primary'; it has {TOP}, "):
        open_datasets(experiment("arm_without", width=2), "train")
    wide = {"features": {"observation.state": (3,), "action": (5,)}, "actions": vector(Values("action[0:5]"))}
    registry.register(dataclasses.replace(spec, name="arm_too_wide", **wide))
    with pytest.raises(
        DatasetError, match=r"episode 0: dataset 'arm_too_wide', actions: feature 'steps/action' has 3 dimensions"
    ):
        open_datasets(experiment("arm_too_wide", width=2), "train")


def test_an_entry_may_leave_its_folder_to_the_experiment(tmp_path):
    write_lerobot(tmp_path / "arm_in_root", "v3.0", (20,))
    features = {"observation.state": (3,), "action": (3,)}
    layouts = {"proprio": vector(Values("observation.state[0:3]")), "actions": vector(Values("action[0:3]"))}
    registry.register(DatasetSpec(name="arm_in_root", primary=TOP, control_hz=10.0, features=features, **layouts))
    windows = windows_of(experiment("arm_in_root", root=str(tmp_path)))
    assert windows.content == windows_of(experiment(tmp_path / "arm_in_root")).content


def test_both_formats_in_one_mixture(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v3.0", (20, 21))
    copy = imported(LeRobotSource(folder), tmp_path / "rlds")
    opened = open_datasets(experiment(f"{folder},{copy}*2"), "train[:1]")
    assert {name: len(each) for name, each in opened.windows.items()} == {"demo": 19, "copy": 19}
    assert isinstance(opened.windows["copy"]._source, RldsSource) and isinstance(opened.windows["demo"]._source, LeRobotSplit)
    assert content_hash(opened.windows["demo"].episodes) == content_hash(opened.windows["copy"].episodes)


def test_a_dataset_without_actions_is_for_videos(tmp_path):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (20,))
    info = json.loads((folder / "meta" / "info.json").read_text())
    del info["features"]["action"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    assert len(windows_of(experiment(folder, stage="video"))) == 20
    with pytest.raises(DatasetError, match=r"demo split 'train' has no action; the config field 'decoder\.action_dim' is 3"):
        open_datasets(experiment(folder), "train")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    folder = write_lerobot(tmp_path / "demo", "v2.1", (20,))
    for name in ("lerobot_split", "lerobot", "video"):
        monkeypatch.delitem(sys.modules, f"data_pipelines.sources.{name}")
        monkeypatch.delattr(sys.modules["data_pipelines.sources"], name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DatasetError, match=r"a LeRobot dataset needs av: pip install -e '\.\[data\]'"):
        open_datasets(experiment(folder), "train")


def test_folders_without_a_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DatasetError, match=r"empty has no dataset of a known format: .*dataset_info\.json \(RLDS\), or meta/info"
    ):
        open_datasets(experiment(tmp_path / "empty"), "train")
    copy = imported(LeRobotSource(write_lerobot(tmp_path / "demo", "v2.1", (20,))), tmp_path / "rlds")
    with pytest.raises(DatasetError, match=rf"has no dataset of a known format: .*; did you mean {copy}\?"):
        open_datasets(experiment(copy.parent), "train")
    with pytest.raises(DatasetError, match=r"^dataset directory .*/nowhere does not exist$"):
        open_datasets(experiment(tmp_path / "nowhere"), "train")
    with pytest.raises(
        DatasetError, match=r"'data\.action_dataset' names 'brige_orig': there is no such.* nearest is 'bridge_orig'"
    ):
        open_datasets(experiment("brige_orig"), "train")
    assert folders.find_format(tmp_path / "demo") == "LeRobot" and folders.find_format("gs://bucket/one") == "RLDS"
