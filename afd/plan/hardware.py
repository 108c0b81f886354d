"""Accelerators as the planner sees them: peaks, bandwidths, capacity, price."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from afd.errors import ConfigError

PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class Chip(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One accelerator. Fields are in the units of the data file (data/hardware.toml); properties are SI.

    chips_per_domain: chips that the interconnect joins across servers (NVL72: 72); 0 = those of one server.
    device: what AFD's workers run there as; "" = nothing that is known.
    fp8_tflops None: 8-bit weights and KV take the same bytes, arithmetic runs at the 16-bit peak (report 4.2).
    """

    name: str
    title: str
    bf16_tflops: PositiveFloat
    memory_gib: PositiveFloat
    memory_gb_per_s: PositiveFloat
    network_gbit_per_s: PositiveFloat
    interconnect_gb_per_s: PositiveFloat
    source: str
    chips_per_domain: NonNegative = 0
    device: Literal["", "cpu", "cuda"] = ""
    fp8_tflops: PositiveFloat | None = None
    usd_per_hour: PositiveFloat | None = None
    price_source: str = ""
    chips_per_server: Annotated[int, msgspec.Meta(ge=1)] = 8

    @property
    def peak_flops(self) -> float:
        """FLOP/s at the lowest precision it computes in."""
        return (self.fp8_tflops or self.bf16_tflops) * 1e12

    @property
    def bf16_flops(self) -> float:
        return self.bf16_tflops * 1e12

    def flops_at(self, width: float) -> float:
        """FLOP/s with values of `width` bytes. 4-bit weights are widened to 16 bit, as weight-only kernels do."""
        return self.peak_flops if width == 1 else self.bf16_flops

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def memory_bytes_per_s(self) -> float:
        return self.memory_gb_per_s * 1e9

    @property
    def network_bytes_per_s(self) -> float:
        """Its share of the server's NICs, one direction."""
        return self.network_gbit_per_s * 1e9 / 8

    @property
    def interconnect_bytes_per_s(self) -> float:
        """Bandwidth to its neighbours in the server, one direction."""
        return self.interconnect_gb_per_s * 1e9

    @property
    def ridge_flop_per_byte(self) -> float:
        """Roofline knee: FLOPs per byte above which it is compute bound."""
        return self.peak_flops / self.memory_bytes_per_s

    @property
    def price(self) -> float:
        """USD per hour; ConfigError when the data file has none."""
        if self.usd_per_hour is None:
            raise ConfigError(f"chip {self.name!r} has no price: give one with --price {self.name}=USD")
        return self.usd_per_hour

    @property
    def usd_per_flop(self) -> float:
        """Report Table 5."""
        return self.price / 3600 / self.peak_flops

    def usd_per_flop_at(self, width: float) -> float:
        """With values of `width` bytes."""
        return self.price / 3600 / self.flops_at(width)

    @property
    def usd_per_byte(self) -> float:
        """Report Table 5."""
        return self.price / 3600 / self.memory_bytes_per_s
