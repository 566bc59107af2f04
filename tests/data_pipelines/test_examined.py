import dataclasses

import numpy as np

from data_pipelines.examined import examined_windows, recordings
from data_pipelines.loader import WindowDataset


def test_windows_are_spread_and_have_what_was_commanded_before(make_source, config):
    """Actions are 100·episode + step + 0.5; the last anchor of 12 steps is 10, since the first action is a step later."""
    windows = WindowDataset(make_source(12, 20, 15), config, actions=True)
    found = examined_windows(windows, config, episodes=2, count=3)
    assert [window["episode"] for window in found] == [0, 0, 0, 2, 2, 2]
    assert [window["proprio"][0, 0] for window in found] == [0, 5, 10, 200, 206, 213]
    held = [window["held"] for window in found]
    assert [chunk[0, 0] for chunk in held] == [0.5, 4.5, 9.5, 200.5, 205.5, 212.5]
    assert all(chunk.shape == (4, 2) and (chunk == chunk[0]).all() for chunk in held)
    assert [window["actions"][0, 0] for window in found] == [1.5, 6.5, 11.5, 201.5, 207.5, 214.5]


def test_windows_of_videos_have_no_commands(make_source, config):
    found = examined_windows(WindowDataset(make_source(12, 20), config, actions=False), config, episodes=5, count=1)
    assert [window["episode"] for window in found] == [0, 1] and all("held" not in window for window in found)


def test_held_poses_are_seen_from_the_current_hand(make_source, config):
    """The hand stands at its last command, one step after it."""
    (episode,) = make_source(12)
    steps = np.arange(12, dtype=np.float32)
    poses = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), (12, 1))
    poses[:, 0] = steps
    source = make_source(12)
    source[0] = dataclasses.replace(episode, actions=poses + np.float32([2] + [0] * 9), proprio=poses, action_layout="pose")
    windows = WindowDataset(source, config, actions=True)
    (window,) = examined_windows(windows, config, episodes=1, count=1)
    np.testing.assert_allclose(window["held"], np.tile(np.float32([2, 0, 0, 1, 0, 0, 0, 1, 0, 1]), (4, 1)))  # its first step
    (recording,) = recordings(windows, config)
    np.testing.assert_allclose(recording.targets[:, 0], 3)  # a step of the hand, and 2
    assert recording.actions.shape == (12, 10) and len(recording.targets) == 11
