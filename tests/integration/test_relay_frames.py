"""One frame at a time: what native code that makes exchanges by itself takes, and what it leaves to the mesh."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from afd.kv.cache import KVCache
from afd.model.halves import AttentionBatch, Dispatch
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.relay import runs
from afd.relay.native import Outcome
from afd.relay.runs import AttentionRelay, FfnRelay
from afd.types import FfnParallel
from stepmesh.lane import BEFORE_FIRST, Trips
from stepmesh.layout import PayloadLayout
from stepmesh.native import native
from stepmesh.tensor import to_numpy, to_torch
from stepmesh.types import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    FrameRejected,
    IdleNotice,
    PeerDown,
    WireDtype,
)
from stepmesh.wire import HEADER, write_trailer
from tests.contract.world import World, attention, ffn
from tests.fakes.native_ops import native_ops

pytestmark = [
    pytest.mark.usefixtures("patient_relays"),
    pytest.mark.skipif(
        native is None or native_ops() is None,
        reason="native code was not built: setup.py build_ext --inplace",
    ),
]

HIDDEN = 64
LAYOUT = PayloadLayout(HIDDEN, 8, 2, WireDtype.BF16, WireDtype.BF16)
A, F = attention(0), ffn(0)
NO_TRIPS = Trips(0, 0, 0.0, 0.0, lambda: [])
GANG = {"gang_id": 7, "member_mask": 1}


@pytest.fixture
def world(request):
    world = World(getattr(request, "param", "shm"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def ffn_half():
    return load_ffn_half(
        resolve_model("dummy:llama-tiny"), ShardSpec(0, 1, FfnParallel.HYBRID), select("cpu", "bfloat16")
    )


def rows_of(seed, num_tokens=3):
    """bf16 bits of small random rows."""
    values = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return to_numpy(values.bfloat16())


def answered(world, **overrides):
    """Layer 0 of a stream, answered by the FFN rank as the former of a gang: that arrival."""
    world.build(1, 1, **({"layout": LAYOUT} | overrides))
    world.forget()
    world.dispatch(A, [F], DispatchParts(rows_of(0)))
    (arrival,) = world.take(F, DispatchArrived)
    world.meshes[F].combine(arrival, CombineMeta(**GANG), rows_of(1))
    world.take(A, CombineArrived)
    world.forget()
    return arrival


def test_the_next_layer_is_answered_natively(world, ffn_half):
    arrival = answered(world)
    parts = DispatchParts(rows_of(2))
    seq = world.dispatch(A, [F], parts, layer=1, **GANG)
    lane = world.meshes[F].lanes.after_arrival(arrival, CombineMeta(**GANG))
    with torch.inference_mode():
        done = FfnRelay.of(ffn_half).run(1, lane)
        expected = ffn_half.layer(Dispatch(1, to_torch(parts.rows, WireDtype.BF16)))
    assert done.num_laps == 1 and done.outcome is Outcome.LATE  # nobody sends layer 2
    [times] = zip(*done.laps(), strict=True)
    assert list(times) == sorted(times) and times[2] == times[3]
    world.meshes[F].lanes.book(lane, Trips(1, 1, done.wait_s, done.ended_s, lambda: [(times[0], times[2])]))
    (combined,) = world.take(A, CombineArrived)
    header = combined.header
    assert (header.seq, header.layer, header.gang_id, header.member_mask) == (seq, 1, 7, 1)
    assert (header.gang_tokens, header.compute_ns) == (3, round(done.compute_s * 1e9))
    np.testing.assert_array_equal(combined.rows, to_numpy(expected))
    # The mesh goes on from there as if it had done it all itself.
    world.dispatch(A, [F], parts, layer=2, **GANG)
    (arrival,) = world.take(F, DispatchArrived)
    assert arrival.header.seq == seq + 1
    world.meshes[F].combine(arrival, CombineMeta(**GANG), rows_of(3))
    world.take(A, CombineArrived)


@pytest.mark.parametrize(
    ("change", "num_tokens"),
    [
        ({"layer": 2}, 3),
        ({"layer": 0}, 3),
        ({"step": 2}, 3),
        ({"gang_id": 8}, 3),
        ({"member_mask": 3}, 3),
        ({"member_mask": 1 | 1 << 64}, 3),
        ({"stream": 1}, 3),
        ({}, 2),
        ({}, 4),
    ],
)
def test_what_does_not_follow_is_left_to_the_mesh(world, ffn_half, change, num_tokens):
    arrival = answered(world)
    parts = DispatchParts(rows_of(2, num_tokens))
    world.dispatch(A, [F], parts, **({"layer": 1} | GANG | change))
    lane = world.meshes[F].lanes.after_arrival(arrival, CombineMeta(**GANG))
    with torch.inference_mode():
        done = FfnRelay.of(ffn_half).run(1, lane)
    assert (done.num_laps, done.outcome) == (0, Outcome.OTHER)
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    (found,) = world.take(F, DispatchArrived)
    np.testing.assert_array_equal(found.parts.rows, parts.rows)


@pytest.mark.parametrize(
    ("forgery", "reason"),
    [
        ({"trailer": 99}, "incomplete frame"),
        ({"generation": 9}, "generation 9"),
        ({"num_tokens": 9}, "exceed the slot"),
        ({"num_tokens": 2}, "2 tokens need"),
        ({"payload_bytes": 1 << 31}, "payload of"),
        ({"header_seq": 5}, "its slot"),
        ({"wire_dtype": 1}, "wire dtype"),
        ({"epoch": 2}, None),
    ],
)
def test_a_forged_frame_is_left_to_the_mesh_which_rejects_it(world, ffn_half, forgery, reason):
    arrival = answered(world)
    fields = {"wire_dtype": WireDtype.BF16, "layer": 1, "gang_id": 7, "member_mask_low": 1} | forgery
    world.forge(A, F, DispatchParts(rows_of(2)), seq=2, **fields)
    lane = world.meshes[F].lanes.after_arrival(arrival, CombineMeta(**GANG))
    with torch.inference_mode():
        done = FfnRelay.of(ffn_half).run(1, lane)
    assert (done.num_laps, done.outcome) == (0, Outcome.OTHER)
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    if reason is None:  # of an epoch that may come yet
        world.settle()
        assert not world.seen(F, DispatchArrived) and not world.seen(F, FrameRejected)
        return
    (rejected,) = world.take(F, FrameRejected)
    assert reason in rejected.reason


def test_nothing_is_relayed_without_a_dispatch(world, ffn_half, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE_S", 1e-3)
    arrival = answered(world)
    lane = world.meshes[F].lanes.after_arrival(arrival, CombineMeta(**GANG))
    with torch.inference_mode():
        done = FfnRelay.of(ffn_half).run(1, lane)
    assert (done.num_laps, done.outcome) == (0, Outcome.LATE)


# Where a step begins.

NAMED = CombineMeta(9, 1)


SILENT = {"heartbeat_s": 30.0, "peer_timeout_s": 90.0}  # a heartbeat would wake up whoever sleeps


def settled(world, **overrides):
    """The FFN side's lane after layer 0 of step 1, as if that had been the whole step."""
    arrival = answered(world, **overrides)
    lane = world.meshes[F].lanes.after_arrival(arrival, CombineMeta(**GANG))
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    return lane


