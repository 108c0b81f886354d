"""Control links over UNIX and TCP sockets: non-blocking, bounded, with descriptor passing over UNIX."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from stepmesh.errors import ProtocolError, TransportError
from stepmesh.transports.base import Link, Received, close_fds
from stepmesh.transports.names import Endpoint, resolve
from stepmesh.types import Address
from stepmesh.wire import MAX_FDS, ControlParser

_READ_BYTES = 64 * 1024
_READS_PER_CALL = 64  # a peer that floods its control socket must not keep the main thread
_MAX_BACKLOG_BYTES = 256 * 1024  # control frames are tiny: a longer queue means that the peer has stopped reading
_INT_BYTES = array.array("i").itemsize


def listen_unix(name: str) -> socket.socket:
    """A listener in the abstract namespace: nothing on disk, gone with the process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind("\0" + name)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise TransportError(f"cannot listen on abstract UNIX socket {name!r}: {error}") from error
    return listener


def listen_tcp(host: str, port: int) -> socket.socket:
    """A TCP listener; port 0 takes any free one."""
    try:
        family, kind, protocol, where = resolve(host, port, socket.AI_PASSIVE)
    except OSError as error:
        raise TransportError(f"cannot resolve listen_host {host!r}: {error}") from error
    listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


def dial_unix(address: Address) -> socket.socket:
    """Connect at once or raise TransportError: nobody listens there on this host and network namespace."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect("\0" + address.unix)
    except OSError as error:
        sock.close()
        raise TransportError(f"UNIX socket {address.unix!r} cannot be reached from here: {error.strerror}") from error
    return sock


def dial_tcp(endpoint: Endpoint) -> socket.socket:
    """Begin to connect; completion shows as writability. Raises TransportError."""
    sock = socket.socket(endpoint.family, endpoint.kind | socket.SOCK_NONBLOCK, endpoint.protocol)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = sock.connect_ex(endpoint.where)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        host, port = endpoint.where[:2]
        raise TransportError(f"cannot connect to {host}:{port}: {os.strerror(code)}")
    return sock


def tune_local(sock: socket.socket, frame_bytes: int) -> None:
    """Make a TCP connection to a peer on this host as fast as it can be; leave any other to the system's settings.

    There is no wire to share: reno, where it may be chosen, neither paces (as BBR does, over loopback, too) nor waits.
    And the socket takes a whole frame at once, so that nothing is left for another thread to send.
    """
    with contextlib.suppress(OSError):  # not connected yet, or gone again: then it stays as it is
        if sock.getsockname()[0] != sock.getpeername()[0]:
            return
        if frame_bytes <= _most_send_bytes():  # asked for more, the kernel would give less than without asking
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, frame_bytes)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _most_send_bytes() -> int:
    """What SO_SNDBUF may be; 0 where the system does not tell."""
    try:
        return int(Path("/proc/sys/net/core/wmem_max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


class SocketLink(Link):
    """A control link. Registered with the fabric's epoll for as long as it is open."""

    def __init__(
        self, sock: socket.socket, epoll: select.epoll, *, connecting: bool = False, initial: bytes = b""
    ) -> None:
        self.kind = "unix" if sock.family == socket.AF_UNIX else "tcp"
        self._sock = sock
        self._epoll = epoll
        self._connecting = connecting
        self._parser = ControlParser()
        self._parser.feed(initial)
        self._lock = threading.Lock()  # guards _backlog, _failure and the closing of the socket
        self._backlog = bytearray()
        self._failure: str | None = None
        self._open = True
        self.peer_name = _peer_name(sock, self.kind)
        epoll.register(sock, select.EPOLLIN | (select.EPOLLOUT if connecting else 0))

    def fileno(self) -> int:
        return self._sock.fileno()

    def peer_endpoint(self) -> Endpoint:
        """The other end of a TCP link. Raises TransportError once it is gone."""
        try:
            where = self._sock.getpeername()
        except OSError as error:
            raise TransportError(f"control connection is gone: {error.strerror}") from error
        return Endpoint(self._sock.family, self._sock.type, self._sock.proto, where)

    def trust(self) -> None:
        self._parser.trusted = True

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        with self._lock:
            if not self._open or self._failure is not None:
                return
            if self._connecting or self._backlog:
                if fds:
                    self._failure = "control socket is full, descriptors cannot be passed"
                elif len(self._backlog) + len(frame) > _MAX_BACKLOG_BYTES:
                    self._failure = "the peer does not read its control socket"
                else:
                    self._backlog += frame
                return
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([frame], ancillary)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._failure = f"control socket: {error.strerror}"
                return
            if sent == 0 and fds:
                self._failure = "control socket is full, descriptors cannot be passed"
            elif sent < len(frame):
                self._backlog += frame[sent:]
                self._epoll.modify(self._sock, select.EPOLLIN | select.EPOLLOUT)

    def flush(self) -> None:
        """The socket is writable: complete the connection, send what waits. Main thread."""
        with self._lock:
            if not self._open:
                return
            if self._connecting:
                code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    self._failure = f"cannot connect to {self.peer_name}: {os.strerror(code)}"
                self._connecting = False
            if self._backlog and self._failure is None:
                try:
                    del self._backlog[: self._sock.send(self._backlog)]
                except BlockingIOError:
                    return
                except OSError as error:
                    self._failure = f"control socket: {error.strerror}"
            if self._failure is not None or not self._backlog:
                self._epoll.modify(self._sock, select.EPOLLIN)

    def receive(self) -> Received:
        closed = None
        for _ in range(_READS_PER_CALL):
            try:
                data, fds = self._read()
            except BlockingIOError:
                break
            except OSError as error:
                closed = self._failure or f"control socket: {error.strerror}"
                break
            self._parser.feed(data, fds)
            if not data:
                closed = "the peer closed the connection"
                break
        frames = []
        try:
            while (frame := self._parser.next_frame()) is not None:
                frames.append(frame)
        except ProtocolError as error:
            closed = str(error)
        return Received(frames, closed or self._failure)

    def close(self) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._epoll.unregister(self._sock)
            self._sock.close()
        close_fds(self._parser.take_fds())

    def _read(self) -> tuple[bytes, tuple[int, ...]]:
        if self.kind != "unix" or not self._parser.trusted:
            # Without room for ancillary data the kernel closes descriptors that a stranger tries to push.
            return self._sock.recv(_READ_BYTES), ()
        data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, socket.CMSG_LEN(MAX_FDS * _INT_BYTES))
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _INT_BYTES])
        return data, tuple(fds)


def _peer_name(sock: socket.socket, kind: str) -> str:
    if kind == "unix":
        return "unix socket"
    with contextlib.suppress(OSError):
        host, port = sock.getpeername()[:2]
        return f"{host}:{port}"
    return "tcp socket"
