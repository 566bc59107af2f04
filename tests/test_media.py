import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from foreign_formats import TURNS, encode, turn_video
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


ORIENTATIONS = {  # of EXIF → what is to be seen of the stored picture
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_turned_as_exif_says(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "one.png", exif=exif)
    seen = ORIENTATIONS[orientation](pixels)
    np.testing.assert_array_equal(media.read_picture(tmp_path / "one.png"), seen)
    np.testing.assert_array_equal(media.read_frames(tmp_path / "one.png", 5.0, 1), seen[None])


@pytest.mark.parametrize("turn", TURNS)
def test_videos_are_turned_as_their_display_matrix_says(tmp_path, turn):
    corner = np.zeros((3, 32, 48, 3), np.uint8)
    corner[:, :16, :24] = 200
    encode(tmp_path / "turned.mp4", corner, 10)
    turn_video(tmp_path / "turned.mp4", turn)
    (seen,) = media.read_frames(tmp_path / "turned.mp4", 10.0, 1)
    expected = TURNS[turn](corner[0])
    assert seen.shape == expected.shape
    np.testing.assert_allclose(seen[4::8, 4::8].astype(int), expected[4::8, 4::8], atol=12)
    turn_video(tmp_path / "turned.mp4", (0.8, 0.6, -0.6, 0.8))
    with pytest.raises(media.MediaError, match=r"turned\.mp4 cannot be read: its display matrix is .*; expected quarter turns"):
        media.read_frames(tmp_path / "turned.mp4", 10.0, 1)


def test_only_the_end_of_a_long_animation_is_in_memory(tmp_path):
    images = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 256, (150, 64, 64), np.uint8)]
    images[0].save(tmp_path / "long.gif", save_all=True, append_images=images[1:], duration=100)
    tracemalloc.start()
    read = media.read_frames(tmp_path / "long.gif", 10.0, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read.shape == (5, 64, 64, 3) and peak < 50 * read[0].nbytes  # of 150 frames
    np.testing.assert_array_equal(read[-1, ..., 0], np.asarray(images[-1]))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_only_the_end_of_a_long_video_is_decoded(tmp_path, monkeypatch, suffix):
    written = frames(20, 16, 16).repeat(30, axis=0)  # half a minute
    encode(tmp_path / f"long.{suffix}", written, 20, options={"g": "25", "bf": "2"})
    decoded, tail = [], media._tail
    monkeypatch.setattr(media, "_tail", lambda frames, span: tail((decoded.append(f) or f for f in frames), span))
    read = media.read_frames(tmp_path / f"long.{suffix}", 5.0, 9)
    np.testing.assert_allclose(read[:, 5, 5].astype(int), written[-33::4, 5, 5].astype(int), atol=4)
    assert len(decoded) <= 100


def test_rates_of_a_video_may_change(tmp_path):
    images = [Image.fromarray(frame) for frame in frames(4)]
    images[0].save(tmp_path / "uneven.gif", save_all=True, append_images=images[1:], duration=[100, 400, 200, 100], disposal=1)
    read = media.read_frames(tmp_path / "uneven.gif", 10.0, 8)  # frames begin at 0, 0.1, 0.5 and 0.7 s
    assert read[:, 5, 5, 0].tolist() == [0, 10, 10, 10, 10, 20, 20, 30]


def test_damaged_files_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "gif"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(media.MediaError, match=rf"^{path} cannot be read: [^\n]*$"):
            media.read_frames(path, 5.0, 1)
    path = tmp_path / "cut.mp4"
    encode(path, np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8), 10, faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(media.MediaError, match=rf"^{path} is (neither a picture nor a video, or is )?damaged[^\n]*$"):
        media.read_frames(path, 5.0, 3)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_video_whose_end_is_missing_is_refused(tmp_path, share):
    """Its frames can be read without it, and the last ones would be those of another time."""
    path, noise = tmp_path / "cut.mkv", np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    encode(path, noise, 10)
    assert len(media.read_frames(path, 10.0, 3)) == 3
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(media.MediaError, match=rf"^{path} is cut off: its last frame is at \d\.\d\d s; expected 9\.90 s$"):
        media.read_frames(path, 10.0, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_slow_videos_end_with_a_frame_that_lasts(tmp_path, suffix):
    encode(tmp_path / f"slow.{suffix}", frames(10, 32, 32), 1)
    read = media.read_frames(tmp_path / f"slow.{suffix}", 1.0, 3)
    np.testing.assert_allclose(read[:, 5, 5].astype(int), frames(10, 32, 32)[-3:, 5, 5].astype(int), atol=4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_not_clipped(tmp_path, dtype):
    path = tmp_path / f"depth.{'png' if dtype is np.uint16 else 'tiff'}"
    Image.fromarray(np.full((4, 6), 1000, dtype)).save(path)
    with pytest.raises(media.MediaError, match=rf"{path} cannot be read: its pixels are of the mode .*; expected 8 bits"):
        media.read_frames(path, 5.0, 1)


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
