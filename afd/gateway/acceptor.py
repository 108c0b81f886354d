"""Accepting connections, no more than there is room for, and never silently less.

The event loop's own server closes what it cannot accept without a word; here it waits in the kernel's backlog.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from afd.gateway.connections import Connections
from afd.telemetry.rare_log import RareLog

log = logging.getLogger(__name__)

ACCEPTS_AT_ONCE = 64
RETRY_S = 0.5


class Acceptor:
    """Accepts from `listener` while it is open. Event loop thread only."""

    def __init__(
        self, listener: socket.socket, connections: Connections, new_protocol: Callable[[], asyncio.BaseProtocol]
    ):
        self._listener = listener
        self._connections = connections
        self._new_protocol = new_protocol
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._news = RareLog(log)
        connections.on_room = self._listen
        self._listen()

    async def close(self) -> None:
        """Accept nothing more; the listener is the caller's to close."""
        self._connections.on_room = lambda: None
        self._loop.remove_reader(self._listener)
        if self._retry is not None:
            self._retry.cancel()
        if self._opening:
            await asyncio.wait(self._opening)

    def _listen(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            if not self._connections.has_room(len(self._opening)):
                self._wait(self._connections.make_room())
                self._news.warn(
                    f"{self._connections.limit} connections are open, the limit (gateway.max_connections): each "
                    "new one takes the place of the one that has kept us waiting longest, or waits for a place"
                )
                return
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors, no memory
                self._wait(RETRY_S)
                self._news.warn(f"cannot accept a connection: {error.strerror}; trying again in {RETRY_S} s")
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._open(sock))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _wait(self, limit_s: float | None) -> None:
        """Leave newcomers in the backlog until `on_room`, or for so long."""
        self._loop.remove_reader(self._listener)
        if limit_s is not None:
            self._retry = self._loop.call_later(limit_s, self._listen)

    async def _open(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._new_protocol, sock)
        except OSError as error:
            sock.close()
            self._news.warn(f"lost a connection while it was accepted: {error}")
