import concurrent.futures
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import msgpack
import numpy as np
import pytest
import tiny
from recordings import read, series
from serving import LAYOUT, Recorder, checksum, observation, serving, wait_until
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from mimic_video.config import ConfigError
from mimic_video.embodiments import Embodiment
from mimic_video.policy.observations import PolicyLayout
from mimic_video.policy.policy import Policy
from mimic_video.policy.server import ServerOptions, bind
from mimic_video.rerun_log import RerunLog
from mimic_video.transforms import compute_statistics
from mimic_video_client import PolicyClient, PolicyTimeout, RequestRefused, ServerUnavailable
from mimic_video_client.protocol import ERROR_KINDS, pack, parse_error, unpack


def plan_of(value, state, instruction, frames=None):
    """What the recorder answers, without the last row, which counts calls."""
    rows = np.zeros((3, LAYOUT.action_dim), np.float32)
    rows[0], rows[1, :3], rows[2, 0] = frames or value, state, checksum(instruction)
    return rows


def get(running, path):
    with urllib.request.urlopen(f"http://{running.address}{path}", timeout=60) as response:
        return response.read().decode()


def metric(running, name):
    lines = [line.rsplit(" ", 1) for line in get(running, "/metrics").splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in lines}.get(f"mimic_video_{name}", 0.0)


def test_a_client_learns_the_layout_and_gets_plans():
    with serving(Recorder()) as running, running.client() as client:
        assert client.metadata["protocol"] == 1 and client.metadata["action"] == {
            "horizon": 4,
            "dim": 5,
            "dtype": "float32",
            "two_valued": [],
        }
        assert client.metadata["images"]["cameras"] == ["primary"] and client.metadata["control_hz"] == 10.0
        answer = client.infer(observation(7, prompt="open", timestamp=0.0))
        np.testing.assert_array_equal(answer["actions"][:3], plan_of(7, (1, 2, 3), "open"))
        client.observe(observation(8, timestamp=0.1))
        answer = client.infer(observation(9, timestamp=0.2))
        np.testing.assert_array_equal(answer["actions"][:3], plan_of(9, (1, 2, 3), "open", [7, 7, 7, 8, 9]))
        assert answer["history_frames"] == 3 and answer["server_timing"]["infer_ms"] > 0
        client.reset()
        with pytest.raises(RequestRefused, match="bad_request: field 'prompt' is missing"):
            client.infer(observation())


def test_health_and_metrics_are_plain_http():
    with serving(Recorder(), batch_sizes=(2, 1)) as running, running.client() as client:
        assert get(running, "/healthz") == "ok\n"
        for index in range(3):
            client.infer(observation(prompt="a", timestamp=float(index)))
        with pytest.raises(RequestRefused):
            client.infer({})
        expected = {
            "requests_total": 4,
            "answers_total": 3,
            'errors_total{kind="bad_request"}': 1,
            "connections": 1,
            "latency_seconds_count": 3,
            'batch_robots_bucket{le="1.0"}': 3,
            "queue_depth": 0,
        }
        assert {name: metric(running, name) for name in expected} == expected


def test_several_robots_of_one_connection_are_planned_in_one_call_with_their_query():
    recorder = Recorder()
    with serving(recorder, batch_sizes=(1, 4)) as running, running.client() as client:
        images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((3, *LAYOUT.image_size, 3), np.uint8)
        message = {"images": images, "state": np.ones((3, 3)), "prompt": ["a", "b", "c"], "robots": 3, "query": 11}
        actions = client.infer(message)["actions"]
    assert actions.shape == (3, 4, 5) and (actions[:, 3, 0] == 11).all()
    assert actions[:, 0, 0].tolist() == [0, 1, 2] and actions[:, 2, 0].tolist() == [checksum(name) for name in "abc"]
    assert recorder.batches == [1, 4, 4]  # compiled for each size, then filled up


