import numpy as np
import pytest

from mimic_video.policy.history import FrameHistory


def _frame(value, *batch):
    return np.full((*batch, 2, 3, 3), value, np.uint8)


def _values(window):
    return window[..., 0, 0, 0].tolist()


def _filled(history, times):
    """A history with the frames 0, 1, 2, … at those times."""
    for value, time in enumerate(times):
        history.append(_frame(value), time)
    return history


def test_window_holds_every_fourth_frame_and_ends_with_the_newest():
    history = _filled(FrameHistory(past_frames=3, video_hz=5), np.arange(20) / 20)
    assert history.window().shape == (3, 2, 3, 3)
    assert _values(history.window()) == [11, 15, 19]


def test_first_frame_stands_in_for_the_missing_past():
    history = FrameHistory(past_frames=3, video_hz=10)
    seen = []
    for value in range(1, 6):
        history.append(_frame(value), 1000 + value / 20)
        seen.append(_values(history.window()))
    assert seen == [[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 4], [1, 3, 5]]


def test_equal_rates_keep_every_frame_and_batches_keep_their_leading_axis():
    history = FrameHistory(past_frames=2, video_hz=20)
    history.append(_frame(1, 4), 0.0)
    history.append(_frame(2, 4), 0.05)
    assert history.window().shape == (4, 2, 2, 3, 3)
    assert _values(history.window()) == [[1, 2]] * 4


@pytest.mark.parametrize("camera_hz", [7.0, 12.5, 30.0, 59.94])
def test_any_camera_rate_gives_the_nearest_frames_the_earlier_of_two(camera_hz):
    """As by hand over all frames, also when there have been more than a window needs, whose memory is let go."""
    times = 3e5 + np.arange(200) / camera_hz
    history = FrameHistory(past_frames=5, video_hz=5)
    for newest, time in enumerate(times):
        history.append(_frame(newest), time)
        distances = np.abs(times[: newest + 1] - (time - np.arange(4, -1, -1) / 5)[:, None]).round(6)
        assert _values(history.window()) == distances.argmin(axis=1).tolist()
    assert len(history._frames) <= 0.8 * camera_hz + 2


def test_two_frames_as_near_as_each_other():
    assert _values(_filled(FrameHistory(past_frames=2, video_hz=10), [0.0, 0.1, 0.2, 0.25]).window()) == [1, 3]


def test_reset_forgets_the_previous_episode():
    history = FrameHistory(past_frames=2, video_hz=20)
    history.append(_frame(1), 5.0)
    history.reset()
    with pytest.raises(RuntimeError, match="empty"):
        history.window()
    history.append(_frame(7), 0.0)
    assert _values(history.window()) == [7, 7]


def test_a_camera_that_has_stopped_is_noticed():
    history = _filled(FrameHistory(past_frames=2, video_hz=5), [10.0, 10.1])
    assert _values(history.window(now=10.3)) == [0, 1]
    with pytest.raises(RuntimeError, match=r"newest frame is 0.301 s old; expected at most 0.2 s"):
        history.window(now=10.401)


def test_a_frame_of_the_same_time_takes_the_place_of_the_last():
    history = _filled(FrameHistory(past_frames=2, video_hz=5), [9.8, 10.0, 10.0])
    assert _values(history.window()) == [0, 2] and len(history) == history.distinct == 2


@pytest.mark.parametrize("time", [9.9, float("nan")])
def test_frames_out_of_order_are_refused(time):
    history = _filled(FrameHistory(past_frames=2, video_hz=5), [9.8, 10.0])
    with pytest.raises(ValueError, match="the frame's timestamp is"):
        history.append(_frame(3), time)
    assert _values(history.window()) == [0, 1]


def test_a_frame_of_another_size_is_refused():
    history = _filled(FrameHistory(past_frames=1, video_hz=20), [0.0])
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        history.append(np.zeros((4, 4, 3), np.uint8), 1.0)


@pytest.mark.parametrize(("past_frames", "video_hz"), [(0, 5.0), (1, 0.0), (1, float("inf"))])
def test_histories_that_cannot_be(past_frames, video_hz):
    with pytest.raises(ValueError):
        FrameHistory(past_frames, video_hz)
