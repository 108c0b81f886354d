"""What stands before the coordinator's calls: the token, and bounds on connections and bodies.

A stranger costs no thread: its token is looked at when its headers are there, before any message is waited for.
"""

from __future__ import annotations

import hmac
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from afd.telemetry.rare_log import RareLog

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 1 << 20
MAX_CONNECTIONS = 1024  # members have one each
MAX_STREAMS = 16  # calls at a time over one of them
HANDSHAKE_TIMEOUT_S = 5.0  # TLS and the first HTTP/2 frames
IDLE_TIMEOUT_S = 10.0  # of a connection without calls; who has more to ask connects again by itself
KEEPALIVE_S = 10.0
BODY_TIMEOUT_S = 2.0  # as long as a client waits for its answer
REFUSAL_LOG_INTERVAL_S = 5.0


def server_options() -> list[tuple[str, int]]:
    """Bounds that grpc itself keeps, before any of our code runs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Strangers must not take the last descriptor: members are there already, but a new one has yet to connect.
    max_connections = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)
    return [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.so_reuseport", 0),  # a second coordinator on the port is an error, not a silent split
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_S * 1e3)),
        ("grpc.max_connection_idle_ms", int(IDLE_TIMEOUT_S * 1e3)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),  # members ask, too
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1e3)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1e3)),
    ]


class TokenCheck(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call without the cluster's token, whatever its method, before its body. Any thread."""

    def __init__(self, token: str, clock: Callable[[], float]):
        self._expected = f"Bearer {token}".encode()
        self._news = RareLog(log, REFUSAL_LOG_INTERVAL_S, clock)  # a stranger cannot fill the log
        # A handler of streams is called before a message has come; one of single messages is not.
        self._refusal = grpc.stream_unary_rpc_method_handler(self._refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """The handler of a call that has begun (called by grpc, in its polling thread)."""
        sent = dict(details.invocation_metadata).get("authorization", "")
        if not hmac.compare_digest(str(sent).encode(), self._expected):
            return self._refusal
        return continuation(details)

    def _refuse(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        self._news.warn(f"refused a call from {context.peer()}: wrong or no secret")
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or no cluster secret")
        return b""  # not reached


class PendingBodies:
    """Calls whose message has not come yet; each holds a thread, so `cut_off` ends those that take too long."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._lock = threading.Lock()
        self._since: dict[grpc.ServicerContext, float] = {}

    @contextmanager
    def waiting(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Around the wait for a call's message."""
        with self._lock:
            self._since[context] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                del self._since[context]

    def cut_off(self) -> None:
        """Cancel the calls that have waited for BODY_TIMEOUT_S; call several times in that time."""
        limit = self._clock() - BODY_TIMEOUT_S
        with self._lock:
            late = [context for context, since in self._since.items() if since < limit]
        for context in late:
            context.cancel()
