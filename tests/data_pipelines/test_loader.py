import dataclasses
import itertools
import os
import re
import types

import chex
import jax
import numpy as np
import pytest
from synthetic import BrokenFrames, NarrowSource, WristSource

from data_pipelines import loader
from data_pipelines.loader import Part, WindowDataset, make_batches
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.sources.rlds import DatasetError
from data_pipelines.statistics import action_statistics
from mimic_video.batch import fields
from mimic_video.config import ActionDecoderConfig, ConfigError
from mimic_video.transforms import Normalizer

DECODER = ActionDecoderConfig(action_dim=2, proprio_dim=3)


def text(instruction: str) -> np.ndarray:
    return np.full((2, 3), len(instruction), np.float32)


def batches(dataset, count, *, start_step=0, batch_size=4, seed=7, normalizers=None, **options):
    return mixed_batches([Part("steps", dataset, normalizers)], count, start_step, batch_size, seed, **options)


def mixed_batches(parts, count, start_step=0, batch_size=4, seed=7, weights=(1.0, 2.0), **options):
    mixture = Mixture([len(part.windows) for part in parts], [Phase(0, weights[: len(parts)])], batch_size, seed)
    options = {"text": text, "decoder": DECODER} | options
    stream = make_batches(parts, mixture, batch_size=batch_size, start_step=start_step, **options)
    return list(itertools.islice(stream, count))


def windows_of(batch) -> list[float]:
    """The proprio value tells (episode, anchor) of each row."""
    return batch.observation.proprio[:, 0, 0].tolist()


@pytest.fixture
def dataset(make_source, config) -> WindowDataset:
    return WindowDataset(make_source(12, 20, 9), config, actions=True)


def test_windows_are_episodes_times_anchors(dataset, make_source, config):
    assert len(dataset) == 11 + 19 + 8
    assert [dataset[i]["proprio"][0, 0] for i in (0, 10, 11, 29, 30, 37)] == [0, 10, 100, 118, 200, 207]
    assert dataset[11]["instruction"] == "do task 1"
    video = WindowDataset(make_source(12, 20, 9), config, actions=False)
    assert len(video) == 12 + 20 + 9
    assert set(video[0]) == {"instruction", "video", "frame_mask"}


def test_batch_contents(dataset):
    (batch,) = batches(dataset, 1)
    assert {name: (value.shape, value.dtype.name) for name, value in fields(batch).items()} == {
        "video": ((4, 1, 9, 16, 32, 3), "uint8"),
        "frame_mask": ((4, 9), "bool"),
        "text": ((4, 2, 3), "float32"),
        "proprio": ((4, 1, 3), "float32"),
        "actions": ((4, 4, 2), "float32"),
        "action_mask": ((4, 4), "bool"),
    }
    anchors = np.array(windows_of(batch)) % 100
    np.testing.assert_array_equal(batch.observation.video[:, 0, 4, 0, 0, 0] // 4, anchors)  # the frame at the anchor
    np.testing.assert_array_equal(batch.actions[:, 0, 0] % 100, anchors + 1.5)
    assert set(batch.observation.text.ravel()) == {9.0}


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order(dataset):
    rows = [value for batch in batches(dataset, 19) for value in windows_of(batch)]  # two epochs of 38 windows
    everything = sorted(dataset[i]["proprio"][0, 0] for i in range(38))
    assert sorted(rows[:38]) == sorted(rows[38:]) == everything
    assert rows[:38] != rows[38:] and rows[:38] != everything


def test_the_seed_decides_the_order(dataset):
    first, again, other = (batches(dataset, 3, seed=seed) for seed in (7, 7, 8))
    assert [windows_of(b) for b in first] == [windows_of(b) for b in again] != [windows_of(b) for b in other]


@pytest.mark.parametrize("start_step", [1, 9, 25])  # inside the first epoch, at its end, beyond it
def test_resuming_equals_skipping(dataset, start_step):
    whole = batches(dataset, start_step + 2)
    for expected, resumed in zip(whole[start_step:], batches(dataset, 2, start_step=start_step), strict=True):
        chex.assert_trees_all_equal(resumed, expected)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 3], [1, 2]], [[1, 2], [1, 2], [0, 3]]], ids=str)
