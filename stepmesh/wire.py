"""Bytes on the wire: the data header and the control frames. Pure: bytes in, values out.

Everything is little-endian. Parsing never trusts a length: control bodies are bounded (tightly so before the
peer has authenticated), and a header is checked field by field against what both ends agreed on.
"""

from __future__ import annotations

import json
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from stepmesh.errors import FrameError, ProtocolError
from stepmesh.layout import HEADER_BYTES, TRAILER_BYTES, PayloadLayout, trailer_offset
from stepmesh.native import native
from stepmesh.types import FrameKind, Header, WireDtype

PROTOCOL_VERSION = 1
OLDEST_VERSION = 1  # N-1 is accepted, for rolling updates; there is no version 0
DATA_MAGIC = b"SMDF"
HELLO_MAGIC = b"SMSH"
ATTACH_MAGIC = b"SMDA"  # opens a tcp data connection

HEADER = struct.Struct("<4sHBBIIQQQQQQIIIIHHHBB8x")
PLACE = struct.Struct("<4s12xQ48xI4xH")  # of a header: magic, seq, payload_bytes, stream
SEQ = struct.Struct("<Q")
CHECKSUM_NONE = 0
CHECKSUM_CRC32 = 1
_SPARSE_DISPATCH = int(FrameKind.SPARSE_DISPATCH)
_GENERATION_OFFSET = 12
_CHECKSUM_OFFSET = 76
_U32 = struct.Struct("<I")
assert HEADER.size == 96 <= HEADER_BYTES
assert SEQ.size == TRAILER_BYTES


def read_header(memory: memoryview) -> Header:
    """The header at the start of a slot or frame; nothing is checked yet."""
    # What Header._make does, without its second look: the format has as many fields as the tuple.
    return tuple.__new__(Header, HEADER.unpack_from(memory))


class HeaderRules(NamedTuple):
    """What one end of a pair demands of every header that it receives."""

    kind: int
    other_kind: int  # as good as `kind`; the same where there is but one
    generation: int
    num_streams: int
    max_tokens: int
    max_top_k: int
    wire_dtype: WireDtype

    @classmethod
    def of(cls, kind: FrameKind, layout: PayloadLayout, num_streams: int, generation: int) -> HeaderRules:
        """Rules of a pair that carries `kind`. Where dispatches go, sparse ones may go, too."""
        dispatch = kind is FrameKind.DISPATCH
        other_kind = _SPARSE_DISPATCH if dispatch else int(kind)
        dtype = layout.dispatch_dtype if dispatch else layout.combine_dtype
        return cls(int(kind), other_kind, generation, num_streams, layout.max_tokens, layout.max_top_k, dtype)


def check_header(header: Header, rules: HeaderRules) -> None:
    """Raise FrameError unless the header is one that the pair may carry.

    Size, trailer and checksum are for `check_frame`, the sequence is the window's business.
    """
    # Taken apart in one go: looking up 12 fields by name costs as much as reading the header does.
    (
        magic, version, kind, _, _, generation, _, _, _, _, _, _,
        num_tokens, gang_tokens, _, _, stream, _, top_k, wire_dtype, checksum_kind,
    ) = header  # fmt: skip
    own_kind, other_kind, own_generation, num_streams, max_tokens, max_top_k, own_dtype = rules
    if magic != DATA_MAGIC:
        raise FrameError(f"bad magic {magic!r}")
    if not OLDEST_VERSION <= version <= PROTOCOL_VERSION:
        raise FrameError(f"frame version {version}, this end speaks {OLDEST_VERSION}..{PROTOCOL_VERSION}")
    if kind != own_kind and kind != other_kind:
        raise FrameError(f"frame kind {kind}, expected {FrameKind(own_kind).name}")
    if generation != own_generation:
        raise FrameError(f"generation {generation}, the pair is in generation {own_generation}")
    if stream >= num_streams:
        raise FrameError(f"stream {stream} of {num_streams}")
    if num_tokens > max_tokens or top_k > max_top_k:
        raise FrameError(f"{num_tokens} tokens x top_k {top_k} exceed the slot ({max_tokens} x {max_top_k})")
    if kind == _SPARSE_DISPATCH and gang_tokens > max_tokens:
        raise FrameError(f"rows of a batch of {gang_tokens}, the slot holds {max_tokens}")
    if wire_dtype != own_dtype:
        raise FrameError(f"wire dtype {wire_dtype}, agreed on {own_dtype.name}")
    if checksum_kind > CHECKSUM_CRC32:
        raise FrameError(f"unknown checksum algorithm {checksum_kind}")


