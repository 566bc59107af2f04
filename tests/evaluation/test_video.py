"""Predictions of held-out futures by a tiny model."""

import numpy as np
import pytest
import tiny
from PIL import Image
from recordings import read

from mimic_video.evaluation.video import evaluate_video
from mimic_video.rerun_log import RerunLog

PAST, FUTURE = tiny.VALUES["data"]["past_frames"], tiny.VALUES["data"]["future_frames"]


def windows(views, seed=0):
    random = np.random.default_rng(seed)
    size = (2, views, PAST + FUTURE, *tiny.SIZE, 3)
    masks = np.ones((2, PAST + FUTURE), bool)
    masks[1, -1] = False  # beyond the episode's end
    rows = zip(random.integers(0, 256, size, np.uint8), masks, ("open", "close"), strict=True)
    return [{"video": video, "frame_mask": mask, "instruction": text} for video, mask, text in rows]


@pytest.mark.parametrize("cameras", [("primary",), ("primary", "wrist")])
def test_predictions_beside_repeated_frames(tmp_path, cameras):
    config = tiny.experiment(stage="video", data={"cameras": cameras})
    samples = windows(len(cameras))
    result = evaluate_video(config, tiny.params(config), samples, cameras, tmp_path, record=1)
    assert result["samples"] == ["open", "close"]
    assert len(result["psnr"]) == FUTURE and np.isfinite(result["psnr"]).all()
    last, future = (
        np.stack([sample["video"] for sample in samples])[:, :, part] for part in (slice(PAST - 1, PAST), slice(PAST, None))
    )
    squares = ((last.astype(float) - future) ** 2).mean((1, 3, 4, 5)) / 255**2  # (sample, frame)
    expected = -10 * np.log10([*squares[:, :-1].mean(0), squares[0, -1]])  # of the mean over the windows that have the frame
    np.testing.assert_allclose(result["psnr_last_frame_repeated"], expected, rtol=1e-6)
    height, width = tiny.SIZE
    with Image.open(tmp_path / "videos" / "00.gif") as gif:
        assert gif.n_frames == PAST + FUTURE
        assert gif.width * len(cameras) * height == gif.height * 2 * width  # views below, the prediction beside, enlarged
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["00.gif", "strip.png"]


def test_a_camera_that_the_windows_lack_changes_nothing(tmp_path):
    config = tiny.experiment(stage="video", data={"cameras": ("primary", "wrist")})
    samples = windows(2)
    result = evaluate_video(config, tiny.params(config), samples, ("wrist",), tmp_path, record=0)
    for sample in samples:
        sample["video"][0] = 0
    again = evaluate_video(config, tiny.params(config), samples, ("wrist",), tmp_path, record=0)
    assert again == result and len(result["psnr"]) == FUTURE


@pytest.mark.reference
def test_both_videos_in_a_recording_of_rerun(tmp_path):
    config = tiny.experiment(stage="video", data={"cameras": ("primary", "wrist")})
    samples = windows(2)
    with RerunLog(str(tmp_path / "a.rrd"), "test") as log:
        evaluate_video(config, tiny.params(config), samples, ("primary",), tmp_path, record=1, log=log)
    found = read(tmp_path / "a.rrd")
    assert set(found) == {"window_0/recorded/primary", "window_0/predicted/primary", "window_0/instruction"}
    times = np.arange(1 - PAST, 1 + FUTURE) / config.data.video_hz
    for rows in (found["window_0/recorded/primary"], found["window_0/predicted/primary"]):
        np.testing.assert_allclose([time for time, _ in rows], times, atol=1e-8)
        assert {values["image"].shape for _, values in rows} == {(*tiny.SIZE, 3)}
    recorded = np.array([values["image"].mean() for _, values in found["window_0/recorded/primary"]])
    np.testing.assert_allclose(recorded, samples[0]["video"][0].mean((1, 2, 3)), atol=4)  # JPEG of noise
