import json

import pytest

pytestmark = pytest.mark.reference

SMALL = ("--recorded_size=64x80", "--episodes=2", "--windows=16")


def test_every_reader_and_memory_in_one_line(launch):
    lines = launch(
        "benchmark_data", *SMALL, "--image_size=32x48", "--augment", "--memory_windows=80", "--memory_size=32x48"
    ).splitlines()
    result = json.loads(lines[-1])
    assert len(lines) == 1 and result["workers"] == 0 and result["size"] == [32, 48]
    for other in ("opencv", "opencv_pillow", "augmented", "tfdata"):
        assert result[f"ratio_to_{other}"] == result["loader_frames_per_second"] / result[f"{other}_frames_per_second"] > 0
    memory = result["memory"]
    assert memory["windows"] == 80 and memory["first_mb"] > 10
    assert memory["largest_over_first"] >= memory["last_over_first"] > 0.5


def test_opening_a_split_of_many_episodes(launch):
    result = json.loads(launch("benchmark_data", "--split_episodes=200", "--workers=1").splitlines()[-1])
    assert result["episodes"] == 200 and 200 * 19 <= result["windows"] <= 200 * 79
    assert all(result[f"{name}_s"] > 0 for name in ("made", "first_open", "open", "first_batch"))
    assert result["bare"]["resident_mb"] > result["bare"]["own_mb"] > 0
    assert abs(result["resident_mb_over_bare"]) < result["bare"]["resident_mb"]