def test_processes_read_their_rows_of_the_same_global_batches(dataset, shares):
    alone = batches(dataset, 12)
    for rows in shares:
        for whole, part in zip(alone, batches(dataset, 12, rows=rows), strict=True):
            chex.assert_trees_all_equal(part, jax.tree.map(lambda value, rows=rows: value[rows], whole))


@pytest.mark.parametrize("rows", [[], [3, 4], [-1]])
def test_rows_that_a_batch_does_not_have(dataset, rows):
    with pytest.raises(ValueError, match=r"rows are .*; expected one or more from 0 to batch_size-1=3"):
        batches(dataset, 1, rows=rows)


def test_text_is_computed_once_per_instruction(dataset):
    calls = []
    batches(dataset, 10, text=lambda instruction: calls.append(instruction) or text(instruction))
    assert sorted(calls) == ["do task 0", "do task 1"]


def test_normalizers(dataset, config):
    statistics = action_statistics(dataset.episodes, config)
    normalizers = {key: Normalizer.from_statistics(statistics[key], "variance", key) for key in ("action", "proprio")}
    (raw,), (batch,) = batches(dataset, 1), batches(dataset, 1, normalizers=normalizers)
    np.testing.assert_array_equal(batch.actions, normalizers["action"].normalize(raw.actions))
    np.testing.assert_array_equal(batch.observation.proprio, normalizers["proprio"].normalize(raw.observation.proprio))
    assert abs(batch.actions).max() < 3 < abs(raw.actions).max()
    with pytest.raises(ValueError, match="expected action and proprio"):
        Part("steps", dataset, {"action": normalizers["action"]})


def test_errors_while_loading_reach_the_caller(dataset):
    def broken(instruction):
        raise RuntimeError("no such text")

    with pytest.raises(RuntimeError, match="no such text"):
        batches(dataset, 1, text=broken)


@pytest.mark.parametrize("cache_mb, decoded", [(1, 41), (0, None)])
def test_frames_are_decoded_once_while_they_fit(make_source, config, cache_mb, decoded):
    source = make_source(12, 20, 9)
    dataset = WindowDataset(source, dataclasses.replace(config, frame_cache_mb=cache_mb), actions=False)
    expected = [dataset[i] for i in range(len(dataset))]
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset[i]["video"], expected[i]["video"])
    taken = sum(episode.frames.taken for episode in source)
    assert taken == decoded if decoded else taken > 2 * 41


def test_the_cache_is_bounded(make_source, config):
    # 1 MiB holds 682 frames of 16×32×3 bytes; the episodes have 1,000
    dataset = WindowDataset(make_source(*[50] * 20), dataclasses.replace(config, frame_cache_mb=1), actions=False)
    for i in range(len(dataset)):
        dataset[i]
    cache = dataset.episodes[0].frames.cache
    assert sum(frame.nbytes for frame in cache._frames.values()) == cache._used <= 2**20
    assert len(cache._frames) == 682


def test_windows_longer_than_every_episode_name_the_field(make_source, config):
    def dataset(*, actions, **window):
        return WindowDataset(make_source(12, 9), dataclasses.replace(config, **window), actions=actions)

    with pytest.raises(DatasetError, match=r"'data\.future_frames' is 12: .* spans 1\.60 s.* 2 episodes of memory lasts 1\.10 s"):
        dataset(future_frames=12, actions=True)
    with pytest.raises(DatasetError, match=r"'data\.action_horizon' is 12: its window spans 1\.20 s"):
        dataset(action_horizon=12, actions=True)
    assert len(dataset(action_horizon=12, actions=False)) == 12 + 9
    assert len(dataset(action_horizon=11, actions=True)) == 11 + 8  # fits the longest exactly
    for actions in (False, True):
        with pytest.raises(
            DatasetError, match=r"'data\.future_frames' is 4: .* the longest of 2 episodes of memory lasts 0\.00 s"
        ):
            WindowDataset(make_source(1, 1), config, actions=actions)


