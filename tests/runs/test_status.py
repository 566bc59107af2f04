"""What runs say of themselves, on a file system and in a bucket."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest
from etils import epath

from mimic_video.config import ConfigError
from mimic_video.parallel import distributed
from mimic_video.runs import status, storage
from mimic_video.runs.directory import is_locked, locked
from mimic_video.runs.status import Status, read_status, record_end, reported


class Stop(Exception):
    pass


@pytest.fixture(params=["folder", "bucket"])
def run(request, tmp_path, monkeypatch):
    for name, seconds in {"_SILENCE": 0.2, "_SETTLING": 0.05, "_OUT_OF_DATE": 10.0, "_BEAT": 0.1}.items():
        monkeypatch.setattr(storage, name, seconds)
    monkeypatch.setattr(status, "_SECONDS", 0.0)
    return epath.Path(tmp_path if request.param == "folder" else request.getfixturevalue("bucket")) / "status" / "run"


def test_a_run_says_where_it_stands_until_it_ends(run):
    assert read_status(run) == Status("waiting")
    with locked(run), reported(run, "training", 10, (Stop,)) as progress:
        assert (read_status(run).state, read_status(run).step, read_status(run).steps) == ("running", 0, 10)
        progress(4)
        assert read_status(run).step == 4
    finished = read_status(run)
    assert (finished.state, finished.step, finished.starts, finished.pid, finished.reason) == ("finished", 4, 1, os.getpid(), "")
    with pytest.raises(Stop), locked(run), reported(run, "training", 10, (Stop,)) as progress:
        progress(7)
        raise Stop("stopped after step 7")
    stopped = read_status(run)
    assert (stopped.state, stopped.step, stopped.starts, stopped.reason) == ("stopped", 7, 2, "stopped after step 7")
    assert stopped.seconds >= finished.seconds


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConfigError("field 'a'\n is 3"), "field 'a' is 3"), (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0")],
)
def test_a_failure_has_its_reason_in_one_line(tmp_path, error, reason):
    with pytest.raises(type(error)), reported(tmp_path, "training", 10):
        raise error
    assert (read_status(tmp_path).state, read_status(tmp_path).reason) == ("failed", reason)


def test_training_and_evaluation_leave_each_other_alone(run):
    with locked(run), reported(run, "training", 3) as progress:
        progress(3)
    with locked(run, status.LOCKS["evaluation"]), reported(run, "evaluation"):
        assert read_status(run, "evaluation").state == "running"
    assert {read_status(run).state, read_status(run, "evaluation").state} == {"finished"}
    record_end(run, "evaluation", "failed", "no\nreason")
    assert (read_status(run).state, read_status(run, "evaluation").reason) == ("finished", "no reason")


def test_a_run_without_its_lock_was_killed(run):
    """In a bucket, once its lease is out of date."""
    with locked(run), reported(run, "training", 3) as progress:
        progress(2)
        running, held = (run / "status.json").read_text(), (run / "lock").read_text()
        assert read_status(run).state == "running" and is_locked(run)
    (run / "status.json").write_text(running)
    assert read_status(run).state == "killed" and "killed, out of memory" in read_status(run).reason
    if storage.in_bucket(run):
        (run / "lock").write_text(json.dumps(json.loads(held) | {"time": time.time()}))
        assert read_status(run).state == "running"
        (run / "lock").write_text(json.dumps(json.loads(held) | {"time": time.time() - 20}))
        assert read_status(run).state == "killed"


def test_looking_does_not_keep_a_run_from_starting(tmp_path):
    """The lock is looked at all the time, in another process, while it is taken again and again."""
    look = "import sys\nfrom mimic_video.runs.directory import is_locked\nprint(flush=True)\nwhile True: is_locked(sys.argv[1])"
    (tmp_path / "lock").touch()
    with subprocess.Popen([sys.executable, "-c", look, str(tmp_path)], stdout=subprocess.PIPE) as looking:
        try:
            looking.stdout.readline()
            for _ in range(300):
                with locked(epath.Path(tmp_path)):
                    pass
        finally:
            looking.kill()


@pytest.mark.parametrize(("silent", "state"), [(True, "killed"), (False, "failed")])
def test_the_failure_of_another_process_is_the_run_s(tmp_path, silent, state):
    with reported(tmp_path, "training", 10) as progress:
        progress(6)
        for last_words in distributed._LAST_WORDS:
            last_words("process 1 on b ...", silent)
        found = json.loads((tmp_path / "status.json").read_text())["training"]
        assert (found["state"], found["step"], found["reason"]) == (state, 6, "process 1 on b ...")
    assert not distributed._LAST_WORDS


@pytest.mark.parametrize(("silent", "state"), [(True, "killed"), (False, "failed")])
def test_an_error_that_another_process_causes_is_nothing_against_another_start_until_there_is_word(
    tmp_path, monkeypatch, silent, state
):
    """A host that is taken away is noticed in a collective operation, before it is missed."""
    monkeypatch.setattr(distributed.global_state, "num_processes", 2)
    monkeypatch.setattr(distributed, "_LAST_WORDS", words := [])
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), locked(tmp_path), reported(tmp_path, "training", 10):
        raise gone
    assert (read_status(tmp_path).state, len(words)) == ("killed", 1) and "closed by peer" in read_status(tmp_path).reason
    words[0]("process 1 on b ...", silent)
    assert (read_status(tmp_path).state, read_status(tmp_path).reason) == (state, "process 1 on b ...")
    with locked(tmp_path), reported(tmp_path, "training", 10):
        pass
    words[0]("process 1 on b ...", silent)
    assert read_status(tmp_path).state == "finished"


def test_a_status_that_cannot_be_read_does_not_keep_a_process_from_ending(tmp_path, monkeypatch, caplog):
    def broken(run):
        raise OSError("no network")

    with reported(tmp_path, "training", 10):
        monkeypatch.setattr(status, "_read", broken)
        for last_words in distributed._LAST_WORDS:
            last_words("process 1 on b ...", False)
    assert "status.json cannot be written: OSError('no network')" in caplog.text


@pytest.mark.parametrize("content", ["\0\0\0", "[]", '{"training": {"state": "finished", "step": 3, "of a later version": 1}}'])
def test_what_is_damaged_or_of_a_later_version_is_read_as_far_as_it_goes(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path).state == ("finished" if "finished" in content else "waiting")
