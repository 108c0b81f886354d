"""The rendezvous protocol's bytes, for both ends. Pure.

    client                                       server
    HELLO    magic, nonce_c, mac(nonce_c)   ->   silent close when the mac is wrong
                                            <-   WELCOME  nonce_s, mac(nonce_c, nonce_s)
    frames   u32 length, mac, JSON         <->   macs under a key of this session, over direction, number and body

Nothing but the fixed-size HELLO is parsed before the sender has proved the secret; a frame cannot be replayed, moved
or reflected. A HELLO can, so it proves little: a client is no stranger any more with its first frame, which says who it
is and is answered.
"""

from __future__ import annotations

import hmac
import json
import struct
from typing import Any

from stepmesh.errors import ProtocolError

MAGIC = b"SMRV"
NONCE_BYTES = 32
MAC_BYTES = 32
HELLO_BYTES = len(MAGIC) + NONCE_BYTES + MAC_BYTES
WELCOME_BYTES = NONCE_BYTES + MAC_BYTES
MAX_BODY_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")


def hello(secret: bytes, nonce: bytes) -> bytes:
    """The client's first bytes."""
    return MAGIC + nonce + _mac(secret, b"rendezvous hello", nonce)


def check_hello(secret: bytes, data: bytes) -> bytes:
    """The client's nonce. Raises ProtocolError for a stranger."""
    nonce = data[len(MAGIC) : len(MAGIC) + NONCE_BYTES]
    if len(data) != HELLO_BYTES or not hmac.compare_digest(data, hello(secret, nonce)):
        raise ProtocolError("no rendezvous hello under this secret")
    return nonce


def welcome(secret: bytes, client_nonce: bytes, nonce: bytes) -> bytes:
    """The server's answer."""
    return nonce + _mac(secret, b"rendezvous welcome", client_nonce + nonce)


def check_welcome(secret: bytes, client_nonce: bytes, data: bytes) -> bytes:
    """The server's nonce. Raises ProtocolError when it holds another secret."""
    nonce = data[:NONCE_BYTES]
    if not hmac.compare_digest(data, welcome(secret, client_nonce, nonce)):
        raise ProtocolError("the rendezvous has another secret")
    return nonce


class FrameCodec:
    """One end of a session: numbers, signs and checks frames. Bounded: holds at most one incomplete frame."""

    def __init__(self, secret: bytes, client_nonce: bytes, server_nonce: bytes, *, is_client: bool) -> None:
        self._key = _mac(secret, b"rendezvous session", client_nonce + server_nonce)
        self._out, self._in = (b"c", b"s") if is_client else (b"s", b"c")
        self._sent = 0
        self._received = 0
        self._buffer = bytearray()

    def encode(self, fields: dict[str, Any]) -> bytes:
        """A signed frame. Raises ProtocolError when it is too large."""
        body = json.dumps(fields, separators=(",", ":")).encode("ascii")
        if len(body) > MAX_BODY_BYTES:
            raise ProtocolError(f"a rendezvous message of {len(body)} bytes exceeds {MAX_BODY_BYTES}")
        mac = _mac(self._key, self._out + _NUMBER.pack(self._sent), body)
        self._sent += 1
        return _LENGTH.pack(len(body)) + mac + body

    def decode(self, data: bytes) -> list[dict[str, Any]]:
        """Complete messages, in order. Raises ProtocolError; the connection is then to be closed."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_BODY_BYTES:
                raise ProtocolError(f"a rendezvous message of {length} bytes exceeds {MAX_BODY_BYTES}")
            start = _LENGTH.size + MAC_BYTES
            if len(self._buffer) < start + length:
                break
            mac, body = bytes(self._buffer[_LENGTH.size : start]), bytes(self._buffer[start : start + length])
            del self._buffer[: start + length]
            if not hmac.compare_digest(mac, _mac(self._key, self._in + _NUMBER.pack(self._received), body)):
                raise ProtocolError("a rendezvous message is not signed by this session's peer")
            self._received += 1
            messages.append(_object(body))
        return messages


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a rendezvous message is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("a rendezvous message is not a JSON object")
    return fields


def _mac(key: bytes, label: bytes, body: bytes) -> bytes:
    return hmac.digest(key, label + b"\0" + body, "sha256")
