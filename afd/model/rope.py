"""Rotary position embedding: tables of angles, rotation per layer."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from afd.model.spec import RopeScaling, RopeSpec

FIRST_POSITIONS = 2048
MOST_POSITIONS = 1 << 16
"""Of a table: 32 MiB with 128 rotary dimensions."""


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """[rotary_dim / 2] float32, scaled as the spec says."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.divisors:
        frequencies = frequencies / torch.tensor(spec.divisors)
    scaling = spec.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(frequencies, spec, scaling)
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained context are stretched, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    position = scaling.original_max_position / wavelengths - scaling.low_freq_factor
    blend = (position / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, spec: RopeSpec, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): fast dimensions keep their frequency, slow ones are stretched."""

    def dimension_of(turns: float) -> float:
        period = scaling.original_max_position / (turns * 2 * math.pi)
        return spec.rotary_dim * math.log(period) / (2 * math.log(spec.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low if high != low else 1e-3
    stretched = ((torch.arange(frequencies.shape[0]).float() - low) / width).clamp(0.0, 1.0)
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies


def cos_sin(inv_freq: Tensor, positions: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two [num_tokens, rotary_dim / 2] float32 tables for integer `positions` [num_tokens], times `factor`."""
    angles = positions.float()[:, None] * inv_freq
    return angles.cos() * factor, angles.sin() * factor


class RopeTable:
    """cos and sin of positions 0, 1, ...: on the CPU looked up, as many as were asked for so far. One thread at a time.

    Positions from MOST_POSITIONS on, and those on a GPU, are computed: there a table that grows would have to wait for
    every stream that reads the old one.
    """

    def __init__(self, spec: RopeSpec, device: torch.device):
        self._inv_freq = inverse_frequencies(spec).to(device)
        self._factor = spec.scaling.attention_factor if spec.scaling is not None else 1.0
        self.half = self._inv_freq.shape[0]
        self._tables = (torch.empty(0, self.half), torch.empty(0, self.half))

    def of(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Two [num_tokens, rotary_dim / 2] float32 for `positions` [num_tokens] int64, all below `end`."""
        if not positions.is_cpu or end > MOST_POSITIONS:
            return cos_sin(self._inv_freq, positions, self._factor)
        if end > self._tables[0].shape[0]:
            self._grow(max(FIRST_POSITIONS, 1 << (end - 1).bit_length()))
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _grow(self, num_positions: int) -> None:
        cos, sin = self._tables
        more_cos, more_sin = cos_sin(self._inv_freq, torch.arange(cos.shape[0], num_positions), self._factor)
        self._tables = torch.cat((cos, more_cos)), torch.cat((sin, more_sin))


@functools.cache
def rope_table(spec: RopeSpec, device: torch.device) -> RopeTable:
    """The process's table for all layers that rotate alike."""
    return RopeTable(spec, device)


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
