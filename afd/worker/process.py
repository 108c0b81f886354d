"""The frame of a worker's process, for both roles: metrics and probes, the seat in the cluster, readiness, main loop.

Side threads read what the frame publishes (heartbeats, /readyz, /trace, /metrics). Nothing is published before it is
whole: what they read is one reference, which is replaced.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable

import torch

from afd.config import ClusterConfig
from afd.membership.port import Announce, Join, SyncFields
from afd.messages.keys import trace_token
from afd.messages.membership import WorkerInfo
from afd.model.loading import resolve_model
from afd.ops.select import check_device
from afd.telemetry.exposition import MetricsServer, process_registry
from afd.telemetry.ring import TracePage, TraceRing
from afd.worker.data_plane import config_hash, payload_layout
from afd.worker.seat import Seat, take_seat
from stepmesh.types import Role

log = logging.getLogger(__name__)

StartThreads = Callable[[str], None]
"""Starts the threads that compute, on these cores."""
Progress = Callable[[int, int], None]
"""Told how many of how many tensors of the model have been read."""


class WorkerProcess:
    """What a worker has before it has a seat, and how it takes one and serves. Main thread only; close it at the end.

    role: attention or FFN.
    stop: set when the process is to end.
    announce: news for the supervisor.
    """

    def __init__(
        self, role: Role, config: ClusterConfig, secret: bytes, join: Join, stop: threading.Event, announce: Announce
    ):
        section = config.attention if role is Role.ATTENTION else config.ffn
        check_device(section.device, f"{role.value}.device")
        self.folder = resolve_model(config.model.name)
        self.registry = process_registry(role.value)
        self._role = role
        self._config = config
        self._section = section
        self._secret = secret
        self._join = join
        self._stop = stop
        self._announce = announce
        self._trace = TracePage(role.value, os.getpid())
        self._readiness = (False, "starting")
        self._fields: Callable[[], SyncFields] = SyncFields
        self._server = MetricsServer(
            section.host,
            section.metrics_port,
            self.registry,
            lambda: self._readiness,
            {"/trace": self._trace},
            token=trace_token(secret),
        )

    def take_seat(self, *, serving: str = "", on_standby: Callable[[Seat], None] = lambda seat: None) -> Seat | None:
        """Join the cluster, get a rank and a mesh; the caller closes it. None when stopped meanwhile.

        serving: where gateways reach this worker.
        on_standby: of an FFN worker that waits for a place: loads every shard.
        """
        config, spec, section = self._config, self.folder.spec, self._section
        info = WorkerInfo(
            role=self._role.value,
            incarnation="",
            host=section.reachable_host,
            pid=os.getpid(),
            config_hash="",
            serving=serving,
            metrics=section.reachable(self._server.address),
        )
        self._readiness = (False, "waiting for the coordinator")
        agreed = config_hash(config, self.folder.fingerprint, spec.hidden, spec.max_top_k)
        layout = payload_layout(config, spec.hidden, spec.max_top_k)
        fields, join, stop = lambda: self._fields(), self._join, self._stop

        def wait(seat: Seat) -> None:
            self._readiness = (False, "loading the model")
            on_standby(seat)
            self._readiness = (True, "")
            log.info("%s/%d is on standby", self._role.value, seat.rank)

        seat = take_seat(config, self._role, self._secret, agreed, layout, info, join, fields, stop, wait)
        self._readiness = (False, "loading the model")
        return seat

    def progress(self, seat: Seat) -> Progress:
        """Tells cluster and supervisor how far the model is loaded."""

        def loaded(num_done: int, num_all: int) -> None:
            seat.membership.set_loading(num_done / num_all)
            self._announce({"loading": num_done / num_all})

        return loaded

    def set_ready(self, seat: Seat, ready: bool, why_not: str = "") -> None:
        """Tell cluster and probes whether this worker serves; the probes, why not."""
        was_ready, self._readiness = self._readiness[0], (ready, why_not)
        if ready != was_ready:
            seat.membership.set_ready(ready)
            log.info("%s/%d is %s", self._role.value, seat.rank, "ready" if ready else "not ready")

    def publish(self, seat: Seat, fields: Callable[[], SyncFields], ring: TraceRing) -> None:
        """Heartbeats and traces show these from now on."""
        self._trace.attach(seat.rank, ring)
        self._fields = fields

    def run(self, loop: Callable[[], None], start_threads: StartThreads) -> None:
        """The worker's main loop, until it returns."""
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look at it again
        start_threads(self._section.cores)
        with torch.inference_mode():
            loop()

    def close(self) -> None:
        """Free the port of /metrics. Idempotent."""
        self._server.close()
