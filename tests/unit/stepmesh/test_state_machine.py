"""Two real sessions over a lossy link, driven by hypothesis one step at a time.

The rules are what engines and networks may do, in any order: dispatch dense or sparse, answer or let an arrival lie, go
on to the next, lose or delay what is under way, cut, sever, heal, let time pass. Held after every step: no answer that
is not the right one, no arrival that was not sent, no slot in use twice (its memory does not change while it is
somebody's), nothing delivered twice or out of order. Held at the end, once the network is calm: every pair comes up and
every stream completes one more exchange, so no wake-up was lost.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stepmesh import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    PeerDown,
    PeerNotConnectedError,
    PeerUp,
    SlotBusyError,
    StaleArrivalError,
)
from stepmesh.transports.inproc import Faults
from stepmesh.types import RankId
from tests.contract.world import STEP_S, World, assert_same, attention, expected_answer, ffn, make_parts

A0 = attention(0)
SERVERS = (ffn(0), ffn(1))
NUM_STREAMS = 2
CALM_LIMIT_S = 60.0  # virtual

chances = st.sampled_from([0.0, 0.0, 0.0, 0.02, 0.2])
streams = st.integers(0, NUM_STREAMS - 1)
servers = st.sampled_from(SERVERS)


class Sent(NamedTuple):
    """What one peer is to see of a dispatch."""

    parts: DispatchParts
    row_idx: Any


class Held(NamedTuple):
    """An arrival that the FFN engine works on, and its content when it came."""

    arrival: DispatchArrived
    content: DispatchParts


class LossyMesh(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World("inproc")
        self.sent: dict[tuple[RankId, int, int], Sent] = {}  # (peer, stream, seq)
        self.last_sent: dict[tuple[RankId, int], int] = {}
        self.last_arrived: dict[tuple[RankId, int], tuple[int, int]] = {}  # (generation, seq)
        self.last_answer: dict[tuple[RankId, int], int] = {}
        self.held: dict[RankId, list[Held]] = {peer: [] for peer in SERVERS}
        self.up: dict[RankId, int] = {}
        self.number = 0

    @initialize(
        seed=st.integers(0, 1 << 16), drop=chances, duplicate=chances, reorder=chances, corrupt=chances,
        disconnect=st.sampled_from([0.0, 0.0, 0.05]), delay=st.sampled_from([0.0, 0.0005, 0.01]),
    )  # fmt: skip
    def build(
        self, seed: int, drop: float, duplicate: float, reorder: float, corrupt: float, disconnect: float, delay: float
    ) -> None:
        self.world.network.rng.seed(seed)
        overrides = {"num_streams": NUM_STREAMS, "checksum": True, "exchange_timeout_s": 0.2, "connect_timeout_s": 0.3}
        for rank_id in (A0, *SERVERS):
            self.world.add(rank_id, **overrides)
        self.world.form(1)
        self.pass_time(0.01)
        self.world.network.faults = Faults(drop, duplicate, reorder, corrupt, disconnect, delay)

    # What the attention engine does

    @rule(stream=streams, num_tokens=st.integers(0, 9), peers=st.sampled_from([SERVERS, SERVERS[:1], SERVERS[1:]]))
    def dispatch(self, stream: int, num_tokens: int, peers: tuple[RankId, ...]) -> None:
        parts = self.fresh_parts(num_tokens)
        with contextlib.suppress(SlotBusyError, PeerNotConnectedError):
            seq = self.world.dispatch(A0, peers, parts, stream=stream)
            for peer in peers:
                self.note(peer, stream, seq, Sent(parts, None))
        self.pass_time(STEP_S)

    @rule(stream=streams, choice=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9))
    def dispatch_sparse(self, stream: int, choice: list[tuple[bool, bool]]) -> None:
        parts = self.fresh_parts(len(choice))
        rows = [np.flatnonzero([pick[place] for pick in choice]) for place in range(2)]
        with contextlib.suppress(SlotBusyError, PeerNotConnectedError):
            meta = DispatchMeta(stream, 1, 1, 0)
            seq = self.world.meshes[A0].dispatch_sparse(SERVERS, meta, parts, rows)
            for peer, wanted in zip(SERVERS, rows, strict=True):
                dense = DispatchParts(*(None if part is None else part[wanted] for part in parts[:4]))
                self.note(peer, stream, seq, Sent(dense._replace(row_idx=wanted), wanted))
        self.pass_time(STEP_S)

    @rule(stream=streams)
    def idle(self, stream: int) -> None:
        self.world.meshes[A0].idle(stream)

    # What the FFN engines do

    @rule(peer=servers, which=st.sampled_from(["oldest", "newest", "all"]))
    def answer(self, peer: RankId, which: str) -> None:
        mine = self.held[peer]
        while mine:
            held = mine.pop(-1 if which == "newest" else 0)
            header = held.arrival.header
            with contextlib.suppress(StaleArrivalError):
                rows = expected_answer(held.arrival.parts, peer)
                self.world.meshes[peer].combine(held.arrival, CombineMeta(), rows)
            # Older ones of the stream are settled with it: their slots may be written again.
            mine[:] = [one for one in mine if one.arrival.header.stream != header.stream]
            if which != "all":
                break
        self.pass_time(STEP_S)

    # What the network does

    @rule(seconds=st.sampled_from([0.0015, 0.02, 0.2]))
    def pass_time(self, seconds: float) -> None:
        end = self.world.now() + seconds
        while self.world.now() < end:
            for rank_id in (A0, *SERVERS):
                self.heed(rank_id)
            self.world.advance()

    @rule(peer=servers, trouble=st.sampled_from(["heal", "cut", "sever", "heal"]))
    def trouble(self, peer: RankId, trouble: str) -> None:
        getattr(self.world.network if trouble != "cut" else self.world, trouble)(A0, peer)
        self.pass_time(STEP_S)

    # What always holds

    @invariant()
    def what_is_held_does_not_change(self) -> None:
        for held in (held for helds in self.held.values() for held in helds):
            assert_same(held.arrival.parts, held.content)

    def heed(self, rank_id: RankId) -> None:
        for event in self.world.meshes[rank_id].progress(0.0):
            if isinstance(event, DispatchArrived):
                self.arrived(rank_id, event)
            elif isinstance(event, CombineArrived):
                self.answered(event)
            elif isinstance(event, PeerUp) and rank_id is A0:
                assert event.generation > self.up.get(event.peer, 0)
                self.up[event.peer] = event.generation
            elif isinstance(event, PeerDown) and rank_id is not A0:
                self.held[rank_id] = []  # void: their memory may be written again

    def arrived(self, here: RankId, event: DispatchArrived) -> None:
        header = event.header
        sent = self.sent[here, header.stream, header.seq]
        assert_same(event.parts, sent.parts)
        place = here, header.stream
        assert (header.generation, header.seq) > self.last_arrived.get(place, (0, 0))
        self.last_arrived[place] = header.generation, header.seq
        content = DispatchParts(*(None if part is None else part.copy() for part in event.parts))
        self.held[here].append(Held(event, content))

    def answered(self, event: CombineArrived) -> None:
        stream, seq = event.header.stream, event.header.seq
        sent = self.sent[event.peer, stream, seq]
        np.testing.assert_array_equal(event.rows, expected_answer(sent.parts, event.peer))
        assert event.row_idx is sent.row_idx
        assert seq == self.last_sent[event.peer, stream], "an answer to a dispatch that was superseded"
        assert seq > self.last_answer.get((event.peer, stream), 0)
        self.last_answer[event.peer, stream] = seq

    def note(self, peer: RankId, stream: int, seq: int, sent: Sent) -> None:
        self.sent[peer, stream, seq] = sent
        self.last_sent[peer, stream] = seq

    def fresh_parts(self, num_tokens: int) -> DispatchParts:
        self.number += 1
        return make_parts(num_tokens, 2, seed=self.number)

    def teardown(self) -> None:
        if not self.world.meshes:
            return
        self.world.network.faults = Faults()
        for peer in SERVERS:
            self.world.network.heal(A0, peer)
        for stream in range(NUM_STREAMS):
            self.complete_one(stream)
        self.world.close()

    def complete_one(self, stream: int) -> None:
        """The engine's rule: dispatch until the newest dispatch has all its answers."""
        end = self.world.now() + CALM_LIMIT_S
        seq = 0
        while not seq or any(self.last_answer.get((peer, stream), 0) != seq for peer in SERVERS):
            assert self.world.now() < end, f"stuck: {[mesh.stats() for mesh in self.world.meshes.values()]}"
            lost = seq and any(self.up.get(peer) != self.generation[peer] for peer in SERVERS)
            if not seq or lost:
                parts = self.fresh_parts(3)
                with contextlib.suppress(SlotBusyError, PeerNotConnectedError):
                    seq = self.world.dispatch(A0, SERVERS, parts, stream=stream)
                    self.generation = dict(self.up)
                    for peer in SERVERS:
                        self.note(peer, stream, seq, Sent(parts, None))
            self.pass_time(STEP_S)
            for peer in SERVERS:
                self.answer(peer, "newest")


LossyMesh.TestCase.settings = settings(max_examples=100, stateful_step_count=60, derandomize=True, deadline=None)
TestLossyMesh = LossyMesh.TestCase
