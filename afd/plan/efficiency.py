"""What real kernels reach of a chip's peaks: one set of factors for every model, chip and topology.

Where each comes from (docs/planning.md has the numbers): core_16bit, core_flops, gemm and launch_s follow from the
report's measured attention layers (Table 9); network is DeepEP's 40 of 50 GB/s; core_8bit and collective_exposed follow
from the report's peak minutes (Table 8), jitter lies between its average over them (3.3 %) and StepMesh's 2 ms of 50;
colocated_stretch is what DeepSeek's published decode profile needs. Replace them with measurements: `--calibrate`,
`--efficiency KEY=VALUE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from afd.errors import ConfigError

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Efficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shares of a peak (1 = the peak), and fixed times. The attributes' comments say what each multiplies."""

    core_16bit: Share = 0.90  # memory bandwidth, attention core over a 16-bit KV cache
    core_8bit: Share = 0.57  # memory bandwidth, attention core over an 8-bit KV cache (conversion costs time)
    core_flops: Share = 0.65  # compute peak, attention core
    gemm: Share = 0.65  # compute peak and memory bandwidth, projections and experts
    network: Share = 0.80  # NIC line rate
    interconnect: Share = 0.80  # chip-to-chip bandwidth inside a server
    collective_exposed: Fraction = 0.30  # of an FFN instance's gather + scatter, what its GEMMs do not hide
    expert_imbalance: Annotated[float, msgspec.Meta(ge=1)] = 1.0  # rows of the busiest holder of experts over the mean
    launch_s: Seconds = 35e-6  # per role and layer: launches, norms, router, quantisation
    wire_s: Seconds = 5e-6  # per transfer and direction: posting and flight
    jitter: Seconds = 0.036  # mean TPOT over a peak minute's, which is the sum of the stages
    memory: Share = 0.93  # of a chip's memory that may be used
    workspace_gb: Seconds = 4.0  # activations, graphs, transfer slots, 1e9 bytes per chip
    colocated_stretch: Annotated[float, msgspec.Meta(ge=1)] = 1.28  # a colocated EP layer over the sum of its parts

    def core_bandwidth(self, kv_bytes: float) -> float:
        """Share of memory bandwidth at `kv_bytes` bytes per cached element."""
        return self.core_8bit if kv_bytes <= 1 else self.core_16bit

    @property
    def workspace_bytes(self) -> float:
        return self.workspace_gb * 1e9

    def with_overrides(self, texts: Sequence[str]) -> Efficiency:
        """A copy with "KEY=VALUE" texts applied; ConfigError on an unknown key or a value out of range."""
        chosen = self
        for text in texts:
            key, _, value = text.partition("=")
            fields = msgspec.structs.asdict(chosen)
            if key not in fields:
                raise ConfigError(f"--efficiency {text!r}: unknown factor; known are {', '.join(fields)}")
            try:
                chosen = msgspec.convert({**fields, key: float(value)}, Efficiency)
            except msgspec.ValidationError as error:
                raise ConfigError(f"--efficiency {text!r}: {str(error).partition(' - at ')[0]}") from None
            except ValueError:
                raise ConfigError(f"--efficiency {text!r}: expected KEY=NUMBER") from None
        return chosen
