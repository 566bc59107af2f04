import numpy as np
import pytest

from mimic_video.policy.history import FrameHistory


def _frame(value, *batch):
    return np.full((*batch, 2, 3, 3), value, np.uint8)


def _values(window):
    return window[..., 0, 0, 0].tolist()


def test_window_holds_every_fourth_frame_and_ends_with_the_newest():
    history = FrameHistory(past_frames=3, video_hz=5, control_hz=20)
    for value in range(20):
        history.append(_frame(value))
    assert history.window().shape == (3, 2, 3, 3)
    assert _values(history.window()) == [11, 15, 19]


def test_first_frame_stands_in_for_the_missing_past():
    history = FrameHistory(past_frames=3, video_hz=10, control_hz=20)
    seen = []
    for value in range(1, 6):
        history.append(_frame(value))
        seen.append(_values(history.window()))
    assert seen == [[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 4], [1, 3, 5]]


def test_equal_rates_keep_every_frame_and_batches_keep_their_leading_axis():
    history = FrameHistory(past_frames=2, video_hz=20, control_hz=20)
    history.append(_frame(1, 4))
    history.append(_frame(2, 4))
    assert history.window().shape == (4, 2, 2, 3, 3)
    assert _values(history.window()) == [[1, 2]] * 4


def test_reset_forgets_the_previous_episode():
    history = FrameHistory(past_frames=2, video_hz=20, control_hz=20)
    history.append(_frame(1))
    history.reset()
    with pytest.raises(RuntimeError, match="empty"):
        history.window()
    history.append(_frame(7))
    assert _values(history.window()) == [7, 7]


@pytest.mark.parametrize("video_hz", [30, 8, 40])
def test_rates_without_a_whole_ratio_are_refused(video_hz):
    with pytest.raises(ValueError, match="control_hz=20 is not a whole multiple of video_hz"):
        FrameHistory(past_frames=5, video_hz=video_hz, control_hz=20)


def test_a_frame_of_another_size_is_refused():
    history = FrameHistory(past_frames=1, video_hz=20, control_hz=20)
    history.append(_frame(0))
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        history.append(np.zeros((4, 4, 3), np.uint8))
