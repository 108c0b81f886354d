"""The attention worker process: seat, weights, KV cache, sockets, loop. What runs when is `engine.AttentionEngine`."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time

import torch
import zmq

from afd.attention.costs import CostReporter
from afd.attention.engine import AttentionEngine, Engine
from afd.attention.exchange import Exchange, LocalExchange
from afd.attention.frontend import Frontend
from afd.attention.gpu_path import GpuPath, computed_here
from afd.attention.health import RecentAttention
from afd.attention.memory import budget_of, tell
from afd.attention.mesh_exchange import MeshExchange
from afd.attention.metrics import AttentionMetrics
from afd.attention.modelled import ModelledEngine, StepFormula
from afd.attention.pair_watch import PairWatch
from afd.attention.path import LayerPath
from afd.attention.python_path import PythonPath
from afd.attention.relay_path import RelayPath
from afd.attention.requests import RequestBook
from afd.config import ClusterConfig
from afd.errors import ConfigError, PeerLostError
from afd.kv.block_pool import BlockPool
from afd.kv.cache import KVCache, count_blocks, too_small_for_context
from afd.kv.windowed_blocks import WindowedBlocks, held_at_most
from afd.membership.port import Announce, Join, SyncFields
from afd.messages.keys import trace_token
from afd.messages.membership import ClusterView, StepCosts, WorkerInfo
from afd.messages.serving import WorkerStats, to_worker_bytes
from afd.messages.serving_sockets import server_socket
from afd.model.cuda import CudaDevice
from afd.model.graphs import DecodeGraphs
from afd.model.halves import AttentionHalf
from afd.model.loading import ModelFolder, load_attention_half, load_ffn_half, resolve_model
from afd.model.row_selection import RowSelection
from afd.model.sharding import ShardSpec
from afd.ops.ops import Ops
from afd.ops.select import check_device, select
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.prefill import PrefillBudget
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Output
from afd.sched.streams import StreamChooser
from afd.telemetry.exposition import MetricsServer, process_registry
from afd.telemetry.ring import TracePage
from afd.types import DispatchMode
from afd.worker.data_plane import config_hash, mesh_members, payload_layout, relays_natively
from afd.worker.seat import IDLE_S, TURN_S, Seat, take_seat
from afd.worker.threads import ThreadShare, alone_ratio
from stepmesh.layout import PayloadLayout
from stepmesh.types import Role

log = logging.getLogger(__name__)

MESSAGES_S = 0.02  # of each turn
STATS_MIN_S, STATS_MAX_S = 0.1, 0.5
FIRST_STREAMS = 2  # of --streams auto, until steps were measured: 1 where a single one runs on more cores


def run_attention_worker(
    config: ClusterConfig, secret: bytes, join: Join, stop: threading.Event, announce: Announce
) -> int:
    """Serve until `stop`, then drain. Returns the exit code; raises AfdError with one line for the user."""
    check_device(config.attention.device, "attention.device")
    worker = _Worker(config, resolve_model(config.model.name), stop)
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
        self._trace = TracePage("attention", os.getpid())
        self._context = zmq.Context(io_threads=1)
        self._frontend: Frontend | None = None
        self._server: MetricsServer | None = None
        self._seat: Seat | None = None
        self._exchange: Exchange | None = None
        self._engine: Engine | None = None
        self._recent: RecentAttention | None = None
        self._device: CudaDevice | None = None
        self._ops: Ops | None = None
        section = config.attention
        on_cpu = section.device == "cpu"
        self._threads = ThreadShare(section.threads or 1, section.threads_alone if on_cpu else 0)
        self._latency = LatencyModel(
            overlap=not config.topology.mono,
            alone=self._threads.alone_ratio,
            ffn_alone=alone_ratio(config.ffn.threads or 1, config.ffn.threads_alone),
        )
        self._chooser: StreamChooser | None = None
        self._costs: StepCosts | None = None
        self._first_streams = section.streams or (1 if self._threads.alone_ratio > 1.0 else FIRST_STREAMS)
        self._max_streams = self._first_streams
        self._epoch = 0
        self._lost_since_s: float | None = None
        self._pairs: PairWatch | None = None
        self._news: list[Output] = []  # of the last step, published behind the next one's first stage
        self._stats_sent: tuple[float, WorkerStats | None] = (0.0, None)
        self._is_ready = False
        self._why_not = "starting"

    # -- start --------------------------------------------------------------------------------------------

    def start(self, secret: bytes, join: Join, announce: Announce) -> bool:
        """Bind, join, load, be ready. False when stopped meanwhile."""
        config, spec = self._config, self._folder.spec
        section = config.attention
        registry = process_registry("attention")
        pages = {"/trace": self._trace}
        self._server = MetricsServer(
            section.host, section.metrics_port, registry, self._ready, pages, token=trace_token(secret)
        )
        socket = server_socket(self._context, secret, to_worker_bytes(config, spec.max_context))
        try:
            endpoint = f"tcp://{section.host}:{section.port or '*'}"
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"attention.port: cannot listen on {endpoint}: {error.strerror}") from error
        self._frontend = Frontend(socket)
        info = WorkerInfo(
            role=Role.ATTENTION.value,
            incarnation="",
            host=section.reachable_host,
            pid=os.getpid(),
            config_hash="",
            serving=f"tcp://{section.reachable(socket.getsockopt_string(zmq.LAST_ENDPOINT))}",
            metrics=section.reachable(self._server.address),
        )
        self._why_not = "waiting for the coordinator"
        agreed = config_hash(config, self._folder.fingerprint, spec.hidden, spec.max_top_k)
        layout = payload_layout(config, spec.hidden, spec.max_top_k)
        seat = take_seat(config, Role.ATTENTION, secret, agreed, layout, info, join, self._fields, self._stop)
        if seat is None:
            return False
        self._seat = seat
        self._why_not = "loading the model"
        self._engine = self._load(seat, announce)
        self._recent = RecentAttention(self._engine.stages.totals)
        self._trace.attach(seat.rank, self._engine.stages.ring)
        self._engine.stages.observer = self._latency.observe
        self._reporter = CostReporter(self._latency, self._engine.scheduler)
        if section.streams == 0 and not config.topology.mono:  # one process gains nothing from streams
            self._chooser = StreamChooser(self._latency)
        self._admission = Admission(
            self._engine.scheduler,
            self._latency,
            policy=config.sla.policy,
            tpot_s=config.sla.tpot_ms / 1e3,
            ttft_s=config.sla.ttft_ms / 1e3,
        )
        self._book = RequestBook(
            self._frontend,
            self._engine.scheduler,
            self._admission,
            vocab_size=spec.vocab_size,
            max_waiting=section.max_waiting,
        )
        AttentionMetrics(registry, self._engine, seat.mesh, self._admission, self._latency, self._recent)
        if seat.mesh is not None:
            seat.mesh.watch_fd(self._frontend.fd)
            self._pairs = PairWatch(seat.mesh.config.connect_timeout_s)
        self._why_not = "waiting for the FFN workers"
        announce({"loading": 1.0})
        log.info("attention/%d has loaded %s", seat.rank, spec.name)
        return True

    def _load(self, seat: Seat, announce: Announce) -> Engine:
        config, spec = self._config, self._folder.spec
        section = config.attention
        if section.modelled:
            return self._modelled_engine(StepFormula.parse(section.modelled), seat.rank)

        def loaded(done: int, total: int) -> None:
            seat.membership.set_loading(done / total)
            announce({"loading": done / total})

        weights = config.model.weights
        ops = self._ops = select(section.device, config.model.dtype)
        half = load_attention_half(self._folder, ops, loaded, weights)
        scheduler = self._make_scheduler(half.dtype, seat.rank)
        windowed = None if scheduler.windowed is None else scheduler.windowed.pool.num_blocks
        cache = KVCache(
            spec,
            scheduler.pool.num_blocks,
            section.block_size,
            half.dtype,
            section.device,
            num_window_blocks=windowed,
            spare_block=section.cuda_graphs,
        )
        tell(budget_of(config, spec, cache.num_bytes), ops.memory_bytes())
        layout, ffns = payload_layout(config, spec.hidden, spec.max_top_k), []
        if seat.mesh is None:
            shard = ShardSpec(0, 1, config.cluster.ffn_parallel)
            ffns = [load_ffn_half(self._folder, shard, ops, weights=weights)]
        device = self._device = CudaDevice() if section.device == "cuda" else None
        if seat.mesh is None:
            self._exchange = (
                LocalExchange(ffns) if device is None else LocalExchange(ffns, around=computed_here(device))
            )
        else:
            selection = None
            if config.cluster.dispatch is DispatchMode.SPARSE:
                selection = RowSelection(spec, config.topology.num_ffn, config.cluster.ffn_parallel)
            self._exchange = MeshExchange(seat.mesh, layout, selection)
        if device is None:
            path = self._cpu_path(half, cache, layout)
            return AttentionEngine(half, scheduler, path, threads=self._threads)
        wire = None if seat.mesh is None else layout.dispatch_dtype
        graphs = DecodeGraphs(half, cache) if section.cuda_graphs else None
        return AttentionEngine(half, scheduler, GpuPath(half, cache, self._exchange, device, wire=wire, graphs=graphs))

    def _cpu_path(self, half: AttentionHalf, cache: KVCache, layout: PayloadLayout) -> LayerPath:
        """One layer a leg; many where native code can make the exchanges by itself."""
        exchange = self._exchange
        assert exchange is not None
        path = PythonPath(half, cache, exchange)
        if not isinstance(exchange, MeshExchange) or not relays_natively(layout):
            return path
        layers = half.relay(cache)
        return path if layers is None else RelayPath(path, layers, exchange)

    def _modelled_engine(self, formula: StepFormula, rank: int) -> ModelledEngine:
        assert self._frontend is not None
        self._exchange = LocalExchange([])
        log.warning("no model is computed: steps take the time of attention.modelled, tokens are hashes")
        scheduler = self._make_scheduler(getattr(torch, self._config.model.dtype), rank)
        return ModelledEngine(formula, scheduler, self._folder.spec.vocab_size, wait=self._frontend.wait)

    def _make_scheduler(self, dtype: torch.dtype, rank: int) -> Scheduler:
        config, spec = self._config, self._folder.spec
        section = config.attention
        prefix_cache, block_size = section.prefix_cache, section.block_size
        held = held_at_most(spec.max_window, section.max_step_tokens, block_size) * section.max_num_seqs
        blocks = count_blocks(spec, int(section.kv_cache_gib * 2**30), block_size, dtype, held, section.num_blocks)
        if blocks.full < 1:
            raise ConfigError(f"attention.kv_cache_gib {section.kv_cache_gib} holds not one block of {spec.name}")
        max_context = min(config.model.max_context or spec.max_context, spec.max_context)
        if blocks.full * block_size < max_context:
            gib = 0.0 if section.num_blocks else section.kv_cache_gib
            log.warning("%s", too_small_for_context(blocks.full * block_size, max_context, gib))
        return Scheduler(
            SchedulerConfig(
                max_step_tokens=section.max_step_tokens,
                min_chunk_tokens=section.min_chunk_tokens,
                max_num_seqs=section.max_num_seqs,
                max_context=max_context,
                num_streams=section.streams or (1 if config.topology.mono else self._first_streams),
                first_stream=rank,
            ),
            BlockPool(blocks.full, block_size, prefix_cache=prefix_cache),
            PrefillBudget(self._latency) if config.sla.policy == "enforce" else None,
            windowed=WindowedBlocks(
                BlockPool(blocks.windowed, block_size, prefix_cache=prefix_cache),
                spec.max_window,
                section.max_step_tokens,
            )
            if blocks.windowed
            else None,
        )

    # -- loop ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self) -> None:
        """Serve until `stop`; then finish what runs, at most `gateway.drain_s` long; at once when declared lost: others
        have what ran here, and a successor waits for the place.
        """
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look at it again
        self._threads.start(self._config.attention.cores, None if self._ops is None else self._ops.start_threads)
        assert self._engine is not None and self._seat is not None
        drain_until_s: float | None = None
        while drain_until_s is None or (time.monotonic() < drain_until_s and not self._engine.scheduler.idle):
            now = time.monotonic()
            if self._seat.membership.lost:
                return
            if drain_until_s is None and self._stop.is_set():
                drain_until_s = now + self._config.gateway.drain_s
                self._book.draining = True
                self._seat.membership.set_draining(True)
            self._turn(now)
        self._publish_news()

    def _turn(self, now: float) -> None:
        assert self._engine is not None and self._seat is not None and self._frontend is not None
        self._progress += 1
        if self._seat.mesh is not None:
            self._seat.mesh.tick()
        view = self._seat.new_view()
        if view is not None:
            self._adopt(view)
        for gateway, message in self._frontend.receive(now):
            self._book.handle(gateway, message, now)
            if time.monotonic() - now >= MESSAGES_S:
                break  # a flood of submissions: the running requests' next stage comes first
        self._frontend.flush()  # what was asked for again leaves even when nothing runs
        for gateway in self._frontend.ended_leases(now):
            log.warning("a gateway went silent: %d of its requests aborted", self._book.end_gateway(gateway))
        self._judge_readiness(now)
        try:
            self._run_stages(now + TURN_S)
        except PeerLostError as error:
            self._engine.fail()
            if self._lost_since_s is None:
                self._lost_since_s = now
            log.warning("%s; interrupted steps run again when it is back", error)
        if not self._news:  # else behind the next stage, with them
            self._report(now)

    def _run_stages(self, until_s: float) -> None:
        """Stage after stage, with nothing in between, while work is in flight; at least one.

        What a step brought is published after the first stage of the next one, whose rows the FFN then computes
        meanwhile; at once where other streams are in flight: theirs may take long, and the FFN has their rows.
        """
        assert self._engine is not None
        engine, patience_s = self._engine, self._patience()
        while True:
            outputs: list[Output] = []
            if engine.in_flight:
                self._publish_news()
            try:
                outputs = engine.run_once(0.0 if self._news else patience_s)
            finally:
                self._publish_news()
            self._news = outputs
            patience_s = min(patience_s, until_s - time.monotonic())
            if patience_s <= 0.0 or not engine.in_flight:
                break
        if engine.scheduler.idle:
            self._publish_news()
        if not self._news:  # else behind the next stage, with them
            engine.stages.deliver()

    def _publish_news(self) -> None:
        assert self._engine is not None
        news, self._news = self._news, []
        if news:
            self._book.publish(news)
            self._choose_streams()
            self._engine.stages.deliver()
            self._report(time.monotonic())

    def _patience(self) -> float:
        """How long the engine may block: not at all while gateway messages wait (their fd is edge-triggered)."""
        assert self._frontend is not None and self._engine is not None and self._seat is not None
        if self._frontend.has_input:
            return 0.0
        if self._seat.mesh is None and self._engine.scheduler.idle and not self._engine.in_flight:
            self._frontend.wait(IDLE_S)  # mono has no mesh to wait on
            return 0.0
        return IDLE_S

    def _choose_streams(self) -> None:
        assert self._engine is not None
        scheduler, step = self._engine.scheduler, self._engine.stages.totals.num_steps
        if self._chooser is None or not self._chooser.due(step):
            return
        current = scheduler.num_streams
        chosen = self._chooser.choose(step, current, self._max_streams, scheduler.num_running, scheduler.full_step())
        if chosen != current:
            scheduler.set_num_streams(chosen)
            log.debug("%d streams instead of %d for %d sequences", chosen, current, scheduler.num_running)

    def _adopt(self, view: ClusterView) -> None:
        """A new view: its epoch's FFN ranks and its plan count from each stream's next layer 0 on."""
        assert self._seat is not None and self._engine is not None
        self._max_streams = view.plan.max_streams
        self._engine.scheduler.limit_step(view.plan.max_step_tokens)
        exchange = self._exchange
        if not isinstance(exchange, MeshExchange):
            self._epoch = view.epoch
            return
        if not view.formed:
            exchange.suspend("the cluster is not complete: an FFN worker is missing")
            return
        exchange.adopt(view.epoch, mesh_members(view, Role.FFN))
        self._epoch = view.epoch

    def _judge_readiness(self, now: float) -> None:
        """Ready while every FFN rank answers; give up on the requests when that takes too long."""
        assert self._seat is not None and self._exchange is not None
        if isinstance(self._exchange, MeshExchange) and self._pairs is not None:
            down = {str(peer): why for peer, why in self._exchange.unreachable.items()}
            for news in self._pairs.look(down, now):
                self._seat.membership.report_pair(*news)
        ready = self._exchange.ready and self._epoch > 0
        if ready != self._is_ready:
            self._is_ready = ready
            self._seat.membership.set_ready(ready)
            log.info("attention/%d is %s", self._seat.rank, "ready" if ready else "not ready")
        if ready:
            self._lost_since_s = None
            self._book.not_accepting = ""
            return
        reason = getattr(self._exchange, "down_reason", "not ready")
        self._book.not_accepting = self._why_not = str(reason)
        if self._lost_since_s is None:
            self._lost_since_s = now
        if now - self._lost_since_s > self._config.cluster.recovery_timeout_s:
            self._publish_news()
            failed = self._book.fail_all(f"{reason}; no recovery in time", retryable=False)
            if failed:
                log.error("%s: %d requests ended with an error", reason, failed)

    # -- reports ------------------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        """Load to every gateway: at once when it changed (at most every 100 ms), else twice a second."""
        assert self._engine is not None and self._seat is not None and self._frontend is not None
        sent_s, last = self._stats_sent
        if now - sent_s < STATS_MIN_S:
            return
        scheduler = self._engine.scheduler
        outlook = self._admission.outlook()
        stats = WorkerStats(
            rank=self._seat.rank,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_free=scheduler.pool.num_free,
            places_s=list(outlook.places_s),
            prefill_token_s=outlook.prefill_token_s,
            draining=self._book.draining,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            num_preemptions=scheduler.num_preemptions,
            max_tokens=min(scheduler.config.max_context, scheduler.pool.num_blocks * scheduler.pool.block_size),
        )
        if stats != last or now - sent_s >= STATS_MAX_S:
            for gateway in list(self._frontend.gateways):
                self._frontend.send(gateway, stats)
            self._stats_sent = (now, stats)
            if self._seat.mesh is not None:  # one process has no pipeline to plan
                self._costs = self._reporter.report(self._engine.stages.totals, now)

    def _fields(self) -> SyncFields:  # side thread
        engine, recent = self._engine, self._recent
        if engine is None or recent is None:
            return SyncFields()
        totals, scheduler, pipeline = engine.stages.totals, engine.scheduler, recent.look()
        return SyncFields(
            progress=self._progress,
            pending=engine.in_flight,
            stats={
                "running": float(scheduler.num_running),
                "waiting": float(scheduler.num_waiting),
                "kv_free": scheduler.pool.num_free / scheduler.pool.num_blocks,
                "busy_s": totals.attention_s + totals.head_s,
                "wait_s": totals.wait_s,
                "step_ms": engine.stages.step_s * 1e3,
                "cycle_ms": self._admission.cycle_s * 1e3,
                "streams": float(scheduler.num_streams),
                # With another policy they were only found to be beyond the SLA.
                "refused" if self._config.sla.policy == "enforce" else "over_sla": float(self._admission.num_refused),
                "gang_size": pipeline.gang_size,
                "bubble": pipeline.bubble,
                "exposed": pipeline.exposed,
            },
            costs=self._costs,
        )

    def _ready(self) -> tuple[bool, str]:  # metrics thread
        return self._is_ready, self._why_not

    def close(self) -> None:
        if self._frontend is not None:
            self._frontend.close()
        if self._server is not None:
            self._server.close()
        if self._seat is not None:
            self._seat.close()
        if self._device is not None:
            self._device.close()
        self._context.term()