def begin(ffn_half, lane):
    with torch.inference_mode():
        return FfnRelay.of(ffn_half).begin(lane)


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_a_step_begins_natively_in_the_gang_that_was_named(world, ffn_half, num_tokens):
    lane, parts = settled(world), DispatchParts(rows_of(2, num_tokens))
    seq = world.dispatch(A, [F], parts, layer=0, step=2)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    done = begin(ffn_half, lane)
    assert done.num_laps == 1 and done.outcome is Outcome.LATE  # nobody sends layer 1
    assert done.first_begun_s == done.laps().begun_s[0] >= done.began_s
    newest = lane.newest()
    assert (newest.seq, newest.step, newest.layer, newest.num_tokens, newest.gang_id) == (seq, 2, 0, num_tokens, 9)
    before = world.meshes[F].stats()["peers"][str(A)]
    world.meshes[F].lanes.book(lane, Trips(1, 1, done.wait_s, done.ended_s, lambda: [(0.0, 1.0)]))
    after = world.meshes[F].stats()["peers"][str(A)]
    assert after["received_bytes"] - before["received_bytes"] == num_tokens * HIDDEN * 2
    (combined,) = world.take(A, CombineArrived)
    header = combined.header
    assert (header.seq, header.layer, header.gang_id, header.member_mask) == (seq, 0, 9, 1)
    with torch.inference_mode():
        expected = ffn_half.layer(Dispatch(0, to_torch(parts.rows, WireDtype.BF16)))
    np.testing.assert_array_equal(combined.rows, to_numpy(expected))
    # The mesh goes on from there as if it had done it all itself.
    world.dispatch(A, [F], parts, layer=1, step=2, gang_id=9, member_mask=1)
    (arrival,) = world.take(F, DispatchArrived)
    assert arrival.header.seq == seq + 1


