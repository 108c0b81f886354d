"""The FFN worker process: seat, weights, loop. What it computes is `engine.FFNEngine`."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time

import torch

from afd.config import ClusterConfig
from afd.ffn.engine import FFNEngine
from afd.ffn.epochs import EpochFollower
from afd.ffn.expert_watch import ExpertWatch
from afd.ffn.gang import GangTable
from afd.ffn.gpu_path import GpuPath
from afd.ffn.health import RecentFFN
from afd.ffn.metrics import FFNMetrics
from afd.ffn.path import BatchPath
from afd.ffn.python_path import PythonPath
from afd.ffn.relay_path import RelayPath
from afd.membership.port import Announce, Join, SyncFields
from afd.messages.keys import trace_token
from afd.messages.membership import WorkerInfo
from afd.model.cuda import CudaDevice
from afd.model.loading import ModelFolder, load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.ops.ops import Ops
from afd.ops.select import check_device, select
from afd.telemetry.exposition import MetricsServer, process_registry
from afd.telemetry.ring import TracePage
from afd.worker.data_plane import config_hash, payload_layout, relays_natively
from afd.worker.seat import IDLE_S, TURN_S, Seat, take_seat
from afd.worker.threads import ThreadShare
from stepmesh.types import Role

log = logging.getLogger(__name__)


def run_ffn_worker(config: ClusterConfig, secret: bytes, join: Join, stop: threading.Event, announce: Announce) -> int:
    """Serve until `stop`. Returns the exit code; raises AfdError with one line for the user."""
    check_device(config.ffn.device, "ffn.device")
    folder = resolve_model(config.model.name)
    worker = _Worker(config, folder, stop)
    try:
        if not worker.start(secret, join, announce):
            return 0
        worker.run()
    finally:
        worker.close()
    return 0


class _Worker:
    """Wires the parts and owns them. Main thread, but for `_fields` and `_ready` (side threads, read only)."""

    def __init__(self, config: ClusterConfig, folder: ModelFolder, stop: threading.Event):
        self._config = config
        self._folder = folder
        self._stop = stop
        self._progress = 0
        self._threads = ThreadShare(config.ffn.threads or 1, config.ffn.threads_alone)
        self._trace = TracePage("ffn", os.getpid())
        self._seat: Seat | None = None
        self._metrics: FFNMetrics | None = None
        self._server: MetricsServer | None = None
        self._engine: FFNEngine | None = None
        self._device: CudaDevice | None = None
        self._ops: Ops | None = None
        self._recent: RecentFFN | None = None
        self._watch = ExpertWatch()
        self._is_ready = False
        self._why_not = "starting"

    def start(self, secret: bytes, join: Join, announce: Announce) -> bool:
        """Join, load, be ready. False when stopped meanwhile."""
        config, spec = self._config, self._folder.spec
        registry = process_registry("ffn")
        pages = {"/trace": self._trace}
        self._server = MetricsServer(
            config.ffn.host, config.ffn.metrics_port, registry, self._ready, pages, token=trace_token(secret)
        )
        info = WorkerInfo(
            role=Role.FFN.value,
            incarnation="",
            host=config.ffn.reachable_host,
            pid=os.getpid(),
            config_hash="",
            metrics=config.ffn.reachable(self._server.address),
            num_experts=spec.num_experts,
        )
        self._why_not = "waiting for the coordinator"
        agreed = config_hash(config, self._folder.fingerprint, spec.hidden, spec.max_top_k)
        layout = payload_layout(config, spec.hidden, spec.max_top_k)
        seat = take_seat(config, Role.FFN, secret, agreed, layout, info, join, self._fields, self._stop)
        if seat is None:
            return False
        self._seat = seat
        self._why_not = "loading the model"
        shard = ShardSpec(seat.rank, config.topology.num_ffn, config.cluster.ffn_parallel)

        def loaded(done: int, total: int) -> None:
            seat.membership.set_loading(done / total)
            announce({"loading": done / total})

        ops = self._ops = select(config.ffn.device, config.model.dtype)
        half = load_ffn_half(self._folder, shard, ops, loaded, weights=config.model.weights)
        assert seat.mesh is not None, "an FFN worker has no place in topology mono"
        gangs = GangTable(
            seat.rank,
            config.topology.num_ffn,
            num_streams=seat.mesh.config.num_streams,
            max_window_s=config.ffn.gang_window_ms / 1e3,
        )
        if config.ffn.device == "cuda":
            self._device = CudaDevice()
            path: BatchPath = GpuPath(half, seat.mesh, layout, self._device)
            self._engine = FFNEngine(half, seat.mesh, gangs, path)
        else:
            path = inner = PythonPath(half, seat.mesh, layout)
            layers = half.relay() if relays_natively(layout) else None
            if layers is not None:
                path = RelayPath(inner, layers, seat.mesh, gangs)
            self._engine = FFNEngine(half, seat.mesh, gangs, path, threads=self._threads)
        self._trace.attach(seat.rank, self._engine.ring)
        self._recent = RecentFFN(self._engine)
        self._metrics = FFNMetrics(registry, self._engine, seat.mesh, self._recent)
        seat.membership.set_ready(True)
        self._is_ready = True
        announce({"ready": True})
        log.info(
            "ffn/%d is ready: %s, shard %d of %d (%s)", seat.rank, spec.name, seat.rank, shard.num_ranks, shard.parallel
        )
        return True

    @torch.inference_mode()
    def run(self) -> None:
        """The loop: new views, dispatches, answers."""
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look at it again
        assert self._seat is not None and self._seat.mesh is not None and self._engine is not None
        assert self._ops is not None
        self._threads.start(self._config.ffn.cores, self._ops.start_threads)
        mesh = self._seat.mesh
        epochs = EpochFollower(mesh, mesh.config.exchange_timeout_s)
        while not self._stop.is_set():
            view = self._seat.new_view()
            if view is not None:
                self._engine.gangs.limit_window(view.plan.gang_window_s)
                epochs.adopt(view, time.monotonic())
            epochs.tick(time.monotonic())
            mesh.tick()
            self._progress += 1
            until_s, patience_s = time.monotonic() + TURN_S, IDLE_S
            while patience_s > 0.0:
                self._engine.run_once(patience_s)
                patience_s = until_s - time.monotonic()
            self._warn_of_silent_experts(time.monotonic())
        mesh.drain()

    def _warn_of_silent_experts(self, now: float) -> None:
        assert self._engine is not None
        for layer, expert in self._watch.look(self._engine.expert_loads(), now):
            log.warning(
                "layer %d: expert %d receives tokens and gives nothing beside its layer's others; "
                "check the checkpoint with `afd inspect`",
                layer,
                expert,
            )

    def _fields(self) -> SyncFields:  # side thread
        engine, recent = self._engine, self._recent
        if engine is None or recent is None:
            return SyncFields()
        totals, pipeline = engine.totals, recent.look()
        return SyncFields(
            progress=self._progress,
            pending=engine.gangs.under_way,
            stats={
                "busy_s": totals.busy_s,
                "wait_s": totals.wait_s,
                "batches": float(totals.num_batches),
                "tokens": float(totals.num_tokens),
                "gang_size": pipeline.gang_size,
                "bubble": pipeline.bubble,
                "straggler": max(pipeline.stragglers.values(), default=0.0),
            },
            silent_experts=self._watch.found,
        )

    def _ready(self) -> tuple[bool, str]:  # metrics thread
        return self._is_ready, self._why_not

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._seat is not None:
            self._seat.close()
        if self._device is not None:
            self._device.close()
