"""Runs in a bucket: what orbax, gcsfs and tensorstore write to a server that is none of ours."""

import concurrent.futures
import importlib.util
import itertools
import json
import os
import threading
import time

import jax
import orbax.checkpoint as ocp
import pytest
import tiny
from run_states import CONFIG, assert_equal_bits, saved, state_of

from mimic_video.runs import checkpoints, directory, storage
from mimic_video.runs.directory import read_metrics
from mimic_video.runs.status import read_status
from mimic_video.runs.storage import RunError, Spool, local_path, run_path
from mimic_video.training.metrics import MetricWriter


def test_what_is_neither_a_directory_nor_a_bucket_is_refused(tmp_path, monkeypatch):
    assert str(run_path(tmp_path / "run")) == str(tmp_path / "run")
    with pytest.raises(RunError, match=r"s3://bucket/run is no place for a run; expected a directory or gs://BUCKET/FOLDER"):
        run_path("s3://bucket/run")
    with pytest.raises(RunError, match="gs://bucket/policy is a URL; expected a directory on this machine"):
        local_path("gs://bucket/policy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"the package gcsfs is missing; expected after pip install 'mimic-video-jax\[gcs\]'"):
        run_path("gs://bucket/run")


def test_a_bucket_that_does_not_exist_is_found_out_at_the_start(bucket):
    with pytest.raises(RunError, match=r"gs://nowhere/run/lock cannot be written: "):
        directory.locked(run_path("gs://nowhere/run")).__enter__()


def test_a_run_in_a_bucket_keeps_others_out_until_it_ends_or_is_killed(bucket, monkeypatch):
    for name, seconds in {"_BEAT": 0.05, "_SILENCE": 1.5, "_SETTLING": 0.1}.items():
        monkeypatch.setattr(storage, name, seconds)
    run = bucket / "used"
    with directory.locked(run):
        with pytest.raises(RunError, match=rf'another run is using {run}: {{"host": .*"beats": \d+, "time": .*}}; stop it'):
            directory.locked(run).__enter__()
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    assert not (run / "lock").exists()
    (run / "lock").write_text("left by a killed process")
    with directory.locked(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


def test_what_is_written_anew_is_read_whole(bucket):
    """Of another length each time: who asks for the length first gets a part of what is there by then."""
    run, ending = bucket / "anew", threading.Event()

    def write():
        for number in itertools.count():
            if ending.is_set():
                return
            beat = {"time": time.time(), "padding": "x" * (number * 37 % 101)}
            (run / "lock").write_text(json.dumps(beat))
            (run / "status.json").write_text(json.dumps({"training": {"state": "running", "reason": beat["padding"]}}))

    (run / "lock").write_text(json.dumps({"time": time.time()}))
    (run / "status.json").write_text(json.dumps({"training": {"state": "running"}}))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            seen = {(storage.is_leased(run / "lock"), read_status(run).state) for _ in range(100)}
        finally:
            ending.set()
        writing.result()
    assert seen == {(True, "running")}


@pytest.mark.parametrize("content", ["left by a killed process", "[]", "{}", '{"time": null}'])
def test_a_lock_that_says_no_time_is_nobodys(bucket, content):
    (bucket / "odd" / "lock").write_text(content)
    assert not storage.is_leased(bucket / "odd" / "lock")


def test_of_two_runs_that_start_together_one_has_the_bucket(bucket, monkeypatch):
    for name, seconds in {"_SETTLING": 0.5, "_BEAT": 0.1, "_SILENCE": 2.0}.items():
        monkeypatch.setattr(storage, name, seconds)
    refused = threading.Event()

    def start(number):
        try:
            with storage.lease(bucket / "together", {"number": number}):
                refused.wait(60)  # else one that comes a little later would find it free
                return "has it"
        except RunError as error:
            refused.set()
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = sorted(pool.map(start, (1, 2)), key=len)
    assert ends[0] == "has it" and "another run is using gs://bucket" in ends[1]


def test_checkpoints_are_those_that_were_saved_and_damaged_ones_are_moved_aside(bucket, template, caplog):
    run, states = bucket / "checkpoints", [state_of(template, step) for step in (1, 2, 3)]
    saved(run, states, keep=2)
    with checkpoints.open_checkpoints(run, keep=2) as manager:
        assert manager.all_steps() == [2, 3]
        assert_equal_bits(checkpoints.restore(manager, states[0]), states[2])
    (run / "checkpoints" / "3" / "params" / "_METADATA").write_text("{")
    with checkpoints.open_checkpoints(run, keep=2) as manager:
        assert_equal_bits(checkpoints.restore(manager, states[0]), states[1])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "3.damaged"}
    assert "is moved to gs://bucket/checkpoints/checkpoints/3.damaged, and training continues from step 2" in caplog.text


def test_what_was_not_written_to_the_end_does_not_count(bucket, template):
    """A killed save leaves a folder without orbax's last file."""
    run, frozen = bucket / "killed", template[1]
    directory.write_config(run, CONFIG)
    checkpoints.save_frozen(run, frozen)
    saved(run, [state_of(template, 1), state_of(template, 2)])
    for item in (run / "frozen", run / "checkpoints" / "2"):
        (item / "commit_success.txt").unlink()
    with pytest.raises(RunError, match="has no frozen parameters"):
        checkpoints.load_params(run)
    checkpoints.save_frozen(run, jax.tree.map(lambda leaf: leaf + 1, frozen))
    assert checkpoints.load_params(run)[1] == 1
    assert_equal_bits(checkpoints.load_frozen(run, "stored"), jax.tree.map(lambda leaf: leaf + 1, frozen))


@pytest.mark.parametrize("place", ["bucket", "tmp_path"])
def test_what_was_not_written_to_the_end_is_gone_before_checkpoints_are_listed(request, place, template, monkeypatch):
    """A folder in a bucket vanishes with its last object: while others list it, they would fail."""
    run = run_path(request.getfixturevalue(place)) / "unfinished"
    saved(run, [state_of(template, 1)])
    folder, open_manager = run / "checkpoints", ocp.CheckpointManager.__init__
    if place == "bucket":
        (folder / "1" / "commit_success.txt").unlink()
    else:
        (folder / "1").rename(folder / "1.orbax-checkpoint-tmp-7")
    listed = []

    def looked_at(manager, directory, **arguments):
        listed.extend(directory.iterdir() if directory.exists() else ())
        open_manager(manager, directory, **arguments)

    monkeypatch.setattr(ocp.CheckpointManager, "__init__", looked_at)
    with checkpoints.open_checkpoints(run, keep=2) as manager:
        assert checkpoints.restore(manager, state_of(template, 1)) is None
    assert listed == []


def test_metrics_go_on_where_the_last_checkpoint_is(bucket):
    run, config = bucket / "metrics", tiny.experiment(stage="video")
    with MetricWriter(run, 0, config) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step})
        assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]  # as it goes
    with MetricWriter(run, 2, config) as writer:
        writer.write(3, {"loss": 7.0})
        local = writer.folder
    assert read_metrics(run) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]
    assert list((run / "tensorboard").iterdir()) and not local.exists()


def test_a_spool_copies_what_is_new(bucket):
    with Spool(bucket / "spool") as spool:
        (spool.path / "a").mkdir()
        (spool.path / "a" / "grows").write_text("1")
        (spool.path / "stays").write_text("1")
        spool.publish()
        (bucket / "spool" / "stays").write_text("not again")
        (spool.path / "a" / "grows").write_text("12")
    assert (bucket / "spool" / "a" / "grows").read_text() == "12"
    assert (bucket / "spool" / "stays").read_text() == "not again"


def test_a_spool_of_a_directory_is_that_directory(tmp_path):
    with Spool(tmp_path / "run") as spool:
        assert spool.path == tmp_path / "run"
        spool.path.mkdir()
    assert spool.path.exists()
