"""A connection to a policy server."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from mimic_video_client import protocol

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

    def __init__(self, uri: str, token: str | None = None, wait: float = 60.0, timeout: float = 30.0):
        """Connects, trying for `wait` seconds while there is no server; `timeout` is that of an answer, in seconds.

        Raises:
            ServerUnavailable: if there is no server in time, or it refuses this client (as without the right token).
            ProtocolError: if the server speaks another protocol.
        """
        self._timeout = timeout
        self._stack = contextlib.ExitStack()
        self._connection = _connect(self._stack, uri, token, wait, timeout)
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

        Args:
            observation: the present. May also hold "timestamp" (seconds of the robot's clock, for irregular frames) and
                "deadline" (seconds after which the answer is of no use and not computed).
            timeout: seconds to wait; None for the client's.

        Raises:
            RequestRefused: if the server answers with an error. The connection goes on.
            PolicyTimeout, ConnectionLost: the connection is closed.
            ProtocolError: if the observation cannot be sent.
        """
        message = protocol.pack(dict(observation))
        timeout = self._timeout if timeout is None else timeout
        try:
            self._connection.send(message)
        except ConnectionClosed as error:
            raise ConnectionLost(f"the connection to the policy server is closed: {error}") from error
        return self._receive(timeout)

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Adds a frame to the history without planning. Raises as `infer`."""
        if self._has_history:
            self.infer({**observation, "plan": False})

    def reset(self) -> None:
        """Starts an episode: the server forgets the frames and the instruction. Raises as `infer`."""
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
        if isinstance(reply, str):
            raise RequestRefused(*protocol.parse_error(reply))
        return protocol.unpack(reply)


def _connect(stack: contextlib.ExitStack, uri: str, token: str | None, wait: float, timeout: float) -> ClientConnection:
    headers = {"Authorization": f"Bearer {token}"} if token else None
    deadline = time.monotonic() + wait
    while True:
        try:
            return stack.enter_context(
                connect(
                    uri,
                    compression=None,
                    max_size=None,
                    additional_headers=headers,
                    open_timeout=timeout,
                    close_timeout=_CLOSE_SECONDS,
                )
            )
        except InvalidURI as error:
            raise ServerUnavailable(f"{uri!r} is not a server's address; expected ws://HOST:PORT") from error
        except InvalidStatus as error:
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace").strip()
            if status != 503 or time.monotonic() >= deadline:  # 503: it starts or ends
                raise ServerUnavailable(f"the server at {uri} refuses: {status} {body}") from error
        except (OSError, InvalidHandshake) as error:
            if time.monotonic() >= deadline:
                raise ServerUnavailable(f"no policy server at {uri} within {wait:g} s: {error}") from error
        time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
