"""Values of the mesh: identities, addresses, what a sender states about a transfer, what `progress` reports.

Plain and immutable. Nothing here touches a socket, a clock or torch. Values built once per transfer are
NamedTuples (cheap to make), the others frozen dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]  # uint16 (bf16 bits), uint8 (fp8 bits) or float32, [num_tokens, hidden]
RowIdx = npt.NDArray[np.signedinteger[Any]]  # places of rows in a micro-batch, rising; int32 on the wire


class Role(StrEnum):
    """Which half of the model a rank runs. Attention ranks connect, FFN ranks accept."""

    ATTENTION = "attention"
    FFN = "ffn"

    __hash__ = str.__hash__  # part of every RankId, which is looked up for every transfer: an enum's own is a call

    @property
    def other(self) -> Role:
        return Role.FFN if self is Role.ATTENTION else Role.ATTENTION


class RankId(NamedTuple):
    """A place in the topology, such as attention/0. Who fills it is told apart by the incarnation."""

    role: Role
    rank: int

    def __str__(self) -> str:
        return f"{self.role.value}/{self.rank}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a rank listens. Empty `unix` or port 0: it does not listen there.

    `host` is best an IP address: a name is resolved in the connecting rank's main thread.
    """

    unix: str  # abstract UNIX socket name (Linux): nothing on disk to clear
    host: str
    port: int

    def to_dict(self) -> dict[str, Any]:
        return {"unix": self.unix, "host": self.host, "port": self.port}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Address:
        return cls(str(fields["unix"]), str(fields["host"]), int(fields["port"]))


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of an epoch: its place, the process that fills it, and where that process listens."""

    id: RankId
    incarnation: str
    address: Address

    def to_dict(self) -> dict[str, Any]:
        return {
            "role": self.id.role.value,
            "rank": self.id.rank,
            "incarnation": self.incarnation,
            "address": self.address.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Member:
        rank_id = RankId(Role(fields["role"]), int(fields["rank"]))
        return cls(rank_id, str(fields["incarnation"]), Address.from_dict(fields["address"]))


class WireDtype(IntEnum):
    """Element type of rows on the wire. FP8_E4M3 rows carry float32 scales, one per 128 columns."""

    FP32 = 1
    BF16 = 2
    FP8_E4M3 = 3

    @property
    def itemsize(self) -> int:
        return {WireDtype.FP32: 4, WireDtype.BF16: 2, WireDtype.FP8_E4M3: 1}[self]

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type that carries the bits (numpy has neither bf16 nor fp8)."""
        return _NUMPY[self]


_NUMPY: dict[WireDtype, np.dtype[Any]] = {
    WireDtype.FP32: np.dtype(np.float32),
    WireDtype.BF16: np.dtype(np.uint16),
    WireDtype.FP8_E4M3: np.dtype(np.uint8),
}


class FrameKind(IntEnum):
    """What a data frame carries."""

    DISPATCH = 1  # attention -> FFN
    COMBINE = 2  # FFN -> attention
    SPARSE_DISPATCH = 3  # attention -> FFN: some rows of the micro-batch, with their places in it


class DispatchMeta(NamedTuple):
    """What the attention rank states about a dispatch. gang_id 0: no gang yet (layer 0)."""

    stream: int
    epoch: int
    step: int
    layer: int
    gang_id: int = 0
    member_mask: int = 0  # bit r: attention rank r belongs to the gang (128 bits)
    flags: int = 0  # the caller's own 8 bits


class CombineMeta(NamedTuple):
    """What the FFN rank states about its answer. The exchange itself is named by the arrival."""

    gang_id: int = 0
    member_mask: int = 0
    gang_tokens: int = 0  # tokens of the whole gang's batch
    compute_ns: int = 0  # time the FFN spent on it
    flags: int = 0


class DispatchParts(NamedTuple):
    """The payload of a dispatch. num_tokens may be 0; top_k 0 (both routing arrays None) is a dense layer.

    `row_idx` is set in a sparse dispatch only: row i is row row_idx[i] of the sender's micro-batch. The indices rise
    strictly, below the header's gang_tokens.
    """

    rows: Rows  # [num_tokens, hidden]
    scales: npt.NDArray[np.float32] | None = None  # [num_tokens, ceil(hidden / 128)], FP8 only
    expert_ids: npt.NDArray[np.int32] | None = None  # [num_tokens, top_k]
    expert_weights: npt.NDArray[np.float32] | None = None  # [num_tokens, top_k]
    row_idx: RowIdx | None = None  # [num_tokens], sparse only


class Header(NamedTuple):
    """The fixed-size header in front of every payload, field for field as on the wire (docs/protocol.md)."""

    magic: bytes
    version: int
    kind: int
    flags: int
    epoch: int
    generation: int
    seq: int
    step: int
    gang_id: int
    compute_ns: int  # combine only
    member_mask_low: int
    member_mask_high: int
    num_tokens: int
    gang_tokens: int  # combine: tokens of the gang's batch; sparse dispatch: rows of the sender's micro-batch
    payload_bytes: int
    checksum: int
    stream: int
    layer: int
    top_k: int
    wire_dtype: int
    checksum_kind: int

    @property
    def member_mask(self) -> int:
        return self.member_mask_low | self.member_mask_high << 64


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The pair can exchange. `reason` says why this transport was chosen."""

    peer: RankId
    transport: str
    reason: str
    generation: int


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The pair cannot exchange any more; everything in flight with it is void.

    retryable: the mesh itself goes on trying while the peer is a member (PeerUp follows, with a higher
    generation). Not retryable: only a new membership can bring the peer back.
    """

    peer: RankId
    reason: str
    retryable: bool


class DispatchArrived(NamedTuple):
    """FFN side. `parts` are views of this rank's own slot, valid until the combine has answered."""

    peer: RankId
    header: Header
    parts: DispatchParts


class CombineArrived(NamedTuple):
    """Attention side. `rows` [num_tokens, hidden] is valid until the next-but-one dispatch on that stream.

    They answer the rows that were sent to that peer, in their order: `row_idx` is what dispatch_sparse was given for it
    (None after a dispatch of all rows).
    """

    peer: RankId
    header: Header
    rows: Rows
    scales: npt.NDArray[np.float32] | None = None
    row_idx: RowIdx | None = None


@dataclass(frozen=True, slots=True)
class IdleNotice:
    """FFN side: the peer will send nothing more on this stream for now (last seq it used: `after_seq`)."""

    peer: RankId
    stream: int
    after_seq: int


@dataclass(frozen=True, slots=True)
class FrameRejected:
    """A frame was refused before anybody saw its payload; the pair is reset (a PeerDown follows)."""

    peer: RankId
    reason: str


@dataclass(frozen=True, slots=True)
class PeerDraining:
    """The peer asks to be left out: it answers what is in flight and will close."""

    peer: RankId


Event = PeerUp | PeerDown | DispatchArrived | CombineArrived | IdleNotice | FrameRejected | PeerDraining