@pytest.mark.parametrize("header", ["Bearer secret", "Api-Key secret"])
def test_the_token_of_either_client_is_taken(header):
    with serving(Recorder(), token="secret") as running:
        with connect(f"ws://{running.address}", additional_headers={"Authorization": header}) as connection:
            assert unpack(connection.recv())["protocol"] == 1
        with running.client(token="secret") as client:
            client.infer(observation(prompt="a"))


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secret\u00e9"])
def test_without_the_token_nobody_comes_in(header):
    with serving(Recorder(), token="secret") as running:
        headers = {} if header is None else {"Authorization": header}
        with pytest.raises(InvalidStatus, match="401"), connect(f"ws://{running.address}", additional_headers=headers):
            pass
        with pytest.raises(ServerUnavailable, match="401 expected the header 'Authorization: Bearer TOKEN'"):
            running.client(token="wrong")
        assert get(running, "/healthz") == "ok\n" and metric(running, 'errors_total{kind="unauthorised"}') == 2


def test_what_waits_together_is_computed_together():
    recorder = Recorder()
    with serving(recorder, batch_sizes=(1, 2, 4)) as running, concurrent.futures.ThreadPoolExecutor(7) as pool:
        clients = [running.client() for _ in range(7)]
        recorder.gate.clear()
        first = pool.submit(clients[0].infer, observation(prompt="first"))
        wait_until(lambda: recorder.busy)
        others = [pool.submit(client.infer, observation(prompt="other")) for client in clients[1:]]
        wait_until(lambda: metric(running, "queue_depth") == 6)
        recorder.gate.set()
        queries = [future.result()["query"] for future in (first, *others)]
        for client in clients:
            client.close()
    assert recorder.batches == [1, 2, 4, 1, 4, 2] and sorted(queries) == [0, 1, 1, 1, 1, 2, 2]


def test_a_full_queue_refuses_and_goes_on():
    recorder = Recorder()
    with serving(recorder, batch_sizes=(1,), max_queue=1) as running, concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [running.client() for _ in range(3)]
        recorder.gate.clear()
        first = pool.submit(clients[0].infer, observation(prompt="a"))
        wait_until(lambda: recorder.busy)
        second = pool.submit(clients[1].infer, observation(prompt="a"))
        wait_until(lambda: metric(running, "queue_depth") == 1)
        with pytest.raises(RequestRefused, match="overloaded: 1 requests wait already"):
            clients[2].infer(observation(prompt="a"))
        recorder.gate.set()
        first.result(), second.result()
        clients[2].infer(observation(prompt="a", timestamp=time.monotonic() + 1))
        for client in clients:
            client.close()


def test_what_is_too_late_is_not_computed():
    recorder = Recorder()
    with (
        serving(recorder, batch_sizes=(1,)) as running,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        running.client() as slow,
        running.client() as late,
    ):
        recorder.gate.clear()
        first = pool.submit(slow.infer, observation(prompt="a"))
        wait_until(lambda: recorder.busy)
        second = pool.submit(late.infer, observation(prompt="b", deadline=0.05))
        wait_until(lambda: metric(running, "queue_depth") == 1)
        time.sleep(0.06)
        recorder.gate.set()
        first.result()
        with pytest.raises(RequestRefused, match=r"expired: the request waited 0\.\d+ s; its deadline was 0\.05 s") as caught:
            second.result()
        assert caught.value.kind == "expired" and recorder.instructions == [[""], ["a"]]
        late.infer(observation(prompt="b", timestamp=time.monotonic() + 1))


