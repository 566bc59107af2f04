"""Every dataset of the registry, written by tfds in the schema that its entry declares, comes back as episodes."""

import declared
import numpy as np
import pytest

from data_pipelines.oxe import registry
from data_pipelines.oxe.spec import check_schema, flatten_features
from data_pipelines.sources.rlds import RldsSource, open_dataset


@pytest.mark.parametrize("name", registry.names())
def test_episodes_of_every_dataset(tmp_path, name):
    spec = registry.find(name)
    columns = declared.make_columns(spec)
    directory = declared.write_dataset(tmp_path, spec, columns, as_bytes=name == "language_table")
    check_schema(flatten_features(open_dataset(directory).features), spec)

    episode = RldsSource(directory, "train", spec=spec)[0]
    for values, expected in zip((episode.proprio, episode.actions), spec.standardise(columns), strict=True):
        np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(episode.timestamps, np.arange(declared.STEPS) / spec.control_hz)
    assert (episode.instruction, episode.action_layout) == (declared.INSTRUCTION, spec.action_layout)
    cameras = {"primary": episode.frames, **episode.further_cameras}
    assert set(cameras) == set(spec.cameras)
    for frames in cameras.values():
        np.testing.assert_allclose(frames.take([5, 2]).mean((1, 2, 3)), [150, 60], atol=1)
