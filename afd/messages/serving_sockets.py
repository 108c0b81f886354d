"""The two ends of the gateway <-> attention worker conversation: one set of options, CURVE always on.

Both key pairs come from the cluster secret. The worker's public key is therefore not published anywhere (not in the
view, not on the wire: a CURVE client must know it beforehand), and a process without the secret cannot even complete
the handshake's first step. So knowing that key is the client's proof, and no ZAP handler is needed.

Thread rule: a ZeroMQ socket belongs to the thread that uses it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import zmq

from afd.messages.keys import zmq_keypair
from afd.messages.serving import MAX_MESSAGE_BYTES

SocketT = TypeVar("SocketT", bound="zmq.Socket[Any]")

QUEUE_MESSAGES = 65_536  # per connection; a ROUTER that is full drops, and the gateway asks again (Resend)
HANDSHAKE_TIMEOUT_MS = 5_000
HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 4_000


def _set_limits(socket: zmq.Socket[Any], max_message_bytes: int) -> None:
    socket.linger = 0
    socket.sndhwm = QUEUE_MESSAGES
    socket.rcvhwm = QUEUE_MESSAGES
    socket.maxmsgsize = max_message_bytes
    socket.handshake_ivl = HANDSHAKE_TIMEOUT_MS
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS


def bind(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Listen on "tcp://host:port", where the host may be "[::1]"; raises ZMQError."""
    socket.ipv6 = "[" in endpoint
    socket.bind(endpoint)


def connect(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Connect to "tcp://host:port", where the host may be "[::1]"; raises ZMQError."""
    socket.ipv6 = "[" in endpoint
    socket.connect(endpoint)


def server_socket(ctx: zmq.Context[SocketT], secret: bytes, max_message_bytes: int) -> SocketT:
    """An attention worker's ROUTER, not bound yet. Frames: [gateway identity, message].

    max_message_bytes: also bounds what a stranger's connection can hold during its handshake.
    A gateway that reconnects under its own identity takes over its old connection.
    """
    keys = zmq_keypair(secret, "worker")
    socket = ctx.socket(zmq.ROUTER)
    _set_limits(socket, max_message_bytes)
    socket.curve_server = True
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    socket.router_handover = True
    return socket


def client_socket(ctx: zmq.Context[SocketT], secret: bytes, identity: bytes) -> SocketT:
    """A gateway's DEALER for one worker, not connected yet. identity: 1..255 bytes, not starting with zero."""
    keys = zmq_keypair(secret, "gateway")
    socket = ctx.socket(zmq.DEALER)
    _set_limits(socket, MAX_MESSAGE_BYTES)
    socket.identity = identity
    socket.curve_serverkey = zmq_keypair(secret, "worker").public
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    socket.reconnect_ivl = 50
    socket.reconnect_ivl_max = 500
    return socket