def test_a_client_that_has_gone_is_not_computed_for():
    recorder = Recorder()
    with serving(recorder, batch_sizes=(1,)) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with running.client() as stays:
            recorder.gate.clear()
            first = pool.submit(stays.infer, observation(prompt="a"))
            wait_until(lambda: recorder.busy)
            leaves = running.raw()
            leaves.send(pack(observation(prompt="gone")))
            wait_until(lambda: metric(running, "queue_depth") == 1)
            leaves.socket.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: metric(running, "queue_depth") == 0)
            recorder.gate.set()
            first.result()
            stays.infer(observation(prompt="c", timestamp=time.monotonic() + 1))
        assert recorder.instructions == [[""], ["a"], ["c"]]


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (ConfigError("instruction 'fail' has too many words"), "bad_request: instruction 'fail' has too many words"),
        (ZeroDivisionError("no"), "internal: the policy failed: ZeroDivisionError: no"),
    ],
)
def test_a_failure_reaches_only_who_caused_it(failure, complaint):
    recorder = Recorder()
    recorder.failure = failure
    with serving(recorder, batch_sizes=(1, 2)) as running, concurrent.futures.ThreadPoolExecutor(3) as pool:
        clients = [running.client() for _ in range(3)]
        recorder.gate.clear()
        futures = [pool.submit(clients[0].infer, observation(prompt="a"))]
        wait_until(lambda: recorder.busy)
        for client, instruction in zip(clients[1:], ("fail", "b"), strict=True):
            futures.append(pool.submit(client.infer, observation(prompt=instruction)))
        wait_until(lambda: metric(running, "queue_depth") == 2)
        recorder.gate.set()
        assert futures[0].result()["actions"][2, 0] == checksum("a") and futures[2].result()["actions"][2, 0] == checksum("b")
        with pytest.raises(RequestRefused, match=complaint):
            futures[1].result()
        assert recorder.batches[-3:] == [2, 1, 1]
        for client in clients:
            client.close()


def test_actions_that_are_not_finite_are_not_sent():
    def plan(images, proprio, instructions, query):
        return np.full((len(proprio), LAYOUT.action_horizon, LAYOUT.action_dim), np.nan if query else 0.0)

    with serving(plan, batch_sizes=(1,)) as running, running.client() as client:
        with pytest.raises(RequestRefused, match=r"internal: .*are not finite"):
            client.infer(observation(prompt="a", query=1))
        assert client.infer(observation(query=0, timestamp=time.monotonic() + 1))["actions"].shape == (4, 5)


def test_a_drain_answers_what_was_taken_and_refuses_the_rest():
    recorder = Recorder()
    with (
        serving(recorder, batch_sizes=(1,)) as running,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        running.client() as busy,
        running.client() as queued,
        running.client() as late,
    ):
        recorder.gate.clear()
        taken = [pool.submit(busy.infer, observation(prompt="a"))]
        wait_until(lambda: recorder.busy)
        taken.append(pool.submit(queued.infer, observation(prompt="b")))
        wait_until(lambda: metric(running, "queue_depth") == 1)
        drained = running.drain()
        with pytest.raises(RequestRefused, match="draining: the policy server is shutting down and takes no new requests"):
            late.infer(observation(prompt="c"))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(running, "/healthz")
        with pytest.raises(ServerUnavailable, match="503 the policy server is shutting down"):
            running.client(wait=0.0)
        assert not drained.done()
        recorder.gate.set()
        assert [checksum(name) for name in "ab"] == [future.result()["actions"][2, 0] for future in taken]
        drained.result(60)


def test_too_many_connections_are_refused():
    refused = pytest.raises(ServerUnavailable, match="503 the policy server has 1 connections already")
    with serving(Recorder(), max_connections=1) as running, running.client(), refused:
        running.client(wait=0.0)


def test_32_clients_with_histories_of_their_own():
    """Every answer is of its own connection's frames, state and instruction, in whatever batch it was computed."""
    recorder, steps = Recorder(), 12

    def drive(index):
        random_steps, values = np.random.default_rng(index), []
        with running.client() as client:
            for step in range(steps):
                value = int(random_steps.integers(256))
                values.append(value)
                state, instruction = random_steps.standard_normal(3).astype(np.float32), f"{index} {step // 5}"
                answer = client.infer(observation(value, state, prompt=instruction, timestamp=0.1 * step))
                frames = ([values[0]] * 4 + values)[-5:]
                np.testing.assert_array_equal(answer["actions"][:3], plan_of(value, state, instruction, frames))

    with serving(recorder) as running, concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(drive, range(32)))
        wait_until(lambda: metric(running, "connections") == 0)
    assert max(recorder.batches[4:]) > 1  # they did share batches


