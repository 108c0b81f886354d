"""The ROUTER socket over which gateways speak with an attention worker. What is said is `afd.sched.core`'s.

Nothing here blocks: a gateway that does not read loses messages, and asks for them again (`Resend`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zmq

from afd.errors import ConfigError
from afd.messages.codec import MessageError, encode
from afd.messages.serving import GatewayMessage, WorkerMessage, WorkerStats, gateway_message_decoder
from afd.messages.serving_sockets import bind, server_socket

log = logging.getLogger(__name__)

RECEIVE_BATCH = 256  # messages taken per call, so that a flood cannot starve the pipeline
LINGER_MS = 200  # for what was sent last


class GatewayLink:
    """Owns the socket. Main thread only, but for `repeat_reports`. ConfigError where it cannot be bound.

    endpoint: "tcp://host:port", port "*" = any.
    max_bytes: of one message.
    context: its I/O threads; None = one of its own.
    received_at, reported_at: when `receive` was called last, and when load reports were sent.
    """

    def __init__(
        self,
        secret: bytes,
        endpoint: str,
        max_bytes: int,
        *,
        context: zmq.Context[Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._lock = threading.Lock()  # a ZeroMQ socket may be used by one thread at a time
        self._reports: dict[bytes, bytes] = {}  # the newest of each gateway; replaced, never changed
        self.received_at = self.reported_at = clock()
        self._context = context or zmq.Context(io_threads=1)
        self._owns_context = context is None
        self._socket: zmq.Socket[Any] = server_socket(self._context, secret, max_bytes)
        try:
            bind(self._socket, endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"attention.port: cannot listen on {endpoint}: {error.strerror}") from error

    @property
    def address(self) -> str:
        """The endpoint where gateways connect: "tcp://host:port"."""
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    @property
    def fd(self) -> int:
        """Readable (edge-triggered) when `receive` may have something."""
        return int(self._socket.getsockopt(zmq.FD))

    @property
    def has_input(self) -> bool:
        """True when messages wait: must be asked before blocking on `fd`, which is edge-triggered."""
        with self._lock:
            return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Block until a message waits, at most `timeout_s`."""
        with self._lock:
            self._socket.poll(int(timeout_s * 1e3))

    def receive(self) -> Iterator[tuple[bytes, GatewayMessage]]:
        """Messages that wait, with their gateway, each taken when it is asked for. What is no message is logged."""
        self.received_at = self._clock()
        for _ in range(RECEIVE_BATCH):
            try:
                with self._lock:
                    frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 2:
                log.warning("dropped a message of %d frames from a gateway (expected 2)", len(frames))
                continue
            try:
                message = gateway_message_decoder.decode(frames[1])
            except MessageError as error:
                log.warning("dropped a frame of gateway %s: %s", frames[0].hex(), error)
                continue
            yield frames[0], message

    def send(self, messages: Iterable[tuple[bytes, WorkerMessage]]) -> None:
        """Send now. ZeroMQ drops what a gateway that has gone, or does not read, can no longer be sent."""
        reports: dict[bytes, bytes] = {}
        for gateway, message in messages:
            frame = encode(message)
            if isinstance(message, WorkerStats):
                reports[gateway] = frame
            self._send(gateway, frame)
        if reports:  # they come for all gateways at once
            self._reports, self.reported_at = reports, self._clock()

    def repeat_reports(self) -> None:
        """Send every gateway its newest load report once more. Any thread."""
        for gateway, frame in self._reports.items():
            self._send(gateway, frame)

    def _send(self, gateway: bytes, frame: bytes) -> None:
        with self._lock:
            self._socket.send_multipart([gateway, frame], zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close(linger=LINGER_MS)
        if self._owns_context:
            self._context.term()