def _look_closer(memory: memoryview, rules: HeaderRules, posted: tuple[int, int, int], to: type[Header]) -> None:
    """Stands for a missing native twin: the functions above and below read, check and judge every frame."""


# The header of a frame without checksum that passes `check_header` and `check_frame` (for the payload size that it
# states itself) and is the one that was `posted` (stream, parity, seq); None: look closer.
read_good_frame = _look_closer if native is None else native.read_frame


def check_frame(memory: memoryview, header: Header, payload_bytes: int) -> None:
    """Raise FrameError unless the frame in a slot is whole. `payload_bytes`: what its tokens need."""
    if header.payload_bytes != payload_bytes:
        raise FrameError(f"payload of {header.payload_bytes} bytes, {header.num_tokens} tokens need {payload_bytes}")
    trailer = SEQ.unpack_from(memory, trailer_offset(payload_bytes))[0]
    if trailer != header.seq:
        raise FrameError(f"incomplete frame: seq {header.seq} in front of the payload, {trailer} behind it")
    if header.checksum_kind == CHECKSUM_CRC32:
        crc = frame_crc32(memory, payload_bytes)
        if crc != header.checksum:
            raise FrameError(f"checksum {crc:#010x}, the header says {header.checksum:#010x}")


class Dispatched(Protocol):
    """What its answer must repeat of a dispatch: its Header has it, and a window's Exchange."""

    @property
    def epoch(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


def check_answer(frame: Header, sent: Dispatched) -> None:
    """Raise FrameError unless a combine with the seq of a dispatch repeats of it what it must."""
    if frame.epoch != sent.epoch:
        raise FrameError(f"combine of epoch {frame.epoch} for a dispatch of epoch {sent.epoch}")
    if frame.step != sent.step:
        raise FrameError(f"combine of step {frame.step} for a dispatch of step {sent.step}")
    if frame.layer != sent.layer:
        raise FrameError(f"combine of layer {frame.layer} for a dispatch of layer {sent.layer}")
    if frame.num_tokens != sent.num_tokens:
        raise FrameError(f"combine of {frame.num_tokens} rows for a dispatch of {sent.num_tokens}")


# Which good frame native code takes on a lane (lanes.py), in the place and with the seq that come next. It leaves every
# other frame to the mesh, whose windows (window.py) may well take it. Native code calls sm_answers, sm_follows and
# sm_begins of lane.h. These three say in Python what each of those must answer: tests/unit/stepmesh/test_native.py
# feeds both the same headers. A rule is changed here and in lane.h, and nowhere else.


def answers(frame: Header, sent: Header) -> bool:
    """The answer to the dispatch `sent`, whose rows take as many bytes."""
    try:
        check_answer(frame, sent)
    except FrameError:
        return False
    return frame.payload_bytes == sent.payload_bytes


def follows(frame: Header, last: Header) -> bool:
    """A dispatch of the same rows as `last` one layer on, in the same step and gang, without routing."""
    is_plain = frame.kind == FrameKind.DISPATCH and frame.top_k == 0
    same_step = frame.epoch == last.epoch and frame.step == last.step
    same_gang = frame.gang_id == last.gang_id and frame.member_mask == last.member_mask
    same_rows = frame.num_tokens == last.num_tokens and frame.payload_bytes == last.payload_bytes
    return is_plain and same_step and same_gang and same_rows and frame.layer == last.layer + 1


def begins(frame: Header, last: Header, max_tokens: int, row_bytes: int) -> bool:
    """A dispatch of layer 0 of another step than `last`, in no gang yet, of 1..max_tokens rows without routing."""
    is_plain = frame.kind == FrameKind.DISPATCH and frame.top_k == 0
    is_first = frame.layer == 0 and frame.gang_id == 0 and frame.member_mask == 0
    fits = 0 < frame.num_tokens <= max_tokens and frame.payload_bytes == frame.num_tokens * row_bytes
    return is_plain and is_first and fits and frame.epoch == last.epoch and frame.step != last.step


def plain_write_frame(
    memory: memoryview,
    kind: int,
    flags: int,
    epoch: int,
    generation: int,
    seq: int,
    step: int,
    gang_id: int,
    compute_ns: int,
    member_mask_low: int,
    member_mask_high: int,
    num_tokens: int,
    gang_tokens: int,
    payload_bytes: int,
    stream: int,
    layer: int,
    top_k: int,
    wire_dtype: int,
    checksum_kind: int,
) -> None:
    """Put header and trailer around a payload. Raises one of FIELD_ERRORS for a value that does not fit its field."""
    HEADER.pack_into(
        memory, 0, DATA_MAGIC, PROTOCOL_VERSION, kind, flags, epoch, generation, seq, step, gang_id, compute_ns,
        member_mask_low, member_mask_high, num_tokens, gang_tokens, payload_bytes, 0, stream, layer, top_k, wire_dtype,
        checksum_kind,
    )  # fmt: skip
    write_trailer(memory, payload_bytes, seq)


write_frame = plain_write_frame if native is None else native.write_frame
FIELD_ERRORS = (struct.error, OverflowError, TypeError)


def write_generation(memory: memoryview, generation: int) -> None:
    """Change the generation in a header: what the frames of one dispatch to several peers differ in."""
    _U32.pack_into(memory, _GENERATION_OFFSET, generation)


def write_trailer(memory: memoryview, payload_bytes: int, seq: int) -> None:
    """Put the copy of seq behind the payload."""
    SEQ.pack_into(memory, trailer_offset(payload_bytes), seq)


def frame_crc32(memory: memoryview, payload_bytes: int) -> int:
    """crc32 of the packed header with its checksum field zero, then the payload."""
    header = bytearray(memory[: HEADER.size])
    _U32.pack_into(header, _CHECKSUM_OFFSET, 0)
    return zlib.crc32(memory[HEADER_BYTES : HEADER_BYTES + payload_bytes], zlib.crc32(header))


def seal_checksum(memory: memoryview, payload_bytes: int) -> None:
    """Compute the checksum of a complete frame and store it in its header."""
    _U32.pack_into(memory, _CHECKSUM_OFFSET, frame_crc32(memory, payload_bytes))


class ControlKind(IntEnum):
    """Frames of the control socket, in the order of a session's life."""

    HELLO = 1  # initiator: magic, version, nonce, mac
    CHALLENGE = 2  # responder: version, nonce, mac
    PROOF = 3  # initiator: mac, json
    ACCEPT = 4  # responder: mac, json (with slot descriptor)
    REJECT = 5  # responder: mac, json
    ATTACH = 6  # initiator: json (slot descriptor)
    READY = 7  # responder: empty
    HEARTBEAT = 8  # both: progress counter, work pending
    IDLE = 9  # attention: stream, after_seq
    DRAIN = 10  # both: empty
    CLOSE = 11  # both: retryable, reason


class ControlFrame(NamedTuple):
    """One control frame. `fds` are open descriptors that arrived with it; the receiver owns them."""

    kind: int
    body: bytes
    fds: tuple[int, ...] = ()


PREFIX = struct.Struct("<BBH")  # kind, number of descriptors that travel with it, body length
HELLO = struct.Struct("<4sH32s32s")
CHALLENGE = struct.Struct("<H32s32s")
MAC_BYTES = 32
NONCE_BYTES = 32
MAX_BODY_BYTES = 16 * 1024
MAX_FDS = 4
_HEARTBEAT = struct.Struct("<QB")
_IDLE = struct.Struct("<HQ")


def encode_control(kind: ControlKind, body: bytes = b"", num_fds: int = 0) -> bytes:
    """A control frame ready to send."""
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"{kind.name} body of {len(body)} bytes exceeds {MAX_BODY_BYTES}")
    return PREFIX.pack(kind, num_fds, len(body)) + body


