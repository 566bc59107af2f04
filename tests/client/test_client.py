import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from serving import Recorder, observation, serving
from websockets.sync.server import serve

from mimic_video_client import ConnectionLost, PolicyClient, ProtocolError, RequestRefused, ServerUnavailable
from mimic_video_client.protocol import pack, unpack

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


def test_an_address_that_is_none():
    with pytest.raises(ServerUnavailable, match=r"'localhost:80' is not a server's address; expected ws://HOST:PORT"):
        PolicyClient("localhost:80")


def test_an_end_of_the_connection_is_told():
    with serving(Recorder()) as running:
        client = running.client()
        client.infer(observation(prompt="a"))
    with pytest.raises(ConnectionLost, match="the policy server shuts down"):
        client.infer(observation())
    client.close()
    client.close()


def test_what_cannot_be_sent_is_said_before_it_is_sent():
    with serving(Recorder()) as running, running.client() as client:
        with pytest.raises(ProtocolError, match=r"cannot be sent: .*object"):
            client.infer({"state": object()})
        client.infer(observation(prompt="a"))


class OtherServer:
    """One that speaks as openpi's does, or another protocol."""

    def __init__(self, metadata):
        self.metadata, self.received = metadata, []

    def __enter__(self):
        def handle(connection):
            connection.send(pack(self.metadata))
            for message in connection:
                self.received.append(unpack(message))
                known = "state" in self.received[-1]
                connection.send(pack({"actions": np.zeros((2, 3))}) if known else "Traceback (most recent call last):\nKeyError")

        self._server = serve(handle, "127.0.0.1", 0)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def __exit__(self, *_):
        self._server.shutdown()


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
