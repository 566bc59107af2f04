"""Registry datasets as an experiment opens them."""

import dataclasses
import itertools

import declared
import numpy as np
import pytest

from data_pipelines.assembly import TrainingData
from data_pipelines.datasets import open_datasets
from data_pipelines.loader import Part, make_batches
from data_pipelines.mixture import Mixture
from data_pipelines.oxe import mixtures, registry
from data_pipelines.sources.rlds import DatasetError
from mimic_video.config import experiment_from
from mimic_video.transforms import relative_poses


def experiment(stage="action", datasets="bridge_orig", root="", **data):
    window = {"image_size": (32, 48), "past_frames": 1, "future_frames": 4, "action_horizon": 2}  # at 5 Hz
    return experiment_from(
        {
            "stage": stage,
            "data": window | {f"{stage}_dataset": datasets, "root": str(root)} | data,
            "decoder": {"action_dim": 10, "proprio_dim": 10},
            "policy": {"execute_steps": 2},
        }
    )


@pytest.fixture
def root(tmp_path):
    for name in ("bridge_orig", "fractal20220817_data"):
        spec = registry.find(name)
        declared.write_dataset(tmp_path, spec, declared.make_columns(spec))
    return tmp_path


def test_windows_of_a_registry_dataset(root):
    (windows,) = open_datasets(experiment(root=root), "train").windows.values()
    assert windows.raw_dims == {"action": (3, 4, 5, 6, 7, 8), "proprio": (3, 4, 5, 6, 7, 8)}
    window, episode = windows[2], windows.episodes[0]
    assert window["video"].shape == (1, 5, 32, 48, 3) and window["instruction"] == declared.INSTRUCTION
    np.testing.assert_allclose(window["video"][0].mean((1, 2, 3)), [60, 90, 120, 150, 180], atol=1)  # steps 2 to 6 at 5 Hz
    expected = relative_poses(episode.proprio[2], episode.actions[3:5])
    np.testing.assert_allclose(window["actions"][:, :9], expected[:, :9], atol=1e-5)
    np.testing.assert_array_equal(window["proprio"][0], episode.proprio[2])


def test_an_entry_says_whose_it_is(root, monkeypatch):
    assert not any(registry.find(name).robot for name in registry.names())  # so mixtures that are shipped have a robot a dataset
    spec = registry.find("bridge_orig")
    monkeypatch.setattr(registry, "find", lambda _: dataclasses.replace(spec, robot="widowx"))
    assert list(TrainingData(experiment(root=root)).open().robots()) == ["widowx"]
    chosen = experiment(root=root, robots=(("bridge_orig", "arm"),))
    assert list(TrainingData(chosen).open().robots()) == ["arm"]
    with pytest.raises(ValueError, match="dataset 'bridge_orig': robot is 'a/b'; expected a name without '/'"):
        dataclasses.replace(spec, robot="a/b")


def test_batches_of_a_named_mixture(root, monkeypatch):
    weights = {"bridge_orig": 1.0, "fractal20220817_data": 2.0}
    monkeypatch.setitem(mixtures.MIXTURES, "two", weights)
    config = experiment("video", "two", root)
    windows, phases = open_datasets(config, "train")
    assert list(windows) == list(weights)
    np.testing.assert_allclose(phases[0].weights, [1 / 3, 2 / 3])  # both have seven windows
    mixture = Mixture([len(each) for each in windows.values()], phases, 4, seed=0)
    parts = [Part(name, each) for name, each in windows.items()]
    stream = make_batches(
        parts, mixture, batch_size=4, start_step=0, text=lambda _: np.zeros((1, 2), np.float32), decoder=config.decoder
    )
    for batch in itertools.islice(stream, 3):
        assert batch.observation.video.shape == (4, 1, 5, 32, 48, 3) and batch.actions is None


def test_what_is_not_as_its_entry_says(root):
    spec = registry.find("droid")
    directory = root / "droid" / "1.0.0"
    directory.parent.mkdir()
    (root / "bridge_orig" / "1.0.0").rename(directory)
    missing = f"'steps/observation/{spec.primary}' is missing"
    with pytest.raises(DatasetError, match=rf"(?s){directory}: dataset 'droid' does not have.*{missing}"):
        open_datasets(experiment("video", "droid", root), "train")


def test_commanded_steps_at_another_rate(root):
    with pytest.raises(DatasetError, match=r"has action rate 3\.0; the config field 'data\.control_hz' is 5\.0"):
        open_datasets(experiment(datasets="fractal20220817_data", root=root), "train")