class ControlParser:
    """Cuts a byte stream into control frames. Bounded: holds at most one incomplete frame.

    Until `trusted` is set only HELLO and CHALLENGE may arrive whole, whose sizes are fixed, plus the authenticated
    frames that follow them within the same bounds; anything else raises ProtocolError at its first four bytes.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []
        self.trusted = False

    def feed(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        self._buffer += data
        self._fds.extend(fds)

    def next_frame(self) -> ControlFrame | None:
        """The next complete frame, or None. Raises ProtocolError on garbage."""
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"{len(self._fds)} descriptors came that no frame claims")
        if len(self._buffer) < PREFIX.size:
            return None
        kind, num_fds, length = PREFIX.unpack_from(self._buffer)
        self._check_prefix(kind, num_fds, length)
        end = PREFIX.size + length
        if len(self._buffer) < end:
            return None
        if num_fds > len(self._fds):
            raise ProtocolError(f"{ControlKind(kind).name} names {num_fds} descriptors, {len(self._fds)} arrived")
        body = bytes(self._buffer[PREFIX.size : end])
        fds = tuple(self._fds[:num_fds])
        del self._buffer[:end], self._fds[:num_fds]
        return ControlFrame(kind, body, fds)

    def take_fds(self) -> list[int]:
        """Descriptors that no frame has claimed: the owner of the link closes them."""
        left, self._fds = self._fds, []
        return left

    def _check_prefix(self, kind: int, num_fds: int, length: int) -> None:
        if not ControlKind.HELLO <= kind <= ControlKind.CLOSE:
            raise ProtocolError("not a stepmesh control connection (unknown frame kind)")
        if num_fds > MAX_FDS or length > MAX_BODY_BYTES:
            raise ProtocolError(f"frame of {length} bytes with {num_fds} descriptors is out of bounds")
        expected = {ControlKind.HELLO: HELLO.size, ControlKind.CHALLENGE: CHALLENGE.size}.get(ControlKind(kind))
        if expected is not None and length != expected:
            raise ProtocolError(f"{ControlKind(kind).name} of {length} bytes, expected {expected}")
        if not self.trusted and kind > ControlKind.REJECT:
            raise ProtocolError(f"{ControlKind(kind).name} before authentication")


def encode_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def decode_json(body: bytes) -> dict[str, Any]:
    """Parse a body that an authenticated peer sent. Raises ProtocolError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"control body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("control body is not a JSON object")
    return fields


