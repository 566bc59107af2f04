import dataclasses

import numpy as np
import pytest

from data_pipelines import statistics
from data_pipelines.statistics import action_statistics
from data_pipelines.windows import action_window, action_windows, anchors
from mimic_video.transforms import compute_statistics


def test_statistics_cover_every_window_and_no_image(make_source, config):
    source = make_source(12, 20)
    found = action_statistics(source, config)
    windows = [action_window(episode, anchor, config) for episode in source
               for anchor in anchors(episode.timestamps, config, actions=True)]
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


@pytest.mark.parametrize("memory", [2**27, 145 * 2 * 4 * 3, 1])  # all steps at once, three, one
def test_the_horizon_in_parts_equals_all_at_once(make_episode, config, monkeypatch, memory):
    monkeypatch.setattr(statistics, "_MEMORY", memory)
    random = np.random.default_rng(0)
    episodes = [dataclasses.replace(make_episode(30), actions=random.normal(size=(30, 2)).astype(np.float32)) for _ in range(5)]
    windows = [action_windows(episode, anchors(episode.timestamps, config, actions=True), config) for episode in episodes]
    expected = compute_statistics(np.concatenate([window["actions"] for window in windows]))
    found = action_statistics(episodes, config)["action"]
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value)
