"""Splits are opened without reading their episodes again, and with what reading them would tell."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
from synthetic import SIZE, step_episode

from data_pipelines import survey
from data_pipelines.episode import content_hash
from data_pipelines.loader import WindowDataset
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardise import Layout, vector
from data_pipelines.sources import index as index_module
from data_pipelines.sources.rlds import RldsSource
from data_pipelines.survey import survey_of
from data_pipelines.writers import write_rlds
from mimic_video.config import DataConfig

LENGTHS = tuple(9 + number % 4 for number in range(40))  # more than are compared


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    splits = {"train": [step_episode(n, episode=e) for e, n in enumerate(LENGTHS)]}
    return write_rlds(tmp_path, "steps", splits, control_hz=10.0, image_size=SIZE, description="Steps that count.")


@pytest.fixture
def read(monkeypatch):
    """The numbers of episodes that are read, as a list that grows."""
    numbers, original = [], RldsSource.__getitem__
    monkeypatch.setattr(RldsSource, "__getitem__", lambda self, place: numbers.append(place) or original(self, place))
    return numbers


def kept(directory):
    return sorted(directory.glob(".mimic_video_index/*/surveys/*"))


@pytest.mark.parametrize("split", ["train", "train[5:20]", "train[30:]+train[:7]"])
def test_it_is_that_of_the_episodes(directory, split):
    source = RldsSource(directory, split)
    episodes = [source[place] for place in range(len(source))]
    for _ in range(2):  # read, and kept
        found = survey_of(RldsSource(directory, split))
        assert found.broken == [] and found.content == content_hash(episodes)
        assert found.instructions == list(dict.fromkeys(episode.instruction for episode in episodes))
        assert len(found.clocks) == 4 and len(found.clock_of) == len(episodes)
        for episode, clock in zip(episodes, found.clock_of, strict=True):
            np.testing.assert_array_equal(found.clocks[clock], episode.timestamps, strict=True)


def test_episodes_are_read_once(directory, config, read):
    """By several stages, and whatever the windows."""
    WindowDataset(RldsSource(directory, "train"), config, actions=True)
    assert set(read) == set(range(len(LENGTHS))) and len(kept(directory)) == 1
    for again in (config, dataclasses.replace(config, action_horizon=2, action_delay=0.0)):
        read.clear()
        windows = WindowDataset(RldsSource(directory, "train"), again, actions=False)
        assert windows.content and windows.identity and windows.lengths.tolist() == list(LENGTHS)
        assert len(read) == 1 + survey._CHECKED  # the source looks at its first one
    assert len(kept(directory)) == 1


def test_an_index_from_before_is_used(directory, monkeypatch):
    """Which had none."""
    expected = survey_of(RldsSource(directory, "train"))
    shutil.rmtree(kept(directory)[0].parent)
    monkeypatch.setattr(index_module, "_index_shard", None)  # which would build another index
    found = survey_of(RldsSource(directory, "train"))
    assert found[:3] == expected[:3] and len(kept(directory)) == 1


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """Of a user, who changes it in a way that its fields do not tell."""

    column: str = "action[0:1]"
    name: str = "own"
    unit: str = "m"
    width: int = 1
    factor = 1.0

    @property
    def references(self):
        return (self.column,)

    def __call__(self, columns):
        return self.factor * columns["steps/action"][:, :1].astype(np.float64)


def own_entry() -> DatasetSpec:
    layout: Layout = vector(OwnPart())
    return DatasetSpec("steps", "image_primary", 10.0, features={"action": (2,)}, proprio=layout, actions=layout)


def test_an_entry_that_computes_otherwise_now_is_found_out(directory, config, monkeypatch, caplog):
    def content():
        return WindowDataset(RldsSource(directory, "train", spec=own_entry()), config, actions=True).content

    before = content()
    assert content() == before
    monkeypatch.setattr(OwnPart, "factor", 2.0)
    with caplog.at_level("INFO"):
        after = content()
    assert after != before and "is not what it was" in caplog.text
    assert len(kept(directory)) == 1 and content() == after


def test_a_layout_that_does_not_say_what_it_is_is_not_kept(directory, config):
    class Unnamed:
        def __init__(self, spec):
            self._spec = spec

        def __getattr__(self, name):
            return getattr(vars(self)["_spec"], name)

    source = RldsSource(directory, "train", spec=Unnamed(own_entry()))
    assert survey_of(source).content == content_hash(source[place] for place in range(len(source)))
    assert kept(directory) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"broken": []}'])
def test_a_damaged_one_is_replaced(directory, damage, caplog):
    expected = survey_of(RldsSource(directory, "train"))
    (path,) = kept(directory)
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert survey_of(RldsSource(directory, "train"))[:3] == expected[:3]
    assert f"{path} cannot be read, so the episodes of" in caplog.text and path.read_bytes() == whole


def test_where_nothing_can_be_written(directory, tmp_path, monkeypatch, caplog):
    expected = survey_of(RldsSource(directory, "train"))
    shutil.rmtree(kept(directory)[0].parent)
    first = survey.first_writable

    def elsewhere(folders):
        return first(folder for folder in folders if not folder.is_relative_to(directory))

    monkeypatch.setattr(survey, "first_writable", elsewhere)
    assert survey_of(RldsSource(directory, "train"))[:3] == expected[:3]
    assert kept(directory) == [] and len(list((tmp_path / "cache").rglob("surveys/*.json"))) == 1
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(survey, "first_writable", lambda folders: None)
    assert survey_of(RldsSource(directory, "train"))[:3] == expected[:3]
    assert f"what is known of {directory} split 'train' is not kept: none of" in caplog.text


def test_what_a_worker_is_given_grows_by_little_for_an_episode(tmp_path):
    """And not with windows: their numbers are arithmetic, and columns are mapped in each process."""
    config, sizes = DataConfig(image_size=SIZE, past_frames=1, future_frames=4, video_hz=10.0), {}
    for count in (10, 40):
        splits = {"train": [step_episode(60, episode=number) for number in range(count)]}
        path = write_rlds(tmp_path, f"steps_{count}", splits, control_hz=10.0, image_size=SIZE, description="Steps that count.")
        windows = WindowDataset(RldsSource(path, "train"), config, actions=False)
        assert len(windows) == 60 * count
        sizes[count] = len(pickle.dumps(windows))
    assert sizes[40] - sizes[10] <= 30 * 12 + 16  # a clock and an end of each; and digits of the name
