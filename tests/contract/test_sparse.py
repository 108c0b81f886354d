"""Sparse dispatch: every peer gets its rows only, knows their places, and answers in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepmesh import (
    CombineArrived,
    CombineMeta,
    ConfigError,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    FrameRejected,
    PayloadLayout,
    WireDtype,
)
from stepmesh.types import FrameKind
from tests.contract.world import LAYOUT, World, assert_same, attention, expected_answer, ffn, make_parts

A0, A1 = attention(0), attention(1)
F0, F1, F2 = ffn(0), ffn(1), ffn(2)


def chosen(parts: DispatchParts, rows: Any) -> DispatchParts:
    """What a peer is to see of a micro-batch."""
    dense = DispatchParts(*(None if part is None else part[rows] for part in parts[:4]))
    return dense._replace(row_idx=np.asarray(rows, np.int32))


def send(world: World, parts: DispatchParts, rows_of_peer: list[Any], peers: list[Any], **fields: int) -> int:
    meta = DispatchMeta(**({"stream": 0, "epoch": 1, "step": 1, "layer": 0} | fields))
    return world.meshes[A0].dispatch_sparse(peers, meta, parts, rows_of_peer)


@pytest.mark.parametrize("dtype", list(WireDtype))
@pytest.mark.parametrize("top_k", [0, 3])
def test_each_peer_gets_its_rows_and_their_places(world: World, dtype: WireDtype, top_k: int) -> None:
    layout = PayloadLayout(hidden=576, max_tokens=16, max_top_k=3, dispatch_dtype=dtype, combine_dtype=WireDtype.FP32)
    world.build(1, 3, layout=layout)
    parts = make_parts(11, top_k, layout=layout)
    rows = [np.array([0, 3, 10]), np.array([], np.int64), np.arange(11, dtype=np.int32)]
    seq = send(world, parts, rows, [F0, F1, F2], layer=4)
    for peer, wanted in zip((F0, F1, F2), rows, strict=True):
        (arrival,) = world.take(peer, DispatchArrived)
        assert_same(arrival.parts, chosen(parts, wanted))
        header = arrival.header
        assert (header.seq, header.num_tokens, header.gang_tokens) == (seq, len(wanted), 11)
        assert header.kind == FrameKind.SPARSE_DISPATCH
        answer = np.broadcast_to(arrival.parts.row_idx[:, None] + np.float32(100 * peer.rank), (len(wanted), 576))
        world.meshes[peer].combine(arrival, CombineMeta(), answer.astype(np.float32))
    total = np.zeros(11)
    for event in world.take(A0, CombineArrived, 3):
        assert event.row_idx is rows[event.peer.rank]  # the sender need not remember it
        np.testing.assert_array_equal(event.rows[:, 0], rows[event.peer.rank] + 100 * event.peer.rank)
        total[event.row_idx] += 1
    np.testing.assert_array_equal(total, [2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2])


def test_sparse_and_dense_dispatches_take_turns(world: World) -> None:
    """The same slots carry both: nothing of the one is seen in the other."""
    world.build(1, 2)
    rng = np.random.default_rng(1)
    for turn in range(12):
        parts = make_parts(20, 2, seed=turn)
        if turn % 3 == 2:
            world.exchange(A0, [F0, F1], parts)
            continue
        rows = [np.flatnonzero(rng.random(20) < share) for share in (0.2, 0.7)]
        send(world, parts, rows, [F0, F1])
        for peer, wanted in zip((F0, F1), rows, strict=True):
            (arrival,) = world.take(peer, DispatchArrived)
            assert_same(arrival.parts, chosen(parts, wanted))
            world.answer(arrival, peer)
        for event in world.take(A0, CombineArrived, 2):
            wanted = chosen(parts, rows[event.peer.rank])
            np.testing.assert_array_equal(event.rows, expected_answer(wanted, event.peer))
    world.exchange(A0, [F0, F1], make_parts(3))
    assert world.seen(A0, CombineArrived) == []


def test_a_dense_answer_names_no_rows(world: World) -> None:
    world.build(1, 1)
    send(world, make_parts(5), [np.array([1])], [F0])
    (arrival,) = world.take(F0, DispatchArrived)
    world.answer(arrival, F0)
    world.take(A0, CombineArrived)
    for _ in range(2):  # both parities, one of which was sparse before
        world.dispatch(A0, [F0], make_parts(5))
        (arrival,) = world.take(F0, DispatchArrived)
        assert arrival.parts.row_idx is None
        world.answer(arrival, F0)
        (event,) = world.take(A0, CombineArrived)
        assert event.row_idx is None


def test_the_largest_sparse_dispatch_fits(world: World) -> None:
    world.build(1, 1)
    parts = make_parts(LAYOUT.max_tokens, LAYOUT.max_top_k)
    everything = np.arange(LAYOUT.max_tokens)
    send(world, parts, [everything], [F0])
    (arrival,) = world.take(F0, DispatchArrived)
    assert_same(arrival.parts, chosen(parts, everything))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (np.array([3, 2]), "do not rise strictly within 5 rows"),
        (np.array([2, 2]), "do not rise strictly"),
        (np.array([-1, 2]), "do not rise strictly"),
        (np.array([0, 5]), "do not rise strictly"),
        (np.array([0.0, 1.0]), "do not rise strictly"),
        (np.array([[0, 1]]), "do not rise strictly"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_sent(world: World, rows: Any, problem: str) -> None:
    world.build(1, 2)
    good = np.array([0, 1])
    with pytest.raises(ConfigError, match=problem):
        send(world, make_parts(5), [good, rows], [F0, F1])
    with pytest.raises(ConfigError, match="1 lists of rows for 2 peers"):
        send(world, make_parts(5), [good], [F0, F1])
    with pytest.raises(ConfigError, match="exceed the slot"):
        send(world, make_parts(LAYOUT.max_tokens + 1), [good, good], [F0, F1])
    with pytest.raises(ConfigError, match="rows is float64"):
        send(world, make_parts(5)._replace(rows=np.zeros((5, LAYOUT.hidden))), [good, good], [F0, F1])
    with pytest.raises(ConfigError, match="row_idx must not be given"):
        world.dispatch(A0, [F0, F1], make_parts(5)._replace(row_idx=np.arange(5, dtype=np.int32)))
    world.settle(0.02)
    assert world.seen(F0, DispatchArrived) == world.seen(F1, DispatchArrived) == []
    world.exchange(A0, [F0, F1], make_parts(5))


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [-1, 1], [1, 5], [4, 7]])
def test_wrong_indices_of_a_peer_never_reach_the_engine(world: World, rows: list[int]) -> None:
    world.build(1, 1)
    world.forget()
    pair = world.pair(A0, F0)
    publish = pair.channel.post

    def spoilt(stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        pair.tx_slot(stream, seq).dispatch(2, 2, True).parts.row_idx[...] = rows  # type: ignore[index]
        publish(stream, parity, seq, frame_bytes)

    pair.channel.post = spoilt  # type: ignore[method-assign]
    send(world, make_parts(5), [np.array([0, 1])], [F0])
    del pair.channel.post  # a channel that holds itself would outlive its close
    (rejected,) = world.take(F0, FrameRejected)
    assert "row_idx does not rise strictly within a batch of 5" in rejected.reason
    assert world.seen(F0, DispatchArrived) == []
    world.until_connected()
    world.forget()
    world.exchange(A0, [F0], make_parts(4))


def test_sparse_dispatches_survive_checksums(world: World) -> None:
    world.build(1, 1, checksum=True)
    parts = make_parts(30, 2)
    rows = np.arange(0, 30, 3)
    send(world, parts, [rows], [F0])
    (arrival,) = world.take(F0, DispatchArrived)
    assert_same(arrival.parts, chosen(parts, rows))
