import dataclasses

import numpy as np
import pytest

from data_pipelines.statistics import action_statistics, load_statistics, save_statistics
from data_pipelines.windows import action_window, anchors


def test_statistics_cover_every_window_and_no_image(make_source, config):
    source = make_source(12, 20)
    statistics = action_statistics(source, config)
    windows = [action_window(episode, anchor, config) for episode in source
               for anchor in anchors(episode.timestamps, config, actions=True)]
    assert len(windows) == 11 + 19
    assert statistics["action"].mean.shape == (4, 2) and statistics["proprio"].mean.shape == (1, 3)
    np.testing.assert_allclose(statistics["action"].mean, np.mean([w["actions"] for w in windows], axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics["proprio"].std, np.std([w["proprio"] for w in windows], axis=0), rtol=1e-6)
    assert statistics["action"].min[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5]
    assert statistics["proprio"].max[0, 0] == 118  # step 19 has no action after it
    assert all(episode.frames.taken == 0 for episode in source)


def test_no_windows_and_action_free_are_errors(make_source, make_episode, config):
    with pytest.raises(ValueError, match=r"data\.action_delay=5\.0"):
        action_statistics(make_source(12), dataclasses.replace(config, action_delay=5.0))
    with pytest.raises(ValueError, match="episode 0"):
        action_statistics([make_episode(12, action_free=True)], config)


def test_file_round_trip(make_source, config, tmp_path):
    statistics = action_statistics(make_source(12), config)
    path = tmp_path / "statistics.json"
    save_statistics(path, statistics)
    save_statistics(path, statistics)  # replaces
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.json"]
    restored = load_statistics(path)
    assert set(restored) == {"action", "proprio"}
    np.testing.assert_array_equal(restored["action"].percentiles, statistics["action"].percentiles)


def test_a_failed_save_leaves_the_old_file(make_source, config, tmp_path, monkeypatch):
    statistics = action_statistics(make_source(12), config)
    path = tmp_path / "statistics.json"
    save_statistics(path, statistics)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_statistics(path, {"action": statistics["action"]})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", "[1]", '{"action": 3}', '{"action": {"mean": [[1]]}}'])
def test_broken_files_are_named(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        load_statistics(tmp_path / "broken.json")
