"""What the runs of a sweep say, whole and half-finished, in a folder and in a bucket."""

import json
import math

import pytest
from buckets import emulated_bucket
from etils import epath
from sweep_runs import STEPS, evaluate, kill, sweep, train

from mimic_video.evaluation import sweep_results
from mimic_video.evaluation.rollouts import wilson_interval
from mimic_video.evaluation.sweep_results import (
    Entry,
    Metrics,
    chosen_metric,
    higher_is_better,
    load_entries,
    number,
    ranked,
    require_metric,
    result,
    results,
)
from mimic_video.runs.directory import locked, write_json
from mimic_video.runs.status import reported
from mimic_video.runs.storage import RunError, run_path
from mimic_video.training.preemption import PreemptedError


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as url:
        yield run_path(url)


@pytest.fixture(params=["folder", "bucket"])
def workdir(request, tmp_path):
    return epath.Path(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket") / request.node.name


def entry(name="a"):
    return Entry(name, {"seed": 0}, name, name)


def test_a_point_says_what_its_files_do(workdir):
    run = workdir / "a"
    train(run, [0.4, 0.2, 0.1, 0.3], grad_norm=2.0)
    evaluate(run, 6)
    status = json.loads((run / "status.json").read_text())
    status["training"] |= {"seconds": 5400.0, "from_a_later_version": 1}
    write_json(run / "status.json", status)
    found = result(workdir, entry())
    assert (found.step, found.training.steps, found.last, found.best) == (40, STEPS, 0.3, 0.1)
    assert found.metrics.training == ((10, 0.5), (20, 0.25), (30, 5 / 30), (40, 0.125))
    assert (found.success.successes, found.success.episodes, found.success.rate) == (6, 8, 0.75)
    assert found.success.interval == wilson_interval(6, 8)
    assert (found.hours, found.state, found.reason) == (1.5, "evaluated", "")
    assert found.training.state == found.evaluation.state == "finished"


def test_runs_that_wait_run_or_ended_early_say_so(workdir):
    names = ["waiting", "running", "stopped", "failed", "killed", "trained", "evaluating", "not evaluated", "evaluation killed"]
    runs = {name: workdir / name for name in names}
    train(runs["stopped"], [0.4], PreemptedError("stopped after step 10 of it, as asked"))
    train(runs["failed"], [0.4, 0.3], ValueError("loss is nan"))
    for name in ("killed", "trained", "evaluating", "not evaluated", "evaluation killed"):
        train(runs[name], [0.4, 0.3, 0.2, 0.1])
    kill(runs["killed"])
    kill(runs["evaluation killed"], "evaluation")
    with pytest.raises(RunError), reported(runs["not evaluated"], "evaluation"):
        raise RunError("no checkpoint")
    write_json(runs["evaluating"] / "evaluation.json", {})  # of an earlier one
    status = {"training": {"state": "finished"}, "evaluation": {"state": "running"}}
    with locked(runs["running"]), locked(runs["evaluating"], "evaluation.lock"):
        with reported(runs["running"], "training", STEPS):
            text = (runs["running"] / "status.json").read_text()
        (runs["running"] / "status.json").write_text(text)
        write_json(runs["evaluating"] / "status.json", status)
        found = {point.entry.name: point for point in results(workdir, [entry(name) for name in names])}
    states = {name: point.state for name, point in found.items()}
    same = ("waiting", "running", "stopped", "failed", "killed", "trained", "evaluating", "evaluation killed")
    assert states == {name: name for name in same} | {"not evaluated": "evaluation failed"}
    reasons = {name: point.reason for name, point in found.items() if point.reason}
    ended = "it ended without a word: killed, out of memory, or its machine went"
    assert reasons == {
        "stopped": "stopped after step 10 of it, as asked",
        "failed": "ValueError: loss is nan",
        "killed": ended,
        "evaluation killed": ended,
        "not evaluated": "no checkpoint",
    }
    assert {name: (point.step, point.best) for name, point in found.items() if name in ("waiting", "running", "failed")} == {
        "waiting": (0, None),
        "running": (0, None),
        "failed": (20, 0.3),
    }


ZEROS = "\0" * 40


@pytest.mark.parametrize(
    ("file", "content", "lost", "warning"),
    [
        ("status.json", ZEROS, {"training", "evaluation"}, "status.json is damaged"),
        ("status.json", '{"training": 5}', {"training", "evaluation"}, None),
        ("evaluation.json", ZEROS, {"evaluated"}, "evaluation.json is damaged and left out"),
        ("evaluation.json", '{"success": {"overall"', {"evaluated"}, "evaluation.json is damaged and left out"),
        ("evaluation.json", "[1]", {"evaluated"}, "evaluation.json is damaged and left out: it is no JSON object"),
        ("metrics.jsonl", ZEROS + "\n", {"metrics"}, "1 of 1 lines are no records and are left out"),
    ],
    ids=["status zeros", "status odd", "evaluation zeros", "evaluation cut", "evaluation odd", "metrics zeros"],
)
def test_a_damaged_file_is_left_out_with_a_warning(workdir, caplog, file, content, lost, warning):
    run = workdir / "a"
    train(run, [0.4, 0.2])
    evaluate(run, 6)
    whole = result(workdir, entry())
    (run / file).write_text(content)
    found = result(workdir, entry())
    names = ("training", "evaluation", "metrics", "evaluated")
    assert {name for name in names if getattr(found, name) != getattr(whole, name)} == lost
    if warning:
        assert warning in caplog.text
    else:
        assert "status.json cannot be read: AttributeError" in found.reason
    assert (found.metrics == Metrics()) == ("metrics" in lost) and (found.evaluated == {}) == ("evaluated" in lost)


def test_records_that_hold_other_things_than_numbers_do_no_harm(tmp_path):
    workdir, run = epath.Path(tmp_path), epath.Path(tmp_path) / "a"
    train(run, [0.4, 0.2])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "validation_action_mse": NaN, "action_mse": null, "loss": "low"}\n{"step": 40, "val')
    evaluate(run, 6, success={"overall": {"successes": None, "episodes": "8"}}, psnr=[], note="x")
    found = result(workdir, entry())
    assert (found.step, found.best, math.isnan(found.last), found.success) == (30, 0.2, True, None)
    assert number(found, "loss") == 2.5 and number(found, "psnr") is None
    assert number(found, "validation_action_mse") is None  # NaN is no number that others could be compared with


def test_a_file_that_cannot_be_read_is_left_out_with_a_warning(tmp_path, caplog):
    train(epath.Path(tmp_path) / "a", [0.4])
    (tmp_path / "a" / "evaluation.json").mkdir()
    assert result(epath.Path(tmp_path), entry()).evaluated == {}
    assert "evaluation.json cannot be read and is left out: IsADirectoryError" in caplog.text


def test_only_what_has_changed_is_read_again(workdir, monkeypatch):
    reads = []
    for name in ("_metrics", "_evaluated"):
        read = getattr(sweep_results, name)
        monkeypatch.setattr(sweep_results, name, lambda path, read=read: reads.append(path.name) or read(path))
    train(workdir / "a", [0.4])
    evaluate(workdir / "a", 3)
    first = result(workdir, entry())
    assert result(workdir, entry()) == first and sorted(reads) == ["evaluation.json", "metrics.jsonl"]
    train(workdir / "a", [0.4, 0.2])
    assert result(workdir, entry()).best == 0.2 and sorted(reads) == ["evaluation.json", "metrics.jsonl", "metrics.jsonl"]


def test_metrics_are_found_in_either_file(tmp_path):
    workdir = epath.Path(tmp_path)
    train(workdir / "a", [0.4, 0.2, 0.3], goodput=0.9)
    evaluate(workdir / "a", 6)
    found = result(workdir, entry())
    values = {
        "success": 0.75,
        "success.drawer-open-v3.rate": 0.75,
        "validation": 0.2,
        "validation_action_mse": 0.3,
        "goodput": 0.9,
        "open_loop.rmse": 0.5,
        "open_loop.rmse_per_step": 0.5,
        "policy.stop_step": None,
        "open_loop.example.recorded": None,
    }
    assert {name: number(found, name) for name in values} == pytest.approx(values)


def test_a_video_run_has_errors_and_psnr(tmp_path):
    workdir = epath.Path(tmp_path)
    train(workdir / "a", [0.4, 0.2], stage="video")
    write_json(workdir / "a" / "evaluation.json", {"checkpoint_step": 20, "psnr": [20.0, 25.0], "samples": ["go"]})
    found = result(workdir, entry())
    assert (found.best, number(found, "psnr"), found.success) == (0.2, 22.5, None)
    assert found.metrics.training == ((10, 0.5), (20, 0.25))


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        (None, "bcade"),  # success; d has failed, e waits
        ("success", "bcade"),
        ("validation", "acbde"),  # the lowest
        ("validation_action_mse", "cabde"),  # the newest
        ("open_loop.rmse", "cbade"),
        ("samples_per_second", "dacbe"),
        ("no such metric", "abcde"),
    ],
)
def test_points_are_sorted_by_each_kind_of_metric(tmp_path, metric, order):
    workdir = epath.Path(tmp_path)
    made = {"a": ([0.1, 0.4], 3, 0.9, 7.0), "b": ([0.5, 0.6], 8, 0.5, 5.0), "c": ([0.2, 0.3], 5, 0.2, 6.0)}
    for name, (validation, successes, rmse, speed) in made.items():
        train(workdir / name, validation, samples_per_second=speed)
        evaluate(workdir / name, successes, open_loop={"rmse": rmse})
    train(workdir / "d", [0.9], ValueError(), samples_per_second=9.0)
    found = results(workdir, [entry(name) for name in "abcde"])
    assert "".join(point.entry.name for point in ranked(found, chosen_metric(found, metric))) == order


