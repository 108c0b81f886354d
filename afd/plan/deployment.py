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


@dataclass(frozen=True, slots=True)
class Part:
    """Instances of one kind of chip within a role.

    load: work of one of them over the mean of the role: requests of an attention instance, experts and slices of an
        FFN instance.
    """

    chip: Chip
    instances: int
    load: float = 1.0

    @property
    def text(self) -> str:
        """ "4 x H20"."""
        return f"{self.instances} x {self.chip.title}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on an xAyF topology, and how it runs.

    The widths of weights are the model's (`ModelShape.weights`); embedding and LM head are 16-bit.

    attention_more, ffn_more: instances that are of another kind of chip than the role's other ones.
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
    attention_more: tuple[Part, ...] = ()
    ffn_more: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.topology.mono:
            raise ConfigError("topology mono has nothing to plan: give xAyF")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ConfigError(f"streams must be 1 to {MAX_STREAMS}, found {self.streams}")
        if self.ranks_per_instance < 1:
            raise ConfigError(f"ranks per instance must be positive, found {self.ranks_per_instance}")
        for role, parts in (("attention", self.attention_parts), ("FFN", self.ffn_parts)):
            if any(part.instances < 1 or part.load <= 0.0 for part in parts):
                raise ConfigError(f"{self.topology}: the {role} instances of each kind, and their loads, are positive")
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
    def attention_parts(self) -> tuple[Part, ...]:
        """The kinds of attention instances; all of them where they are of one."""
        return _parts(self.attention_chip, self.topology.num_attention, self.attention_more)

    @property
    def ffn_parts(self) -> tuple[Part, ...]:
        return _parts(self.ffn_chip, self.topology.num_ffn, self.ffn_more)

    @property
    def mixed(self) -> bool:
        """One role has several kinds of chips."""
        return bool(self.attention_more or self.ffn_more)

    def attention_views(self) -> list[tuple[Deployment, float]]:
        """Each kind of attention instances as if all were of it, and its load."""
        if not self.attention_more:
            return [(self, 1.0)]
        return [
            (dataclasses.replace(self, attention_chip=part.chip, attention_more=()), part.load)
            for part in self.attention_parts
        ]

    def ffn_views(self) -> list[tuple[Deployment, float]]:
        """Each kind of FFN instances as if all were of it, and its load."""
        if not self.ffn_more:
            return [(self, 1.0)]
        return [(dataclasses.replace(self, ffn_chip=part.chip, ffn_more=()), part.load) for part in self.ffn_parts]

    @property
    def chips(self) -> dict[str, int]:
        """Chips of each kind by name."""
        used: dict[str, int] = {}
        for part in (*self.attention_parts, *self.ffn_parts):
            used[part.chip.name] = used.get(part.chip.name, 0) + part.instances * self.ranks_per_instance
        return used

    @property
    def usd_per_hour(self) -> float | None:
        """Rent of all chips; None when a price is missing."""
        total = 0.0
        for part in (*self.attention_parts, *self.ffn_parts):
            if part.chip.usd_per_hour is None:
                return None
            total += part.instances * self.ranks_per_instance * part.chip.usd_per_hour
        return total

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

    def fullest_share(self, experts: int, load: float = 1.0) -> float:
        """Share of a layer's experts on the fullest FFN instance of such a load: experts are whole, sliced inside."""
        share = load / self.topology.num_ffn
        return min(experts, math.ceil(experts * share - 1e-9)) / experts if experts else share

    @property
    def one_domain(self) -> bool:
        """Both roles lie within one domain of a fast interconnect, which then carries their rows."""
        return self.num_chips <= self.attention_chip.chips_per_domain and len(self.chips) == 1

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


def _parts(chip: Chip, instances: int, more: tuple[Part, ...]) -> tuple[Part, ...]:
    """The kinds of a role: what `more` leaves of `instances` is of `chip`, and carries the rest of the load."""
    if not more:
        return (Part(chip, instances),)
    left = instances - sum(part.instances for part in more)
    load = (instances - sum(part.instances * part.load for part in more)) / left if left > 0 else 0.0
    return (Part(chip, left, load), *more)


def _hit_share(experts: int, top_k: int, instances: int) -> float:
    if not experts:
        return 1.0
    held = [experts // instances + (i < experts % instances) for i in range(instances)]
    missed = [math.comb(experts - e, top_k) / math.comb(experts, top_k) for e in held]
    return 1.0 - sum(missed) / instances
