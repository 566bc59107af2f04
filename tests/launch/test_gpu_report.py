import json

import pytest


@pytest.mark.processes
def test_the_report_runs_without_a_gpu(launch, tmp_path):
    """One line of JSON for all that was found, in the file too; a part that fails says why and is the only one."""
    out, parts = tmp_path / "report.jsonl", "device,attention,forms,golden"
    printed = launch("gpu_report", "--small", f"--parts={parts}", "--seconds=600", f"--out={out}")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert lines == [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["part"] for line in lines if "seconds" in line] == parts.split(",")
    assert not [line for line in lines if "error" in line]
    found = {part: dict(item for line in lines if line["part"] == part for item in line.items()) for part in parts.split(",")}
    assert found["device"]["devices"] == "8 x cpu" and found["device"]["product_tflops"] > 0
    errors = found["attention"]["errors_of_output_and_gradients"]
    assert len(errors) == 5 and all(0 < error < 0.02 for case in errors.values() for each in case.values() for error in each)
    assert (found["forms"]["passed"], found["forms"]["failed"], found["golden"]["exit_code"]) == (2, [], 0)


def test_parts_that_there_are_not(launch):
    assert "error: --parts has speed; expected some of device, attention" in launch("gpu_report", "--parts=speed")
    assert '"error": "stopped after 1 s"' in launch("gpu_report", "--parts=device", "--seconds=1", "--small")
    assert "JAX finds no GPU here; --small shows on a CPU" in launch("gpu_report", "--parts=golden")