@pytest.mark.parametrize(
    "change", [{"layer": 1}, {"step": 1}, {"gang_id": 7}, {"member_mask": 1}, {"member_mask": 1 << 64}, {"stream": 1}]
)
def test_what_does_not_begin_a_step_is_left_to_the_mesh(world, ffn_half, change):
    lane, parts = settled(world), DispatchParts(rows_of(2))
    world.dispatch(A, [F], parts, **({"layer": 0, "step": 2} | change))
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    done = begin(ffn_half, lane)
    assert (done.num_laps, done.outcome) == (0, Outcome.OTHER)
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    (found,) = world.take(F, DispatchArrived)
    np.testing.assert_array_equal(found.parts.rows, parts.rows)


def test_a_step_of_too_many_rows_is_left_to_the_mesh(world, ffn_half, monkeypatch):
    monkeypatch.setattr(runs, "MAX_RELAY_TOKENS", 2)
    lane = settled(world)
    world.dispatch(A, [F], DispatchParts(rows_of(2)), layer=0, step=2)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    assert begin(ffn_half, lane).outcome is Outcome.OTHER


@pytest.mark.parametrize(
    ("forgery", "reason"),
    [({"trailer": 99}, "incomplete frame"), ({"num_tokens": 2}, "2 tokens need"), ({"epoch": 2}, None)],
)
def test_a_forged_beginning_is_left_to_the_mesh_which_rejects_it(world, ffn_half, forgery, reason):
    lane = settled(world)
    world.forge(A, F, DispatchParts(rows_of(2)), seq=2, **({"wire_dtype": WireDtype.BF16, "step": 2} | forgery))
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    assert begin(ffn_half, lane).outcome is Outcome.OTHER
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    if reason is None:  # of an epoch that may come yet
        world.settle()
        assert not world.seen(F, FrameRejected)
        return
    (rejected,) = world.take(F, FrameRejected)
    assert reason in rejected.reason


def test_who_sleeps_until_a_step_begins_hears_what_else_comes(world, ffn_half, monkeypatch):
    monkeypatch.setattr(runs, "STEP_PATIENCE_S", 60.0)
    monkeypatch.setattr(runs, "RELAY_S", 60.0)
    lane = settled(world, **SILENT)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    world.meshes[A].idle(0)
    assert begin(ffn_half, lane).outcome is Outcome.OTHER
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    world.take(F, IdleNotice)


def test_a_wake_up_that_native_code_slept_through_is_not_lost(world, ffn_half, monkeypatch):
    monkeypatch.setattr(runs, "STEP_PATIENCE_S", 0.01)
    lane = settled(world)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    world.meshes[F].wake()
    begin(ffn_half, lane)
    world.meshes[F].lanes.book(lane, NO_TRIPS)
    begun_s = world.now()
    world.meshes[F]._fabric.wait(30.0)
    assert world.now() - begun_s < 10.0


