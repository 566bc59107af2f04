"""A connection to a policy server."""

import contextlib
import logging
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidProxy, InvalidStatus, InvalidURI
from websockets.proxy import parse_proxy
from websockets.sync.client import ClientConnection, connect

from mimic_video_client import protocol

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5
_CLOSE_SECONDS = 1.0


class ServerUnavailable(ConnectionError):
    """There is no server, or it does not let this client in."""


class ConnectionLost(ConnectionError):
    """The connection ended: the server's history of this robot is gone. Make a new client to go on."""


class PolicyTimeout(TimeoutError):
    """The server did not answer in time. The connection is closed, so that a late answer is not taken for the next one."""


class RequestRefused(RuntimeError):
    """The server answered with an error; the connection goes on.

    Attributes:
        kind: one of `protocol.ERROR_KINDS`.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class PolicyClient:
    """Sends observations of one robot, or of several in lockstep, and receives action chunks.

    An observation is a map. Names may be LeRobot's, openpi's or short:

        {"observation.images.primary": uint8 (H, W, 3), "observation.state": (p,), "task": "open the drawer"}
        {"images": {"primary": ...}, "state": ..., "prompt": ...}

    The server keeps the frames of this connection, so that the policy sees the past: send every frame with `observe`, or the
    whole past at once as images of shape (past_frames, H, W, 3). Of openpi's servers, which keep nothing, `observe` and `reset`
    ask nothing. Not for several threads at once.

    Attributes:
        metadata: what the server said about its policy: action layout, rates, image size, cameras, versions.
    """

    def __init__(self, uri: str, token: str | None = None, wait: float = 60.0, timeout: float = 30.0, proxy: str | None = None):
        """Connects, trying for `wait` seconds while there is no server; `timeout` is that of an answer, in seconds.

        Args:
            proxy: what to connect through, http://HOST:PORT or socks5h://HOST:PORT (with the package python-socks). None for no
                proxy, whatever the environment says (http_proxy and the like), which is about the internet, not about robots.

        Raises:
            ServerUnavailable: if there is no server in time, or it refuses this client (as without the right token), or the proxy
                cannot be used.
            ProtocolError: if the server speaks another protocol.
        """
        self._timeout = timeout
        self._stack = contextlib.ExitStack()
        self._connection = _connect(self._stack, uri, token, wait, timeout, proxy)
        try:
            self.metadata = self._receive(timeout)
            version = self.metadata.get("protocol")
            self._has_history = version is not None  # openpi's servers have neither
            if self._has_history and version != protocol.PROTOCOL_VERSION:
                raise protocol.ProtocolError(f"{uri} speaks protocol {version}; this client speaks {protocol.PROTOCOL_VERSION}")
        except BaseException:
            self.close()
            raise

    def infer(self, observation: Mapping[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Plans from the observation: "actions" float32 (a, m) in raw units at the control rate, and "server_timing" in ms.

        What the server warns of, such as frames that come too seldom, is logged.

        Args:
            observation: the present. May also hold "timestamp" (seconds of the robot's clock as float64; the time of arrival
                counts without it) and "deadline" (seconds after which the answer is of no use and not computed).
            timeout: seconds to wait; None for the client's.

        Raises:
            RequestRefused: if the server answers with an error. The connection goes on.
            PolicyTimeout, ConnectionLost: the connection is closed.
            ProtocolError: if the observation cannot be sent, or the answer of another server has no "actions".
        """
        message = protocol.pack(dict(observation))
        limit = self.metadata.get("max_message_bytes")
        if limit is not None and len(message) > limit:  # the server would close the connection
            raise protocol.ProtocolError(f"the observation has {len(message)} bytes; the server takes {limit} (max_message_mb)")
        timeout = self._timeout if timeout is None else timeout
        try:
            self._connection.send(message)
        except ConnectionClosed as error:
            raise ConnectionLost(f"the connection to the policy server is closed: {error}") from error
        reply = self._receive(timeout)
        plans = not self._has_history or (observation.get("plan", True) and not observation.get("reset"))
        if (plans or "actions" in reply) and not isinstance(reply.get("actions"), np.ndarray):
            raise protocol.ProtocolError(f"the server answers with {sorted(reply)}; expected an array 'actions' among them")
        if "warning" in reply:
            _log.warning("the policy server warns: %s", reply["warning"])
        return reply

    def told(self, *names: str) -> list[Any]:
        """Entries of `metadata`. Raises ProtocolError for one that the server did not tell: openpi's tell no rates or sizes."""
        missing = [name for name in names if name not in self.metadata]
        if missing:
            raise protocol.ProtocolError(
                f"the server tells {sorted(self.metadata)} of its policy; expected {missing}, as a server of mimic-video tells"
            )
        return [self.metadata[name] for name in names]

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Adds a frame to the history without planning. Raises as `infer`."""
        if self._has_history:
            self.infer({**observation, "plan": False})

    def reset(self) -> None:
        """Starts an episode: the server forgets the frames and the instruction. Raises as `infer`.

        It forgets the frames by itself where the next one comes later than `metadata["episode_gap_seconds"]`.
        """
        if self._has_history:
            self.infer({"reset": True})

    def close(self) -> None:
        """Ends the connection; does nothing the second time."""
        self._stack.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, timeout: float) -> dict[str, Any]:
        try:
            reply = self._connection.recv(timeout)
        except TimeoutError:
            self.close()
            raise PolicyTimeout(f"the policy server did not answer within {timeout:g} s; the connection is closed") from None
        except ConnectionClosed as error:
            raise ConnectionLost(f"the policy server closed the connection: {error}") from error
        except BaseException:  # such as Ctrl-C: the answer that is under way must not be taken for the next one
            self.close()
            raise
        if isinstance(reply, str):
            raise RequestRefused(*protocol.parse_error(reply))
        return protocol.unpack(reply)


def _connect(
    stack: contextlib.ExitStack, uri: str, token: str | None, wait: float, timeout: float, proxy: str | None
) -> ClientConnection:
    if token and not (token.isascii() and token.isprintable()):
        raise ServerUnavailable("the token has characters that no header can have; expected printable ASCII, such as no line end")
    headers = {"Authorization": f"Bearer {token}"} if token else None
    way = _way(proxy)
    deadline = time.monotonic() + wait
    while True:
        try:
            return stack.enter_context(
                connect(
                    uri,
                    compression=None,
                    max_size=None,
                    additional_headers=headers,
                    proxy=proxy,
                    open_timeout=timeout,
                    close_timeout=_CLOSE_SECONDS,
                )
            )
        except InvalidStatus as error:
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace").strip()
            if status != 503 or time.monotonic() >= deadline:  # 503: it starts or ends
                raise ServerUnavailable(f"the server at {uri}{way} refuses: {status} {body}") from error
        except (OSError, InvalidHandshake) as error:
            if time.monotonic() >= deadline:
                raise ServerUnavailable(f"no policy server at {uri} within {wait:g} s{way}: {error}") from error
        except (InvalidURI, ValueError) as error:  # ValueError: of a port
            raise ServerUnavailable(f"{uri!r} is not a server's address; expected ws://HOST:PORT") from error
        except ImportError as error:
            raise ServerUnavailable(f"no policy server at {uri}{way}: SOCKS needs the package python-socks") from error
        time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _way(proxy: str | None) -> str:
    """What errors say about how the server was to be reached. Raises ServerUnavailable for a proxy that is none."""
    if proxy is None:
        ignored = urllib.request.getproxies().keys() - {"no"}
        return f", without the environment's proxies for {', '.join(sorted(ignored))}" if ignored else ""
    try:
        parsed = parse_proxy(proxy)
    except (InvalidProxy, ValueError) as error:
        shown = proxy.rpartition("@")[2]  # without a password
        raise ServerUnavailable(f"{shown!r} is not a proxy; expected http://HOST:PORT or socks5h://HOST:PORT") from error
    return f" through the proxy {parsed.scheme}://{parsed.host}:{parsed.port}"
