"""What version 0.1 wrote is read, and acts the same.

`written_by_0.1/runs.tar.xz` holds what that version wrote of `tiny.experiment()`: a run of stage `video` with adapters (of its
checkpoint only what inference reads), the run of stage `action` on it, whole, and its bundle. `chunk.npz` has an observation of
two robots, and the actions that it planned for it, at query 3.
"""

import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
import tiny
from run_states import ONE_DEVICE

from data_pipelines.loader import Part, WindowDataset, data_state
from data_pipelines.mixture import Mixture, Phase
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.writers import write_rlds
from mimic_video.config import ConfigError
from mimic_video.policy.policy import Policy
from mimic_video.runs import checkpoints, directory
from mimic_video.training.steps import abstract_state

FILES = pathlib.Path(__file__).parent / "written_by_0.1"
SETTINGS = {"steps": 4, "warmup_steps": 1, "batch_size": 4, "log_every": 1, "checkpoint_every": 100, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of `video`, `action` and `bundle`."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(FILES / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_configurations(runs):
    for name, changes in (("video", {"lora": {"rank": 2}}), ("action", {"backbone_run": "video"})):
        stored = directory.read_config(runs / name)
        data = {field: getattr(stored.data, field) for field in ("video_dataset", "action_dataset")}
        assert stored == tiny.experiment(stage=name, train=SETTINGS, data=data, compat={"percentile_clamp": True}, **changes)
    assert directory.read_config(runs / "bundle") == directory.read_config(runs / "action")


@pytest.mark.parametrize("name", ["action", "bundle"])
def test_the_policy_acts_as_it_did(runs, name):
    """To the bit where it was written; other CPUs sum in another order, and float32 roundings of 6e-8 pass some dozen layers."""
    stored, policy = np.load(FILES / "chunk.npz"), Policy.load(runs / name)
    actions = policy(stored["images"], stored["proprio"], stored["instructions"].tolist(), query=3)
    normalize = policy.normalizers["action"].normalize
    np.testing.assert_allclose(normalize(actions), normalize(stored["actions"]), atol=1e-5)
    for key, normalizer in policy.normalizers.items():  # that of then, by hand (SPEC 7.1)
        entry = policy.embodiment.statistics[key]
        np.testing.assert_array_equal(normalizer.shift, entry.mean_clamped)
        np.testing.assert_array_equal(normalizer.scale, 1 / entry.std_clamped)
        np.testing.assert_array_equal(normalizer.high, (entry.clamp_max - entry.mean_clamped) * normalizer.scale)


def test_the_run_can_be_a_backbone_and_be_continued(runs, tmp_path):
    backbone, step = checkpoints.load_params(runs / "video")
    assert step == 4 and backbone.keys() == {"tokenizer", "backbone"}
    kept = checkpoints.load_frozen(runs / "action")
    for now, then in zip(
        jax.tree.leaves(backbone), jax.tree.leaves(kept), strict=True
    ):  # adapters are merged on the CPU there is
        np.testing.assert_allclose(now, then, atol=1e-6)

    run, config = shutil.copytree(runs / "action", tmp_path / "action"), directory.read_config(runs / "action")
    directory.write_config(run, config)
    splits = {"train": [tiny.episode(length, seed) for seed, length in enumerate((14, 25, 11))]}
    data = write_rlds(tmp_path / "data", "tiny", splits, control_hz=10.0, image_size=tiny.SIZE, description="Noise.")
    windows = WindowDataset(RldsSource(data, "train"), config.data, actions=True)
    drawn = [Part("tiny", windows)], Mixture([len(windows)], (Phase(0, (1.0,)),), config.train.batch_size, config.seed)
    with checkpoints.open_checkpoints(run, 1) as manager:
        state = checkpoints.restore(manager, abstract_state(tiny.model(config), ONE_DEVICE))  # whose fingerprints are compared
        checkpoints.require_same_data(manager, lambda step: data_state(*drawn, step))
    assert int(state.step) == 4


def test_a_field_that_is_derived_now_and_was_another_value(runs, tmp_path):
    values = json.loads((runs / "action" / "config.json").read_text())
    assert values["text"]["width"] == values["backbone"]["text_width"] == 8
    values["text"]["width"] = 16
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        directory.read_config(tmp_path)
    expected = "config field 'text.width' is 16; expected 8, as follows from backbone.text_width"
    assert str(error.value) == f"{tmp_path / 'config.json'}: {expected}"
