"""The real world of a rank: monotonic time, sockets, epoll, an eventfd as bell, threads; shm, verbs, tcp channels."""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable

from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError, TransportError
from stepmesh.repeats import Repeats
from stepmesh.transports.base import Channel, ChannelSpec, Fabric, Link, Wakeups
from stepmesh.transports.names import GetAddrInfo, NameResolver
from stepmesh.transports.shm import ShmChannel, unsupported_reason
from stepmesh.transports.sockets import SocketLink, dial_tcp, dial_unix, listen_tcp, listen_unix
from stepmesh.transports.tcp import TcpChannel, TcpIo
from stepmesh.transports.verbs.base import Verbs
from stepmesh.transports.verbs.endpoint import VerbsEndpoint, open_endpoint
from stepmesh.types import Address, Role
from stepmesh.wire import ATTACH_MAGIC, MAC_BYTES

log = logging.getLogger("stepmesh")

_TOKEN_BYTES = len(ATTACH_MAGIC) + MAC_BYTES
_CONTROLLED_OVER_TCP = {"tcp", "verbs"}  # transports whose control link may be a TCP connection
_ACCEPT_PAUSE_S = 1.0  # after running out of descriptors: accepting again at once would only spin


class HostFabric(Fabric):
    """Used by every rank that runs for real. Raises ConfigError when the forced transport cannot work here.

    `verbs`: another way to speak verbs than this machine's pyverbs; `getaddrinfo`: another way to resolve names. For
    tests.
    """

    waits = True

    def __init__(
        self, config: MeshConfig, verbs: Verbs | None = None, getaddrinfo: GetAddrInfo = socket.getaddrinfo
    ) -> None:
        if not hasattr(select, "epoll") or not hasattr(os, "eventfd"):
            raise ConfigError("stepmesh's sockets need Linux (epoll, eventfd); inproc runs everywhere")
        self._config = config
        self._transports, self._rdma = _offered(config, verbs)
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        if self._rdma is not None:
            self._epoll.register(self._rdma.event_fd, select.EPOLLIN)
        self._woken = False
        self._links: dict[int, SocketLink] = {}
        self._watched: set[int] = set()
        self._io: TcpIo | None = None
        self._listeners: dict[int, socket.socket] = {}
        self._paused_until: float | None = None
        self._newcomers: dict[int, _Newcomer] = {}
        self._awaiting_data: list[TcpChannel] = []
        self._periodic: list[_Periodic] = []
        self._repeats = Repeats()
        self._names = NameResolver(config.connect_timeout_s, self._ring_if_open, getaddrinfo=getaddrinfo)
        self._open = True
        self._open_lock = threading.Lock()  # wake() may come from any thread while the main thread closes
        try:
            self.address = self._listen()
        except TransportError:
            self.close()
            raise

    now = staticmethod(time.monotonic)

    def nonce(self, num_bytes: int) -> bytes:
        return secrets.token_bytes(num_bytes)

    @property
    def transports(self) -> tuple[str, ...]:
        return self._transports

    @property
    def rdma(self) -> VerbsEndpoint | None:
        """This rank's RDMA port, if it offers verbs."""
        return self._rdma

    def connect(self, address: Address) -> Link | None:
        unreachable = "the peer listens on no UNIX socket"
        if "shm" in self._transports and address.unix:
            try:
                return self._track(SocketLink(dial_unix(address), self._epoll))
            except TransportError as error:
                unreachable = str(error)
        if not _CONTROLLED_OVER_TCP & {*self._transports}:
            raise TransportError(f"transport 'shm' is forced, but {unreachable}")
        if not address.port:
            raise TransportError(f"the peer listens on no TCP port ({unreachable})")
        endpoint = self._names.look_up(address.host, address.port)
        return None if endpoint is None else self._track(SocketLink(dial_tcp(endpoint), self._epoll, connecting=True))

    def open_channel(self, transport: str, spec: ChannelSpec, link: Link) -> Channel:
        if transport == "shm":
            return ShmChannel(spec, self._bell, self._epoll.fileno())
        if transport == "verbs" and self._rdma is not None:
            return self._rdma.open_channel(spec)
        if transport != "tcp" or "tcp" not in self._transports:
            raise TransportError(f"transport {transport!r} does not exist here")
        if self._io is None:
            self._io = TcpIo(str(self._config.id), self._epoll, self._ring)
        token = ATTACH_MAGIC + hmac.digest(spec.session_secret, b"data connection", "sha256")
        if self._config.id.role is Role.ATTENTION:
            dial = _data_dialler(link)
            return TcpChannel(spec, self._io, token, dial)
        channel = TcpChannel(spec, self._io, token, None)
        self._awaiting_data = [*(other for other in self._awaiting_data if other.expected), channel]
        return channel

    def collect(self) -> None:
        if self._io is not None:
            self._io.collect()

    def leave(self) -> None:
        if self._io is not None:
            self._io.leave()

    def wait(self, timeout_s: float) -> Wakeups:
        wakeups = Wakeups()
        self._resume_accepting()
        if self._woken:  # the bell may have rung for native code that slept on a lane
            timeout_s = 0.0
        if self._rdma is not None and (self._rdma.arm() if timeout_s > 0.0 else self._rdma.drain()):
            timeout_s = 0.0
        for fd, mask in self._epoll.poll(timeout_s):
            if fd == self._bell:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
            elif (link := self._links.get(fd)) is not None and link.fileno() == fd:
                if mask & select.EPOLLOUT:
                    link.flush()
                wakeups.readable.append(link)
            elif self._io is not None and fd == self._io.data_fd:
                self._io.collect(patiently=True)
            elif self._rdma is not None and fd == self._rdma.event_fd:
                self._rdma.ring()
            elif fd in self._watched:
                wakeups.external = True
            elif (listener := self._listeners.get(fd)) is not None:
                self._accept(listener, wakeups)
            elif (newcomer := self._newcomers.get(fd)) is not None:
                self._greet(newcomer, wakeups)
        if self._woken:
            self._woken = False
            wakeups.external = True
        return wakeups

    def every(self, interval_s: float, call: Callable[[], None]) -> None:
        self._periodic.append(_Periodic(f"stepmesh-beat {self._config.id}", interval_s, call))

    def watch(self, fd: int) -> None:
        if fd not in self._watched:
            self._epoll.register(fd, select.EPOLLIN)
            self._watched.add(fd)

    def unwatch(self, fd: int) -> None:
        if fd in self._watched:
            self._watched.discard(fd)
            # The owner may have closed it already, which takes it out of the epoll.
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def wake(self) -> None:
        self._woken = True
        self._ring_if_open()

    def close(self) -> None:
        with self._open_lock:
            if not self._open:
                return
            self._open = False
        for periodic in self._periodic:
            periodic.stop()
        if self._io is not None:
            self._io.close()
        for newcomer in list(self._newcomers.values()):
            self._dismiss(newcomer)
        for listener in self._listeners.values():
            listener.close()
        if self._rdma is not None:
            self._rdma.close()
        self._epoll.close()
        os.close(self._bell)

    def _listen(self) -> Address:
        """FFN ranks listen; attention ranks only connect, and leave no port open."""
        host = self._config.advertise_host or self._config.listen_host
        if self._config.id.role is not Role.FFN:
            return Address("", host, 0)
        unix, port = "", 0
        if "shm" in self._transports:
            unix = f"stepmesh-{secrets.token_hex(16)}"
            self._add_listener(listen_unix(unix))
        if _CONTROLLED_OVER_TCP & {*self._transports}:
            listener = listen_tcp(self._config.listen_host, self._config.listen_port)
            self._add_listener(listener)
            port = listener.getsockname()[1]
        return Address(unix, host, port)

    def _add_listener(self, listener: socket.socket) -> None:
        self._listeners[listener.fileno()] = listener
        self._epoll.register(listener, select.EPOLLIN)

    def _track(self, link: SocketLink) -> SocketLink:
        self._links = {fd: other for fd, other in self._links.items() if other.fileno() == fd}
        self._links[link.fileno()] = link
        return link

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it rings already
            os.eventfd_write(self._bell, 1)

    def _ring_if_open(self) -> None:  # any thread
        with self._open_lock:
            if self._open:
                self._ring()

    def _accept(self, listener: socket.socket, wakeups: Wakeups) -> None:
        for _ in range(self._config.max_pending):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting(error)
                return
            sock.setblocking(False)
            if sock.family == socket.AF_UNIX:
                wakeups.accepted.append(self._track(SocketLink(sock, self._epoll)))
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self._newcomers) >= self._config.max_pending:
                self._dismiss(next(iter(self._newcomers.values())))
            self._newcomers[sock.fileno()] = _Newcomer(sock, self.now())
            self._epoll.register(sock, select.EPOLLIN)

    def _greet(self, newcomer: _Newcomer, wakeups: Wakeups) -> None:
        """Tell by its first bytes whether a TCP connection is a control link or a pair's data connection."""
        if not newcomer.read():
            self._dismiss(newcomer)
        elif not newcomer.seen.startswith(ATTACH_MAGIC[: len(newcomer.seen)]):
            sock = self._forget(newcomer)
            wakeups.accepted.append(self._track(SocketLink(sock, self._epoll, initial=bytes(newcomer.seen))))
        elif len(newcomer.seen) == _TOKEN_BYTES:
            sock = self._forget(newcomer)
            for channel in self._awaiting_data:
                if channel.expected and hmac.compare_digest(channel.token, newcomer.seen):
                    channel.adopt(sock)
                    self._ring()  # the mesh looks whether a handshake can be completed
                    return
            wakeups.num_turned_away += 1
            self._turn_away(sock)

    def _turn_away(self, sock: socket.socket) -> None:
        """A data connection whose token is nobody's: a stranger's, or one that comes too late."""
        reason = "a data connection that belongs to no session"
        level = logging.WARNING if self._repeats.is_news("", reason, self.now()) else logging.DEBUG
        log.log(level, "%s: closed %s", self._config.id, reason)
        sock.close()

    def _forget(self, newcomer: _Newcomer) -> socket.socket:
        del self._newcomers[newcomer.sock.fileno()]
        self._epoll.unregister(newcomer.sock)
        return newcomer.sock

    def _dismiss(self, newcomer: _Newcomer) -> None:
        self._forget(newcomer).close()

    def _pause_accepting(self, error: OSError) -> None:
        log.error(
            "%s: cannot accept connections: %s; trying again in %.0f s",
            self._config.id,
            error.strerror,
            _ACCEPT_PAUSE_S,
        )
        self._paused_until = self.now() + _ACCEPT_PAUSE_S
        for fd in self._listeners:
            self._epoll.modify(fd, 0)

    def _resume_accepting(self) -> None:
        if self._paused_until is not None and self.now() >= self._paused_until:
            self._paused_until = None
            for fd in self._listeners:
                self._epoll.modify(fd, select.EPOLLIN)
        if self._newcomers:
            limit = self.now() - self._config.connect_timeout_s
            for newcomer in [n for n in self._newcomers.values() if n.since < limit]:
                self._dismiss(newcomer)


