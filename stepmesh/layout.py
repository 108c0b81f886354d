"""Pure arithmetic of the transfer slots: which section lies where, and how large a slot must be.

A slot in memory, and a frame on a byte stream, is

    header   HEADER_BYTES (128, of which the packed header uses 96)
    payload  sections, each aligned to 64 bytes
    trailer  8 bytes: a copy of seq, at the payload's end rounded up to 8

Example: hidden 576, FP8, 3 tokens, top_k 2: rows at 0 (1728 bytes), 5 scales a row at 1728 (60 bytes), expert ids
at 1792 (24), weights at 1856 (24); payload 1880 bytes, trailer at 128 + 1880. Sparse: row_idx at 1920 (12) as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stepmesh.errors import ConfigError
from stepmesh.types import WireDtype

SECTION_ALIGN = 64  # a cache line, and what vector loads and DMA engines like
HEADER_BYTES = 128
TRAILER_BYTES = 8
PAGE_BYTES = 4096
SCALE_GROUP = 128  # columns per FP8 scale; the last group of a row may be short
NUM_PARITIES = 2


def align(offset: int, to: int) -> int:
    """Round `offset` up to a multiple of `to`."""
    return -(-offset // to) * to


class DispatchSections(NamedTuple):
    """Byte offsets inside a dispatch payload; total is the payload's size."""

    rows: int
    scales: int
    expert_ids: int
    expert_weights: int
    row_idx: int
    total: int


class CombineSections(NamedTuple):
    """Byte offsets inside a combine payload; total is the payload's size."""

    rows: int
    scales: int
    total: int


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """Shapes that both ends agree on (part of the hello). Raises ConfigError when out of range."""

    hidden: int
    max_tokens: int
    max_top_k: int
    dispatch_dtype: WireDtype
    combine_dtype: WireDtype

    def __post_init__(self) -> None:
        if not 1 <= self.hidden <= 1 << 20:
            raise ConfigError(f"hidden {self.hidden} is not in 1..{1 << 20}")
        if not 1 <= self.max_tokens <= 1 << 20:
            raise ConfigError(f"max_tokens {self.max_tokens} is not in 1..{1 << 20}")
        if not 0 <= self.max_top_k <= 4096:
            raise ConfigError(f"max_top_k {self.max_top_k} is not in 0..4096")
        object.__setattr__(self, "dispatch_dtype", WireDtype(self.dispatch_dtype))
        object.__setattr__(self, "combine_dtype", WireDtype(self.combine_dtype))
        dispatch = self.dispatch(self.max_tokens, self.max_top_k, sparse=True)
        largest = max(dispatch.total, self.combine(self.max_tokens).total)
        if largest >= 1 << 32:
            raise ConfigError(f"a payload of {largest} bytes does not fit the header's 32 bits: lower max_tokens")

    @property
    def num_scale_groups(self) -> int:
        return -(-self.hidden // SCALE_GROUP)

    def dispatch(self, num_tokens: int, top_k: int, *, sparse: bool = False) -> DispatchSections:
        """Sections of a dispatch of `num_tokens` rows with `top_k` experts each (0: no routing)."""
        end = num_tokens * self.hidden * self.dispatch_dtype.itemsize
        scales = align(end, SECTION_ALIGN)
        if self.dispatch_dtype is WireDtype.FP8_E4M3:
            end = scales + num_tokens * self.num_scale_groups * 4
        expert_ids = align(end, SECTION_ALIGN)
        expert_weights = align(expert_ids + num_tokens * top_k * 4, SECTION_ALIGN)
        if top_k:
            end = expert_weights + num_tokens * top_k * 4
        row_idx = align(end, SECTION_ALIGN)
        if sparse:
            end = row_idx + num_tokens * 4
        return DispatchSections(0, scales, expert_ids, expert_weights, row_idx, end)

    def combine(self, num_tokens: int) -> CombineSections:
        """Sections of a combine of `num_tokens` rows."""
        end = num_tokens * self.hidden * self.combine_dtype.itemsize
        scales = align(end, SECTION_ALIGN)
        if self.combine_dtype is WireDtype.FP8_E4M3:
            end = scales + num_tokens * self.num_scale_groups * 4
        return CombineSections(0, scales, end)

    @property
    def dispatch_slot_bytes(self) -> int:
        """Memory of one dispatch slot: any (num_tokens, top_k) within the limits fits, sparse or not."""
        return slot_bytes(self.dispatch(self.max_tokens, self.max_top_k, sparse=True).total)

    @property
    def combine_slot_bytes(self) -> int:
        return slot_bytes(self.combine(self.max_tokens).total)

    def to_dict(self) -> dict[str, int]:
        return {
            "hidden": self.hidden,
            "max_tokens": self.max_tokens,
            "max_top_k": self.max_top_k,
            "dispatch_dtype": int(self.dispatch_dtype),
            "combine_dtype": int(self.combine_dtype),
        }


def trailer_offset(payload_bytes: int) -> int:
    """Offset of the trailing seq in a slot."""
    return HEADER_BYTES + (payload_bytes + TRAILER_BYTES - 1 & -TRAILER_BYTES)


def frame_bytes(payload_bytes: int) -> int:
    """Header, payload and trailer: what a byte-stream transport sends."""
    return HEADER_BYTES + (payload_bytes + TRAILER_BYTES - 1 & -TRAILER_BYTES) + TRAILER_BYTES


def slot_bytes(max_payload_bytes: int) -> int:
    """A slot's size: whole pages, so that slots never share one."""
    return align(frame_bytes(max_payload_bytes), PAGE_BYTES)
