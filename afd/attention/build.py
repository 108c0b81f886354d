"""Makes the parts of an attention worker of configuration, model and seat. Nobody sees one before all are whole."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from afd.attention.engine import AttentionEngine, Engine
from afd.attention.exchange import Exchange, LocalExchange
from afd.attention.ffn_side import FfnSide, LocalFfn, MeshFfn
from afd.attention.gateway_link import GatewayLink
from afd.attention.gpu_path import GpuPath, computed_here
from afd.attention.health import AttentionHealth, RecentAttention
from afd.attention.memory import budget_of, tell
from afd.attention.mesh_exchange import MeshExchange
from afd.attention.modelled import ModelledEngine, StepFormula
from afd.attention.path import LayerPath
from afd.attention.python_path import PythonPath
from afd.attention.relay_path import RelayPath
from afd.config import ClusterConfig
from afd.errors import ConfigError
from afd.kv.block_pool import BlockPool
from afd.kv.cache import KVCache, count_blocks, too_small_for_context
from afd.kv.windowed_blocks import WindowedBlocks, held_at_most
from afd.model.cuda import CudaDevice
from afd.model.graphs import DecodeGraphs
from afd.model.loading import ModelFolder, load_attention_half, load_ffn_half
from afd.model.row_selection import RowSelection
from afd.model.sharding import ShardSpec
from afd.model.spec import ModelSpec
from afd.ops.ops import Ops
from afd.ops.select import select
from afd.relay.runs import AttentionRelay
from afd.sched.core import CoreLimits, WorkerCore
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.prefill import PrefillBudget
from afd.sched.report import CostReporter
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.streams import StreamChooser
from afd.types import DispatchMode
from afd.worker.data_plane import payload_layout, relays_natively
from afd.worker.process import Progress, StartThreads
from afd.worker.seat import Seat
from afd.worker.threads import ThreadShare, alone_ratio
from stepmesh.mesh import Mesh

log = logging.getLogger(__name__)

FIRST_STREAMS = 2  # of --streams auto, until steps were measured: 1 where a single one runs on more cores

MakeScheduler = Callable[[torch.dtype], Scheduler]
"""Makes the worker's scheduler, for a KV cache of that type."""


@dataclass(frozen=True, slots=True)
class Parts:
    """An attention worker, complete. The main thread owns all of it; close `resources` at the end."""

    engine: Engine
    core: WorkerCore
    ffn: FfnSide
    latency: LatencyModel
    recent: RecentAttention
    health: AttentionHealth
    start_threads: StartThreads
    resources: contextlib.ExitStack


def build(config: ClusterConfig, folder: ModelFolder, seat: Seat, link: GatewayLink, progress: Progress) -> Parts:
    """Load the model and put the parts together. link: an engine that waits is woken by its messages."""
    section, mono = config.attention, config.topology.mono
    threads = ThreadShare(section.threads or 1, section.threads_alone if section.device == "cpu" else 0)
    latency = LatencyModel(
        overlap=not mono,
        alone=threads.alone_ratio,
        ffn_alone=alone_ratio(config.ffn.threads or 1, config.ffn.threads_alone),
    )
    num_streams = section.streams or (1 if mono or threads.alone_ratio > 1.0 else FIRST_STREAMS)
    make_scheduler = partial(_make_scheduler, config, folder.spec, latency, num_streams, seat.rank)
    with contextlib.ExitStack() as resources:
        if section.modelled:
            start_threads: StartThreads = threads.start
            engine, ffn = _modelled(config, folder, link, make_scheduler)
        else:
            ops = select(section.device, config.model.dtype)
            start_threads = partial(threads.start, start_threads=ops.start_threads)
            engine, ffn = _computing(config, folder, ops, seat.mesh, link, make_scheduler, threads, progress, resources)
        core = _make_core(config, seat.rank, folder.spec.vocab_size, engine, latency)
        engine.stages.observer = latency.observe
        recent = RecentAttention(engine.stages.totals)
        health = AttentionHealth(engine, core, recent)
        return Parts(engine, core, ffn, latency, recent, health, start_threads, resources.pop_all())


def _make_core(config: ClusterConfig, rank: int, vocab_size: int, engine: Engine, latency: LatencyModel) -> WorkerCore:
    section, sla, scheduler = config.attention, config.sla, engine.scheduler
    several = not config.topology.mono  # one process gains nothing from streams, and has no pipeline to plan
    return WorkerCore(
        rank,
        scheduler,
        Admission(scheduler, latency, policy=sla.policy, tpot_s=sla.tpot_ms / 1e3, ttft_s=sla.ttft_ms / 1e3),
        CoreLimits(vocab_size, section.max_waiting, config.cluster.recovery_timeout_s),
        chooser=StreamChooser(latency) if several and section.streams == 0 else None,
        reporter=CostReporter(latency, scheduler, engine.stages.totals) if several else None,
    )


