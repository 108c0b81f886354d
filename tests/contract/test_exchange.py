"""What a pair that is up promises: order, content, sizes, slots, views."""

from __future__ import annotations

import os
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
    IdleNotice,
    PayloadLayout,
    PeerNotConnectedError,
    SlotBusyError,
    StaleArrivalError,
    WireDtype,
)
from tests.contract.world import LAYOUT, World, assert_same, attention, expected_answer, ffn, make_parts

A0, A1 = attention(0), attention(1)
F0, F1, F2 = ffn(0), ffn(1), ffn(2)


@pytest.mark.parametrize("dtype", list(WireDtype))
@pytest.mark.parametrize("top_k", [0, 3])
def test_payload_arrives_bit_exact(world: World, dtype: WireDtype, top_k: int) -> None:
    layout = PayloadLayout(hidden=576, max_tokens=16, max_top_k=3, dispatch_dtype=dtype, combine_dtype=dtype)
    world.build(1, 1, layout=layout)
    parts = make_parts(11, top_k, layout=layout)
    world.dispatch(A0, [F0], parts)
    (arrival,) = world.take(F0, DispatchArrived)
    assert_same(arrival.parts, parts)
    answer = make_parts(11, 0, seed=7, layout=layout)
    world.meshes[F0].combine(arrival, CombineMeta(), answer.rows, answer.scales)
    (combined,) = world.take(A0, CombineArrived)
    np.testing.assert_array_equal(combined.rows, answer.rows)
    if dtype is WireDtype.FP8_E4M3:
        np.testing.assert_array_equal(combined.scales, answer.scales)
    else:
        assert combined.scales is None


def test_header_fields_arrive(world: World) -> None:
    world.build(1, 1, epoch=7)
    mask = 1 << 127 | 1
    meta = DispatchMeta(stream=2, epoch=7, step=1 << 40, layer=61, gang_id=1 << 50, member_mask=mask, flags=5)
    seq = world.meshes[A0].dispatch([F0], meta, make_parts(3))
    (arrival,) = world.take(F0, DispatchArrived)
    header = arrival.header
    assert (header.stream, header.epoch, header.step, header.layer) == (2, 7, 1 << 40, 61)
    assert (header.gang_id, header.member_mask, header.flags, header.seq) == (1 << 50, mask, 5, seq)
    assert (header.num_tokens, header.top_k) == (3, 2)
    answer = CombineMeta(gang_id=9, member_mask=mask, gang_tokens=300, compute_ns=1 << 41, flags=3)
    world.meshes[F0].combine(arrival, answer, expected_answer(arrival.parts, F0))
    (combined,) = world.take(A0, CombineArrived)
    header = combined.header
    assert (header.gang_id, header.member_mask, header.gang_tokens) == (9, mask, 300)
    assert (header.compute_ns, header.flags, header.seq) == (1 << 41, 3, seq)
    assert (header.stream, header.epoch, header.step, header.layer) == (2, 7, 1 << 40, 61)


def test_dispatches_of_a_stream_arrive_in_order(world: World) -> None:
    world.build(1, 1)
    sent = [make_parts(n, seed=n) for n in (5, 6)]
    seqs = [world.dispatch(A0, [F0], parts) for parts in sent]
    arrivals = world.take(F0, DispatchArrived, 2)
    assert [arrival.header.seq for arrival in arrivals] == seqs == [1, 2]
    for arrival, parts in zip(arrivals, sent, strict=True):
        assert_same(arrival.parts, parts)


def test_zero_tokens_are_a_normal_exchange(world: World) -> None:
    world.build(1, 2)
    for _ in range(3):
        world.exchange(A0, [F0, F1], make_parts(0))
        world.exchange(A0, [F0, F1], make_parts(0, top_k=0))


def test_largest_exchange_fits(world: World) -> None:
    world.build(1, 1)
    world.exchange(A0, [F0], make_parts(LAYOUT.max_tokens, LAYOUT.max_top_k))
    with pytest.raises(ConfigError, match="exceed the slot"):
        world.dispatch(A0, [F0], make_parts(LAYOUT.max_tokens + 1))
    with pytest.raises(ConfigError, match="exceed the slot"):
        world.dispatch(A0, [F0], make_parts(1, LAYOUT.max_top_k + 1))


