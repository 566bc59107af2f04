import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
import tiny

from mimic_video.runs.directory import is_locked
from mimic_video.runs.status import read_status
from mimic_video.training.loop import train
from mimic_video.training.preemption import PreemptedError, preemption_notices


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_after_the_step_and_is_then_handled_as_before(number):
    before = signal.getsignal(number)
    with preemption_notices() as stop_after:
        assert not stop_after(1)
        os.kill(os.getpid(), number)
        assert stop_after(2)
        assert stop_after(3)
    assert signal.getsignal(number) is before


def test_a_second_sigterm_does_not_end_what_the_first_one_began():
    """Clouds send it more than once."""
    with preemption_notices() as stop_after:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_after(1)


SLEEP = """
import time
from mimic_video.training.preemption import preemption_notices
with preemption_notices() as stop_after:
    print("ready", flush=True)
    while not stop_after(0):
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def test_a_sigterm_before_the_first_step_ends_the_run_as_one_that_is_to_be_started_again(tmp_path):
    class Data(tiny.Data):
        def open(self, rows, tokenizer):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it goes on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="stopped before the first step, as asked; the same command starts again"):
        train(tiny.experiment(), tmp_path, Data(tiny.experiment(), iter))
    assert (read_status(tmp_path).state, signal.getsignal(signal.SIGTERM)) == ("stopped", before)
    assert not is_locked(tmp_path)


@pytest.mark.processes
def test_the_second_ctrl_c_kills():
    process = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE, text=True)
    try:
        for line in ("ready\n", "asked\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()


class MetadataServer(http.server.ThreadingHTTPServer):
    """Answers like Google Compute Engine's: at once unless the asker knows the current value, else when it changes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.values, self.version, self.changed = {"preempted": "FALSE", "maintenance-event": "NONE"}, 1, threading.Condition()
        self.failures, self.asked = 0, threading.Semaphore(0)

    def change(self, name, value):
        with self.changed:
            self.values[name], self.version = value, self.version + 1
            self.changed.notify_all()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url, server = urllib.parse.urlparse(self.path), self.server
        query, name = dict(urllib.parse.parse_qsl(url.query)), url.path.removeprefix("/computeMetadata/v1/instance/")
        server.asked.release()
        if server.failures:
            server.failures -= 1
            return self.send_error(503)
        if self.headers["Metadata-Flavor"] != "Google" or name not in server.values:
            return self.send_error(403)
        with server.changed:
            if query.get("wait_for_change") == "true" and query.get("last_etag") == str(server.version):
                server.changed.wait(timeout=min(float(query["timeout_sec"]), 5))
            body, version = server.values[name].encode(), str(server.version)
        self.send_response(200)
        self.send_header("ETag", version)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Not to the terminal."""


@pytest.fixture
def metadata_server(monkeypatch):
    with MetadataServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        yield server
        server.change("preempted", "FALSE")  # lets go of whoever is still waiting
        server.shutdown()


def becomes_true(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(("name", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")])
def test_what_google_announces_asks_to_stop(metadata_server, name, value):
    with preemption_notices() as stop_after:
        for _ in range(4):  # both values are known, and both threads wait for the next
            assert metadata_server.asked.acquire(timeout=10)
        metadata_server.change("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # goes on running elsewhere
        for _ in range(2):
            assert metadata_server.asked.acquire(timeout=10)
        assert not stop_after(1)
        metadata_server.change(name, value)
        assert becomes_true(lambda: stop_after(2))


def test_a_metadata_server_that_fails_is_asked_again(metadata_server, monkeypatch):
    monkeypatch.setattr("mimic_video.training.preemption._RETRY_SECONDS", 0.01)
    metadata_server.failures = 3
    with preemption_notices() as stop_after:
        metadata_server.change("preempted", "TRUE")
        assert becomes_true(lambda: stop_after(1))
