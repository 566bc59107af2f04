import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

ROOT = pathlib.Path(__file__).parents[2]

SMALL = tiny.experiment(backbone={"num_blocks": 1}, decoder={"num_blocks": 1}, mesh={"fsdp": 2})


@pytest.mark.training
def test_training_of_every_kind_in_one_line(launch, config_file):
    lines = launch("benchmark", "training", f"--config={config_file(SMALL)}", "--repeats=2").splitlines()
    result = json.loads(lines[-1])
    assert len(lines) == 1 and result["note"].startswith("on CPU") and result["tokens_per_sample"] == 6
    for kind in ("action", "lora", "full"):
        step = result[kind]
        assert 0 < step["p50_ms"] <= step["p95_ms"] and step["compile_s"] > 0 and step["mfu"] is None
        assert 0 < step["attention_share_of_flops"] < 1
        assert step["tokens_per_second"] == pytest.approx(8 * 6 * step["steps_per_second"], rel=0.05)


@pytest.mark.training
def test_more_draws_have_less_variance(launch, config_file):
    arguments = ("--draws=1,8", "--keys=16", "--repeats=2")
    result = json.loads(launch("benchmark", "draws", f"--config={config_file(SMALL)}", *arguments))
    one, eight = result["draws"]
    assert (one["draws"], one["variance_ratio"], one["time_ratio"], eight["draws"]) == (1, 1, 1, 8)
    assert 0 < eight["variance"] < one["variance"] and result["data"] == result["parameters"] == "random"


@pytest.mark.processes
def test_a_server_of_two_batch_sizes(launch, config_file):
    """As many answers as robots asked for; a server of single robots has no larger batches."""
    arguments = (f"--config={config_file(SMALL)}", "--repeats=3", "--batch_size=1", "--batch_size=2")
    result = json.loads(launch("benchmark", "serving", *arguments))
    rows = {(row["largest_batch"], row["robots"]): row for row in result["serving"]}
    assert rows.keys() == {(size, robots) for size in (1, 2) for robots in (1, 2, 4)}
    for (size, robots), row in rows.items():
        assert 1 <= row["mean_batch"] <= min(size, robots) and 0 < row["p50_ms"] <= row["p95_ms"]
        assert 0 < row["chunks_per_second"] <= 1e3 * robots / row["p50_ms"] * 2  # no robot has two chunks at a time


def test_an_unknown_benchmark(launch):
    assert "there is no benchmark 'trainin'; expected training, draws, policy, serving, cold_start" in launch(
        "benchmark", "trainin"
    )


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [("benchmark", "cold_start", "error: --policy is missing"), ("gpu_report", "--parts=speed", "error: --parts has speed")],
)
def test_what_reads_data_is_not_needed(script, argument, message):
    code = (
        "import runpy, sys\n"
        "for name in ('grain', 'tensorflow_datasets', 'tensorflow', 'data_pipelines', 'websockets', 'diffusers'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, 'launch'); sys.argv = ['launch/{script}.py', '{argument}']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert message in ended.stderr


@pytest.mark.reference
def test_a_policy_by_stages_and_beside_pytorch(launch, config_file):
    """Whose chunk is the same, so that the times are of the same work."""
    config = tiny.experiment(backbone={"num_heads": 1})  # diffusers' positions need heads of more than eight
    arguments = ("--image_size=32x32", "--batch_size=2", "--repeats=2", "--reference=torch")
    result = json.loads(launch("benchmark", "policy", f"--config={config_file(config)}", *arguments))
    assert result["image_size"] == [32, 32] and result["batch"] == 2 and result["note"].startswith("on CPU")
    stages = result["stages"]
    assert list(stages) == ["host", "noise", "encode", "video", "context", "steps", "unnormalize", "program", "call"]
    assert all(0 < stage["p50_ms"] <= stage["p95_ms"] <= stage["p99_ms"] for stage in stages.values())
    counted = sum(stages[name]["gflops"] for name in ("encode", "video", "context", "steps"))
    assert result["total_gflops"] == pytest.approx(counted, abs=0.002)
    assert result["torch"]["chunk_error_over_std"] < 1e-4
    assert all(result["torch"][kind]["p50_ms"] > 0 for kind in ("video", "recomputed", "cached"))
    error = launch("benchmark", "policy", f"--config={config_file(SMALL)}", "--image_size=large")
    assert "flag --image_size=large: expected HEIGHTxWIDTH in pixels, such as 480x640" in error
    error = launch("benchmark", "policy", f"--config={config_file(SMALL)}", "--batch_size=1", "--batch_size=2")
    assert "error: --batch_size is given 2 times; `policy` measures one" in error


def test_a_policy_that_does_not_start(launch, tmp_path):
    assert "--policy is missing" in launch("benchmark", "cold_start")
