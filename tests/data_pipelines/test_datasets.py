import dataclasses
import json

import oxe_schemas
import pytest
from synthetic import SIZE, step_episode

from data_pipelines.datasets import check_dataset, find_instructions, open_datasets
from data_pipelines.mixture import Phase
from data_pipelines.sources.rlds import DatasetError, RldsSource, SplitError
from data_pipelines.writers import write_rlds
from mimic_video.config import ActionDecoderConfig, ConfigError, DataConfig, ExperimentConfig, PolicyConfig


def experiment_of(stage: str, data: DataConfig, **decoder: int) -> ExperimentConfig:
    decoder = ActionDecoderConfig(**{"action_dim": 2, "proprio_dim": 3} | decoder)
    return ExperimentConfig(stage=stage, data=data, decoder=decoder, policy=PolicyConfig(execute_steps=2))


@pytest.mark.parametrize(
    "data, decoder, message",
    [
        (
            {"image_size": (32, 32)},
            {},
            r"image size of camera 'primary' \(16, 32\); the config field 'data\.image_size' is \(32, 32\)",
        ),
        ({}, {"action_dim": 7}, r"action width 2; the config field 'decoder\.action_dim' is 7"),
        ({}, {"proprio_dim": 8}, r"proprio width 3; the config field 'decoder\.proprio_dim' is 8"),
    ],
)
def test_check_dataset_names_what_contradicts(rlds, config, data, decoder, message):
    experiment = experiment_of("action", dataclasses.replace(config, **data), **decoder)
    with pytest.raises(DatasetError, match=rf"{rlds} split 'train' has {message}"):
        check_dataset(RldsSource(rlds, "train"), experiment)


def test_check_dataset_of_an_action_free_dataset(make_source, config):
    source = make_source(12)
    source.action_dim = source.proprio_dim = None
    check_dataset(source, experiment_of("video", config))
    with pytest.raises(DatasetError, match=r"memory has no action; the config field 'decoder\.action_dim' is 2"):
        check_dataset(source, experiment_of("action", config))


def test_check_dataset_accepts_what_fits(rlds, config):
    check_dataset(RldsSource(rlds, "train"), experiment_of("action", config))


def test_rates_of_commanded_steps_have_to_be_the_decoders(make_source, config):
    source = make_source(12)
    source[0] = dataclasses.replace(source[0], action_layout="delta")
    check_dataset(source, experiment_of("action", config))
    with pytest.raises(DatasetError, match=r"memory has action rate 10\.0; the config field 'data\.control_hz' is 5\.0"):
        check_dataset(source, experiment_of("action", dataclasses.replace(config, control_hz=5.0)))


def write(folder, name, *lengths, wrist=False):
    splits = {"train": [step_episode(n, episode=e, wrist=wrist) for e, n in enumerate(lengths)]}
    return write_rlds(folder, name, splits, control_hz=10.0, image_size=SIZE, description="Steps that count.")


def test_several_directories_go_by_their_names(tmp_path, config):
    one, two = write(tmp_path, "one", 12, 20), write(tmp_path, "two", 15)
    mixed = dataclasses.replace(config, video_dataset=f"{one},{two}*3;50:{two}")
    windows, phases = open_datasets(experiment_of("video", mixed), "train")
    assert {name: len(each) for name, each in windows.items()} == {"one": 32, "two": 15}
    assert phases == (Phase(0, (1.0, 3.0)), Phase(50, (0.0, 1.0)))
    again = dataclasses.replace(config, video_dataset=f"{one},{write(tmp_path / 'other', 'one', 12)}")
    with pytest.raises(ConfigError, match=r"'data.video_dataset' names two datasets 'one'"):
        open_datasets(experiment_of("video", again), "train")


def test_a_slice_is_of_every_dataset(tmp_path, config):
    one, two = write(tmp_path, "one", 12, 20, 9), write(tmp_path, "two", 15, 11)
    mixed = dataclasses.replace(config, video_dataset=f"{one},{two}*3", train_split="train[:2]", validation_split="train[2:]")
    experiment = experiment_of("video", mixed)
    windows, phases = open_datasets(experiment, "train[:2]")
    assert {name: (len(each), each.numbers) for name, each in windows.items()} == {"one": (32, [0, 1]), "two": (26, [0, 1])}
    assert phases == (Phase(0, (1.0, 3.0)),)
    message = rf"^config field 'data\.validation_split': split 'train\[2:\]' of {two} cannot be read: 'train\[2:\]' has none of 2"
    with pytest.raises(SplitError, match=message):
        open_datasets(experiment, "train[2:]")
    with pytest.raises(
        SplitError, match=r"^config field 'data\.train_split': split 'train\[:3\]' .*two/.* beyond its 2 episodes"
    ):
        open_datasets(experiment_of("video", dataclasses.replace(mixed, train_split="train[:3]")), "train[:3]")
    assert list(find_instructions(experiment)) == ["do task 0", "do task 1"]  # of all episodes