def test_an_episode_of_one_step_has_one_action_or_no_window(make_source, config):
    late, now = (WindowDataset(make_source(1, 9), dataclasses.replace(config, action_delay=d), actions=True) for d in (0.1, 0.0))
    assert len(late) == 8 and len(now) == 1 + 9
    assert now[0]["action_mask"].tolist() == [True, False, False, False] and now[0]["actions"][:, 0].tolist() == [0.5] * 4
    assert all(now[i]["action_mask"][0] for i in range(10)) and all(late[i]["action_mask"][0] for i in range(8))


def test_missing_actions(make_source, config):
    source = make_source(12)
    source.action_dim = None
    with pytest.raises(DatasetError, match="memory has no action"):
        WindowDataset(source, config, actions=True)


# Mixtures.


@pytest.fixture
def parts(make_source, config):
    wide = WindowDataset(make_source(12, 20, 9), config, actions=True)
    return [Part("wide", wide), Part("narrow", WindowDataset(NarrowSource(30, 25), config, actions=True))]


def test_robots_of_different_widths_share_batches(parts):
    decoder = dataclasses.replace(DECODER, embodiments=2)
    batches = mixed_batches(parts, 256, decoder=decoder)
    rows = fields(jax.tree.map(lambda *parts: np.concatenate(parts), *batches))
    narrow = rows["embodiment"] == 1
    assert rows["embodiment"].dtype == np.int32 and narrow.sum() == 683  # two thirds of a block of 1024
    assert rows["actions"].shape == (1024, 4, 2) and rows["proprio"].shape == (1024, 1, 3)
    np.testing.assert_array_equal(rows["action_dims"], np.stack([np.ones(1024, bool), ~narrow], 1))
    np.testing.assert_array_equal(rows["actions"][narrow][..., 1], 0)
    np.testing.assert_array_equal(rows["proprio"][narrow][..., 2], 0)
    assert rows["proprio"][narrow][:, 0, 0].min() >= 5000 > rows["proprio"][~narrow].max()


def test_datasets_may_be_of_one_robot(parts):
    decoder, same = dataclasses.replace(DECODER, embodiments=4), [dataclasses.replace(part, embodiment=3) for part in parts]
    for batch in mixed_batches(same, 4, decoder=decoder):
        robots = batch.observation.embodiment
        assert robots.dtype == np.int32 and (robots == 3).all()


def test_each_robot_has_its_own_normaliser(parts, config):
    statistics = [action_statistics(part.windows.episodes, config) for part in parts]
    normalizers = [{key: Normalizer.from_statistics(entry[key], "variance") for key in entry} for entry in statistics]
    normalised = [dataclasses.replace(part, normalizers=own) for part, own in zip(parts, normalizers, strict=True)]
    for raw, batch in zip(mixed_batches(parts, 8), mixed_batches(normalised, 8), strict=True):
        assert np.abs(batch.observation.proprio).max() < 4
        for row, value in zip(batch.observation.proprio, raw.observation.proprio, strict=True):
            which = int(value[0, 0] >= 5000)
            width = parts[which].windows[0]["proprio"].shape[-1]
            expected = normalised[which].normalizers["proprio"].normalize(value[:, :width])
            np.testing.assert_array_equal(row[:, :width], expected)


