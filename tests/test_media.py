import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mimic_video import media


def frames(count, height=32, width=48):
    """Smooth frames whose brightness is ten times their number."""
    return np.broadcast_to((10 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3)).copy()


@pytest.mark.parametrize(("suffix", "tolerance"), [("gif", 0), ("mp4", 4)])
def test_a_written_video_is_read_at_any_rate(tmp_path, suffix, tolerance):
    path, written = tmp_path / "new" / f"video.{suffix}", frames(21)
    media.write_video(path, written, 20.0)
    for hz, count, steps in ((20.0, 21, range(21)), (5.0, 5, range(4, 21, 4)), (20.0, 2, [19, 20]), (10.0, 99, range(0, 21, 2))):
        read = media.read_frames(path, hz, count)
        assert read.dtype == np.uint8 and read.shape[0] == len(steps) and read.shape[3] == 3
        np.testing.assert_allclose(read[:, 5, 5].astype(int), written[list(steps), 5, 5].astype(int), atol=tolerance)
    if suffix == "mp4":
        assert read.shape[1:3] == (32, 48)


def test_small_gifs_are_enlarged_in_whole_pixels(tmp_path):
    media.write_video(tmp_path / "small.gif", frames(2, 10, 20), 5.0)
    assert Image.open(tmp_path / "small.gif").size == (400, 200)


def test_a_picture_is_one_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    np.testing.assert_array_equal(media.read_frames(tmp_path / "one.png", 5.0, 5), pixels[None])


def test_unusable_files(tmp_path):
    with pytest.raises(media.MediaError, match=r"there is no file .*absent.png"):
        media.read_frames(tmp_path / "absent.png", 5.0, 1)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(media.MediaError, match=r"text.mp4 is neither a picture nor a video"):
        media.read_frames(tmp_path / "text.mp4", 5.0, 1)
    with pytest.raises(media.MediaError, match=r"video.avi ends in '.avi'; expected .gif or .mp4"):
        media.write_video(tmp_path / "video.avi", frames(1), 5.0)
    with pytest.raises(media.MediaError, match=r"frames of 31x48 pixels; MP4 needs even numbers"):
        media.write_video(tmp_path / "video.mp4", frames(1, 31), 5.0)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((8, 8), slice(0, 20), slice(10, 30)),
        ((10, 40), slice(5, 15), slice(0, 40)),
        ((2, 4), slice(0, 20), slice(0, 40)),
    ],
)
def test_cropping_keeps_the_centre(size, rows, columns):
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 40, 3), np.uint8)
    np.testing.assert_array_equal(media.crop_to_shape(images, size), images[:, rows, columns])


def test_a_film_strip_has_real_frames_above_predicted_ones():
    real, predicted = np.zeros((2, 3, 4, 5, 3), np.uint8), np.full((2, 3, 4, 5, 3), 9, np.uint8)
    real[1, 2] = 7  # the last frame of the second sample
    strip = media.film_strip(real, predicted)
    assert strip.shape == (2 * (4 + 4 + 4), 15, 3)  # and four rows of white after each pair
    assert (strip[12:16, 10:] == 7).all() and (strip[12:16, :10] == 0).all() and (strip[16:20] == 9).all()
    assert (strip[8:12] == 255).all()


@pytest.mark.parametrize("backend", ["of_a_notebook_that_is_not_here", "svg"])
def test_plots_need_no_backend_and_leave_the_one_that_was_chosen(tmp_path, backend):
    program = (
        "import os, sys; from mimic_video.media import matplotlib_figure; matplotlib_figure()().savefig(sys.argv[1]);"
        "import matplotlib; print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])"
    )
    command = [sys.executable, "-c", program, tmp_path / "plot.png"]
    ended = subprocess.run(command, env=os.environ | {"MPLBACKEND": backend}, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split()[0] == backend, ended.stderr
    assert (ended.stdout.split()[1] == backend) == (backend == "svg")
    assert Image.open(tmp_path / "plot.png").size == (640, 480)
