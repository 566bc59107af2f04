import concurrent.futures
import dataclasses
import threading
import time

import numpy as np
import pytest
from synthetic import SIZE

from data_pipelines import statistics
from data_pipelines.episode import Episode
from data_pipelines.loader import WindowDataset
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.statistics import Hosts, action_statistics, cached_statistics
from data_pipelines.windows import action_window, action_windows, anchors
from data_pipelines.writers import write_rlds
from mimic_video.config import DataConfig
from mimic_video.transforms import compute_statistics


def test_statistics_cover_every_window_and_no_image(make_source, config):
    source = make_source(12, 20)
    found = action_statistics(source, config)
    windows = [
        action_window(episode, anchor, config)
        for episode in source
        for anchor in anchors(episode.timestamps, config, actions=True)
    ]
    assert len(windows) == 11 + 19
    assert found["action"].mean.shape == (4, 2) and found["proprio"].mean.shape == (1, 3)
    np.testing.assert_allclose(found["action"].mean, np.mean([w["actions"] for w in windows], axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["proprio"].std, np.std([w["proprio"] for w in windows], axis=0), rtol=1e-6)
    assert found["action"].min[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5]
    assert found["proprio"].max[0, 0] == 118  # step 19 has no action after it
    assert all(episode.frames.taken == 0 for episode in source)


def test_no_windows_and_action_free_are_errors(make_source, make_episode, config):
    with pytest.raises(ValueError, match=r"data\.action_delay=5\.0"):
        action_statistics(make_source(12), dataclasses.replace(config, action_delay=5.0))
    with pytest.raises(ValueError, match="episode 0"):
        action_statistics([make_episode(12, action_free=True)], config)


def random_episode(number, length=30, layout="vector", width=2, hz=10.0):
    """Without frames: whoever asks for one fails."""
    random = np.random.default_rng(number)
    if layout == "pose":
        width = 10
    proprio, actions = random.normal(size=(2, length, width)).astype(np.float32)
    if layout == "pose":
        proprio[:, [3, 7]] += 5  # so that rows of rotations are far from parallel
        actions[:, [3, 7]] += 5
    return Episode(f"episode {number}", np.arange(length) / hz, NoFrames(length), "do it", proprio, actions, layout)


@dataclasses.dataclass
class NoFrames:
    length: int

    def __len__(self):
        return self.length

    def take(self, indices):
        raise AssertionError("an image was read")


def assert_equal_bits(found, expected):
    assert set(found) == set(expected) == {"action", "proprio"}
    for key, entry in expected.items():
        for name, value in vars(entry).items():
            np.testing.assert_array_equal(getattr(found[key], name), value, err_msg=f"{key} {name}", strict=True)


@pytest.mark.parametrize("layout", ["vector", "pose"])
@pytest.mark.parametrize("memory", [2**29, 145 * 10 * 4 * 3, 1])  # all steps at once, three or one
def test_the_horizon_in_parts_equals_all_at_once(config, monkeypatch, memory, layout):
    monkeypatch.setattr(statistics, "_MEMORY", memory)
    off_grid = dataclasses.replace(config, control_hz=7.0)
    episodes = [random_episode(number, layout=layout) for number in range(5)]
    windows = [action_windows(episode, anchors(episode.timestamps, off_grid, actions=True), off_grid) for episode in episodes]
    expected = {
        "action": compute_statistics(np.concatenate([window["actions"] for window in windows])),
        "proprio": compute_statistics(np.concatenate([window["proprio"] for window in windows])),
    }
    assert_equal_bits(action_statistics(episodes, off_grid), expected)


class Together:
    """Hosts that run in threads and meet where they gather."""

    def __init__(self, count):
        self.count, self.given, self._barrier = count, [None] * count, threading.Barrier(count, timeout=30)

    def run(self, compute):
        """[compute(hosts) of each host]"""
        with concurrent.futures.ThreadPoolExecutor(self.count) as pool:
            return list(
                pool.map(lambda index: compute(Hosts(index, self.count, lambda v: self._gather(index, v))), range(self.count))
            )

    def _gather(self, index, values):
        self.given[index] = values
        self._barrier.wait()
        gathered = np.stack(self.given)
        self._barrier.wait()  # all have read before any goes on
        return gathered


@pytest.mark.parametrize("layout", ["vector", "pose"])
@pytest.mark.parametrize("count", [2, 3, 6])  # of four steps of the horizon
def test_hosts_compute_parts_that_join_to_the_same_bits(config, count, layout):
    off_grid = dataclasses.replace(config, control_hz=7.0)
    episodes = [random_episode(number, layout=layout) for number in range(4)]
    alone, together = action_statistics(episodes, off_grid), Together(count)
    for found in together.run(lambda hosts: action_statistics(episodes, off_grid, hosts)):
        assert_equal_bits(found, alone)
    computed = [{step for step in range(4) if part[:, step].any()} for part in together.given]
    assert computed == [set(range(host, 4, count)) for host in range(count)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mimic_video" / "statistics"


@pytest.fixture
def computed(monkeypatch):
    """How often statistics were computed, as a list that grows."""
    calls = []
    monkeypatch.setattr(statistics, "action_statistics", lambda *args: calls.append(None) or action_statistics(*args))
    return calls


def test_the_same_data_elsewhere_and_in_another_format_is_computed_once(tmp_path, config, cache, computed, make_episode):
    found = []
    for file_format in ("tfrecord", "array_record"):
        splits = {"train": [make_episode(n, episode=n) for n in (12, 20, 15)]}
        path = write_rlds(
            tmp_path / file_format, file_format, splits, control_hz=10.0, image_size=SIZE, description="", file_format=file_format
        )
        found.append(cached_statistics(RldsSource(path, "train"), config))
    assert len(computed) == len(list(cache.iterdir())) == 1
    assert_equal_bits(found[1], found[0])
    assert_equal_bits(found[0], action_statistics([make_episode(n, episode=n) for n in (12, 20, 15)], config))


def test_other_data_and_other_windows_have_other_statistics(config, cache, computed):
    episodes = [random_episode(number) for number in range(3)]
    other = dataclasses.replace(episodes[0], actions=episodes[0].actions + 1)
    cached_statistics(episodes, config)
    for changed, window in [
        ([other, *episodes[1:]], {}),
        (episodes, {"action_horizon": 3}),
        (episodes, {"control_hz": 5.0}),
        (episodes, {"action_delay": 0.2}),
        (episodes[:2], {}),
    ]:
        before, wanted = len(computed), dataclasses.replace(config, **window)
        assert_equal_bits(cached_statistics(changed, wanted), action_statistics(changed, wanted))
        assert len(computed) == before + 1
    cached_statistics(episodes, dataclasses.replace(config, frame_cache_mb=7, past_frames=1))  # which do not matter
    assert len(computed) == 6 == len(list(cache.iterdir()))


@pytest.mark.parametrize("damage", [lambda text: text[:99], lambda _: "{}", lambda text: text.replace("mean", "men")])
def test_a_damaged_file_is_replaced_with_a_warning(config, cache, computed, caplog, damage):
    episodes = [random_episode(0)]
    expected = cached_statistics(episodes, config)
    (file,) = cache.iterdir()
    file.write_text(damage(file.read_text()))
    with caplog.at_level("WARNING", logger="absl"):
        assert_equal_bits(cached_statistics(episodes, config), expected)
    assert f"{file} cannot be read" in caplog.text and len(computed) == 2
    assert_equal_bits(cached_statistics(episodes, config), expected)
    assert len(computed) == 2 and list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_no_error(config, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    with caplog.at_level("WARNING", logger="absl"):
        found = cached_statistics([random_episode(0)], config)
    assert "statistics are not kept" in caplog.text and "XDG_CACHE_HOME can name another folder" in caplog.text
    assert_equal_bits(found, action_statistics([random_episode(0)], config))


def test_hosts_of_which_one_has_the_statistics_compute_them_together(config, cache, computed, monkeypatch, tmp_path):
    """As each has a part: one that went ahead with its file would leave the others waiting."""
    episodes = [random_episode(number) for number in range(3)]
    homes = [tmp_path / "a", tmp_path / "b"]
    local = threading.local()
    monkeypatch.setattr(statistics, "user_cache", lambda what: homes[local.index] / what)

    def compute(hosts):
        local.index = hosts.index
        return cached_statistics(episodes, config, hosts)

    local.index = 0
    expected = cached_statistics(episodes, config)
    for calls in (1 + 2, 1 + 2):  # together, then from both files
        for found in Together(2).run(compute):
            assert_equal_bits(found, expected)
        assert len(computed) == calls
    assert [len(list((home / "statistics").iterdir())) for home in homes] == [1, 1]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_no_image_of_a_dataset_is_read(tmp_path, config, make_episode, monkeypatch, file_format):
    def fail(*_):
        raise AssertionError("an image was read")

    path = write_rlds(
        tmp_path,
        "steps",
        {"train": [make_episode(12)]},
        control_hz=10.0,
        image_size=SIZE,
        description="",
        file_format=file_format,
    )
    monkeypatch.setattr(RldsSource, "encoded", fail)
    windows = WindowDataset(RldsSource(path, "train"), config, actions=True)
    assert_equal_bits(action_statistics(windows.episodes, config), action_statistics([make_episode(12)], config))
    with pytest.raises(AssertionError, match="an image was read"):
        windows[0]


@pytest.mark.full_size
@pytest.mark.parametrize(("layout", "width"), [("vector", 20), ("pose", 10)])
def test_a_million_steps(layout, width):
    """The numbers of `action_statistics`: pytest -s -k million tests/data_pipelines/test_statistics.py"""
    config = DataConfig(action_horizon=15, control_hz=5.0, action_delay=0.2)
    episodes = [random_episode(number, 100, layout, width, hz=5.0) for number in range(10_000)]
    start, cpu = time.perf_counter(), time.process_time()
    found = action_statistics(episodes, config)
    print(f"{layout}: {time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU time")
    assert found["action"].mean.shape == (15, width)
    if layout == "vector":  # standard normal
        expected = np.broadcast_to(np.array([-1.96, 0.0, 1.96])[:, None, None], (3, 15, width))
        np.testing.assert_allclose(found["action"].percentiles[[25, 500, 975]], expected, atol=0.02)