def test_large_payload_crosses_whole(world: World) -> None:
    layout = PayloadLayout(7168, 256, 8, WireDtype.BF16, WireDtype.FP32)  # 3.7 MB out, 7.3 MB back
    world.build(1, 1, layout=layout)
    parts = make_parts(256, 8, layout=layout)
    for _ in range(3):
        world.dispatch(A0, [F0], parts)
        (arrival,) = world.take(F0, DispatchArrived)
        assert_same(arrival.parts, parts)
        rows = parts.rows.astype(np.float32)
        world.meshes[F0].combine(arrival, CombineMeta(), rows)
        (combined,) = world.take(A0, CombineArrived)
        np.testing.assert_array_equal(combined.rows, rows)


def test_many_ranks_and_rounds(world: World) -> None:
    world.build(2, 3)
    rng = np.random.default_rng(3)
    for round_idx in range(12):
        stream = round_idx % 4
        sent = {a: make_parts(int(rng.integers(0, 65)), seed=round_idx * 2 + a.rank) for a in (A0, A1)}
        for sender, parts in sent.items():
            world.dispatch(sender, [F0, F1, F2], parts, stream=stream, layer=round_idx)
        for peer in (F0, F1, F2):
            for arrival in world.take(peer, DispatchArrived, 2):
                assert_same(arrival.parts, sent[arrival.peer])
                world.answer(arrival, peer)
        for sender, parts in sent.items():
            combined = world.take(sender, CombineArrived, 3)
            assert {event.peer for event in combined} == {F0, F1, F2}
            for event in combined:
                np.testing.assert_array_equal(event.rows, expected_answer(parts, event.peer))


def test_all_streams_at_once(world: World) -> None:
    world.build(1, 2)
    sent = [make_parts(8 + stream, seed=stream) for stream in range(4)]
    for stream, parts in enumerate(sent):
        world.dispatch(A0, [F0, F1], parts, stream=stream)
    for peer in (F0, F1):
        # Answered in the opposite order: streams do not wait for one another.
        for arrival in sorted(world.take(peer, DispatchArrived, 4), key=lambda event: -event.header.stream):
            world.answer(arrival, peer)
    for event in world.take(A0, CombineArrived, 8):
        np.testing.assert_array_equal(event.rows, expected_answer(sent[event.header.stream], event.peer))


def test_a_stream_has_two_slots_and_no_more(world: World) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(1, seed=1))
    world.dispatch(A0, [F0], make_parts(2, seed=2))
    with pytest.raises(SlotBusyError):
        world.dispatch(A0, [F0], make_parts(3, seed=3))
    with pytest.raises(SlotBusyError):
        world.meshes[A0].dispatch_view(F0, 0, 3, 2)
    first, second = world.take(F0, DispatchArrived, 2)
    world.answer(second, F0)  # settles the first as well
    with pytest.raises(StaleArrivalError):
        world.answer(first, F0)
    (combined,) = world.take(A0, CombineArrived)
    assert combined.header.seq == 2
    world.exchange(A0, [F0], make_parts(3, seed=3))


def test_the_answer_to_a_superseded_dispatch_is_dropped(world: World) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(4, seed=1))
    world.dispatch(A0, [F0], make_parts(5, seed=2))
    for arrival in world.take(F0, DispatchArrived, 2):
        world.answer(arrival, F0)
    (combined,) = world.take(A0, CombineArrived)
    assert combined.header.seq == 2
    world.settle(0.02)
    assert world.seen(A0, CombineArrived) == []
    assert world.meshes[A0].stats()["peers"]["ffn/0"]["superseded"] == 1


def test_an_arrival_is_answered_once(world: World) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(4))
    (arrival,) = world.take(F0, DispatchArrived)
    world.answer(arrival, F0)
    with pytest.raises(StaleArrivalError):
        world.answer(arrival, F0)
    with pytest.raises(StaleArrivalError):
        world.meshes[F0].combine_view(arrival)


def test_views_save_the_copy(world: World) -> None:
    world.build(1, 2)
    parts = make_parts(9)
    view = world.meshes[A0].dispatch_view(F0, 0, 9, 2)
    for target, source in zip(view, parts, strict=True):
        if target is not None and source is not None:
            np.copyto(target, source)
    world.dispatch(A0, [F0, F1], view)
    for peer in (F0, F1):
        (arrival,) = world.take(peer, DispatchArrived)
        assert_same(arrival.parts, parts)
        rows = world.meshes[peer].combine_view(arrival)
        rows[...] = expected_answer(arrival.parts, peer)
        world.meshes[peer].combine(arrival, CombineMeta(), rows)
    for event in world.take(A0, CombineArrived, 2):
        np.testing.assert_array_equal(event.rows, expected_answer(parts, event.peer))


