import dataclasses
import json

import numpy as np
import pytest
import tiny

from mimic_video import embodiments
from mimic_video.config import ConfigError
from mimic_video.embodiments import Embodiment
from mimic_video.transforms import compute_statistics


def robot(name, index, action_dim, proprio_dim, raw=()):
    random = np.random.default_rng(index)
    statistics = {
        "action": compute_statistics(random.normal(5, 2, (50, 4, action_dim))),
        "proprio": compute_statistics(random.normal(5, 2, (50, 1, proprio_dim))),
    }
    return Embodiment(name, index, statistics, {"action": raw, "proprio": ()})


ROBOTS = {"arm": robot("arm", 0, 7, 8, (3, 4)), "lift": robot("lift", 1, 1, 2)}


def test_widths():
    assert [(e.action_dim, e.proprio_dim) for e in ROBOTS.values()] == [(7, 8), (1, 2)]


def test_a_table_in_json_is_exact():
    shuffled = dict(reversed(ROBOTS.items()))
    restored = embodiments.from_table(json.loads(json.dumps(embodiments.to_table(shuffled))))
    assert list(restored) == ["arm", "lift"]
    for name, expected in ROBOTS.items():
        found = restored[name]
        assert (found.name, found.index, found.raw_dims) == (expected.name, expected.index, expected.raw_dims)
        for key in ("action", "proprio"):
            for field, value in vars(expected.statistics[key]).items():
                np.testing.assert_array_equal(getattr(found.statistics[key], field), value)


@pytest.mark.parametrize(
    "table",
    [
        [{"name": "arm"}],
        [3],
        [{"name": "arm", "raw_dims": {}, "statistics": {}}],
        [{"name": "a", "raw_dims": {"action": [], "proprio": []}, "statistics": {"action": {}}}],
    ],
)
def test_no_table(table):
    with pytest.raises(ValueError, match=r"not a table of embodiments|statistics of 'action'"):
        embodiments.from_table(table)


def test_a_table_from_when_a_robot_was_one_dataset():
    old = [
        {name: value for name, value in entry.items() if name not in ("index", "datasets")}
        for entry in embodiments.to_table(ROBOTS)
    ]
    found = embodiments.from_table(old)
    assert [(e.name, e.index, e.datasets) for e in found.values()] == [("arm", 0, ()), ("lift", 1, ())]
    assert embodiments.of_dataset(found, "lift") is found["lift"]
    del old[0]["cameras"]  # older still
    assert embodiments.from_table(old)["arm"].cameras == ("primary",)


def test_whose_a_dataset_is():
    robots = ROBOTS | {"arm": dataclasses.replace(ROBOTS["arm"], datasets=("kitchen", "garage"))}
    restored = embodiments.from_table(embodiments.to_table(robots))
    assert embodiments.of_dataset(restored, "garage").name == "arm" and embodiments.of_dataset(restored, "lift").name == "lift"
    with pytest.raises(ConfigError, match="the dataset is 'arm'; this model was trained on 'kitchen', 'garage', 'lift'"):
        embodiments.of_dataset(restored, "arm")


def test_choosing():
    assert embodiments.choose(ROBOTS, "lift") is ROBOTS["lift"]
    assert embodiments.choose({"arm": ROBOTS["arm"]}, None) is ROBOTS["arm"]
    for name in (None, "hand"):
        with pytest.raises(ConfigError, match=f"the embodiment is {name!r}; this model has 'arm', 'lift'"):
            embodiments.choose(ROBOTS, name)


def test_normalisers_leave_raw_dimensions_alone():
    values = np.full((4, 7), 9.0, np.float32)
    normalised = ROBOTS["arm"].normalizers(tiny.experiment())["action"].normalize(values)
    np.testing.assert_array_equal(normalised[:, 3:5], 9.0)
    assert np.abs(normalised[:, [0, 1, 2, 5, 6]]).max() < 4


def test_padding():
    values = np.ones((2, 3, 4), np.float32)
    padded = embodiments.pad_last(values, 6)
    assert padded.shape == (2, 3, 6)
    np.testing.assert_array_equal(padded, np.concatenate([values, np.zeros((2, 3, 2))], -1))
    np.testing.assert_array_equal(embodiments.pad_last(values, 4), values)