@pytest.fixture
def later():
    """Calls something from another thread after 50 ms, when the main thread sleeps (or not yet: no matter)."""
    timers = []

    def call(function):
        timers.append(threading.Timer(0.05, function))
        timers[-1].start()

    yield call
    for timer in timers:
        timer.join()


def test_who_sleeps_until_a_step_begins_wakes_up_for_it(world, ffn_half, monkeypatch, later):
    monkeypatch.setattr(runs, "STEP_PATIENCE_S", 60.0)
    monkeypatch.setattr(runs, "RELAY_S", 60.0)
    lane = settled(world, **SILENT)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    later(lambda: world.dispatch(A, [F], DispatchParts(rows_of(2)), layer=0, step=2))
    done = begin(ffn_half, lane)
    assert (done.num_laps, done.outcome) == (1, Outcome.LATE) and done.ended_s - done.began_s < 30.0


def test_who_sleeps_until_a_step_begins_can_be_woken(world, ffn_half, monkeypatch, later):
    monkeypatch.setattr(runs, "STEP_PATIENCE_S", 60.0)
    monkeypatch.setattr(runs, "RELAY_S", 60.0)
    lane = settled(world, **SILENT)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    later(world.meshes[F].wake)
    done = begin(ffn_half, lane)
    assert (done.num_laps, done.outcome) == (0, Outcome.OTHER) and done.ended_s - done.began_s < 30.0


def test_a_peer_that_makes_the_bell_a_blocking_one_keeps_nobody_asleep(world, ffn_half, monkeypatch):
    monkeypatch.setattr(runs, "STEP_PATIENCE_S", 0.05)
    lane = settled(world)
    assert world.meshes[F].lanes.before_step(lane, NAMED)
    os.set_blocking(world.pair(F, A).channel._bell_fd, True)
    done = begin(ffn_half, lane)
    assert done.num_laps == 0 and done.ended_s - done.began_s < 30.0


def test_a_lane_of_a_pair_that_was_lost_begins_nothing(world):
    lane = settled(world)
    world.cut(A, F)
    world.until(lambda: world.seen(F, PeerDown))
    assert not world.meshes[F].lanes.before_step(lane, NAMED)
    world.until_connected()
    assert not world.meshes[F].lanes.before_step(lane, NAMED)


def test_a_step_begins_on_a_lane_only_while_all_is_settled(world):
    lane = settled(world)
    mesh = world.meshes[F]
    assert mesh.lanes.before_step(lane, NAMED)
    mesh.lanes.book(lane, NO_TRIPS)
    world.dispatch(A, [F], DispatchParts(rows_of(2)), layer=0, step=2)
    (arrival,) = world.take(F, DispatchArrived)
    assert not mesh.lanes.before_step(lane, NAMED), "another dispatch is newer"
    mesh.combine(arrival, NAMED, rows_of(3))
    world.take(A, CombineArrived)
    assert not mesh.lanes.before_step(lane, NAMED)
    again = mesh.lanes.after_arrival(arrival, NAMED)
    assert again is lane and mesh.lanes.before_step(lane, NAMED)
    world.add(attention(1), layout=LAYOUT)
    world.form(2)
    world.until_connected()
    assert not mesh.lanes.before_step(lane, NAMED), "there is a second peer"


