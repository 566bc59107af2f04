import json

from mimic_video.training.metrics import MetricWriter, read_metrics


def write(run, start, steps, loss):
    writer = MetricWriter(run, start)
    for step in steps:
        writer.write(step, {"loss": loss, "rate": 0.5})
    writer.close()


def losses(run):
    return {record["step"]: record["loss"] for record in read_metrics(run)}


def test_records(tmp_path):
    run = tmp_path / "runs" / "one"
    assert read_metrics(run) == []
    write(run, 0, [10, 20], 1.5)
    assert read_metrics(run) == [{"step": 10, "loss": 1.5, "rate": 0.5}, {"step": 20, "loss": 1.5, "rate": 0.5}]
    assert any((run / "tensorboard").iterdir())


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(10, {"loss": 1.0})
    assert losses(tmp_path) == {10: 1.0}
    writer.close()


def test_steps_that_a_resumed_run_repeats_are_dropped(tmp_path):
    write(tmp_path, 0, [10, 20, 30, 40], 1.0)
    write(tmp_path, 20, [], 2.0)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0}
    write(tmp_path, 20, [30, 40, 50], 2.0)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0, 30: 2.0, 40: 2.0, 50: 2.0}
    write(tmp_path, 0, [10], 3.0)
    assert losses(tmp_path) == {10: 3.0}


def test_a_line_that_a_kill_cut_short_is_ignored(tmp_path):
    write(tmp_path, 0, [10, 20], 1.0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for half in ('{"step": 30, "lo', '{"step": 30, "loss": 1.0}', "{"):  # the second only lacks its newline
        path.write_text(whole + half)
        assert losses(tmp_path) == {10: 1.0, 20: 1.0}
    write(tmp_path, 20, [30], 2.0)
    assert losses(tmp_path) == {10: 1.0, 20: 1.0, 30: 2.0}
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
