"""A small world of meshes in one process, driven by one loop: the same tests run over every transport.

inproc runs on its virtual clock and never waits; the others run for real, with several meshes in one process. A test
says what it waits for with `until`, never how long: the limit is only there to fail.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stepmesh import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    Event,
    Header,
    Member,
    Mesh,
    MeshConfig,
    PayloadLayout,
    PeerDown,
    PeerUp,
    RankId,
    Role,
    WireDtype,
)
from stepmesh.config import VerbsOptions
from stepmesh.layout import frame_bytes
from stepmesh.pair import Pair
from stepmesh.slots import copy_section
from stepmesh.transports.base import Fabric
from stepmesh.transports.host import HostFabric
from stepmesh.transports.inproc import Faults, InprocNetwork
from stepmesh.types import FrameKind
from stepmesh.wire import DATA_MAGIC, HEADER, PROTOCOL_VERSION, seal_checksum, write_trailer
from tests.fakes.verbs import FakeVerbs

LAYOUT = PayloadLayout(
    hidden=160, max_tokens=64, max_top_k=4, dispatch_dtype=WireDtype.FP32, combine_dtype=WireDtype.FP32
)
SECRET = b"a cluster secret"
RDMA_DEVICES = tuple(filter(None, os.environ.get("STEPMESH_TEST_RDMA_DEVICES", "").split(",")))
LIMIT_S = 20.0  # of waiting, virtual or real; only a failing test takes that long
STEP_S = 0.0005  # virtual time between two rounds
MAX_STEP_S = 0.005  # the same where nothing falls due before: a time-out is waited for in fewer rounds


def attention(rank: int) -> RankId:
    return RankId(Role.ATTENTION, rank)


def ffn(rank: int) -> RankId:
    return RankId(Role.FFN, rank)


class World:
    """Meshes over one transport, and everything they reported."""

    def __init__(
        self, transport: str, *, seed: int = 0, faults: Faults | None = None, verbs: FakeVerbs | None = None
    ) -> None:
        self.transport = transport
        self.network = InprocNetwork(seed, faults)
        # Whatever RDMA this machine has plays no part, but for Soft-RoCE in its guest (make test-rdma).
        self.verbs = verbs or FakeVerbs(None if transport == "verbs" else [])
        self.meshes: dict[RankId, Mesh] = {}
        self.events: dict[RankId, list[Event]] = {}
        self.frozen: set[RankId] = set()
        self._incarnations = 0

    @property
    def virtual(self) -> bool:
        return self.transport == "inproc"

    def config(self, rank_id: RankId, **overrides: Any) -> MeshConfig:
        self._incarnations += 1
        fields: dict[str, Any] = {
            "id": rank_id,
            "incarnation": f"incarnation-{self._incarnations}",
            "secret": SECRET,
            "config_hash": b"agreed",
            "layout": LAYOUT,
            "transport": self.transport,
        }
        if not self.virtual:  # a machine that stalls for seconds loses nobody, but where a test asks for it
            fields |= {"peer_timeout_s": 3 * LIMIT_S, "stall_timeout_s": 3 * LIMIT_S}
        if RDMA_DEVICES:
            fields["verbs"] = VerbsOptions(device=RDMA_DEVICES[rank_id.role is Role.FFN])
        return MeshConfig(**(fields | overrides))

    def add(self, rank_id: RankId, **overrides: Any) -> Mesh:
        """One more rank; a rank that was there before is replaced (and must have been closed)."""
        config = self.config(rank_id, **overrides)
        mesh = Mesh(config, self._fabric(config))
        self.meshes[rank_id] = mesh
        self.events[rank_id] = []
        return mesh

    def _fabric(self, config: MeshConfig) -> Fabric:
        if self.virtual:
            return self.network.fabric(config)
        return HostFabric(config, None if RDMA_DEVICES else self.verbs)

    def member(self, rank_id: RankId) -> Member:
        mesh = self.meshes[rank_id]
        return Member(rank_id, mesh.config.incarnation, mesh.address)

    def members(self, role: Role) -> list[Member]:
        return [self.member(rank_id) for rank_id in self.meshes if rank_id.role is role]

    def build(self, num_attention: int, num_ffn: int, epoch: int = 1, **overrides: Any) -> None:
        """M attention and N FFN ranks, all connected."""
        for rank in range(num_attention):
            self.add(attention(rank), **overrides)
        for rank in range(num_ffn):
            self.add(ffn(rank), **overrides)
        self.form(epoch)
        self.until_connected()

    def form(self, epoch: int) -> None:
        """Make an epoch of all ranks live everywhere."""
        for rank_id, mesh in self.meshes.items():
            mesh.set_members(epoch, self.members(rank_id.role.other))

    def turn(self) -> None:
        """One round: every mesh makes progress once."""
        quiet = True
        for rank_id, mesh in self.meshes.items():
            if rank_id not in self.frozen:
                events = mesh.progress(0.0)
                self.events[rank_id].extend(events)
                quiet = quiet and not events
        if self.virtual:
            self.advance()
        elif quiet:
            time.sleep(0.0002)  # leave the core to the I/O and heartbeat threads

    def advance(self) -> None:
        """The virtual clock moves on by one round."""
        until_next = self.network.next_due - self.network.now
        self.network.advance(min(max(until_next, STEP_S), MAX_STEP_S))

    def until(self, condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
        """Turn until the condition holds."""
        end = self.now() + limit_s
        while not condition():
            assert self.now() < end, f"waited {limit_s} s; events: {self._summary()}"
            self.turn()

    def _summary(self) -> dict[str, list[str]]:
        return {str(rank_id): [str(event)[:160] for event in events] for rank_id, events in self.events.items()}

    def settle(self, seconds: float = 0.1) -> None:
        """Let time pass, so that what must not happen would have happened."""
        end = self.now() + seconds
        while self.now() < end:
            self.turn()

    def now(self) -> float:
        return self.network.now if self.virtual else time.monotonic()

    def until_connected(self) -> None:
        def connected() -> bool:
            return all(
                {peer for peer in self.meshes if peer.role is not rank_id.role} <= set(mesh.peers)
                for rank_id, mesh in self.meshes.items()
                if rank_id not in self.frozen
            )

        self.until(connected)

    def seen(self, rank_id: RankId, kind: type) -> list[Any]:
        """Events of one kind that a rank has reported."""
        return [event for event in self.events[rank_id] if isinstance(event, kind)]

    def take(self, rank_id: RankId, kind: type, count: int = 1) -> list[Any]:
        """Wait for `count` events of one kind, and take them out of the record, in order."""
        self.until(lambda: len(self.seen(rank_id, kind)) >= count)
        taken = self.seen(rank_id, kind)[:count]
        self.events[rank_id] = [event for event in self.events[rank_id] if not any(event is one for one in taken)]
        return taken

    def forget(self) -> None:
        """Clear the record."""
        for events in self.events.values():
            events.clear()

    # Exchanges

    def dispatch(self, sender: RankId, peers: Iterable[RankId], parts: DispatchParts, **fields: int) -> int:
        meta = DispatchMeta(**({"stream": 0, "epoch": 1, "step": 1, "layer": 0} | fields))
        return self.meshes[sender].dispatch(list(peers), meta, parts)

    def answer(self, arrival: DispatchArrived, at: RankId, **fields: int) -> None:
        """Combine with the rows that `expected_answer` names."""
        rows = expected_answer(arrival.parts, at)
        self.meshes[at].combine(arrival, CombineMeta(**fields), rows)

    def exchange(self, sender: RankId, peers: list[RankId], parts: DispatchParts, **fields: int) -> None:
        """One whole exchange, checked at both ends."""
        seq = self.dispatch(sender, peers, parts, **fields)
        for peer in peers:
            (arrival,) = self.take(peer, DispatchArrived)
            assert (arrival.peer, arrival.header.seq) == (sender, seq)
            assert_same(arrival.parts, parts)
            self.answer(arrival, peer)
        arrived = {event.peer: event for event in self.take(sender, CombineArrived, len(peers))}
        for peer in peers:
            np.testing.assert_array_equal(arrived[peer].rows, expected_answer(parts, peer))
            assert arrived[peer].header.seq == seq

    # Trouble

    def pair(self, here: RankId, there: RankId) -> Pair:
        return self.meshes[here]._pairs[there]

    def cut(self, one: RankId, other: RankId) -> None:
        """Break the control connection."""
        if self.virtual:
            self.network.cut(one, other)
        else:
            self.pair(one, other).link._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]

    def freeze(self, rank_id: RankId) -> None:
        """The process stops without a sign: no progress, no heartbeats, sockets open."""
        self.frozen.add(rank_id)
        self.meshes[rank_id]._roster.live = ()

    def stop(self, rank_id: RankId) -> None:
        """The process ends in good order."""
        self.meshes.pop(rank_id).close()

    def stall(self, rank_id: RankId) -> None:
        """The main loop hangs; the heartbeat thread goes on."""
        self.frozen.add(rank_id)

    def forge(self, sender: RankId, receiver: RankId, parts: DispatchParts, *, seq: int, **changes: Any) -> None:
        """Post a dispatch frame that the sender's mesh would never make: any header field can be changed."""
        pair = self.pair(sender, receiver)
        stream, num_tokens = changes.pop("slot_stream", 0), parts.rows.shape[0]
        trailer, corrupt = changes.pop("trailer", seq), changes.pop("corrupt", False)
        header_seq = changes.pop("header_seq", seq)
        slot = pair.tx_slot(stream, seq)
        view, payload_bytes, _ = slot.dispatch(num_tokens, 0)
        copy_section(view.rows, parts.rows, "rows")
        header = Header(
            magic=DATA_MAGIC,
            version=PROTOCOL_VERSION,
            kind=FrameKind.DISPATCH,
            flags=0,
            epoch=1,
            generation=pair.generation,
            seq=header_seq,
            step=1,
            gang_id=0,
            compute_ns=0,
            member_mask_low=0,
            member_mask_high=0,
            num_tokens=num_tokens,
            gang_tokens=0,
            payload_bytes=payload_bytes,
            checksum=0,
            stream=stream,
            layer=0,
            top_k=0,
            wire_dtype=WireDtype.FP32,
            checksum_kind=1 if corrupt else 0,
        )._replace(**changes)
        HEADER.pack_into(slot.memory, 0, *header)
        write_trailer(slot.memory, payload_bytes, trailer)
        if corrupt:
            seal_checksum(slot.memory, payload_bytes)
            slot.payload[5] ^= 1
        pair.channel.post(stream, seq & 1, seq, frame_bytes(payload_bytes))

    def close(self) -> None:
        for mesh in self.meshes.values():
            mesh.close()
        self.meshes.clear()
        self.events.clear()


