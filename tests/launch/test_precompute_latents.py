"""launch/precompute_latents.py as a user runs it, and launch/train.py on what it makes."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny

from data_pipelines import precompute
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds
from mimic_video.runs import checkpoints

STEPS = 15 + 12  # windows of the split train at stride 1


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Ten of the tiny windows in float32, so that `train` has three shards and `val` two."""
    monkeypatch.setattr(precompute, "SHARD_BYTES", 10 * 3 * 2 * 4 * 16 * 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((15, 12))], "val": [tiny.episode(16, 9)]}
    folder = tmp_path_factory.mktemp("data")
    return write_rlds(folder, "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.", file_format="tfrecord")


def save_backbone(run, seed=3, **changes):
    """A run directory of random weights, for `backbone_run`."""
    config = tiny.experiment(stage="video", **changes)
    params = tiny.params(config, seed)
    checkpoints.save_converted(run, config, {name: params[name] for name in ("tokenizer", "backbone")})
    return run


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone") / "run")


@pytest.fixture
def command(launch, config_file, dataset, backbone, tmp_path):
    """command(script, *arguments, **changes of the experiment) → what the script printed, or its message if it failed.

    Both stages read the same dataset; latents are in tmp_path/latents.
    """

    def run(script, *arguments, **changes):
        data = {"video_dataset": str(dataset), "action_dataset": str(dataset), "latents": str(tmp_path / "latents")}
        data |= changes.pop("data", {})
        file = config_file(tiny.experiment(**{"backbone_run": str(backbone), "data": data} | changes))
        return launch(script, f"--config={file}", *arguments)

    return run


def shards_in(tmp_path, split="train"):
    return sorted(path.name for path in (tmp_path / "latents" / "tiny" / split).glob("*.npy"))