def test_received_views_last_as_long_as_promised(world: World) -> None:
    world.build(1, 1)
    kept: list[tuple[Any, Any]] = []
    for round_idx in range(6):
        parts = make_parts(10, seed=round_idx)
        world.dispatch(A0, [F0], parts)
        (arrival,) = world.take(F0, DispatchArrived)
        # The previous combine is still readable while the next exchange is under way.
        for rows, expected in kept[-1:]:
            np.testing.assert_array_equal(rows, expected)
        world.answer(arrival, F0)
        assert_same(arrival.parts, parts)
        (combined,) = world.take(A0, CombineArrived)
        for rows, expected in kept[-1:]:
            np.testing.assert_array_equal(rows, expected)
        kept.append((combined.rows, expected_answer(parts, F0)))


def test_dispatch_is_all_or_nothing(world: World) -> None:
    world.build(1, 1)
    with pytest.raises(PeerNotConnectedError, match="ffn/1"):
        world.dispatch(A0, [F0, F1], make_parts(2))
    world.dispatch(A0, [F0], make_parts(3, seed=5))
    (arrival,) = world.take(F0, DispatchArrived)
    assert arrival.header.num_tokens == 3
    assert arrival.header.seq == 1


def test_wrong_arguments_are_refused_before_anything_is_sent(world: World) -> None:
    world.build(1, 1)
    mesh = world.meshes[A0]
    good = make_parts(2)
    wrong_rows = good._replace(rows=np.zeros((2, LAYOUT.hidden), np.float64))
    with pytest.raises(ConfigError, match="rows is float64"):
        world.dispatch(A0, [F0], wrong_rows)
    with pytest.raises(ConfigError, match="rows is"):
        world.dispatch(A0, [F0], good._replace(rows=np.zeros((2, 5), np.float32)))
    with pytest.raises(ConfigError, match="expert_weights must be given"):
        world.dispatch(A0, [F0], good._replace(expert_weights=None))
    with pytest.raises(ConfigError, match="scales must not be given"):
        world.dispatch(A0, [F0], good._replace(scales=np.zeros((2, 2), np.float32)))
    with pytest.raises(ConfigError, match="stream 4"):
        world.dispatch(A0, [F0], good, stream=4)
    with pytest.raises(ConfigError, match="epoch 3 is not live"):
        world.dispatch(A0, [F0], good, epoch=3)
    with pytest.raises(ConfigError, match="no peer"):
        world.dispatch(A0, [], good)
    with pytest.raises(ConfigError, match="only attention ranks"):
        world.meshes[F0].dispatch([A0], DispatchMeta(0, 1, 0, 0), good)
    with pytest.raises(ConfigError, match="does not fit the header"):
        world.dispatch(A0, [F0], good, layer=1 << 16)
    world.settle(0.02)
    assert world.seen(F0, DispatchArrived) == []
    assert mesh.stats()["peers"]["ffn/0"]["sent_messages"] == 0
    world.exchange(A0, [F0], good)


def test_rows_of_an_answer_are_checked(world: World) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(2))
    (arrival,) = world.take(F0, DispatchArrived)
    with pytest.raises(ConfigError, match="rows is"):
        world.meshes[F0].combine(arrival, CombineMeta(), np.zeros((3, LAYOUT.hidden), np.float32))
    world.answer(arrival, F0)
    world.take(A0, CombineArrived)


def test_sequence_numbers_count_per_stream_and_may_skip_a_peer(world: World) -> None:
    world.build(1, 2)
    world.exchange(A0, [F0, F1], make_parts(1, seed=1))
    world.exchange(A0, [F0], make_parts(2, seed=2))  # as after the loss of one link: only one peer gets it again
    world.exchange(A0, [F1], make_parts(3, seed=3))
    world.exchange(A0, [F0, F1], make_parts(4, seed=4))
    world.exchange(A0, [F0, F1], make_parts(5, seed=5), stream=1)
    assert world.dispatch(A0, [F0], make_parts(1), stream=1) == 2
    assert world.dispatch(A0, [F0], make_parts(1), stream=0) == 5


