"""The attention worker process: messages, views, steps. `afd.sched.core` decides, `engine.AttentionEngine` computes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial

from afd.attention.build import Parts, build
from afd.attention.gateway_link import GatewayLink
from afd.attention.metrics import AttentionMetrics
from afd.attention.report_repeater import ReportRepeater
from afd.config import ClusterConfig
from afd.errors import PeerLostError
from afd.membership.port import Announce, Join
from afd.messages.serving import to_worker_bytes
from afd.types import host_port
from afd.worker.process import WorkerProcess
from afd.worker.seat import IDLE_S, TURN_S, Seat
from stepmesh.types import Role

log = logging.getLogger(__name__)

MESSAGES_S = 0.02  # of each turn
PAUSE_S = 1.0  # from one turn to the next: a machine that was frozen, or one very long stage
SetReady = Callable[[bool, str], None]
Clock = Callable[[], float]


def run_attention_worker(
    config: ClusterConfig, secret: bytes, join: Join, stop: threading.Event, announce: Announce
) -> int:
    """Serve until `stop`, then drain. Returns the exit code; raises AfdError with one line for the user."""
    section = config.attention
    with ExitStack() as life:
        process = life.enter_context(closing(WorkerProcess(Role.ATTENTION, config, secret, join, stop, announce)))
        spec, endpoint = process.folder.spec, f"tcp://{host_port(section.host, section.port or '*')}"
        link = life.enter_context(closing(GatewayLink(secret, endpoint, to_worker_bytes(config, spec.max_context))))
        seat = process.take_seat(serving=f"tcp://{section.reachable(link.address)}")
        if seat is None:
            return 0
        life.enter_context(closing(seat))
        parts = build(config, process.folder, seat, link, process.progress(seat))
        life.enter_context(parts.resources)
        engine, admission = parts.engine, parts.core.admission
        AttentionMetrics(process.registry, engine, seat.mesh, admission, parts.latency, parts.recent)
        process.publish(seat, parts.health.fields, engine.stages.ring)
        announce({"loading": 1.0})
        log.info("attention/%d has loaded %s", seat.rank, spec.name)
        worker = AttentionWorker(parts, link, seat, partial(process.set_ready, seat))
        life.enter_context(closing(ReportRepeater(link, config.coordinator.stall_timeout_s)))
        process.run(partial(worker.run, stop, config.gateway.drain_s), parts.start_threads)
    return 0


class AttentionWorker:
    """The loop. Main thread only. set_ready: told every turn whether FFN workers can be reached, and why not."""

    def __init__(self, parts: Parts, link: GatewayLink, seat: Seat, set_ready: SetReady, clock: Clock = time.monotonic):
        self._parts = parts
        self._engine = parts.engine
        self._core = parts.core
        self._link = link
        self._seat = seat
        self._set_ready = set_ready
        self._clock = clock
        self._turned_at_s = clock()

    def run(self, stop: threading.Event, drain_s: float) -> None:
        """Serve until `stop`; then finish what runs, at most `drain_s` long; at once when declared lost: others have
        what ran here, and a successor waits for the place.
        """
        drain_until_s: float | None = None
        while drain_until_s is None or (self._clock() < drain_until_s and not self._engine.scheduler.idle):
            now = self._clock()
            if self._seat.membership.lost:
                return
            if drain_until_s is None and stop.is_set():
                drain_until_s = now + drain_s
                self._core.drain()
                self._seat.membership.set_draining(True)
            self.turn(now)
        self._publish()

    def turn(self, now: float) -> None:
        """Everything that is due, then steps for about TURN_S."""
        core, link, ffn = self._core, self._link, self._parts.ffn
        self._parts.health.num_turns += 1
        if now - self._turned_at_s > PAUSE_S:
            core.stood_still(now - self._turned_at_s)
        self._turned_at_s = now
        for news in ffn.tick(now):
            self._seat.membership.report_pair(*news)
        view = self._seat.new_view()
        if view is not None:
            core.adopt(view)
            ffn.adopt(view)
        for gateway, message in link.receive():
            core.receive(gateway, message, now)
            if self._clock() - now >= MESSAGES_S:
                break  # a flood of submissions: the running requests' next stage comes first
        core.set_ready(ffn.ready, ffn.down_reason, now)
        self._set_ready(core.ready, core.why_not_ready)
        core.tick(now)
        link.send(core.take_outbox())  # also what was asked for again, when nothing runs
        try:
            self._run_stages(now + TURN_S)
        except PeerLostError as error:
            self._engine.fail()
            core.interrupted(str(error), now)
            log.warning("%s; interrupted steps run again when it is back", error)
        if not core.has_news:  # else behind the next stage, with them
            core.report(now)
            link.send(core.take_outbox())

    def _run_stages(self, until_s: float) -> None:
        """Stage after stage, with nothing in between, while work is in flight; at least one.

        What a step brought is published after the first stage of the next one, whose rows the FFN then computes
        meanwhile; at once where other streams are in flight: theirs may take long, and the FFN has their rows.
        """
        engine, core, patience_s = self._engine, self._core, self._patience()
        while True:
            if engine.in_flight:
                self._publish()
            try:
                outputs = engine.run_once(0.0 if core.has_news else patience_s)
            finally:
                self._publish()
            core.committed(outputs)
            patience_s = min(patience_s, until_s - self._clock())
            if patience_s <= 0.0 or not engine.in_flight:
                break
        if engine.scheduler.idle:
            self._publish()
        if not core.has_news:  # else behind the next stage, with them
            engine.stages.deliver()

    def _publish(self) -> None:
        """Send what was committed, then learn from it: a token must not wait for either."""
        if self._core.has_news:
            self._core.publish()
            self._link.send(self._core.take_outbox())
            self._engine.stages.deliver()
            self._core.report(self._clock())
            self._link.send(self._core.take_outbox())

    def _patience(self) -> float:
        """How long the engine may block: not at all while gateway messages wait (their fd is edge-triggered)."""
        if self._link.has_input:
            return 0.0
        if not self._parts.ffn.wakes and self._engine.scheduler.idle and not self._engine.in_flight:
            self._link.wait(IDLE_S)
            return 0.0
        return IDLE_S
