"""A process's place in the cluster: side threads, one that registers and sends heartbeats, one that follows the view.

The coordinator may be started later, be away for minutes or be replaced: the thread goes on trying, and the last view
stays valid meanwhile. It ends by itself in two cases only, both reported through `on_fatal`: the coordinator refuses
this process for good (wrong secret, other model), or has declared it lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from afd.config import CoordinatorConfig
from afd.errors import CoordinatorError
from afd.membership.client import CoordinatorUnreachableError
from afd.membership.port import Announce, SyncFields, ViewCallback
from afd.messages.membership import (
    MAX_SILENT_EXPERTS,
    ClusterView,
    PairReport,
    RegisterReply,
    RegisterRequest,
    SyncReply,
    SyncRequest,
    WorkerInfo,
)

log = logging.getLogger(__name__)

GOODBYE_TIMEOUT_S = 0.5
NEWS_STEP = 0.02  # of loading progress
RETRY_S = 0.25
FOLLOW_AGAIN_S = 0.1


class MembershipLostError(CoordinatorError):
    """This process cannot be a member (any more), but a fresh one may join: it ends and is started again."""


class CoordinatorCalls(Protocol):
    """The part of CoordinatorClient that is used here (tests give a fake)."""

    @property
    def address(self) -> str: ...
    def register(self, request: RegisterRequest, *, timeout_s: float | None = None) -> RegisterReply: ...
    def sync(self, request: SyncRequest, *, timeout_s: float | None = None) -> SyncReply: ...
    def follow(self, incarnation: str) -> Iterator[ClusterView]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MembershipTiming:
    """Times of a member's calls, in seconds.

    conflict_patience_s: how long a rank that is still held by a predecessor is asked for again.
    """

    heartbeat_s: float = 0.25
    alive_s: float = 1.5
    register_timeout_s: float = 600.0
    conflict_patience_s: float = 10.0

    @classmethod
    def of(cls, config: CoordinatorConfig) -> MembershipTiming:
        """A predecessor is declared lost after `stall_timeout_s` at the latest: be patient for longer than that."""
        patience_s = config.stall_timeout_s + 2 * config.lost_after_s
        return cls(config.heartbeat_s, config.lost_after_s, config.register_timeout_s, patience_s)


class MembershipThread:
    """Implements `afd.membership.port.Membership`; owns the client. Start with `start()`.

    fields: read at each heartbeat, in the side thread.
    on_fatal: called once, in the side thread: MembershipLostError, or CoordinatorError when refused for good.
    announce: hears of loading and ready (the supervisor's progress line).
    """

    def __init__(
        self,
        client: CoordinatorCalls,
        info: WorkerInfo,
        fields: Callable[[], SyncFields],
        *,
        timing: MembershipTiming | None = None,
        on_fatal: Callable[[CoordinatorError], None] | None = None,
        announce: Announce | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._client = client
        self._fields = fields
        self._timing = timing if timing is not None else MembershipTiming()
        self._on_fatal = on_fatal
        self._announce = announce
        self._clock = clock
        self._delivery = threading.Lock()  # callbacks see views in order; taken before _changed, never inside it
        self._changed = threading.Condition()
        # all below is guarded by _changed
        self._info = info
        self._info_sent: WorkerInfo | None = None
        self._rank = -1
        self._view: ClusterView | None = None
        self._error: CoordinatorError | None = None
        self._ready = False
        self._loading = 0.0
        self._loading_told = -1.0
        self._draining = False
        self._broken: dict[str, str] = {}
        self._callbacks: list[ViewCallback] = []
        self._last_answer: float | None = None
        self._silent = False
        self._urgent = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._follower = threading.Thread(target=self._follow, name="membership-view", daemon=True)

    def start(self) -> MembershipThread:
        """Begin to register; returns at once."""
        self._thread.start()
        self._follower.start()
        return self

    # --- what the worker reads ----------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        with self._changed:
            return self._rank

    @property
    def coordinator_alive(self) -> bool:
        with self._changed:
            return self._last_answer is not None and self._clock() - self._last_answer <= self._timing.alive_s

    @property
    def lost(self) -> bool:
        with self._changed:
            return self._error is not None

    def view(self) -> ClusterView | None:
        with self._changed:
            return self._view

    # --- what the worker says -----------------------------------------------------------------------------

    def update_info(self, info: WorkerInfo) -> None:
        with self._changed:
            if (info.role, info.incarnation) != (self._info.role, self._info.incarnation):
                raise ValueError("role and incarnation of a member do not change")
            self._info = info
            self._wake()

    def set_ready(self, ready: bool) -> None:
        with self._changed:
            changed = ready != self._ready
            self._ready = ready
            self._loading = 1.0 if ready else self._loading
            self._wake()
        if changed and self._announce is not None:
            self._announce({"ready": ready})

    def set_loading(self, fraction: float) -> None:
        with self._changed:
            self._loading = min(max(fraction, 0.0), 1.0)
            news = abs(self._loading - self._loading_told) >= NEWS_STEP or self._loading in (0.0, 1.0)
            self._loading_told = self._loading if news else self._loading_told
        if news and self._announce is not None:
            self._announce({"loading": round(fraction, 3)})

    def set_draining(self, draining: bool) -> None:
        with self._changed:
            self._draining = draining
            self._wake()

    def report_pair(self, peer: str, broken: bool, reason: str = "") -> None:
        with self._changed:
            if broken:
                self._broken[peer] = reason
            else:
                self._broken.pop(peer, None)
            self._wake()

    def on_view(self, callback: ViewCallback) -> None:
        with self._delivery:
            with self._changed:
                self._callbacks.append(callback)
                view = self._view
            if view is not None:
                callback(view)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * GOODBYE_TIMEOUT_S)
            if self._thread.is_alive():  # a call is under way to a host that does not answer: cancel it
                self._client.close()
                self._thread.join(2 * GOODBYE_TIMEOUT_S)
        self._client.close()
        if self._follower.is_alive() and threading.current_thread() is not self._follower:
            self._follower.join(GOODBYE_TIMEOUT_S)

    def _wake(self) -> None:
        self._urgent = True
        self._changed.notify_all()

    # --- the side thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._register()
            while self._pause(self._timing.heartbeat_s):
                self._heartbeat()
            self._say_goodbye()
        except CoordinatorError as error:
            self._fail(error)
        except Exception as error:
            self._crash(error)

    def _pause(self, seconds: float) -> bool:
        """Wait for the next heartbeat or for urgent news; False when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._urgent or self._closing, seconds)
            self._urgent = False
            return not self._closing

    def _register(self) -> None:
        """Register until accepted or closing. CoordinatorError: refused for good, or nobody answers for too long."""
        started = self._clock()
        conflict_since: float | None = None
        waiting_logged = ""
        while True:
            with self._changed:
                if self._closing:
                    return
                info, view = self._info, self._view
                request = RegisterRequest(
                    msgspec.structs.replace(info, rank=self._rank if self._rank >= 0 else info.rank),
                    epoch_seen=view.epoch if view is not None else 0,
                    last_view=view,
                )
            now = self._clock()
            try:
                reply = self._client.register(request)
                if not reply.error:
                    self._accept(info, reply)
                    return
                conflict_since = now if conflict_since is None else conflict_since
                self._answered()
                if not reply.retry:
                    raise CoordinatorError(reply.error)
                if now - conflict_since > self._timing.conflict_patience_s:
                    raise MembershipLostError(reply.error)
                waiting_for = reply.error
            except CoordinatorUnreachableError as error:
                if view is None and now - started > self._timing.register_timeout_s:
                    raise MembershipLostError(str(error)) from error
                conflict_since = None
                waiting_for = str(error)
            if waiting_for != waiting_logged:
                log.info("not registered yet: %s", waiting_for)
                waiting_logged = waiting_for
            self._pause(RETRY_S)

    def _accept(self, info: WorkerInfo, reply: RegisterReply) -> None:
        with self._changed:
            again = self._info_sent is not None
            self._info_sent = info
            self._rank = reply.rank
            self._changed.notify_all()
        self._answered()
        log.log(
            logging.DEBUG if again else logging.INFO,
            "registered as %s/%d with the coordinator %s",
            info.role,
            reply.rank,
            self._client.address,
        )
        if reply.view is not None:
            self._take(reply.view)

    def _heartbeat(self) -> None:
        """One Sync (and a new registration where the addresses changed or the coordinator does not know us)."""
        with self._changed:
            stale = self._info is not self._info_sent
        if stale:
            self._register()
        try:
            reply = self._client.sync(self._sync_request(leaving=False))
        except CoordinatorUnreachableError as error:
            self._silence(error)
            return
        self._answered()
        if reply.lost:
            raise MembershipLostError(f"the coordinator declared this process lost: {reply.reason}")
        if not reply.known:
            log.warning("the coordinator does not know this process (restarted?); registering again")
            self._register()
        elif reply.view is not None:
            self._take(reply.view)

    def _sync_request(self, *, leaving: bool) -> SyncRequest:
        fields = self._fields()
        with self._changed:
            return SyncRequest(
                role=self._info.role,
                incarnation=self._info.incarnation,
                view_version=self._view.version if self._view is not None else 0,
                progress=fields.progress,
                pending=fields.pending,
                loading=self._loading,
                ready=self._ready,
                draining=self._draining,
                leaving=leaving,
                epoch_seen=self._view.epoch if self._view is not None else 0,
                stats=fields.stats,
                silent_experts=list(fields.silent_experts[:MAX_SILENT_EXPERTS]),
                costs=fields.costs,
                pairs=[PairReport(peer, broken=True, reason=reason) for peer, reason in self._broken.items()],
            )

    def _follow(self) -> None:
        """Take views as soon as they are published; where that fails, heartbeats bring them a little later."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._info_sent is not None or self._closing)
                if self._closing or self._error is not None:
                    return
                incarnation = self._info.incarnation
            try:
                for view in self._client.follow(incarnation):
                    self._take(view)
            except Exception as error:
                self._crash(error)
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing, FOLLOW_AGAIN_S)

    def _say_goodbye(self) -> None:
        with self._changed:
            registered = self._info_sent is not None
        if not registered:
            return
        try:
            self._client.sync(self._sync_request(leaving=True), timeout_s=GOODBYE_TIMEOUT_S)
        except CoordinatorError as error:
            log.debug("goodbye not delivered: %s", error)

    def _take(self, view: ClusterView) -> None:
        with self._delivery:
            with self._changed:
                known = self._view
                if known is not None and known.cluster_id == view.cluster_id and known.version >= view.version:
                    return
                self._view = view
                callbacks = list(self._callbacks)
                self._changed.notify_all()
            for callback in callbacks:
                callback(view)

    def _answered(self) -> None:
        with self._changed:
            self._last_answer = self._clock()
            was_silent, self._silent = self._silent, False
        if was_silent:
            log.info("the coordinator %s answers again", self._client.address)

    def _silence(self, error: CoordinatorUnreachableError) -> None:
        """A heartbeat without answer: say so once, as soon as it is more than a hiccup."""
        with self._changed:
            silent = self._last_answer is None or self._clock() - self._last_answer > self._timing.alive_s
            news = silent and not self._silent
            self._silent = silent
        if news:
            log.warning("%s; going on with the last plan", error)

    def _crash(self, error: Exception) -> None:
        """A callback's bug must not become a silent loss of membership."""
        log.exception("the membership thread failed")
        self._fail(MembershipLostError(f"the membership thread failed: {error!r}"))

    def _fail(self, error: CoordinatorError) -> None:
        with self._changed:
            if self._error is not None:
                return  # the other thread came first
            self._error = error
            self._changed.notify_all()
        if self._on_fatal is not None:
            self._on_fatal(error)
