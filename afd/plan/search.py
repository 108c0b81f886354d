"""Which topology: every xAyF within a number of chips, every stream count, every pair of chips, best batch each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment, Dispatch, KvDtype
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.models import ModelShape
from afd.types import Topology

MAX_ATTENTION = 128
"""Attention instances of one cluster (the gang member mask's width)."""

TIE = 0.01
"""Leads below this are under the model's accuracy: the smaller deployment wins."""

PRUNE = 0.5
"""Topologies this much worse than a smaller neighbour are neither listed nor followed further."""

DEFAULT_STREAMS = (3,)
"""The report's three-stage pipeline, and the depth that a plan names by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The deployments among which the planner searches.

    max_chips: of attention and FFN together.
    ranks_per_instance: 0 = the chips of one server.
    """

    model: ModelShape
    attention_chips: Sequence[Chip]
    ffn_chips: Sequence[Chip]
    max_chips: int = 256
    streams: Sequence[int] = DEFAULT_STREAMS
    kv_dtype: KvDtype = KvDtype.AUTO
    weight_bytes: float = 1.0
    ranks_per_instance: int = 0
    dispatch: Dispatch = Dispatch.BROADCAST

    def deployment(self, attention: Chip, ffn: Chip, topology: Topology, streams: int) -> Deployment:
        """One point of the space; ConfigError when the two servers differ in size (rank i talks to rank i)."""
        ranks = self.ranks_per_instance or attention.chips_per_server
        if not self.ranks_per_instance and attention.chips_per_server != ffn.chips_per_server:
            raise ConfigError(
                f"{attention.title} servers have {attention.chips_per_server} chips and {ffn.title} servers "
                f"{ffn.chips_per_server}: instances must be of one size, give --ranks-per-instance"
            )
        return Deployment(
            model=self.model,
            attention_chip=attention,
            ffn_chip=ffn,
            topology=topology,
            streams=streams,
            kv_dtype=self.kv_dtype,
            weight_bytes=self.weight_bytes,
            ranks_per_instance=ranks,
            dispatch=self.dispatch,
        )

    def pairs(self) -> list[tuple[Chip, Chip]]:
        return [(attention, ffn) for attention in self.attention_chips for ffn in self.ffn_chips]


def search(space: SearchSpace, estimator: Estimator, objective: Objective) -> list[Estimate]:
    """Topologies that hold the SLA, best first, each at its best stream count and batch.

    Ranked by USD per token when every chip has a price, else by tokens per chip and second. Empty when nothing holds
    the SLA: a result, not an error. Raises ConfigError when `max_chips` holds no topology at all.
    """
    found: list[Estimate] = []
    for attention, ffn in space.pairs():
        probe = space.deployment(attention, ffn, Topology(1, 1), streams=min(space.streams))
        if probe.num_chips > space.max_chips:
            raise ConfigError(f"--max-gpus {space.max_chips}: the smallest topology, 1A1F, has {probe.num_chips}")
        probe.check_context(objective.context)
        found += _search_pair(space, estimator, objective, probe)
    return rank(found)


def _search_pair(
    space: SearchSpace, estimator: Estimator, objective: Objective, probe: Deployment
) -> Iterator[Estimate]:
    """One pair of chips. For a given FFN count throughput per chip rises with the attention count up to the balance
    and falls after it, and likewise over FFN counts: a side is left once it is PRUNE times worse than its best."""
    instances = space.max_chips // probe.ranks_per_instance
    best_of_all = 0.0
    for num_ffn in range(1, instances):
        best = 0.0
        for num_attention in range(1, min(instances - num_ffn, MAX_ATTENTION) + 1):
            shape = Topology(num_attention, num_ffn)
            options = [estimator.best(probe.replace(topology=shape, streams=m), objective) for m in space.streams]
            fastest = max((e for e in options if e is not None), key=lambda e: e.tgs, default=None)
            if fastest is None or fastest.tgs < PRUNE * best:
                break  # more attention instances only load the FFN more
            best = max(best, fastest.tgs)
            yield fastest
        if best < PRUNE * best_of_all:
            break
        best_of_all = max(best_of_all, best)


def rank(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Best first; of those within TIE of the best, the one with the fewest chips leads."""
    ordered = sorted(estimates, key=_badness)
    if not ordered:
        return []
    tied = [e for e in ordered if _badness(e) <= _badness(ordered[0]) * (1.0 + TIE)]
    lead = min(tied, key=lambda e: (e.deployment.num_chips, _badness(e)))
    return [lead, *(e for e in ordered if e is not lead)]


def _badness(estimate: Estimate) -> float:
    """USD per token, or chip-seconds per token without prices: smaller is better."""
    usd = estimate.usd_per_mtok
    return 1.0 / estimate.tgs if usd is None else usd
