import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from mimic_video.media import read_frames, write_video
from mimic_video.runs import checkpoints

CONFIG = tiny.experiment(stage="video")


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    params = jax.tree.map(np.asarray, tiny.params(CONFIG))
    run = tmp_path_factory.mktemp("generate") / "run"
    checkpoints.save_converted(run, CONFIG, {name: params[name] for name in ("tokenizer", "backbone")})
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture of 40x60 pixels, and a video of nine frames of the backbone's own size at its own 10 Hz."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "one.png")
    coarse = random.integers(0, 256, (9, 2, 4, 3), np.uint8)
    write_video(folder / "nine.mp4", np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8)), 10.0)
    return folder


@pytest.fixture
def generate(launch, config_file, run_directory, pictures, tmp_path):
    def run(source, out, *arguments):
        return launch(
            "generate",
            f"--config={config_file(CONFIG)}",
            f"--workdir={run_directory}",
            f"--input={pictures / source}",
            f"--out={tmp_path / out}",
            "--prompt=close it",
            *arguments,
        )

    return run


def test_a_picture_becomes_a_video(generate, tmp_path):
    assert "wrote 5 frames at 10 Hz" in generate("one.png", "out.mp4")
    assert read_frames(tmp_path / "out.mp4", 10.0, 99).shape == (5, *tiny.SIZE, 3)


def test_a_video_goes_on(generate, pictures, tmp_path):
    assert "wrote 9 frames" in generate("nine.mp4", "out.gif")
    written = read_frames(tmp_path / "out.gif", 10.0, 99)[:, ::12, ::12]  # enlarged to 192 rows
    past = read_frames(pictures / "nine.mp4", 10.0, 5)
    assert np.abs(written[:5].astype(int) - past).mean() < 8  # of a palette of 256 colours


@pytest.mark.training
def test_settings_of_the_window_and_the_sampler(generate, tmp_path):
    size = "--config.data.image_size=(32, 32)"
    assert "wrote 13 frames" in generate("one.png", "long.mp4", size, "--config.data.future_frames=12")
    assert read_frames(tmp_path / "long.mp4", 10.0, 99).shape == (13, 32, 32, 3)
    samples = {}
    for name, arguments in {
        "first": [],
        "again": [],
        "seed": ["--config.seed=1"],
        "prompt": ["--prompt=open it"],
        "noise": ["--config.policy.noise_stream=numpy"],
        "steps": ["--config.policy.video_steps=2"],
        "guided": ["--guidance=4", "--negative_prompt=open it"],
    }.items():
        generate("one.png", f"{name}.mp4", *arguments)
        samples[name] = read_frames(tmp_path / f"{name}.mp4", 10.0, 99)
    first = samples.pop("first")
    np.testing.assert_array_equal(samples.pop("again"), first)
    for name, sample in samples.items():
        assert (sample[1:] != first[1:]).any(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.backbone.width=32"], "'backbone.width' is 32, there 16"),
        (["--input=another.png"], "there are 2 --input; expected one for each camera of primary"),
        (["--out=out.avi"], "out.avi ends in '.avi'; expected .gif or .mp4"),
        (["--workdir=absent"], "absent is not a run directory"),
        (["--guidance=-1"], "guidance"),
    ],
)
def test_mistakes(generate, arguments, message):
    assert message in generate("one.png", "out.gif", *arguments)


def test_a_file_that_is_not_there_or_damaged(generate, pictures):
    assert f"there is no file {pictures / 'absent.png'}" in generate("absent.png", "out.gif")
    cut = pictures / "cut.png"
    cut.write_bytes((pictures / "one.png").read_bytes()[:-500])
    assert generate("cut.png", "out.gif").startswith(f"error: {cut} cannot be read: ")