@pytest.mark.parametrize("file_format", [pytest.param("tfrecord", marks=pytest.mark.reference), "array_record"])
def test_a_slice_of_a_dataset_of_the_registry(tmp_path, config, file_format):
    oxe_schemas.write(tmp_path, "bridge_orig", file_format, episodes=5)  # in three shards
    data = dataclasses.replace(config, video_dataset="bridge_orig", root=str(tmp_path), future_frames=4, past_frames=1)
    opened = {split: open_datasets(experiment_of("video", data), split) for split in ("train", "train[1:4]", "train[-40%:]")}
    found = {split: [each.instruction for each in one.windows["bridge_orig"].episodes] for split, one in opened.items()}
    everything = [oxe_schemas.instruction("bridge_orig", episode) for episode in range(5)]
    assert found == {"train": everything, "train[1:4]": everything[1:4], "train[-40%:]": everything[3:]}


def test_a_camera_that_some_dataset_has(tmp_path, config):
    one, two = write(tmp_path, "one", 12), write(tmp_path, "two", 15, wrist=True)
    config = dataclasses.replace(config, cameras=("primary", "wrist"), video_dataset=f"{one},{two}")
    windows = open_datasets(experiment_of("video", config), "train").windows
    assert {name: each.cameras for name, each in windows.items()} == {"one": ("primary",), "two": ("primary", "wrist")}
    with pytest.raises(DatasetError, match=r"'data.cameras' has 'wrist', which none of one has"):
        open_datasets(experiment_of("video", dataclasses.replace(config, video_dataset=str(one))), "train")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ConfigError, "'data.video_dataset' is empty"),
        ({"video_dataset": "droid"}, ConfigError, "'data.root' is empty; expected the folder with the dataset 'droid'"),
        (
            {"video_dataset": "droid", "root": "nowhere"},
            DatasetError,
            r"there is no dataset nowhere/droid: .* nowhere/droid/1\.0\.0",
        ),
        (
            {"video_dataset": "driod"},
            DatasetError,
            "names 'driod': there is no such folder, and .* registered; the nearest is 'droid'",
        ),
    ],
)
def test_datasets_that_are_not_there(config, fields, error, message):
    with pytest.raises(error, match=message):
        open_datasets(experiment_of("video", dataclasses.replace(config, **fields)), "train")


def test_every_instruction_of_a_dataset_is_found(tmp_path, config):
    episodes = [
        dataclasses.replace(step_episode(4), instruction=("", "reach", "reach", "pick")),
        dataclasses.replace(step_episode(3), instruction="place"),
    ]
    path = write_rlds(tmp_path, "words", {"train": episodes}, control_hz=10.0, image_size=SIZE, description="")
    experiment = experiment_of("action", dataclasses.replace(config, action_dataset=str(path)))
    assert list(find_instructions(experiment)) == ["", "reach", "pick", "place"]
    assert [episode.instruction for episode in RldsSource(path, "train")] == [episode.instruction for episode in episodes]


def test_a_dataset_may_say_whose_it_is(tmp_path, config):
    options = {"control_hz": 10.0, "image_size": SIZE, "description": ""}
    path = write_rlds(tmp_path, "own", {"train": [step_episode(12)]}, robot="franka", **options)
    with pytest.raises(ValueError, match="robot is 'a/b'; expected a name without '/'"):
        write_rlds(tmp_path, "other", {"train": [step_episode(12)]}, robot="a/b", **options)
    for robots, expected in (((), "franka"), ((("own", "ur5"),), "ur5")):
        data = dataclasses.replace(config, action_dataset=str(path), robots=robots)
        assert open_datasets(experiment_of("action", data), "train").windows["own"].robot == expected
    plain = write(tmp_path, "plain", 12)
    data = dataclasses.replace(config, action_dataset=str(plain))
    assert open_datasets(experiment_of("action", data), "train").windows["plain"].robot is None


def test_a_camera_that_nobody_chose_is_left_out(tmp_path, config, caplog):
    path = write(tmp_path, "depth", 12, wrist=True)
    features = path / "features.json"
    tree = json.loads(features.read_text())
    observation = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]["observation"]
    image = observation["featuresDict"]["features"]["image_wrist"]["image"]
    image |= {"shape": {"dimensions": ["16", "32", "4"]}, "encodingFormat": "png"}
    features.write_text(json.dumps(tree))
    data = dataclasses.replace(config, action_dataset=str(path))
    with caplog.at_level("WARNING"):
        assert open_datasets(experiment_of("action", data), "train").windows["depth"].cameras == ("primary",)
    assert "left out camera 'wrist'" in caplog.text and "image_wrist' is Image(shape=(16, 32, 4)" in caplog.text
    both = dataclasses.replace(data, cameras=("primary", "wrist"))
    with pytest.raises(DatasetError, match=r"image_wrist' is Image\(shape=\(16, 32, 4\).*expected a uint8 Image of a fixed"):
        open_datasets(experiment_of("action", both), "train")
