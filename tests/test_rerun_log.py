"""Recordings of Rerun: what is logged is what its own reader finds."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from recordings import read, series

from mimic_video.errors import ConfigError
from mimic_video.rerun_log import RerunLog, opened

TIMES = np.array([0.0, 0.25, 0.5])


def smooth(count, seed=0):
    """Pictures that JPEG keeps but for a few levels."""
    values = np.random.default_rng(seed).integers(40, 200, (count, 1, 1, 3), np.uint8)
    return np.broadcast_to(values, (count, 16, 32, 3)).copy()


@pytest.mark.parametrize("target", ["log.txt", "connected", "rrd", ""])
def test_other_targets_are_refused(target):
    with pytest.raises(ConfigError, match=f"--rerun is '{target}'; expected FILE.rrd, connect or connect:HOST:PORT"):
        RerunLog(target, "test")


def test_without_a_flag_nothing_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with opened(None, "test") as log:
        assert log is None
    for target in ("a.rrd", "connect"):
        with (
            pytest.raises(ConfigError, match=re.escape(f"--rerun={target} needs the package rerun-sdk; expected after pip")),
            opened(target, "test"),
        ):
            pass


@pytest.mark.reference
def test_an_episode_is_read_back(tmp_path):
    random, cameras = np.random.default_rng(1), {"primary": smooth(3), "wrist": smooth(3, seed=1)}
    proprio, actions = random.standard_normal((3, 4)), random.standard_normal((2, 2)).astype(np.float32)
    with RerunLog(str(tmp_path / "new" / "a.rrd"), "test") as log:
        log.episode("task/7", TIMES, cameras, proprio, actions, ["open it", "open it", "close it"])
        log.episode("task/8", TIMES, {}, None, None, ["wait"])
    found = read(tmp_path / "new" / "a.rrd")
    parts = ("actions", "camera/primary", "camera/wrist", "instruction", "proprio")
    assert set(found) == {*(f"task/7/{part}" for part in parts), "task/8/instruction"}
    for name, expected, times in (("proprio", proprio, TIMES), ("actions", actions, TIMES[:2])):
        at, values = series(found[f"task/7/{name}"])
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_allclose(at, times, atol=1e-9)
        assert found[f"task/7/{name}"][0][1]["names"] == [str(dim) for dim in range(expected.shape[1])]
    for camera, frames in cameras.items():
        rows = found[f"task/7/camera/{camera}"]
        np.testing.assert_allclose([time for time, _ in rows], TIMES, atol=1e-9)
        for (_, values), frame in zip(rows, frames, strict=True):
            assert values["image"].shape == frame.shape
            assert abs(values["image"].astype(int) - frame).max() <= 4  # JPEG
    texts = [(time, values["text"]) for time, values in found["task/7/instruction"]]
    assert texts == [(0.0, ["open it"]), (0.5, ["close it"])]


@pytest.mark.reference
@pytest.mark.parametrize(("execute", "turns"), [(4, 1), (2, 2), (1, 4)])
def test_chunks_that_overlap_are_apart(tmp_path, execute, turns):
    chunks = np.random.default_rng(0).standard_normal((5, 4, 2)).astype(np.float32)
    with RerunLog(str(tmp_path / "a.rrd"), "test") as log:
        for number, chunk in enumerate(chunks):
            log.chunk("plans", number, chunk, number * execute / 10, 10.0, execute)
    found = read(tmp_path / "a.rrd")
    assert set(found) == {f"plans/{turn}" for turn in range(turns)}
    for turn in range(turns):
        times, values = series(found[f"plans/{turn}"])
        np.testing.assert_array_equal(values, np.concatenate(chunks[turn::turns]))
        assert (np.diff(times) > 0).all()  # no two at one time
        starts = np.arange(5)[turn::turns] * execute / 10
        np.testing.assert_allclose(times, (starts[:, None] + np.arange(4) / 10).ravel(), atol=1e-8)


@pytest.mark.reference
def test_an_answer_of_a_policy(tmp_path):
    actions, state = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32), np.array([1.0, 2.0, 3.0])
    with RerunLog(str(tmp_path / "a.rrd"), "test") as log:
        image = {"primary": smooth(1)[0]}
        log.plan("connection 0/robot", 0, 1.5, image, state, "open it", actions, 10.0, 4, {"queue": 2.5, "total": 40.0})
    found = {name.replace("\\", ""): rows for name, rows in read(tmp_path / "a.rrd").items()}
    at, values = series(found["connection 0/robot/latency_ms"])
    assert (at.tolist(), values.tolist()) == ([1.5], [[2.5, 40.0]])
    assert found["connection 0/robot/latency_ms"][0][1]["names"] == ["queue", "total"]
    at, values = series(found["connection 0/robot/plans/0"])
    np.testing.assert_array_equal(values, actions)
    np.testing.assert_allclose(at, [1.5, 1.6, 1.7, 1.8], atol=1e-8)
    assert series(found["connection 0/robot/proprio"])[1].tolist() == [[1.0, 2.0, 3.0]]
    assert found["connection 0/robot/instruction"] == [(1.5, {"text": ["open it"]})]


@pytest.mark.reference
def test_what_cannot_be_recorded_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--rerun=.*file/a\.rrd cannot be written: "):
        RerunLog(str(tmp_path / "file" / "a.rrd"), "test")
    with pytest.raises(ConfigError, match=r"--rerun=connect:127\.0\.0\.1:9: no viewer of Rerun listens at 127\.0\.0\.1:9 \("):
        RerunLog("connect:127.0.0.1:9", "test")
    with pytest.raises(ConfigError, match="it has no port"):
        RerunLog("connect:somewhere", "test")


@pytest.mark.reference
def test_a_viewer_gets_what_is_logged(tmp_path):
    """One without a window, which writes what it gets to a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rerun", f"--port={port}", "--save", str(tmp_path / "b.rrd")]
    with subprocess.Popen(command, env=os.environ | {"RERUN_ANALYTICS": "0"}) as viewer:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    log = RerunLog(f"connect:127.0.0.1:{port}", "test")
                    break
                except ConfigError:
                    assert time.monotonic() < deadline and viewer.poll() is None
                    time.sleep(0.05)
            with log:
                log.values("actions", np.array([[1.0, 2.0]]), np.array([0.5]))
            while not found_in(tmp_path / "b.rrd"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            viewer.send_signal(signal.SIGINT)
            viewer.wait(60)
    times, values = series(read(tmp_path / "b.rrd")["actions"])
    assert (times.tolist(), values.tolist()) == ([0.5], [[1.0, 2.0]])


def found_in(file):
    return file.exists() and b"actions" in file.read_bytes()