def test_checksums_pass_when_nothing_is_wrong(world: World) -> None:
    world.build(1, 2, checksum=True)
    for seed in range(4):
        world.exchange(A0, [F0, F1], make_parts(17, seed=seed))


def test_one_end_may_use_checksums_alone(world: World) -> None:
    world.add(A0, checksum=True)
    world.add(F0)
    world.form(1)
    world.until_connected()
    world.exchange(A0, [F0], make_parts(17))


def test_idle_notice_names_the_last_seq(world: World) -> None:
    world.build(1, 2)
    world.exchange(A0, [F0, F1], make_parts(1), stream=3)
    world.meshes[A0].idle(3)
    for peer in (F0, F1):
        assert world.take(peer, IdleNotice) == [IdleNotice(A0, 3, 1)]


def test_idle_notice_is_ignored_once_a_newer_dispatch_was_seen(world: World) -> None:
    world.build(1, 1)
    world.exchange(A0, [F0], make_parts(1))
    sender = world.meshes[A0]
    world.dispatch(A0, [F0], make_parts(2))
    (arrival,) = world.take(F0, DispatchArrived)
    sender._seq[0] -= 1  # the notice was on its way when the dispatch overtook it
    sender.idle(0)
    sender._seq[0] += 1
    world.settle(0.05)
    assert world.seen(F0, IdleNotice) == []
    world.answer(arrival, F0)
    world.take(A0, CombineArrived)


def test_stats_and_trace_tell_what_happened(world: World) -> None:
    world.build(1, 1)
    parts = make_parts(6)
    world.exchange(A0, [F0], parts, layer=4)
    mine, theirs = (world.meshes[rank].stats()["peers"] for rank in (A0, F0))
    assert mine["ffn/0"]["sent_messages"] == theirs["attention/0"]["received_messages"] == 1
    assert mine["ffn/0"]["sent_bytes"] == theirs["attention/0"]["received_bytes"] > parts.rows.nbytes
    assert mine["ffn/0"]["received_bytes"] == parts.rows.nbytes
    assert mine["ffn/0"]["answers_waited_ns"] > 0
    assert mine["ffn/0"]["transport"] == world.transport
    assert mine["ffn/0"]["transport_reason"]
    stages = [event["stage"] for event in world.meshes[A0].trace.dump()]
    assert stages == ["peer_up", "dispatch_posted", "combine_arrived"]
    stages = [event["stage"] for event in world.meshes[F0].trace.dump()]
    assert stages == ["peer_up", "dispatch_arrived", "combine_posted"]


def test_a_look_between_two_progresses_takes_nothing_away(world: World) -> None:
    world.build(1, 1)
    mesh = world.meshes[A0]
    assert mesh.has_news() is False
    world.dispatch(A0, [F0], make_parts(3))
    (arrival,) = world.take(F0, DispatchArrived)
    assert mesh.has_news() is False
    world.answer(arrival, F0)
    world.frozen.add(A0)  # no progress of its own
    world.until(mesh.has_news)
    assert mesh.has_news() is True
    (combined,) = [event for event in mesh.progress(0.0) if isinstance(event, CombineArrived)]
    assert combined.header.num_tokens == 3
    assert mesh.has_news() is False


def test_progress_wakes_on_request(world: World) -> None:
    world.build(1, 1)
    mesh = world.meshes[A0]
    mesh.wake()
    assert mesh.progress(10.0) == []  # the test's time limit is what fails otherwise


@pytest.mark.parametrize("transport", ("shm", "tcp", "verbs"), indirect=True)  # a virtual clock waits for no descriptor
def test_progress_returns_for_a_watched_descriptor(world: World) -> None:
    world.build(1, 1)
    mesh = world.meshes[A0]
    readable, writable = os.pipe()
    try:
        mesh.watch_fd(readable)
        os.write(writable, b"x")
        assert mesh.progress(10.0) == []
        mesh.unwatch_fd(readable)
        mesh.unwatch_fd(readable)
        assert mesh.progress(0.0) == []
    finally:
        os.close(readable)
        os.close(writable)


def test_a_payload_view_of_another_shape_is_copied(world: World) -> None:
    world.build(1, 1)
    rows = np.asfortranarray(make_parts(5, 0).rows)  # not contiguous in the wire's order
    world.exchange(A0, [F0], DispatchParts(rows))