class Heartbeat(NamedTuple):
    """counter: the main thread's progress; pending: it has work to do."""

    counter: int
    pending: bool


def encode_heartbeat(beat: Heartbeat) -> bytes:
    return encode_control(ControlKind.HEARTBEAT, _HEARTBEAT.pack(beat.counter, beat.pending))


def decode_heartbeat(body: bytes) -> Heartbeat:
    counter, pending = _unpack(_HEARTBEAT, body, "HEARTBEAT")
    return Heartbeat(counter, bool(pending))


def encode_idle(stream: int, after_seq: int) -> bytes:
    return encode_control(ControlKind.IDLE, _IDLE.pack(stream, after_seq))


def decode_idle(body: bytes) -> tuple[int, int]:
    """(stream, after_seq)."""
    stream, after_seq = _unpack(_IDLE, body, "IDLE")
    return stream, after_seq


def encode_close(reason: str, *, retryable: bool) -> bytes:
    return encode_control(ControlKind.CLOSE, bytes([retryable]) + reason.encode()[:1000])


def decode_close(body: bytes) -> tuple[str, bool]:
    """(reason, retryable)."""
    if not body:
        raise ProtocolError("empty CLOSE")
    return body[1:].decode(errors="replace"), bool(body[0])


def _unpack(shape: struct.Struct, body: bytes, name: str) -> tuple[Any, ...]:
    if len(body) != shape.size:
        raise ProtocolError(f"{name} of {len(body)} bytes, expected {shape.size}")
    return shape.unpack(body)
