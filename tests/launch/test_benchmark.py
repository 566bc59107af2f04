import json

import pytest
import tiny

SMALL = tiny.experiment(backbone={"num_blocks": 1}, decoder={"num_blocks": 1}, mesh={"fsdp": 2})


@pytest.mark.slow
def test_training_of_every_kind_in_one_line(launch, config_file):
    lines = launch("benchmark", "training", f"--config={config_file(SMALL)}", "--repeats=2").splitlines()
    result = json.loads(lines[-1])
    assert len(lines) == 1 and result["note"].startswith("on CPU") and result["tokens_per_sample"] == 6
    for kind in ("action", "lora", "full"):
        step = result[kind]
        assert 0 < step["p50_ms"] <= step["p95_ms"] and step["compile_s"] > 0 and step["mfu"] is None
        assert 0 < step["attention_share_of_flops"] < 1
        assert step["tokens_per_second"] == pytest.approx(8 * 6 * step["steps_per_second"], rel=0.05)


@pytest.mark.slow
def test_more_draws_have_less_variance(launch, config_file):
    arguments = ("--draws=1,8", "--keys=16", "--repeats=2")
    result = json.loads(launch("benchmark", "draws", f"--config={config_file(SMALL)}", *arguments))
    one, eight = result["draws"]
    assert (one["draws"], one["variance_ratio"], one["time_ratio"], eight["draws"]) == (1, 1, 1, 8)
    assert 0 < eight["variance"] < one["variance"] and result["data"] == result["parameters"] == "random"


def test_an_unknown_benchmark(launch):
    assert "there is no benchmark 'trainin'; expected training, draws, policy or cold_start" in launch("benchmark", "trainin")
