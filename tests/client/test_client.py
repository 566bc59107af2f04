import importlib.util
import logging
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from serving import OtherServer, Recorder, observation, serving

from mimic_video_client import ConnectionLost, PolicyClient, ProtocolError, RequestRefused, ServerUnavailable

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_the_client_needs_no_jax():
    code = (
        "import sys, mimic_video_client, mimic_video_client.robot_loop\n"
        "heavy = {'jax', 'flax', 'mimic_video', 'ml_collections', 'absl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_client_waits_for_its_server():
    port = free_port()
    with pytest.raises(ServerUnavailable, match=f"no policy server at ws://127.0.0.1:{port} within 0.1 s"):
        PolicyClient(f"ws://127.0.0.1:{port}", wait=0.1)
    results = []
    waiting = threading.Thread(target=lambda: results.append(PolicyClient(f"ws://127.0.0.1:{port}", wait=60.0)))
    waiting.start()
    time.sleep(0.2)
    with serving(Recorder(), port=port):
        waiting.join(60)
        assert results[0].metadata["protocol"] == 1
        results[0].close()


@pytest.mark.parametrize("address", ["localhost:80", "http://localhost:80", "ws://localhost:eighty", "ws://localhost:99999"])
def test_an_address_that_is_none(address):
    with pytest.raises(ServerUnavailable, match=f"'{address}' is not a server's address; expected ws://HOST:PORT"):
        PolicyClient(address, wait=0.0)


class HttpProxy:
    """Lets connections through, one after another, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __enter__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __exit__(self, *_):
        self._listening.close()

    def _serve(self):
        client, _ = self._listening.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(4096)
        self.asked.append(request.split(b"\r\n")[0].decode())
        host, port = self.asked[-1].split()[1].split(":")
        server = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    @staticmethod
    def _pump(source, target):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxies_of_the_environment(monkeypatch):
    """Proxies that are not there."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "socks_proxy", "ws_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_the_environments_proxies_are_not_for_robots(proxies_of_the_environment):
    with serving(Recorder()) as running, running.client() as client:
        client.infer(observation(prompt="a"))
    with pytest.raises(ServerUnavailable, match="within 0 s, without the environment's proxies for http, https, socks, ws: "):
        running.client(wait=0.0)


def test_a_proxy_that_is_given_is_used():
    proxy = HttpProxy()
    with serving(Recorder()) as running, proxy as address, running.client(proxy=address) as client:
        client.infer(observation(prompt="a"))
        assert proxy.asked == [f"CONNECT {running.address} HTTP/1.1"]


@pytest.mark.parametrize(
    ("proxy", "complaint"),
    [
        ("http://127.0.0.1:9", "no policy server at ws://robot:8000 within 0 s through the proxy http://127.0.0.1:9: .*refused"),
        ("proxy.lab:3128", "'proxy.lab:3128' is not a proxy; expected http://HOST:PORT or socks5h://HOST:PORT"),
        ("http://user:secret@proxy:port", "^'proxy:port' is not a proxy"),
        ("http://user@proxy:3128", "^'proxy:3128' is not a proxy"),
        pytest.param(
            "socks5h://127.0.0.1:9",
            "through the proxy socks5h://127.0.0.1:9: SOCKS needs the package python-socks",
            marks=pytest.mark.skipif(bool(importlib.util.find_spec("python_socks")), reason="python-socks is there"),
        ),
    ],
)
def test_proxies_that_cannot_be_used(proxy, complaint):
    with pytest.raises(ServerUnavailable, match=complaint):
        PolicyClient("ws://robot:8000", wait=0.0, proxy=proxy)


def test_an_end_of_the_connection_is_told():
    with serving(Recorder()) as running:
        client = running.client()
        client.infer(observation(prompt="a"))
    with pytest.raises(ConnectionLost, match="the policy server shuts down"):
        client.infer(observation())
    client.close()
    client.close()


@pytest.mark.parametrize("token", ["secret\n", "sécret", "секрет"])
def test_tokens_that_no_header_can_have(token):
    with pytest.raises(
        ServerUnavailable, match="the token has characters that no header can have; expected printable ASCII"
    ) as caught:
        PolicyClient("ws://127.0.0.1:9", token)
    assert token not in str(caught.value)


def test_what_cannot_be_sent_is_said_before_it_is_sent():
    with serving(Recorder()) as running, running.client() as client:
        with pytest.raises(ProtocolError, match=r"field 'state': this value cannot be sent: .* is a object; expected"):
            client.infer({"state": object()})
        client.infer(observation(prompt="a"))


def test_what_is_too_large_is_said_before_it_is_sent():
    with serving(Recorder(), max_message_bytes=5000) as running, running.client() as client:
        with pytest.raises(ProtocolError, match=r"the observation has 3\d{4} bytes; the server takes 5000 \(max_message_mb\)"):
            client.infer({"images": np.zeros((100, 100, 3), np.uint8)})
        client.infer(observation(prompt="a"))


def test_chunks_may_be_written_to():
    with serving(Recorder()) as running, running.client() as client:
        actions = client.infer(observation(prompt="a"))["actions"]
    actions *= 2
    assert actions[0].tolist() == [14] * 5


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next(monkeypatch):
    """As after Ctrl-C in a notebook."""

    def interrupted(timeout):
        raise KeyboardInterrupt

    with serving(Recorder()) as running, running.client() as client:
        monkeypatch.setattr(client._connection, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.infer(observation(prompt="a"))
        with pytest.raises(ConnectionLost, match="is closed"):
            client.infer(observation(prompt="b"))


def test_what_the_server_warns_of_is_logged(caplog):
    with serving(Recorder()) as running, running.client() as client, caplog.at_level(logging.WARNING, "mimic_video_client"):
        for index in range(3):
            client.infer(observation(prompt="a", timestamp=index * 0.4))
    told = [record.message for record in caplog.records if record.name == "mimic_video_client.client"]
    assert told == [
        "the policy server warns: frames come every 0.400 s; the policy was trained on 10 a second: send those in between, too, "
        "with 'plan': false, or the past 5 at once"
    ]


def test_a_server_of_openpis():
    other = OtherServer({"policy": "pi0"})
    with other as uri, PolicyClient(uri) as client:
        assert client.metadata == {"policy": "pi0"}
        client.reset()
        client.observe({"state": np.zeros(3)})
        assert client.infer({"state": np.zeros(3)})["actions"].shape == (2, 3)
        with pytest.raises(RequestRefused, match="internal: Traceback"):
            client.infer({"other": 1})
    assert len(other.received) == 2


def test_a_server_of_another_protocol():
    with OtherServer({"protocol": 99}) as uri, pytest.raises(ProtocolError, match="speaks protocol 99; this client speaks 1"):
        PolicyClient(uri)


def test_another_server_without_actions():
    with OtherServer({"policy": "pi0"}, {"action": 1}) as uri, PolicyClient(uri) as client:
        with pytest.raises(ProtocolError, match=r"the server answers with \['action'\]; expected an array 'actions' among them"):
            client.infer({"state": np.zeros(3)})
        with pytest.raises(
            ProtocolError, match=r"tells \['policy'\] of its policy; expected \['video_hz'\], as a server of mimic"
        ):
            client.told("policy", "video_hz")
    expected = pytest.raises(ProtocolError, match=r"answers with \['actions'\]; expected an array 'actions' among them")
    with OtherServer({"policy": "pi0"}, {"actions": [[1.0, 2.0]]}) as uri, PolicyClient(uri) as client, expected:
        client.infer({"state": np.zeros(3)})
