"""What the command prints and draws, on small datasets in the published schema of Bridge and in our own layout."""

import io
import pathlib

import numpy as np
import oxe_schemas
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from recordings import read, series

from data_pipelines.episode import ArrayFrames, Episode
from data_pipelines.oxe import registry
from data_pipelines.writers import write_rlds

TEMPLATE = pathlib.Path(__file__).parents[2] / "configs" / "my_robot.py"
STEPS = 6


def jpeg(value):
    file = io.BytesIO()
    Image.fromarray(np.full((24, 32, 3), value, np.uint8)).save(file, "JPEG")
    file.seek(0)
    return file


def write_bridge(root, name="bridge_orig", episodes=2, action_dim=7, cameras=("image_0", "image_1")):
    """A dataset of the features of BridgeData V2, with small images."""
    directory = root / name / "1.0.0"
    directory.mkdir(parents=True)
    image = tfds.features.Image(shape=(24, 32, 3), dtype=np.uint8, encoding_format="jpeg")
    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {
                        **dict.fromkeys(cameras, image),
                        "state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
                    },
                    "action": tfds.features.Tensor(shape=(action_dim,), dtype=np.float32),
                    "language_instruction": tfds.features.Text(),
                    "is_first": np.bool_,
                    "is_last": np.bool_,
                }
            ),
            "episode_metadata": {"file_path": tfds.features.Text()},
        }
    )
    identity = tfds.core.DatasetIdentity(name, tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["train"])
    for episode in range(episodes):
        steps = [
            {
                "observation": {
                    **{camera: jpeg(40 * k if camera == "image_0" else 255) for camera in cameras},
                    "state": np.full(7, 0.1 * k, np.float32),
                },
                "action": np.full(action_dim, 0.1 * k, np.float32),
                "language_instruction": f"task {episode}",
                "is_first": k == 0,
                "is_last": k == STEPS - 1,
            }
            for k in range(STEPS)
        ]
        writer.add_examples({"train": [{"steps": steps, "episode_metadata": {"file_path": ""}}]})
    writer.close_all()
    return directory


def lines(output, start):
    """The line that starts so, without the spaces between its words."""
    return [" ".join(line.split()) for line in output.splitlines() if line.strip().startswith(start)]


def test_slices(launch, tmp_path):
    directory = write_bridge(tmp_path, episodes=4)
    output = launch("inspect_data", f"--source={directory}", f"--out={tmp_path}", "--split=train[1:3]", "--samples=2")
    assert f"{directory} split 'train[1:3]': 2 episodes" in output
    assert [line.split(",")[0] for line in lines(output, "episode ")] == ["episode 1", "episode 1", "episode 2", "episode 2"]
    assert "'task 1'" in output and "'task 2'" in output and "task 0" not in output
    message = launch("inspect_data", f"--source={directory}", f"--out={tmp_path}", "--split=train[:9]")
    assert message.startswith("error: split 'train[:9]' of ") and message.endswith("expected bounds from -4 to 4")
    output = launch("inspect_data", "--dataset=oxe_magic_soup", f"--source={tmp_path}", "--split=train[1:3]")
    assert f" {2 * STEPS} " in next(line for line in output.splitlines() if "bridge_orig" in line)


def test_entry_of_the_registry(launch):
    output = launch("inspect_data", "--dataset=kuka")
    assert lines(output, "rate") == ["rate 10 Hz"]
    assert lines(output, "actions") == ["actions delta (10): Δposition 3 [m] | rotation 6 [rot6d rows] | gripper 1 [1 = open]"]
    assert lines(output, "serves") == ["serves stages 1 and 2"]
    assert lines(launch("inspect_data", "--dataset=roboturk"), "serves") == ["serves stage 1 only"]