def corrupted(generator, valid):
    """A valid message with something wrong: a field, its bytes, its size or all of it."""
    kind = generator.randrange(6)
    if kind == 0:
        return generator.randbytes(generator.randrange(200))
    if kind == 1:
        data = bytearray(pack(valid))
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(min(len(data), 120))] = generator.randrange(256)
        return bytes(data)
    if kind == 2:
        data = pack(valid)
        return data[: generator.randrange(len(data))]
    if kind == 3:
        name = generator.choice(("state", "prompt", "images", "timestamp", "deadline", "query", "robots", "reset", "plan"))
        values = [
            None,
            -1,
            2**63,
            1e308,
            float("nan"),
            "",
            "a" * 5000,
            [],
            {},
            [[[]]],
            b"raw",
            True,
            np.zeros((3, 3, 3, 3)),
            np.zeros(3, bool),
            np.zeros((0, 3)),
            np.full(3, np.inf),
            np.uint8(3),
        ]
        return pack(valid | {name: generator.choice(values)})
    if kind == 4:
        shape = [generator.choice([-1, 0, 3, 2**31, 2**63 - 1]) for _ in range(generator.randrange(12))]
        dtype = generator.choice(["|O", "<f4", "<f8", "|V8", "M8"])
        array = {b"__ndarray__": True, b"data": generator.randbytes(24), b"dtype": dtype, b"shape": shape}
        return msgpack.packb({"state": array})
    return generator.choice(["text", "{}", bytes(300_000), msgpack.packb([[]] * 1000), b"\xdf\xff\xff\xff\xff", b"\x91" * 5000])


def test_a_thousand_malformed_messages_each_get_an_error_or_a_right_answer():
    """And none of them reaches the client beside, whose plans stay right."""
    generator, outcomes = random.Random(0), {"error": 0, "answer": 0, "closed": 0}
    with serving(Recorder(), max_message_bytes=200_000) as running, running.client() as beside:
        connection = None
        for number in range(1000):
            if connection is None:
                connection = running.raw()
            message = corrupted(generator, observation(prompt="a"))
            try:
                connection.send(message)
                reply = connection.recv(60)
            except ConnectionClosedError as closed:
                assert len(message) > 200_000 and "1009" in str(closed) and "200000 bytes" in str(closed)
                outcomes["closed"] += 1
                connection = None
            else:
                if isinstance(reply, str):
                    kind, complaint = parse_error(reply)
                    assert kind == "bad_request" and kind in ERROR_KINDS and len(complaint) > 10
                else:
                    assert {"actions", "reset", "history_frames"} & set(unpack(reply))
                outcomes["error" if isinstance(reply, str) else "answer"] += 1
            if number % 50 == 0:
                plan = beside.infer(observation(5, prompt="beside", timestamp=float(number)))["actions"]
                np.testing.assert_array_equal(plan[:3], plan_of(5, (1, 2, 3), "beside"))
        connection.close()
        assert outcomes["error"] > 700 and outcomes["closed"] > 10
        assert metric(running, 'errors_total{kind="too_large"}') == outcomes["closed"]
        wait_until(lambda: metric(running, "connections") == 1)


def test_bytes_that_are_not_even_http():
    with serving(Recorder()) as running:
        for garbage in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", os.urandom(5000)):
            with socket.create_connection(("127.0.0.1", running.server.port)) as raw:
                raw.sendall(garbage)
        with running.client() as client:
            client.infer(observation(prompt="a"))


