import codecs
import concurrent.futures
import dataclasses
import gc
import itertools
import json
import pickle
import re
import subprocess
import sys

import av
import foreign_formats as formats
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_formats import FRONT, SIZE, TOP, WRIST, grey, write_lerobot
from PIL import Image

from data_pipelines.sources import video
from data_pipelines.sources.lerobot import LeRobotSource
from data_pipelines.sources.rlds import DatasetError

LENGTHS = (9, 12, 7)
VERSIONS = ("v2.1", "v3.0")


def greys(taken):
    """The grey of each frame; lossy compression moves it by less than neighbouring frames differ."""
    return taken.mean((1, 2, 3))


def assert_frames(taken, episode, steps, camera=0):
    assert taken.shape == (len(steps), *SIZE, 3) and taken.dtype == np.uint8
    np.testing.assert_allclose(greys(taken), [grey(episode, step, camera) for step in steps], atol=3)


def edit_info(directory, change):
    path = directory / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_data(path, change):
    """Replaces columns of a Parquet file by what `change` makes of them, as lists."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    kept = {
        key: pa.array(values, table.schema.field(key).type if key in table.schema.names else None)
        for key, values in columns.items()
    }
    pq.write_table(pa.table(kept), path)


@pytest.fixture(params=VERSIONS)
def dataset(request, tmp_path):
    return write_lerobot(tmp_path / "demo", request.param)


def only_file(directory, pattern):
    return sorted(directory.rglob(pattern))[0]


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
@pytest.mark.parametrize("version", VERSIONS)
def test_episodes_come_back(tmp_path, version, codec):
    source = LeRobotSource(write_lerobot(tmp_path / "demo", version, codec=codec))
    assert (len(source), source.action_dim, source.proprio_dim, source.image_size) == (3, 3, 3, SIZE)
    assert source.control_hz == 10.0 and source.cameras == {"primary": TOP, "wrist": WRIST}
    assert source.skipped == {"it is a depth map": ["observation.images.depth"]}
    for index, length in enumerate(LENGTHS):
        episode = source[index]
        np.testing.assert_allclose(episode.timestamps, np.arange(length) / 10, atol=1e-6)
        assert episode.timestamps.dtype == np.float64 and episode.proprio.dtype == np.float32
        np.testing.assert_array_equal(episode.proprio, formats.state(index, length))
        np.testing.assert_array_equal(episode.actions, formats.state(index, length) + 0.5)
        assert episode.instruction == formats.TASKS[index % 2] and episode.action_layout == "vector"
        assert_frames(episode.frames.take(range(length)), index, range(length))
        assert_frames(episode.further_cameras["wrist"].take([length - 1, 0]), index, [length - 1, 0], camera=1)
    assert len(source[-1]) == 7
    with pytest.raises(IndexError, match="3 episodes"):
        source[3]


def test_v2_0_is_v2_1_without_statistics_of_episodes(tmp_path):
    assert len(LeRobotSource(write_lerobot(tmp_path / "demo", "v2.0"))) == 3


def test_tasks_as_older_writers_of_v3_left_them(tmp_path):
    assert LeRobotSource(write_lerobot(tmp_path / "demo", "v3.0", task_index_name=None))[1].instruction == formats.TASKS[1]


@pytest.mark.parametrize("fps", [7, 29.97, 2.5])
@pytest.mark.parametrize("version", VERSIONS)
def test_odd_rates(tmp_path, version, fps):
    source = LeRobotSource(write_lerobot(tmp_path / "demo", version, (25, 30), fps=fps, cameras=(TOP,)))
    assert source.control_hz == fps
    np.testing.assert_allclose(source[1].timestamps, np.arange(30) / fps, atol=1e-5)
    assert_frames(source[1].frames.take([29, 3, 3, -2, 17]), 1, [29, 3, 3, 28, 17])


@pytest.mark.parametrize(
    "options",
    [
        {"g": "2"},
        {"g": "7"},
        {"g": "250"},
        {"g": "12", "bf": "3"},
        {"g": "30", "x264-params": "bframes=2:open-gop=1"},
    ],
)
def test_frames_in_any_order_are_those_in_order(tmp_path, options):
    source = LeRobotSource(write_lerobot(tmp_path / "demo", "v3.0", (60, 60), cameras=(TOP,), options=options))
    frames, order = source[1].frames, np.random.default_rng(0).permutation(60)
    in_order = frames.take(range(60))
    assert_frames(in_order, 1, range(60))
    for step in order[:20].tolist():
        np.testing.assert_array_equal(frames.take([step])[0], in_order[step])
    np.testing.assert_array_equal(frames.take(order), in_order[order])
    every_sixth = list(range(5, 60, 6))  # a window at a lower rate: part of it is sought, part decoded on to
    np.testing.assert_array_equal(frames.take(every_sixth), in_order[every_sixth])


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"g": "2"}), ("libx264", {}), ("libsvtav1", {"g": "2", "crf": "30"})])
def test_videos_that_were_joined_without_encoding_them_again(tmp_path, codec, options):
    """As lerobot makes the files of v3.0 from those of v2.1 and while recording."""
    lengths = (11, 16, 9)
    directory = write_lerobot(tmp_path / "demo", "v3.0", (*lengths[:2], 3), fps=30, cameras=(TOP,))
    path = only_file(directory, "*.mp4")
    parts = [tmp_path / f"{e}.mp4" for e in (0, 1)]
    for episode, part in enumerate(parts):
        formats.encode(part, formats.frames(episode, lengths[episode]), 30, codec, options)
    listing = tmp_path / "parts.txt"
    listing.write_text("".join(f"file '{part}'\n" for part in parts))
    with av.open(str(listing), format="concat", options={"safe": "0"}) as joined, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(joined.streams.video[0], opaque=True)
        for packet in joined.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    source = LeRobotSource(directory)
    for episode in (1, 0):
        steps = np.random.default_rng(0).permutation(lengths[episode])
        assert_frames(source[episode].frames.take(steps), episode, steps)


def test_nothing_is_decoded_before_take(dataset, monkeypatch):
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda path, *rest, **more: (opened.append(path), real(path, *rest, **more))[1])
    source = LeRobotSource(dataset)
    episodes = list(source)
    assert opened == []
    episodes[0].frames.take([0])
    assert len(opened) == 1


def test_decoders_are_kept_few_and_reused(tmp_path, monkeypatch):
    source = LeRobotSource(write_lerobot(tmp_path / "demo", "v2.1", (3,) * 12, cameras=(TOP,)))
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda path, *rest, **more: (opened.append(path), real(path, *rest, **more))[1])
    for _ in range(3):
        assert_frames(source[0].frames.take([1]), 0, [1])
    assert len(opened) == 1
    for index in range(12):
        source[index].frames.take([0])
    source[0].frames.take([0])
    assert len(opened) == 13  # eleven more, and the first one again


def test_who_reads_a_file_at_the_same_time_has_a_decoder_of_it_each_time(dataset, monkeypatch):
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda path, *rest, **more: (opened.append(path), real(path, *rest, **more))[1])
    path = str(sorted(dataset.rglob("*.mp4"))[0])
    for _ in range(3):
        for decoder in [video._DECODERS.borrow(path) for _ in range(2)]:
            video._DECODERS.give_back(decoder)
    assert len(opened) == 2


@pytest.mark.parametrize("turn", [None, *list(formats.TURNS)[:1]])
def test_decoded_frames_need_no_garbage_collection(tmp_path, turn):
    """They have memory that Python's collector does not know of, and it would let hundreds of them wait."""
    directory = write_lerobot(tmp_path / "demo", "v3.0", (60,), cameras=(TOP,))
    if turn:
        formats.turn_video(only_file(directory, "*.mp4"), turn)
        edit_info(directory, lambda info: info["features"][TOP].update(shape=[*SIZE[::-1], 3]))
    frames = LeRobotSource(directory)[0].frames

    def memory():
        alive = [each for each in gc.get_objects() if isinstance(each, av.VideoFrame)]
        return sum(frame.width * frame.height for frame in alive)

    gc.collect()
    gc.disable()
    try:
        before = memory()
        frames.take(range(60))
        assert memory() < before + 3 * SIZE[0] * SIZE[1]  # the last one, which may be asked for again, and a small one
    finally:
        gc.enable()


