import json

import pytest
import tiny


@pytest.fixture
def config(config_file):
    return f"--config={config_file(tiny.experiment(train={'batch_size': 2}, tokenizer={'fit_windows': 2}))}"


@pytest.mark.slow
def test_training_of_every_kind_in_one_line(launch, config):
    lines = launch("benchmark", "training", config, "--repeats=2", "--config.mesh.fsdp=2", "--config.mesh.data=-1",
                   "--config.train.batch_size=8").splitlines()  # fmt: skip
    result = json.loads(lines[-1])
    assert len(lines) == 1 and result["note"].startswith("on CPU")
    for kind in ("action", "lora", "full"):
        step = result[kind]
        assert 0 < step["p50_ms"] <= step["p95_ms"] and step["compile_s"] > 0 and step["mfu"] is None
        assert 0 < step["attention_share_of_flops"] < 1
        assert step["tokens_per_second"] == pytest.approx(8 * 6 * step["steps_per_second"], rel=0.05)
    assert result["tokens_per_sample"] == 6


@pytest.mark.slow
def test_more_draws_have_less_variance(launch, config):
    rows = json.loads(launch("benchmark", "draws", config, "--repeats=2", "--keys=16", "--config.mesh.data=1",
                             "--config.mesh.fsdp=8", "--config.train.batch_size=8"))["draws"]  # fmt: skip
    assert [row["draws"] for row in rows] == [1, 2, 4, 8] and rows[0]["variance_ratio"] == rows[0]["time_ratio"] == 1
    assert rows[3]["variance"] < rows[1]["variance"] < rows[0]["variance"]


def test_an_unknown_benchmark(launch):
    assert "there is no benchmark 'trainin'; expected training or draws" in launch("benchmark", "trainin")
