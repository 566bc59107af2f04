"""Client of a policy server. Needs NumPy, websockets and msgpack; no JAX, and nothing of `mimic_video`."""

from mimic_video_client.client import ConnectionLost, PolicyClient, PolicyTimeout, RequestRefused, ServerUnavailable
from mimic_video_client.protocol import ProtocolError

__all__ = ["ConnectionLost", "PolicyClient", "PolicyTimeout", "ProtocolError", "RequestRefused", "ServerUnavailable"]