def test_the_attention_sides_first_layer_is_sent_and_not_waited_for(world):
    """With the row of the embedding alone, behind no answer; from there on the mesh, or the relay, goes on."""
    folder = resolve_model("dummy:llama-tiny")
    half = load_attention_half(folder, select("cpu", "bfloat16"))
    cache = KVCache(half.spec, 4, 16, half.dtype)
    batch = AttentionBatch.build([(0, 3, [0])], 16, half.device)
    half.prepare(batch)
    world.build(1, 1, layout=LAYOUT)
    world.forget()
    meta = DispatchMeta(0, 1, 5, BEFORE_FIRST)
    lane = world.meshes[A].lanes.after_answer(F, meta, 3)
    with torch.inference_mode():
        x = half.embed(torch.tensor([1, 2, 3]))
        done = AttentionRelay.of(half, cache).begin(x, batch, lane)
        expected = half.layer(0, half.embed(torch.tensor([1, 2, 3])), batch, KVCache(half.spec, 4, 16, half.dtype))
    assert (done.num_laps, done.num_answered, done.outcome) == (1, 0, Outcome.SENT) and done.open_wait_s == 0.0
    world.meshes[A].lanes.book(lane, Trips(1, 0, 0.0, done.ended_s, lambda: [(0.0, None)]))
    (arrival,) = world.take(F, DispatchArrived)
    header = arrival.header
    assert (header.seq, header.step, header.layer, header.gang_id, header.member_mask) == (1, 5, 0, 0, 0)
    np.testing.assert_array_equal(arrival.parts.rows, to_numpy(expected.rows))
    world.meshes[F].combine(arrival, CombineMeta(**GANG), rows_of(5))
    world.take(A, CombineArrived)


@pytest.mark.parametrize("world", ["inproc", "tcp", "shm"], indirect=True)
def test_only_shared_memory_has_lanes(world):
    arrival = answered(world)
    has = world.transport == "shm"
    assert (world.meshes[F].lanes.after_arrival(arrival, CombineMeta()) is not None) is has
    meta = DispatchMeta(0, 1, 1, 0)
    assert (world.meshes[A].lanes.after_answer(F, meta, 3) is not None) is has


def test_frames_with_checksums_have_no_lane(world):
    arrival = answered(world, checksum=True)
    assert world.meshes[F].lanes.after_arrival(arrival, CombineMeta()) is None
    assert world.meshes[A].lanes.after_answer(F, DispatchMeta(0, 1, 1, 0), 3) is None


def test_an_open_exchange_or_a_second_peer_leaves_no_lane(world):
    arrival = answered(world)
    world.dispatch(A, [F], DispatchParts(rows_of(2)), layer=1)
    assert world.meshes[A].lanes.after_answer(F, DispatchMeta(0, 1, 1, 1), 3) is None
    (second,) = world.take(F, DispatchArrived)
    assert world.meshes[F].lanes.after_arrival(arrival, CombineMeta()) is None  # not the newest
    assert world.meshes[F].lanes.after_arrival(second, CombineMeta()) is None  # not answered
    world.meshes[F].combine(second, CombineMeta(), rows_of(3))
    assert world.meshes[F].lanes.after_arrival(second, CombineMeta()) is not None
    world.add(attention(1), layout=LAYOUT)
    world.form(2)
    world.until_connected()
    assert world.meshes[F].lanes.after_arrival(second, CombineMeta()) is None


def test_an_answer_that_is_still_to_come_is_the_meshs(world):
    """Native code of the attention side has sent and stopped: booked, the exchange is one like any other."""
    answered(world)
    mesh = world.meshes[A]
    lane = mesh.lanes.after_answer(F, DispatchMeta(0, 1, 1, 0, 7, 1), 3)
    seq = lane.last.seq + 1
    slot = world.pair(A, F).tx_slot(0, seq)
    rows = rows_of(4)
    slot.dispatch(3, 0).parts.rows[...] = rows
    header = lane.last._replace(seq=seq, layer=1)
    HEADER.pack_into(slot.memory, 0, *header)
    write_trailer(slot.memory, header.payload_bytes, seq)
    world.pair(A, F).channel.post(0, seq & 1, seq, 0)
    mesh.lanes.book(lane, Trips(1, 0, 0.0, world.now(), lambda: []))
    (arrival,) = world.take(F, DispatchArrived)
    assert (arrival.header.layer, arrival.header.gang_id) == (1, 7)
    np.testing.assert_array_equal(arrival.parts.rows, rows)
    world.meshes[F].combine(arrival, CombineMeta(**GANG), rows_of(5))
    (combined,) = world.take(A, CombineArrived)
    np.testing.assert_array_equal(combined.rows, rows_of(5))
