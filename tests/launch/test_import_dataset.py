"""launch/import_dataset.py as a user runs it: other people's formats to RLDS that plain tfds reads."""

import foreign_formats as formats
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from foreign_formats import FRONT, SIZE, TOP, WRIST, grey, write_bridge, write_lerobot, write_libero

from data_pipelines.sources.rlds import RldsSource, open_dataset

MOVES = np.tile([0.5, 0, 0, 0, 0, 0.1, -1.0], (5, 1))


@pytest.fixture
def convert(launch, tmp_path):
    """Runs the command with --out=tmp_path/out; returns what it printed, or its message where it failed."""
    return lambda kind, source, *more: launch(
        "import_dataset", f"--source_format={kind}", f"--source={source}", f"--out={tmp_path / 'out'}", *more
    )


@pytest.fixture
def read(tmp_path):
    return lambda name, split="train": RldsSource(tmp_path / "out" / name / "1.0.0", split)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot(convert, read, tmp_path, version):
    output = convert("lerobot", write_lerobot(tmp_path / "My Robot-2", version))
    path = tmp_path / "out" / "my_robot_2" / "1.0.0"
    assert f"wrote {path}: 3 episodes of 28 steps in train, at 10 steps a second, actions of the layout 'vector'" in output
    assert "left out 1 because it is a depth map:\n  observation.images.depth\n" in output and output.count("left out") == 1
    source = read("my_robot_2")
    for index, length in enumerate((9, 12, 7)):
        episode = source[index]
        np.testing.assert_array_equal(episode.proprio, formats.state(index, length))
        np.testing.assert_array_equal(episode.actions, formats.state(index, length) + 0.5)
        assert episode.instruction == formats.TASKS[index % 2]
        np.testing.assert_allclose(episode.timestamps, np.arange(length) / 10)
        greys = episode.frames.take(range(length)).mean((1, 2, 3))
        np.testing.assert_allclose(greys, [grey(index, step) for step in range(length)], atol=3)
        greys = episode.further_cameras["wrist"].take([length - 1]).mean((1, 2, 3))
        np.testing.assert_allclose(greys, [grey(index, length - 1, 1)], atol=3)


def test_plain_tfds_reads_it(convert, tmp_path):
    convert("lerobot", write_lerobot(tmp_path / "demo", "v3.0"), "--image_size=24x32", "--dataset=named", "--format=array_record")
    (record, *_) = tfds.builder_from_directory(tmp_path / "out" / "named" / "1.0.0").as_data_source("train")
    steps = list(record["steps"])
    assert len(steps) == 9 and steps[3]["observation"]["image_wrist"].shape == (24, 32, 3)
    np.testing.assert_array_equal(steps[3]["action"], formats.state(0, 9)[3] + 0.5)
    assert [bool(step["is_last"]) for step in steps] == [False] * 8 + [True]


def test_libero(convert, read, tmp_path):
    write_libero(tmp_path / "goal" / "open_it_demo.hdf5", {"demo_0": MOVES, "demo_1": MOVES})
    write_libero(tmp_path / "goal" / "close_it_demo.hdf5", {"demo_0": np.zeros((3, 7)), "demo_1": MOVES[:4]})
    output = convert("libero", tmp_path / "goal", "--upside_down")
    assert "3 episodes of 14 steps in train, at 20 steps a second, actions of the layout 'delta'" in output
    assert f"left out 1 because it has no action that moves the robot:\n  {tmp_path}/goal/close_it_demo.hdf5, demo_0" in output
    episode = read("goal")[2]
    assert episode.instruction == "open it." and episode.action_layout == "delta"
    assert episode.actions.shape == (5, 10) and "wrist" in episode.further_cameras
    cos, sin = np.cos(0.1), np.sin(0.1)
    np.testing.assert_allclose(episode.actions[2], [0.5, 0, 0, cos, -sin, 0, sin, cos, 0, -1], atol=1e-6)


