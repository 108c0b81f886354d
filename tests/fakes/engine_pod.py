"""Attention and FFN engines joined by real meshes inside one process: one thread each, no cluster around them.

There is no gateway, coordinator or admission: tests add sequences to the schedulers and make epochs by hand. All
threads share one interpreter, so times say nothing.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from afd.attention.engine import AttentionEngine
from afd.attention.gpu_path import GpuPath
from afd.attention.mesh_exchange import MeshExchange
from afd.attention.python_path import PythonPath
from afd.attention.relay_path import RelayPath
from afd.errors import PeerLostError
from afd.ffn import gpu_path as ffn_gpu_path
from afd.ffn import python_path as ffn_python_path
from afd.ffn import relay_path as ffn_relay_path
from afd.ffn.engine import FFNEngine
from afd.ffn.gang import GangTable
from afd.kv.block_pool import BlockPool
from afd.kv.cache import KVCache
from afd.model.cuda import CudaDevice
from afd.model.graphs import DecodeGraphs
from afd.model.loading import load_attention_half, load_ffn_half
from afd.model.row_selection import RowSelection
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.relay.runs import AttentionRelay, FfnRelay
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import DispatchMode, FfnParallel, SamplingParams
from afd.worker.data_plane import WIRE_DTYPES
from stepmesh.config import MeshConfig
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.types import Member, RankId, Role, WireDtype

PATIENCE_S = 20.0  # a machine that stalls for seconds must not make a straggler or a lost peer of anybody

STEP_TOKENS, BLOCK_SIZE, NUM_BLOCKS = 16, 8, 128


class Pod:
    """x attention engines and y FFN engines in this process, each driven by its own thread.

    relays: roles whose native code makes exchanges by itself.
    device: of the halves.
    graphs: `DecodeGraphs`.
    new_context: called for each engine; its result is entered where that is made or driven.
    """

    def __init__(
        self,
        folder,
        num_attention,
        num_ffn,
        *,
        transport="auto",
        streams=2,
        parallel=FfnParallel.HYBRID,
        dispatch=DispatchMode.BROADCAST,
        wire=WireDtype.FP32,
        dtype="float32",
        relays=(),
        device="cpu",
        graphs=False,
        new_context: Callable[[], Callable[[], AbstractContextManager]] = lambda: contextlib.nullcontext,
    ):
        spec = folder.spec
        self.layout = PayloadLayout(
            hidden=spec.hidden,
            max_tokens=STEP_TOKENS,
            max_top_k=spec.max_top_k,
            dispatch_dtype=wire,
            combine_dtype=WIRE_DTYPES[dtype],
        )
        self.transport, self.num_ffn, self.dtype, self.relays = transport, num_ffn, dtype, relays
        self.folder, self.parallel, self.dispatch = folder, parallel, dispatch
        self.device, self.graphs, self.new_context = device, graphs, new_context
        self.stop = threading.Event()
        self.incarnations = 0
        self.attention_meshes = [self.mesh(Role.ATTENTION, rank) for rank in range(num_attention)]
        self.ffn_meshes = [self.mesh(Role.FFN, rank) for rank in range(num_ffn)]
        self.ffns, self.threads = [], []
        for rank in range(num_ffn):
            self.start_ffn(rank)
        self.engines, self.exchanges, self.contexts, self.decode_graphs = [], [], [], []
        for rank in range(num_attention):
            self.make_attention(rank, streams)
        self.adopt(1)

    def mesh(self, role, rank):
        self.incarnations += 1
        return Mesh(
            MeshConfig(
                id=RankId(role, rank),
                incarnation=f"{role}-{rank}-{self.incarnations}",
                secret=b"s" * 32,
                config_hash=b"h" * 16,
                layout=self.layout,
                transport=self.transport,
                peer_timeout_s=PATIENCE_S,
                stall_timeout_s=PATIENCE_S,
            )
        )

    def make_attention(self, rank, streams):
        selection = None
        if self.dispatch is DispatchMode.SPARSE:
            selection = RowSelection(self.folder.spec, self.num_ffn, self.parallel)
        exchange = MeshExchange(self.attention_meshes[rank], self.layout, selection)
        scheduler = Scheduler(
            SchedulerConfig(STEP_TOKENS, 4, max_num_seqs=16, max_context=256, num_streams=streams),
            BlockPool(NUM_BLOCKS, BLOCK_SIZE),
        )
        context = self.new_context()
        with context(), torch.inference_mode():
            half = load_attention_half(self.folder, select(self.device, self.dtype))
            cache = KVCache(self.folder.spec, NUM_BLOCKS, BLOCK_SIZE, half.dtype, self.device, spare_block=self.graphs)
            if self.device == "cpu":
                path = PythonPath(half, cache, exchange)
                if Role.ATTENTION in self.relays:
                    path = RelayPath(path, AttentionRelay.of(half, cache), exchange)
            else:
                graphs = DecodeGraphs(half, cache, launched_steps=1) if self.graphs else None
                self.decode_graphs.append(graphs)
                wire = self.layout.dispatch_dtype
                path = GpuPath(half, cache, exchange, CudaDevice(), wire=wire, graphs=graphs)
            engine = AttentionEngine(half, scheduler, path)
        self.exchanges.append(exchange)
        self.engines.append(engine)
        self.contexts.append(context)

    def start_ffn(self, rank):
        mesh, gangs = self.ffn_meshes[rank], GangTable(rank, self.num_ffn, straggler_s=PATIENCE_S)
        context = self.new_context()
        with context(), torch.inference_mode():
            half = load_ffn_half(
                self.folder,
                ShardSpec(rank, self.num_ffn, self.parallel),
                select(self.device, self.dtype),
            )
            if self.device == "cpu":
                path = ffn_python_path.PythonPath(half, mesh, self.layout)
                if Role.FFN in self.relays:
                    path = ffn_relay_path.RelayPath(path, FfnRelay.of(half), mesh, gangs)
            else:
                path = ffn_gpu_path.GpuPath(half, mesh, self.layout, CudaDevice())
            engine = FFNEngine(half, mesh, gangs, path)
        stop = threading.Event()

        def run():
            with context(), torch.inference_mode():
                while not (self.stop.is_set() or stop.is_set()):
                    engine.run_once(0.02)

        thread = threading.Thread(target=run)
        thread.start()
        self.ffns[rank:] = [(engine, stop, thread)]

    def replace_last_ffn(self):
        """The last FFN engine vanishes with what is under way; a successor of its rank joins in the next epoch."""
        rank = self.num_ffn - 1
        _, stop, thread = self.ffns[rank]
        stop.set()
        thread.join(5)
        self.ffn_meshes[rank].close()
        self.ffn_meshes[rank] = self.mesh(Role.FFN, rank)
        self.start_ffn(rank)
        self.adopt(self.epoch + 1)

    def members(self, meshes):
        return [Member(m.id, m.config.incarnation, m.address) for m in meshes]

    def adopt(self, epoch):
        self.epoch = epoch
        for mesh in self.ffn_meshes:
            mesh.set_members(epoch, self.members(self.attention_meshes))
        for exchange in self.exchanges:
            exchange.adopt(epoch, self.members(self.ffn_meshes))

    def run(self, idx, seqs, on_turn=lambda turn: None):
        """Serve `seqs` at attention engine `idx` -> output ids by request, and how often the FFN side was lost."""
        with self.contexts[idx](), torch.inference_mode():
            return self._serve(self.engines[idx], seqs, on_turn)

    def _serve(self, engine, seqs, on_turn):
        for seq in seqs:
            engine.scheduler.add(seq)
        outputs, losses = {}, 0
        for turn in range(100_000):
            if engine.scheduler.idle:
                engine.scheduler.check()
                return outputs, losses
            on_turn(turn)
            try:
                for output in engine.run_once(0.05):
                    outputs.setdefault(output.progress.seq.req_id, []).extend(output.progress.ids)
            except PeerLostError:
                losses += 1
                engine.fail()
        raise AssertionError("requests did not finish")

    def close(self):
        self.stop.set()
        for _, _, thread in self.ffns:
            thread.join(5)
        for mesh in (*self.attention_meshes, *self.ffn_meshes):
            mesh.close()


def requests(count, seed, vocab, **sampling):
    rng = random.Random(seed)
    for idx in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 40))]
        params = SamplingParams(**{"max_tokens": rng.randrange(4, 16), "seed": idx, "temperature": 0.0, **sampling})
        yield Sequence(f"r{seed}-{idx}", 0, b"gw", prompt, len(prompt), params, 0, idx)