def make_parts(num_tokens: int, top_k: int = 2, *, seed: int = 0, layout: PayloadLayout = LAYOUT) -> DispatchParts:
    """Random rows and routing of a layout."""
    rng = np.random.default_rng(seed)
    if layout.dispatch_dtype is WireDtype.FP32:
        rows: Any = rng.standard_normal((num_tokens, layout.hidden), dtype=np.float32)
    else:
        dtype = layout.dispatch_dtype.numpy
        rows = rng.integers(0, np.iinfo(dtype).max, (num_tokens, layout.hidden), dtype=dtype)
    scales = None
    if layout.dispatch_dtype is WireDtype.FP8_E4M3:
        scales = rng.standard_normal((num_tokens, layout.num_scale_groups), dtype=np.float32)
    if not top_k:
        return DispatchParts(rows, scales)
    expert_ids = rng.integers(0, 64, (num_tokens, top_k), dtype=np.int32)
    return DispatchParts(rows, scales, expert_ids, rng.random((num_tokens, top_k), dtype=np.float32))


def expected_answer(parts: DispatchParts, rank_id: RankId) -> Any:
    """What the FFN rank of the tests computes: known to both ends."""
    return parts.rows * np.float32(2) + np.float32(rank_id.rank)


def assert_same(got: DispatchParts, sent: DispatchParts) -> None:
    for name, ours, theirs in zip(DispatchParts._fields, got, sent, strict=True):
        if theirs is None:
            assert ours is None, name
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


@dataclasses.dataclass(frozen=True)
class Holdings:
    """What a process holds that could leak."""

    fds: tuple[str, ...]
    threads: tuple[str, ...]
    shared_mappings: int

    @classmethod
    def now(cls) -> Holdings:
        fds = []
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue  # the one that listed the folder
            fds.append(target.split(":")[0])
        maps = Path("/proc/self/maps").read_text()
        threads = tuple(sorted(t.name for t in threading.enumerate() if t.name.startswith("stepmesh")))
        return cls(tuple(sorted(fds)), threads, maps.count("memfd:stepmesh"))


def lost(world: World, rank_id: RankId) -> list[PeerDown]:
    return world.seen(rank_id, PeerDown)


def ups(world: World, rank_id: RankId) -> list[PeerUp]:
    return world.seen(rank_id, PeerUp)
