"""Mutated data frames in a pair's slots: refused with a FrameError, or delivered exactly as they were sent.

The pairs are the real ones, over memory that the campaign writes: what an evil peer, or a broken link, could leave
in a slot. One campaign per role and checksum.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepmesh import CombineArrived, CombineMeta, DispatchArrived, MeshConfig, PayloadLayout, RankId, Role, WireDtype
from stepmesh.errors import FrameError, StaleArrivalError
from stepmesh.layout import HEADER_BYTES, frame_bytes, slot_bytes
from stepmesh.pair import AttentionPair, Environment, FfnPair, Identity
from stepmesh.stats import PeerStats
from stepmesh.topology import Epochs
from stepmesh.trace import Trace
from stepmesh.transports.base import Channel, Failure, Link, Offer, Posted, Received
from stepmesh.transports.inproc import InprocNetwork
from stepmesh.types import Address, DispatchMeta, FrameKind, Header, Member
from stepmesh.window import Exchange
from stepmesh.wire import DATA_MAGIC, HEADER, PROTOCOL_VERSION, read_header, seal_checksum, write_trailer
from tests.fuzz.campaign import MemoryGauge, generator, volume
from tests.fuzz.mutations import EDGE_INTEGERS, mutate_bytes

LAYOUT = PayloadLayout(24, 6, 2, WireDtype.BF16, WireDtype.FP32)
A0, F0 = RankId(Role.ATTENTION, 0), RankId(Role.FFN, 0)
NUM_STREAMS = 2
LIVE_EPOCHS = (3, 4)
MAX_PARKED = 2 * NUM_STREAMS


class MemoryChannel(Channel):
    """Slots in plain memory; the campaign posts."""

    kind = "memory"

    def __init__(self) -> None:
        size = slot_bytes(max(LAYOUT.dispatch_slot_bytes, LAYOUT.combine_slot_bytes))
        self._slots = {place: memoryview(bytearray(size)) for place in np.ndindex(2, NUM_STREAMS, 2)}
        self.posted: list[Posted] = []
        self.sent: list[Posted] = []

    def offer(self) -> Offer:
        return Offer({})

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        """Nothing to attach."""

    @property
    def ready(self) -> bool:
        return True

    def outgoing(self, stream: int, parity: int) -> memoryview:
        return self._slots[0, stream, parity]

    def incoming(self, stream: int, parity: int) -> memoryview:
        return self._slots[1, stream, parity]

    def post(self, stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        self.sent = [Posted(stream, parity, seq)]

    def poll(self) -> Sequence[Posted]:
        posted, self.posted = self.posted, []
        return posted

    @property
    def failure(self) -> Failure | None:
        return None

    def close(self) -> None:
        """Nothing to free."""


class NoLink(Link):
    """A control link that nobody uses."""

    kind, peer_name = "memory", "memory"

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Dropped."""

    def receive(self) -> Received:
        return Received([], None)

    def trust(self) -> None:
        """Nothing to trust."""

    def close(self) -> None:
        """Nothing to close."""


class Victim:
    """One end of a pair, made anew after each refusal as the mesh would."""

    def __init__(self, role: Role) -> None:
        own, peer = (F0, A0) if role is Role.FFN else (A0, F0)
        config = MeshConfig(own, "own", b"k" * 16, b"agreed", LAYOUT, num_streams=NUM_STREAMS, transport="inproc")
        network = InprocNetwork()
        self.env = Environment(config, network.fabric(config), Trace(64))
        self.peer = peer
        self.epochs = Epochs(config)
        for epoch in LIVE_EPOCHS:
            self.epochs.set_members(epoch, [Member(peer, "peer", Address("", "", 0))])
        self.channel = MemoryChannel()
        self.generation = 0
        self.seq = [0] * NUM_STREAMS
        self.renew()

    def renew(self) -> None:
        """The next generation."""
        self.generation += 1
        identity = Identity(self.peer, "peer", self.generation, "")
        args = (self.env, identity, NoLink(), self.channel, PeerStats())
        self.pair: AttentionPair | FfnPair
        self.pair = FfnPair(*args, self.epochs.of(self.peer, "peer")) if self.peer is A0 else AttentionPair(*args)
        self.last: Header | None = None