def outcome(run):
    """The losses of every step and the trained parameters."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line.get(name) for line in lines for name in ("loss", "validation_video_mse", "validation_action_mse")]
    return losses, jax.tree.leaves(checkpoints.load_params(run, "stored")[0])


def assert_same(one, other):
    (losses, params), (other_losses, other_params) = outcome(one), outcome(other)
    assert losses == other_losses and len(losses) > 6
    for a, b in zip(params, other_params, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.training
@pytest.mark.parametrize("stage", ["action", "video"])
def test_training_from_latents_equals_training_from_frames(command, tmp_path, stage):
    validating = {"train": {"validate_every": 2}}
    output = command("precompute_latents", **validating)  # for both stages, since both read the same dataset
    assert f"tiny/train: {STEPS} windows of 0.00154 MB, 4.15e-05 GB in 3 shards, of which 3 are to be made here" in output
    assert "tiny/val: 16 windows" in output and "made 5 shards" in output and output.endswith("the latents are complete\n")
    command("train", f"--workdir={tmp_path / 'cached'}", **validating, stage=stage)
    command("train", f"--workdir={tmp_path / 'frames'}", **validating, stage=stage, data={"latents": ""})
    assert_same(tmp_path / "cached", tmp_path / "frames")


@pytest.mark.training
def test_training_from_bfloat16_latents_of_the_wan_tokenizer(command, one_device, tmp_path):
    tokenizer = {"kind": "wan", "width": 4}
    backbone = save_backbone(tmp_path / "wan", tokenizer=tokenizer)
    changes = {"precision": "bfloat16", "tokenizer": tokenizer, "backbone_run": str(backbone)}
    command("precompute_latents", **changes)
    assert json.loads((tmp_path / "latents/tiny/train/manifest.json").read_text())["dtype"] == "bfloat16"
    command("train", f"--workdir={tmp_path / 'cached'}", **changes)
    command("train", f"--workdir={tmp_path / 'frames'}", **changes, data={"latents": ""})
    assert_same(tmp_path / "cached", tmp_path / "frames")


@pytest.mark.training
def test_no_frame_is_read_in_training(command, one_device, tmp_path, dataset, monkeypatch):
    command("precompute_latents", "--stride=4")

    def refuse(*arguments):
        raise AssertionError("an image was read")

    monkeypatch.setattr(RldsSource, "encoded", refuse)
    assert "error" not in command("train", f"--workdir={tmp_path / 'run'}")
    losses, _ = outcome(tmp_path / "run")
    assert len(losses) == 3 * 4


def test_parts_of_the_work_and_continuing(command, tmp_path):
    message = command("train", f"--workdir={tmp_path / 'run'}")
    assert re.search(r"error: there are no precomputed latents in .*latents/tiny/train", message)
    validating = {"train": {"validate_every": 2}}
    assert "2 are missing, of other parts of the work" in command("precompute_latents", "--shard=0/2", **validating)
    assert shards_in(tmp_path) == ["00000.npy", "00002.npy"] and shards_in(tmp_path, "val") == ["00000.npy"]
    message = command("train", f"--workdir={tmp_path / 'run'}")
    assert re.search(r"error: .*latents/tiny/train lack 1 of 3 shards \(00001\.npy\)", message)
    kept = (tmp_path / "latents/tiny/train/00000.npy").stat().st_mtime_ns
    output = command("precompute_latents", "--shard=1/2", **validating)
    assert "in 3 shards, of which 1 are to be made here" in output and "the latents are complete" in output
    (tmp_path / "latents/tiny/train/00002.npy").unlink()
    assert "made 1 shards" in command("precompute_latents")
    assert (tmp_path / "latents/tiny/train/00000.npy").stat().st_mtime_ns == kept
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.training
def test_slices_share_the_latents_of_their_split(command, tmp_path):
    """Of windows 0 to 14 and 15 to 26 in shards of ten: the second episode is in the last two."""
    slices = {"train_split": "train[1:]", "validation_split": "train[1:2]"}
    settings = {"train": {"validate_every": 2}, "data": slices}
    assert "in 3 shards, of which 2 are to be made here" in command("precompute_latents", **settings)
    assert shards_in(tmp_path) == ["00001.npy", "00002.npy"] and len(list((tmp_path / "latents/tiny").iterdir())) == 1
    command("train", f"--workdir={tmp_path / 'cached'}", **settings)
    command("train", f"--workdir={tmp_path / 'frames'}", **settings | {"data": slices | {"latents": ""}})
    assert_same(tmp_path / "cached", tmp_path / "frames")
    first = {"data": {"train_split": "train[:1]"}}
    message = command("train", f"--workdir={tmp_path / 'first'}", **first)
    assert re.search(r"error: .*latents/tiny/train lack 1 of 2 shards \(00000\.npy\)", message)
    assert "of which 1 are to be made here" in command("precompute_latents", **first)
    assert "of which 0 are to be made here" in command("precompute_latents")
    command("train", f"--workdir={tmp_path / 'first'}", **first)
    message = command("train", f"--workdir={tmp_path / 'first'}")
    assert re.search(r"error: .* a run with another configuration .*data\.train_split: 'train\[:1\]' → 'train'", message)


def test_stale_latents_are_refused(command, tmp_path):
    command("precompute_latents")
    other = {"backbone_run": str(save_backbone(tmp_path / "other", seed=4))}
    for arguments in (["precompute_latents"], ["train", f"--workdir={tmp_path / 'run'}"]):
        message = command(*arguments, **other)
        assert message.startswith("error: ") and message.endswith("do not fit this experiment: another tokenizer made them")
        assert re.search(r"'data\.video_hz' is 20\.0, there 10\.0", command(*arguments, data={"video_hz": 20.0}))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.training
def test_a_run_that_has_begun_checks_its_own_tokenizer(command, one_device, tmp_path):
    start = save_backbone(tmp_path / "start")
    settings = {"backbone_run": str(start)}
    command("precompute_latents", **settings)
    command("train", f"--workdir={tmp_path / 'run'}", **settings)
    start.rename(tmp_path / "away")
    save_backbone(start, seed=4)
    assert "error" not in command("train", f"--workdir={tmp_path / 'run'}", **settings)
    shutil.rmtree(tmp_path / "latents")
    command("precompute_latents", **settings)  # with what `backbone_run` has become
    assert "another tokenizer made them" in command("train", f"--workdir={tmp_path / 'run'}", **settings)


@pytest.mark.training
def test_a_record_that_cannot_be_read(command, one_device, tmp_path):
    splits = {"train": [tiny.episode(15, seed) for seed in (0, 1)]}
    broken = write_rlds(
        tmp_path, "broken", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.", file_format="tfrecord"
    )
    RldsSource(broken, "train")  # indexes it
    shard = next(broken.glob("*tfrecord*"))
    content = bytearray(shard.read_bytes())
    content[3 * len(content) // 4] ^= 0xFF  # inside the second record
    shard.write_bytes(content)
    data = {"video_dataset": str(broken), "action_dataset": str(broken)}
    settings = {"train": {"steps": 8}}
    assert re.search(r"error: shard .*broken.*, record 1", command("precompute_latents", data=data, **settings))
    skipping = data | {"skip_broken": True}
    assert "the latents are complete" in command("precompute_latents", data=skipping, **settings)
    assert "has no latents of window" in command("train", f"--workdir={tmp_path / 'one'}", data=data, **settings)
    command("train", f"--workdir={tmp_path / 'two'}", data=skipping, **settings)
    losses, _ = outcome(tmp_path / "two")
    assert np.isfinite(losses[::3]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.latents="], r"'data\.latents' is empty; expected the folder to fill"),
        (["--config.backbone_run="], r"'data\.latents' is .*; expected no folder, since 'backbone_run'"),
        (["--config.backbone_run=nowhere"], "nowhere is not a run directory"),
        (["--config.tokenizer.kind=wan"], "'tokenizer.kind' is 'wan', there 'pca'"),
        (["--shard=2/2"], "--shard is '2/2'; expected i/n with i from 0 to n - 1"),
        (["--shard=half"], "--shard is 'half'"),
        (["--stride=0"], "--stride"),
        (["--config.data.train_split=training"], "no split 'training'"),
        (["--config.train.batch_size=6"], r"'train\.batch_size' is 6; expected a multiple of mesh data x fsdp = 8"),
    ],
)
def test_the_message_names_the_mistake(command, tmp_path, arguments, message):
    assert re.search(message, command("precompute_latents", *arguments))
    assert not list(tmp_path.glob("latents/*/*/*.npy"))
