"""Whole meshes over a network that drops, duplicates, reorders, delays, corrupts and cuts: seeded, on a virtual clock.

The engine's rule in miniature: dispatch, gather, and after a PeerDown dispatch again once the pair is back. Whatever
the network does, every answer that arrives is the right one, every arrival is whole, and it always goes on.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh import CombineArrived, DispatchArrived, Event, PeerDown, SlotBusyError, StaleArrivalError
from stepmesh.transports.inproc import Faults
from stepmesh.types import DispatchParts, RankId
from tests.contract.world import World, assert_same, attention, expected_answer, ffn, make_parts

A0 = attention(0)
NUM_STREAMS = 2


class Client:
    """One attention rank: keeps one exchange per stream under way until all its rounds are done."""

    def __init__(self, world: World, rank_id: RankId, peers: list[RankId], num_rounds: int) -> None:
        self._world = world
        self._id = rank_id
        self._peers = peers
        self._left = [num_rounds] * NUM_STREAMS
        self._parts: list[DispatchParts | None] = [None] * NUM_STREAMS
        self._seq = [0] * NUM_STREAMS
        self._missing: list[set[RankId]] = [set() for _ in range(NUM_STREAMS)]
        self.again = 0

    @property
    def done(self) -> bool:
        return not any(self._left)

    def turn(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, CombineArrived):
                self._gather(event)
            elif isinstance(event, PeerDown):
                for stream in range(NUM_STREAMS):
                    if self._missing[stream]:
                        self._missing[stream] = set()  # void: everything in flight is dispatched again
                        self.again += 1
        if set(self._world.meshes[self._id].peers) != set(self._peers):
            return
        for stream in range(NUM_STREAMS):
            if self._left[stream] and not self._missing[stream]:
                self._send(stream)

    def _send(self, stream: int) -> None:
        parts = self._parts[stream]
        if parts is None:
            parts = self._parts[stream] = make_parts(self._left[stream] % 7, seed=100 * stream + self._left[stream])
        if any(self._busy(peer, stream) for peer in self._peers):
            return  # two unanswered dispatches already: their answers, or the pair's end, come first
        self._seq[stream] = self._world.dispatch(self._id, self._peers, parts, stream=stream)
        self._missing[stream] = set(self._peers)

    def _busy(self, peer: RankId, stream: int) -> bool:
        try:
            self._world.meshes[self._id].dispatch_view(peer, stream, 0, 0)
        except SlotBusyError:
            return True
        return False

    def _gather(self, event: CombineArrived) -> None:
        stream = event.header.stream
        if event.header.seq != self._seq[stream] or event.peer not in self._missing[stream]:
            return  # of an exchange that was given up
        parts = self._parts[stream]
        assert parts is not None
        np.testing.assert_array_equal(event.rows, expected_answer(parts, event.peer))
        self._missing[stream].discard(event.peer)
        if not self._missing[stream]:
            self._left[stream] -= 1
            self._parts[stream] = None


def run(faults: Faults, seed: int, *, num_attention: int = 1, num_ffn: int = 2, rounds: int = 6) -> World:
    """Serve until every client is done; fail when the virtual clock runs far ahead of that."""
    world = World("inproc", seed=seed, faults=faults)
    overrides = {"num_streams": NUM_STREAMS, "checksum": True, "exchange_timeout_s": 0.2, "connect_timeout_s": 0.3}
    for rank in range(num_attention):
        world.add(attention(rank), **overrides)
    for rank in range(num_ffn):
        world.add(ffn(rank), **overrides)
    world.form(1)
    peers = [ffn(rank) for rank in range(num_ffn)]
    clients = {attention(r): Client(world, attention(r), peers, rounds) for r in range(num_attention)}
    limit = world.now() + 600.0
    while not all(client.done for client in clients.values()):
        assert world.now() < limit, f"stuck: {[mesh.stats() for mesh in world.meshes.values()]}"
        for rank_id, mesh in world.meshes.items():
            events = mesh.progress(0.0)
            if rank_id in clients:
                clients[rank_id].turn(events)
                continue
            for event in events:
                if isinstance(event, DispatchArrived):
                    serve(world, rank_id, event)
        world.advance()
    return world


def serve(world: World, rank_id: RankId, event: DispatchArrived) -> None:
    # Stale: its pair went down in the same turn, or a newer dispatch of the stream was answered first.
    with contextlib.suppress(StaleArrivalError):
        world.answer(event, rank_id)


CALM = Faults()
TROUBLES = {
    "calm": CALM,
    "drop": Faults(drop=0.05),
    "duplicate": Faults(duplicate=0.2),
    "reorder": Faults(reorder=0.2),
    "delay": Faults(max_delay_s=0.003),
    "corrupt": Faults(corrupt=0.1),
    "cut": Faults(disconnect=0.1),
    "all at once": Faults(0.03, 0.05, 0.05, 0.03, 0.03, 0.002),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_every_trouble_is_survived(name: str) -> None:
    run(TROUBLES[name], seed=1, num_attention=2).close()


def test_the_same_seed_gives_the_same_run() -> None:
    stats = []
    for _ in range(2):
        world = run(TROUBLES["all at once"], seed=42)
        stats.append([mesh.stats() for mesh in world.meshes.values()])
        world.close()
    assert stats[0] == stats[1]


def test_troubles_do_happen() -> None:
    """The faults are felt: otherwise the tests above would show nothing."""
    world = run(TROUBLES["corrupt"], seed=5, rounds=20)
    rejected = sum(peer["rejected_frames"] for mesh in world.meshes.values() for peer in mesh.stats()["peers"].values())
    assert rejected > 0
    world.close()
    world = run(TROUBLES["cut"], seed=5, rounds=20)
    assert any(peer["losses"] > 0 for peer in world.meshes[A0].stats()["peers"].values())
    world.close()


chances = st.sampled_from([0.0, 0.02, 0.1])


@given(
    st.builds(
        Faults,
        drop=chances,
        duplicate=chances,
        reorder=chances,
        corrupt=chances,
        disconnect=chances,
        max_delay_s=st.sampled_from([0.0, 0.001, 0.01]),
    ),
    st.integers(0, 1 << 16),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_any_mixture_is_survived(faults: Faults, seed: int) -> None:
    run(faults, seed, rounds=4).close()


def test_a_severed_pair_is_noticed_and_heals() -> None:
    world = World("inproc")
    world.build(1, 2)
    world.forget()
    world.network.sever(A0, ffn(0))
    (down,) = world.take(A0, PeerDown)
    assert (down.peer, down.retryable) == (ffn(0), True)
    assert "no heartbeat" in down.reason
    world.take(ffn(0), PeerDown)
    world.exchange(A0, [ffn(1)], make_parts(2))
    world.network.heal(A0, ffn(0))
    world.until_connected()
    world.exchange(A0, [ffn(0), ffn(1)], make_parts(2))
    world.close()


def test_a_late_frame_of_a_revoked_generation_lands_nowhere() -> None:
    world = World("inproc", faults=Faults())
    world.build(1, 1)
    world.network.latency_s = 0.5  # the frame is still flying when its generation ends
    parts = make_parts(4)
    world.dispatch(A0, [ffn(0)], parts)
    world.network.latency_s = 10e-6
    world.cut(A0, ffn(0))
    world.take(A0, PeerDown)
    world.until_connected()
    world.dispatch(A0, [ffn(0)], parts)
    world.settle(1.0)
    (arrival,) = world.take(ffn(0), DispatchArrived)
    assert_same(arrival.parts, parts)
    assert world.seen(ffn(0), DispatchArrived) == []
    world.close()
