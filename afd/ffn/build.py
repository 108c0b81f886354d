"""What an FFN worker is made of: from configuration, model and seat to parts that are whole."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

from afd.config import ClusterConfig
from afd.errors import ConfigError
from afd.ffn.engine import FFNEngine
from afd.ffn.gang import GangTable
from afd.ffn.gpu_path import GpuPath
from afd.ffn.health import RecentFFN
from afd.ffn.path import BatchPath
from afd.ffn.python_path import PythonPath
from afd.ffn.relay_path import RelayPath
from afd.model.cuda import CudaDevice
from afd.model.halves import FFNHalf
from afd.model.loading import ModelFolder, load_ffn_half
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.relay.runs import FfnRelay
from afd.worker.data_plane import payload_layout, relays_natively
from afd.worker.process import Progress, StartThreads
from afd.worker.seat import Seat
from afd.worker.threads import ThreadShare
from stepmesh.mesh import Mesh

MONO = "topology mono has no FFN workers: set cluster.topology to xAyF, such as 1A1F"


@dataclass(frozen=True, slots=True)
class Parts:
    """An FFN worker, complete. The main thread owns all of it; close `resources` at the end."""

    engine: FFNEngine
    mesh: Mesh
    shard: ShardSpec
    recent: RecentFFN
    start_threads: StartThreads
    resources: contextlib.ExitStack


def load_shard(config: ClusterConfig, folder: ModelFolder, rank: int, progress: Progress) -> FFNHalf:
    """The weights of one FFN rank, on this worker's device. ConfigError where the topology has no FFN workers."""
    if config.topology.mono:
        raise ConfigError(MONO)
    shard = ShardSpec(rank, config.topology.num_ffn, config.cluster.ffn_parallel)
    ops = select(config.ffn.device, config.model.dtype)
    return load_ffn_half(folder, shard, ops, progress, weights=config.model.weights)


def build(config: ClusterConfig, folder: ModelFolder, seat: Seat, half: FFNHalf) -> Parts:
    """Put the parts together around a loaded shard. ConfigError where the topology has no FFN workers."""
    section, spec, mesh = config.ffn, folder.spec, seat.mesh
    if mesh is None:
        raise ConfigError(MONO)
    threads = ThreadShare(section.threads or 1, section.threads_alone)
    shard = ShardSpec(seat.rank, config.topology.num_ffn, config.cluster.ffn_parallel)
    ops = select(section.device, config.model.dtype)
    gangs = GangTable(
        seat.rank,
        config.topology.num_ffn,
        num_streams=mesh.config.num_streams,
        max_window_s=section.gang_window_ms / 1e3,
    )
    layout = payload_layout(config, spec.hidden, spec.max_top_k)
    with contextlib.ExitStack() as resources:
        if section.device == "cuda":
            device = resources.enter_context(contextlib.closing(CudaDevice()))
            engine = FFNEngine(half, mesh, gangs, GpuPath(half, mesh, layout, device))
        else:
            python_path = PythonPath(half, mesh, layout)
            layers = FfnRelay.of(half) if relays_natively(layout) else None
            path: BatchPath = python_path if layers is None else RelayPath(python_path, layers, mesh, gangs)
            engine = FFNEngine(half, mesh, gangs, path, threads=threads)
        start_threads = partial(threads.start, start_threads=ops.start_threads)
        return Parts(engine, mesh, shard, RecentFFN(engine), start_threads, resources.pop_all())
