"""A bfloat16 matrix in the order that the native GEMM reads it in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL_ROWS = 64
"""Rows that are packed together (`kPanel` of src/kernels.h)."""


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
