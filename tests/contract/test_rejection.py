"""No wrong tokens, ever: a frame that does not fit is an event, never an arrival, and the pair starts afresh."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from stepmesh import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    FrameRejected,
    PeerDown,
    PeerUp,
    StaleArrivalError,
    WireDtype,
)
from stepmesh.layout import frame_bytes
from stepmesh.types import FrameKind
from stepmesh.wire import HEADER, read_header
from tests.contract.world import World, assert_same, attention, ffn, make_parts

A0, A1 = attention(0), attention(1)
F0, F1 = ffn(0), ffn(1)

BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "other epoch": ({"epoch": 0}, "epoch 0"),
    "other generation": ({"generation": 77}, "generation 77"),
    "seq already used": ({"header_seq": 1, "trailer": 1}, "seq 1"),
    "payload too small for its tokens": ({"payload_bytes": 8}, "payload of 8 bytes|incomplete|unusable"),
    "payload too large for the slot": ({"payload_bytes": 1 << 30}, "payload of|unusable"),
    "more tokens than the slot": ({"num_tokens": 1000}, "exceed the slot"),
    "more experts than the slot": ({"top_k": 100}, "exceed the slot"),
    "other dtype": ({"wire_dtype": WireDtype.BF16}, "wire dtype"),
    "stream out of range": ({"stream": 60}, "stream 60"),
    "other stream than its slot": ({"stream": 1}, "stream 1"),
    "half-written slot": ({"trailer": 3}, "incomplete frame"),
    "corrupted payload": ({"corrupt": True}, "checksum"),
    "unknown checksum": ({"checksum_kind": 9}, "checksum algorithm"),
    "no frame at all": ({"magic": b"HTTP"}, "magic|unusable"),
    "version of the future": ({"version": 99}, "version 99"),
    "rows of a batch larger than the slot": (
        {"kind": FrameKind.SPARSE_DISPATCH, "gang_tokens": 1 << 31},
        "rows of a batch of 2147483648, the slot holds",
    ),
    "a combine where a dispatch belongs": ({"kind": FrameKind.COMBINE}, "kind"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_dispatch_never_reaches_the_engine(world: World, name: str) -> None:
    changes, reason = BAD_FRAMES[name]
    if name == "other stream than its slot" and world.transport == "tcp":
        changes, reason = {"stream": 60}, "stream 60"  # on a byte stream the header alone names the slot
    world.build(1, 1)
    world.exchange(A0, [F0], make_parts(2))
    generation = world.pair(A0, F0).generation
    world.forget()
    world.forge(A0, F0, make_parts(3, 0), seq=2, **changes)
    (rejected,) = world.take(F0, FrameRejected)
    assert rejected.peer == A0
    assert re.search(reason, rejected.reason)
    (down,) = world.take(F0, PeerDown)
    assert down.retryable
    assert "rejected a frame" in down.reason
    assert world.seen(F0, DispatchArrived) == []
    # The sender hears why, and both start a new generation by themselves.
    (down,) = world.take(A0, PeerDown)
    assert down.retryable
    assert "rejected a frame" in down.reason
    assert world.take(A0, PeerUp)[0].generation == generation + 1
    assert world.take(F0, PeerUp)[0].generation == generation + 1
    world.exchange(A0, [F0], make_parts(4))
    assert world.meshes[F0].stats()["peers"]["attention/0"]["rejected_frames"] == 1


BAD_COMBINES: dict[str, tuple[dict[str, Any], str]] = {
    "seq that was never dispatched": ({"seq": 3}, "seq 3"),
    "other epoch": ({"epoch": 9}, "epoch 9"),
    "other number of rows": ({"num_tokens": 1, "payload_bytes": 640}, "1 rows|incomplete|unusable"),
    "other generation": ({"generation": 5}, "generation 5"),
}


@pytest.mark.parametrize("name", BAD_COMBINES)
def test_a_bad_combine_never_reaches_the_engine(world: World, name: str) -> None:
    changes, reason = BAD_COMBINES[name]
    world.build(1, 1)
    parts = make_parts(3)
    world.dispatch(A0, [F0], parts)
    (arrival,) = world.take(F0, DispatchArrived)
    pair = world.pair(F0, A0)
    # The answer is made in the slot as always, then spoilt before it is published.
    seq = changes.get("seq", arrival.header.seq)
    slot = pair.tx_slot(0, arrival.header.seq)
    publish = pair.channel.post

    def spoil(stream: int, parity: int, good_seq: int, num_bytes: int) -> None:
        header = read_header(slot.memory)._replace(**changes)
        HEADER.pack_into(slot.memory, 0, *header)
        if seq != good_seq:
            slot.memory[num_bytes - 8 : num_bytes] = seq.to_bytes(8, "little")
        size = frame_bytes(header.payload_bytes) if world.transport == "tcp" else num_bytes
        publish(stream, parity, seq, size)

    pair.channel.post = spoil  # type: ignore[method-assign, assignment]
    world.answer(arrival, F0)
    del pair.channel.post
    (rejected,) = world.take(A0, FrameRejected)
    assert re.search(reason, rejected.reason)
    assert world.take(A0, PeerDown)[0].retryable
    assert world.seen(A0, CombineArrived) == []
    world.take(A0, PeerUp, 2)
    world.take(F0, PeerUp, 2)
    world.exchange(A0, [F0], make_parts(4))


def test_a_bad_frame_disturbs_no_other_pair(world: World) -> None:
    world.build(2, 2)
    world.dispatch(A1, [F0, F1], make_parts(6, seed=6))
    world.forge(A0, F0, make_parts(1, 0), seq=1, trailer=9)
    world.take(F0, FrameRejected)
    for peer in (F0, F1):
        (arrival,) = world.take(peer, DispatchArrived)
        assert_same(arrival.parts, make_parts(6, seed=6))
        world.answer(arrival, peer)
    world.take(A1, CombineArrived, 2)
    assert world.seen(A1, PeerDown) == []
    assert world.seen(F1, PeerDown) == []
    world.until_connected()
    world.exchange(A0, [F0, F1], make_parts(3))


def test_a_duplicate_post_brings_nothing_twice(world: World) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(3))
    (arrival,) = world.take(F0, DispatchArrived)
    pair = world.pair(A0, F0)
    pair.channel.post(0, 1, 1, frame_bytes(arrival.header.payload_bytes))
    world.settle(0.05)
    assert world.seen(F0, DispatchArrived) == []
    world.until_connected()
    world.exchange(A0, [F0], make_parts(2))


def test_a_dispatch_of_an_epoch_not_heard_of_yet_waits_for_it(world: World) -> None:
    world.build(1, 1)
    world.meshes[A0].set_members(2, world.members(F0.role))
    parts = make_parts(4)
    world.dispatch(A0, [F0], parts, epoch=2)
    world.settle(0.05)
    assert world.seen(F0, DispatchArrived) == []
    world.meshes[F0].set_members(2, world.members(A0.role))
    (arrival,) = world.take(F0, DispatchArrived)
    assert_same(arrival.parts, parts)
    world.answer(arrival, F0)
    world.take(A0, CombineArrived)


def test_a_dispatch_of_an_epoch_that_never_comes_is_rejected(world: World) -> None:
    world.build(1, 1, stall_timeout_s=0.3)
    world.meshes[A0].set_members(2, world.members(F0.role))
    world.dispatch(A0, [F0], make_parts(4), epoch=2)
    (rejected,) = world.take(F0, FrameRejected)
    assert "epoch that never became live" in rejected.reason


def test_epochs_do_not_go_back_on_a_stream(world: World) -> None:
    world.build(1, 1, epoch=1)
    world.form(2)
    world.exchange(A0, [F0], make_parts(1), epoch=2)
    world.exchange(A0, [F0], make_parts(1), epoch=1, stream=1)  # another stream has not adopted it yet
    world.dispatch(A0, [F0], make_parts(1), epoch=1)
    (rejected,) = world.take(F0, FrameRejected)
    assert "already in 2" in rejected.reason


def test_an_arrival_of_a_revoked_generation_cannot_be_answered(world: World) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(3))
    (arrival,) = world.take(F0, DispatchArrived)
    rows = arrival.parts.rows.copy()
    world.cut(A0, F0)
    world.take(F0, PeerDown)
    with pytest.raises(StaleArrivalError):
        world.answer(arrival, F0)
    world.until_connected()
    seq = world.dispatch(A0, [F0], make_parts(5, seed=5))
    (again,) = world.take(F0, DispatchArrived)
    assert again.header.seq == seq
    with pytest.raises(StaleArrivalError):
        world.meshes[F0].combine(arrival, CombineMeta(), rows)
    # What the old arrival shows is its own memory: the new generation has not touched it.
    np.testing.assert_array_equal(arrival.parts.rows, rows)
    world.answer(again, F0)
    world.take(A0, CombineArrived)


def test_what_the_engine_refuses_resets_that_pair_alone(world: World) -> None:
    world.build(2, 1)
    world.dispatch(A0, [F0], make_parts(2), layer=999)
    (wrong,) = world.take(F0, DispatchArrived)
    world.dispatch(A1, [F0], make_parts(3))
    (right,) = world.take(F0, DispatchArrived)
    world.meshes[F0].reject(wrong, "layer 999, the model has 5")
    (rejected,) = world.take(F0, FrameRejected)
    assert (rejected.peer, rejected.reason) == (A0, "layer 999, the model has 5")
    (down,) = world.take(A0, PeerDown)
    assert down.retryable and down.reason.endswith("rejected a frame: layer 999, the model has 5")
    with pytest.raises(StaleArrivalError):
        world.answer(wrong, F0)
    world.answer(right, F0)
    world.take(A1, CombineArrived)
    world.until_connected()
    world.forget()
    world.meshes[F0].reject(wrong, "of a generation that is gone")
    world.exchange(A0, [F0], make_parts(4))
    assert world.seen(F0, FrameRejected) == []
