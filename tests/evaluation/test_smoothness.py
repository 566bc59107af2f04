import numpy as np
import pytest

from mimic_video.evaluation.smoothness import mean_squared_jerk


def test_the_jerk_of_a_cubic_is_constant():
    time = np.arange(12)[:, None] / 20
    cubic = time**3 * [1.0, 2.0, 0.0] + time**2 * 5 - time  # whose third derivatives are 6, 12 and 0
    assert mean_squared_jerk([cubic], 20.0) == pytest.approx(36 + 144, rel=1e-6)


def test_every_moment_counts_the_same_however_long_its_trajectory():
    still, step = np.zeros((10, 1)), np.float32([[0], [0], [0], [1]])  # seven third differences, and one
    assert mean_squared_jerk([still, step], 1.0) == pytest.approx(1 / 8)
    assert mean_squared_jerk([step[:3], step], 1.0) == 1.0  # too short to have any


def test_trajectories_without_jerk_are_refused():
    with pytest.raises(ValueError, match=r"of \[3, 1\] positions"):
        mean_squared_jerk([np.zeros((3, 2)), np.zeros((1, 2))], 20.0)
