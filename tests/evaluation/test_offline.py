from types import SimpleNamespace

import numpy as np
import pytest

from mimic_video.evaluation.offline import action_errors, psnr


def test_steps_and_frames_that_no_window_has_are_left_out():
    """Not reported as perfect: their error would be 0, their PSNR 100 dB."""
    mask = np.array([[True, True, False, False], [True, False, False, False]])
    window = {"video": np.zeros((1, 2, 8, 8, 3), np.uint8), "instruction": "", "proprio": np.zeros((1, 3))}
    windows = [window | {"actions": np.zeros((4, 2)), "action_mask": row} for row in mask]

    def plan(images, proprio, instructions, query):
        return np.tile(np.array([1.0, 3.0, 50.0, 50.0])[:, None], (len(images), 1, 2))

    found = action_errors(plan, windows, 1, SimpleNamespace(scale=1.0), batch_size=2)
    assert found["rmse_per_step"] == [1.0, 3.0] and found["rmse"] == pytest.approx(np.sqrt((1 + 1 + 9) / 3))
    windows = [window | {"action_mask": np.zeros(4, bool)} for window in windows]
    with pytest.raises(ValueError, match="'action_mask' of 2 windows is False throughout; expected a real action"):
        action_errors(plan, windows, 1, SimpleNamespace(scale=1.0), batch_size=2)
    black, grey = (np.full((2, 4, 8, 8, 3), value, np.uint8) for value in (0, 51))
    np.testing.assert_allclose(psnr(black, grey, mask), [-20 * np.log10(0.2)] * 2, rtol=1e-6)
