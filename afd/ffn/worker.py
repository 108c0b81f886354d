"""The FFN worker process: views and batches in turn. What it computes is `engine.FFNEngine`'s."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, closing
from functools import partial

from afd.config import ClusterConfig
from afd.ffn.build import Parts, build, load_shard
from afd.ffn.epochs import EpochFollower
from afd.ffn.expert_watch import ExpertWatch
from afd.ffn.metrics import FFNMetrics
from afd.membership.port import Announce, Join, SyncFields
from afd.model.halves import FFNHalf
from afd.worker.process import WorkerProcess
from afd.worker.seat import IDLE_S, TURN_S, Seat
from stepmesh.types import Role

log = logging.getLogger(__name__)


def run_ffn_worker(config: ClusterConfig, secret: bytes, join: Join, stop: threading.Event, announce: Announce) -> int:
    """Serve until `stop`. Returns the exit code; raises AfdError with one line for the user."""
    with ExitStack() as life:
        process = life.enter_context(closing(WorkerProcess(Role.FFN, config, secret, join, stop, announce)))
        spec = process.folder.spec
        shelf: dict[int, FFNHalf] = {}

        def load_all(seat: Seat) -> None:
            for rank in range(config.topology.num_ffn):
                shelf[rank] = load_shard(config, process.folder, rank, process.progress(seat))
            announce({"ready": True})

        seat = process.take_seat(on_standby=load_all)
        if seat is None:
            return 0
        life.enter_context(closing(seat))
        half = shelf.pop(seat.rank, None) or load_shard(config, process.folder, seat.rank, process.progress(seat))
        shelf.clear()
        parts = build(config, process.folder, seat, half)
        life.enter_context(parts.resources)
        FFNMetrics(process.registry, parts.engine, parts.mesh, parts.recent)
        worker, shard = FfnWorker(parts, seat), parts.shard
        process.publish(seat, worker.fields, parts.engine.ring)
        log.info("ffn/%d has loaded its shard of %d of %s (%s)", seat.rank, shard.num_ranks, spec.name, shard.parallel)
        process.set_ready(seat, True)
        announce({"ready": True})
        process.run(partial(worker.run, stop), parts.start_threads)
    return 0


class FfnWorker:
    """The loop. Main thread only, but for `fields`."""

    def __init__(self, parts: Parts, seat: Seat):
        self._parts = parts
        self._engine = parts.engine
        self._mesh = parts.mesh
        self._seat = seat
        self._watch = ExpertWatch()
        self._epochs = EpochFollower(parts.mesh, parts.mesh.config.exchange_timeout_s)
        self._num_turns = 0

    def run(self, stop: threading.Event) -> None:
        """New views, dispatches, answers, until `stop`."""
        while not stop.is_set():
            self.turn()

    def turn(self) -> None:
        """What is due, then batches for about TURN_S."""
        self._num_turns += 1
        view = self._seat.new_view()
        if view is not None:
            self._engine.gangs.limit_window(view.plan.gang_window_s)
            self._epochs.adopt(view, time.monotonic())
        self._epochs.tick(time.monotonic())
        self._mesh.tick()
        until_s, patience_s = time.monotonic() + TURN_S, IDLE_S
        while patience_s > 0.0:
            self._engine.run_once(patience_s)
            patience_s = until_s - time.monotonic()
        self._warn_of_silent_experts(time.monotonic())

    def fields(self) -> SyncFields:
        """What the next heartbeat says of this worker. Any thread."""
        totals, recent = self._engine.totals, self._parts.recent.look()
        return SyncFields(
            progress=self._num_turns,
            pending=self._engine.gangs.under_way,
            stats={
                "busy_s": totals.busy_s,
                "wait_s": totals.wait_s,
                "batches": float(totals.num_batches),
                "tokens": float(totals.num_tokens),
                "gang_size": recent.gang_size,
                "bubble": recent.bubble,
                "straggler": max(recent.stragglers.values(), default=0.0),
            },
            silent_experts=self._watch.found,
        )

    def _warn_of_silent_experts(self, now: float) -> None:
        for layer, expert in self._watch.look(self._engine.expert_loads(), now):
            log.warning(
                "layer %d: expert %d receives tokens but its output is negligible compared with the layer's other "
                "experts; check the checkpoint with `afd inspect`",
                layer,
                expert,
            )
