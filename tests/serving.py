"""A policy server in a thread of the test, and a policy whose plans show everything that it was given."""

import asyncio
import contextlib
import dataclasses
import threading
import time
import zlib

import numpy as np
from websockets.sync.client import connect
from websockets.sync.server import serve

from mimic_video.policy.observations import PolicyLayout
from mimic_video.policy.server import PolicyServer, ServerOptions
from mimic_video_client import PolicyClient
from mimic_video_client.protocol import pack, unpack

LAYOUT = PolicyLayout(
    embodiment="arm",
    cameras=("primary",),
    image_size=(8, 16),
    past_frames=5,
    video_hz=10.0,
    proprio_dim=3,
    action_dim=5,
    action_horizon=4,
    control_hz=10.0,
    execute_steps=2,
)


class Recorder:
    """Plans from all of its input: a robot's chunk has the first pixel of each frame, its state, instruction and query."""

    def __init__(self):
        self.batches = []  # robots of each call
        self.instructions = []  # of each call
        self.gate = threading.Event()  # calls wait for it
        self.gate.set()
        self.busy = False
        self.failure = None  # what is raised for an instruction of "fail"

    def __call__(self, images, proprio, instructions, query):
        self.busy = True
        assert self.gate.wait(60)
        self.busy = False
        self.batches.append(len(proprio))
        self.instructions.append(list(instructions))
        if "fail" in instructions and self.failure is not None:
            raise self.failure
        actions = np.zeros((len(proprio), LAYOUT.action_horizon, LAYOUT.action_dim), np.float32)
        actions[:, 0] = images["primary"][:, :, 0, 0, 0]
        actions[:, 1, :3] = proprio
        actions[:, 2, 0] = [checksum(instruction) for instruction in instructions]
        actions[:, 3, 0] = query
        return actions


def checksum(instruction):
    return zlib.crc32(instruction.encode()) % 2**20


def observation(value=7, state=(1, 2, 3), **fields):
    """What one robot sees: a picture of one value."""
    image = np.full((*LAYOUT.image_size, 3), value, np.uint8)
    return {"images": {"primary": image}, "state": np.array(state, np.float32), **fields}


@dataclasses.dataclass
class Running:
    """A server that runs in another thread."""

    server: PolicyServer
    loop: asyncio.AbstractEventLoop

    @property
    def address(self):
        return f"127.0.0.1:{self.server.port}"

    def client(self, **options):
        return PolicyClient(f"ws://{self.address}", **{"wait": 60.0, "timeout": 60.0, **options})

    def raw(self):
        """A connection whose metadata have been read."""
        connection = connect(f"ws://{self.address}", compression=None).__enter__()
        connection.recv(60)
        return connection

    def drain(self):
        """A future that is done once the server has drained."""
        return asyncio.run_coroutine_threadsafe(self.server.drain(), self.loop)


@contextlib.contextmanager
def serving(plan, layout=LAYOUT, address=None, log=None, **options):
    ready, running, problem = threading.Event(), [], []

    async def run():
        stop = asyncio.Event()
        async with PolicyServer(plan, layout, ServerOptions(**{"port": 0, **options}), address, log) as server:
            running.extend([Running(server, asyncio.get_running_loop()), stop])
            ready.set()
            await stop.wait()

    def target():
        try:
            asyncio.run(run())
        except BaseException as error:
            problem.append(error)
            ready.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    assert ready.wait(60)
    if problem:
        raise problem[0]
    server, stop = running
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()
    if problem:
        raise problem[0]


class OtherServer:
    """One that speaks as openpi's does, or another protocol; it answers with actions to what has a state."""

    def __init__(self, metadata, answer=None):
        self.metadata, self.received = metadata, []
        self.answer = {"actions": np.zeros((2, 3))} if answer is None else answer

    def __enter__(self):
        def handle(connection):
            connection.send(pack(self.metadata))
            for message in connection:
                self.received.append(unpack(message))
                known = "state" in self.received[-1]
                connection.send(pack(self.answer) if known else "Traceback (most recent call last):\nKeyError")

        self._server = serve(handle, "127.0.0.1", 0)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def __exit__(self, *_):
        self._server.shutdown()


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.005)
