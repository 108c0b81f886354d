"""Rotary position embedding: the frequencies of a spec, and angles that layers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afd.model.spec import RopeScaling, RopeSpec
from afd.ops.ops import Ops, Rotary


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


class Rotaries:
    """The angles of one half's layers: layers that rotate alike share one."""

    def __init__(self, ops: Ops):
        self._ops = ops
        self._of: dict[RopeSpec, Rotary] = {}

    def of(self, spec: RopeSpec) -> Rotary:
        """The same object for equal specs."""
        if spec not in self._of:
            factor = spec.scaling.attention_factor if spec.scaling is not None else 1.0
            self._of[spec] = self._ops.rotary(inverse_frequencies(spec), factor)
        return self._of[spec]