def test_a_slow_reader_and_abrupt_ends_hold_up_nobody(monkeypatch):
    """One sends and never reads, until it is cut off; others vanish in the middle of a message."""
    monkeypatch.setattr("mimic_video.policy.server._SEND_SECONDS", 1.0)

    def plan(images, proprio, instructions, query):
        return np.zeros((len(proprio), 250_000, 1), np.float32)  # answers of a megabyte, which no socket buffers for long

    layout = PolicyLayout(**{**vars(LAYOUT), "action_horizon": 250_000, "action_dim": 1})
    with serving(plan, layout, batch_sizes=(1,)) as running:
        slow = socket.create_connection(("127.0.0.1", running.server.port))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(
            b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )

        def frame(data):
            return b"\x82\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data  # masked with zeros

        for index in range(30):
            slow.sendall(frame(pack(observation(prompt="a", timestamp=float(index)))))
        for _ in range(10):
            vanishing = running.raw()
            vanishing.socket.sendall(frame(bytes(1000))[:500])
            vanishing.socket.shutdown(socket.SHUT_RDWR)
        with running.client() as client:
            assert client.infer(observation(prompt="a"))["actions"].shape == (250_000, 1)
        wait_until(lambda: metric(running, 'errors_total{kind="slow_reader"}') == 1)
        wait_until(lambda: metric(running, "connections") == 0)
        slow.close()


