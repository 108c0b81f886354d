"""What is being planned: a model on an xAyF topology of two chips, and how it runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum

from afd.errors import ConfigError
from afd.plan.drafts import NO_DRAFTS, Drafts
from afd.plan.hardware import Chip
from afd.plan.models import ModelShape
from afd.types import MAX_STREAMS, Topology


class KvDtype(StrEnum):
    """Precision of attention's cache and core. AUTO: each layer's published KV width, 8-bit core where it is 1 byte."""

    AUTO = "auto"
    FP8 = "fp8"
    INT8 = "int8"
    BF16 = "bf16"

    @property
    def bytes_per_element(self) -> float | None:
        """None = as published."""
        return {KvDtype.AUTO: None, KvDtype.BF16: 2.0}.get(self, 1.0)


class Dispatch(StrEnum):
    """Which rows an FFN instance is sent. BROADCAST: every row. SPARSE: only rows that hit one of its experts."""

    BROADCAST = "broadcast"
    SPARSE = "sparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on an xAyF topology of two chips, and how it runs.

    The widths of weights are the model's (`ModelShape.weights`); embedding and LM head are 16-bit.

    ranks_per_instance: chips of one instance; both roles have the same number (rank i talks to rank i).
    streams: micro-batches in flight, the pipeline's depth.
    """

    model: ModelShape
    attention_chip: Chip
    ffn_chip: Chip
    topology: Topology
    streams: int = 3
    kv_dtype: KvDtype = KvDtype.AUTO
    ranks_per_instance: int = 8
    dispatch: Dispatch = Dispatch.BROADCAST
    drafts: Drafts = NO_DRAFTS

    def __post_init__(self) -> None:
        if self.topology.mono:
            raise ConfigError("topology mono has nothing to plan: give xAyF")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ConfigError(f"streams must be 1 to {MAX_STREAMS}, found {self.streams}")
        if self.ranks_per_instance < 1:
            raise ConfigError(f"ranks per instance must be positive, found {self.ranks_per_instance}")
        if self.drafts.count and self.model.draft is None:
            raise ConfigError(f"--mtp {self.drafts.count}: {self.model.name} has no layers that predict further tokens")
        if self.dispatch is Dispatch.SPARSE and (self.model.has_shared_expert or not self.model.max_top_k):
            kind = "has a shared expert" if self.model.max_top_k else "is dense"
            raise ConfigError(f"sparse dispatch: {self.model.name} {kind}, so every FFN instance needs every row")

    @property
    def pipeline_layers(self) -> int:
        """Layers that a micro-batch goes through: the model's, and one for each draft whose FFN is a mixture."""
        draft = self.model.draft
        return self.model.num_layers + (self.drafts.count if draft is not None and draft.ffn.experts else 0)

    @property
    def attention_ranks(self) -> int:
        return self.topology.num_attention * self.ranks_per_instance

    @property
    def ffn_ranks(self) -> int:
        return self.topology.num_ffn * self.ranks_per_instance

    @property
    def num_chips(self) -> int:
        return self.attention_ranks + self.ffn_ranks

    @property
    def usd_per_hour(self) -> float | None:
        """Rent of all chips; None when a price is missing."""
        if self.attention_chip.usd_per_hour is None or self.ffn_chip.usd_per_hour is None:
            return None
        return self.attention_ranks * self.attention_chip.price + self.ffn_ranks * self.ffn_chip.price

    def replace(
        self,
        *,
        topology: Topology | None = None,
        streams: int | None = None,
        attention_chip: Chip | None = None,
        ffn_chip: Chip | None = None,
    ) -> Deployment:
        """A copy with another shape or other chips."""
        return dataclasses.replace(
            self,
            topology=topology or self.topology,
            streams=streams or self.streams,
            attention_chip=attention_chip or self.attention_chip,
            ffn_chip=ffn_chip or self.ffn_chip,
        )

    def fullest_share(self, experts: int) -> float:
        """Share of a layer's experts on the FFN instance that holds most: experts are whole, sliced only within one."""
        return -(-experts // self.topology.num_ffn) / experts if experts else 1.0 / self.topology.num_ffn

    @property
    def one_domain(self) -> bool:
        """Both roles lie within one domain of a fast interconnect, which then carries their rows."""
        chip = self.attention_chip
        return chip.name == self.ffn_chip.name and self.num_chips <= chip.chips_per_domain

    def sent_share(self) -> float:
        """Share of rows that one FFN instance receives: 1 for broadcast, else the chance that it is hit.

        1 - C(E - e, k) / C(E, k) for an instance with e of the E experts (hypergeometric), averaged over instances
        and layers; dense layers send every row.
        """
        if self.dispatch is Dispatch.BROADCAST:
            return 1.0
        shares = [g.layers * _hit_share(g.experts, g.top_k, self.topology.num_ffn) for g in self.model.ffn]
        return sum(shares) / self.model.num_layers

    def check_context(self, context: int) -> None:
        """ConfigError when the model does not serve sequences this long."""
        if context < 1:
            raise ConfigError(f"context must be positive, found {context}")
        if context > self.model.max_context:
            raise ConfigError(
                f"context {context} is past the limit of {self.model.name}: {self.model.max_context} tokens"
            )


def _hit_share(experts: int, top_k: int, instances: int) -> float:
    if not experts:
        return 1.0
    held = [experts // instances + (i < experts % instances) for i in range(instances)]
    missed = [math.comb(experts - e, top_k) / math.comb(experts, top_k) for e in held]
    return 1.0 - sum(missed) / instances