def test_what_is_better_follows_from_the_name():
    higher = ["success", "success.drawer-open-v3.rate", "psnr", "goodput", "mfu", "tokens_per_second"]
    lower = ["validation", "validation_video_mse/sigma_0.5", "loss", "open_loop.rmse", "step_seconds", "validation_action_mse"]
    assert [name for name in higher + lower if higher_is_better(name)] == higher


def test_a_metric_that_no_point_has_is_a_mistake_once_one_is_evaluated(tmp_path, caplog):
    workdir = epath.Path(tmp_path)
    train(workdir / "a", [0.4, 0.2])
    require_metric([result(workdir, entry())], "open_loop.rmse")
    assert "no point of the sweep has the metric 'open_loop.rmse' so far" in caplog.text
    evaluate(workdir / "a", 3)
    found = [result(workdir, entry())]
    for known in ("open_loop.rmse", "success", "validation", "loss"):
        require_metric(found, known)
    with pytest.raises(RunError, match=r"no point of the sweep has the metric 'open_lop.rmse'; did you mean 'open_loop.rmse'\?"):
        require_metric(found, "open_lop.rmse")


def test_without_success_validation_is_the_metric(tmp_path):
    assert chosen_metric([], None) == "validation"
    train(epath.Path(tmp_path) / "a", [0.4])
    assert chosen_metric([result(epath.Path(tmp_path), entry())], None) == "validation"


def test_points_of_the_same_folder_are_kept(workdir):
    first = sweep(workdir, [{"train.learning_rate": 0.1}])
    second = sweep(workdir, [{"seed": 1, "data.image_size": [64, 64]}])
    assert load_entries(workdir) == [*first, *second]


@pytest.mark.parametrize("content", [None, ZEROS, "[1]", '[{"name": "a"}]'], ids=["none", "zeros", "odd", "incomplete"])
def test_a_folder_without_a_sweep_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    message = "has no sweep.json: no sweep was started there" if content is None else "sweep.json is damaged: "
    with pytest.raises(RunError, match=message):
        load_entries(epath.Path(tmp_path))