def genuine_dispatch(victim: Victim, rng: random.Random, checksum: bool) -> tuple[Posted, bytearray]:
    """The next frame that an honest attention rank could post."""
    stream = rng.randrange(NUM_STREAMS)
    victim.seq[stream] += 1
    num_tokens, top_k = rng.randrange(LAYOUT.max_tokens + 1), rng.randrange(LAYOUT.max_top_k + 1)
    size = LAYOUT.dispatch(num_tokens, top_k).total
    fields = [
        DATA_MAGIC, PROTOCOL_VERSION, FrameKind.DISPATCH, 0, LIVE_EPOCHS[-1], victim.generation, victim.seq[stream],
        rng.getrandbits(40), rng.getrandbits(64), 0, rng.getrandbits(64), 0, num_tokens, 0, size, 0, stream,
        rng.randrange(60), top_k, LAYOUT.dispatch_dtype, int(checksum),
    ]  # fmt: skip
    return Posted(stream, victim.seq[stream] & 1, victim.seq[stream]), sealed(rng, fields, size, checksum)


def genuine_combine(victim: Victim, rng: random.Random, checksum: bool) -> tuple[Posted, bytearray]:
    """Dispatch, and make the frame that an honest FFN rank would answer."""
    assert isinstance(victim.pair, AttentionPair)
    stream = rng.randrange(NUM_STREAMS)
    victim.seq[stream] += 1
    seq, num_tokens = victim.seq[stream], rng.randrange(LAYOUT.max_tokens + 1)
    victim.pair.window.check_free(stream, seq)
    meta = DispatchMeta(stream, LIVE_EPOCHS[-1], rng.getrandbits(40), rng.randrange(60))
    slot = victim.pair.tx_slot(stream, seq)
    view = slot.dispatch(num_tokens, 0)
    victim.pair.write_dispatch(slot, seq, meta, num_tokens, 0, view.payload_bytes, None)
    exchange = Exchange(seq, meta.epoch, meta.step, meta.layer, num_tokens, 1.0)
    victim.pair.post_dispatch(slot, stream, exchange, view)
    size = LAYOUT.combine(num_tokens).total
    fields = [
        DATA_MAGIC, PROTOCOL_VERSION, FrameKind.COMBINE, 0, meta.epoch, victim.generation, seq, meta.step,
        rng.getrandbits(64), 5, 1, 0, num_tokens, num_tokens, size, 0, stream, meta.layer, 0, LAYOUT.combine_dtype,
        int(checksum),
    ]  # fmt: skip
    return Posted(stream, seq & 1, seq), sealed(rng, fields, size, checksum)


def sealed(rng: random.Random, fields: list[Any], payload_bytes: int, checksum: bool) -> bytearray:
    frame = bytearray(frame_bytes(payload_bytes))
    HEADER.pack_into(frame, 0, *fields)
    frame[HEADER_BYTES : HEADER_BYTES + payload_bytes] = rng.randbytes(payload_bytes)
    write_trailer(memoryview(frame), payload_bytes, fields[6])
    if checksum:
        seal_checksum(memoryview(frame), payload_bytes)
    return frame


def spoil(rng: random.Random, frame: bytearray, *, checksum: bool) -> bytearray:
    """Change fields by name, or bytes anywhere; now and then what an evil key-holder can do: sign it again."""
    changed = frame
    if rng.random() < 0.7:
        header = read_header(memoryview(frame))
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(Header._fields[1:])
            value = rng.choice((*EDGE_INTEGERS, getattr(header, name) + rng.choice((-1, 1, 2)), rng.getrandbits(64)))
            bits = {"version": 16, "kind": 8, "flags": 8, "stream": 16, "layer": 16, "top_k": 16}.get(name, 32)
            bits = 8 if name in ("wire_dtype", "checksum_kind") else bits
            wide = ("seq", "step", "gang_id", "compute_ns", "member_mask_low", "member_mask_high")
            header = header._replace(**{name: value & ((1 << (64 if name in wide else bits)) - 1)})
        changed = bytearray(frame)
        HEADER.pack_into(changed, 0, *header)
        if checksum and rng.random() < 0.3 and header.payload_bytes <= len(frame) - HEADER_BYTES - 8:
            seal_checksum(memoryview(changed), header.payload_bytes)
    else:
        changed = bytearray(mutate_bytes(rng, bytes(frame)))
    return changed


