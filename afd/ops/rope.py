"""Rotary position embedding: angles of positions, and the rotation in torch."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_POSITIONS = 2048
MOST_POSITIONS = 1 << 16
"""The longest table: 32 MiB with 128 rotary dimensions."""


def cos_sin(frequencies: Tensor, positions: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two [num_tokens, rotary_dim / 2] float32 tables for integer `positions` [num_tokens], times `factor`."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


class ComputedAngles:
    """cos and sin of positions, computed each time: nothing grows, so that no stream of a GPU must wait."""

    def __init__(self, frequencies: Tensor, factor: float):
        self._frequencies = frequencies
        self._factor = factor
        self.half = frequencies.shape[0]

    def of(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Two [num_tokens, half] float32 for `positions` [num_tokens] int64; see `ops.Rotary`."""
        return cos_sin(self._frequencies, positions, self._factor)


class AngleTable:
    """cos and sin of positions 0, 1, ... in host memory: looked up, as many as were asked for so far.

    One thread at a time. Positions from MOST_POSITIONS on are computed.
    """

    def __init__(self, frequencies: Tensor, factor: float):
        self._frequencies = frequencies
        self._factor = factor
        self.half = frequencies.shape[0]
        self._tables = (torch.empty(0, self.half), torch.empty(0, self.half))

    def of(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Two [num_tokens, half] float32 for `positions` [num_tokens] int64, all below `end`."""
        if end > MOST_POSITIONS:
            return cos_sin(self._frequencies, positions, self._factor)
        if end > self._tables[0].shape[0]:
            self._grow(max(FIRST_POSITIONS, 1 << (end - 1).bit_length()))
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _grow(self, num_positions: int) -> None:
        cos, sin = self._tables
        more_cos, more_sin = cos_sin(self._frequencies, torch.arange(cos.shape[0], num_positions), self._factor)
        self._tables = torch.cat((cos, more_cos)), torch.cat((sin, more_sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first rotary_dim dimensions of x [num_tokens, num_heads, head_dim]; float32 inside."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rotary, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = rotary[..., :half], rotary[..., half:]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    out = out.to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out
