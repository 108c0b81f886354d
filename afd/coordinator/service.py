"""gRPC shell around the coordinator's state: authenticates, decodes, locks, answers. Decides nothing.

Generic handlers with msgpack bodies (no generated code): service "afd.Coordinator", methods Register, Sync, Status,
Control, and Follow, which stays open and sends every view. Every call needs the cluster's bearer token (`door`); a
stranger gets UNAUTHENTICATED and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, TypeVar

import grpc
import msgspec

from afd.config import ClusterConfig
from afd.coordinator.door import PendingBodies, TokenCheck, server_options
from afd.coordinator.members import Entry, Timing
from afd.coordinator.metrics import CoordinatorMetrics
from afd.coordinator.plan import PlanRules
from afd.coordinator.state import Action, ClusterSpec, CoordinatorState, Log, Lost, Published, Stop
from afd.errors import ConfigError
from afd.membership.client import SERVICE
from afd.membership.port import Announce
from afd.membership.tls import server_credentials
from afd.messages.codec import Decoder, MessageError, encode
from afd.messages.keys import grpc_token
from afd.messages.membership import (
    ClusterView,
    control_request_decoder,
    follow_request_decoder,
    register_request_decoder,
    status_request_decoder,
    sync_request_decoder,
)
from afd.telemetry.exposition import MetricsServer, process_registry

log = logging.getLogger(__name__)

NUM_THREADS = 16  # each call holds the lock for microseconds, and its thread until its message is there
MAX_FOLLOWERS = 512  # each holds a thread as well, which sleeps
MAX_CONCURRENT_CALLS = 2 * MAX_FOLLOWERS
LOOK_S = 1.0  # a follower that has gone without a word is let go of after so long at the latest
TICK_S = 0.1
_T = TypeVar("_T")


class CoordinatorServer:
    """The state behind a gRPC port. Thread-safe; `step` belongs to one owner thread."""

    def __init__(
        self,
        state: CoordinatorState,
        *,
        address: str,
        token: str,
        clock: Callable[[], float] = time.monotonic,
        metrics: CoordinatorMetrics | None = None,
        credentials: grpc.ServerCredentials | None = None,
        on_lost: Callable[[str], None] = lambda incarnation: None,
    ):
        """on_lost: told of each member that is declared lost, by `step`."""
        self._state = state
        self._on_lost = on_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)  # notified when the view has changed, or a follower has gone
        self._num_followers = 0
        self._told = state.view  # the view that followers have been woken for
        self._closing = False
        self._metrics = metrics
        self._bodies = PendingBodies(clock)
        self._pool = futures.ThreadPoolExecutor(NUM_THREADS + MAX_FOLLOWERS, thread_name_prefix="coordinator")
        self._server = grpc.server(
            self._pool,
            interceptors=[TokenCheck(token, clock)],
            options=server_options(),
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        host = address.rpartition(":")[0]
        try:
            if credentials is not None:
                port = self._server.add_secure_port(address, credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"the coordinator cannot listen on {address}: the port is in use or not ours") from error
        self.address = f"{host}:{port}"

    def start(self) -> None:
        """Answer calls from now on."""
        self._server.start()

    def step(self) -> bool:
        """Let time pass in the state and do what it asks for; False once the cluster has been shut down."""
        self._bodies.cut_off()
        with self._lock:
            self._state.tick(self._clock())
            self._wake_followers()
            actions = self._state.take_actions()
        stops = [self._perform(action) for action in actions]
        return not any(stops)

    def ended(self, incarnation: str, how: str) -> None:
        """Who started this member saw its process end."""
        with self._lock:
            self._state.ended(incarnation, how, self._clock())
            self._wake_followers()

    def close(self) -> None:
        """Refuse new calls, let those under way finish (0.1 s)."""
        with self._lock:
            self._closing = True
            self._news.notify_all()
        self._server.stop(grace=0.1).wait(1.0)
        self._pool.shutdown(cancel_futures=True)

    def _handlers(self) -> dict[str, Any]:
        state = self._state
        return {
            "Register": self._method(register_request_decoder, state.register),
            "Sync": self._method(sync_request_decoder, state.sync),
            "Status": self._method(status_request_decoder, lambda _, now: state.status(now)),
            "Control": self._method(control_request_decoder, state.control),
            "Follow": grpc.stream_stream_rpc_method_handler(self._follow),
        }

    def _method(self, decoder: Decoder[_T], act: Callable[[_T, float], msgspec.Struct]) -> Any:
        def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            request = self._receive(decoder, messages, context)
            with self._lock:
                reply = act(request, self._clock())
                self._wake_followers()
            return encode(reply)

        # The client sends one message and knows no difference; here its absence can be noticed.
        return grpc.stream_unary_rpc_method_handler(handle)

    def _receive(self, decoder: Decoder[_T], messages: Iterator[bytes], context: grpc.ServicerContext) -> _T:
        with self._bodies.waiting(context):
            body = next(messages, None)
        try:
            return decoder.decode(body if body is not None else b"")
        except MessageError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    def _follow(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The views as they change, for as long as the member's connection lives; nothing for who is no member."""
        incarnation = self._receive(follow_request_decoder, messages, context).incarnation
        with self._lock:
            entry = self._state.follow(incarnation, self._clock()) if self._num_followers < MAX_FOLLOWERS else None
            if entry is None:
                return
            self._num_followers += 1
        try:
            context.add_callback(self._wake_all)
            view = None
            while (view := self._newer_view(view, entry, context)) is not None:
                yield encode(view)
        finally:
            with self._lock:
                self._num_followers -= 1
                if not self._closing:
                    self._state.unfollow(entry, self._clock())

    def _newer_view(self, seen: ClusterView | None, entry: Entry, context: grpc.ServicerContext) -> ClusterView | None:
        """The view as soon as it is another one than `seen`; None when there is nobody to tell any more."""
        with self._lock:
            while context.is_active() and not self._closing and self._state.is_member(entry):
                if self._state.view is not seen:
                    return self._state.view
                self._news.wait(LOOK_S)
        return None

    def _wake_all(self) -> None:
        with self._lock:
            self._news.notify_all()

    def _wake_followers(self) -> None:
        """Have the view sent, if it has changed. Under the lock."""
        if self._state.view is not self._told:
            self._told = self._state.view
            self._news.notify_all()

    def _perform(self, action: Action) -> bool:
        """Do what the state asks; True when it asks to stop."""
        match action:
            case Log(level, text):
                log.log(level, "%s", text)
            case Published(view):
                if self._metrics is not None:
                    self._metrics.published(view)
            case Lost(role, incarnation):
                if self._metrics is not None:
                    self._metrics.lost(role)
                self._on_lost(incarnation)
            case Stop():
                return True
        return False


