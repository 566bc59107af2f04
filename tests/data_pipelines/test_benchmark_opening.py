import numpy as np

from data_pipelines import benchmark_opening
from data_pipelines.sources.rlds import RldsSource


def test_the_split_that_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_opening, "_SHARD", 7)
    source = RldsSource(benchmark_opening.write_split(tmp_path / "many", 30), "train")
    lengths = [len(episode) for episode in source]
    assert len(source) == 30 and 20 <= min(lengths) < max(lengths) <= 80
    assert (source.proprio_dim, source.action_dim, source.control_hz, source.image_size) == (8, 7, 5.0, (16, 16))
    assert all(episode.instruction.startswith("put object ") for episode in source)
    assert len({episode.actions.tobytes() for episode in source}) == 30
    np.testing.assert_array_equal(source[29].frames.take([0, 19]), np.full((2, 16, 16, 3), 128))