def test_threads_share_a_file(tmp_path):
    source = LeRobotSource(write_lerobot(tmp_path / "demo", "v3.0", (30, 30), cameras=(TOP,)))
    random = np.random.default_rng(1)
    jobs = [(int(e), random.integers(0, 30, 5).tolist()) for e in random.integers(0, 2, 40)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for (episode, steps), taken in zip(jobs, pool.map(lambda job: source[job[0]].frames.take(job[1]), jobs), strict=True):
            assert_frames(taken, episode, steps)


def test_a_source_can_be_sent_to_a_worker(dataset):
    source = LeRobotSource(dataset)
    source[0].frames.take([0])
    assert_frames(pickle.loads(pickle.dumps(source))[1].frames.take([5]), 1, [5])


def test_a_forked_worker_opens_files_itself(tmp_path):
    """It would share the position in an open file with its parent."""
    directory = write_lerobot(tmp_path / "demo", "v3.0", (40, 40), cameras=(TOP,))
    greys = np.concatenate([formats.frames(episode, 40) for episode in (0, 1)])
    noise = np.random.default_rng(0).integers(-20, 21, greys.shape)  # so that the file is larger than what is read ahead
    formats.encode(only_file(directory, "*.mp4"), (greys + noise).astype(np.uint8), 10, options={"g": "2", "crf": "10"})
    script = f"""
import os, signal
from data_pipelines.sources.lerobot import LeRobotSource
frames = LeRobotSource({str(directory)!r})[1].frames
frames.take([0])
child = os.fork()
signal.alarm(20)  # neither process may wait for ever
wanted = {[grey(1, step) for step in range(40)]!r}
order = range(40) if child else range(39, -1, -1)
wrong = [step for step in order if abs(frames.take([step]).mean() - wanted[step]) > 3]
if child == 0:
    os._exit(len(wrong))
print(len(wrong), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert process.stdout == "0 0\n", process.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_images_inside_parquet_files(tmp_path, version):
    directory = write_lerobot(tmp_path / "demo", version, stored_as="image")
    source = LeRobotSource(directory)
    assert_frames(source[1].frames.take([11, 0, 4, 5, 5]), 1, [11, 0, 4, 5, 5])  # over three row groups
    assert_frames(source[2].further_cameras["wrist"].take([6]), 2, [6], camera=1)
    path = only_file(directory, "*.parquet" if version == "v2.1" else "data/*/*.parquet")
    edit_data(path, lambda columns: columns.update({TOP: [{"bytes": b"no image", "path": "x"}, None, *columns[TOP][2:]]}))
    frames = LeRobotSource(directory)[0].frames  # opening does not look at images
    with pytest.raises(DatasetError, match=rf"episode 0, feature '{TOP}': the image of step 0 in .*parquet cannot be decoded"):
        frames.take([0])
    with pytest.raises(DatasetError, match="step 1 has no image bytes"):
        frames.take([1])


def test_frames_may_be_resized(dataset):
    source = LeRobotSource(dataset, image_size=(24, 16))
    assert source.image_size == (24, 16)
    assert source[0].frames.take([1, 2]).shape == (2, 24, 16, 3)
    assert source[0].further_cameras["wrist"].take([1]).shape == (1, 24, 16, 3)


def test_columns_of_other_names_or_none(dataset):
    source = LeRobotSource(dataset, state="action", action=None, cameras={"primary": WRIST})
    assert source.action_dim is None and source[0].actions is None and source[0].further_cameras == {}
    np.testing.assert_array_equal(source[0].proprio, formats.state(0, 9) + 0.5)
    assert_frames(source[0].frames.take([2]), 0, [2], camera=1)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([TOP], {"primary": TOP}),
        ([WRIST], {"primary": WRIST}),
        ([WRIST, FRONT, TOP], {"primary": FRONT, "secondary": TOP, "wrist": WRIST}),
        ([FRONT, "observation.images.gripper_left"], {"primary": FRONT, "wrist": "observation.images.gripper_left"}),
    ],
)
def test_default_cameras(tmp_path, names, expected):
    assert LeRobotSource(write_lerobot(tmp_path / "demo", "v2.1", (3,), cameras=names)).cameras == expected


@pytest.mark.parametrize("names", [[TOP, FRONT, "observation.images.left"], [WRIST, "observation.images.hand"], []])
def test_cameras_that_cannot_be_told_apart(tmp_path, names):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (3,), cameras=names)
    with pytest.raises(DatasetError, match=rf"pass cameras .*It has {', '.join(names) or 'none'}"):
        LeRobotSource(directory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"state": "observation.joints"},
            r"no feature 'observation\.joints'; its floating .* observation\.state, action, timestamp",
        ),
        ({"action": TOP}, rf"feature '{TOP}' is video \[48, 64, 3\]; expected a vector"),
        ({"cameras": {"primary": "top"}}, rf"no camera feature 'top' for the role 'primary'; it has {TOP}, {WRIST}$"),
        (
            {"cameras": {"primary": "observation.images.depth"}},
            r"feature 'observation\.images\.depth' for the role 'primary' is a depth map; expected three channels",
        ),
        ({"cameras": {"wrist": WRIST}}, r"roles \['wrist'\]; expected 'primary'"),
        ({"cameras": {"primary": TOP, "left": WRIST}}, r"roles \['left', 'primary'\]"),
    ],
)
def test_what_the_dataset_lacks(dataset, arguments, message):
    with pytest.raises(DatasetError, match=message):
        LeRobotSource(dataset, **arguments)


def test_a_column_that_info_promises_but_the_file_lacks(dataset):
    edit_data(only_file(dataset, "data/*/*.parquet"), lambda columns: columns.pop("action"))
    with pytest.raises(DatasetError, match=r"data/.*\.parquet has no column 'action'; it has observation\.state, timestamp"):
        LeRobotSource(dataset)


def wrong_cell(key, row, value):
    return lambda columns: columns[key].__setitem__(row, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_cell("action", 4, [0.0, float("nan"), 0.0]), "feature 'action' is not finite at step 4"),
        (wrong_cell("timestamp", 4, 0.3), "feature 'timestamp' does not increase"),
        (wrong_cell("timestamp", 4, float("nan")), "feature 'timestamp' does not increase"),
        (wrong_cell("timestamp", 4, None), "feature 'timestamp' is float with 1 nulls"),
        (wrong_cell("episode_index", 8, 7), "has 8 rows; meta says 9 consecutive ones"),
        (wrong_cell("task_index", 0, 5), r"feature 'task_index' is 5; meta/tasks has \[0, 1\]"),
    ],
)
def test_wrong_rows_are_named_or_left_out(dataset, change, message):
    edit_data(only_file(dataset, "data/*/*.parquet"), change)
    with pytest.raises(DatasetError, match=rf"\.parquet.*{message}"):
        LeRobotSource(dataset)
    source = LeRobotSource(dataset, skip_damaged=True)
    messages = source.skipped["it is damaged"]
    assert message.split(";")[0].split("(")[0] in messages[0]
    assert len(source) + len(messages) == 3 and len(source[len(source) - 1]) == 7


def test_widths_are_checked_against_info(dataset):
    edit_info(dataset, lambda info: info["features"]["action"].update(shape=[4]))
    with pytest.raises(DatasetError, match=r"parquet: feature 'action' has rows of \[3\] values; meta/info.json says 4"):
        LeRobotSource(dataset)


def test_a_missing_video_is_found_at_opening(dataset):
    path = only_file(dataset, "*.mp4")
    path.unlink()
    with pytest.raises(DatasetError, match=rf"episode 0: the video .*{path.name} of feature"):
        LeRobotSource(dataset)


def test_frames_that_are_missing_from_a_video(dataset):
    path = sorted(path for path in dataset.rglob("*.mp4") if "top" in str(path))[-1]
    formats.encode(path, formats.frames(2, 5), 10)
    frames = LeRobotSource(dataset)[2].frames
    assert_frames(frames.take([4, 0]), 2, [4, 0])
    for steps in ([5], [0, 6]):
        with pytest.raises(DatasetError, match=rf"episode 2, feature '{TOP}': step {steps[-1]} has no frame: .*{path.name}"):
            frames.take(steps)
    assert_frames(frames.take([4]), 2, [4])


def test_a_gap_inside_a_video(tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v2.1", (20,), cameras=(TOP,))
    path = only_file(directory, "*.mp4")
    images = formats.frames(0, 20)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for k in itertools.chain(range(8), range(10, 20)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(images[k]), format="rgb24")
            frame.pts, frame.time_base = k, stream.time_base or 1 / stream.average_rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = LeRobotSource(directory)[0].frames
    assert_frames(frames.take([7, 10, 19]), 0, [7, 10, 19])
    with pytest.raises(DatasetError, match="step 8 has no frame"):
        frames.take([8])


@pytest.mark.parametrize("version", VERSIONS)
def test_truncated_videos(tmp_path, version):
    for faststart, message in ((False, "cannot be opened as a video"), (True, "cannot be decoded|has no frame|is damaged")):
        directory = write_lerobot(tmp_path / f"{faststart}", version, (40, 40), cameras=(TOP,), faststart=faststart)
        path = only_file(directory, "*.mp4")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 3 // 4])
        episode = 0 if version == "v2.1" else 1
        frames = LeRobotSource(directory)[episode].frames
        with pytest.raises(DatasetError, match=rf"episode {episode}, feature '{TOP}'.*({message})") as caught:
            frames.take([0, 39])
        assert path.name in str(caught.value)


def test_a_video_of_another_size(dataset):
    edit_info(dataset, lambda info: info["features"][TOP].update(shape=[3, 96, 64], names=["channels", "height", "width"]))
    source = LeRobotSource(dataset)
    assert source.image_size == (96, 64)
    with pytest.raises(DatasetError, match=rf"feature '{TOP}': the frame of step 3 in .*mp4 is \(48, 64\); expected \(96, 64\)"):
        source[0].frames.take([3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(codebase_version="v1.6"), r"codebase_version is 'v1\.6'; expected one of v2\.0, v2\.1, v3\.0"),
        (lambda info: info.pop("features"), "field 'features' is None"),
        (lambda info: info.update(fps=0), "field 'fps' is 0"),
        (lambda info: info.update(data_path="data/{shard}"), r"field 'data_path' is 'data/\{shard\}'; expected a pattern of"),
        (lambda info: info.update(video_path=None), "field 'video_path' is None"),
        (lambda info: info["features"].update({TOP: None}), rf"feature '{TOP}' is None; expected a type and a shape"),
        (lambda info: info.update(chunks_size="many"), "field 'chunks_size' is 'many'"),
    ],
)
def test_what_is_wrong_with_info(dataset, change, message):
    edit_info(dataset, change)
    with pytest.raises(DatasetError, match=message):
        LeRobotSource(dataset)


def test_what_is_no_dataset(tmp_path, dataset):
    with pytest.raises(DatasetError, match=r"no meta/info\.json"):
        LeRobotSource(tmp_path / "elsewhere")
    path = only_file(dataset, "data/*/*.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=rf"{path} cannot be read"):
        LeRobotSource(dataset)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"{path} cannot be read"):
        LeRobotSource(dataset)


def test_meta_files_that_are_damaged(tmp_path):
    directory = write_lerobot(tmp_path / "v2", "v2.1")
    with (directory / "meta" / "episodes.jsonl").open("a") as file:
        file.write('{"episode_index": 3}\n')
    with pytest.raises(DatasetError, match=r"episodes\.jsonl: .* has no field 'length'"):
        LeRobotSource(directory)
    (directory / "meta" / "episodes.jsonl").write_text('{"episode_index": 0\n')
    with pytest.raises(DatasetError, match=r"episodes\.jsonl, line 1: is not JSON"):
        LeRobotSource(directory)
    directory = write_lerobot(tmp_path / "v3", "v3.0")
    edit_data(only_file(directory, "meta/episodes/*/*.parquet"), lambda columns: columns.pop(f"videos/{TOP}/from_timestamp"))
    with pytest.raises(DatasetError, match=rf"has no column 'videos/{TOP}/from_timestamp'"):
        LeRobotSource(directory)


def test_actions_may_be_poses(tmp_path):
    with pytest.raises(ValueError, match="of a pose layout are of width 3"):
        LeRobotSource(write_lerobot(tmp_path / "demo", "v2.1"), action_layout="pose")[0]
    delta = LeRobotSource(tmp_path / "demo", action_layout="delta")[0]
    assert delta.action_layout == "delta" and dataclasses.replace(delta, actions=None).actions is None


def test_a_camera_that_nobody_chose_is_left_out(dataset):
    edit_info(dataset, lambda info: info["features"][WRIST].update(shape=[48, 64, 4]))
    source = LeRobotSource(dataset)
    assert source.cameras == {"primary": TOP}
    assert source.skipped["it has shape [48, 64, 4] with names ['height', 'width', 'channels']"] == [WRIST]
    with pytest.raises(DatasetError, match=rf"feature '{WRIST}' for the role 'wrist' has shape \[48, 64, 4\].*; expected three"):
        LeRobotSource(dataset, cameras={"primary": TOP, "wrist": WRIST})


def set_tasks(directory, *tasks):
    if (directory / "meta" / "tasks.parquet").exists():
        table = pa.table({"task_index": range(len(tasks)), "task": pa.array(tasks, pa.string())})
        pq.write_table(table, directory / "meta" / "tasks.parquet")
    else:
        lines = [json.dumps({"task_index": i, "task": task}, ensure_ascii=False) for i, task in enumerate(tasks)]
        (directory / "meta" / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_each_step_has_its_task(dataset):
    edit_data(only_file(dataset, "data/*/*.parquet"), lambda c: c["task_index"].__setitem__(slice(4, 9), [1] * 5))
    first, second, _ = LeRobotSource(dataset)
    assert first.instructions == formats.TASKS and second.instruction == formats.TASKS[1]
    assert [first.instruction_at(step) for step in (0, 3, 4, 8)] == [formats.TASKS[i] for i in (0, 0, 1, 1)]


def test_tasks_may_have_separators_of_lines(dataset):
    tasks = ["pick\u2028up", "open\u0085it"]
    set_tasks(dataset, *tasks)
    assert [episode.instruction for episode in LeRobotSource(dataset)] == [*tasks, tasks[0]]


@pytest.mark.parametrize("task", [None, ["pick", "place"], {"text": "pick"}])
def test_a_task_that_is_no_text(tmp_path, task):
    directory = write_lerobot(tmp_path / "demo", "v3.0" if task is None else "v2.1")
    set_tasks(directory, formats.TASKS[0], task)
    with pytest.raises(DatasetError, match=rf"episode 1: task 1 of meta/tasks is {re.escape(repr(task))}; expected a text$"):
        LeRobotSource(directory)
    source = LeRobotSource(directory, skip_damaged=True)
    assert len(source) == 2 and source[1].instruction == formats.TASKS[0]


def test_a_null_that_v2_has_as_a_task_or_an_index(tmp_path):
    directory = write_lerobot(tmp_path / "demo", "v2.1")
    set_tasks(directory, formats.TASKS[0], None)
    with pytest.raises(DatasetError, match="task 1 of meta/tasks is None; expected a text"):
        LeRobotSource(directory)
    for file, field in (("episodes", "length"), ("tasks", "task_index")):
        path = directory / "meta" / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        path.write_text("\n".join(json.dumps(row | {field: None}) for row in rows))
        with pytest.raises(DatasetError, match=rf"{file}\.jsonl: field '{field}' is None; expected an integer"):
            LeRobotSource(directory)


def test_time_stamps_of_long_episodes_are_exact(dataset):
    start = 4000.0  # where float32 numbers are 0.24 ms apart

    def late(columns):
        columns["timestamp"][:9] = (start + np.arange(9) / 7).astype(np.float32).tolist()

    edit_data(only_file(dataset, "data/*/*.parquet"), late)
    edit_info(dataset, lambda info: info.update(fps=7))
    episode = LeRobotSource(dataset)[0]
    np.testing.assert_allclose(episode.timestamps, start + np.arange(9) / 7, rtol=0, atol=1e-9)


def test_images_in_parquet_files_are_turned_or_refused(tmp_path):
    directory, exif = write_lerobot(tmp_path / "demo", "v2.1", stored_as="image", cameras=(TOP,)), Image.Exif()
    exif[0x0112] = 3
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[: SIZE[0] // 2] = 200
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full(SIZE, 1000, np.uint16)).save(tmp_path / "deep.png")
    files = [{"bytes": (tmp_path / name).read_bytes(), "path": "x"} for name in ("turned.png", "deep.png")]
    edit_data(only_file(directory, "data/*/*.parquet"), lambda columns: columns.update({TOP: files + columns[TOP][2:]}))
    frames = LeRobotSource(directory)[0].frames
    np.testing.assert_array_equal(frames.take([0]), picture[None, ::-1, ::-1])
    with pytest.raises(DatasetError, match=r"the image of step 1 in .* cannot be decoded: its pixels are of the mode I;16"):
        frames.take([1])


@pytest.mark.parametrize("turn", list(formats.TURNS)[:2])
def test_videos_are_turned(dataset, turn):
    corner = np.zeros((9 + 12, *SIZE, 3), np.uint8)
    corner[:, : SIZE[0] // 2, : SIZE[1] // 2] = 200
    path = sorted(path for path in dataset.rglob("*.mp4") if "top" in str(path))[0]
    formats.encode(path, corner, 10)
    formats.turn_video(path, turn)
    expected = formats.TURNS[turn](corner[0])
    edit_info(dataset, lambda info: info["features"][TOP].update(shape=list(expected.shape)))
    (seen,) = LeRobotSource(dataset)[0].frames.take([5])
    np.testing.assert_allclose(seen[4::8, 4::8].astype(int), expected[4::8, 4::8], atol=12)


def test_a_byte_order_mark_is_no_part_of_a_file(dataset):
    before = [episode.instruction for episode in LeRobotSource(dataset)]
    for path in [*dataset.glob("meta/*.json"), *dataset.glob("meta/*.jsonl")]:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert [episode.instruction for episode in LeRobotSource(dataset)] == before