def test_scales_give_differences_of_normalised_actions_their_raw_units(parts, config):
    statistics = [action_statistics(part.windows.episodes, config) for part in parts]
    normalizers = [{key: Normalizer.from_statistics(entry[key], "variance") for key in entry} for entry in statistics]
    normalised = [dataclasses.replace(part, normalizers=own) for part, own in zip(parts, normalizers, strict=True)]
    (batch,) = mixed_batches(normalised, 1, batch_size=16, scales=True)
    narrow = ~batch.observation.action_dims[:, 1]
    assert 0 < narrow.sum() < 16 and batch.action_scale.shape == (16, 4, 2)
    for scale, alone in zip(batch.action_scale, narrow, strict=True):
        own, width = normalizers[int(alone)]["action"], 1 if alone else 2
        zero, one = (own.unnormalize(np.full((4, width), value, np.float32)) for value in (0, 1))
        np.testing.assert_allclose(scale[:, :width], one - zero, rtol=1e-5)
        assert not scale[:, width:].any()


def test_samples_without_a_camera_share_batches_with_those_that_have_it(make_source, config):
    config = dataclasses.replace(config, cameras=("primary", "wrist"))
    sources = {"without": make_source(12), "with": WristSource(20, 9)}
    datasets = {name: WindowDataset(source, config, actions=True) for name, source in sources.items()}
    assert [windows.cameras for windows in datasets.values()] == [("primary",), ("primary", "wrist")]
    for batch in mixed_batches([Part(name, windows) for name, windows in datasets.items()], 8):
        assert batch.observation.video.shape == (4, 2, 9, 16, 32, 3) and batch.observation.view_mask.shape == (4, 2)
        for video, there in zip(batch.observation.video, batch.observation.view_mask, strict=True):
            np.testing.assert_array_equal(video[1], video[0] + 1 if there[1] else 0)


def test_a_broken_window_ends_training_or_is_skipped_and_counted(make_source, config, caplog):
    source = make_source(12, 20, 9)
    source[1] = dataclasses.replace(source[1], frames=BrokenFrames(source[1].frames.frames))
    windows = WindowDataset(source, config, actions=True)
    with pytest.raises(DatasetError, match="memory episode 1: image_primary of step 3"):
        batches(windows, 8)
    with caplog.at_level("WARNING", logger="absl"):
        read = batches(windows, 38 // 4, skip_broken=True)
    rows = [value for batch in read for value in windows_of(batch)]
    assert not [value for value in rows if 100 <= value < 200]
    counts = [int(found) for found in re.findall(r"skipped a window \((\d+) so far\): memory episode 1", caplog.text)]
    assert sorted(counts) == list(range(1, len(counts) + 1)) and len(counts) >= 19


def test_a_window_has_the_instruction_of_its_anchor(make_source, config):
    source = make_source(12)
    words = ("", "", "reach", *["pick"] * 9)
    source[0] = dataclasses.replace(source[0], instruction=words)
    dataset = WindowDataset(source, config, actions=True)
    assert [dataset[i]["instruction"] for i in range(len(dataset))] == list(words[:11])
    with pytest.raises(ValueError, match="episode 0: instruction has 11 steps, timestamps have 12"):
        dataclasses.replace(source[0], instruction=words[1:])


def test_workers_for_whose_batches_shared_memory_has_no_room(dataset, monkeypatch):
    """As in a container. Without the check the system ends the workers with SIGBUS."""
    size = sum(value.nbytes for value in fields(batches(dataset, 1)[0]).values())
    free = types.SimpleNamespace(f_bavail=15, f_frsize=size)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    with pytest.raises(ConfigError) as error:
        batches(dataset, 1, workers=3)
    assert f"'data.workers' is 3, whose batches of {size / 1e6:.4g} MB need {20 * size / 1e6:.4g} MB" in str(error.value)
    assert f"/dev/shm has {15 * size / 1e6:.4g} MB left; expected more of it (docker run --shm-size=1g)" in str(error.value)
    free.f_bavail = 20
    loader._require_shared_memory(3, size)
    monkeypatch.undo()
    monkeypatch.setattr(loader, "_SHARED_MEMORY", "/nowhere")
    with pytest.raises(ConfigError, match="/nowhere has 0 MB left"):
        batches(dataset, 1, workers=1)
