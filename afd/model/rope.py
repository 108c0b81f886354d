"""Rotary position embedding: tables of angles, rotation per layer."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from afd.model.spec import RopeScaling, RopeSpec

_FIRST_POSITIONS = 2048


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """[rotary_dim / 2] float32, scaled as the spec says."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / (spec.theta**exponents)
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
    """cos and sin of positions 0, 1, ...: as many as were asked for so far. One thread at a time.

    They are computed on the host and copied at once: to a GPU, behind no stream's work and before any that reads them.
    """

    def __init__(self, spec: RopeSpec, device: torch.device):
        self._inv_freq = inverse_frequencies(spec)
        self._factor = spec.scaling.attention_factor if spec.scaling is not None else 1.0
        self._device = device
        self.half = self._inv_freq.shape[0]
        self._grow(_FIRST_POSITIONS)

    def of(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Two [num_tokens, rotary_dim / 2] float32 for `positions` [num_tokens] int64, all below `end`."""
        if end > self._cos.shape[0]:
            self._grow(1 << (end - 1).bit_length())
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self, num_positions: int) -> None:
        tables = cos_sin(self._inv_freq, torch.arange(num_positions), self._factor)
        self._cos, self._sin = (table.to(self._device) for table in tables)


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
