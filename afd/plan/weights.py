"""How many bytes a weight takes, by part of the model."""

from __future__ import annotations

from typing import Annotated

import msgspec

Width = Annotated[float, msgspec.Meta(gt=0, le=4)]

BYTES_OF = {
    "fp8": 1.0,
    "int8": 1.0,
    "bf16": 2.0,
    "int4": 0.5 + 2 / 32,  # groups of 32 with a 16-bit scale
    "nf4": 0.5 + 4 / 64,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes of a weight by the names of `--weight-dtype`, with scales of small groups; 8-bit blocks have too few."""


class WeightBytes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes per weight. linear: attention's projections. shared: dense layers and shared experts. routed: experts."""

    linear: Width = 1.0
    shared: Width = 1.0
    routed: Width = 1.0

    @classmethod
    def all(cls, width: float) -> WeightBytes:
        return cls(width, width, width)

    @property
    def text(self) -> str:
        """ "8-bit weights", or each part's bits where they differ."""
        bits = [f"{8 * width:.3g}" for width in (self.linear, self.shared, self.routed)]
        if len(set(bits)) == 1:
            return f"{bits[0]}-bit weights"
        return f"weights of {bits[0]} (attention), {bits[1]} (dense, shared) and {bits[2]} bits (experts)"