class _Newcomer:
    """A TCP connection that has not yet said what it is."""

    def __init__(self, sock: socket.socket, since: float) -> None:
        self.sock = sock
        self.since = since
        self.seen = bytearray()

    def read(self) -> bool:
        """Read on, never past what tells the two kinds apart or past the token. False: closed."""
        while True:
            wanted = (len(ATTACH_MAGIC) if len(self.seen) < len(ATTACH_MAGIC) else _TOKEN_BYTES) - len(self.seen)
            if wanted == 0 or not self.seen.startswith(ATTACH_MAGIC[: len(self.seen)]):
                return True
            try:
                data = self.sock.recv(wanted)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.seen += data


class _Periodic:
    """A thread that calls back at a steady pace until stopped."""

    def __init__(self, name: str, interval_s: float, call: Callable[[], None]) -> None:
        self._stopped = threading.Event()
        self._interval_s = interval_s
        self._call = call
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._call()


def _offered(config: MeshConfig, verbs: Verbs | None) -> tuple[tuple[str, ...], VerbsEndpoint | None]:
    """Transports in order of preference, and the RDMA port if verbs is among them."""
    if config.id.role is Role.FFN and not config.advertise_host and config.listen_host in ("0.0.0.0", "::", ""):
        raise ConfigError(f"listen_host {config.listen_host!r} is no address to connect to: set advertise_host")
    if config.transport == "inproc":
        raise ConfigError("transport 'inproc' needs an InprocNetwork's fabric: Mesh(config, network.fabric(config))")
    if config.transport == "tcp":
        return ("tcp",), None
    missing = unsupported_reason()
    if config.transport == "shm":
        if missing:
            raise ConfigError(f"transport 'shm' is forced: {missing}")
        return ("shm",), None
    offered, absent, rdma = ["tcp"], [], None
    try:
        rdma = open_endpoint(config, verbs)
        offered.insert(0, "verbs")
    except TransportError as error:
        if config.transport == "verbs":
            raise ConfigError(f"transport 'verbs' is forced: {error}") from error
        absent.append(f"verbs: {error}")
    if config.transport == "verbs":
        return ("verbs",), rdma
    if missing:
        absent.append(missing)
    else:
        offered.insert(0, "shm")
    if absent:
        log.info("%s: offers %s; not %s", config.id, ", ".join(offered), "; not ".join(absent))
    return tuple(offered), rdma


def _data_dialler(link: Link) -> Callable[[], socket.socket]:
    """The data connection goes where the control link goes."""
    if not isinstance(link, SocketLink) or link.kind != "tcp":
        raise TransportError(f"tcp needs a control link over TCP, this one is {link.kind}")
    endpoint = link.peer_endpoint()
    return lambda: dial_tcp(endpoint)
