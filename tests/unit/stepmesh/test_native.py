"""The compiled hot path and its twins in Python do the same, and stepmesh works without it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.errors import FrameError
from stepmesh.layout import PayloadLayout, slot_bytes
from stepmesh.native import native
from stepmesh.transports.base import Posted
from stepmesh.transports.shm import Board
from stepmesh.types import FrameKind, Header, WireDtype
from stepmesh.wire import (
    FIELD_ERRORS,
    HEADER,
    HeaderRules,
    answers,
    begins,
    check_frame,
    check_header,
    follows,
    plain_write_frame,
    read_header,
)

needs_native = pytest.mark.skipif(native is None, reason="not built: setup.py build_ext --inplace")

LAYOUT = PayloadLayout(16, 8, 2, WireDtype.FP32, WireDtype.FP32)
RULES = HeaderRules.of(FrameKind.DISPATCH, LAYOUT, 4, 3)
SLOT_BYTES = slot_bytes(600)
FIELD_BITS = [8, 8, 32, 32, 64, 64, 64, 64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8]
NUM_SLOTS = 4
ROOT = Path(__file__).parents[3]


def good_fields(**changes: int) -> list[int]:
    """What write_frame takes behind the memory: a dispatch that RULES lets pass."""
    fields = {
        "kind": 1, "flags": 9, "epoch": 2, "generation": 3, "seq": 11, "step": 5, "gang_id": 6, "compute_ns": 0,
        "member_mask_low": 7, "member_mask_high": 8, "num_tokens": 4, "gang_tokens": 4, "payload_bytes": 256,
        "stream": 2, "layer": 1, "top_k": 0, "wire_dtype": 1, "checksum_kind": 0,
    }  # fmt: skip
    return list((fields | changes).values())


def judge(memory: memoryview, posted: Posted) -> Header | None:
    """What the twin in Python makes of a frame without checksum."""
    header = read_header(memory)
    try:
        check_header(header, RULES)
        if header.checksum_kind or (header.stream, header.seq & 1, header.seq) != posted:
            return None
        if header.payload_bytes > SLOT_BYTES:  # the layout says what a payload may need: no more than a slot holds
            return None
        check_frame(memory, header, header.payload_bytes)
    except (FrameError, *FIELD_ERRORS):
        return None
    return header


@needs_native
@given(st.lists(st.integers(-2, 1 << 65) | st.integers(0, 700), min_size=18, max_size=18), st.data())
def test_frames_are_written_alike(wild: list[int], data: st.DataObject) -> None:
    tame = data.draw(st.lists(st.booleans(), min_size=18, max_size=18))
    fields = [value % (1 << bits) if keep else value for value, bits, keep in zip(wild, FIELD_BITS, tame, strict=True)]
    fields[12] %= 4096  # of the payload, whose trailer is written
    results = []
    for write in (plain_write_frame, native.write_frame):
        memory = memoryview(bytearray(SLOT_BYTES))
        try:
            write(memory, *fields)
        except FIELD_ERRORS:
            results.append(None)
        else:
            results.append(bytes(memory))
    assert results[0] == results[1]


@needs_native
def test_integers_of_other_types_may_be_written() -> None:
    import numpy as np

    plain, compiled = (memoryview(bytearray(SLOT_BYTES)) for _ in range(2))
    plain_write_frame(plain, *good_fields())
    native.write_frame(compiled, *map(np.int64, good_fields()))
    assert plain == compiled


@needs_native
@given(st.lists(st.tuples(st.integers(0, HEADER.size - 1) | st.integers(384, 391), st.integers(0, 255)), max_size=3))
@settings(max_examples=500)
def test_frames_pass_alike(damage: list[tuple[int, int]]) -> None:
    memory = memoryview(bytearray(SLOT_BYTES))
    plain_write_frame(memory, *good_fields())
    for place, value in damage:
        memory[place] = value
    posted = Posted(2, 1, 11)
    assert native.read_frame(memory, RULES, posted, Header) == judge(memory, posted)


@needs_native
@pytest.mark.parametrize("posted", [Posted(1, 1, 11), Posted(2, 0, 11), Posted(2, 1, 12)])
def test_a_frame_in_another_slot_does_not_pass(posted: Posted) -> None:
    memory = memoryview(bytearray(SLOT_BYTES))
    plain_write_frame(memory, *good_fields())
    assert native.read_frame(memory, RULES, posted, Header) is None


@needs_native
def test_what_is_too_short_for_a_frame_does_not_pass() -> None:
    memory = memoryview(bytearray(SLOT_BYTES))
    plain_write_frame(memory, *good_fields())
    for size in (0, 1, 95, 127, 128, 391):
        assert native.read_frame(memory[:size], RULES, Posted(2, 1, 11), Header) is None
    header = native.read_frame(memory[:392], RULES, Posted(2, 1, 11), Header)
    assert isinstance(header, Header) and header.step == 5 and header.magic == b"SMDF"


RULES_OF_LANES = ("answers", "follows", "begins")
BITS = {"kind": 8, "epoch": 32, "num_tokens": 32, "payload_bytes": 32, "layer": 16, "top_k": 16}  # else 64


@st.composite
def two_headers(draw: st.DrawFn) -> tuple[Header, Header]:
    """A frame and the dispatch before it: what a rule takes, but for a few fields."""
    small = st.integers(0, 3)
    last = Header(*HEADER.unpack(bytes(HEADER.size)))._replace(
        kind=1, epoch=draw(small), step=draw(small), gang_id=draw(small), member_mask_low=draw(small),
        member_mask_high=draw(small), num_tokens=draw(small), payload_bytes=32 * draw(small),
        layer=draw(small | st.just(0xFFFF)),
    )  # fmt: skip
    frame = {
        "answers": last._replace(kind=2),
        "follows": last._replace(layer=last.layer + 1 & 0xFFFF),
        "begins": last._replace(step=last.step + 1, gang_id=0, member_mask_low=0, member_mask_high=0, layer=0),
    }[draw(st.sampled_from(RULES_OF_LANES))]
    if draw(st.booleans()):
        frame = frame._replace(payload_bytes=32 * frame.num_tokens)
    fields = st.sampled_from([*BITS, "step", "gang_id", "member_mask_low", "member_mask_high", "gang_tokens", "flags"])
    for field in draw(st.lists(fields, max_size=2)):
        bits = BITS.get(field, 8 if field == "flags" else 32 if field == "gang_tokens" else 64)
        frame = frame._replace(**{field: draw(small | st.integers(0, (1 << bits) - 1))})
    return frame, last


@needs_native
@given(two_headers(), st.integers(0, 4))
@settings(max_examples=500)
def test_lanes_take_the_same_frames_natively(headers: tuple[Header, Header], max_tokens: int) -> None:
    frame, last = headers
    expected = [answers(frame, last), follows(frame, last), begins(frame, last, max_tokens, 32)]
    packed = HEADER.pack(*frame), HEADER.pack(*last)
    assert [native.may_follow(rule, *packed, max_tokens, 32) for rule in range(3)] == expected


@needs_native
def test_each_rule_of_lanes_takes_what_it_is_for() -> None:
    """So that the test above cannot pass by refusing everything."""
    last = Header(*HEADER.unpack(bytes(HEADER.size)))._replace(
        kind=1, epoch=1, step=5, gang_id=7, member_mask_low=1, num_tokens=3, payload_bytes=96, layer=2
    )
    answer = last._replace(kind=2, gang_id=0, member_mask_low=0, compute_ns=9, gang_tokens=3)
    next_layer, next_step = last._replace(layer=3), last._replace(step=6, gang_id=0, member_mask_low=0, layer=0)
    frames = [answer, next_layer, next_step]
    taken = [[answers(f, last), follows(f, last), begins(f, last, 3, 32)] for f in frames]
    assert taken == [[rule == own for rule in range(3)] for own in range(3)]
    assert not begins(next_step, last, 2, 32), "too many rows"


BOARD_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.integers(0, NUM_SLOTS - 1), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("poll"), st.just(0), st.just(0)),
        st.tuples(st.just("damage"), st.integers(0, 8 * (1 + NUM_SLOTS) - 1), st.integers(0, 2**64 - 1)),
    ),
    max_size=30,
)


def play(board_type: Any, steps: list[tuple[str, int, int]], bell: int) -> list[Any]:
    """All that can be seen of two boards on one memory."""
    memory = memoryview(bytearray(64 * (1 + NUM_SLOTS)))
    writer, reader = (board_type(memory, NUM_SLOTS, Posted) for _ in range(2))
    seen: list[Any] = []
    for step, place, value in steps:
        if step == "post":
            seen.append(writer.post(place, value, bell))
        elif step == "damage":
            memory.cast("Q")[place] = value
        else:
            try:
                seen.append(list(reader.poll()))
            except ValueError as error:
                return [*seen, str(error)]  # the pair starts again
    return [*seen, bytes(memory)]


@needs_native
@given(BOARD_STEPS)
def test_boards_behave_alike(steps: list[tuple[str, int, int]]) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert play(Board, steps, bell) == play(native.Board, steps, bell)
    finally:
        os.close(bell)


@needs_native
def test_a_bell_that_is_gone_is_reported() -> None:
    bell = os.eventfd(0)
    os.close(bell)
    for board_type in (Board, native.Board):
        board = board_type(memoryview(bytearray(64 * (1 + NUM_SLOTS))), NUM_SLOTS, Posted)
        assert os.strerror(board.post(0, 1, bell)) == "Bad file descriptor"


@needs_native
def test_waiting_ends_in_time_or_with_news() -> None:
    memory = memoryview(bytearray(64 * (1 + NUM_SLOTS)))
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        writer, reader = (native.Board(memory, NUM_SLOTS, Posted) for _ in range(2))
        began = time.monotonic()
        assert not native.await_any((reader, bell), 0.01)
        assert 0.01 <= time.monotonic() - began < 5.0
        late = threading.Timer(0.01, writer.post, (1, 7, bell))  # which needs the interpreter's lock: it is free
        late.start()
        assert native.await_any((reader,), 20.0)
        late.join()
        assert reader.poll() == [Posted(0, 1, 7)]
        assert native.await_any((reader, bell), 20.0)  # nobody has read the bell
        assert not native.await_any((), 0.001)
    finally:
        os.close(bell)


@needs_native
def test_nonsense_is_an_error() -> None:
    memory = memoryview(bytearray(64 * (1 + NUM_SLOTS)))
    with pytest.raises(ValueError, match="slots do not fit"):
        native.Board(memory, NUM_SLOTS + 1, Posted)
    board: Any = native.Board(memory, NUM_SLOTS, Posted)
    for call, arguments, error in (
        (board.post, (NUM_SLOTS, 1, 0), OverflowError),
        (board.post, (0, 1), TypeError),
        (native.write_frame, (memory,), TypeError),
        (native.write_frame, (bytes(SLOT_BYTES), *good_fields()), BufferError),
        (native.read_frame, (memory, RULES[:3], Posted(0, 0, 0), Header), IndexError),
        (native.may_follow, (3, bytes(96), bytes(96), 1, 1), ValueError),
        (native.may_follow, (0, bytes(95), bytes(95), 1, 1), ValueError),
        (native.await_any, ((1, 2, 3, 4, 5), 0.0), ValueError),
        (native.await_any, (("no descriptor",), 0.0), TypeError),
    ):
        with pytest.raises(error):
            call(*arguments)


def test_everything_works_without_it() -> None:
    """The exchanges of the contract over shm and tcp, in an interpreter that does not find the compiled module."""
    script = (
        "import sys; sys.modules['stepmesh._native'] = None; import pytest;"
        "from stepmesh.native import native; assert native is None;"
        "sys.exit(pytest.main(['tests/contract/test_exchange.py', '-k', 'shm or tcp', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
