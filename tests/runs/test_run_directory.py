import dataclasses
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
from run_states import CONFIG

from mimic_video.config import ConfigError, to_dict
from mimic_video.runs import directory


def test_configuration_of_a_run(tmp_path):
    run = tmp_path / "runs" / "one"
    with pytest.raises(directory.RunError, match=r"one is not a run directory: it has no config\.json"):
        directory.read_config(run)
    directory.write_config(run, CONFIG)
    assert directory.read_config(run) == CONFIG
    directory.write_config(run, CONFIG)
    for damage in ("", "\0" * 99):  # of a power cut
        (run / "config.json").write_text(damage)
        with pytest.raises(directory.RunError, match=r"config\.json is damaged \(.*\); put back a copy, or remove it"):
            directory.write_config(run, CONFIG)


def test_what_a_run_may_not_change_is_listed(tmp_path):
    directory.write_config(tmp_path, CONFIG)
    changed = tiny.experiment(seed=3, train={"learning_rate": 0.5}, data={"video_hz": 5.0}, mesh={"fsdp": 2})
    with pytest.raises(ConfigError) as error:
        directory.write_config(tmp_path, changed)
    for difference in ("seed: 0 → 3", "train.learning_rate: 0.001 → 0.5", "data.video_hz: 10.0 → 5.0", str(tmp_path)):
        assert difference in str(error.value)
    assert "mesh" not in str(error.value) and "train.steps" not in str(error.value)
    assert directory.read_config(tmp_path) == CONFIG


@pytest.fixture
def process_0(monkeypatch):
    """process_0(what it published): this process is another one, and finds that."""

    def publish(value):
        monkeypatch.setattr(directory.jax, "process_count", lambda: 2)
        monkeypatch.setattr(directory, "of_process_0", lambda what, own: json.dumps(value))
        monkeypatch.setattr(directory, "wait_for_all", lambda what: None)

    return publish


def test_a_process_of_another_run_names_what_differs(process_0, tmp_path):
    process_0({"run": str(tmp_path / "a"), "config": to_dict(CONFIG)})
    directory.require_one_run(tmp_path / "a", CONFIG)
    own = {"workers": 2, "frame_cache_mb": 0, "action_dataset": "/scratch/here", "root": "/scratch"}
    directory.require_one_run(tmp_path / "a", tiny.experiment(data=own, text={"cache": "/scratch/text"}))
    other = tiny.experiment(train={"steps": 9}, data=own | {"skip_broken": True})
    with pytest.raises(ConfigError) as error:
        directory.require_one_run(tmp_path / "b", other)
    assert str(error.value) == (
        f"this process and process 0 were started for different runs: the run directory is {tmp_path}/b, there {tmp_path}/a; "
        "config field 'data.skip_broken' is True, there False; config field 'train.steps' is 9, there 4"
    )


def test_a_process_with_other_data_names_what_differs(process_0):
    state = {"next_step": 0, "phases": [[0, [1.0]]], "datasets": {"a": {"windows": 9, "content": "x"}}}
    process_0(state)
    directory.require_one_data(lambda step: state)
    with pytest.raises(directory.RunError, match=r"read different data \(datasets.a.windows: 8, there 9\)"):
        directory.require_one_data(lambda step: state | {"datasets": {"a": {"windows": 8, "content": "x"}}})


def test_what_a_run_may_change_is_recorded(tmp_path):
    directory.write_config(tmp_path, CONFIG)
    changed = tiny.experiment(
        train={"log_every": 7, "checkpoint_every": 9, "keep_checkpoints": 1},
        mesh={"fsdp": 2},
        policy={"stop_step": 2},
        evaluation={"max_steps": 9},
        data={"workers": 2, "frame_cache_mb": 0, "action_dataset": "moved", "latents": "moved", "skip_broken": True},
        backbone_run="moved",
    )
    directory.write_config(tmp_path, changed)
    assert directory.read_config(tmp_path) == changed