@pytest.mark.parametrize("by_name", [True, False])
def test_dataset_on_disk(launch, tmp_path, by_name):
    directory = write_bridge(tmp_path)
    where = ("--dataset=bridge_orig", f"--source={directory}") if by_name else (f"--source={directory}",)
    output = launch("inspect_data", *where, f"--out={tmp_path / 'out'}", "--samples=1")
    assert lines(output, "steps/action") == ["steps/action tensor float32 (7,); expected numbers of shape (7,)"]
    assert lines(output, "episode 0, primary") == ["episode 0, primary, -0.8 to +11.2 s around step 3 of 6: 'task 0'"]
    # All dimensions of step k are k / 10; x is a position that was reached, from 0 to 0.5.
    assert lines(output, "position 0") == ["position 0 [m] 0.0000 0.2500 0.5000 0.0%"]
    picture = np.asarray(Image.open(tmp_path / "out" / "bridge_orig" / "windows.png"))
    assert picture.shape == (2 * (96 + 2), 8 * 128, 3)  # two cameras
    assert picture[40, 5, 0] < picture[40, -5, 0] and picture[140].min() > 240
    assert Image.open(tmp_path / "out" / "bridge_orig" / "actions.png").size[0] > 500


def test_a_camera_that_training_does_without_is_left_out(launch, tmp_path):
    directory = write_bridge(tmp_path, cameras=("image_0",))
    output = launch("inspect_data", f"--source={directory}", f"--out={tmp_path / 'out'}", "--samples=1")
    assert "left out camera 'secondary': there is no 'steps/observation/image_1'" in output
    assert np.asarray(Image.open(tmp_path / "out" / "bridge_orig" / "windows.png")).shape == (96 + 2, 8 * 128, 3)
    message = launch("inspect_data", f"--source={write_bridge(tmp_path / 'other', cameras=('image_1',))}", f"--out={tmp_path}")
    assert "'steps/observation/image_0' is missing; expected the primary camera" in message


@pytest.mark.parametrize(("name", "cameras"), [("bridge_orig", 2), ("droid", 3)])
def test_datasets_with_all_of_their_published_features(launch, tmp_path, name, cameras):
    directory = oxe_schemas.write(tmp_path, name, "array_record", episodes=3)
    output = launch("inspect_data", f"--dataset={name}", f"--source={directory}", f"--out={tmp_path / 'out'}", "--samples=2")
    for path in oxe_schemas.SCHEMAS[name]:
        assert lines(output, f"{path} "), path
    assert len(lines(output, "episode 0, ")) == len(lines(output, "episode 2, ")) == cameras
    assert oxe_schemas.instruction(name, 2) in output
    # x of the poses: reached at steps 0 to 7, or commanded two steps ahead.
    ahead = {"bridge_orig": 0, "droid": 2}[name]
    first, last = (oxe_schemas.position(k + ahead)[0] for k in (0, oxe_schemas.STEPS - 1))
    assert lines(output, "position 0") == [f"position 0 [m] {first:.4f} {(first + last) / 2:.4f} {last:.4f} 0.0%"]
    out = tmp_path / "out" / name
    assert np.asarray(Image.open(out / "windows.png")).shape[0] == 2 * cameras * (96 + 2)
    assert Image.open(out / "actions.png").size[0] > 500


def test_features_that_differ(launch, tmp_path):
    directory = write_bridge(tmp_path, action_dim=8)
    output = launch("inspect_data", "--dataset=bridge_orig", f"--source={directory}", f"--out={tmp_path / 'out'}")
    assert "'steps/action' is tensor float32 (8,); expected numbers of shape (7,)" in output and output.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labelled", [True, False])
def test_our_own_layout(launch, tmp_path, labelled):
    values = np.arange(STEPS, dtype=np.float32)[:, None]
    episode = Episode(
        "e",
        np.arange(STEPS) / 5.0,
        ArrayFrames(np.zeros((STEPS, 16, 16, 3), np.uint8)),
        "wait",
        values if labelled else None,
        values if labelled else None,
    )
    directory = write_rlds(tmp_path, "mine", {"train": [episode]}, control_hz=5.0, image_size=(16, 16), description="")
    output = launch("inspect_data", f"--source={directory}", f"--out={tmp_path / 'out'}")
    assert "dataset mine: not registered" in output
    assert (lines(output, "action 0") == ["action 0 0.0000 2.5000 5.0000 0.0%"]) is labelled
    assert ("no actions" in output) is not labelled
    written = {path.name for path in (tmp_path / "out" / "mine").iterdir()}
    assert written == ({"windows.png", "actions.png"} if labelled else {"windows.png"})


