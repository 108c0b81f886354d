"""Which topology: every xAyF within a number of chips, every stream count, every pair of chips, best batch each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from afd.errors import ConfigError
from afd.plan.deployment import Deployment, Dispatch, KvDtype
from afd.plan.drafts import NO_DRAFTS, Drafts
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.models import ModelShape
from afd.types import MAX_STREAMS, Topology

MAX_ATTENTION = 128
"""Attention instances of one cluster (the gang member mask's width)."""

TIE = 0.01
"""Leads below this are under the model's accuracy: the smaller deployment wins."""

PRUNE = 0.5
"""Topologies this much worse than a smaller neighbour are neither listed nor followed further."""

EVERY_COUNT = 48
"""Up to so many instances every count of a role is tried, beyond it steps of an eighth and then the neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The deployments among which the planner searches.

    max_chips: of attention and FFN together.
    inventory: chips that there are, by the chip's name; empty = as many as `max_chips` of any.
    ranks_per_instance: 0 = the chips of one server.
    """

    model: ModelShape
    attention_chips: Sequence[Chip]
    ffn_chips: Sequence[Chip]
    max_chips: int = 256
    inventory: Mapping[str, int] = field(default_factory=dict)
    streams: Sequence[int] = range(1, MAX_STREAMS + 1)
    kv_dtype: KvDtype = KvDtype.AUTO
    ranks_per_instance: int = 0
    dispatch: Dispatch = Dispatch.BROADCAST
    drafts: Drafts = NO_DRAFTS

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
            ranks_per_instance=ranks,
            dispatch=self.dispatch,
            drafts=self.drafts,
        )

    def pairs(self) -> list[tuple[Chip, Chip]]:
        return [(attention, ffn) for attention in self.attention_chips for ffn in self.ffn_chips]

    @property
    def chips(self) -> list[Chip]:
        """Every kind once."""
        return list({chip.name: chip for chip in (*self.attention_chips, *self.ffn_chips)}.values())

    def limit(self, chip: Chip) -> int:
        """Chips of this kind that a deployment may have."""
        return min(self.max_chips, self.inventory.get(chip.name, self.max_chips))

    def copies(self, deployment: Deployment) -> int:
        """Deployments like this one within the inventory; 1 without one."""
        if not self.inventory:
            return 1
        return min(self.inventory.get(name, 0) // count for name, count in deployment.chips.items())

    def tokens_per_s(self, estimate: Estimate) -> float:
        """Output tokens per second of all copies that fit the inventory."""
        return self.copies(estimate.deployment) * estimate.deployment.num_chips * estimate.tgs


def search(space: SearchSpace, estimator: Estimator, objective: Objective) -> list[Estimate]:
    """Topologies that hold the SLA, best first, each at its best stream count and batch.

    Ranked by the inventory's tokens per second, else by USD per token when every chip has a price, else by tokens per
    chip and second. Empty when nothing holds the SLA: a result, not an error. Raises ConfigError when the chips hold no
    topology at all.
    """
    found: list[Estimate] = []
    smallest: list[Deployment] = []
    for attention, ffn in space.pairs():
        probe = space.deployment(attention, ffn, Topology(1, 1), streams=min(space.streams))
        probe.check_context(objective.longest)
        smallest.append(probe)
        if _fits(space, probe):
            found += _search_pair(space, estimator, objective, probe)
    if not any(_fits(space, probe) for probe in smallest):
        given = f"--max-gpus {space.max_chips}"
        if space.inventory:
            given = "--inventory " + ",".join(f"{name}:{count}" for name, count in space.inventory.items())
        raise ConfigError(f"{given}: the smallest topology, 1A1F, has {min(p.num_chips for p in smallest)}")
    return rank(found, space)


def _fits(space: SearchSpace, deployment: Deployment) -> bool:
    return deployment.num_chips <= space.max_chips and space.copies(deployment) > 0


def _search_pair(space: SearchSpace, estimator: Estimator, objective: Objective, probe: Deployment) -> list[Estimate]:
    """One pair of chips: every count where they are few, else a coarse grid and the best one's neighbourhood."""
    ranks = probe.ranks_per_instance
    most_ffn = space.limit(probe.ffn_chip) // ranks
    most_attention = min(space.limit(probe.attention_chip) // ranks, MAX_ATTENTION)
    counts = _counts(max(most_ffn, most_attention))
    found = list(_scan(space, estimator, objective, probe, counts, counts))
    if not found or len(counts) == max(most_ffn, most_attention):
        return found
    best = rank(found, space)[0].deployment.topology
    seen = {estimate.deployment.topology for estimate in found}
    near = [_near(count, counts) for count in (best.num_attention, best.num_ffn)]
    return found + [e for e in _scan(space, estimator, objective, probe, *near) if e.deployment.topology not in seen]


def _scan(
    space: SearchSpace,
    estimator: Estimator,
    objective: Objective,
    probe: Deployment,
    attention_counts: Sequence[int],
    ffn_counts: Sequence[int],
) -> Iterator[Estimate]:
    """Estimates over a grid, without those that cannot be best.

    For a given FFN count throughput per chip rises with the attention count up to the balance and falls after it, and
    likewise over FFN counts: a side is left once it is PRUNE times worse than its best.
    """
    best_of_all = 0.0
    for num_ffn in ffn_counts:
        best = 0.0
        for num_attention in attention_counts:
            shape = probe.replace(topology=Topology(num_attention, num_ffn))
            if num_attention > MAX_ATTENTION or not _fits(space, shape):
                break
            options = [estimator.best(shape.replace(streams=m), objective) for m in space.streams]
            fastest = max((e for e in options if e is not None), key=lambda e: e.tgs, default=None)
            if fastest is None or fastest.tgs < PRUNE * best:
                break  # more attention instances only load the FFN more
            best = max(best, fastest.tgs)
            yield fastest
        if best < PRUNE * best_of_all:
            break
        best_of_all = max(best_of_all, best)


def _counts(most: int) -> list[int]:
    counts = list(range(1, min(most, EVERY_COUNT if most <= EVERY_COUNT else 16) + 1))
    while counts and counts[-1] < most:
        counts.append(min(most, counts[-1] + counts[-1] // 8))
    return counts


def _near(count: int, counts: Sequence[int]) -> list[int]:
    """Counts between the neighbours of `count` in the grid."""
    place = counts.index(count)
    return list(range(counts[max(0, place - 1)], counts[min(len(counts) - 1, place + 1)] + 1))


def rank(estimates: Sequence[Estimate], space: SearchSpace | None = None) -> list[Estimate]:
    """Best first; of those within TIE of the best, the one with the fewest chips leads."""

    def badness(estimate: Estimate) -> float:
        """Seconds per token of the inventory, USD per token, or chip-seconds per token: smaller is better."""
        if space is not None and space.inventory:
            return 1.0 / space.tokens_per_s(estimate)
        usd = estimate.usd_per_mtok
        return 1.0 / estimate.tgs if usd is None else usd

    ordered = sorted(estimates, key=badness)
    if not ordered:
        return []
    tied = [e for e in ordered if badness(e) <= badness(ordered[0]) * (1.0 + TIE)]
    lead = min(tied, key=lambda e: (e.deployment.num_chips, badness(e)))
    return [lead, *(e for e in ordered if e is not lead)]
