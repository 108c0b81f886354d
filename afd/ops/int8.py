"""Weights rounded to 8 bits, with one scale for each output channel: half the memory of bfloat16.

The native kernels have a GEMM for them, once packed (`afd.ops.PackedInt8`). Where those do not run, torch's GEMM
does, in the activations' type, and the scales are applied to its output. With tensor-parallel slices a channel's scale
is that of the slice that a rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX = 127.0
_SMALLEST_SCALE = 1e-30  # of a channel of zeros


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """values [..., out, in] int8; scales [..., out] float32."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, idx: int) -> Int8Weight:
        """One matrix of a stack."""
        return Int8Weight(self.values[idx], self.scales[idx])

    def narrow(self, dim: int, start: int, length: int) -> Int8Weight:
        """A view of some of the rows or matrices."""
        return Int8Weight(self.values.narrow(dim, start, length), self.scales.narrow(dim, start, length))

    def store(self, start: int, stop: int, numbers: Tensor) -> None:
        """Round numbers [stop - start, ...] into places start..stop of the first dimension."""
        numbers = numbers.float()
        scales = (numbers.abs().amax(dim=-1) / _MAX).clamp(min=_SMALLEST_SCALE)
        self.scales[start:stop] = scales
        self.values[start:stop] = (numbers / scales[..., None]).round_()


def int8_in(values: Tensor) -> Int8Weight:
    """Room for a weight in values [..., out, in]; nothing is stored in one without columns, so its scales are zeros."""
    return Int8Weight(values, torch.zeros(values.shape[:-1], dtype=torch.float32, device=values.device))


def int8_copy(matrix: Tensor, values: Tensor, piece_elements: int) -> Int8Weight:
    """matrix [out, in] rounded, in `values`; so many elements at a time are float32 meanwhile."""
    out = int8_in(values)
    step = max(piece_elements // matrix.shape[1], 1)
    for start in range(0, matrix.shape[0], step):
        stop = min(start + step, matrix.shape[0])
        out.store(start, stop, matrix[start:stop])
    return out


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """x [n, in] times the transpose of the weight -> [n, out] in x's dtype."""
    return (F.linear(x, weight.values.to(x.dtype)).float() * weight.scales).to(x.dtype)