def run_coordinator(
    config: ClusterConfig,
    secret: bytes,
    stop: threading.Event,
    announce: Announce,
    on_ended: Callable[[Callable[[str, str], None]], None] = lambda tell: None,
) -> int:
    """The coordinator's process: serve until `stop` is set or the cluster was shut down; returns the exit code.

    on_ended: told whom to tell of members whose processes have ended (incarnation, how), by who started them.
    """
    timing = Timing.of(config.coordinator, config.gateway.drain_s)
    spec = ClusterSpec(
        topology=config.topology,
        model=config.model.served_name or config.model.name,
        ffn_parallel=config.cluster.ffn_parallel,
        rules=PlanRules.of(config),
        num_standby=config.cluster.standby_ffn,
    )
    state = CoordinatorState(spec, timing, cluster_id=uuid.uuid4().hex, now=time.monotonic())
    registry = process_registry("coordinator")
    server = CoordinatorServer(
        state,
        address=config.coordinator.address,
        token=grpc_token(secret),
        metrics=CoordinatorMetrics(registry),
        credentials=server_credentials(config.coordinator),
        on_lost=lambda incarnation: announce({"lost": incarnation}),
    )
    host = server.address.rpartition(":")[0]
    try:
        metrics = MetricsServer(host, config.coordinator.metrics_port, registry, lambda: (True, ""))
        try:
            server.start()
            on_ended(server.ended)
            tls = " with TLS" if config.coordinator.tls_cert_file else ""
            log.info("coordinator listens on %s%s (metrics on %s)", server.address, tls, metrics.address)
            announce({"address": server.address, "metrics": metrics.address})
            interval_s = min(TICK_S, timing.lost_after_s / 4)
            while server.step() and not stop.wait(interval_s):
                pass
            server.step()  # what happened since the last tick is still told
        finally:
            metrics.close()
    finally:
        server.close()
    return 0
