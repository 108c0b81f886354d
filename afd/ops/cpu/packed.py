"""Matrices in the order that the native GEMMs read them in: bfloat16, or int8 with a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.ops.cpu.abi import INT8_PANEL_ROWS, PANEL_ROWS

INT8_DEPTH = 4
"""Columns of an int8 matrix are filled up to a multiple of it."""


class Int8Order(NamedTuple):
    """Rows of an int8 matrix that are packed together, and columns that lie side by side in them."""

    panel_rows: int
    columns: int


PAIRS = Int8Order(INT8_PANEL_ROWS, 2)
"""The layout that src/gemm_int8.h reads."""
QUADS = Int8Order(INT8_PANEL_ROWS, 4)
"""The layout that src/gemm_vnni.h reads: values are stored as unsigned bytes, 128 more than they mean."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [n, k] whose panels of PANEL_ROWS rows lie as [k / 2, rows of the panel, 2]; `pack` makes it.

    data: bfloat16 [n, k], contiguous: the right memory, not the matrix.
    """

    data: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def panel_rows(self) -> int:
        return PANEL_ROWS

    def narrow_rows(self, start: int, stop: int) -> PackedMatrix:
        """A view of rows start..stop, which are whole panels."""
        check_panels(self, start, stop)
        return PackedMatrix(self.data[start:stop])

    def rows(self, idx: Tensor) -> Tensor:
        """The rows idx [m] int64, unpacked: [m, k]."""
        num_rows, width = self.shape
        panel = idx // PANEL_ROWS
        panel_rows = (num_rows - panel * PANEL_ROWS).clamp(max=PANEL_ROWS)
        first = panel * PANEL_ROWS * width // 2 + idx % PANEL_ROWS
        pairs = torch.arange(width // 2, device=idx.device)
        words = self.data.view(-1).view(torch.int32)
        return words[first[:, None] + pairs * panel_rows[:, None]].view(torch.bfloat16)

    def unpacked(self) -> Tensor:
        """The matrix as it was, a fresh tensor."""
        return self.rows(torch.arange(self.shape[0], device=self.data.device))


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """A matrix [n, k] of int8, row i of which is to be multiplied by scales[i]; `pack` makes it.

    data: bytes [panels, ceil(k / INT8_DEPTH) * INT8_DEPTH / columns, panel rows, columns] of an `Int8Order`,
    contiguous; rows and columns beyond [n, k] mean zero.
    scales: float32 [panels * panel rows], zeros beyond n.
    """

    data: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def pack(cls, values: Tensor, scales: Tensor, order: Int8Order) -> PackedInt8:
        """values int8 [n, k], scales float32 [n], both contiguous. Where no padding is needed they are reused."""
        num_rows, width = values.shape
        panel_rows, columns = order
        missing = (0, -width % INT8_DEPTH, 0, -num_rows % panel_rows)
        data = F.pad(values, missing) if any(missing) else values
        if order == QUADS:
            data.bitwise_xor_(-128)
        num_panels, num_words = data.shape[0] // panel_rows, data.shape[1] // columns
        words = data.view(num_panels, panel_rows, num_words, columns).transpose(1, 2)
        data = data.view(words.shape)
        data.copy_(words.clone(memory_format=torch.contiguous_format))
        return cls(data, F.pad(scales, missing[2:]) if any(missing) else scales, torch.Size((num_rows, width)))

    @property
    def order(self) -> Int8Order:
        return Int8Order(*self.data.shape[2:])

    @property
    def panel_rows(self) -> int:
        return self.data.shape[2]

    def narrow_rows(self, start: int, stop: int) -> PackedInt8:
        """A view of rows start..stop, which are whole panels."""
        check_panels(self, start, stop)
        rows = self.panel_rows
        first, last = start // rows, -(-stop // rows)
        scales = self.scales[start : last * rows]
        return PackedInt8(self.data[first:last], scales, torch.Size((stop - start, self.shape[1])))

    def unpacked(self) -> Tensor:
        """The integers as they were, int8 [n, k], a fresh tensor."""
        num_rows, width = self.shape
        panel_rows, columns = self.order
        num_panels, num_words = self.data.shape[:2]
        rows = self.data.transpose(1, 2).reshape(num_panels * panel_rows, columns * num_words)
        values = rows[:num_rows, :width].contiguous()
        return values.bitwise_xor(-128) if self.order == QUADS else values


Packed = PackedMatrix | PackedInt8


def check_panels(w: Packed, start: int, stop: int) -> None:
    """ValueError unless rows start..stop of w are whole panels, of which the last may be the matrix's narrower one."""
    if start % w.panel_rows or (stop % w.panel_rows and stop != w.shape[0]):
        raise ValueError(f"rows {start} to {stop} of a packed matrix do not begin and end with panels")