def test_bridge_is_resampled_to_its_nominal_rate(convert, read, tmp_path):
    jitter = [100, 100.2, 100.35, 100.62, 100.8, 101.01]  # from the second on: 0, 0.15, 0.42, 0.6, 0.81 s
    write_bridge(tmp_path / "raw", changes={"time_stamp": jitter})
    write_bridge(tmp_path / "raw", "b/pick_lmdb")
    output = convert("bridge", tmp_path / "raw", "--dataset=bridge", "--default_instruction=go")
    assert "1 episodes of 5 steps in train, at 5 steps a second, actions of the layout 'pose'" in output
    assert "left out 1 because it is part of an LMDB copy" in output
    episode = read("bridge")[0]
    assert episode.action_layout == "pose"
    np.testing.assert_allclose(episode.timestamps, [0, 0.2, 0.4, 0.6, 0.8], atol=1e-6)
    # State k is at k metres, turned by 0.1 k: 0.2 s lies 5/27 of the way from state 2 to state 3.
    between = 2 + 5 / 27
    cos, sin = np.cos(0.1 * between), np.sin(0.1 * between)
    np.testing.assert_allclose(episode.proprio[1, :9], [between, 0.1, 0.2, cos, -sin, 0, sin, cos, 0], atol=1e-5)
    np.testing.assert_allclose(episode.proprio[1, 9], 1.05 - 0.1 * between, atol=1e-5)
    assert episode.actions[:, 9].tolist() == [1, 0, 1, 0, 1]  # binary: the nearest
    greys = episode.frames.take(range(5)).mean((1, 2, 3))
    np.testing.assert_allclose(greys, [grey(0, step) for step in (1, 2, 3, 4, 5)], atol=2)


def test_another_rate(convert, read, tmp_path):
    output = convert("lerobot", write_lerobot(tmp_path / "demo", "v2.1"), "--control_hz=5")
    assert "3 episodes of 15 steps in train, at 5 steps a second" in output
    np.testing.assert_array_equal(read("demo")[1].proprio, formats.state(1, 12)[::2])
    greys = read("demo")[1].frames.take([1, 5]).mean((1, 2, 3))
    np.testing.assert_allclose(greys, [grey(1, 2), grey(1, 10)], atol=3)


def test_commanded_steps_keep_their_rate(convert, tmp_path):
    path = write_libero(tmp_path / "open_it_demo.hdf5", {"demo_0": MOVES})
    assert "demo_0: time stamps are not 10.0 steps per second, and commanded steps" in convert("libero", path, "--control_hz=10")


