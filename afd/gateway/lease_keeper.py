"""Leases of the running requests, renewed by a thread: a busy event loop must not have its requests thrown away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import zmq

from afd.messages.codec import encode
from afd.messages.serving import Lease, lease_identity
from afd.messages.serving_sockets import client_socket, connect

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
MAX_BUSY_S = 30.0  # an event loop that is stuck for longer serves nobody: its requests are given up


class LeaseKeeper:
    """One thread, one connection to each worker. `follow` and `beat`: from any thread.  `close` ends it."""

    def __init__(self, secret: bytes, gateway_id: str, lease_s: float):
        self._secret = secret
        self._identity = lease_identity(gateway_id)
        self._message = encode(Lease(gateway_id, lease_s))
        self._endpoints: dict[str, str] = {}
        self._beaten_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def follow(self, endpoints: Mapping[str, str]) -> None:
        """The workers from now on: endpoint by key."""
        self._endpoints = dict(endpoints)

    def beat(self) -> None:
        """The event loop is alive."""
        self._beaten_at = time.monotonic()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        sockets: dict[tuple[str, str], zmq.Socket[bytes]] = {}
        with zmq.Context() as context:
            while not self._stop.is_set():
                self._connect(context, sockets)
                if time.monotonic() - self._beaten_at <= MAX_BUSY_S:
                    for socket in sockets.values():
                        try:
                            socket.send(self._message, zmq.DONTWAIT)
                        except zmq.ZMQError as error:  # its queue is full: it is away
                            log.debug("a lease was not sent: %s", error)
                self._stop.wait(INTERVAL_S)
            for socket in sockets.values():
                socket.close(linger=0)

    def _connect(
        self, context: zmq.Context[zmq.Socket[bytes]], sockets: dict[tuple[str, str], zmq.Socket[bytes]]
    ) -> None:
        wanted = set(self._endpoints.items())
        for gone in sockets.keys() - wanted:
            sockets.pop(gone).close(linger=0)
        for key, endpoint in wanted - sockets.keys():
            socket = client_socket(context, self._secret, self._identity)
            try:
                connect(socket, endpoint)
            except zmq.ZMQError:  # the link for requests says so
                socket.close(linger=0)
            else:
                sockets[(key, endpoint)] = socket
