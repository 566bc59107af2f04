"""A websocket server for one policy: many robots, one program; see `mimic_video_client.protocol` for what is spoken.

`/healthz` (200 while requests are taken, 503 while it drains) and `/metrics` (Prometheus) are plain HTTP on the same port.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import http
import itertools
import logging
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from mimic_video.policy.batching import Batcher, Plan, RequestError
from mimic_video.policy.observations import CLIENTS, EPISODE_GAP, BadRequest, PolicyLayout, Request, Session
from mimic_video.policy.policy import Policy
from mimic_video.policy.server_metrics import ServerMetrics
from mimic_video.rerun_log import RerunLog
from mimic_video_client import protocol

_log = logging.getLogger(__name__)
_SEND_SECONDS = 10.0  # a client that reads no answer for so long is cut off
_OPEN_SECONDS = 10.0
_CLOSE_SECONDS = 2.0
_GOING_AWAY, _TOO_LARGE = 1001, 1009  # websocket close codes


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """How a policy is served.

    Attributes:
        host, port: where; port 0 takes a free one.
        token: what clients have to send as `Authorization: Bearer ...` (or openpi's `Api-Key ...`); empty for anybody.
        batch_sizes: robots of one call of the policy, which is compiled for each of these.
        max_queue: requests that wait at most.
        max_connections: connections at most.
        max_message_bytes: of one message.
        deadline: seconds that a request may wait unless it says otherwise.
        renames: fields of clients' messages by the names that they have here, which may be empty to leave them out; several of
            'state' are joined in this order.
        client: a name of `CLIENTS`, whose format messages have; empty for none.
        prompt: the instruction of clients that send none; empty to ask for one.
        episode_gap: seconds from one frame to the next after which an episode starts, as by a reset; the instruction stays.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    max_queue: int = 64
    max_connections: int = 64
    max_message_bytes: int = protocol.MAX_MESSAGE_BYTES
    deadline: float = 10.0
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    client: str = ""
    prompt: str = ""
    episode_gap: float = EPISODE_GAP

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; expected 0 to 65535")
        if self.token != self.token.strip() or not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("token has spaces around it, or other characters than printable ASCII, which no client can send")
        if self.client not in CLIENTS:
            raise ValueError(f"client is {self.client!r}; expected one of {', '.join(filter(None, CLIENTS))}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes is {self.batch_sizes}; expected numbers of robots")
        for name in ("max_queue", "max_connections", "max_message_bytes", "deadline", "episode_gap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")


class PolicyServer:
    """Serves one policy until it is drained. Use as an asynchronous context manager, in which it takes connections.

        async with PolicyServer(policy, PolicyLayout.of(policy), ServerOptions(port=8000)) as server:
            await stop.wait()
            await server.drain()

    Attributes:
        port: where it listens.
        metrics: what `/metrics` shows.
    """

    def __init__(
        self,
        plan: Plan,
        layout: PolicyLayout,
        options: ServerOptions,
        address: socket.socket | None = None,
        log: RerunLog | None = None,
    ):
        """
        Args:
            address: what `bind` gave for the options, if it has been called; the server closes it.
            log: gets every answer, after it is sent, under "connection_N/robot_M", N counted from 0.
        """
        self._layout, self._options, self._address, self._log = layout, options, address, log
        self._started, self._numbers = time.monotonic(), itertools.count()  # of the log's times and connections
        self.port = options.port
        self.metrics = ServerMetrics(options.batch_sizes)
        self._batcher = Batcher(plan, layout, options.batch_sizes, options.max_queue, options.deadline, self.metrics)
        self._draining = False
        self._connections = 0
        self._busy = 0  # messages that are not answered yet
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> "PolicyServer":
        """Compiles the policy for every batch size, then listens. Raises as `bind`."""
        with contextlib.ExitStack() as unless_it_starts:
            address = unless_it_starts.enter_context(self._address or bind(self._options))
            await asyncio.to_thread(self._batcher.warm_up)
            with _listening(self._options):
                self._server: Server = await serve(
                    self._handle,
                    sock=address,
                    process_request=self._respond,
                    max_size=self._options.max_message_bytes,
                    compression=None,
                    open_timeout=_OPEN_SECONDS,
                    close_timeout=_CLOSE_SECONDS,
                    max_queue=1,
                )
            unless_it_starts.pop_all()
        self.port = address.getsockname()[1]
        self._worker = asyncio.create_task(self._batcher.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close(code=_GOING_AWAY, reason="the policy server shuts down")
        await self._server.wait_closed()
        self._worker.cancel()
        await asyncio.wait([self._worker])

    async def drain(self) -> None:
        """Refuses what is new from now on, with an error that says so, and returns once all that was taken is answered."""
        self._draining = True
        await self._idle.wait()

    def _respond(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answers plain HTTP and refuses clients; None lets the websocket be opened."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if self._draining else http.HTTPStatus.OK
            return connection.respond(status, "draining\n" if self._draining else "ok\n")
        if path == "/metrics":
            self.metrics.connections.set(self._connections)
            self.metrics.queue_depth.set(self._batcher.waiting)
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if self._options.token and not self._authorised(request):
            self.metrics.errors.labels("unauthorised").inc()
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected the header 'Authorization: Bearer TOKEN'\n")
        if self._draining or self._connections >= self._options.max_connections:
            self.metrics.errors.labels("refused").inc()
            why = "is shutting down" if self._draining else f"has {self._options.max_connections} connections already"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"the policy server {why}\n")
        return None

    def _authorised(self, request: HttpRequest) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode(errors="surrogateescape"), self._options.token.encode())
        return scheme.lower() in ("bearer", "api-key") and same

    def _metadata(self) -> dict[str, Any]:
        options = self._options
        return {
            "protocol": protocol.PROTOCOL_VERSION,
            "server": "mimic-video",
            **self._layout.metadata(),
            "max_message_bytes": options.max_message_bytes,
            "max_robots": max(options.batch_sizes),
            "deadline_seconds": options.deadline,
            "renames": dict(options.renames),
            "client": options.client,
            "prompt": options.prompt,
            "episode_gap_seconds": options.episode_gap,
        }

    async def _handle(self, connection: ServerConnection) -> None:
        """One connection: the metadata, then an answer to every message, in order."""
        self._connections += 1
        options, place, plans = self._options, f"connection_{next(self._numbers)}", itertools.count()
        session = Session(
            self._layout,
            options.renames,
            max(options.batch_sizes),
            CLIENTS[options.client],
            options.prompt,
            options.episode_gap,
        )
        try:
            await self._send(connection, protocol.pack(self._metadata()))
            async for message in connection:
                self._busy += 1
                self._idle.clear()
                try:
                    answer, answered = await self._answer(connection, session, message)
                    await self._send(connection, answer)
                    if self._log is not None and answered is not None:
                        await asyncio.to_thread(self._record, self._log, place, next(plans), answered)
                finally:
                    self._busy -= 1
                    if not self._busy:
                        self._idle.set()
        except ConnectionClosed as closed:
            if closed.sent and closed.sent.code == _TOO_LARGE:
                self.metrics.errors.labels("too_large").inc()
            _log.info("connection to %s ended: %s", connection.remote_address, closed)
        finally:
            self._connections -= 1

    async def _send(self, connection: ServerConnection, data: bytes | str) -> None:
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await connection.send(data)
        except TimeoutError:
            self.metrics.errors.labels("slow_reader").inc()
            connection.transport.abort()

    async def _answer(
        self, connection: ServerConnection, session: Session, message: bytes | str
    ) -> tuple[bytes | str, "_Answered | None"]:
        """What is sent, and what of a plan is logged."""
        self.metrics.requests.inc()
        arrived = time.monotonic()
        try:
            if self._draining:
                raise RequestError(protocol.DRAINING, "the policy server is shutting down and takes no new requests")
            if isinstance(message, str):
                raise BadRequest("the message is text; expected a binary frame of msgpack")
            # In a thread, since large images take their time; a session has one message at a time.
            request = await asyncio.to_thread(lambda: session.accept(protocol.unpack(message), arrived))
            if not isinstance(request, Request):
                return protocol.pack(request), None
            return await self._plan(connection, request, arrived)
        except (RequestError, BadRequest, protocol.ProtocolError) as error:
            kind = error.kind if isinstance(error, RequestError) else protocol.BAD_REQUEST
            self.metrics.errors.labels(kind).inc()
            return protocol.error_text(kind, str(error)), None

    async def _plan(
        self, connection: ServerConnection, request: Request, arrived: float
    ) -> tuple[bytes | str, "_Answered | None"]:
        planning = asyncio.create_task(self._batcher.submit(request, arrived))
        gone = asyncio.create_task(connection.wait_closed())
        try:
            await asyncio.wait({planning, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not planning.done():
                raise RequestError("disconnected", "the client has gone")
            answer = planning.result()
        finally:
            planning.cancel()
            gone.cancel()
        total = time.monotonic() - arrived
        self.metrics.answers.inc()
        self.metrics.latency.observe(total)
        timing = {"queue_ms": 1e3 * answer.waited, "infer_ms": 1e3 * answer.planned, "total_ms": 1e3 * total}
        packed = protocol.pack(
            {
                "actions": answer.actions if request.batched else answer.actions[0],
                "query": answer.query,
                "history_frames": request.history_frames,
                "server_timing": timing,
                **({"warning": request.warning} if request.warning else {}),
            }
        )
        return packed, _Answered(request, answer.actions, arrived, timing)

    def _record(self, log: RerunLog, place: str, number: int, answered: "_Answered") -> None:
        request, layout = answered.request, self._layout
        for robot, instruction in enumerate(request.instructions):
            log.plan(
                f"{place}/robot_{robot}",
                number,
                answered.arrived - self._started,
                {camera: frames[robot, -1] for camera, frames in request.images.items()},
                request.state[robot],
                instruction,
                answered.actions[robot],
                layout.control_hz,
                layout.execute_steps,
                {name.removesuffix("_ms"): value for name, value in answered.timing.items()},
            )


class _Answered(NamedTuple):
    """A plan that was sent: `arrived` is the monotonic clock's time of its request."""

    request: Request
    actions: np.ndarray
    arrived: float
    timing: Mapping[str, float]


def bind(options: ServerOptions) -> socket.socket:
    """A socket that has the address of the options, before anything takes minutes. Clients are refused until it listens.

    Raises:
        ValueError: if another process has the port, or the host is not this machine's.
    """
    address = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET, socket.SOCK_STREAM)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an earlier server's connections the system may know yet
    with contextlib.ExitStack() as unless_it_is_bound:
        unless_it_is_bound.enter_context(address)
        with _listening(options):
            address.bind((options.host, options.port))
        unless_it_is_bound.pop_all()
    return address


@contextlib.contextmanager
def _listening(options: ServerOptions) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"port {options.port} of {options.host!r} cannot be listened at: {error}; expected a free port (0 takes any) of an "
            "address of this machine"
        ) from error


def parse_renames(arguments: Sequence[str]) -> dict[str, str]:
    """`ServerOptions.renames` of NAME=KNOWN. Raises ValueError for another form, or a name that comes twice."""
    renames: dict[str, str] = {}
    for argument in arguments:
        name, equals, known = argument.partition("=")
        if not (name and equals):
            raise ValueError(f"--rename={argument!r} is not of the form NAME=KNOWN")
        if name in renames:
            raise ValueError(f"--rename names {name!r} twice")
        renames[name] = known
    return renames


async def serve_until_stopped(
    policy: Policy, options: ServerOptions, address: socket.socket | None = None, log: RerunLog | None = None
) -> None:
    """Serves until SIGTERM or SIGINT, then drains. `address` and `log` are those of `PolicyServer`."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with PolicyServer(policy, PolicyLayout.of(policy), options, address, log) as server:
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving {policy.embodiment.name!r} at ws://{host}:{server.port}", flush=True)
        await stop.wait()
        print("draining: no new requests", flush=True)
        await server.drain()