def test_held_out_episodes(convert, read, tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (3,) * 10, cameras=(TOP,))
    output = convert("lerobot", directory, "--validation_share=0.3")
    assert "7 episodes of 21 steps in train, 3 episodes of 9 steps in val" in output
    chosen = {split: [int(episode.proprio[0, 0]) // 100 for episode in read("demo", split)] for split in ("train", "val")}
    assert chosen["val"] == sorted(np.random.default_rng(42).choice(10, 3, replace=False).tolist())
    assert sorted(chosen["train"] + chosen["val"]) == list(range(10))


def test_chosen_cameras_and_columns(convert, read, tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v3.0", cameras=(TOP, FRONT, WRIST))
    convert(
        "lerobot",
        directory,
        f"--camera=primary={FRONT}",
        f"--camera=wrist={TOP}",
        "--state=action",
        "--action=",
        "--action_layout=delta",
    )
    episode = read("demo")[0]
    assert episode.actions is None and episode.action_layout == "delta" and set(episode.further_cameras) == {"wrist"}
    np.testing.assert_allclose(episode.frames.take([2]).mean(), grey(0, 2, 1), atol=3)
    np.testing.assert_array_equal(episode.proprio, formats.state(0, 9) + 0.5)


def test_a_camera_that_some_episodes_lack(convert, read, tmp_path):
    write_bridge(tmp_path / "raw", "a/pick", cameras=("images0", "images1"))
    folder = write_bridge(tmp_path / "raw", "b/pick")
    output = convert("bridge", tmp_path / "raw", "--camera=primary=images0", "--camera=secondary=images1")
    assert f"left out 1 because it has no camera 'secondary':\n  {folder}" in output
    assert len(read("raw")) == 1 and set(read("raw")[0].further_cameras) == {"secondary"}


def test_damaged_frames_end_the_import_or_are_left_out(convert, read, tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (9, 12, 7), cameras=(TOP,))
    video = sorted(directory.rglob("*.mp4"))[1]
    video.write_bytes(video.read_bytes()[:300])
    message = convert("lerobot", directory)
    assert message.startswith(f"error: {directory} episode 1, feature '{TOP}': {video} cannot be opened")
    assert list((tmp_path / "out").rglob("*.json")) == []  # nothing half-written stays
    output = convert("lerobot", directory, "--skip_damaged")
    assert f"left out 1 because it is damaged:\n  {directory} episode 1" in output and "2 episodes of 16 steps" in output
    assert [len(episode) for episode in read("demo")] == [9, 7] and read("demo").image_size == SIZE
    assert open_dataset(tmp_path / "out" / "demo" / "1.0.0").file_format == "tfrecord"


def test_nothing_remains(convert, tmp_path):
    write_bridge(tmp_path / "raw", "b/pick")
    message = convert("bridge", tmp_path / "raw", "--camera=primary=images0", "--camera=wrist=images9")
    assert message == "error: split 'train' has no episodes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source_format=lerobot", "--source=nowhere"], "no meta/info.json"),
        (["--source_format=lerobot", "--camera=top"], "--camera=top; expected ROLE=KEY"),
        (["--source_format=lerobot", "--camera=primary=a", "--camera=primary=b"], "names a role twice"),
        (
            ["--source_format=lerobot", "--camera=primary=a"],
            f"no camera feature 'a' for the role 'primary'; it has {TOP}, {WRIST}",
        ),
        (["--source_format=lerobot", "--action_layout=pose"], "of a pose layout are of width 3"),
        (["--source_format=lerobot", "--upside_down"], "--upside_down does not apply to --source_format=lerobot"),
        (["--source_format=libero", "--state=x"], "--state does not apply to --source_format=libero"),
        (["--source_format=libero"], "not an HDF5 file nor a folder with any"),
        (["--source_format=bridge"], "no usable **/raw/traj_group*/traj*"),
        (["--source_format=lerobot", "--image_size=480"], "--image_size=480: expected HEIGHTxWIDTH"),
        (["--source_format=lerobot", "--image_size=480xx"], "--image_size=480xx: expected HEIGHTxWIDTH"),
        (["--source_format=lerobot", "--robot=a/b"], "robot is 'a/b'; expected a name without '/'"),
        (["--source_format=lerobot", "--control_hz=-1"], "control_hz is -1.0; expected a positive rate"),
        (["--source_format=lerobot", "--dataset=My Data"], "'My Data' is no name"),
        (["--source_format=zarr"], "lerobot|libero|bridge"),
    ],
)
def test_the_message_names_the_mistake(launch, tmp_path, arguments, message):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (3,))
    assert message in launch("import_dataset", f"--source={directory}", f"--out={tmp_path / 'out'}", *arguments)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_an_existing_dataset_is_kept(convert, tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (3,))
    assert "wrote" in convert("lerobot", directory)
    assert "exists already" in convert("lerobot", directory)


def test_long_episodes_lose_no_step(convert, read, tmp_path):
    """Half an hour and more, of which float32 time stamps are off by more than a tenth of a millisecond."""
    directory = write_lerobot(tmp_path / "demo", "v2.1", (1500,), fps=0.7, cameras=(TOP,), options={"g": "50"})
    output = convert("lerobot", directory, "--action_layout=delta", "--robot=so100")  # commanded steps cannot be resampled
    assert "1 episodes of 1500 steps in train, at 0.7 steps a second, actions of the layout 'delta'" in output
    np.testing.assert_array_equal(read("demo")[0].actions, formats.state(0, 1500) + 0.5)
    np.testing.assert_allclose(read("demo")[0].frames.take([1499]).mean(), grey(0, 1499), atol=3)
    assert read("demo").robot == "so100"


def test_instructions_of_steps_are_imported(convert, read, tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (9,), cameras=(TOP,))
    path = next(directory.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    tasks = pa.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    pq.write_table(table.set_column(table.column_names.index("task_index"), "task_index", tasks), path)
    convert("lerobot", directory)
    convert("lerobot", directory, "--control_hz=5", "--dataset=slow")
    assert [read("demo")[0].instruction_at(step) for step in range(9)] == [formats.TASKS[i] for i in tasks.to_pylist()]
    assert [read("slow")[0].instruction_at(step) for step in range(5)] == [formats.TASKS[i] for i in (0, 0, 1, 1, 1)]