def covered(frame: bytes | bytearray | memoryview, payload_bytes: int) -> bytes:
    """The bytes that a checksum covers."""
    return bytes(frame[: HEADER.size]) + bytes(frame[HEADER_BYTES : HEADER_BYTES + payload_bytes])


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("checksum", [False, True])
def test_mutated_frames(role: Role, checksum: bool) -> None:
    num_cases = volume(25_000, 1_200)
    rng = generator(f"frames to {role} checksum {checksum}", num_cases)
    victim = Victim(role)
    num_delivered = num_refused = 0
    gauge = MemoryGauge(num_cases)
    for _ in range(num_cases):
        make = genuine_dispatch if role is Role.FFN else genuine_combine
        posted, genuine = make(victim, rng, checksum)
        frame = genuine if rng.random() < 0.15 else spoil(rng, genuine, checksum=checksum)
        memory = victim.channel.incoming(posted.stream, posted.parity)
        memory[: len(frame)] = frame[: len(memory)]
        honest = frame == genuine
        if rng.random() < 0.1:  # in shared memory the seq word is the peer's to write, too
            posted, honest = posted._replace(seq=posted.seq ^ rng.choice(EDGE_INTEGERS[1:]) & (2**64 - 1)), False
        if rng.random() < 0.1:
            victim.channel.posted, honest = [posted] * 2, False
        else:
            victim.channel.posted = [posted]
        gauge.step()
        try:
            arrived = victim.pair.poll()
            if isinstance(victim.pair, FfnPair):
                assert len(victim.pair._parked) <= MAX_PARKED
        except FrameError:
            assert not honest
            num_refused += 1
            victim.renew()
            continue
        assert arrived or not honest
        for arrival in arrived:
            check_arrival(arrival, memory, read_header(memoryview(genuine)))
            header = arrival.header
            if header.checksum_kind and frame[: HEADER.size] == genuine[: HEADER.size]:
                assert covered(memory, header.payload_bytes) == covered(genuine, header.payload_bytes)
            num_delivered += 1
            if isinstance(arrival, DispatchArrived) and isinstance(victim.pair, FfnPair):
                answer(victim.pair, arrival)
        victim.seq = [min(seq, 1 << 40) for seq in victim.seq]
        if not arrived:
            victim.renew()  # parked for an epoch to come, or superseded: as far as this case is concerned, over
    gauge.check()
    assert num_refused > num_cases // 3
    assert num_delivered > num_cases // 12


def check_arrival(arrival: DispatchArrived | CombineArrived, memory: memoryview, genuine: Header) -> None:
    """What reaches the engine is in bounds, of this very exchange, and what lies in the slot."""
    header = arrival.header
    assert (header.stream, header.generation) == (genuine.stream, genuine.generation)
    assert header.num_tokens <= LAYOUT.max_tokens
    assert header.top_k <= LAYOUT.max_top_k
    if isinstance(arrival, CombineArrived):
        assert (header.seq, header.epoch, header.num_tokens) == (genuine.seq, genuine.epoch, genuine.num_tokens)
        rows = arrival.rows
    else:
        assert header.epoch in LIVE_EPOCHS
        rows = arrival.parts.rows
        assert (arrival.parts.expert_ids is None) == (header.top_k == 0)
    assert rows.shape == (header.num_tokens, LAYOUT.hidden)
    payload = memory[HEADER_BYTES : HEADER_BYTES + rows.nbytes]
    assert rows.tobytes() == bytes(payload)


def answer(pair: FfnPair, arrival: DispatchArrived) -> None:
    """An arrival can be answered, once."""
    rows = np.zeros((arrival.header.num_tokens, LAYOUT.hidden), np.float32)
    pair.post_combine(arrival, CombineMeta(), rows, None)
    with pytest.raises(StaleArrivalError):
        pair.post_combine(arrival, CombineMeta(), rows, None)


def test_a_flood_of_frames_for_an_epoch_to_come_is_bounded() -> None:
    """A slot holds one frame: a second one for it, before an answer, is against the protocol."""
    victim, rng = Victim(Role.FFN), random.Random(1)
    with pytest.raises(FrameError, match="no answer yet"):
        for _ in range(1000):
            posted, frame = genuine_dispatch(victim, rng, False)
            HEADER.pack_into(frame, 0, *read_header(memoryview(frame))._replace(epoch=9))
            victim.channel.incoming(posted.stream, posted.parity)[: len(frame)] = frame
            victim.channel.posted = [posted]
            victim.pair.poll()
    assert isinstance(victim.pair, FfnPair)
    assert len(victim.pair._parked) <= MAX_PARKED


def test_a_flood_of_dispatches_is_bounded() -> None:
    """The same without parking: the engine has not answered, the peer posts into the slot again."""
    victim, rng = Victim(Role.FFN), random.Random(1)
    with pytest.raises(FrameError, match="no answer yet"):
        for _ in range(1000):
            posted, frame = genuine_dispatch(victim, rng, False)
            victim.channel.incoming(posted.stream, posted.parity)[: len(frame)] = frame
            victim.channel.posted = [posted]
            victim.pair.poll()
    assert isinstance(victim.pair, FfnPair)
    assert sum(header is not None for header in victim.pair.window._open) <= MAX_PARKED