def _make_scheduler(
    config: ClusterConfig, spec: ModelSpec, latency: LatencyModel, num_streams: int, rank: int, dtype: torch.dtype
) -> Scheduler:
    """dtype: of the KV cache, whose size in bytes says how many blocks there are."""
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
    windowed = None
    if blocks.windowed:
        pool = BlockPool(blocks.windowed, block_size, prefix_cache=prefix_cache)
        windowed = WindowedBlocks(pool, spec.max_window, section.max_step_tokens)
    return Scheduler(
        SchedulerConfig(
            max_step_tokens=section.max_step_tokens,
            min_chunk_tokens=section.min_chunk_tokens,
            max_num_seqs=section.max_num_seqs,
            max_context=max_context,
            num_streams=num_streams,
            first_stream=rank,
        ),
        BlockPool(blocks.full, block_size, prefix_cache=prefix_cache),
        PrefillBudget(latency) if config.sla.policy == "enforce" else None,
        windowed=windowed,
    )


def _modelled(
    config: ClusterConfig, folder: ModelFolder, link: GatewayLink, make_scheduler: MakeScheduler
) -> tuple[Engine, FfnSide]:
    """An engine without a model, in topology mono."""
    log.warning("no model is computed: steps take the time of attention.modelled, tokens are hashes")
    formula = StepFormula.parse(config.attention.modelled)
    scheduler = make_scheduler(getattr(torch, config.model.dtype))
    return ModelledEngine(formula, scheduler, folder.spec.vocab_size, wait=link.wait), LocalFfn()


def _computing(
    config: ClusterConfig,
    folder: ModelFolder,
    ops: Ops,
    mesh: Mesh | None,
    link: GatewayLink,
    make_scheduler: MakeScheduler,
    threads: ThreadShare,
    progress: Progress,
    resources: contextlib.ExitStack,
) -> tuple[Engine, FfnSide]:
    """An engine with a model. mesh: to the FFN workers; None = their half is computed here (topology mono)."""
    section, spec, weights = config.attention, folder.spec, config.model.weights
    half = load_attention_half(folder, ops, progress, weights)
    scheduler = make_scheduler(half.dtype)
    cache = KVCache(
        spec,
        scheduler.pool.num_blocks,
        section.block_size,
        half.dtype,
        section.device,
        num_window_blocks=None if scheduler.windowed is None else scheduler.windowed.pool.num_blocks,
        spare_block=section.cuda_graphs,
    )
    tell(budget_of(config, spec, cache.num_bytes), ops.memory_bytes())
    whole = ShardSpec(0, 1, config.cluster.ffn_parallel)
    halves = [load_ffn_half(folder, whole, ops, weights=weights)] if mesh is None else []
    # Made when weights and cache are there.
    device = resources.enter_context(contextlib.closing(CudaDevice())) if section.device == "cuda" else None
    layout = payload_layout(config, spec.hidden, spec.max_top_k)
    over_mesh = None if mesh is None else MeshExchange(mesh, layout, _selection(config, spec))
    exchange: Exchange
    ffn: FfnSide
    if mesh is None or over_mesh is None:
        exchange = LocalExchange(halves) if device is None else LocalExchange(halves, around=computed_here(device))
        ffn = LocalFfn()
    else:
        exchange, ffn = over_mesh, MeshFfn(mesh, over_mesh, link.fd)
    if device is not None:
        wire = None if mesh is None else layout.dispatch_dtype
        graphs = DecodeGraphs(half, cache) if section.cuda_graphs else None
        gpu_path = GpuPath(half, cache, exchange, device, wire=wire, graphs=graphs)
        return AttentionEngine(half, scheduler, gpu_path), ffn
    path: LayerPath
    path = python_path = PythonPath(half, cache, exchange)
    if over_mesh is not None and relays_natively(layout) and (layers := AttentionRelay.of(half, cache)) is not None:
        path = RelayPath(python_path, layers, over_mesh)
    return AttentionEngine(half, scheduler, path, threads=threads), ffn


def _selection(config: ClusterConfig, spec: ModelSpec) -> RowSelection | None:
    """Which rows each FFN rank is sent; None = all of them."""
    if config.cluster.dispatch is not DispatchMode.SPARSE:
        return None
    return RowSelection(spec, config.topology.num_ffn, config.cluster.ffn_parallel)