def test_a_client_does_not_take_a_late_answer_for_the_next():
    recorder = Recorder()
    with serving(recorder, batch_sizes=(1,)) as running:
        client = running.client()
        recorder.gate.clear()
        with pytest.raises(PolicyTimeout, match=r"did not answer within 0\.1 s; the connection is closed"):
            client.infer(observation(prompt="a"), timeout=0.1)
        recorder.gate.set()
        with pytest.raises(ConnectionError, match="closed"):
            client.infer(observation(prompt="b"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0, 1)}, "batch_sizes"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"deadline": -1.0}, "deadline is -1"),
        ({"episode_gap": float("nan")}, "episode_gap is nan; expected a positive number"),
        ({"token": "secret\n"}, "token has spaces around it"),
        ({"token": "sécret"}, "token has .* other characters than printable ASCII"),
        ({"port": 65536}, "port is 65536; expected 0 to 65535"),
        ({"client": "openpi"}, "client is 'openpi'; expected one of openpi_libero, openpi_droid, openpi_aloha"),
    ],
)
def test_options_that_cannot_be(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ServerOptions(**options)


def test_an_address_that_is_taken_is_told_before_the_policy_is_compiled():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, recorder = taken.getsockname()[1], Recorder()
        told = pytest.raises(
            ValueError, match=f"port {port} of '127.0.0.1' cannot be listened at: .*in use; expected a free port"
        )
        with told, serving(recorder, port=port):
            pass
    assert recorder.batches == []


@pytest.mark.parametrize("host", ["192.0.2.1", "." * 70, "::g"])
def test_hosts_that_are_not_this_machine(host):
    with pytest.raises(ValueError, match=f"port 8000 of '{re.escape(host)}' cannot be listened at: "):
        bind(ServerOptions(host=host))


def test_while_the_policy_is_compiled_clients_are_refused_and_another_may_take_the_port():
    """Refused, since openpi's clients try again then, but give up where nobody answers."""
    first = bind(ServerOptions(port=0))
    port = first.getsockname()[1]
    with pytest.raises(ServerUnavailable, match="refused"):
        PolicyClient(f"ws://127.0.0.1:{port}", wait=0.0)
    told = pytest.raises(ValueError, match=f"port {port} .* cannot be listened at: .*in use")
    with serving(Recorder(), port=port), told, serving(Recorder(), port=port, address=first):
        pass
    assert first.fileno() == -1


@pytest.fixture(scope="module")
def policy():
    config = tiny.experiment()
    random_values = np.random.default_rng(0)
    statistics = {
        "action": compute_statistics(random_values.normal([5, -3], [0.1, 2.0], (200, 4, 2))),
        "proprio": compute_statistics(random_values.normal(1.0, 2.0, (200, 1, 3))),
    }
    return Policy(config, tiny.params(config), Embodiment("arm", 0, statistics, {"action": (), "proprio": ()}))


def test_a_real_policy_plans_the_same_through_the_server(policy):
    """Bit for bit with the query's noise at the batch's own size; up to rounding where the batch is filled up."""
    random_values, layout = np.random.default_rng(1), PolicyLayout.of(policy)
    images = random_values.integers(0, 256, (2, 5, *tiny.SIZE, 3), np.uint8)
    proprio, instructions = random_values.standard_normal((2, 3)).astype(np.float32), ["open", "close"]
    expected = policy(images, proprio, instructions, query=3)
    message = {"images": images, "state": proprio, "prompt": instructions, "robots": 2, "query": 3}
    with serving(policy, layout, batch_sizes=(2,)) as running, running.client() as client:
        np.testing.assert_array_equal(client.infer(message)["actions"], expected)
        # Frame by frame, of one robot, in a batch that is filled up.
        for step in range(5):
            answer = client.infer(
                {
                    "images": images[0, step],
                    "state": proprio[0],
                    "prompt": "open",
                    "query": 3,
                    "timestamp": step / layout.video_hz,
                    "reset": step == 0,
                }
            )
    np.testing.assert_allclose(answer["actions"], expected[0], rtol=1e-4, atol=1e-4)


def test_32_clients_of_a_real_policy(policy):
    """With the published noise, which is the same at every query, a plan is that of the observation alone."""
    layout, batches = PolicyLayout.of(policy), 8
    images = np.random.default_rng(2).integers(0, 256, (32, 5, *tiny.SIZE, 3), np.uint8)
    proprio = np.random.default_rng(3).standard_normal((32, 3)).astype(np.float32)
    noise_free = Policy(tiny.experiment(policy={"noise_stream": "numpy"}), policy.params, policy.embodiment)
    # The noise is that of the robot's row in its batch, so that each robot has as many right plans as the batch has rows.
    right = np.stack(
        [
            noise_free(np.repeat(images[i : i + 1], batches, 0), np.repeat(proprio[i : i + 1], batches, 0), ["do it"] * batches)
            for i in range(32)
        ]
    )

    def drive(index):
        with running.client() as client:
            for step in range(5):
                client.observe({"images": images[index, step], "timestamp": step / 10, "prompt": "do it"})
            answer = client.infer({"images": images[index], "state": proprio[index]})
            return np.abs(right - answer["actions"]).max(axis=(2, 3))

    with serving(noise_free, layout, batch_sizes=(batches,)) as running, concurrent.futures.ThreadPoolExecutor(32) as pool:
        distances = list(pool.map(drive, range(32)))
    assert [distance.min(axis=1).argmin() for distance in distances] == list(range(32))
    assert max(distance.min() for distance in distances) < 1e-3


SERVER = """
import asyncio, signal, sys
sys.path[:0] = ["tests"]
from serving import LAYOUT, Recorder
from mimic_video.policy.server import PolicyServer, ServerOptions

async def run():
    async with PolicyServer(Recorder(), LAYOUT, ServerOptions(port=0, batch_sizes=(1,))) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()

asyncio.run(run())
"""


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.processes
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of a process from Linux's /proc")
def test_memory_does_not_grow_with_requests_connections_and_garbage():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        address = f"ws://127.0.0.1:{process.stdout.readline().strip()}"
        generator, sizes = random.Random(1), []
        image = np.zeros((240, 320, 3), np.uint8)
        for _round in range(4):
            for _ in range(20):
                with connect(address, compression=None) as connection:
                    connection.recv()
                    for _ in range(25):
                        connection.send(corrupted(generator, observation(prompt="a")))
                        connection.recv()
                        connection.send(pack(observation(prompt=f"a {generator.random()}") | {"images": image}))
                        connection.recv()
            sizes.append(resident_bytes(process.pid))
        assert sizes[-1] - sizes[0] < 32 * 2**20, [size // 2**20 for size in sizes]  # the images since then are 350 MB
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.reference
def test_openpis_client():
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    with serving(Recorder(), token="secret") as running:
        client = WebsocketClientPolicy("127.0.0.1", running.server.port, api_key="secret")
        assert client.get_server_metadata()["action"]["horizon"] == 4
        seen = {"observation/image": observation()["images"]["primary"], "observation/state": np.ones(3), "prompt": "a"}
        np.testing.assert_array_equal(client.infer(seen)["actions"][:3], plan_of(7, (1, 1, 1), "a"))
        with pytest.raises(RuntimeError, match=r"bad_request: field 'state' has shape \(2,\); expected \(3,\)"):
            client.infer(seen | {"observation/state": np.ones(2)})
        assert client.infer(seen)["history_frames"] >= 1
        assert client.infer({"reset": True}) == {"reset": True}
        client._ws.close()


@pytest.mark.reference
def test_openpis_chunk_broker():
    """As in its ALOHA example: one request a chunk, whose actions it gives one by one; the prompt is the server's."""
    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    with serving(Recorder(), client="openpi_aloha", prompt="a") as running:
        client = WebsocketClientPolicy("127.0.0.1", running.server.port)
        broker = ActionChunkBroker(client, action_horizon=3)
        for episode in (1, 2):
            picture = np.full((3, *LAYOUT.image_size), episode, np.uint8)
            seen = {"state": np.ones(3), "images": {"cam_high": picture, "cam_low": picture}, "timestamp": 2.0 * episode}
            actions = [broker.infer(seen)["actions"] for _ in range(3)]
            np.testing.assert_array_equal(actions, plan_of(episode, (1, 1, 1), "a"))  # no frame of the last episode
            broker.reset()
        client._ws.close()


def test_threads_end_with_the_server():
    before = threading.active_count()
    with serving(Recorder()) as running, running.client() as client:
        client.infer(observation(prompt="a"))
    wait_until(lambda: threading.active_count() <= before)


@pytest.mark.reference
def test_answers_in_a_recording_of_rerun(tmp_path):
    """Of every connection and robot: what was seen last, the chunk, the times."""
    plan, answers = Recorder(), []
    with RerunLog(str(tmp_path / "a.rrd"), "test") as log, serving(plan, log=log) as server:
        for value in (10, 30):
            with server.client() as client:
                for step in range(3):
                    answers.append(client.infer(observation(value + step, (value, 2, 3), prompt=f"do {value}")))
    found = read(tmp_path / "a.rrd")
    assert {name.split("/")[0] for name in found} == {"connection_0", "connection_1"}
    for number, value in enumerate((10, 30)):
        place, own = f"connection_{number}/robot_0", answers[3 * number : 3 * number + 3]
        times, states = series(found[f"{place}/proprio"])
        assert states.tolist() == [[value, 2, 3]] * 3 and (np.diff(times) > 0).all()
        images = [values["image"].mean() for _, values in found[f"{place}/camera/primary"]]
        np.testing.assert_allclose(images, [value, value + 1, value + 2], atol=1)
        assert [values["text"] for _, values in found[f"{place}/instruction"]] == [[f"do {value}"]] * 3
        for turn in range(2):  # chunks of four actions, two of which are executed; the client asks sooner
            _, values = series(found[f"{place}/plans/{turn}"])
            assert sorted(values.tolist()) == sorted(np.concatenate([answer["actions"] for answer in own[turn::2]]).tolist())
        _, latency = series(found[f"{place}/latency_ms"])
        expected = [[answer["server_timing"][f"{name}_ms"] for name in ("queue", "infer", "total")] for answer in own]
        np.testing.assert_allclose(latency, expected)
