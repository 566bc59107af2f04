"""Mistakes on the command line of launch/train.py: each ends early, without a traceback, and names what is wrong."""

import os
import re
import shutil
import sys

import pytest
import tiny

from data_pipelines.writers import write_rlds
from mimic_video.runs import directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Episodes of 1.4 s at 10 Hz, in `train` only."""
    episodes = {"train": [tiny.episode(15, seed) for seed in (0, 1)]}
    folder = tmp_path_factory.mktemp("data")
    return write_rlds(folder, "tiny", episodes, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")


@pytest.fixture(scope="module")
def experiment_file(config_file, dataset):
    return config_file(tiny.experiment(data={"video_dataset": str(dataset), "action_dataset": str(dataset)}))


@pytest.fixture
def train(launch, tmp_path, experiment_file):
    """Runs `python launch/train.py --config=... --workdir=tmp_path/run ARGUMENTS`, which has to fail, and returns its message."""

    def run(*arguments, config=None, workdir=True):
        own = [f"--config={config or experiment_file}"] + [f"--workdir={tmp_path / 'run'}"] * workdir
        message = launch("train", *own, *arguments)
        assert not list((tmp_path / "run").glob("checkpoints/*"))
        return message

    return run


def assert_says(message, *parts):
    assert message.startswith("error: ") and "\n" not in message
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.train.stepz=5"], ["'train.stepz'", "did you mean 'train.steps'"]),
        (["--config.backbnoe.width=32"], ["'backbnoe.width'", "did you mean 'backbone.width'"]),
        (["--config.train.steps=5", "--config.train.warmup_steps=9"], ["'train.warmup_steps' is 9"]),
        (["--config.stage=vdeo"], ["'stage' is 'vdeo'", "'video', 'action'"]),
        (["--config.decoder.action_dim=3"], ["action width 2", r"'decoder\.action_dim' is 3"]),
        (["--config.decoder.proprio_dim=4"], ["proprio width 3", r"'decoder\.proprio_dim' is 4"]),
        (
            ["--config.data.image_size=(32, 32)"],
            [r"image size of camera 'primary' \(16, 32\)", r"'data\.image_size' is \(32, 32\)"],
        ),
        (
            ["--config.data.action_horizon=40"],
            [r"'data\.action_horizon' is 40", r"1\.40 s"],
        ),
        (["--config.data.future_frames=20"], [r"'data\.future_frames' is 20", r"1\.40 s"]),
        (["--config.data.train_split=training"], ["no split 'training'", "train"]),
        (
            ["--config.data.train_split=train[:9]"],
            [r"'data\.train_split': split 'train\[:9\]'", r"expected bounds from -2 to 2$"],
        ),
        (["--config.data.train_split=train[9"], [r"'data\.train_split' is 'train\[9'; expected the name of a split such as"]),
        (["--config.train.validate_every=2"], ["no split 'val'"]),
        (["--config.data.action_dataset="], [r"'data\.action_dataset' is empty"]),
        (["--config.backbone_run=runs/nowhere"], ["runs/nowhere is not a run directory"]),
        (["--config.tokenizer.kind=wan"], ["'backbone_run' is empty", "tokenizer 'wan'"]),
        (["--config.mesh.data=3"], ["'mesh'", "8 devices"]),
        (["--profile=ten"], ["--profile is 'ten'; expected FIRST:LAST"]),
        (
            ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.decoder.width=20"],
            [r"'mesh\.fsdp' is 8", "decoder/blocks/"],
        ),
    ],
)
def test_the_message_names_the_mistake(train, arguments, parts):
    assert_says(train(*arguments), *parts)


def test_a_value_of_the_wrong_type(train):
    assert "train.steps" in train("--config.train.steps=many")


def test_a_forgotten_workdir(train):
    assert "--workdir" in train(workdir=False)


def test_a_dataset_that_is_missing(train, tmp_path):
    missing = tmp_path / "nowhere" / "1.0.0"
    assert_says(train(f"--config.data.action_dataset={missing}"), f"dataset directory {missing} does not exist")
    assert_says(train(f"--config.data.action_dataset={tmp_path}"), f"{tmp_path} has no dataset of a known format")


def test_a_dataset_that_is_half_written(train, tmp_path, dataset):
    (tmp_path / "incomplete.abc_1.0.0").mkdir()
    assert_says(train(f"--config.data.action_dataset={tmp_path / '1.0.0'}"), "half-written", r"incomplete\.abc_1\.0\.0")
    assert_says(train(f"--config.data.action_dataset={tmp_path / 'incomplete.abc_1.0.0'}"), "half-written")


def test_a_dataset_whose_copy_was_cut_short(train, tmp_path, dataset):
    copy = tmp_path / "copy" / "1.0.0"
    shutil.copytree(dataset, copy)
    shard = next(copy.glob("*tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-40])
    assert_says(train(f"--config.data.action_dataset={copy}"), re.escape(str(shard)), "ends within it")


def test_a_backbone_of_another_width(train, tmp_path):
    directory.write_config(tmp_path / "video", tiny.experiment(stage="video", backbone={"width": 32}))
    assert_says(train(f"--config.backbone_run={tmp_path / 'video'}"), "'backbone.width' is 16, there 32")


def test_a_backbone_that_was_never_trained(train, tmp_path):
    run = tmp_path / "video"
    directory.write_config(run, tiny.experiment(stage="video"))
    assert_says(train(f"--config.backbone_run={run}"), f"{run} has no complete checkpoint")


def test_a_workdir_of_another_experiment(train, tmp_path):
    directory.write_config(tmp_path / "run", tiny.experiment(seed=5))
    assert_says(train(), "seed: 5 → 0", "--workdir")


def test_a_corrected_command_may_use_the_same_workdir(train, tmp_path, dataset):
    train("--config.backbone_run=runs/nowhere")
    data = {"video_dataset": str(dataset), "action_dataset": str(dataset)}
    directory.write_config(tmp_path / "run", tiny.experiment(data=data, backbone_run=str(tmp_path / "video")))


def test_a_directory_that_another_run_is_using(train, tmp_path):
    with directory.locked(tmp_path / "run"):
        assert_says(train(), f"process {os.getpid()} on .* has been training in .*run since", "or use another --workdir")


def test_a_tilde_in_a_flag_is_the_home_directory(launch, tmp_path, experiment_file, monkeypatch):
    """Shells leave it there behind "="."""
    home = experiment_file.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    config = f"--config=~/{experiment_file.name}"
    assert_says(launch("train", config, "--workdir=~/run", "--config.backbone_run=~/nowhere"), f"{home}/nowhere is not a run")
    assert_says(launch("train", config, "--workdir=~of_nobody/run"), "--workdir is '~of_nobody/run'; expected a home directory")
    for config in (["--config=~/other.py"], ["--config", "~/other.py"]):
        assert_says(launch("train", *config, "--workdir=~/run"), f"there is no file {home}/other.py")
    assert_says(launch("inspect_data", "--source=~/none"), f"{home}/none")
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_is_asked_for_before_data(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = train("--config.train.wandb_project=tests", "--config.data.action_dataset=/nowhere")
    assert_says(message, "'train.wandb_project' is set, but the package wandb is missing")


def test_a_file_that_registers_a_robot(train, tmp_path):
    assert train("--robot=/nowhere/arm.py") == "error: --robot: there is no file /nowhere/arm.py"
    (tmp_path / "arm.py").write_text("from data_pipelines.oxe.registry import registr\n")
    message = train(f"--robot={tmp_path / 'arm.py'}")
    assert message.startswith(f"error: --robot: {tmp_path}/arm.py cannot be used: ImportError: cannot import name 'registr'")
    (tmp_path / "arm.py").write_text(
        "from data_pipelines.oxe.registry import find, register\nimport dataclasses\n"
        "register(dataclasses.replace(find('bridge_orig'), robot='another'))\n"
    )
    message = train(f"--robot={tmp_path / 'arm.py'}")
    assert message.endswith("ValueError: dataset 'bridge_orig' is registered already, with another entry; choose another name")


def test_a_dataset_that_is_neither_a_folder_nor_registered(train, tmp_path):
    (tmp_path / "empty").mkdir()
    folder = train(f"--config.data.action_dataset={tmp_path / 'empty'}")
    assert folder.startswith(
        f"error: {tmp_path}/empty has no dataset of a known format: expected a folder with dataset_info.json"
    )
    name = train("--config.data.action_dataset=brige_orig")
    assert name.startswith(
        "error: config field 'data.action_dataset' names 'brige_orig': there is no such folder, and no dataset"
    )
    assert name.endswith("of that name is registered; the nearest is 'bridge_orig'")
