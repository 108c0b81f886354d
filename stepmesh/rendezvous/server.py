"""The meeting point: one thread, one listener, bounded in connections and bytes.

`Gatherings` decides who waits for whom and is pure; `RendezvousServer` is its shell of sockets.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepmesh.errors import ProtocolError
from stepmesh.rendezvous import wire
from stepmesh.transports.sockets import listen_tcp

log = logging.getLogger("stepmesh")

_MAX_CONNECTIONS = 1024
_MAX_OPEN_GATHERINGS = 1024
_MAX_STRANGERS = 64  # who have not sent a signed frame yet; the one who waits longest makes room
_STRANGER_LIMIT_S = 5.0
_MAX_BACKLOG_BYTES = 64 << 20


@dataclass(slots=True)
class _Gathering:
    size: int
    brought: dict[str, Any] = field(default_factory=dict)  # participant -> payload


class Answer(NamedTuple):
    """What to tell whom."""

    participant: str
    message: dict[str, Any]


class Gatherings:
    """Who has come to which gathering. A gathering is over, and its name free again, once `size` have come."""

    def __init__(self) -> None:
        self._open: dict[str, _Gathering] = {}

    def come(self, participant: str, name: str, size: int, payload: Any) -> list[Answer]:
        """A participant comes; whom to tell what."""
        gathering = self._open.get(name)
        if gathering is None:
            if len(self._open) >= _MAX_OPEN_GATHERINGS or size < 1:
                return [_failed(participant, name, "too many gatherings are open, or the size is not positive")]
            gathering = self._open[name] = _Gathering(size)
        if size != gathering.size:
            return [_failed(participant, name, f"{participant} expects {size} participants, others {gathering.size}")]
        if participant in gathering.brought:
            return [_failed(participant, name, f"two participants call themselves {participant}")]
        gathering.brought[participant] = payload
        if len(gathering.brought) < size:
            return []
        del self._open[name]
        brought = dict(sorted(gathering.brought.items()))
        return [Answer(other, {"name": name, "brought": brought}) for other in brought]

    def leave(self, participant: str) -> list[Answer]:
        """A participant has gone: those who wait with it wait for nothing, and are told so."""
        answers = []
        for name, gathering in list(self._open.items()):
            if participant in gathering.brought:
                del self._open[name], gathering.brought[participant]
                reason = f"{participant} left while {len(gathering.brought)} of {gathering.size} waited"
                answers += [_failed(other, name, reason) for other in gathering.brought]
        return answers


def _failed(participant: str, name: str, reason: str) -> Answer:
    return Answer(participant, {"name": name, "error": reason})


class RendezvousServer:
    """Listens from construction to close. Raises TransportError when it cannot. `address` is (host, port)."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._secret = secret
        self._gatherings = Gatherings()
        self._listener = listen_tcp(host, port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stop_fd, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}
        self._named: dict[str, _Connection] = {}
        self._changed = threading.Condition()
        self._num_come = 0
        self._num_left = 0
        self._thread = threading.Thread(target=self._run, name="stepmesh-rendezvous", daemon=True)
        self._thread.start()

    def __enter__(self) -> RendezvousServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_come(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` participants have come. False: not within the time. Any thread."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_come >= count, timeout_s)

    def wait_left(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` participants have come and gone. False: not within the time. Any thread."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_left >= count, timeout_s)

    def close(self) -> None:
        """Close all connections and join the thread. Idempotent."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            for sock in list(self._connections):
                self._drop(sock, "the rendezvous closes")
            self._selector.close()
            self._listener.close()
            os.close(self._stop_fd)

    def _run(self) -> None:
        while True:
            for key, mask in self._selector.select(_STRANGER_LIMIT_S):
                if key.fd == self._stop_fd:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._serve(key.fileobj, mask)
            limit = time.monotonic() - _STRANGER_LIMIT_S
            for sock, connection in list(self._connections.items()):
                if connection.name is None and connection.since < limit:
                    self._drop(sock, "it did not say in time who it is")

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("rendezvous cannot accept a connection: %s", error.strerror)
            time.sleep(0.05)  # out of descriptors: trying again at once would only spin
            return
        strangers = [other for other, connection in self._connections.items() if connection.name is None]
        if len(strangers) >= _MAX_STRANGERS:
            self._drop(strangers[0], "too many have not said who they are")
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[sock] = _Connection(sock, time.monotonic())
        self._selector.register(sock, selectors.EVENT_READ)

    def _serve(self, sock: socket.socket, mask: int) -> None:
        connection = self._connections.get(sock)
        if connection is None:
            return  # dropped by an earlier event of this round
        try:
            if mask & selectors.EVENT_WRITE:
                self._flush(connection)
            if mask & selectors.EVENT_READ:
                data = sock.recv(1 << 16)
                if not data:
                    self._drop(sock, "it closed the connection")
                    return
                self._take(connection, data)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            self._drop(sock, str(error))

    def _take(self, connection: _Connection, data: bytes) -> None:
        if connection.codec is None:
            connection.greeting += data
            if len(connection.greeting) < wire.HELLO_BYTES:
                return
            client_nonce = wire.check_hello(self._secret, bytes(connection.greeting[: wire.HELLO_BYTES]))
            nonce = secrets.token_bytes(wire.NONCE_BYTES)
            connection.codec = wire.FrameCodec(self._secret, client_nonce, nonce, is_client=False)
            self._send(connection, wire.welcome(self._secret, client_nonce, nonce))
            data = bytes(connection.greeting[wire.HELLO_BYTES :])
        for message in connection.codec.decode(data):
            self._heed(connection, message)

    def _heed(self, connection: _Connection, message: dict[str, Any]) -> None:
        try:
            who = str(message["who"])
            name, size = (str(message["name"]), int(message["size"])) if connection.name is not None else ("", 0)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a rendezvous message lacks a field: {error!r}") from None
        if connection.name is None:
            if who in self._named:
                raise ProtocolError(f"{who} is connected already")
            connection.name = who
            self._named[who] = connection
            with self._changed:
                self._num_come += 1
                self._changed.notify_all()
            self._tell([Answer(who, {"present": who})])
            return
        if connection.name != who:
            raise ProtocolError(f"{connection.name} suddenly calls itself {who}")
        self._tell(self._gatherings.come(who, name, size, message.get("payload")))

    def _tell(self, answers: list[Answer]) -> None:
        for participant, message in answers:
            connection = self._named.get(participant)
            if connection is not None and connection.codec is not None:
                self._send(connection, connection.codec.encode(message))

    def _send(self, connection: _Connection, data: bytes) -> None:
        if len(connection.backlog) + len(data) > _MAX_BACKLOG_BYTES:
            with contextlib.suppress(OSError):  # it does not read what it is told; its end shows in the next read
                connection.sock.shutdown(socket.SHUT_RDWR)
            return
        connection.backlog += data
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            del connection.backlog[: connection.sock.send(connection.backlog)]
        except BlockingIOError:
            pass
        except OSError:
            connection.backlog.clear()  # its end shows in the next read
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.backlog else 0)
        self._selector.modify(connection.sock, wanted)

    def _drop(self, sock: socket.socket, reason: str) -> None:
        connection = self._connections.pop(sock)
        self._selector.unregister(sock)
        sock.close()
        log.debug("rendezvous: %s is gone: %s", connection.name or "a stranger", reason)
        if connection.name is not None:
            del self._named[connection.name]
            self._tell(self._gatherings.leave(connection.name))
            with self._changed:
                self._num_left += 1
                self._changed.notify_all()


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    since: float
    greeting: bytearray = field(default_factory=bytearray)
    codec: wire.FrameCodec | None = None
    name: str | None = None
    backlog: bytearray = field(default_factory=bytearray)