def test_what_a_clamp_would_lose_and_what_may_be_errors(launch, tmp_path):
    steps = 3000
    actions, proprio = np.zeros((steps, 2), np.float32), np.sin(np.arange(steps, dtype=np.float32))[:, None]
    actions[-30:, 1], proprio[7] = 1.0, 1e4
    frames = ArrayFrames(np.zeros((steps, 8, 8, 3), np.uint8))
    episode = Episode("e", np.arange(steps) / 5.0, frames, "wait", proprio, actions)
    directory = write_rlds(tmp_path, "rare", {"train": [episode]}, control_hz=5.0, image_size=(8, 8), description="")
    output = launch("inspect_data", f"--source={directory}", f"--out={tmp_path / 'out'}")
    assert lines(output, "action 1") == ["action 1 0.0000 0.0100 1.0000 1.1%"]
    assert lines(output, "the clamp") == [
        "the clamp changes 55.5% of proprio dimension 0, which is -1 to 1e+04, and leaves -3.164 to -0.1701; "
        "compat.percentile_clamp=False keeps them",
        "the clamp changes 1.1% of action dimension 1, which is 0 to 1, and leaves -0.005 to -0.005; "
        "compat.percentile_clamp=False keeps them",
    ]
    assert lines(output, "proprio dimension 0, which is -1 to 1e+04, has some at 55 standard deviations")


def test_mixture(launch, tmp_path):
    write_bridge(tmp_path, episodes=3)
    output = launch("inspect_data", "--dataset=bridge_rt_1", f"--source={tmp_path}")
    assert lines(output, "bridge_orig") == [f"bridge_orig 1.0000 {3 * STEPS} 1.0000 pose"]
    assert lines(output, "fractal") == ["fractal20220817_data 1.0000 not here delta"]
    assert lines(launch("inspect_data", "--dataset=rtx"), "toto") == ["toto 1.0000 delta"]


def test_a_robot_of_ones_own(launch, monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    output = launch("inspect_data", "--dataset=my_robot", f"--register={TEMPLATE}")
    assert lines(output, "cameras") == ["cameras primary: image, wrist: wrist_image"]


def test_errors(launch, tmp_path):
    nothing = tmp_path / "none"
    assert "no dataset or mixture 'magic_soop'; the nearest is 'oxe_magic_soup'" in launch("inspect_data", "--dataset=magic_soop")
    assert f"dataset directory {nothing} does not exist" in launch("inspect_data", "--dataset=kuka", f"--source={nothing}")
    assert "there is nothing to inspect; expected --dataset=NAME, --source=DIRECTORY, or both" in launch("inspect_data")
    assert "error: 'kuka' is no flag; expected --NAME=VALUE" in launch("inspect_data", "kuka")


@pytest.mark.reference
def test_episodes_in_a_recording_of_rerun(launch, tmp_path):
    steps = np.arange(STEPS)
    episodes = [
        Episode(
            f"episode {number}",
            steps / 5.0,
            ArrayFrames(np.full((STEPS, 16, 32, 3), 40 * number, np.uint8)),
            "open it" if number else "close it",
            proprio=np.tile(number + 0.1 * steps[:, None], (1, 2)).astype(np.float32),
            actions=np.tile(number - 0.1 * steps[:, None], (1, 3)).astype(np.float32),
        )
        for number in range(3)
    ]
    path = write_rlds(tmp_path, "mine", {"train": episodes}, control_hz=5.0, image_size=(16, 32), description="")
    target = tmp_path / "a.rrd"
    launch("inspect_data", f"--source={path}", f"--out={tmp_path}", "--samples=2", f"--rerun={target}")
    found = read(target)
    assert {name.split("/")[1] for name in found} == {"episode_0", "episode_2"}
    for number in (0, 2):
        for name, expected in (("proprio", episodes[number].proprio), ("actions", episodes[number].actions)):
            times, values = series(found[f"mine/episode_{number}/{name}"])
            np.testing.assert_array_equal(values, expected)
            np.testing.assert_allclose(times, steps / 5.0, atol=1e-6)
        assert [time for time, _ in found[f"mine/episode_{number}/camera/primary"]] == pytest.approx(steps / 5.0, abs=1e-6)
        assert found[f"mine/episode_{number}/instruction"] == [(0.0, {"text": [episodes[number].instruction]})]
    assert "expected FILE.rrd, connect or connect:HOST:PORT" in launch("inspect_data", f"--source={path}", "--rerun=a.txt")
