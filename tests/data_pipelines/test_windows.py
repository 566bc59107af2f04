import dataclasses

import numpy as np
import pytest
import tiny

from data_pipelines.episode import ArrayFrames, Episode
from data_pipelines.rates import resampled
from data_pipelines.windows import (
    Anchors,
    action_window,
    action_windows,
    anchors,
    at_rate,
    inside,
    linear,
    nearest,
    poses_at,
    video_window,
)
from mimic_video.config import DataConfig


def frame_steps(window) -> list[int]:
    return (window["video"][0, :, 0, 0, 0] // 4).tolist()


@pytest.mark.parametrize(
    "anchor, steps, mask",
    [
        (6, [2, 3, 4, 5, 6, 7, 8, 9, 10], "111111111"),
        (0, [0, 0, 0, 0, 0, 1, 2, 3, 4], "000011111"),
        (1, [0, 0, 0, 0, 1, 2, 3, 4, 5], "000111111"),
        (18, [14, 15, 16, 17, 18, 19, 19, 19, 19], "111111000"),
        (19, [15, 16, 17, 18, 19, 19, 19, 19, 19], "111110000"),
    ],
)
def test_video_window_repeats_and_masks_the_ends(make_episode, config, anchor, steps, mask):
    window = video_window(make_episode(20), anchor, config)
    assert frame_steps(window) == steps
    assert window["frame_mask"].tolist() == [m == "1" for m in mask]
    assert window["video"].shape == (1, 9, 16, 32, 3) and window["video"].dtype == np.uint8


def test_cameras_have_an_axis(make_episode, config):
    config = dataclasses.replace(config, cameras=("primary", "secondary", "wrist"))
    window = video_window(make_episode(20, wrist=True), 1, config)
    primary, secondary, wrist = window["video"]
    assert primary[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(wrist, primary + 1)
    assert not secondary.any() and window["view_mask"].tolist() == [True, False, True]


def test_video_slower_than_the_episode(make_episode, config):
    window = video_window(make_episode(40, hz=20.0), 20, dataclasses.replace(config, video_hz=5.0))  # every fourth step
    assert frame_steps(window) == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert window["frame_mask"].all()


def test_video_faster_than_the_episode_takes_the_earlier_on_ties(make_episode, config):
    window = video_window(make_episode(20, hz=5.0), 10, dataclasses.replace(config, video_hz=10.0))  # every half step
    assert frame_steps(window) == [8, 8, 9, 9, 10, 10, 11, 11, 12]


def test_each_frame_is_decoded_once(make_episode, config):
    episode = make_episode(20)
    video_window(episode, 0, config)
    assert episode.frames.taken == 5


@pytest.mark.parametrize(
    "anchor, steps, mask",
    [
        (0, [1, 2, 3, 4], "1111"),
        (16, [17, 18, 19, 19], "1110"),
        (18, [19, 19, 19, 19], "1000"),
    ],
)
def test_action_window(make_episode, config, anchor, steps, mask):
    window = action_window(make_episode(20, episode=1), anchor, config)
    np.testing.assert_array_equal(window["actions"], np.repeat(100.5 + np.array(steps)[:, None], 2, axis=1))
    np.testing.assert_array_equal(window["proprio"], np.full((1, 3), 100.0 + anchor))
    assert window["action_mask"].tolist() == [m == "1" for m in mask]
    assert window["actions"].dtype == window["proprio"].dtype == np.float32


def test_actions_at_another_rate_and_without_delay(make_episode, config):
    config = dataclasses.replace(config, control_hz=20.0, video_hz=5.0, action_delay=0.0)
    window = action_window(make_episode(40, hz=20.0), 7, config)
    assert window["actions"][:, 0].tolist() == [7.5, 8.5, 9.5, 10.5]


def test_action_windows_are_action_window_stacked(make_episode, config):
    episode = make_episode(20)
    steps = anchors(episode.timestamps, config, actions=True)
    stacked = action_windows(episode, steps, config)
    for row, step in enumerate(steps):
        for name, value in action_window(episode, step, config).items():
            np.testing.assert_array_equal(stacked[name][row], value)


def test_action_free_episodes_have_no_action_windows(make_episode, config):
    with pytest.raises(ValueError, match="episode 0"):
        action_window(make_episode(20, action_free=True), 0, config)


def test_anchors(config):
    times = np.arange(20) / 20.0
    assert anchors(times, config, actions=False).tolist() == list(range(20))
    assert anchors(times, config, actions=True).tolist() == list(range(18))  # the delay of 0.1 s is two steps
    assert anchors(times, dataclasses.replace(config, action_delay=0.0), actions=True).tolist() == list(range(20))
    assert anchors(times[:2], config, actions=True).tolist() == []


@pytest.mark.parametrize("hz", [3.0, 3.3, 5.0, 20.0, 29.97, 60.0])
def test_rounding_never_picks_a_neighbour_or_leaves_the_episode(hz):
    stored = np.arange(5000) / float(np.float32(hz))
    steps = np.arange(5000)
    for requested in (steps / hz, stored[0] + steps * (1 / hz), np.cumsum(np.full(5000, 1 / hz)) - 1 / hz):
        np.testing.assert_array_equal(nearest(stored, requested), steps)
        assert inside(stored, requested).all()
    np.testing.assert_array_equal(nearest(stored, (steps[:-1] + 0.5) / hz), steps[:-1])  # ties


def test_nearest_and_inside_at_the_ends():
    times = np.array([1.0, 2.0, 4.0])
    requested = np.array([[-5.0, 1.4, 1.6], [3.0, 3.1, 99.0]])
    assert nearest(times, requested).tolist() == [[0, 0, 1], [1, 2, 2]]
    assert inside(times, requested).tolist() == [[False, True, True], [True, True, False]]
    assert nearest(times[:1], requested).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_linear():
    times, values = np.array([1.0, 2.0, 4.0]), np.array([[0.0, 1.0], [10.0, 1.0], [30.0, 3.0]], np.float32)
    got = linear(times, values, np.array([0.0, 1.0, 1.25, 2.0, 3.0, 9.0]))
    np.testing.assert_allclose(got, [[0, 1], [0, 1], [2.5, 1], [10, 1], [20, 2], [30, 3]])
    assert got.dtype == np.float32
    np.testing.assert_allclose(linear(times[:1], values[:1], np.array([0.0, 5.0])), [[0, 1], [0, 1]])


def pose(position, degrees, gripper):
    """A pose turned about z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return [*position, c, -s, 0, s, c, 0, gripper]


def test_poses_between_steps():
    times = np.array([0.0, 1.0, 3.0])
    poses = np.float32([pose([0, 0, 0], 0, 1), pose([1, 2, 3], 90, 0), pose([3, 2, 1], -170, 0)])
    asked = np.array([[-1.0, 0.5], [0.75, 2.0], [3.0, 9.0]])
    expected = [
        [pose([0, 0, 0], 0, 1), pose([0.5, 1, 1.5], 45, 1)],  # a tie goes to the earlier gripper
        [pose([0.75, 1.5, 2.25], 67.5, 0), pose([2, 2, 2], 140, 0)],  # the short way round
        [pose([3, 2, 1], -170, 0), pose([3, 2, 1], -170, 0)],
    ]
    np.testing.assert_allclose(poses_at(times, poses, asked), expected, atol=1e-6)
    poses[:, 9] = [1.0, 0.5, 0.0]
    np.testing.assert_allclose(poses_at(times, poses, asked)[..., 9], [[1.0, 0.75], [0.625, 0.25], [0.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(poses_at(times[:1], poses[:1], asked), np.broadcast_to(poses[0], (3, 2, 10)))


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 0.08), (0.0, 255.0)])
def test_a_gripper_of_two_values_is_never_between_them(ends, config):
    times, asked = np.arange(6) / 10, np.linspace(-0.1, 0.7, 81)
    poses = np.float32([pose([k, 0, 0], 10 * k, ends[k in (2, 3)]) for k in range(6)])
    np.testing.assert_array_equal(poses_at(times, poses, asked)[:, 9], poses[nearest(times, asked), 9])
    episode = Episode("e", times, ArrayFrames(np.zeros((6, 2, 2, 3), np.uint8)), "", poses, poses, "pose")
    chunk = action_windows(episode, [0, 1, 2, 3], dataclasses.replace(config, control_hz=35.0))["actions"]
    assert set(np.unique(chunk[..., 9])) == set(np.float32(ends))
    faster = resampled(dataclasses.replace(episode, timestamps=times * 1.3), 10.0)  # as recordings are imported
    assert set(np.unique(faster.actions[:, 9])) == set(np.unique(faster.proprio[:, 9])) == set(np.float32(ends))
    poses[4, 9] = np.mean(ends)  # a third value: a width
    assert len(np.unique(poses_at(times, poses, asked)[:, 9])) > 3


def test_actions_of_a_pose_layout_are_seen_from_the_current_pose():
    config = DataConfig(image_size=(16, 16), video_hz=5.0, control_hz=5.0, action_horizon=2, action_delay=0.2)
    timestamps = np.arange(4) / 10  # twice the control rate
    reached = np.float32([pose([k, 0, 0], 90, 0) for k in range(4)])
    target = np.float32([pose([k, 1, 0], 90 + 10 * k, k % 2) for k in range(4)])
    fields = {"timestamps": timestamps, "proprio": reached, "actions": target, "action_layout": "pose"}
    episode = dataclasses.replace(tiny.episode(4, 0), **fields)
    window = action_window(episode, 1, config)
    np.testing.assert_array_equal(window["proprio"], reached[1:2])
    # The hand's x is the base's y and its y the base's −x: two steps on, the target is at (3, 1) − (1, 0).
    np.testing.assert_allclose(window["actions"][0], pose([1, -2, 0], 30, 1), atol=1e-6)
    np.testing.assert_allclose(window["actions"][1], pose([1, -2, 0], 30, 1), atol=1e-6)  # beyond the end
    np.testing.assert_array_equal(window["action_mask"], [True, False])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proprio": None}, "proprio of a pose layout are missing; expected width 10"),
        ({"proprio": np.zeros((4, 9), np.float32)}, "proprio of a pose layout are of width 9"),
        ({"actions": np.zeros((4, 7), np.float32)}, "actions of a pose layout are of width 7"),
    ],
)
def test_an_episode_with_another_layout_than_it_says(changes, message):
    fields = {"proprio": np.zeros((4, 10), np.float32), "actions": np.zeros((4, 10), np.float32), "action_layout": "pose"}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.episode(4, 0), **(fields | changes))


@pytest.mark.parametrize(
    ("hz", "timestamps", "expected"),
    [
        (30.0, (np.arange(200_000) / 30).astype(np.float32), True),  # two hours in the numbers that lerobot stores
        (30.0, 5000 + (np.arange(300) / 30).astype(np.float32), True),
        (30.0, np.arange(200_000) / 30.001, False),
        (30.0, np.round(np.arange(300) / 30, 3), True),  # in milliseconds
        (10 / 3, np.arange(20_000) / float(np.float32(10 / 3)), True),  # as RLDS stores a rate
        (5.0, 1.7e9 + np.arange(50) / 5, True),  # of a clock
        (5.0, 1.7e9 + np.arange(50) / 5 + 0.02 * (np.arange(50) % 2), False),
        (1000.0, np.arange(50) / 1000 + 1e-4 * (np.arange(50) % 2), False),  # a tenth of a period
    ],
)
def test_whether_time_stamps_are_at_a_rate(hz, timestamps, expected):
    assert at_rate(np.asarray(timestamps, np.float64), hz) == expected


@pytest.mark.parametrize("actions", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 3, 50])
def test_windows_are_numbered_as_a_list_of_them_would_be(config, actions, stride):
    lengths, clock_of = (12, 20, 1, 3), np.array([0, 2, 1, 1, 3, 2, 0])
    config = dataclasses.replace(config, action_delay=0.25)  # the last three steps have none
    clocks = [np.arange(length) / 10.0 for length in lengths]
    steps = [anchors(clock, config, actions=actions) for clock in clocks]
    found = Anchors.of(steps, clock_of).every(stride)
    expected = [(episode, step) for episode, clock in enumerate(clock_of) for step in steps[clock].tolist() if step % stride == 0]
    assert len(found) == len(expected) > 3
    assert [found.place(window) for window in range(len(found))] == expected
    assert found.place(-1) == expected[-1]
    for outside in (len(found), -len(found) - 1):
        with pytest.raises(IndexError, match=f"there are {len(found)} windows; index {outside} is out of range"):
            found.place(outside)
    for episode in range(len(clock_of)):
        assert [expected[window][0] for window in found.windows_of(episode)] == [episode] * len(found.windows_of(episode))
    assert sum(len(found.windows_of(episode)) for episode in range(len(clock_of))) == len(expected)


def test_anchors_that_begin_later():
    found = Anchors.of([np.arange(4, 9), np.arange(0)], np.array([0, 1, 0])).every(3)
    assert [found.place(window) for window in range(len(found))] == [(0, 6), (2, 6)]
