"""Matrices in the order that the native GEMMs read them in: bfloat16, or int8 with a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_ROWS = 64
"""Rows of a bfloat16 matrix that are packed together (`kPanel` of src/kernels.h)."""

INT8_PANEL_ROWS = 32
"""Of an int8 matrix (`kInt8Panel`); divides PANEL_ROWS."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [n, k] whose panels of PANEL_ROWS rows lie as [k / 2, rows of the panel, 2]; `pack` makes it.

    data: bfloat16 [n, k], contiguous: the right memory, not the matrix.
    """

    data: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def narrow_rows(self, start: int, stop: int) -> PackedMatrix:
        """A view of rows start..stop; start is a multiple of PANEL_ROWS, and so is stop, or it is the end."""
        if start % PANEL_ROWS or (stop % PANEL_ROWS and stop != self.shape[0]):
            raise ValueError(f"rows {start} to {stop} of a packed matrix do not begin and end with panels")
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

    data: int8 [panels, ceil(k / 2), INT8_PANEL_ROWS, 2], contiguous; rows and a column beyond [n, k] are zeros.
    scales: float32 [panels * INT8_PANEL_ROWS], zeros beyond n.
    """

    data: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def pack(cls, values: Tensor, scales: Tensor) -> PackedInt8:
        """values int8 [n, k], scales float32 [n], both contiguous. Where no padding is needed they are reused."""
        num_rows, width = values.shape
        missing = (0, width % 2, 0, -num_rows % INT8_PANEL_ROWS)
        data = F.pad(values, missing) if any(missing) else values
        num_panels, num_pairs = data.shape[0] // INT8_PANEL_ROWS, data.shape[1] // 2
        pairs = data.view(num_panels, INT8_PANEL_ROWS, num_pairs, 2).transpose(1, 2)
        data = data.view(pairs.shape)
        data.copy_(pairs.clone(memory_format=torch.contiguous_format))
        return cls(data, F.pad(scales, missing[2:]) if any(missing) else scales, torch.Size((num_rows, width)))

    def narrow_rows(self, start: int, stop: int) -> PackedInt8:
        """A view of rows start..stop; start is a multiple of INT8_PANEL_ROWS, and so is stop, or it is the end."""
        if start % INT8_PANEL_ROWS or (stop % INT8_PANEL_ROWS and stop != self.shape[0]):
            raise ValueError(f"rows {start} to {stop} of a packed matrix do not begin and end with panels")
        first, last = start // INT8_PANEL_ROWS, -(-stop // INT8_PANEL_ROWS)
        scales = self.scales[start : last * INT8_PANEL_ROWS]
        return PackedInt8(self.data[first:last], scales, torch.Size((stop - start, self.shape[1])))

    def unpacked(self) -> Tensor:
        """The integers as they were, int8 [n, k], a fresh tensor."""
        num_rows, width = self.shape
        num_panels, pairs = self.data.shape[:2]
        rows = self.data.transpose(1, 2).reshape(num_panels * INT8_PANEL_ROWS, 2 * pairs)
        return rows[:num_rows, :width].contiguous()


Packed = PackedMatrix | PackedInt8
