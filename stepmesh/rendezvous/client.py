"""A participant's end of the rendezvous. One thread uses it."""

from __future__ import annotations

import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from stepmesh.errors import ProtocolError, TransportError
from stepmesh.rendezvous import wire

_RETRY_S = 0.1


class RendezvousClient:
    """Connected from construction to close; waits up to `timeout_s` for a server that is not there yet.

    Raises TransportError when nobody answers in time, ProtocolError when the other end holds another secret, or closes
    every connection until then (it does that to strangers, and where there are too many of them).
    """

    def __init__(self, host: str, port: int, secret: bytes, who: str, timeout_s: float) -> None:
        self._who = who
        deadline = time.monotonic() + timeout_s
        while True:
            self._sock = _connect(host, port, deadline)
            try:
                self._codec = self._enter(secret)
                break
            except OSError as error:
                self.close()
                if not isinstance(error, ConnectionError):
                    raise TransportError(f"rendezvous at {host}:{port}: {error}") from error
                if time.monotonic() + _RETRY_S >= deadline:
                    reason = f"another secret, or another participant called {who}?"
                    raise ProtocolError(f"the rendezvous closes the connection ({reason})") from error
            except ProtocolError:
                self.close()
                raise
            time.sleep(_RETRY_S)
        self._sock.setblocking(False)

    def _enter(self, secret: bytes) -> wire.FrameCodec:
        """Both ends prove themselves, and the server knows who this is. OSError, ProtocolError."""
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self._sock.sendall(wire.hello(secret, nonce))
        server_nonce = wire.check_welcome(secret, nonce, self._receive_exactly(wire.WELCOME_BYTES))
        codec = wire.FrameCodec(secret, nonce, server_nonce, is_client=True)
        self._sock.sendall(codec.encode({"who": self._who}))
        while not codec.decode(self._receive_exactly(1)):
            pass
        return codec

    def __enter__(self) -> RendezvousClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when an answer may have come."""
        return self._sock.fileno()

    @property
    def local_host(self) -> str:
        """This host's address on the way to the rendezvous: one that other participants can probably reach."""
        return str(self._sock.getsockname()[0])

    def gather(
        self,
        name: str,
        size: int,
        payload: Any = None,
        *,
        timeout_s: float,
        meanwhile: Callable[[float], object] | None = None,
    ) -> dict[str, Any]:
        """Wait until `size` participants have come under `name`; what each brought, by participant.

        `meanwhile(seconds)` is called to pass the time; it should return when `fileno` is readable. Raises
        TransportError when they do not all come in time, when one leaves, or when the rendezvous is gone.
        """
        message = {"who": self._who, "name": name, "size": size, "payload": payload}
        deadline = time.monotonic() + timeout_s
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(self._codec.encode(message))
            self._sock.setblocking(False)
        except OSError as error:
            raise TransportError(f"{self._who}: the rendezvous is gone: {error}") from error
        while True:
            for answer in self._receive():
                if answer.get("name") != name:
                    continue  # of a gathering that was given up
                if "error" in answer:
                    raise TransportError(f"{self._who}: {name!r} failed: {answer['error']}")
                return dict(answer["brought"])
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TransportError(f"{self._who}: {name!r}: not all {size} participants came within {timeout_s:g} s")
            if meanwhile is None:
                select.select([self._sock], [], [], left_s)
            else:
                meanwhile(left_s)

    def close(self) -> None:
        """Leave. Idempotent."""
        self._sock.close()

    def _receive(self) -> list[dict[str, Any]]:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise TransportError(f"{self._who}: the rendezvous is gone: {error}") from error
        if not data:
            raise TransportError(f"{self._who}: the rendezvous closed the connection")
        return self._codec.decode(data)

    def _receive_exactly(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            got = self._sock.recv(num_bytes - len(data))
            if not got:
                raise ConnectionAbortedError("the rendezvous closed the connection")
            data += got
        return bytes(data)


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """A connection whose time-out is what was left of the deadline."""
    while True:
        left_s = deadline - time.monotonic()
        try:
            sock = socket.create_connection((host, port), timeout=max(left_s, 0.01))
        except OSError as error:  # the name may not resolve yet, either
            reason = str(error)
        else:
            if sock.getsockname() != sock.getpeername():
                sock.settimeout(max(deadline - time.monotonic(), 0.01))
                return sock
            sock.close()  # connected to itself: an ephemeral port on loopback, and nobody listens yet
            reason = "nobody listens"
        if left_s <= _RETRY_S:
            raise TransportError(f"nobody answers at the rendezvous {host}:{port}: {reason}")
        time.sleep(_RETRY_S)