def test_a_changed_model_is_refused_by_name(tmp_path):
    directory.write_config(tmp_path, CONFIG)
    other = tiny.experiment(backbone={"width": 32, "hidden_block": 2}, decoder={"time_rank": 4}, data={"action_horizon": 8})
    with pytest.raises(ConfigError) as error:
        directory.write_config(tmp_path, other)
    changes = "data.action_horizon: 4 → 8; backbone.width: 16 → 32; backbone.hidden_block: 1 → 2; decoder.time_rank: 8 → 4"
    assert f"({changes}); use another --workdir" in str(error.value)


def with_steps(run, steps, **settings):
    """Records a configuration with these settings of `train`; what the run is refused for, else None."""
    try:
        directory.write_config(run, tiny.experiment(train={"steps": steps} | settings))
    except ConfigError as error:
        return str(error)


def test_a_constant_rate_allows_more_steps_and_fewer_but_not_fewer_than_are_done(tmp_path):
    assert with_steps(tmp_path, 4) is None and with_steps(tmp_path, 8) is None
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7.damaged").mkdir()
    assert with_steps(tmp_path, 6) is None
    assert "(train.steps: 6 → 5, of which 6 are done)" in with_steps(tmp_path, 5)
    assert directory.read_config(tmp_path).train.steps == 6


@pytest.mark.parametrize("schedule", [{"schedule": "linear"}, {"schedule": "cosine"}, {"schedule": "wsd", "decay_steps": 2}])
def test_a_rate_that_falls_has_to_end_where_it_did(tmp_path, schedule):
    assert with_steps(tmp_path, 4, **schedule) is None
    refused = with_steps(tmp_path, 8, **schedule)
    assert "train.schedule_steps: 0 → 0, with train.steps: 4 → 8" in refused
    assert f"that is {schedule['schedule']!r} and ends at step 4 needs train.schedule_steps=4" in refused
    assert "needs train.schedule_steps=4" in with_steps(tmp_path, 8, schedule_steps=6, **schedule)
    assert with_steps(tmp_path, 8, schedule_steps=4, **schedule) is None
    assert with_steps(tmp_path, 16, schedule_steps=4, **schedule) is None
    assert "needs train.schedule_steps=4" in with_steps(tmp_path, 16, **schedule)
    assert "train.schedule: " in with_steps(tmp_path, 16)


def test_weights_of_another_model(tmp_path):
    other = tiny.experiment(backbone={"width": 32, "num_blocks": 3}, text={"rows": 9}, decoder={"width": 32}, seed=4)
    directory.require_same_model(CONFIG, other, tmp_path, "window", "tokenizer")
    with pytest.raises(ConfigError) as error:
        directory.require_same_model(CONFIG, other, tmp_path, "backbone")
    for name, now, there in (("backbone.width", 32, 16), ("backbone.num_blocks", 3, 2), ("text.rows", 9, 4)):
        assert f"'{name}' is {now}, there {there}" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "decoder" not in str(error.value) and "seed" not in str(error.value)
    same = dataclasses.replace(CONFIG, seed=9, train=dataclasses.replace(CONFIG.train, steps=99))
    directory.require_same_model(CONFIG, same, tmp_path, "window", "tokenizer", "backbone", "decoder")


def test_a_second_run_on_a_directory_ends_at_once_and_names_the_first(tmp_path):
    run = tmp_path / "runs" / "one"
    with directory.locked(run):
        with pytest.raises(directory.RunError) as error, directory.locked(run):
            pytest.fail("two runs on one directory")
        assert f"process {os.getpid()} on {socket.gethostname()} has been training in {run} since 20" in str(error.value)
    assert (run / "lock").read_text() == ""
    with directory.locked(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


HOLD = """
import sys, time
from pathlib import Path
from mimic_video.runs.directory import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.processes
def test_a_killed_run_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(directory.RunError, match=f"process {holder.pid} on"), directory.locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    with directory.locked(tmp_path):
        pass


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)  # no such file system can be mounted in a test
    with caplog.at_level("WARNING", logger="absl"), directory.locked(tmp_path):
        assert f"{tmp_path} is on a file system without locks" in caplog.text


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    run = tmp_path / "file" / "run"
    run.parent.touch()
    with pytest.raises(directory.RunError, match="file/run cannot be written: "), directory.locked(run):
        pass
