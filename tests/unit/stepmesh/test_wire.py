"""Bytes in, values out: headers survive the round trip, parsers survive anything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepmesh.errors import FrameError, ProtocolError
from stepmesh.layout import HEADER_BYTES, PayloadLayout, frame_bytes
from stepmesh.types import FrameKind, Header, WireDtype
from stepmesh.wire import (
    CHALLENGE,
    DATA_MAGIC,
    HEADER,
    HELLO,
    MAX_BODY_BYTES,
    PLACE,
    PROTOCOL_VERSION,
    ControlKind,
    ControlParser,
    HeaderRules,
    Heartbeat,
    check_frame,
    check_header,
    decode_close,
    decode_heartbeat,
    decode_idle,
    decode_json,
    encode_close,
    encode_control,
    encode_heartbeat,
    encode_idle,
    frame_crc32,
    read_header,
    seal_checksum,
    write_trailer,
)

LAYOUT = PayloadLayout(64, 8, 2, WireDtype.BF16, WireDtype.FP32)
U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U16 = st.integers(0, (1 << 16) - 1)
U8 = st.integers(0, 255)

headers = st.builds(
    Header,
    magic=st.binary(min_size=4, max_size=4),
    version=U16,
    kind=U8,
    flags=U8,
    epoch=U32,
    generation=U32,
    seq=U64,
    step=U64,
    gang_id=U64,
    compute_ns=U64,
    member_mask_low=U64,
    member_mask_high=U64,
    num_tokens=U32,
    gang_tokens=U32,
    payload_bytes=U32,
    checksum=U32,
    stream=U16,
    layer=U16,
    top_k=U16,
    wire_dtype=U8,
    checksum_kind=U8,
)


def good_header(**changes: object) -> Header:
    fields = dict.fromkeys(Header._fields, 0) | {
        "magic": DATA_MAGIC,
        "version": PROTOCOL_VERSION,
        "kind": FrameKind.DISPATCH,
        "epoch": 1,
        "generation": 1,
        "seq": 1,
        "num_tokens": 3,
        "payload_bytes": LAYOUT.dispatch(3, 2).total,
        "top_k": 2,
        "wire_dtype": WireDtype.BF16,
    }
    return Header(**(fields | changes))  # type: ignore[arg-type]


def check(header: Header) -> None:
    check_header(header, HeaderRules.of(FrameKind.DISPATCH, LAYOUT, num_streams=4, generation=1))


@given(headers)
@settings(max_examples=100, derandomize=True)
def test_headers_survive_the_round_trip(header: Header) -> None:
    memory = memoryview(bytearray(HEADER_BYTES))
    HEADER.pack_into(memory, 0, *header)
    assert read_header(memory) == header
    assert header.member_mask == header.member_mask_low + (header.member_mask_high << 64)


def test_the_header_is_where_the_protocol_says() -> None:
    """Offsets are a promise to other versions: docs/protocol.md lists them."""
    packed = HEADER.pack(*good_header(seq=0x1122334455667788, stream=7, layer=9, epoch=0xAABBCCDD))
    assert len(packed) == 96
    assert packed[:4] == b"SMDF"
    assert packed[8:12] == bytes.fromhex("ddccbbaa")
    assert packed[16:24] == bytes.fromhex("8877665544332211")
    assert packed[80:84] == bytes([7, 0, 9, 0])


def test_a_good_header_passes() -> None:
    check(good_header())
    check(good_header(num_tokens=0, top_k=0, payload_bytes=0))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"magic": b"XXXX"}, "magic"),
        ({"version": 0}, "version 0"),
        ({"version": PROTOCOL_VERSION + 1}, "version"),
        ({"kind": FrameKind.COMBINE}, "kind"),
        ({"generation": 2}, "generation 2"),
        ({"stream": 4}, "stream 4"),
        ({"num_tokens": 9}, "exceed"),
        ({"top_k": 3}, "exceed"),
        ({"wire_dtype": 1}, "dtype"),
        ({"checksum_kind": 2}, "checksum"),
    ],
)
def test_every_wrong_field_is_named(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(FrameError, match=problem):
        check(good_header(**changes))


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
@settings(max_examples=200, derandomize=True)
def test_random_bytes_are_no_header(noise: bytes) -> None:
    with pytest.raises(FrameError):
        check(read_header(memoryview(noise)))


@given(st.data())
@settings(max_examples=200, derandomize=True)
def test_the_checksum_sees_any_flipped_bit(data: st.DataObject) -> None:
    size = LAYOUT.dispatch(3, 2).total
    memory = memoryview(bytearray(frame_bytes(size)))
    memory[HEADER_BYTES : HEADER_BYTES + size] = bytes(i % 251 for i in range(size))
    HEADER.pack_into(memory, 0, *good_header(checksum_kind=1))
    seal_checksum(memory, size)
    assert frame_crc32(memory, size) == read_header(memory).checksum
    byte = data.draw(st.one_of(st.integers(0, HEADER.size - 1), st.integers(HEADER_BYTES, HEADER_BYTES + size - 1)))
    memory[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert frame_crc32(memory, size) != read_header(memory).checksum


def test_a_whole_frame_has_its_size_and_its_trailer() -> None:
    memory = memoryview(bytearray(frame_bytes(13)))
    header = good_header(seq=77, payload_bytes=13)
    write_trailer(memory, 13, 77)
    assert bytes(memory[-8:]) == (77).to_bytes(8, "little")
    check_frame(memory, header, 13)
    with pytest.raises(FrameError, match="payload of 13 bytes, 3 tokens need 14"):
        check_frame(memory, header, 14)
    write_trailer(memory, 13, 76)
    with pytest.raises(FrameError, match="seq 77 in front of the payload, 76 behind it"):
        check_frame(memory, header, 13)


# Control frames


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
@settings(max_examples=80, derandomize=True)
def test_frames_come_out_whole_however_they_come_in(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(encode_control(ControlKind.PROOF, body) for body in bodies)
    parser = ControlParser()
    got = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        parser.feed(stream[:size])
        stream = stream[size:]
        while (frame := parser.next_frame()) is not None:
            got.append(frame.body)
    assert got == bodies


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=300, derandomize=True)
def test_garbage_is_an_error_or_nothing(noise: bytes, trusted: bool) -> None:
    parser = ControlParser()
    parser.trusted = trusted
    parser.feed(noise)
    try:
        while (frame := parser.next_frame()) is not None:
            assert len(frame.body) <= MAX_BODY_BYTES
            assert trusted or frame.kind <= ControlKind.REJECT
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "prefix",
    [
        b"GET ",
        bytes(4),
        b"\x01\x00\x47\x00",  # a hello that is one byte too long
        b"\x02\x00\x00\x00",
        b"\x03\x05\x00\x00",  # five descriptors
        b"\x03\x00\x01\x40",  # 16385 bytes
        b"\x08\x00\x09\x00",  # a heartbeat of a stranger
    ],
)
def test_strangers_are_known_by_their_first_four_bytes(prefix: bytes) -> None:
    parser = ControlParser()
    parser.feed(prefix)
    with pytest.raises(ProtocolError):
        parser.next_frame()


def test_fixed_sizes_of_the_first_frames() -> None:
    assert (HELLO.size, CHALLENGE.size) == (70, 66)


def test_descriptors_go_to_the_frame_that_names_them() -> None:
    parser = ControlParser()
    parser.trusted = True
    parser.feed(encode_control(ControlKind.DRAIN) + encode_control(ControlKind.ATTACH, b"{}", 2), (40, 41, 42))
    first, second = parser.next_frame(), parser.next_frame()
    assert first is not None
    assert second is not None
    assert first.fds == ()
    assert second.fds == (40, 41)
    assert parser.take_fds() == [42]
    assert parser.take_fds() == []


def test_a_frame_without_its_descriptors_is_an_error() -> None:
    parser = ControlParser()
    parser.trusted = True
    parser.feed(encode_control(ControlKind.ATTACH, b"{}", 2), (40,))
    with pytest.raises(ProtocolError, match="names 2 descriptors, 1 arrived"):
        parser.next_frame()


def test_oversized_bodies_are_not_sent() -> None:
    with pytest.raises(ProtocolError):
        encode_control(ControlKind.PROOF, bytes(MAX_BODY_BYTES + 1))


def body_of(frame: bytes) -> bytes:
    return frame[4:]


@given(U64, st.booleans(), U16, U64, st.text(max_size=60), st.booleans())
@settings(max_examples=50, derandomize=True)
def test_control_bodies_survive_the_round_trip(
    counter: int, pending: bool, stream: int, seq: int, reason: str, retryable: bool
) -> None:
    assert decode_heartbeat(body_of(encode_heartbeat(Heartbeat(counter, pending)))) == (counter, pending)
    assert decode_idle(body_of(encode_idle(stream, seq))) == (stream, seq)
    assert decode_close(body_of(encode_close(reason, retryable=retryable))) == (reason, retryable)


@pytest.mark.parametrize("decode", [decode_heartbeat, decode_idle, decode_close])
def test_short_bodies_are_errors(decode: object) -> None:
    with pytest.raises(ProtocolError):
        decode(b"")  # type: ignore[operator]


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b"[" * 5000, b"3"])
def test_json_that_is_none_is_an_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_json(body)


def test_a_byte_stream_finds_the_slot_in_the_header() -> None:
    packed = HEADER.pack(*good_header(seq=0x1122334455667788, stream=7, payload_bytes=0xAABBCCDD))
    assert PLACE.unpack_from(packed) == (DATA_MAGIC, 0x1122334455667788, 0xAABBCCDD, 7)
