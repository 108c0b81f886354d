"""ZeroMQ links to the attention workers: one DEALER each. Carries messages, decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import zmq
import zmq.asyncio

from afd.messages.codec import MessageError, encode
from afd.messages.serving import GatewayMessage, WorkerMessage, worker_message_decoder
from afd.messages.serving_sockets import client_socket, connect
from afd.telemetry.rare_log import RareLog

log = logging.getLogger(__name__)

LAST_WORDS_MS = 200

OnMessage = Callable[[str, WorkerMessage], None]


@dataclass(slots=True)
class LinkCounters:
    """Messages that were dropped, cumulative, for /metrics: the protocol recovers, but that takes time."""

    unsent: int = 0
    unreadable: int = 0


class WorkerClient:
    """Implements the dispatcher's `WorkerPort`. Event-loop thread only; `close()` frees sockets and context.

    on_message: called with (worker key, message) for each message, in order per worker.
    """

    def __init__(self, secret: bytes, identity: bytes, on_message: OnMessage):
        self._secret = secret
        self._identity = identity
        self._on_message = on_message
        self._ctx = zmq.asyncio.Context()
        self._links: dict[str, tuple[zmq.asyncio.Socket, asyncio.Task[None]]] = {}
        self.counters = LinkCounters()
        self._news = RareLog(log)

    def connect(self, key: str, endpoint: str) -> None:
        """Open a link; the connection itself comes about (and back) in the background."""
        socket = client_socket(self._ctx, self._secret, self._identity)
        try:
            connect(socket, endpoint)
        except zmq.ZMQError as error:
            socket.close()
            log.error("attention worker %s published an endpoint that is none: %r (%s)", key, endpoint, error)
            return
        task = asyncio.get_running_loop().create_task(self._receive(key, socket), name=f"worker {key}")
        self._links[key] = (socket, task)

    def disconnect(self, key: str) -> None:
        """Close a link; unknown keys are ignored."""
        self._drop(key, linger_ms=0)

    def send(self, key: str, message: GatewayMessage) -> None:
        """Hand a message to ZeroMQ. Dropped, and counted, when there is no link or its queue is full."""
        link = self._links.get(key)
        if link is None:
            self.counters.unsent += 1
            return
        # With DONTWAIT the future is done on return.
        sent = cast("asyncio.Future[object]", link[0].send(encode(message), zmq.DONTWAIT))
        if sent.exception() is not None:
            self.counters.unsent += 1
            self._news.warn(f"message to attention worker {key} dropped: {sent.exception()}")

    async def close(self) -> None:
        """Close all links and the context; last words (aborts) get a moment to leave."""
        tasks = [task for _, task in self._links.values()]
        for key in list(self._links):
            self._drop(key, linger_ms=LAST_WORDS_MS)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._ctx.term()

    def _drop(self, key: str, linger_ms: int) -> None:
        link = self._links.pop(key, None)
        if link is not None:
            socket, task = link
            task.cancel()
            socket.close(linger=linger_ms)

    async def _receive(self, key: str, socket: zmq.asyncio.Socket) -> None:
        while True:
            frame = await socket.recv()
            try:
                message = worker_message_decoder.decode(frame)
            except MessageError as error:
                self.counters.unreadable += 1
                self._news.warn(f"attention worker {key} sent a message that is dropped: {error}")
                continue
            try:
                self._on_message(key, message)
            except Exception:  # a bug of ours must not end the link that all requests of this worker share
                log.exception("handling a message of attention worker %s failed", key)
