"""The contract of the kernels: two implementations, `reference.ReferenceKernels` and `native.NativeKernels`.

Arguments arrive checked (`arguments.py`). Every method may be called from any thread, works on CPU tensors, and
computes in float32 whatever the storage type, with one rounding on the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from afd.ops.cpu.packed import Packed
from afd.ops.sample_rows import SampledRows, SampleRow

KEY_GROUP = 8
"""Block sizes and head dimensions are multiples of this."""

MAX_HEAD_DIM = 512
MAX_PARTIALS = 16


class RowMax(NamedTuple):
    """Of each row of a matrix the first NaN, or else the first of its largest elements.

    largest: [m] float32.  idx: [m] int64, the column it is in.
    """

    largest: Tensor
    idx: Tensor

    @classmethod
    def of_nothing(cls, num_rows: int, device: torch.device | None = None) -> RowMax:
        """Of matrices without columns, to be joined with others."""
        largest = torch.full((num_rows,), -math.inf, dtype=torch.float32, device=device)
        return cls(largest, torch.zeros(num_rows, dtype=torch.int64, device=device))

    def join(self, later: RowMax) -> None:
        """Become that of both matrices side by side. later: of columns behind this one's, numbered on from them."""
        better = (later.largest > self.largest) | (later.largest.isnan() & ~self.largest.isnan())
        for old, new in zip(self, later, strict=True):
            torch.where(better, new, old, out=old)


class Kernels(Protocol):
    """See the functions of the same names in `afd.ops` for shapes and meaning."""

    @property
    def name(self) -> str: ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        num_threads: int,
    ) -> None: ...

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None: ...

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None: ...

    def add_rms_norm(self, x: Tensor, partials: Sequence[Tensor], weight: Tensor, eps: float, out: Tensor) -> None: ...

    def silu_mul(self, gate_up: Tensor, limit: float, out: Tensor) -> None: ...

    def row_max(self, x: Tensor, out: RowMax, num_threads: int) -> None: ...

    def sample(self, logits: Tensor, rows: Sequence[SampleRow], num_threads: int) -> SampledRows: ...

    def gemm(self, x: Tensor, w: Packed, out: Tensor, num_threads: int) -> None: ...

    def gemm_row_max(self, x: Tensor, w: Packed, best: RowMax, start: int, stop: int, num_threads: int) -> None: ...
